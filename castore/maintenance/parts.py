"""Manifest parts for whole-repository work: each is read once, and damage is an answer, never the end."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from castore.errors import CastoreError
from castore.format.manifest import Entry, Kind, chunk_count, decode_id_list, decode_part
from castore.ids import ChunkId, SnapshotId
from castore.maintenance.chunks import ChunkReader
from castore.marks import Thinning, keeps_chunks, needed_paths
from castore.options import PART_CHUNKS_MAX
from castore.repository import Handle
from castore.snapshots import split_ids

_CACHED_PARTS_MAX = 256
"""Snapshots are visited newest first, so those that share parts follow each other."""


@dataclass(frozen=True, slots=True)
class Part:
    """One manifest part, as far as it can be read."""

    entries: tuple[Entry, ...] = ()
    """Id lists resolved into `chunks`; unresolved in those that `unresolved` names."""
    error: str = ""
    """Why the part cannot be read; empty when it can."""
    unresolved: Mapping[str, str] | None = None
    """Leaf path → why its id lists cannot be read."""


class PartReader:
    """Reads parts and remembers the latest. Belongs to one thread."""

    def __init__(self, handle: Handle) -> None:
        self._id_bytes = handle.hasher.digest_bytes
        self._chunks = ChunkReader(handle)
        self._cache: OrderedDict[ChunkId, Part] = OrderedDict()

    def read(self, part_id: ChunkId) -> Part:
        """The part; never raises for damage."""
        part = self._cache.pop(part_id, None)
        if part is None:
            part = self._read(part_id)
        self._cache[part_id] = part
        if len(self._cache) > _CACHED_PARTS_MAX:
            self._cache.popitem(last=False)
        return part

    def kept(self, part_ids: Sequence[ChunkId], thinning: Thinning | None) -> Iterator[tuple[Hashable, Part]]:
        """The parts of one snapshot, without the chunks of leaves that it dropped; equal keys, equal parts."""
        if thinning is None:
            for part_id in part_ids:
                yield part_id, self.read(part_id)
            return
        needed = needed_paths((entry for part_id in part_ids for entry in self.read(part_id).entries), thinning)
        for part_id in part_ids:
            part = self.read(part_id)
            entries = tuple(
                entry if keeps_chunks(entry, thinning, needed) else _without_chunks(entry) for entry in part.entries
            )
            yield (part_id, thinning.dropped, needed), replace(part, entries=entries)

    def _read(self, part_id: ChunkId) -> Part:
        where = f"manifest part {part_id.hex()}"
        try:
            decoded = decode_part(self._chunks.get(part_id), id_bytes=self._id_bytes, where=where)
        except CastoreError as error:
            return Part(error=str(error))
        entries, unresolved = [], {}
        for entry in decoded:
            try:
                entries.append(self._resolved(entry, where))
            except CastoreError as error:
                entries.append(entry)
                unresolved[entry.path] = str(error)
        return Part(tuple(entries), unresolved=unresolved)

    def _resolved(self, entry: Entry, where: str) -> Entry:
        if entry.id_lists is None:
            return entry
        id_bytes = self._id_bytes
        remaining, ids = chunk_count(entry.raw_bytes), []
        for list_id in split_ids(entry.id_lists, id_bytes):
            count = min(remaining, PART_CHUNKS_MAX)
            raw = bytes(self._chunks.get(list_id))
            ids.append(decode_id_list(raw, expected_count=count, id_bytes=id_bytes, where=where))
            remaining -= count
        return replace(entry, chunks=b"".join(ids))


def _without_chunks(entry: Entry) -> Entry:
    """A dropped leaf: its id lists stay, so that its digest can be proven."""
    return entry if entry.chunks is None else replace(entry, chunks=b"")


def affected_leaves(
    parts: PartReader,
    snapshots: Mapping[SnapshotId, tuple[ChunkId, ...]],
    lost: Collection[ChunkId],
    thinnings: Mapping[SnapshotId, Thinning],
) -> dict[ChunkId, dict[SnapshotId, tuple[str, ...]]]:
    """For each lost chunk the snapshots that need it, with the paths of the leaves that do.

    `snapshots` gives the part ids of each. Leaves that a snapshot dropped do not count. A lost part touches its
    snapshots with no paths: which leaves it named cannot be told.
    """
    found: dict[ChunkId, dict[SnapshotId, tuple[str, ...]]] = {chunk_id: {} for chunk_id in lost}
    if not lost:
        return found
    users: dict[Hashable, dict[ChunkId, list[str]]] = {}
    for snapshot_id, part_ids in snapshots.items():
        thinning = thinnings.get(snapshot_id)
        paths: dict[ChunkId, list[str]] = {}
        for (key, part), part_id in zip(parts.kept(part_ids, thinning), part_ids, strict=True):
            if key not in users:
                users[key] = _users(part, found, len(part_id))
            for chunk_id, leaves in users[key].items():
                paths.setdefault(chunk_id, []).extend(leaves)
            if part_id in found:
                paths.setdefault(part_id, [])
        if paths:
            named = _with_references(parts, part_ids, paths)
            for chunk_id, leaves in named.items():
                left = leaves if thinning is None else [path for path in leaves if not thinning.drops(path)]
                found[chunk_id][snapshot_id] = tuple(left)
    return found


def _users(part: Part, lost: Collection[ChunkId], id_bytes: int) -> dict[ChunkId, list[str]]:
    """Lost chunk → paths of the entries of one part that need it."""
    users: dict[ChunkId, list[str]] = {}
    for entry in part.entries:
        needed = (*entry.chunk_ids(id_bytes), *split_ids(entry.id_lists or b"", id_bytes))
        for chunk_id in dict.fromkeys(needed):
            if chunk_id in lost:
                users.setdefault(chunk_id, []).append(entry.path)
    return users


def _with_references(
    parts: PartReader, part_ids: tuple[ChunkId, ...], paths: Mapping[ChunkId, list[str]]
) -> dict[ChunkId, list[str]]:
    """The same with aliases and views of those entries; hidden storages give way to their views."""
    references: dict[str, list[str]] = {}
    hidden: set[str] = set()
    for entry in _entries(parts, part_ids):
        if entry.kind is Kind.ALIAS:
            references.setdefault(str(entry.attrs.get("target")), []).append(entry.path)
        elif entry.kind is Kind.VIEW:
            references.setdefault(str(entry.attrs.get("storage")), []).append(entry.path)
        elif entry.kind is Kind.STORAGE:
            hidden.add(entry.path)
    named: dict[ChunkId, list[str]] = {}
    for chunk_id, direct in paths.items():
        shown = list(direct)
        for path in shown:  # grows: a view may have aliases
            shown.extend(reference for reference in references.get(path, ()) if reference not in shown)
        named[chunk_id] = [path for path in shown if path not in hidden]
    return named


def _entries(parts: PartReader, part_ids: tuple[ChunkId, ...]) -> Iterator[Entry]:
    return (entry for part_id in part_ids for entry in parts.read(part_id).entries)
