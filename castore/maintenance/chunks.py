"""Chunks for whole-repository work: looked up through the index, and past it when it is at fault."""

from __future__ import annotations

import threading

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
