"""What thinning means to those who read: leaves that were dropped are refused, before gc took their bytes as after."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from castore.backend.base import Backend
from castore.errors import ThinnedError, some
from castore.format.manifest import Entry, Kind
from castore.format.paths import parent_of
from castore.ids import SnapshotId
from castore.marks import Thinning, read_thinning

_SHOWN_MAX = 5


def refuse_dropped(
    backend: Backend, snapshot_id: SnapshotId, entries: Sequence[Entry], asked_for: Iterable[str]
) -> None:
    """Raise ThinnedError when any of the leaf paths was dropped from the snapshot; `entries` is its whole manifest."""
    thinning = read_thinning(backend, snapshot_id)
    if thinning is None:
        return
    dropped = [path for path in asked_for if thinning.drops(path)]
    if dropped:
        left = left_of(entries, thinning)
        raise ThinnedError(
            f"snapshot {snapshot_id[:12]} was thinned ({', '.join(thinning.dropped)}): {len(dropped)} of the leaves "
            f"asked for are dropped, such as {dropped[0]!r}; left: {some(left, count=_SHOWN_MAX)}; load those with "
            f"paths=, or bring the others back with `castore undelete {snapshot_id[:12]}` while gc has not freed them",
            dropped=dropped,
            left=left,
        )


def leaf_paths(entries: Iterable[Entry]) -> list[str]:
    """The paths of what is not a container, hidden storages left out."""
    return [entry.path for entry in entries if not entry.is_container and entry.kind is not Kind.STORAGE]


def left_of(entries: Iterable[Entry], thinning: Thinning) -> list[str]:
    """The shortest paths that name what is whole: a container where nothing below it was dropped, else its leaves."""
    paths = leaf_paths(entries)
    broken = {""}
    for path in filter(thinning.drops, paths):
        above = path
        while above not in broken:
            broken.add(above)
            above = parent_of(above)
    whole: dict[str, None] = {}
    for path in paths:
        if path in broken:
            continue
        top = path
        while parent_of(top) not in broken:
            top = parent_of(top)
        whole[top] = None
    return list(whole)
