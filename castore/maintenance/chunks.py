"""Chunks for whole-repository work: looked up through the index, and past it when it is at fault."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

from castore.errors import DamageError
from castore.format.pack import Row
from castore.ids import ChunkId
from castore.index.memory import MemoryIndex
from castore.repository import Handle
from castore.store import ChunkStore


class ChunkReader:
    """Reads verified chunks. Thread-safe.

    What the index does not find is looked for by the tables of the packs alone: a wrong index makes no chunk look lost.
    """

    def __init__(self, handle: Handle) -> None:
        self._handle = handle
        self._lock = threading.Lock()
        self._direct: ChunkStore | None = None

    def get(self, chunk_id: ChunkId) -> bytearray:
        """The raw bytes. Raises DamageError."""
        try:
            return self._handle.store.get(chunk_id)
        except DamageError:
            return self._by_tables().get(chunk_id)

    def get_many(self, chunk_ids: Sequence[ChunkId]) -> Iterator[bytearray]:
        """The raw bytes of each, looked up together. Raises DamageError."""
        store = self._handle.store
        located = store.locate(chunk_ids)
        for chunk_id in chunk_ids:
            locations = located[chunk_id]
            raw = bytearray(locations[0].row.raw_bytes if locations else 0)
            try:
                store.read_into(chunk_id, locations, memoryview(raw))
            except DamageError:
                raw = self._by_tables().get(chunk_id)
            yield raw

    def read_base(self, row: Row, *, where: str) -> memoryview:
        """The raw bytes of the base of a record, in memory of this thread as `ChunkStore.read_base` says."""
        try:
            return self._handle.store.read_base(row, where=where, verify=True)
        except DamageError:
            return self._by_tables().read_base(row, where=where, verify=True)

    def _by_tables(self) -> ChunkStore:
        with self._lock:
            if self._direct is None:
                self._direct = ChunkStore(self._handle.backend, MemoryIndex(), self._handle.hasher)
            return self._direct
