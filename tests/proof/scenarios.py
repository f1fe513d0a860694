"""Who meets whom in the interleavings: each scenario is a past, and programs that run at once over it.

The past of all of them: main holds four saves, the first two of them forgotten, so that their packs are partly dead and
partly bases of the others, which gc stores anew; `lost` is a snapshot that no ref reaches any more, beyond its grace:
it may go at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from castore.api import Repository
from castore.backend import MemoryBackend
from castore.errors import LeaseError, NotFoundError, RefError, SnapshotGoneError, UnknownRefError
from tests.checkpoint.repositories import create_on
from tests.checkpoint.states import assert_same
from tests.proof.operations import forget, undelete
from tests.proof.scheduler import Choose, Killed, Scheduler
from tests.proof.world import GRACE_S, History, World, new_history, quiet_world, run_in

LOST_STEP = 50
FORGOTTEN_STEP, SECOND_STEP = 1, 2
COLLECTORS = frozenset({"gc", "other gc"})
"""Actors that do nothing but collect."""
_ANSWERS = (type(None), Killed, SnapshotGoneError, UnknownRefError, LeaseError)
"""What an operation may come to: done, dead, told that its snapshot is gone, told that another collector is at work."""


@dataclass(frozen=True)
class Past:
    """Where every run begins."""

    history: History
    lost: str
    """The orphan."""
    forgotten: str
    main: tuple[str, ...]
    """Snapshots of main, oldest first, without the forgotten ones."""
    elsewhere: Repository
    """Another repository, which has the orphan on a branch. Nothing happens to it."""


@cache
def past() -> Past:
    """Made once: every run gets a copy."""
    history = new_history()
    with quiet_world(history) as (world, repo):
        first = world.save(repo, FORGOTTEN_STEP)
        second = world.save(repo, SECOND_STEP)
        third = world.save(repo, 3)
        fourth = world.save(repo, 4)
        lost = world.save(repo, LOST_STEP, branch="lost", parent="main")
        elsewhere = create_on(MemoryBackend("elsewhere:"))
        repo.push(elsewhere, ["lost"])
        repo.delete_branch("lost")
        world.owed -= {lost, first, second}
        forget(repo, [first, second])
        world.clock.sleep(2 * GRACE_S)
    return Past(history, lost, first, (third, fourth), elsewhere)


Program = Callable[[], object]
Programs = Callable[[World, Past], Mapping[str, Program]]


@dataclass(frozen=True)
class Scenario:
    """Programs that run at once."""

    name: str
    programs: Programs
    far: frozenset[str] = frozenset()
    """Actors on another host: the others see no lock of theirs, so they count as dead after a lease length."""

    def run(self, choose: Choose) -> Scheduler:
        """One run, and what must hold after it."""
        found = past()
        world = World(found.history, far=self.far)
        scheduler = run_in(world, self.programs(world, found), choose)
        self._check_end(world, scheduler)
        return scheduler

    def _check_end(self, world: World, scheduler: Scheduler) -> None:
        for name, actor in scheduler.actors.items():
            # Where a collector was taken for dead, two may be at work, and clear away under each other's hands.
            answers = (*_ANSWERS, NotFoundError) if "gc" in self.far else _ANSWERS
            assert isinstance(actor.error, answers), f"{name} failed: {type(actor.error).__name__}: {actor.error}"
        killed = {name for name, actor in scheduler.actors.items() if isinstance(actor.error, Killed)}
        # Who was taken for dead, and then died in the moment between its ref and its check, has reported nothing.
        # A collector reports nothing at any time: its death excuses nobody.
        excused = bool((killed & self.far) - COLLECTORS)
        world.check(refs=not excused)
        if not excused:
            world.check_collected()


def saver(world: World, name: str, step: int, **options: Any) -> Program:
    """Save as a process of its own."""
    repo = world.open(name)
    return lambda: world.save(repo, step, **options)


def collector(world: World, name: str) -> Program:
    """Collect once."""
    repo = world.open(name)
    return lambda: world.collect(repo)


def reader(world: World, name: str, refs: tuple[str, ...]) -> Program:
    """Load: what is owed comes back right, what is not may be gone."""
    repo = world.open(name)

    def program() -> None:
        for ref in refs:
            load(world, repo, ref)

    return program


def load(world: World, repo: Repository, ref: str) -> None:
    """One load of a ref or id."""
    try:
        snapshot = repo.snapshot(ref)
        state = repo.load(ref)
    except (SnapshotGoneError, RefError) as error:
        assert ref not in world.owed, f"a reader is told that {ref} is gone: {error}"
        assert ref != "main", f"a reader is told that main is gone: {error}"
        return
    if snapshot.id in world.states:
        assert_same(state, world.states[snapshot.id])


# ---- programs --------------------------------------------------------------------------------------------------------


def _save_beside_gc(world: World, found: Past) -> Mapping[str, Program]:
    """The content of what is going: every chunk of it is there when the saver looks."""
    return {"saver": saver(world, "saver", 60, like=LOST_STEP, branch="again"), "gc": collector(world, "gc")}


def _save_in_the_background(world: World, found: Past) -> Mapping[str, Program]:
    program = saver(world, "saver", 65, like=LOST_STEP, branch="again", in_background=True)
    return {"saver": program, "gc": collector(world, "gc")}


def _save_on_the_lost(world: World, found: Past) -> Mapping[str, Program]:
    """Differences from chunks that are going."""
    return {"saver": saver(world, "saver", 61, branch="on", parent=found.lost), "gc": collector(world, "gc")}


def _save_the_forgotten_again(world: World, found: Past) -> Mapping[str, Program]:
    return {"saver": saver(world, "saver", 62, like=FORGOTTEN_STEP), "gc": collector(world, "gc")}


def _branch_beside_gc(world: World, found: Past) -> Mapping[str, Program]:
    repo = world.open("brancher")

    def program() -> None:
        repo.branch("kept", at=found.lost)
        world.owed.add(found.lost)

    return {"brancher": program, "gc": collector(world, "gc")}


def _tag_beside_gc(world: World, found: Past) -> Mapping[str, Program]:
    repo = world.open("tagger")

    def program() -> None:
        repo.tag("kept", at=found.lost)
        world.owed.add(found.lost)

    return {"tagger": program, "gc": collector(world, "gc")}


def _two_collectors(world: World, found: Past) -> Mapping[str, Program]:
    return {
        "gc": collector(world, "gc"),
        "saver": saver(world, "saver", 63, like=LOST_STEP, branch="again"),
        "other gc": collector(world, "other gc"),
    }


def _save_beside_a_sleeping_collector(world: World, found: Past) -> Mapping[str, Program]:
    return {"gc": collector(world, "gc"), "saver": saver(world, "saver", 69, like=LOST_STEP, branch="again")}


def _forget_beside_gc(world: World, found: Past) -> Mapping[str, Program]:
    repo = world.open("forgetter")

    def program() -> None:
        world.owed.discard(found.main[0])
        forget(repo, [found.main[0]])

    return {
        "forgetter": program,
        "gc": collector(world, "gc"),
        "saver": saver(world, "saver", 64, like=3, branch="again"),
    }


def _read_beside_gc(world: World, found: Past) -> Mapping[str, Program]:
    return {
        "reader": reader(world, "reader", ("main", found.main[0], found.lost)),
        "gc": collector(world, "gc"),
    }


def _verify_beside_gc(world: World, found: Past) -> Mapping[str, Program]:
    repo = world.open("verifier")

    def program() -> None:
        report = repo.verify(data=True)
        assert report.ok, f"nothing is damaged, and verify says: {report.problems}"

    return {"verifier": program, "gc": collector(world, "gc")}


def _undelete_beside_gc(world: World, found: Past) -> Mapping[str, Program]:
    repo = world.open("undeleter")

    def program() -> None:
        undelete(repo, [found.forgotten])
        world.owed.add(found.forgotten)

    return {"undeleter": program, "gc": collector(world, "gc")}


def _push_beside_gc(world: World, found: Past) -> Mapping[str, Program]:
    """What is going here comes back from a repository that has it."""
    here = world.open("pusher")

    def program() -> None:
        found.elsewhere.push(here, ["lost:again"])
        world.owed.add(found.lost)

    return {"pusher": program, "gc": collector(world, "gc")}


def _save_twice(world: World, found: Past) -> Mapping[str, Program]:
    """A process that knows all packs before the collection, and goes on saving after it."""
    repo = world.open("saver")

    def program() -> None:
        world.save(repo, 66, branch="again")
        world.save(repo, 67, like=LOST_STEP, branch="again")

    return {"saver": program, "gc": collector(world, "gc")}


def _collect_and_save(world: World, found: Past) -> Mapping[str, Program]:
    """A process that collects, and then trains on, beside another collector."""
    repo = world.open("other")

    def program() -> None:
        world.collect(repo)
        world.save(repo, 68, like=LOST_STEP, branch="again")

    return {"gc": collector(world, "gc"), "other": program}


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("save of what is going", _save_beside_gc),
        Scenario("background save of what is going", _save_in_the_background),
        Scenario("differences from what is going", _save_on_the_lost),
        Scenario("save of what was forgotten", _save_the_forgotten_again),
        Scenario("branch at what is going", _branch_beside_gc),
        Scenario("tag at what is going", _tag_beside_gc),
        Scenario("two collectors", _two_collectors),
        Scenario("forget", _forget_beside_gc),
        Scenario("readers", _read_beside_gc),
        Scenario("verify", _verify_beside_gc),
        Scenario("undelete of what is going", _undelete_beside_gc),
        Scenario("push of what is going", _push_beside_gc),
        Scenario("far: save of what is going", _save_beside_gc, frozenset({"saver"})),
        Scenario("far: differences from what is going", _save_on_the_lost, frozenset({"saver"})),
        Scenario("far: branch at what is going", _branch_beside_gc, frozenset({"brancher"})),
        Scenario("far: undelete of what is going", _undelete_beside_gc, frozenset({"undeleter"})),
        Scenario("far: push of what is going", _push_beside_gc, frozenset({"pusher"})),
        Scenario("far: two saves", _save_twice, frozenset({"saver"})),
        Scenario("far: collect and save", _collect_and_save, frozenset({"gc"})),
        Scenario("far: a collector that sleeps", _save_beside_a_sleeping_collector, frozenset({"gc"})),
        Scenario("far: two collectors", _two_collectors, frozenset({"saver", "gc"})),
    )
}
