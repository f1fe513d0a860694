"""Who needs which chunk, added up: the arithmetic of usage.py.

First every snapshot is added, then the rows of every pack. A chunk belongs to the snapshot that alone needs it, or to
none; what rests on a base needs the base too. One entry for each chunk is held in memory.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from castore.codec.registry import chain_name
from castore.format.pack import Row
from castore.ids import ChunkId, SnapshotId
from castore.maintenance.parts import Part, PartReader
from castore.marks import Thinning
from castore.snapshots import split_ids

MANIFEST = "~manifest"
"""The group of parts and id lists. No path of a leaf begins like this."""
_SHARED = SnapshotId("")
"""Owner of a chunk that several snapshots need."""


@dataclass(frozen=True, slots=True)
class Totals:
    """The sums."""

    groups: dict[str, tuple[int, int]]
    """Beginning of paths → raw bytes in all snapshots, stored bytes of distinct chunks."""
    codecs: dict[str, tuple[int, int, int]]
    """Chain → records, raw bytes, stored bytes."""
    exclusive: dict[SnapshotId, int]
    pinned_bytes: int
    unreferenced_bytes: int


def group_of(path: str, depth: int) -> str:
    """The first `depth` levels of a path."""
    return "/".join(path.split("/")[:depth])


@dataclass(frozen=True, slots=True)
class _PartUse:
    """What one part names: its chunks by group, and raw bytes by group."""

    chunks: dict[ChunkId, str]
    raw_bytes: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Stored:
    """The first record of a chunk."""

    stored_bytes: int
    depth: int
    base_id: ChunkId | None


class Tally:
    """Adds up."""

    def __init__(self, parts: PartReader, *, id_bytes: int, depth: int) -> None:
        self.unreadable: list[str] = []
        """Parts that cannot be read."""
        self._parts = parts
        self._id_bytes = id_bytes
        self._depth = depth
        self._uses: dict[Hashable, _PartUse] = {}
        self._owners: dict[ChunkId, SnapshotId] = {}
        self._groups: dict[ChunkId, str] = {}
        self._raw: dict[str, int] = {}
        self._codecs: dict[str, tuple[int, int, int]] = {}
        self._stored: dict[ChunkId, _Stored] = {}
        self._copies_bytes = 0
        """Stored bytes of second copies."""

    def add_snapshot(
        self, snapshot_id: SnapshotId, part_ids: Sequence[ChunkId], thinning: Thinning | None = None
    ) -> None:
        """Note who needs which chunk."""
        for (key, part), part_id in zip(self._parts.kept(part_ids, thinning), part_ids, strict=True):
            if key not in self._uses:
                if part.error or part.unresolved:
                    self.unreadable.append(f"manifest part {part_id.hex()}: {part.error or 'an id list is lost'}")
                self._uses[key] = self._use(part_id, part)
            use = self._uses[key]
            for group, raw_bytes in use.raw_bytes.items():
                self._raw[group] = self._raw.get(group, 0) + raw_bytes
            for chunk_id, group in use.chunks.items():
                self._need(chunk_id, snapshot_id, group)

    def add_rows(self, rows: Iterable[Row]) -> None:
        """Count the records of one pack."""
        for row in rows:
            name = chain_name(row.chain)
            count, raw_bytes, stored_bytes = self._codecs.get(name, (0, 0, 0))
            self._codecs[name] = count + 1, raw_bytes + row.raw_bytes, stored_bytes + row.stored_bytes
            if row.chunk_id in self._stored:
                self._copies_bytes += row.stored_bytes
            else:
                self._stored[row.chunk_id] = _Stored(row.stored_bytes, row.depth, row.base_id)

    def totals(self) -> Totals:
        """The sums; call once, when everything was added."""
        needed = frozenset(self._owners)
        deepest_first = sorted(self._stored.items(), key=lambda item: item[1].depth, reverse=True)
        for chunk_id, record in deepest_first:
            if record.base_id is not None and chunk_id in self._owners:
                self._need(record.base_id, self._owners[chunk_id], self._groups[chunk_id])
        stored: dict[str, int] = {}
        exclusive: dict[SnapshotId, int] = {}
        pinned_bytes, unreferenced_bytes = 0, self._copies_bytes
        for chunk_id, record in self._stored.items():
            owner = self._owners.get(chunk_id)
            if owner is None:
                unreferenced_bytes += record.stored_bytes
                continue
            group = self._groups[chunk_id]
            stored[group] = stored.get(group, 0) + record.stored_bytes
            if chunk_id not in needed:
                pinned_bytes += record.stored_bytes
            if owner != _SHARED:
                exclusive[owner] = exclusive.get(owner, 0) + record.stored_bytes
        groups = {group: (self._raw.get(group, 0), stored.get(group, 0)) for group in self._raw.keys() | stored.keys()}
        return Totals(groups, dict(self._codecs), exclusive, pinned_bytes, unreferenced_bytes)

    def _need(self, chunk_id: ChunkId, owner: SnapshotId, group: str) -> None:
        if self._owners.setdefault(chunk_id, owner) != owner:
            self._owners[chunk_id] = _SHARED
        self._groups.setdefault(chunk_id, group)

    def _use(self, part_id: ChunkId, part: Part) -> _PartUse:
        chunks: dict[ChunkId, str] = {part_id: MANIFEST}
        raw: dict[str, int] = {}
        for entry in part.entries:
            if not entry.has_bytes:
                continue
            group = group_of(entry.path, self._depth)
            raw[group] = raw.get(group, 0) + entry.raw_bytes
            chunks.update((chunk_id, group) for chunk_id in entry.chunk_ids(self._id_bytes))
            chunks.update((list_id, MANIFEST) for list_id in split_ids(entry.id_lists or b"", self._id_bytes))
        return _PartUse(chunks, raw)
