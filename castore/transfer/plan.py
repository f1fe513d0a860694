"""What a push or pull will do, as a value: snapshots in order, refs that move, bytes. Reads, never writes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from castore.checkpoint.bases import closure
from castore.errors import DamageError, DivergedError, RefExistsError, UnknownRefError
from castore.format.snapshot import SnapshotRecord
from castore.ids import ChunkId, SnapshotId
from castore.leases import condemned_packs
from castore.refs import check_free, read_branch, read_tag
from castore.repository import Handle
from castore.snapshots import read_record
from castore.transfer.moved import MovedSnapshots
from castore.transfer.needs import leaf_needs, manifest_needs
from castore.transfer.request import RefKind, TransferRequest, WantedRef, wanted_refs

Action = Literal["create", "forward", "force", "same"]


@dataclass(frozen=True, slots=True)
class RefMove:
    """What becomes of one ref of the target."""

    kind: RefKind
    name: str
    source_id: SnapshotId
    """What it will name, by its id at the source."""
    found_id: SnapshotId | None
    """What it names at the target now."""
    action: Action


@dataclass(frozen=True, slots=True)
class TransferPlan:
    """The work of one push or pull."""

    snapshots: tuple[SnapshotId, ...]
    """All that the refs need, by their ids at the source, parents before children."""
    missing: tuple[SnapshotId, ...]
    """Those of them that the target lacks, in the same order."""
    moves: tuple[RefMove, ...]
    gaps: tuple[SnapshotId, ...]
    """Parents that are gone at the source: history ends there."""
    chunk_count: int
    """To send, at most: under another hash the target's chunks are known only when the source's were read."""
    raw_bytes: int
    stored_bytes: int
    """As they lie at the source."""
    is_exact: bool
    """Whether the counts are no upper bounds."""

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "snapshots": len(self.snapshots),
            "missing": list(self.missing),
            "refs": [
                {
                    "kind": move.kind,
                    "name": move.name,
                    "found": move.found_id,
                    "action": move.action,
                    "at": move.source_id,
                }
                for move in self.moves
            ],
            "gaps": list(self.gaps),
            "chunk_count": self.chunk_count,
            "raw_bytes": self.raw_bytes,
            "stored_bytes": self.stored_bytes,
            "is_exact": self.is_exact,
        }


def plan_transfer(source: Handle, target: Handle, request: TransferRequest, moved: MovedSnapshots) -> TransferPlan:
    """Read both sides and decide; nothing is written.

    Raises RefError, DivergedError, RefExistsError (a tag that names something else, a branch with the name of a tag) or
    DamageError (a snapshot of the source that cannot be read).
    """
    wanted = wanted_refs(source.backend, request)
    history = _History(source)
    snapshots = history.parents_first([ref.snapshot_id for ref in wanted], depth=request.depth)
    moves = tuple(_plan_move(target, ref, history, moved, force=request.force) for ref in wanted)
    missing = tuple(snapshot_id for snapshot_id in snapshots if moved.find(snapshot_id) is None)
    chunk_count, raw_bytes, stored_bytes = _work(source, target, history, missing, moved)
    gaps = tuple(sorted(history.gaps))
    return TransferPlan(tuple(snapshots), missing, moves, gaps, chunk_count, raw_bytes, stored_bytes, moved.same_hash)


class _History:
    """Records of the source, each read once."""

    def __init__(self, source: Handle) -> None:
        self._source = source
        self._records: dict[SnapshotId, SnapshotRecord | None] = {}
        self.gaps: set[SnapshotId] = set()

    def record(self, snapshot_id: SnapshotId) -> SnapshotRecord | None:
        """None when it is gone. Raises DamageError."""
        if snapshot_id not in self._records:
            try:
                self._records[snapshot_id] = read_record(self._source.backend, snapshot_id)
            except UnknownRefError:
                self._records[snapshot_id] = None
        return self._records[snapshot_id]

    def parents_first(self, heads: Sequence[SnapshotId], *, depth: int | None) -> list[SnapshotId]:
        """The heads and their ancestors, at most `depth` levels of each."""
        chosen: dict[SnapshotId, None] = {}
        level = list(dict.fromkeys(heads))
        count = 0
        while level and (depth is None or count < depth):
            chosen.update(dict.fromkeys(level))
            parents = (parent for snapshot_id in level for parent in self._parents(snapshot_id))
            level = [parent for parent in dict.fromkeys(parents) if parent not in chosen]
            count += 1
        for head in heads:
            if self.record(head) is None:
                raise UnknownRefError(
                    f"{self._source.backend.location} has no snapshot {head}: its ref names one that is gone"
                )
        present = {snapshot_id for snapshot_id in chosen if self.record(snapshot_id) is not None}
        self.gaps |= chosen.keys() - present
        return list(self._ordered(present, heads))

    def _parents(self, snapshot_id: SnapshotId) -> tuple[SnapshotId, ...]:
        try:
            record = self.record(snapshot_id)
        except DamageError as error:
            error.args = (
                f"{error}; history before it cannot be sent: give `--depth`, or forget that snapshot",
                *error.args[1:],
            )
            raise
        return record.parents if record is not None else ()

    def _ordered(self, present: set[SnapshotId], heads: Iterable[SnapshotId]) -> Iterator[SnapshotId]:
        done: set[SnapshotId] = set()
        for head in heads:
            stack = [(head, False)]
            while stack:
                snapshot_id, is_ready = stack.pop()
                if snapshot_id in done or snapshot_id not in present:
                    continue
                if is_ready:
                    done.add(snapshot_id)
                    yield snapshot_id
                else:
                    stack.append((snapshot_id, True))
                    stack.extend((parent, False) for parent in self._parents(snapshot_id))

    def reaches(self, head: SnapshotId, wanted: SnapshotId, moved: MovedSnapshots) -> bool:
        """Whether the target's snapshot `wanted` stands for `head` or one of its ancestors."""
        seen: set[SnapshotId] = set()
        pending = [head]
        while pending:
            snapshot_id = pending.pop()
            if snapshot_id in seen:
                continue
            seen.add(snapshot_id)
            # A gap of the source is an ancestor all the same: its child names it.
            if moved.find(snapshot_id) == wanted or (moved.same_hash and snapshot_id == wanted):
                return True
            pending.extend(self._parents(snapshot_id))
        return False


