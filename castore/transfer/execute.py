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

from castore.backend.base import Backend
from castore.checkpoint.bases import candidates
from castore.checkpoint.plan import plan_manifest
from castore.errors import (
    CastoreError,
    ConflictError,
    FormatError,
    LeaseError,
    NotFoundError,
    SnapshotGoneError,
    UnknownRefError,
    UsageError,
)
from castore.format.identity import state_id
from castore.format.layout import CONFIG, snapshot_name, tag_name
from castore.format.manifest import Entry
from castore.format.snapshot import SnapshotRecord, encode_snapshot
from castore.ids import ChunkId, SnapshotId
from castore.leases import read_condemned, writer_lease
from castore.manifests import check_paths
from castore.marks import kept_entries, read_thinning
from castore.options import SNAPSHOT_BYTES_MAX
from castore.progress import Meter
from castore.refs import create_tag, delete_ref_file, move_branch, read_branch, read_tag
from castore.repository import Handle
from castore.snapshots import read_record
from castore.transfer.arrivals import Arrivals
from castore.transfer.history import History
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
    if _is_same(source.backend, target.backend):
        raise UsageError(f"{target.backend.location}: both sides are the same repository")
    target.config.check_features("write", where=target.backend.location)
    if dry_run:
        plan = plan_transfer(source, target, request, MovedSnapshots(source, target))
        return TransferReport(plan, {}, {}, 0, 0, 0, is_dry_run=True)
    now_ns = target.clock()
    lease_s = target.config.options.lease_s
    with writer_lease(target.backend, purpose=purpose, now_ns=now_ns, lease_s=lease_s) as lease:
        moved = MovedSnapshots(source, target)
        plan = plan_transfer(source, target, request, moved)
        meter = Meter(progress, plan.raw_bytes, beat=lease.beat)
        sender = Sender(
            source,
            target,
            now_ns=now_ns,
            reencode=request.reencode,
            check=request.check,
            progress=meter.advance,
            pack_bytes_max=pack_bytes_max,
        )
        run = _Run(sender, plan, moved, now_ns, check=request.check)
        try:
            run.send_all(plan)
            run.settle(plan)
            heads = run.move_refs(plan.moves)
            try:
                run.settle(plan)
            except CastoreError:
                run.take_back_refs()  # nobody was told of them, and what they name may be on its way out
                raise
        finally:
            sender.close()
        meter.finish()
    return TransferReport(plan, run.sent, heads, sender.sent_count, sender.sent_raw_bytes, sender.stored_bytes)


def _is_same(source: Backend, target: Backend) -> bool:
    """Whether both are one repository, also by another path."""
    paths = [backend.local_path(CONFIG) for backend in (source, target)]
    if paths[0] is None or paths[1] is None:
        return source is target
    return paths[0].exists() and paths[1].exists() and paths[0].samefile(paths[1])


