"""What changed between two snapshots, leaf by leaf: by chunk ids alone, or by reading the values.

Numbers are compared in float64, one chunk at a time, so that memory stays bounded:

    max abs       max |b - a|
    relative L2   ||b - a|| / ||a||
    cosine        <a, b> / (||a|| ||b||)

Elements that are not finite on either side are left out of the sums and counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from castore.checkpoint.plan import chunk_lengths
from castore.errors import PathNotFoundError, UsageError
from castore.format.identity import content_kind, entry_digest
from castore.format.manifest import Entry, Kind, chunk_bytes
from castore.format.paths import compile_glob
from castore.hashing import Hasher
from castore.ids import ChunkId, SnapshotId
from castore.marks import read_thinning
from castore.repository import Handle
from castore.snapshots import read_record
from castore.store import Locations

Status = Literal["added", "removed", "changed", "same"]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class LeafDiff:
    """One leaf on both sides. Fields of a side that lacks the leaf are empty."""

    path: str
    status: Status
    kind: str
    dtype_a: str
    dtype_b: str
    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]
    raw_bytes_a: int
    raw_bytes_b: int
    chunk_count: int
    """Chunks of the leaf in b; 0 for a leaf that lives in the manifest."""
    chunks_changed: int
    """Of those, how many the leaf in a does not have at the same place."""
    max_abs: float | None = None
    relative_l2: float | None = None
    """None when it was not computed; inf when a is all zero and b is not."""
    cosine: float | None = None
    nonfinite_count: int = 0
    dropped: bool = False
    """Whether thinning took the leaf from a side: then the digests are compared, which stay, and not the values."""


@dataclass(frozen=True, slots=True)
class Diff:
    """What changed from snapshot a to snapshot b."""

    a: SnapshotId
    b: SnapshotId
    leaves: tuple[LeafDiff, ...]
    """Every leaf of either side, by path."""
    bytes_shared: int
    """Raw bytes of chunks that both snapshots need."""
    bytes_only_a: int
    bytes_only_b: int
    stored_only_b: int
    """Stored bytes, in packs, of the chunks that b needs and a does not: what b cost beside a."""

    def with_status(self, *statuses: Status) -> tuple[LeafDiff, ...]:
        """The leaves of these statuses."""
        return tuple(leaf for leaf in self.leaves if leaf.status in statuses)

    @property
    def identical(self) -> bool:
        """Whether nothing differs."""
        return all(leaf.status == "same" for leaf in self.leaves)

    def to_json(self) -> dict[str, Any]:
        """Plain values for `--json`; numbers that JSON lacks (inf, nan) become text."""
        fields = asdict(self)
        for leaf in fields["leaves"]:
            for key in ("max_abs", "relative_l2", "cosine"):
                if leaf[key] is not None and not math.isfinite(leaf[key]):
                    leaf[key] = str(leaf[key])
        return fields


def diff(
    handle: Handle,
    a: SnapshotId,
    b: SnapshotId,
    *,
    paths: Sequence[str] | None,
    values: bool,
    progress: Progress | None,
) -> Diff:
    """Compare two snapshots. See `Repository.diff`."""
    if isinstance(paths, str):
        raise UsageError(f"paths: expected a sequence of globs, found the text {paths!r}; write paths=[{paths!r}]")
    side_a, side_b = _leaves(handle, a, paths), _leaves(handle, b, paths)
    if paths is not None and not side_a and not side_b:
        raise PathNotFoundError(f"no leaf of {a[:12]} or {b[:12]} matches {', '.join(paths)}")
    hasher = handle.hasher
    leaves = [
        _compare(path, side_a.get(path), side_b.get(path), hasher) for path in sorted(side_a.keys() | side_b.keys())
    ]
    overlays = read_thinning(handle.backend, a), read_thinning(handle.backend, b)
    leaves = [
        replace(leaf, dropped=any(overlay is not None and overlay.drops(leaf.path) for overlay in overlays))
        for leaf in leaves
    ]
    if values:
        leaves = _with_values(handle, leaves, side_a, side_b, progress)
    n = hasher.digest_bytes
    chunks_a, chunks_b = chunk_lengths(side_a.values(), n), chunk_lengths(side_b.values(), n)
    only_b = chunks_b.keys() - chunks_a.keys()
    locations = handle.store.locate(only_b) if only_b else {}
    return Diff(
        a,
        b,
        tuple(leaves),
        sum(chunks_b[chunk_id] for chunk_id in chunks_b.keys() & chunks_a.keys()),
        sum(chunks_a[chunk_id] for chunk_id in chunks_a.keys() - chunks_b.keys()),
        sum(chunks_b[chunk_id] for chunk_id in only_b),
        sum(hits[0].row.stored_bytes for hits in locations.values() if hits),
    )


def _leaves(handle: Handle, snapshot_id: SnapshotId, paths: Sequence[str] | None) -> dict[str, Entry]:
    """Leaves by path, aliases replaced by what they stand for."""
    entries = handle.manifests.entries(read_record(handle.backend, snapshot_id))
    by_path = {entry.path: entry for entry in entries}
    wanted = [compile_glob(pattern) for pattern in paths] if paths is not None else [lambda _: True]
    return {
        entry.path: by_path[entry.attrs["target"]] if entry.kind is Kind.ALIAS else entry
        for entry in entries
        if not entry.is_container and entry.kind is not Kind.STORAGE and any(match(entry.path) for match in wanted)
    }


def _compare(path: str, a: Entry | None, b: Entry | None, hasher: Hasher) -> LeafDiff:
    present = b if b is not None else a
    assert present is not None
    status: Status = "changed"
    if a is None or b is None:
        status = "added" if a is None else "removed"
    elif _content(a, hasher) == _content(b, hasher):
        status = "same"
    ids_a = a.chunk_ids(hasher.digest_bytes) if a else []
    ids_b = b.chunk_ids(hasher.digest_bytes) if b else []
    unchanged = sum(left == right for left, right in zip(ids_a, ids_b, strict=False))
    return LeafDiff(
        path,
        status,
        present.kind.name.lower(),
        a.dtype if a else "",
        b.dtype if b else "",
        a.shape if a else (),
        b.shape if b else (),
        a.raw_bytes if a else 0,
        b.raw_bytes if b else 0,
        len(ids_b),
        len(ids_b) - unchanged,
    )


def _content(entry: Entry, hasher: Hasher) -> tuple[object, ...]:
    return content_kind(entry), entry.dtype, entry.shape, entry_digest(hasher, entry)


def _with_values(
    handle: Handle,
    leaves: Sequence[LeafDiff],
    side_a: Mapping[str, Entry],
    side_b: Mapping[str, Entry],
    progress: Progress | None,
) -> list[LeafDiff]:
    """The same list with numbers filled in where both sides are arrays of one shape, or numbers."""
    # numpy costs 80 ms of start-up, which `--no-values` need not pay.
    from castore.checkpoint.value_diff import compare_values

    # The bytes of a view lie in its storage; its chunks say that it changed, and that is all that is told.
    todo = [
        leaf
        for leaf in leaves
        if leaf.status == "changed"
        and not leaf.dropped
        and leaf.shape_a == leaf.shape_b
        and Kind.VIEW not in (side_a[leaf.path].kind, side_b[leaf.path].kind)
    ]
    total = sum(leaf.raw_bytes_a + leaf.raw_bytes_b for leaf in todo)
    done = 0
    filled: dict[str, LeafDiff] = {}
    for leaf in todo:
        a, b = side_a[leaf.path], side_b[leaf.path]
        filled[leaf.path] = compare_values(leaf, _Reader(handle, a), _Reader(handle, b))
        done += leaf.raw_bytes_a + leaf.raw_bytes_b
        if progress is not None:
            progress(done, total)
    return [filled.get(leaf.path, leaf) for leaf in leaves]


class _Reader:
    """The raw bytes of one leaf by grid position."""

    def __init__(self, handle: Handle, entry: Entry) -> None:
        self.entry = entry
        self._handle = handle
        self.ids = entry.chunk_ids(handle.hasher.digest_bytes)
        self._locations: dict[ChunkId, Locations] = handle.store.locate(set(self.ids)) if self.ids else {}

    def chunk(self, index: int) -> bytes | bytearray:
        """Raw bytes of chunk `index`; index 0 of an inline leaf is all of it."""
        if self.entry.inline is not None:
            return self.entry.inline
        out = bytearray(chunk_bytes(self.entry.raw_bytes, index))
        chunk_id = self.ids[index]
        self._handle.store.read_into(chunk_id, self._locations[chunk_id], memoryview(out))
        return out
