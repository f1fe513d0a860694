"""Which chunk a new chunk is taken as a difference from.

The candidate is the chunk of the same leaf at the same place of the grid in the parent snapshot. Depth is bounded, so a
chunk whose own record already stands at the bound is passed over for its base: consecutive saves then share one
reference, a star, instead of growing a chain.

    depth 0      A                    a chunk by itself
    depth 1      └─ B                 the first save after it: from now on the reference
    depth 2         ├─ C              and every later one, until differences from B no longer pay
                    ├─ D
                    └─ E

A star drifts from its centre, so one chunk in REFERENCE_MOVES_EVERY rests on the anchor again and is the next
reference: which one, its predecessor's id tells, so that everybody agrees and no single save pays for all.

A rounded copy (masters.py) is one deeper than its masters, so at most one deeper than the bound; no difference is taken
from one at the bound. Planning is pure but for look-ups.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from castore.closure import closure
from castore.codec.registry import DIFFERENCES
from castore.format.manifest import Entry, chunk_bytes
from castore.ids import ChunkId, PackId
from castore.options import DELTA_DEPTH_MAX, REFERENCE_MOVES_EVERY
from castore.store import ChunkStore, Locations


@dataclass(frozen=True, slots=True)
class Base:
    """A chunk that a difference may be taken from."""

    chunk_id: ChunkId
    rests_on: Locations
    """Its location, then all that must stay for it to be read."""

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
        if not entry.chunks or parent is None or entry.chunks == parent.chunks:
            continue
        if (parent.kind, parent.dtype) != (entry.kind, entry.dtype):
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
    """Where the next chunk at a place may rest, given what the present one rests on (its own location first); empty:
    nowhere.
    """
    below = rests_on
    while below and below[0].row.depth >= DELTA_DEPTH_MAX:
        below = _below(below)
    if below is not rests_on and _moves_reference(rests_on[0].row.chunk_id):
        return _below(below) or below
    return below


def _moves_reference(chunk_id: ChunkId) -> bool:
    """True for one chunk id in REFERENCE_MOVES_EVERY, the same ones for everybody."""
    return int.from_bytes(chunk_id[:4], "little") % REFERENCE_MOVES_EVERY == 0


def reference_of(rests_on: Locations) -> ChunkId:
    """The chunk that the next save will take a difference from, for a chunk that rests on these locations."""
    below = base_for(rests_on)
    return (below or rests_on)[0].row.chunk_id


def _below(rests_on: Locations) -> Locations:
    """What the base of a difference rests on; nothing for other records: masters are not like what rests on them."""
    return rests_on[1:] if rests_on and rests_on[0].row.chain in DIFFERENCES else ()