class _Run:
    """One push or pull under way."""

    def __init__(self, sender: Sender, plan: TransferPlan, moved: MovedSnapshots, now_ns: int, *, check: bool) -> None:
        self.sent: dict[SnapshotId, SnapshotId] = {}
        self._sender = sender
        self._source, self._target = sender.source, sender.target
        self._moved = moved
        self._now_ns = now_ns
        self._check = check
        self._made: list[tuple[RefMove, SnapshotId]] = []
        """Refs that were moved, and where to."""
        self._digests: Digests = {}
        self._learned: set[SnapshotId] = set()
        self._heads = {move.source_id for move in plan.moves}
        self._history = History(self._source, self._heads, left_out=frozenset(plan.left_out))
        self._arrivals = Arrivals(self._target.backend, plan.tombstones, now_ns=now_ns, check=check)

    # ---- snapshots -------------------------------------------------------------------------------------------

    def send_all(self, plan: TransferPlan) -> None:
        """Send what the target lacks; look at the rest too where it cannot be taken for whole unseen."""
        self._refuse_condemned(plan)
        missing = frozenset(plan.missing)
        for snapshot_id in plan.snapshots:
            if snapshot_id in missing or self._check or self._sender.there.sees_condemned:
                self._send(snapshot_id)
        self._publish()

    def settle(self, plan: TransferPlan) -> None:
        """Publish, then check: go over all snapshots again until nothing that they rest on has changed."""
        while self._sender.there.look_again() or not self._arrivals.stand():
            for snapshot_id in plan.snapshots:
                self._send(snapshot_id)
            self._publish()
        self._refuse_condemned(plan)

    def _refuse_condemned(self, plan: TransferPlan) -> None:
        """A snapshot keeps its name, so it cannot come back under it while a collector may still remove it."""
        going = frozenset[SnapshotId]().union(*(found.snapshots for found in read_condemned(self._target.backend)))
        for snapshot_id in plan.snapshots:
            target_id = self._moved.find(snapshot_id) or snapshot_id
            if target_id in going:
                raise LeaseError(
                    f"snapshot {target_id[:12]} is being collected at {self._target.backend.location}; run "
                    "`castore gc` there to its end, then push again: what has arrived is not sent twice"
                )

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
        is_new = self._moved.find(snapshot_id) is None
        self._moved.note(snapshot_id, target_id)
        if is_new and self._arrivals.was_dropped(target_id) and snapshot_id not in self._heads:
            return  # under another hash its id there comes out only now
        if is_new:
            self.sent[snapshot_id] = target_id
        parents = (self._moved.find(parent) for parent in record.parents)
        self._arrivals.add(target_id, data, parents=[parent for parent in parents if parent is not None])
        if self._sender.open_bytes >= PUSH_PACK_BYTES_MAX or self._arrivals.waiting_count >= _PENDING_SNAPSHOTS_MAX:
            self._publish()

    def _send_chunks(
        self, snapshot_id: SnapshotId, record: SnapshotRecord, entries: Sequence[Entry]
    ) -> tuple[SnapshotId, bytes]:
        """The id at the target and the bytes of the file."""
        source, sender = self._source, self._sender
        id_bytes = source.hasher.digest_bytes
        kept = self._kept(snapshot_id, entries)
        needs = leaf_needs(kept, id_bytes=id_bytes)
        if sender.same_hash:
            needs |= manifest_needs(record, entries, id_bytes=id_bytes)
        else:
            check_paths(entries, where="the manifest")
            if state_id(source.hasher, entries) != record.state_id:
                raise FormatError("its leaves do not have the state id that its file gives; run `castore verify`")
            self._learn(snapshot_id)
            for parent in self._history.parents(snapshot_id):
                self._learn(parent)
        if self._target.config.options.compression == "none":
            for entry in run_leaves(kept):
                sender.send_run(entry)
        sender.send(needs, bases=self._bases(record, kept) if sender.takes_bases else {})
        if sender.same_hash:
            return snapshot_id, self._file_of(snapshot_id)
        return self._rehashed(snapshot_id, record, entries)

    def _kept(self, snapshot_id: SnapshotId, entries: Sequence[Entry]) -> Sequence[Entry]:
        """The entries whose chunks travel: a thinned snapshot goes with its overlay and what it keeps.

        One that the target has already is what the target made of it, as far as the source can say.
        """
        overlay = read_thinning(self._source.backend, snapshot_id)
        target_id = self._moved.find(snapshot_id)
        if target_id is None or self._arrivals.has_overlay(target_id):
            if overlay is not None:
                self._arrivals.add_overlay(overlay)
            return kept_entries(entries, overlay)
        there = kept_entries(entries, read_thinning(self._target.backend, target_id))
        if overlay is None:
            return there
        paths = {entry.path for entry in kept_entries(entries, overlay)}
        return [entry for entry in there if entry.path in paths]

    def _file_of(self, snapshot_id: SnapshotId) -> bytes:
        """The file of the source, byte for byte; it was decoded, and its digest compared, before."""
        try:
            return self._source.backend.read(snapshot_name(snapshot_id), max_bytes=SNAPSHOT_BYTES_MAX)
        except NotFoundError as error:
            raise SnapshotGoneError("it was collected at the source just now") from error

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
        found = (self._moved.find(parent) for parent in self._history.parents(snapshot_id))
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
        """Seal the packs, then make the waiting snapshots visible."""
        self._sender.seal()
        self._arrivals.publish()

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
                self._made.append((move, target_id))
            self._arrivals.revive(target_id)
            heads[f"{'tags' if move.kind == 'tag' else 'heads'}/{move.name}"] = target_id
            if move.kind == "branch":
                self._target.note_head(move.name, target_id)
        return heads

    def take_back_refs(self) -> None:
        """Put the moved refs back to where they were, as far as nobody has moved them since."""
        backend = self._target.backend
        for move, target_id in reversed(self._made):
            with suppress(CastoreError):
                if move.kind == "tag":
                    if read_tag(backend, move.name) == target_id:
                        delete_ref_file(backend, tag_name(move.name))
                else:
                    move_branch(backend, move.name, expected_id=target_id, new_id=move.found_id, now_ns=self._now_ns)
                    self._target.note_head(move.name, move.found_id)

    def _move(self, move: RefMove, target_id: SnapshotId) -> None:
        backend, now_ns = self._target.backend, self._now_ns
        if move.kind == "tag":
            if read_tag(backend, move.name) != target_id:
                create_tag(backend, move.name, target_id, now_ns=now_ns)
        elif not move_branch(backend, move.name, expected_id=move.found_id, new_id=target_id, now_ns=now_ns):
            found = read_branch(backend, move.name)
            if found != target_id:  # else another push of the same was faster
                raise ConflictError(move.name, snapshot_id=target_id, expected_id=move.found_id, found_id=found)
