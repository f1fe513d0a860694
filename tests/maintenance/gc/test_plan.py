"""The plan is a pure function of what is live in each pack."""

from __future__ import annotations

import pytest

from castore.ids import PackId
from castore.maintenance.gc.plan import PackState, plan_packs

FIXED_BYTES = 128
"""Header and trailer."""


def pack(number: int, *, live: int, dead: int, untouchable: str = "") -> PackState:
    return PackState(PackId(f"{number:032x}"), FIXED_BYTES + live + dead, live, int(dead > 0), untouchable)


def ids(packs: tuple[PackState, ...]) -> list[int]:
    return [int(state.pack_id, 16) for state in packs]


def test_packs_in_which_nothing_is_live_die_and_packs_in_which_little_is_are_rewritten() -> None:
    packs = [pack(1, live=0, dead=100), pack(2, live=10, dead=90), pack(3, live=70, dead=30), pack(4, live=100, dead=0)]
    plan = plan_packs(packs, repack_below=2 / 3, copied_bytes_max=10**9)
    assert (ids(plan.dead), ids(plan.rewritten), plan.left) == ([1], [2], ())
    assert ids(plan.going) == [1, 2]
    assert plan.copied_bytes == 10


def test_the_emptiest_are_rewritten_first_while_the_copies_fit() -> None:
    packs = [pack(1, live=50, dead=50), pack(2, live=10, dead=90), pack(3, live=30, dead=70)]
    plan = plan_packs(packs, repack_below=1, copied_bytes_max=45)
    assert (ids(plan.rewritten), ids(plan.left)) == ([2, 3], [1])


def test_without_space_dead_packs_still_go() -> None:
    plan = plan_packs([pack(1, live=0, dead=9), pack(2, live=1, dead=9)], repack_below=1, copied_bytes_max=0)
    assert (ids(plan.dead), plan.rewritten, ids(plan.left)) == ([1], (), [2])


def test_a_threshold_of_zero_rewrites_nothing() -> None:
    plan = plan_packs([pack(1, live=0, dead=9), pack(2, live=1, dead=99)], repack_below=0, copied_bytes_max=10**9)
    assert (ids(plan.dead), plan.rewritten, plan.left) == ([1], (), ())


def test_what_must_not_be_touched_is_told_and_left() -> None:
    packs = [pack(1, live=0, dead=9, untouchable="why"), pack(2, live=99, dead=1, untouchable="why")]
    plan = plan_packs(packs, repack_below=0.5, copied_bytes_max=10**9)
    assert (plan.going, ids(plan.untouchable)) == ((), [1])


@pytest.mark.parametrize("padding", [0, 4000])
def test_a_pack_whose_records_are_all_live_is_never_rewritten(padding: int) -> None:
    """Runs have padding of a page; a tiny pack is mostly header. Rewriting would bring it back as it was, for ever."""
    whole = PackState(PackId("0" * 32), FIXED_BYTES + 50 + padding, 50, dead_count=0)
    assert (whole.wasted_bytes, whole.live_share) == (0, 1.0)
    assert plan_packs([whole], repack_below=1, copied_bytes_max=10**9).going == ()
