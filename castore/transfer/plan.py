"""What a push or pull will do, as a value: snapshots in order, refs that move, bytes. Reads, never writes."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from castore.closure import closure
from castore.errors import DamageError, DivergedError, RefExistsError, UsageError
from castore.format.manifest import Entry
from castore.format.snapshot import SnapshotRecord
from castore.ids import ChunkId, SnapshotId
from castore.leases import condemned_packs
from castore.marks import Forgotten, forgotten, kept_entries, read_thinning, thinned_ids
from castore.refs import check_free, read_branch, read_tag
from castore.repository import Handle
from castore.transfer.history import NOT_SENT, History
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
    tombstones: tuple[Forgotten, ...]
    """Marks that the target needs so that its history goes on behind, or ends openly at, snapshots that are not sent;
    none under another hash, where parents are named anew."""
    gaps: tuple[SnapshotId, ...]
    """Parents that are gone at the source without a trace: history ends there."""
    left_out: tuple[SnapshotId, ...]
    """Thinned snapshots: leaves that were dropped cannot be hashed again, so they cannot change their hash."""
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
            "tombstones": [mark.snapshot_id for mark in self.tombstones],
            "gaps": list(self.gaps),
            "left_out": list(self.left_out),
            "chunk_count": self.chunk_count,
            "raw_bytes": self.raw_bytes,
            "stored_bytes": self.stored_bytes,
            "is_exact": self.is_exact,
        }


def plan_transfer(source: Handle, target: Handle, request: TransferRequest, moved: MovedSnapshots) -> TransferPlan:
    """Read both sides and decide; nothing is written.

    What the target has forgotten by its own policy is not sent again, unless a ref is to name it.

    Raises RefError, DivergedError, RefExistsError (a tag that names something else, a branch with the name of a tag),
    UsageError (the head of a ref cannot change its hash) or DamageError (a snapshot of the source that cannot be read).
    """
    wanted = wanted_refs(source.backend, request)
    heads = [ref.snapshot_id for ref in wanted]
    thinned = frozenset[SnapshotId]() if moved.same_hash else thinned_ids(source.backend)
    for ref in wanted:
        if ref.snapshot_id in thinned:
            raise UsageError(
                f"{ref.kind} {ref.name!r} names snapshot {ref.snapshot_id[:12]}, which is thinned: leaves that were "
                "dropped cannot be hashed again, so it cannot go to a repository with another hash; send other refs"
            )
    history = History(source, heads, left_out=thinned)
    chosen = history.parents_first(heads, depth=request.depth)
    moves = tuple(_plan_move(target, ref, history, moved, force=request.force) for ref in wanted)
    refused = _forgotten_there(target, heads, moved)
    snapshots = tuple(snapshot_id for snapshot_id in chosen if moved.find(snapshot_id) or snapshot_id not in refused)
    missing = tuple(snapshot_id for snapshot_id in snapshots if moved.find(snapshot_id) is None)
    chunk_count, raw_bytes, stored_bytes = _work(source, target, history, missing, moved)
    return TransferPlan(
        snapshots,
        missing,
        moves,
        history.tombstones(snapshots, now_ns=target.clock()) if moved.same_hash else (),
        tuple(sorted(history.gaps)),
        tuple(sorted(history.passed & thinned)),
        chunk_count,
        raw_bytes,
        stored_bytes,
        moved.same_hash,
    )


def _forgotten_there(target: Handle, heads: Collection[SnapshotId], moved: MovedSnapshots) -> frozenset[SnapshotId]:
    """What the target has dropped on purpose, by its id at the source."""
    if not moved.same_hash:
        return frozenset()  # their ids come out when they are hashed: they are left out then
    marks = forgotten(target.backend)
    return frozenset(found for found, mark in marks.items() if mark.reason != NOT_SENT and found not in heads)


def _plan_move(target: Handle, ref: WantedRef, history: History, moved: MovedSnapshots, *, force: bool) -> RefMove:
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
    history: History,
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
    source: Handle, history: History, snapshots: Iterable[SnapshotId], *, with_manifests: bool
) -> dict[ChunkId, None]:
    id_bytes = source.hasher.digest_bytes
    needed: dict[ChunkId, None] = {}
    for snapshot_id in snapshots:
        record = history.record(snapshot_id)
        assert record is not None
        entries = _entries(source, snapshot_id, record)
        kept = kept_entries(entries, read_thinning(source.backend, snapshot_id))
        needed.update(dict.fromkeys(leaf_needs(kept, id_bytes=id_bytes)))
        if with_manifests:
            needed.update(dict.fromkeys(manifest_needs(record, entries, id_bytes=id_bytes)))
    return needed


def _entries(source: Handle, snapshot_id: SnapshotId, record: SnapshotRecord) -> list[Entry]:
    try:
        return source.manifests.entries(record)
    except DamageError as error:
        error.args = (f"snapshot {snapshot_id[:12]} of {source.backend.location}: {error}", *error.args[1:])
        raise
