"""A repository in memory, shared by scheduled actors, each with a handle of its own as another process would have it.

An actor stands still before every call of the backend by which actors can notice each other, and before every call of
the index of its host. Hosts: a claim looks held only to those on the host of its process; the others see its file and
whatever it says. A dead actor's claims are held by nobody, and its files stay.

What is true of the world is asked of a fresh handle with an empty index, never of an actor's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np

from castore.api import Repository
from castore.backend import MemoryBackend
from castore.backend.base import ClaimInfo
from castore.errors import CastoreError
from castore.format.config import decode_config
from castore.format.layout import CONFIG
from castore.hashing import hasher_for
from castore.index import MemoryIndex
from castore.maintenance.gc.report import GcReport
from castore.options import RepositoryOptions
from castore.repository import Handle
from castore.store import ChunkStore
from tests.checkpoint.crashes import refs_of
from tests.checkpoint.repositories import create_on
from tests.checkpoint.states import State, assert_same
from tests.proof.one_thread import one_thread
from tests.proof.operations import collect
from tests.proof.scheduler import Choose, Clock, Killed, Scheduler

LEASE_S = 10.0
GRACE_S = 1000.0
HOST = "here"

_UNNOTICED = frozenset({"stat", "read_range", "read_into", "write", "flush_hint", "create_stream", "abort", "close"})
"""Calls that no other actor can notice, and whose answer no other actor changes while the file is open."""


def small_state(step: int, *, like: int | None = None) -> State:
    """A state of a few chunks: some shared by all steps, some of this step alone, some a little different each time.

    `like` gives the content of another step. Steps below 50 drift from one start, those from 50 on from another.
    """
    seed = step if like is None else like
    generator = np.random.default_rng(seed)
    drifting = np.random.default_rng(1 + seed // 50).standard_normal(400).astype(np.float32)
    return {
        "shared": np.random.default_rng(0).integers(0, 256, 600, np.uint8),
        "own": generator.integers(0, 256, 700, np.uint8),
        "drifting": drifting * (1 + 3e-3 * generator.standard_normal(400)).astype(np.float32),
    }


@dataclass
class History:
    """Where every run of a scenario begins."""

    backend: MemoryBackend
    states: dict[str, State] = field(default_factory=dict)
    """By snapshot."""
    owed: set[str] = field(default_factory=set)
    """Snapshots that were reported and not forgotten."""
    now_ns: int = 10**18


class World:
    """One run's repository and what was reported in it."""

    def __init__(self, history: History, *, far: Collection[str] = ()) -> None:
        """`far` actors are each on a host of their own."""
        self.clock = Clock(history.now_ns)
        self.backend = _copied(history.backend, self.clock)
        self.states = dict(history.states)
        self.owed = set(history.owed)
        self.by_step: dict[int | None, State] = {}
        """States being saved, by their step, which no other snapshot has: a save that dies does not tell its id."""
        self.scheduler: Scheduler | None = None
        self.answers: dict[str, object] = {}
        self._indexes: dict[str, MemoryIndex] = {}
        self._owner: dict[str, str] = {}
        """Claim file → its actor."""
        self._far = far
        self._hosts: dict[str, str] = {}

    def open(self, actor: str) -> Repository:
        """A handle of an actor. Actors of one host share an index."""
        host = self._hosts[actor] = f"host of {actor}" if actor in self._far else HOST
        backend = ActorBackend(self, actor)
        config = decode_config(self.backend.read(CONFIG, max_bytes=1 << 20), where=CONFIG)
        handle = Handle(backend, config, clock=self.clock.time_ns)  # type: ignore[arg-type]
        shared = self._indexes.setdefault(host, MemoryIndex())
        handle._store = ChunkStore(backend, ActorIndex(self, actor, shared), hasher_for(config.options.hash))  # type: ignore[arg-type]
        return Repository(backend.location, handle)

    @property
    def has_far_actors(self) -> bool:
        return bool(self._far)

    def host_of_this_thread(self) -> str:
        """The host that the running actor is on."""
        return self._hosts.get(threading.current_thread().name.removeprefix("actor-"), HOST)

    def sleep(self, seconds: float) -> None:
        """The running actor waits: others may go on first, and time has gone on in any case."""
        name = threading.current_thread().name
        if name.startswith("actor-"):
            self.point(name.removeprefix("actor-"), f"sleep {seconds:.3g} s")
        self.clock.sleep(seconds)

    def point(self, actor: str, label: str) -> None:
        """A protocol step of an actor."""
        if self.scheduler is not None:
            self.scheduler.point(actor, label)

    def is_dead(self, actor: str) -> bool:
        return self.scheduler is not None and self.scheduler.actors[actor].killed

    # ---- what was reported ---------------------------------------------------------------------------------

    def save(
        self, repo: Repository, step: int, *, like: int | None = None, in_background: bool = False, **options: Any
    ) -> str:
        """Save, and owe it from the moment it is reported."""
        state = small_state(step, like=like)
        self.by_step[step] = state
        if in_background:
            snapshot = repo.save_async(state, step=step, **options).result()
        else:
            snapshot = repo.save(state, step=step, **options)
        self.states[snapshot.id] = state
        self.owed.add(snapshot.id)
        return snapshot.id

    def collect(self, repo: Repository) -> GcReport:
        """Collect garbage by the one clock."""
        return collect(repo, monotonic_s=self.clock.monotonic, sleep=self.sleep)

    def check(self, *, refs: bool) -> None:
        """Everything that was reported is whole; with `refs`, what refs name too: nobody may be about to check it."""
        repo = self._fresh()
        targets = refs_of(self.backend) if refs else {}
        for snapshot_id in sorted(self.owed | set(targets.values())):
            names = [name for name, target in targets.items() if target == snapshot_id]
            known = self.states.get(snapshot_id)
            try:
                state = repo.load(snapshot_id)
                assert_same(state, known if known is not None else self.by_step[repo.snapshot(snapshot_id).step])
            except CastoreError as error:
                reported = "reported durable" if snapshot_id in self.owed else "committed"
                raise AssertionError(f"LOST: snapshot {snapshot_id} ({reported}, {names}): {error}") from error

    def check_collected(self) -> None:
        """Whoever collects later harms nothing, and finds a repository that verifies."""
        repo = self._fresh()
        self.backend._held.clear()  # every process has ended
        self.clock.sleep(2 * GRACE_S)
        try:
            self.collect(repo)
        except CastoreError as error:
            raise AssertionError(f"LOST: no collection is possible any more: {error}") from error
        self.check(refs=True)
        report = repo.verify(data=True)
        assert report.ok, f"LOST: {report.problems}"

    def _fresh(self) -> Repository:
        config = decode_config(self.backend.read(CONFIG, max_bytes=1 << 20), where=CONFIG)
        return Repository("memory:", Handle(self.backend, config, clock=self.clock.time_ns))

    # ---- claims --------------------------------------------------------------------------------------------

    def claimed(self, actor: str, name: str) -> None:
        self._owner[name] = actor

    def claims(self, actor: str, prefix: str) -> list[ClaimInfo]:
        """The claims as the actor sees them."""
        found = []
        for claim in self.backend.claims(prefix):
            owner = self._owner.get(claim.name)
            alive = owner is not None and not self.is_dead(owner) and self._hosts[owner] == self._hosts[actor]
            found.append(ClaimInfo(claim.name, claim.data, held=claim.held and alive))
        return found


