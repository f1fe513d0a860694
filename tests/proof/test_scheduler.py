"""The scheduler itself: one at a time, every order, the same again from its schedule."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from tests.proof.scheduler import Choose, Killed, Scheduler, Turn, checked, explore, following, wandering

Check = Callable[[list[str], Scheduler], None]


def steps_of(order: list[str], choose: Choose, *, steps: int = 2) -> Scheduler:
    """Two actors that note each step."""

    def program(name: str) -> Callable[[], None]:
        def run() -> None:
            for number in range(steps):
                scheduler.point(name, "claim a file")
                order.append(f"{name}{number}")

        return run

    scheduler = Scheduler({name: program(name) for name in "ab"}, choose)
    scheduler.run()
    return scheduler


def test_by_default_one_runs_after_the_other() -> None:
    order: list[str] = []
    steps_of(order, following(()))
    assert order == ["a0", "a1", "b0", "b1"]


def test_every_order_is_explored_once_turns_are_enough() -> None:
    seen: list[tuple[str, ...]] = []

    def run(choose: Choose) -> Scheduler:
        order: list[str] = []
        scheduler = steps_of(order, choose)
        seen.append(tuple(order))
        return scheduler

    explore(run, turns_max=6)
    orders = {
        order for order in itertools.permutations(["a0", "a1", "b0", "b1"])
        if order.index("a0") < order.index("a1") and order.index("b0") < order.index("b1")
    }  # fmt: skip
    assert set(seen) == orders


def test_a_bound_on_turns_bounds_the_runs_and_a_sample_is_the_same_each_time() -> None:
    def explored(**bounds: int) -> list[tuple[str, ...]]:
        seen: list[tuple[str, ...]] = []

        def run(choose: Choose) -> Scheduler:
            order: list[str] = []
            scheduler = steps_of(order, choose, steps=4)
            seen.append(tuple(order))
            return scheduler

        explore(run, **bounds)
        return seen

    assert len(explored(turns_max=0)) == 1
    assert len(explored(turns_max=1)) < len(explored(turns_max=2))
    assert len(explored(turns_max=3, runs_max=20)) == 20
    assert explored(turns_max=3, runs_max=20, seed=1) == explored(turns_max=3, runs_max=20, seed=1)


def test_who_is_killed_does_nothing_more_and_the_others_go_on() -> None:
    order: list[str] = []
    scheduler = steps_of(order, following((Turn(2, "a", "kill"),)))
    assert order == ["a0", "b0", "b1"]
    assert isinstance(scheduler.actors["a"].error, Killed)


@pytest.mark.parametrize("seed", range(5))
def test_a_random_run_is_replayed_from_the_turns_that_it_took(seed: int) -> None:
    first: list[str] = []
    scheduler = steps_of(first, wandering(seed, turn_chance=0.5, kill_chance=0.1), steps=10)
    again: list[str] = []
    steps_of(again, following(tuple(scheduler.turns)), steps=10)
    assert again == first


def test_a_failure_tells_the_schedule_that_replays_it() -> None:
    def run(choose: Choose) -> Scheduler:
        order: list[str] = []
        scheduler = steps_of(order, choose)
        assert order != ["a0", "b0", "a1", "b1"]
        return scheduler

    with pytest.raises(AssertionError) as caught:
        explore(run, turns_max=4)
    (note,) = caught.value.__notes__
    schedule = eval(note.removeprefix("schedule: "))
    with pytest.raises(AssertionError):
        checked(run, schedule)
