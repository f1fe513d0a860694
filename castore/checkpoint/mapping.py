"""Map leaves that lie raw and in one piece in a pack, instead of reading them.

    entries ──▶ place (pure) ──▶ the pack's own table says the same ──▶ one mapping for each pack ──▶ arrays over it

What is checked before anything is mapped: the table of the pack, by its checksum (the index is a hint, and here no hash
of the bytes would notice its mistakes), and that the file is long enough. The bytes themselves are only hashed when
asked for: that would read all that mapping leaves alone. A leaf that does not pass is left to the reader, which tries
its other locations and reports what is wrong.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from castore.available_memory import available_bytes
from castore.backend.base import MappableReader, ReadAheadReader
from castore.checkpoint.read_ahead import spans
from castore.errors import CastoreError
from castore.format.layout import pack_name
from castore.format.manifest import Entry, chunk_bytes
from castore.format.pack import Row
from castore.ids import ChunkId, PackId
from castore.index import Location
from castore.options import GRID_BYTES
from castore.pack.reader import read_table
from castore.store import ChunkStore, Locations
from castore.tensors import adopt
from castore.threads import worker_count

_READ_AHEAD_SHARE = 0.25
"""Of the available memory, what the system is asked to read before it is touched. Page by page as they are touched, a
cold file comes several times more slowly; of what does not fit, the beginning would be pushed out again."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a leaf lies as it is: its chunks one after the other in one pack."""

    pack_id: PackId
    rows: tuple[Row, ...]

    @property
    def start(self) -> int:
        """Offset in the pack."""
        return self.rows[0].offset

    @property
    def stop(self) -> int:
        """Where it ends."""
        return self.rows[-1].offset + self.rows[-1].stored_bytes


def place(entry: Entry, locations: Sequence[Locations]) -> Place | None:
    """Where the leaf can be mapped, if anywhere; `locations` are those of its chunks in grid order."""
    for first in locations[0]:
        rows = []
        for index, hits in enumerate(locations):
            offset, length = first.row.offset + index * GRID_BYTES, chunk_bytes(entry.raw_bytes, index)
            row = next((hit.row for hit in hits if hit.pack_id == first.pack_id and hit.row.offset == offset), None)
            if row is None or row.chain or not row.stored_bytes == row.raw_bytes == length:
                break
            rows.append(row)
        else:
            return Place(first.pack_id, tuple(rows))
    return None


def map_leaves(
    store: ChunkStore, entries: Iterable[Entry], *, verify: bool, progress: Callable[[int], None]
) -> dict[str, Any]:
    """Arrays by path for those entries that can be mapped; all of them are `tensors.can_adopt`.

    With `verify` every chunk id is recomputed, through reads rather than the mapping, since a bad sector under a
    mapping kills the process. `progress` gets the bytes of each leaf that is ready.
    """
    by_path = {entry.path: entry for entry in entries}
    by_pack: dict[PackId, dict[str, Place]] = defaultdict(dict)
    for path, found in _places(store, by_path).items():
        by_pack[found.pack_id][path] = found
    mapped: dict[str, Any] = {}
    for pack_id, places in by_pack.items():
        # What is wrong with a pack is said by the reader, to which the leaves are left.
        with suppress(CastoreError):
            mapped.update(_map_pack(store, pack_id, places, by_path))
    if verify:
        chosen = {path: found for places in by_pack.values() for path, found in places.items() if path in mapped}
        for path in _rotten(store, chosen, progress):
            del mapped[path]
    else:
        with suppress(CastoreError):
            _read_ahead(store, [found for group in by_pack.values() for path, found in group.items() if path in mapped])
        progress(sum(by_path[path].raw_bytes for path in mapped))
    return mapped


def _read_ahead(store: ChunkStore, places: Sequence[Place]) -> None:
    """Have the system begin to read what is mapped. Only a hint."""
    budget = available_bytes() * _READ_AHEAD_SHARE
    for pack_id, start, stop in spans(Location(found.pack_id, row) for found in places for row in found.rows):
        budget -= stop - start
        reader = store.open_pack(pack_id)
        if budget < 0 or not isinstance(reader, ReadAheadReader):
            return
        reader.will_need(start, stop - start)


def _places(store: ChunkStore, entries: Mapping[str, Entry]) -> dict[str, Place]:
    ids = {path: entry.chunk_ids(store.hasher.digest_bytes) for path, entry in entries.items()}
    locations = store.locate({chunk_id for chunk_ids in ids.values() for chunk_id in chunk_ids})
    places = {path: place(entries[path], [locations[key] for key in chunk_ids]) for path, chunk_ids in ids.items()}
    return {path: found for path, found in places.items() if found is not None}


def _map_pack(
    store: ChunkStore, pack_id: PackId, places: Mapping[str, Place], entries: Mapping[str, Entry]
) -> dict[str, Any]:
    """One mapping from the first byte of the places to the last: it takes a descriptor, of which there are few."""
    reader = store.open_pack(pack_id)
    if not isinstance(reader, MappableReader):
        return {}
    table = read_table(reader, where=pack_name(pack_id), expected_id=pack_id, hasher=store.hasher)
    own: dict[int, ChunkId] = {row.offset: row.chunk_id for row in table if not row.chain}
    confirmed = {
        path: found for path, found in places.items() if all(own.get(row.offset) == row.chunk_id for row in found.rows)
    }
    if not confirmed:
        return {}
    start = min(found.start for found in confirmed.values())
    memory = reader.map_range(start, max(found.stop for found in confirmed.values()) - start)
    arrays = {
        path: adopt(entries[path], memory[found.start - start : found.stop - start])
        for path, found in confirmed.items()
    }
    return {path: array for path, array in arrays.items() if array is not None}


def _rotten(store: ChunkStore, places: Mapping[str, Place], progress: Callable[[int], None]) -> set[str]:
    """Paths of the leaves of which a chunk does not hash to its id, or cannot be read."""

    def check(path: str) -> str | None:
        scratch = memoryview(bytearray(GRID_BYTES))
        for row in places[path].rows:
            raw = scratch[: row.raw_bytes]
            try:
                store.open_pack(places[path].pack_id).read_into(row.offset, raw)
            except CastoreError:
                return path
            if store.hasher.digest(raw) != row.chunk_id:
                store.mark_bad(places[path].pack_id, row, why="its bytes do not hash to the id of its chunk")
                return path
        progress(places[path].stop - places[path].start)
        return None

    ordered = sorted(places, key=lambda path: (places[path].pack_id, places[path].start))
    with ThreadPoolExecutor(worker_count(), thread_name_prefix="castore-verify") as pool:
        return {path for path in pool.map(check, ordered) if path is not None}
