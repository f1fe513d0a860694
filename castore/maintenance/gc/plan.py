"""What a collection will do with the packs: a pure function of what is live in each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from castore.format.pack import HEADER_BYTES, TRAILER_BYTES
from castore.ids import PackId


@dataclass(frozen=True, slots=True)
class PackState:
    """One pack, as far as the plan must know it."""

    pack_id: PackId
    pack_bytes: int
    live_bytes: int
    """Of its records that are relied on."""
    dead_count: int
    """Records that are not."""
    untouchable: str = ""
    """Why it must be left as it is: empty when it need not."""

    @property
    def wasted_bytes(self) -> int:
        """What rewriting would free; nothing in a pack whose records are all live, whatever it has of padding."""
        return self.dead_count and max(0, self.pack_bytes - HEADER_BYTES - TRAILER_BYTES - self.live_bytes)

    @property
    def live_share(self) -> float:
        """0 to 1. Header and trailer do not count: no rewriting frees them, however small the pack."""
        return self.live_bytes / max(1, self.live_bytes + self.wasted_bytes)


@dataclass(frozen=True, slots=True)
class PackPlan:
    """Which packs go."""

    dead: tuple[PackState, ...]
    """Nothing in them is needed: deleted without copying."""
    rewritten: tuple[PackState, ...]
    """Deleted when what is live in them has been copied out; the emptiest first."""
    left: tuple[PackState, ...]
    """Would be rewritten, but for the limit on copied bytes."""
    untouchable: tuple[PackState, ...]
    """Would go, but must not be touched."""

    @property
    def going(self) -> tuple[PackState, ...]:
        """All that will be condemned."""
        return (*self.dead, *self.rewritten)

    @property
    def copied_bytes(self) -> int:
        """Roughly what is written."""
        return sum(pack.live_bytes for pack in self.rewritten)


def plan_packs(packs: Sequence[PackState], *, repack_below: float, copied_bytes_max: int) -> PackPlan:
    """Dead packs go; of those whose live share is below `repack_below` the emptiest, while the copies fit the limit."""
    untouchable = tuple(pack for pack in packs if pack.untouchable and pack.live_share < repack_below)
    free = [pack for pack in packs if not pack.untouchable]
    dead = tuple(pack for pack in free if pack.live_bytes == 0)
    wasteful = sorted((pack for pack in free if 0 < pack.live_share < repack_below), key=lambda pack: pack.live_share)
    rewritten, left, copied_bytes = [], [], 0
    for pack in wasteful:
        if copied_bytes + pack.live_bytes <= copied_bytes_max:
            copied_bytes += pack.live_bytes
            rewritten.append(pack)
        else:
            left.append(pack)
    return PackPlan(dead, tuple(rewritten), tuple(left), untouchable)
