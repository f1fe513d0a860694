"""An index that goes on in memory when its cache cannot be used any more: a full disk must not fail a save."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from castore.errors import StorageError
from castore.format.pack import Row
from castore.ids import ChunkId, PackId
from castore.index.base import Index, Location
from castore.index.memory import MemoryIndex


class FallbackIndex:
    """`cache` while it works; what it does not take is remembered here, for as long as this object lives.

    1. A failed `add` goes to memory; everything that the cache knows is still found there. Later calls try it
       again.
    2. When a look-up or `forget` fails, the cache is given up: `packs()` shrinks to what is in memory, and
       the caller adds the rest again, as it does after damage.
    """

    def __init__(self, cache: Index | None, *, reason: str | None = None) -> None:
        self._cache = cache
        self._opened = cache
        self._memory = MemoryIndex()
        self.reason = reason
        """Why memory is in use; None while the cache takes everything."""

    def find(self, ids: Sequence[ChunkId]) -> list[tuple[Location, ...]]:
        """See Index.find."""
        cache = self._cache
        remembered = self._memory.find(ids)
        if cache is None:
            return remembered
        try:
            cached = cache.find(ids)
        except StorageError as error:
            self._give_up(error)
            return remembered
        if not any(remembered):
            return cached
        return [tuple(dict.fromkeys((*here, *there))) for here, there in zip(cached, remembered, strict=True)]

    def packs(self) -> frozenset[PackId]:
        """See Index.packs."""
        cache = self._cache
        remembered = self._memory.packs()
        if cache is None:
            return remembered
        try:
            return remembered | cache.packs()
        except StorageError as error:
            self._give_up(error)
            return remembered

    def add(self, tables: Mapping[PackId, Sequence[Row]]) -> None:
        """See Index.add."""
        cache = self._cache
        if cache is not None:
            try:
                cache.add(tables)
            except StorageError as error:
                self._note(error)
            else:
                return
        self._memory.add(tables)

    def forget(self, packs: Collection[PackId]) -> None:
        """See Index.forget."""
        cache = self._cache
        self._memory.forget(packs)
        if cache is not None:
            try:
                cache.forget(packs)
            except StorageError as error:
                self._give_up(error)

    def clear(self) -> None:
        """See Index.clear."""
        cache = self._cache
        self._memory.clear()
        if cache is not None:
            try:
                cache.clear()
            except StorageError as error:
                self._give_up(error)

    def close(self) -> None:
        """See Index.close."""
        if self._opened is not None:
            self._opened.close()

    def _give_up(self, error: StorageError) -> None:
        self._note(error)
        self._cache = None  # closed only with this object: other threads may be in the middle of a call

    def _note(self, error: StorageError) -> None:
        if self.reason is None:
            import logging  # 6 ms of start-up, for what hardly ever happens

            logging.getLogger(__name__).warning("the index goes on in memory: %s", error)
        self.reason = str(error)
