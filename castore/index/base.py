"""The seam between the store and whatever remembers where chunks lie.

Packs are the truth; an index is a cache of their tables. It may be deleted at any moment, and it may lag
behind the packs (another process wrote some) or run ahead of them (gc deleted some). So nothing is concluded
from an index alone: a miss means "read the tables of the packs that `packs()` lacks, then look again", a hit
counts only where its pack stands in a listing of `packs/`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from castore.format.pack import Row
from castore.ids import ChunkId, PackId


@dataclass(frozen=True, slots=True)
class Location:
    """One place where a chunk is stored."""

    pack_id: PackId
    row: Row


class Index(Protocol):
    """Chunk id → locations.

    1. The unit is the pack: its whole table is known or none of it. What `packs()` names, `find` answers for.
    2. Every change is one transaction: another thread, handle or process sees all of it or nothing, and a
       process killed midway leaves nothing of it.
    3. Contents may vanish (damage, a deleted cache, a full disk), never change: `packs()` then says so, and
       the caller adds the missing tables again. So an operation never raises because cached bytes are bad.
    4. All methods may be called from any thread, and in a forked child.
    """

    def find(self, ids: Sequence[ChunkId]) -> list[tuple[Location, ...]]:
        """The locations of each id, parallel to `ids`; an empty tuple where none is known.

        Several locations of one chunk come in the order in which their packs were added, within a pack by
        offset.
        """
        ...

    def packs(self) -> frozenset[PackId]:
        """The packs whose tables were added and not forgotten."""
        ...

    def add(self, tables: Mapping[PackId, Sequence[Row]]) -> None:
        """Add whole tables in one transaction. A pack that is known already is left as it is.

        A rebuild gives many tables at a time: each call writes a part of the whole again.
        """
        ...

    def forget(self, packs: Collection[PackId]) -> None:
        """Drop packs with all their locations in one transaction; unknown ones are ignored."""
        ...

    def clear(self) -> None:
        """Drop everything."""
        ...

    def close(self) -> None:
        """Let go of files. The index must not be used afterwards; closing twice does nothing."""
        ...