def _plan_move(target: Handle, ref: WantedRef, history: _History, moved: MovedSnapshots, *, force: bool) -> RefMove:
    is_tag = ref.kind == "tag"
    read = read_tag if is_tag else read_branch
    found = read(target.backend, ref.name)
    goal = moved.find(ref.snapshot_id)
    if found is None:
        check_free(target.backend, ref.name, as_tag=is_tag)
        return RefMove(ref.kind, ref.name, ref.snapshot_id, None, "create")
    if found == goal:
        return RefMove(ref.kind, ref.name, ref.snapshot_id, found, "same")
    if is_tag:
        raise RefExistsError(
            f"tag {ref.name!r} of {target.backend.location} names snapshot {found[:12]}, not {ref.snapshot_id[:12]}; "
            f"tags never move: send it under another name ({ref.name}:tags/OTHER)"
        )
    if history.reaches(ref.snapshot_id, found, moved):
        return RefMove(ref.kind, ref.name, ref.snapshot_id, found, "forward")
    if not force:
        raise DivergedError(ref.name, snapshot_id=ref.snapshot_id, found_id=found, where=target.backend.location)
    return RefMove(ref.kind, ref.name, ref.snapshot_id, found, "force")


def _work(
    source: Handle,
    target: Handle,
    history: _History,
    missing: Iterable[SnapshotId],
    moved: MovedSnapshots,
) -> tuple[int, int, int]:
    """Distinct chunks that the target lacks: how many, their raw bytes, their stored bytes at the source."""
    needed = _needed(source, history, missing, with_manifests=moved.same_hash)
    if needed and moved.same_hash:
        target.store.refresh()
        for chunk_id in closure(needed, target.store, condemned_packs(target.backend)):
            del needed[chunk_id]
    located = source.store.locate(needed)
    rows = [hits[0].row for hits in located.values() if hits]
    return len(needed), sum(row.raw_bytes for row in rows), sum(row.stored_bytes for row in rows)


def _needed(
    source: Handle, history: _History, snapshots: Iterable[SnapshotId], *, with_manifests: bool
) -> dict[ChunkId, None]:
    id_bytes = source.hasher.digest_bytes
    needed: dict[ChunkId, None] = {}
    for snapshot_id in snapshots:
        record = history.record(snapshot_id)
        assert record is not None
        entries = _entries(source, snapshot_id, record)
        needed.update(dict.fromkeys(leaf_needs(entries, id_bytes=id_bytes)))
        if with_manifests:
            needed.update(dict.fromkeys(manifest_needs(record, entries, id_bytes=id_bytes)))
    return needed


def _entries(source: Handle, snapshot_id: SnapshotId, record: SnapshotRecord) -> Any:
    try:
        return source.manifests.entries(record)
    except DamageError as error:
        error.args = (f"snapshot {snapshot_id[:12]} of {source.backend.location}: {error}", *error.args[1:])
        raise