class ActorBackend:
    """See castore.backend.base.Backend; stands still before each call."""

    def __init__(self, world: World, actor: str) -> None:
        self._world = world
        self._actor = actor
        self.location = "memory:"

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(self._world.backend, attribute)
        if not callable(value) or attribute in ("local_path", "free_bytes"):
            return value

        def call(*args: Any, **options: Any) -> Any:
            name = str(args[0]) if args else ""
            self._step(attribute, name)
            if attribute == "claims":
                return self._world.claims(self._actor, *args, **options)
            result = value(*args, **options)
            if attribute == "claim":
                self._world.claimed(self._actor, name)
                return _ActorHandle(self, result, name)
            if attribute in ("create_stream", "open_reader"):
                return _ActorHandle(self, result, name)
            return list(result) if attribute in ("list", "temporaries") else result

        return call

    def _step(self, operation: str, name: str) -> None:
        if operation not in _UNNOTICED:
            self._world.point(self._actor, f"{operation} {name}")
        elif self._world.is_dead(self._actor):
            raise Killed(self._actor)


class _ActorHandle:
    """A sink, reader or claim of an actor."""

    def __init__(self, backend: ActorBackend, inner: Any, name: str) -> None:
        self._backend = backend
        self._inner = inner
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(self._inner, attribute)
        if not callable(value):
            return value

        def call(*args: Any, **options: Any) -> Any:
            self._backend._step("read_range" if attribute == "read" else attribute, self._name)
            return value(*args, **options)

        return call


class ActorIndex:
    """See castore.index.base.Index: the one of a host, which the actor's process has open."""

    def __init__(self, world: World, actor: str, inner: MemoryIndex) -> None:
        self._world = world
        self._actor = actor
        self._inner = inner

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(self._inner, attribute)

        def call(*args: Any) -> Any:
            if attribute != "close":
                self._world.point(self._actor, f"index {attribute}")
            return value(*args)

        return call


# ---- before a run ----------------------------------------------------------------------------------------------------


def new_history(*, lease_s: float = LEASE_S, grace_s: float = GRACE_S) -> History:
    """An empty repository."""
    clock = Clock()
    backend = MemoryBackend(now_ns=clock.time_ns)
    create_on(backend, RepositoryOptions(lease_s=lease_s, orphan_grace_s=grace_s))
    return History(backend)


@contextmanager
def quiet_world(history: History) -> Iterator[tuple[World, Repository]]:
    """Write to the history without any scheduling; time has gone on when the block ends."""
    world = World(history)
    world.backend = history.backend
    with installed(world):
        yield world, world.open("before")
    history.states, history.owed = world.states, world.owed
    history.now_ns = world.clock.now_ns


@contextmanager
def installed(world: World) -> Iterator[None]:
    """The product runs in this world: one thread an actor, its host, and the one clock."""
    with (
        one_thread(),
        mock.patch("castore.leases.socket.gethostname", world.host_of_this_thread),
        mock.patch("castore.leases.boot_id", world.host_of_this_thread),
    ):
        yield


def run_in(world: World, programs: Mapping[str, Callable[[], object]], choose: Choose) -> Scheduler:
    """Run the actors to their end; the world is checked whenever one ends. Foreign errors are raised."""
    with installed(world):
        scheduler = Scheduler(
            programs,
            choose,
            on_end=lambda _: world.check(refs=False),
            sleepers_yield=not world.has_far_actors,  # else who waits for the far should see their leases expire
        )
        world.scheduler = scheduler
        try:
            scheduler.run()
        finally:
            world.scheduler = None
        for actor in scheduler.actors.values():
            if actor.error is not None and not isinstance(actor.error, Killed | CastoreError):
                raise actor.error
    return scheduler


def _copied(backend: MemoryBackend, clock: Clock) -> MemoryBackend:
    copy = MemoryBackend(now_ns=clock.time_ns)
    copy._files.update(backend._files)
    return copy
