"""Which chunks the target has, and whether they may be relied on.

What counts as present lies, with its bases, in packs of a listing taken under the target's lease, none condemned; or
this run has put it into a pack itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from castore.closure import closure
from castore.codec.registry import DIFFERENCES
from castore.errors import CastoreError
from castore.ids import ChunkId
from castore.index import Location
from castore.leases import condemned_packs
from castore.pack.writer import SealedPack
from castore.repository import Handle
from castore.store import Locations, list_packs


@dataclass(frozen=True, slots=True)
class Stored:
    """How a chunk lies at the target."""

    depth: int
    base: ChunkId | None
    """What it is a difference from, by its id at the source, where this run knows it."""
    rests_on: tuple[Location, ...] = ()
    """Records that were there before, unread by this run."""


class TargetChunks:
    """Look-up of chunks, by their ids at the target. Belongs to one thread."""

    def __init__(self, target: Handle, *, check: bool, knows_ids: bool) -> None:
        """`check`: compare stored bytes with their checksums before they count. `knows_ids`: one hash on both sides."""
        self._target = target
        self._check = check
        self._knows_ids = knows_ids
        self._condemned = condemned_packs(target.backend)
        self._listing = target.store.refresh()
        self._stored: dict[ChunkId, Stored] = {}
        self._absent: set[ChunkId] = set()
        """Looked up in vain; what others bring meanwhile need not be seen: it is only sent once more."""
        self._sound: dict[Location, bool] = {}

    @property
    def sees_condemned(self) -> bool:
        """Whether a collector had condemned packs at the last look: nothing may then be taken for whole unseen."""
        return bool(self._condemned)

    def look_again(self) -> bool:
        """List condemned and standing packs anew; True when what this run relied on may be going."""
        # The condemned set before the listing: a pack condemned after this look is condemned after our root was
        # visible, so that the collector saves what we need.
        condemned = condemned_packs(self._target.backend)
        listing = list_packs(self._target.backend)
        if condemned == self._condemned and self._listing <= listing:
            return False
        self._condemned = condemned
        self._listing = self._target.store.refresh()
        self._stored.clear()
        self._absent.clear()
        return True

    def find_present(self, target_ids: Iterable[ChunkId]) -> frozenset[ChunkId]:
        """Those that the target has, with their bases, in packs that stay."""
        wanted = set(target_ids)
        unknown = wanted - self._stored.keys() - self._absent
        if unknown:
            found = closure(unknown, self._target.store, self._condemned)
            if self._check and not all(self._are_sound(rests_on) for rests_on in found.values()):
                # What is damaged is passed over from now on; another place of the chunk may be whole.
                found = closure(unknown, self._target.store, self._condemned)
                found = {chunk_id: rests_on for chunk_id, rests_on in found.items() if self._are_sound(rests_on)}
            for chunk_id, rests_on in found.items():
                row = rests_on[0].row
                base = row.base_ids[0] if self._knows_ids and row.chain in DIFFERENCES else None
                self._stored[chunk_id] = Stored(row.depth, base, rests_on)
            self._absent |= unknown - found.keys()
        return frozenset(wanted & self._stored.keys())

    def _are_sound(self, locations: Locations) -> bool:
        sound = [self._is_sound(location) for location in locations]  # all are read: what is damaged must be known
        return all(sound)

    def _is_sound(self, location: Location) -> bool:
        """Whether the stored bytes have their checksum; each record is read once."""
        if location not in self._sound:
            try:
                self._target.store.check(location)
                self._sound[location] = True
            except CastoreError:
                self._sound[location] = False
        return self._sound[location]

    def stored(self, target_id: ChunkId) -> Stored | None:
        """How a chunk lies there, if it was found or noted."""
        return self._stored.get(target_id)

    def can_carry(self, target_id: ChunkId, *, below: int) -> bool:
        """Whether a record of depth `below` may rest on a chunk that was found: records from before are read first."""
        stored = self._stored[target_id]
        return stored.depth < below and self._are_sound(stored.rests_on)

    def note(self, target_id: ChunkId, stored: Stored) -> None:
        """This run has put a chunk into a pack."""
        self._absent.discard(target_id)
        self._stored[target_id] = stored

    def add_pack(self, sealed: SealedPack) -> None:
        """A pack of this run is durable."""
        self._listing |= {sealed.pack_id}
        self._target.store.add({sealed.pack_id: sealed.rows})
