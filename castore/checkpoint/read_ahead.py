"""Look up and fetch ahead of the threads that decode: the disk works while they do.

Jobs come in windows. When the first job of a window begins, the bases of the next window are looked up, in one
transaction of the index, and the system is asked to bring its records and their bases into the page cache. Two windows
at most are under way, so that a state larger than the memory does not push out its own beginning.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from operator import itemgetter

from castore.backend.base import ReadAheadReader
from castore.errors import CastoreError
from castore.ids import PackId
from castore.index import Location
from castore.store import ChunkStore, Locations

WINDOW_CHUNKS = 64
"""64 MiB raw, and with its bases as much again: a tenth of a second of a fast disk."""

_GAP_BYTES_MAX = 64 * 1024
"""Spans that lie this near are asked for together; what lies between is cheaper to read than to skip."""


class ReadAhead:
    """Prepares chunks for being read, in the order given. Thread-safe."""

    def __init__(self, store: ChunkStore, chunks: Sequence[Locations]) -> None:
        self._store = store
        self._chunks = chunks
        self._lock = threading.Lock()
        self._prepared = 0

    def reach(self, index: int) -> None:
        """Chunk `index` is about to be read. Never raises: what is wrong shows when it is read."""
        wanted = index - index % WINDOW_CHUNKS + 2 * WINDOW_CHUNKS
        with self._lock:
            first, self._prepared = self._prepared, max(self._prepared, min(wanted, len(self._chunks)))
            window = self._chunks[first : self._prepared]
        if window:
            with suppress(CastoreError):
                self._fetch(self._store.note_bases(window))

    def _fetch(self, locations: Iterable[Location]) -> None:
        for pack_id, pieces in groupby(spans(locations), key=itemgetter(0)):
            reader = self._store.open_pack(pack_id)
            if isinstance(reader, ReadAheadReader):  # asked once for each pack: it takes longer than the call
                for _, start, stop in pieces:
                    reader.will_need(start, stop - start)


def spans(locations: Iterable[Location]) -> Iterator[tuple[PackId, int, int]]:
    """(pack, start, stop) of the stored bytes, neighbours joined; the packs in the order in which they are met."""
    by_pack: dict[PackId, list[tuple[int, int]]] = defaultdict(list)
    for location in locations:
        row = location.row
        by_pack[location.pack_id].append((row.offset, row.offset + row.stored_bytes))
    for pack_id, pieces in by_pack.items():
        pieces.sort()
        start, stop = pieces[0]
        for next_start, next_stop in pieces[1:]:
            if next_start > stop + _GAP_BYTES_MAX:
                yield pack_id, start, stop
                start = next_start
            stop = max(stop, next_stop)
        yield pack_id, start, stop
