"""What a chunk rests on: the records that must stay, and stay whole, for it to be read.

A record rests on the bases that its row names, and through them on theirs. Every walk over bases goes through this file
or over `Row.base_ids`, never over one of them: a rounded copy has two. A base counts only where its record is less deep
than the one that rests on it, so no cycle can arise and every walk ends, even when two writers stored the same chunk in
different ways.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from castore.ids import ChunkId, PackId
from castore.store import ChunkStore, Locations

_DEPTH_BOUND = 256
"""Above any depth that a record header can hold."""


def closure(ids: Iterable[ChunkId], store: ChunkStore, condemned: frozenset[PackId]) -> dict[ChunkId, Locations]:
    """For each chunk that is there with all of its bases: the locations it rests on, its own first.

    A chunk counts as present only then: a record whose base is gone or condemned is as good as gone itself.
    """
    wanted = set(ids)
    known: dict[ChunkId, Locations] = {}
    pending = wanted
    while pending:
        found = _usable_locations(pending, store, condemned)
        known.update(found)
        bases = {base_id for hits in found.values() for hit in hits for base_id in hit.row.base_ids}
        pending = bases - known.keys()
    walked: dict[tuple[ChunkId, int], Locations] = {}
    resting = {chunk_id: _rests_on(chunk_id, known, walked, depth_below=_DEPTH_BOUND) for chunk_id in wanted}
    return {chunk_id: locations for chunk_id, locations in resting.items() if locations}


def _usable_locations(
    ids: Iterable[ChunkId], store: ChunkStore, condemned: frozenset[PackId]
) -> dict[ChunkId, Locations]:
    """Locations outside condemned packs, the preferred first."""
    wanted: Sequence[ChunkId] = list(ids)
    return {
        chunk_id: tuple(hit for hit in hits if hit.pack_id not in condemned)
        for chunk_id, hits in zip(wanted, store.find_sound(wanted), strict=True)
    }


def _rests_on(
    chunk_id: ChunkId,
    known: Mapping[ChunkId, Locations],
    walked: dict[tuple[ChunkId, int], Locations],
    *,
    depth_below: int,
) -> Locations:
    """The locations that a chunk needs when each base must be less deep than what rests on it; empty: it has none."""
    key = chunk_id, depth_below
    if key not in walked:
        walked[key] = ()
        for hit in known.get(chunk_id, ()):
            if hit.row.depth >= depth_below:
                continue
            below = [_rests_on(base_id, known, walked, depth_below=hit.row.depth) for base_id in hit.row.base_ids]
            if all(below):
                # Two bases may share one of their own; in a hostile pack, so many that only once each is bounded.
                walked[key] = tuple(dict.fromkeys((hit, *(location for part in below for location in part))))
                break
    return walked[key]
