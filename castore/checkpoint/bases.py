"""Which chunk a new chunk is taken as a difference from.

The candidate is the chunk of the same leaf at the same place of the grid in the parent snapshot. Depth is bounded, so a
chunk whose own record already stands at the bound is passed over for its base: consecutive saves then share one
reference, a star, instead of growing a chain.

    depth 0      A                    a chunk by itself
    depth 1      └─ B                 the first save after it: from now on the reference
    depth 2         ├─ C              and every later one, until differences from B no longer pay
                    ├─ D
                    └─ E

A record may only rest on a base whose own record is less deep, so no cycle can arise, even when two writers stored the
same chunk in different ways. Planning is pure but for look-ups.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from castore.format.manifest import Entry, chunk_bytes
from castore.ids import ChunkId, PackId
from castore.options import DELTA_DEPTH_MAX, REFERENCE_MOVES_EVERY
from castore.store import ChunkStore, Locations

_DEPTH_BOUND = 256
"""Above any depth that a record header can hold."""


@dataclass(frozen=True, slots=True)
class Base:
    """A chunk that a difference may be taken from."""

    chunk_id: ChunkId
    rests_on: Locations
    """Its location, then that of its own base, and so on: all that must stay for it to be read."""

    @property
    def depth(self) -> int:
        """Of its record: the record that rests on it is one deeper."""
        return self.rests_on[0].row.depth


def candidates(entries: Iterable[Entry], parents: Iterable[Entry], *, id_bytes: int) -> dict[ChunkId, ChunkId]:
    """New chunk → the chunk at its place in the parent snapshot, where that has the same length and element type."""
    by_path = {entry.path: entry for entry in parents if entry.chunks}
    found: dict[ChunkId, ChunkId] = {}
    for entry in entries:
        parent = by_path.get(entry.path)
        if not entry.chunks or parent is None or (parent.kind, parent.dtype) != (entry.kind, entry.dtype):
            continue
        pairs = zip(entry.chunk_ids(id_bytes), parent.chunk_ids(id_bytes), strict=False)
        for index, (chunk_id, base_id) in enumerate(pairs):
            same_length = chunk_bytes(entry.raw_bytes, index) == chunk_bytes(parent.raw_bytes, index)
            if chunk_id != base_id and same_length:
                found.setdefault(chunk_id, base_id)
    return found


def plan_bases(
    wanted: Mapping[ChunkId, ChunkId], store: ChunkStore, condemned: frozenset[PackId]
) -> dict[ChunkId, Base]:
    """New chunk → base, by the rule at the head of this file. Chunks without a usable base are left out."""
    usable = closure(set(wanted.values()), store, condemned)
    plan: dict[ChunkId, Base] = {}
    for chunk_id, candidate in wanted.items():
        rests_on = base_for(usable.get(candidate, ()))
        if rests_on and rests_on[0].row.chunk_id != chunk_id:
            plan[chunk_id] = Base(rests_on[0].row.chunk_id, rests_on)
    return plan


def base_for(rests_on: Locations) -> Locations:
    """Where the next chunk at a place may rest, given what the present one rests on (its own location first)."""
    chunk = rests_on
    while rests_on and rests_on[0].row.depth >= DELTA_DEPTH_MAX:
        rests_on = rests_on[1:]
    if len(rests_on) > 1 and rests_on is not chunk and _moves_reference(chunk[0].row.chunk_id):
        return rests_on[1:]
    return rests_on


def _moves_reference(chunk_id: ChunkId) -> bool:
    """True for one chunk id in REFERENCE_MOVES_EVERY, the same ones for everybody."""
    return int.from_bytes(chunk_id[:4], "little") % REFERENCE_MOVES_EVERY == 0


def reference_of(rests_on: Locations) -> ChunkId:
    """The chunk that the next save will take a difference from, for a chunk that rests on these locations."""
    return base_for(rests_on)[0].row.chunk_id


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
        pending = {hit.row.base_id for hits in found.values() for hit in hits if hit.row.base_id} - known.keys()
    resting = {chunk_id: _rests_on(chunk_id, known, depth_below=_DEPTH_BOUND) for chunk_id in wanted}
    return {chunk_id: locations for chunk_id, locations in resting.items() if locations}


def _usable_locations(
    ids: Iterable[ChunkId], store: ChunkStore, condemned: frozenset[PackId]
) -> dict[ChunkId, Locations]:
    """Locations outside condemned packs, the least deep first."""
    wanted: Sequence[ChunkId] = list(ids)
    return {
        chunk_id: tuple(sorted((hit for hit in hits if hit.pack_id not in condemned), key=lambda hit: hit.row.depth))
        for chunk_id, hits in zip(wanted, store.find_sound(wanted), strict=True)
    }


def _rests_on(chunk_id: ChunkId, known: Mapping[ChunkId, Locations], *, depth_below: int) -> Locations:
    """The locations that a chunk needs when each base must be less deep than what rests on it; empty: it has none."""
    for hit in known.get(chunk_id, ()):
        if hit.row.depth >= depth_below:
            continue
        if hit.row.base_id is None:
            return (hit,)
        below = _rests_on(hit.row.base_id, known, depth_below=hit.row.depth)
        if below:
            return (hit, *below)
    return ()
