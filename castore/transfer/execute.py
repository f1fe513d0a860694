"""Carry out a push or pull. Under a writer lease of the target, in the order of a save:

    lease → plan → chunks (packs, durable) → snapshot files, parents first → check → refs → check → report

"Check" reads the condemned set and the pack listing again, after the roots are visible: what this run relied on, and
what a collector took meanwhile, is sent again, until nothing changes. An interruption leaves packs that no snapshot
names, or snapshots that no ref names; the next run finds both and goes on from there.

At the source this is a reader: it holds no lease, and looks a missing pack up once more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from castore.checkpoint.bases import candidates
from castore.checkpoint.plan import plan_manifest
from castore.errors import (
    CastoreError,
    ConflictError,
    DamageError,
    FormatError,
    SnapshotGoneError,
    UnknownRefError,
    UsageError,
)
from castore.format.identity import state_id
from castore.format.layout import snapshot_name
from castore.format.manifest import Entry
from castore.format.snapshot import SnapshotRecord, encode_snapshot
from castore.ids import Buffer, ChunkId, SnapshotId
from castore.leases import writer_lease
from castore.refs import create_tag, move_branch, read_branch, read_tag
from castore.repository import Handle
from castore.snapshots import check_paths, list_snapshot_ids, read_record
from castore.transfer.moved import MovedSnapshots
from castore.transfer.needs import leaf_needs, manifest_needs, run_leaves
from castore.transfer.plan import RefMove, TransferPlan, plan_transfer
from castore.transfer.rehash import Digests, learn_pairs, rehashed_entries, rehashed_record
from castore.transfer.request import TransferRequest, check_request
from castore.transfer.sender import PUSH_PACK_BYTES_MAX, Sender

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all), raw."""

_PENDING_SNAPSHOTS_MAX = 256
"""Snapshots whose chunks are sealed together: small saves then share packs, and an interruption costs few."""


@dataclass(frozen=True, slots=True)
class TransferReport:
    """What a push or pull did, or with `dry_run` would do."""

    plan: TransferPlan
    sent: Mapping[SnapshotId, SnapshotId]
    """Snapshots that were sent: id at the source → id at the target, equal where both have one hash."""
    heads: Mapping[str, SnapshotId]
    """`heads/NAME` or `tags/NAME` of the target → what it names now, by its id there."""
    sent_chunk_count: int
    sent_raw_bytes: int
    stored_bytes: int
    """Of the packs that were written."""
    is_dry_run: bool = False

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "dry_run": self.is_dry_run,
            "plan": self.plan.to_json(),
            "sent": dict(self.sent),
            "refs": dict(self.heads),
            "sent_chunk_count": self.sent_chunk_count,
            "sent_raw_bytes": self.sent_raw_bytes,
            "stored_bytes": self.stored_bytes,
        }


def transfer(
    source: Handle,
    target: Handle,
    request: TransferRequest,
    *,
    purpose: str,
    dry_run: bool = False,
    progress: Progress | None = None,
    pack_bytes_max: int = PUSH_PACK_BYTES_MAX,
) -> TransferReport:
    """Send snapshots and move refs. See `Repository.push`."""
    check_request(request)
    if source.backend.location == target.backend.location:
        raise UsageError(f"{target.backend.location}: both sides are the same repository")
    target.config.check_features("write", where=target.backend.location)
    if dry_run:
        plan = plan_transfer(source, target, request, MovedSnapshots(source, target))
        return TransferReport(plan, {}, {}, 0, 0, 0, is_dry_run=True)
    now_ns = target.clock()
    with writer_lease(target.backend, purpose=purpose, now_ns=now_ns):
        moved = MovedSnapshots(source, target)
        plan = plan_transfer(source, target, request, moved)
        meter = _Meter(progress, plan.raw_bytes)
        sender = Sender(
            source,
            target,
            now_ns=now_ns,
            reencode=request.reencode,
            check=request.check,
            progress=meter.advance,
            pack_bytes_max=pack_bytes_max,
        )
        run = _Run(sender, moved, now_ns, check=request.check)
        try:
            run.send_all(plan)
            run.settle(plan)
            heads = run.move_refs(plan.moves)
            run.settle(plan)
        finally:
            sender.close()
        meter.finish()
    return TransferReport(plan, run.sent, heads, sender.sent_count, sender.sent_raw_bytes, sender.stored_bytes)


