"""Chunk ids → small numbers, for millions of ids: an open-addressing table over fixed-width columns.

    for each id     16 bytes of id (32 with blake3) and 8 to 16 bytes of slots
    a dict          about 200 bytes, and ten times as slow by the batch

Ids are compared whole: two chunks never share a number. Collisions step on by one slot (linear probing); the slots are
kept at most half full.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from castore.format.pack_columns import Words

Numbers = npt.NDArray[np.int32]

_SLOTS_MIN = 1 << 12
_BLOCK_IDS = 1 << 17
"""Ids dealt with at a time: bounds the memory of a look-up to a few MiB."""
_MIXER = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93], np.uint64)
"""Odd constants of splitmix64 and xxHash: ids are digests, mixing is for those that somebody made up."""
_ABSENT = -1


class IdTable:
    """Numbers ids from 0 on, in no order."""

    def __init__(self, id_bytes: int) -> None:
        self._ids: Words = np.zeros((0, id_bytes // 8), np.uint64)
        self._count = 0
        self._slots: Numbers = np.full(_SLOTS_MIN, _ABSENT, np.int32)

    def __len__(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        """Memory in use."""
        return self._ids.nbytes + self._slots.nbytes

    def id_of(self, number: int) -> bytes:
        """The id behind a number."""
        return bytes(self._ids[number].tobytes())

    def find(self, ids: Words) -> Numbers:
        """The number of each id, -1 where it was never seen."""
        blocks = [self._find(ids[at : at + _BLOCK_IDS]) for at in range(0, len(ids), _BLOCK_IDS)]
        return np.concatenate(blocks) if blocks else np.zeros(0, np.int32)

    def intern(self, ids: Words) -> Numbers:
        """The number of each id; those never seen get the next ones."""
        blocks = [self._intern(ids[at : at + _BLOCK_IDS]) for at in range(0, len(ids), _BLOCK_IDS)]
        return np.concatenate(blocks) if blocks else np.zeros(0, np.int32)

    def _find(self, ids: Words) -> Numbers:
        out = np.full(len(ids), _ABSENT, np.int32)
        slots = self._first_slots(ids)
        pending = np.arange(len(ids))
        while len(pending):
            found = self._slots[slots[pending]]
            pending, found = pending[found >= 0], found[found >= 0]  # an empty slot: never seen
            same = self._same(found, ids[pending])
            out[pending[same]] = found[same]
            pending = pending[~same]
            slots[pending] = (slots[pending] + 1) & (len(self._slots) - 1)
        return out

    def _intern(self, ids: Words) -> Numbers:
        self._reserve(self._count + len(ids))
        out = np.full(len(ids), _ABSENT, np.int32)
        slots = self._first_slots(ids)
        pending = np.arange(len(ids))
        while len(pending):
            found = self._slots[slots[pending]]
            taken = found >= 0
            same = np.zeros(len(pending), np.bool_)
            same[taken] = self._same(found[taken], ids[pending[taken]])
            out[pending[same]] = found[same]
            other = pending[taken & ~same]
            slots[other] = (slots[other] + 1) & (len(self._slots) - 1)
            # Of several new ids that meet in a slot, or are equal, one gets it; the others look again.
            free = pending[~taken]
            places, first = np.unique(slots[free], return_index=True)
            winners = free[first]
            numbers = np.arange(self._count, self._count + len(winners), dtype=np.int32)
            self._ids[numbers] = ids[winners]
            self._slots[places] = numbers
            self._count += len(winners)
            out[winners] = numbers
            pending = pending[out[pending] < 0]
        return out

    def _same(self, numbers: Numbers, ids: Words) -> npt.NDArray[np.bool_]:
        same: npt.NDArray[np.bool_] = (self._ids[numbers] == ids).all(axis=1)
        return same

    def _first_slots(self, ids: Words) -> npt.NDArray[np.int64]:
        mixed = (ids * _MIXER[: ids.shape[1]]).sum(axis=1, dtype=np.uint64)
        mixed ^= mixed >> np.uint64(32)
        slots: npt.NDArray[np.int64] = (mixed & np.uint64(len(self._slots) - 1)).astype(np.int64)
        return slots

    def _reserve(self, count: int) -> None:
        """Room for so many ids. Grown in place (`realloc` moves pages, not bytes), by a quarter."""
        if count > len(self._ids):
            self._ids.resize((max(count, len(self._ids) * 5 // 4), self._ids.shape[1]), refcheck=False)
        if 2 * count > len(self._slots):
            slot_count = len(self._slots)
            while 2 * count > slot_count:
                slot_count *= 2
            self._slots = np.zeros(0, np.int32)  # let go of the old ones first
            self._slots = np.full(slot_count, _ABSENT, np.int32)
            for start in range(0, self._count, _BLOCK_IDS):
                self._place(np.arange(start, min(start + _BLOCK_IDS, self._count), dtype=np.int32))

    def _place(self, numbers: Numbers) -> None:
        """Put distinct ids into slots again."""
        slots = self._first_slots(self._ids[numbers])
        while len(numbers):
            free = np.flatnonzero(self._slots[slots] < 0)
            places, first = np.unique(slots[free], return_index=True)
            self._slots[places] = numbers[free[first]]
            left = self._slots[slots] != numbers
            numbers, slots = numbers[left], (slots[left] + 1) & (len(self._slots) - 1)
