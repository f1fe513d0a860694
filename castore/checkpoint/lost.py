"""What a repair's mark means to those who read: what is lost is told at once, and the rest can be loaded."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress

from castore.checkpoint.thinned import leaf_paths
from castore.errors import CastoreError, DamageError, LostLeavesError, some
from castore.format.manifest import Entry, Kind
from castore.format.paths import parent_of
from castore.format.snapshot import SnapshotRecord
from castore.ids import ChunkId, SnapshotId
from castore.losses import Loss, read_loss
from castore.marks import read_thinning
from castore.repository import Handle

_SHOWN_MAX = 5
_COMPOSITE_KINDS = frozenset({Kind.SPARSE, Kind.QUANTIZED})


def explain(handle: Handle, snapshot_id: SnapshotId, error: CastoreError, entries: Sequence[Entry]) -> CastoreError:
    """The error that names all that is lost, when a repair has marked the snapshot; else the given one."""
    loss = loss_of(handle, snapshot_id)
    if loss is None or not loss.leaves:
        return error
    return _error(
        snapshot_id,
        loss,
        _left(handle, snapshot_id, entries, loss),
        f"{loss.leaf_count} leaves are lost, such as {some(map(repr, loss.leaves), count=_SHOWN_MAX)}",
    )


def entries_left(
    handle: Handle, snapshot_id: SnapshotId, record: SnapshotRecord, paths: Collection[str] | None, error: DamageError
) -> list[Entry]:
    """The entries of the manifest parts that are left, when a repair has marked the others as lost.

    Only leaves that are asked for by their full path: what a pattern would match among the lost ones nobody knows.
    Raises LostLeavesError, which names what is left, or the given error when the snapshot is not marked.
    """
    loss = loss_of(handle, snapshot_id)
    if loss is None or not loss.parts:
        raise error
    entries = _complete(list(_read_parts(handle, record, frozenset(loss.parts))))
    left = _left(handle, snapshot_id, entries, loss)
    if paths is None or not set(left).issuperset(paths):
        raise _error(snapshot_id, loss, left, f"{len(loss.parts)} parts of its manifest are lost") from error
    return entries


def loss_of(handle: Handle, snapshot_id: SnapshotId) -> Loss | None:
    """What is marked as lost of a snapshot; None also when the mark cannot be read: it only explains."""
    with suppress(DamageError):
        return read_loss(handle.backend, snapshot_id)
    return None


def _left(handle: Handle, snapshot_id: SnapshotId, entries: Sequence[Entry], loss: Loss) -> list[str]:
    """What can be loaded: neither lost nor dropped by thinning."""
    lost, thinning = set(loss.leaves), None
    with suppress(DamageError):  # as above: the mark only explains, and loading says what is wrong with it
        thinning = read_thinning(handle.backend, snapshot_id)
    return [path for path in leaf_paths(entries) if path not in lost and not (thinning and thinning.drops(path))]


def _read_parts(handle: Handle, record: SnapshotRecord, lost: Collection[ChunkId]) -> Iterator[Entry]:
    lists_lost = not set(record.part_ids).issuperset(lost)  # then a part may be whole, and its long leaf is not
    for part_id in record.part_ids:
        try:
            yield from handle.manifests.part(part_id)
        except DamageError:
            if part_id not in lost and not lists_lost:
                raise


def _complete(entries: Sequence[Entry]) -> list[Entry]:
    """The entries without those that need lost ones: aliases, views, and tensors made of parts."""
    by_path = {entry.path: entry for entry in entries}
    broken = {
        entry.path
        for entry in entries
        if (entry.kind is Kind.ALIAS and str(entry.attrs.get("target")) not in by_path)
        or (entry.kind is Kind.VIEW and str(entry.attrs.get("storage")) not in by_path)
    }
    children: dict[str, int] = {}
    for entry in entries:
        if entry.path:
            children[parent_of(entry.path)] = children.get(parent_of(entry.path), 0) + 1
    broken |= {
        entry.path
        for entry in entries
        if entry.kind in _COMPOSITE_KINDS and entry.shape != (children.get(entry.path, 0),)
    }
    return [entry for entry in entries if entry.path not in broken and parent_of(entry.path) not in broken]


def _error(snapshot_id: SnapshotId, loss: Loss, left: Sequence[str], what: str) -> LostLeavesError:
    rest = (
        f"left are {some(map(repr, left), count=_SHOWN_MAX)}: load them with paths="
        if left
        else "nothing of it is left"
    )
    return LostLeavesError(
        f"snapshot {snapshot_id[:12]}: {what}, as a repair has found; {rest}, or load another snapshot; "
        "`castore repair --from` heals it where the content is found elsewhere",
        lost=loss.leaves,
        left=left,
    )