class _Run:
    """One push or pull under way."""

    def __init__(self, sender: Sender, moved: MovedSnapshots, now_ns: int, *, check: bool) -> None:
        self.sent: dict[SnapshotId, SnapshotId] = {}
        self._sender = sender
        self._source, self._target = sender.source, sender.target
        self._moved = moved
        self._now_ns = now_ns
        self._check = check
        self._digests: Digests = {}
        self._learned: set[SnapshotId] = set()
        self._files: dict[SnapshotId, bytes] = {}
        """Snapshot files of the target that wait for their chunks to be sealed, by their id there."""

    # ---- snapshots -------------------------------------------------------------------------------------------

    def send_all(self, plan: TransferPlan) -> None:
        """Send what the target lacks; look at the rest too where it cannot be taken for whole unseen."""
        missing = frozenset(plan.missing)
        for snapshot_id in plan.snapshots:
            if snapshot_id in missing or self._check or self._sender.sees_condemned:
                self._send(snapshot_id)
        self._publish()

    def settle(self, plan: TransferPlan) -> None:
        """Publish, then check: go over all snapshots again until nothing that they rest on has changed."""
        while self._sender.look_again() or not self._stands(plan):
            for snapshot_id in plan.snapshots:
                self._send(snapshot_id)
            self._publish()

    def _stands(self, plan: TransferPlan) -> bool:
        """Whether no snapshot file was collected before its ref was visible."""
        expected = {self._moved.find(snapshot_id) for snapshot_id in plan.snapshots}
        return expected <= set(list_snapshot_ids(self._target.backend))

    def _send(self, snapshot_id: SnapshotId) -> None:
        """Send the chunks of one snapshot; its file waits until they are durable."""
        try:
            record = read_record(self._source.backend, snapshot_id)
            entries = self._source.manifests.entries(record)
            target_id, data = self._send_chunks(snapshot_id, record, entries)
        except UnknownRefError as error:
            raise SnapshotGoneError(f"snapshot {snapshot_id[:12]} was collected at the source just now") from error
        except CastoreError as error:
            error.args = (f"snapshot {snapshot_id[:12]}: {error}", *error.args[1:])
            raise
        if self._moved.find(snapshot_id) is None:
            self.sent[snapshot_id] = target_id
        self._moved.note(snapshot_id, target_id)
        self._files[target_id] = data
        if self._sender.open_bytes >= PUSH_PACK_BYTES_MAX or len(self._files) >= _PENDING_SNAPSHOTS_MAX:
            self._publish()

    def _send_chunks(
        self, snapshot_id: SnapshotId, record: SnapshotRecord, entries: Sequence[Entry]
    ) -> tuple[SnapshotId, bytes]:
        """The id at the target and the bytes of the file."""
        source, sender = self._source, self._sender
        id_bytes = source.hasher.digest_bytes
        needs = leaf_needs(entries, id_bytes=id_bytes)
        if sender.same_hash:
            needs |= manifest_needs(record, entries, id_bytes=id_bytes)
        else:
            check_paths(entries, where="the manifest")
            if state_id(source.hasher, entries) != record.state_id:
                raise FormatError("its leaves do not have the state id that its file gives; run `castore verify`")
            self._learn(snapshot_id)
            for parent in record.parents:
                self._learn(parent)
        if self._target.config.options.compression == "none":
            for entry in run_leaves(entries):
                sender.send_run(entry)
        sender.send(needs, bases=self._bases(record, entries))
        if sender.same_hash:
            return snapshot_id, self._file_of(snapshot_id)
        return self._rehashed(snapshot_id, record, entries)

    def _file_of(self, snapshot_id: SnapshotId) -> bytes:
        """The file of the source, byte for byte; it was decoded, and its digest compared, before."""
        backend = self._source.backend
        info = backend.stat(snapshot_name(snapshot_id))
        if info is None:
            raise SnapshotGoneError("it was collected at the source just now")
        return backend.read(snapshot_name(snapshot_id), max_bytes=info.size_bytes)

    def _bases(self, record: SnapshotRecord, entries: Sequence[Entry]) -> Mapping[ChunkId, ChunkId]:
        """What a chunk that is encoded anew may rest on: the chunk at its place in the parent."""
        for parent in record.parents:
            with suppress(CastoreError):
                parents = self._source.manifests.entries(read_record(self._source.backend, parent))
                return candidates(entries, parents, id_bytes=self._source.hasher.digest_bytes)
        return {}

    def _rehashed(
        self, snapshot_id: SnapshotId, record: SnapshotRecord, entries: Sequence[Entry]
    ) -> tuple[SnapshotId, bytes]:
        sender, hasher = self._sender, self._target.hasher
        changed = rehashed_entries(
            entries, sender.ids, self._digests, read_leaf=sender.read_leaf, old=self._source.hasher, new=hasher
        )
        manifest = plan_manifest(changed, hasher)
        for made in manifest.sources.values():
            sender.put(bytes(made.read()), kind=made.kind)
        found = (self._moved.find(parent) for parent in record.parents)
        parents = [parent for parent in found if parent is not None]
        new = rehashed_record(record, snapshot_id, changed, parents=parents, part_ids=manifest.part_ids, hasher=hasher)
        known = self._moved.find(snapshot_id)
        if known is not None:
            # Sent before, perhaps with less history: it stays what it is, and only its chunks are looked after.
            with suppress(CastoreError):
                old = read_record(self._target.backend, known)
                if (old.state_id, old.part_ids) == (new.state_id, new.part_ids):
                    return known, encode_snapshot(old, hasher)[1]
        return encode_snapshot(new, hasher)

    def _learn(self, snapshot_id: SnapshotId) -> None:
        """What a snapshot that is at the target already says of the ids of its chunks there: they need no reading."""
        target_id = self._moved.find(snapshot_id)
        if target_id is None or snapshot_id in self._learned:
            return
        self._learned.add(snapshot_id)
        with suppress(CastoreError):
            old = self._source.manifests.entries(read_record(self._source.backend, snapshot_id))
            new = self._target.manifests.entries(read_record(self._target.backend, target_id))
            widths = self._source.hasher.digest_bytes, self._target.hasher.digest_bytes
            learn_pairs(old, new, self._sender.ids, self._digests, widths=widths)

    def _publish(self) -> None:
        """Seal the packs, then make the waiting snapshots visible, parents first."""
        self._sender.seal()
        for snapshot_id, data in self._files.items():
            self._write_file(snapshot_id, data)
        self._files.clear()

    def _write_file(self, snapshot_id: SnapshotId, data: Buffer) -> None:
        name, backend = snapshot_name(snapshot_id), self._target.backend
        if backend.put_if_absent(name, data) or not self._check:
            return
        try:
            read_record(backend, snapshot_id)
        except DamageError:
            backend.delete(name)
            backend.put_if_absent(name, data)

    # ---- refs ------------------------------------------------------------------------------------------------

    def move_refs(self, moves: Sequence[RefMove]) -> dict[str, SnapshotId]:
        """Move branches by compare-and-swap, make tags. Raises ConflictError, RefExistsError or DamageError."""
        heads: dict[str, SnapshotId] = {}
        for move in moves:
            target_id = self._moved.find(move.source_id)
            assert target_id is not None
            read_record(self._target.backend, target_id)  # no ref to a file that is rotten there
            if move.action != "same":
                self._move(move, target_id)
            heads[f"{'tags' if move.kind == 'tag' else 'heads'}/{move.name}"] = target_id
            if move.kind == "branch":
                self._target.note_head(move.name, target_id)
        return heads

    def _move(self, move: RefMove, target_id: SnapshotId) -> None:
        backend, now_ns = self._target.backend, self._now_ns
        if move.kind == "tag":
            if read_tag(backend, move.name) != target_id:
                create_tag(backend, move.name, target_id, now_ns=now_ns)
        elif not move_branch(backend, move.name, expected_id=move.found_id, new_id=target_id, now_ns=now_ns):
            found = read_branch(backend, move.name)
            if found != target_id:  # else another push of the same was faster
                raise ConflictError(move.name, snapshot_id=target_id, expected_id=move.found_id, found_id=found)


class _Meter:
    """Bytes done, of those that the plan counted."""

    def __init__(self, progress: Progress | None, total_bytes: int) -> None:
        self._progress = progress
        self._total = total_bytes
        self._done = 0

    def advance(self, count_bytes: int) -> None:
        """More was dealt with."""
        self._done = min(self._total, self._done + count_bytes)
        if self._progress is not None:
            self._progress(self._done, self._total)

    def finish(self) -> None:
        """All of it was."""
        self.advance(self._total)
