"""Actors in threads of their own, of which exactly one runs at a time: who goes on is chosen before each protocol step.

    scheduler = Scheduler({"save": save, "gc": collect}, schedule)
    scheduler.run()

An actor announces each step with `scheduler.point(…)` and waits there until it is chosen. By default the actor that
ran goes on until it ends, or waits (`sleepers_yield`), then the next goes on; a schedule lists departures from that:

    Turn(17, "gc")             at choice 17, gc goes on in place of whoever ran
    Turn(30, "save", "kill")   at choice 30, save dies where it stands: nothing of its code runs any more

Whoever is left standing is suspended for as long as the others take; a wait moves the one clock on, so that leases
expire meanwhile. The same schedule gives the same run, so a failure is replayed from the schedule that it prints.

`explore` runs every schedule of at most so many turns; `wander` runs random ones with a seed.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal


class Killed(BaseException):
    """The actor's process ends here. No Exception: nothing that handles errors survives its own death."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One departure from the default order."""

    at: int
    actor: str
    action: Literal["run", "kill"] = "run"


Schedule = tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One choice of a run: who could have gone on, who did, and what it was about to do."""

    ready: tuple[str, ...]
    chosen: str
    label: str


Choose = Callable[[int, str, Sequence[str]], tuple[str, Literal["run", "kill"]]]
"""Given the number of the choice, who goes on by default, and who is ready: who goes on, or dies."""


class Actor:
    """One of the concurrent programs."""

    def __init__(self, name: str, program: Callable[[], object]) -> None:
        self.name = name
        self.program = program
        self.label = "begin"
        self.killed = False
        self.ended = False
        self.error: BaseException | None = None
        self.go = threading.Semaphore(0)


class Clock:
    """The one time of all actors. Only waiting moves it on."""

    def __init__(self, now_ns: int = 10**18) -> None:
        self.now_ns = now_ns

    def time_ns(self) -> int:
        self.now_ns += 1000  # no two looks are the same
        return self.now_ns

    def monotonic(self) -> float:
        return self.now_ns / 1e9

    def sleep(self, seconds: float) -> None:
        self.now_ns += int(seconds * 1e9)


class Scheduler:
    """One run. `point` is called by the actors, everything else by the test."""

    def __init__(
        self,
        programs: Mapping[str, Callable[[], object]],
        choose: Choose,
        *,
        on_end: Callable[[str], None] = lambda name: None,
        sleepers_yield: bool = True,
        steps_max: int = 20_000,
    ) -> None:
        self.actors = {name: Actor(name, program) for name, program in programs.items()}
        self.steps: list[Step] = []
        self.turns: list[Turn] = []
        self._choose = choose
        self._on_end = on_end
        self._sleepers_yield = sleepers_yield
        self._steps_max = steps_max
        self._back = threading.Semaphore(0)

    def run(self) -> None:
        """Until every actor has ended."""
        threads = [
            threading.Thread(target=self._live, args=(actor,), name=f"actor-{actor.name}")
            for actor in self.actors.values()
        ]
        for thread in threads:
            thread.start()
        current = None
        while ready := [name for name, actor in self.actors.items() if not actor.ended]:
            assert len(self.steps) < self._steps_max, f"no end: the last steps are {self.steps[-12:]}"
            default = self._default(current, ready)
            name, action = self._choose(len(self.steps), default, ready)
            actor = self.actors[name]
            if action == "kill" or name != default:
                self.turns.append(Turn(len(self.steps), name, "kill" if action == "kill" else "run"))
            actor.killed = actor.killed or action == "kill"
            self.steps.append(Step(tuple(ready), name, actor.label))
            actor.go.release()
            self._back.acquire()
            current: str | None = name
            if actor.ended:
                self._on_end(name)
        for thread in threads:
            thread.join()

    def _default(self, current: str | None, ready: Sequence[str]) -> str:
        """Who goes on if nobody chooses."""
        if current not in ready:
            return ready[0]
        assert current is not None
        if self._sleepers_yield and self.actors[current].label.startswith("sleep"):
            return ready[(ready.index(current) + 1) % len(ready)]
        return current

    def point(self, name: str, label: str) -> None:
        """Called by the actor before each step: wait to be chosen."""
        actor = self.actors[name]
        if actor.killed:
            raise Killed(f"{name} is dead already")
        actor.label = label
        self._back.release()
        actor.go.acquire()
        if actor.killed:
            raise Killed(f"{name} dies before {label}")

    def _live(self, actor: Actor) -> None:
        actor.go.acquire()
        try:
            if not actor.killed:
                actor.program()
        except BaseException as error:  # noqa: BLE001  looked at by the test
            actor.error = error
        finally:
            actor.ended = True
            self._back.release()


# ---- search ----------------------------------------------------------------------------------------------------------

Run = Callable[[Choose], Scheduler]
"""Carries out one run with that way to choose, checks it, and returns its scheduler."""


def following(schedule: Schedule) -> Choose:
    """Choose as the schedule says, by default elsewhere."""
    turns = {turn.at: turn for turn in schedule}

    def choose(at: int, default: str, ready: Sequence[str]) -> tuple[str, Literal["run", "kill"]]:
        turn = turns.get(at)
        return (turn.actor, turn.action) if turn is not None and turn.actor in ready else (default, "run")

    return choose


def wandering(seed: int, *, turn_chance: float, kill_chance: float = 0.0) -> Choose:
    """Choose another actor now and then, and seldom let one die."""
    rng = random.Random(seed)

    def choose(at: int, default: str, ready: Sequence[str]) -> tuple[str, Literal["run", "kill"]]:
        del at
        name = rng.choice(ready) if rng.random() < turn_chance else default
        return name, "kill" if rng.random() < kill_chance else "run"

    return choose


def explore(run: Run, *, turns_max: int, kills_max: int = 0, runs_max: int | None = None, seed: int = 0) -> int:
    """Carry out every schedule of at most `turns_max` turns, of which at most `kills_max` are deaths.

    Each is a run that was seen, departed from at a later choice: so only choices that there are get tried, each once.
    Two turns with nothing between them that the other actor could notice or undo are one: the later stands for both,
    and a death stands for those after it up to the next step that changes anything. With `runs_max` a seeded sample.
    Returns the number of runs; the first that fails raises what its check raised, with the schedule in a note.
    """
    rng = random.Random(seed)
    pending: list[Schedule] = [()]
    runs = 0
    while pending and (runs_max is None or runs < runs_max):
        schedule = pending.pop(rng.randrange(len(pending)) if runs_max is not None else -1)
        scheduler = checked(run, schedule)
        runs += 1
        if len(schedule) < turns_max:
            kills = sum(turn.action == "kill" for turn in schedule)
            pending += reversed(list(_departures(schedule, scheduler.steps, may_kill=kills < kills_max)))
    return runs


def checked(run: Run, schedule: Schedule) -> Scheduler:
    """One run; what its check raises tells the schedule."""
    try:
        return run(following(schedule))
    except AssertionError as error:
        error.add_note(f"schedule: {schedule}")
        raise


def _departures(schedule: Schedule, steps: Sequence[Step], *, may_kill: bool) -> Iterator[Schedule]:
    first = schedule[-1].at + 1 if schedule else 0
    for at in range(first, len(steps)):
        step = steps[at]
        for name in step.ready:
            if name != step.chosen and any(
                conflict(step.label, other.label) for other in steps if other.chosen == name
            ):
                yield (*schedule, Turn(at, name))
        if may_kill and changes(step.label):
            yield (*schedule, Turn(at, step.chosen, "kill"))


_CHANGING = frozenset({"put_if_absent", "commit", "compare_and_swap", "delete", "claim", "release", "rename", "index"})
_LOOKING = frozenset({"list", "claims", "temporaries"})
_QUIET_INDEX = frozenset({"find", "packs"})


def changes(label: str) -> bool:
    """Whether a step leaves something behind."""
    operation, _, name = label.partition(" ")
    return operation in _CHANGING and not (operation == "index" and name in _QUIET_INDEX)


def conflict(one: str, other: str) -> bool:
    """Whether two steps may come to something else in the other order. Time that passes may matter to anything."""
    (operation, _, name), (other_operation, _, other_name) = one.partition(" "), other.partition(" ")
    if "sleep" in (operation, other_operation):
        return True
    if not changes(one) and not changes(other):
        return False
    if "index" in (operation, other_operation):
        return operation == other_operation
    if operation in _LOOKING:
        return other_name.startswith(name)
    if other_operation in _LOOKING:
        return name.startswith(other_name)
    return name == other_name


def wander(run: Run, *, seeds: Sequence[int], turn_chance: float, kill_chance: float = 0.0) -> int:
    """Carry out a random run for each seed; a failure names its seed. Returns the number of runs."""
    for seed in seeds:
        try:
            run(wandering(seed, turn_chance=turn_chance, kill_chance=kill_chance))
        except AssertionError as error:
            error.add_note(f"seed: {seed}, turn_chance={turn_chance}, kill_chance={kill_chance}")
            raise
    return len(seeds)
