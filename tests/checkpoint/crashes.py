"""A small history, the operations that change it, and what must hold of whatever a crash of one of them leaves."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from castore.api import Repository
from castore.backend import MemoryBackend
from castore.backend.base import Backend
from castore.refs import list_branches, list_tags
from tests.checkpoint.repositories import copied, create_on, files_of, open_on
from tests.checkpoint.states import State, assert_same, training_state

NEW = training_state(7)
"""The state of the save that crashes: some of its chunks are there already, most are not."""
NEXT = training_state(8)


@dataclass(frozen=True)
class History:
    """A repository at rest."""

    backend: MemoryBackend
    files: Collection[bytes]
    refs: Mapping[str, str]
    states: Mapping[str, State]
    """Every committed snapshot with what was saved."""


def make_history() -> History:
    """main ── a ── b, fork: a ── c, tag `kept` at a, and an orphan."""
    backend = MemoryBackend()
    repo = create_on(backend)
    saved = {}
    for seed, branch, parent in ((1, "main", None), (2, "main", None), (3, "fork", "main~1"), (4, "lost", "main")):
        snapshot = repo.save(training_state(seed), branch=branch, step=seed, parent=parent)
        saved[snapshot.id] = training_state(seed)
    repo.delete_branch("lost")
    repo.tag("kept", at="main~1")
    return History(backend, frozenset(files_of(backend).values()), refs_of(backend), saved)


def refs_of(backend: Backend) -> dict[str, str]:
    """Every ref with its snapshot."""
    branches = {f"heads/{ref.name}": ref.snapshot_id for ref in list_branches(backend)}
    return branches | {f"tags/{ref.name}": ref.snapshot_id for ref in list_tags(backend)}


@dataclass(frozen=True)
class Operation:
    """Something that adds or removes a root."""

    run: Callable[[Repository], object]
    goals: Mapping[str, str | None]
    """What becomes of each ref it changes: a ref of before, None (deleted), or "new" (the snapshot that it makes)."""
    state: State | None = None
    """What it saves."""


OPERATIONS = {
    "save": Operation(
        lambda repo: repo.save(NEW, step=9, tags=("fresh",)), {"heads/main": "new", "tags/fresh": "new"}, NEW
    ),
    "save of what is there": Operation(
        lambda repo: repo.save(training_state(2)), {"heads/main": "new"}, training_state(2)
    ),
    "save to a new branch": Operation(
        lambda repo: repo.save(NEW, branch="young", parent="kept"), {"heads/young": "new"}, NEW
    ),
    "make a branch": Operation(lambda repo: repo.branch("young", at="main~1"), {"heads/young": "tags/kept"}),
    "move a branch": Operation(lambda repo: repo.branch("fork", at="main", move=True), {"heads/fork": "heads/main"}),
    "make a tag": Operation(lambda repo: repo.tag("fresh", at="fork"), {"tags/fresh": "heads/fork"}),
    "delete a branch": Operation(lambda repo: repo.delete_branch("fork"), {"heads/fork": None}),
    "delete a tag": Operation(lambda repo: repo.delete_tag("kept"), {"tags/kept": None}),
}


class Seen:
    """Leftovers that were checked already: most calls of an operation leave what the call before left.

    Two are the same when every file has the same name (ids aside) and length, holds as much that is not torn, and is or
    is not one of those that were there before the operation.
    """

    def __init__(self) -> None:
        self._shapes: set[frozenset[tuple[object, ...]]] = set()

    def add(self, files: Mapping[str, bytes], *, before: Collection[bytes]) -> bool:
        """Whether these files look like none before."""
        shape = frozenset(
            (_ID.sub("*", name), len(data), len(data.rstrip(b"\0")), data in before) for name, data in files.items()
        )
        known = shape in self._shapes
        self._shapes.add(shape)
        return not known


_ID = re.compile(r"[0-9a-f]{2}/[0-9a-f]{32}|[0-9a-f]{16,}")


def check_usable(left: Backend, history: History, operation: Operation) -> bool:
    """Everything that must hold after the operation died at any moment; returns whether it took effect."""
    repo = open_on(left)
    fresh = {snapshot.id for snapshot in repo.snapshots()} - history.states.keys()
    assert len(fresh) <= (operation.state is not None)
    effects = _effects(refs_of(left), history, operation, fresh)
    for snapshot_id, state in history.states.items():
        assert_same(repo.load(snapshot_id), state)
    for snapshot_id in fresh:
        assert_same(repo.load(snapshot_id), operation.state)
    report = repo.verify(data=True)
    assert report.ok, report.problems
    return all(effects.values())


def _effects(refs: Mapping[str, str], history: History, operation: Operation, fresh: set[str]) -> dict[str, bool]:
    """For every ref that the operation changes, whether it is where it goes; it may only be where it was instead."""
    others = {name: found for name, found in refs.items() if name not in operation.goals}
    assert others == {name: found for name, found in history.refs.items() if name not in operation.goals}
    effects = {}
    for name, goal in operation.goals.items():
        found, old = refs.get(name), history.refs.get(name)
        if goal == "new":
            effects[name] = found is not None and found in fresh
        else:
            effects[name] = found == (None if goal is None else history.refs[goal])
        assert effects[name] or found == old, f"{name}: found {found}, which is neither the old nor the new one"
    if effects.get("tags/fresh") and "heads/main" in effects:
        assert effects["heads/main"], "the tag of a save that is not committed"
    return effects


def check_next_save(repo: Repository) -> None:
    """The next save continues from the head, whatever became of the one before."""
    head = repo.snapshot("main").id
    snapshot = repo.save(NEXT, step=10)
    assert snapshot.parents == (head,)
    assert_same(repo.load("main"), NEXT)
    assert [found.id for found in repo.log("main")][:2] == [snapshot.id, head]
    assert repo.verify(data=True).ok


def restarted(history: History) -> MemoryBackend:
    """The history in a backend of its own."""
    return copied(history.backend)


def run(operation: Operation, backend: Any) -> Repository:
    """Carry out an operation through a fresh handle."""
    repo = open_on(backend)
    operation.run(repo)
    return repo
