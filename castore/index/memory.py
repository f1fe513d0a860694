"""The index as a dict: for tests, for read-only mounts, and for whenever the cache directory cannot be used.

About 700 bytes per row, most of it the row itself; an index of a million chunks still fits beside a training
job.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence

from castore.format.pack import Row
from castore.ids import ChunkId, PackId
from castore.index.base import Location


class MemoryIndex:
    """An index that lives and dies with this object."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._locations: dict[ChunkId, tuple[Location, ...]] = {}
        self._chunks: dict[PackId, frozenset[ChunkId]] = {}

    def find(self, ids: Sequence[ChunkId]) -> list[tuple[Location, ...]]:
        """See Index.find."""
        with self._lock:
            return [self._locations.get(chunk_id, ()) for chunk_id in ids]

    def packs(self) -> frozenset[PackId]:
        """See Index.packs."""
        with self._lock:
            return frozenset(self._chunks)

    def add(self, tables: Mapping[PackId, Sequence[Row]]) -> None:
        """See Index.add."""
        with self._lock:
            for pack_id, rows in tables.items():
                if pack_id not in self._chunks:
                    self._add_table(pack_id, rows)

    def forget(self, packs: Collection[PackId]) -> None:
        """See Index.forget."""
        with self._lock:
            gone = frozenset(packs) & self._chunks.keys()
            for chunk_id in frozenset[ChunkId]().union(*(self._chunks.pop(pack_id) for pack_id in gone)):
                left = tuple(location for location in self._locations[chunk_id] if location.pack_id not in gone)
                if left:
                    self._locations[chunk_id] = left
                else:
                    del self._locations[chunk_id]

    def clear(self) -> None:
        """See Index.clear."""
        with self._lock:
            self._locations.clear()
            self._chunks.clear()

    def close(self) -> None:
        """See Index.close."""

    def _add_table(self, pack_id: PackId, rows: Sequence[Row]) -> None:
        for row in sorted(rows, key=lambda row: row.offset):
            location, known = Location(pack_id, row), self._locations.get(row.chunk_id, ())
            if location not in known:
                self._locations[row.chunk_id] = (*known, location)
        self._chunks[pack_id] = frozenset(row.chunk_id for row in rows)
