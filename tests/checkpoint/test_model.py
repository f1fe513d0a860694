"""A repository with two handles against a model of dicts, in any order of operations that hypothesis can think of."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import castore
from castore.api import Repository
from castore.errors import ConflictError, PathNotFoundError, RefExistsError, StateMismatchError, UnknownRefError
from tests.checkpoint.states import State, assert_same

BRANCHES = st.sampled_from(["main", "fork", "Fork", "a/b"])
TAGS = st.sampled_from(["v1", "v2", "main", "a/b"])
HANDLES = st.integers(0, 1)
PARTS = st.sampled_from(["model", "*/weight", "list/**", "1", "~s:1"])
UNSEEN = "unseen"

_BASE = np.random.default_rng(0).standard_normal((60, 50)).astype(np.float32)
_LONG = np.random.default_rng(1).integers(0, 256, (1 << 20) + 500, np.uint8)


def array(drift: int) -> np.ndarray:
    """Dense training: every element moves a little."""
    return _BASE * np.float32(1 + drift / 1e5)


STATES = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries(
            {"weight": st.integers(0, 5).map(array)}, optional={"bias": st.integers(0, 3).map(np.arange)}
        ),
        "step": st.integers(-3, 10**20),
    },
    optional={
        "long": st.sampled_from([0, 500, 1 << 20]).map(lambda start: _LONG[start:]),
        "text": st.text(max_size=5).map(lambda text: text * 100),
        "list": st.lists(st.sampled_from([None, True, 1.5, "x", b"y", ()]), max_size=4),
        "empty": st.sampled_from([{}, {"deeper": {}}]),
        1: st.just("an int key"),
        "1": st.just("a str key"),
    },
)


@dataclass
class Saved:
    """What the model knows of a snapshot."""

    state: State
    parents: tuple[str, ...]
    step: int | None


@dataclass
class Model:
    snapshots: dict[str, Saved] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    seen: tuple[dict[str, str | None], dict[str, str | None]] = field(default_factory=lambda: ({}, {}))
    """Per handle: the head of each branch that it last saved, loaded or found; None: no such branch."""

    def history(self, snapshot_id: str) -> list[str]:
        found = [snapshot_id]
        while parents := self.snapshots[found[-1]].parents:
            found.append(parents[0])
        return found

    def orphans(self) -> set[str]:
        reached = {each for ref in (*self.branches.values(), *self.tags.values()) for each in self.history(ref)}
        return self.snapshots.keys() - reached


def when_saved(function: Any) -> Any:
    """The rule needs a snapshot."""
    return precondition(lambda self: bool(self.model.snapshots))(function)


class RepositoryMachine(RuleBasedStateMachine):
    """Every rule does the same to both and compares; invariants look at all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.path = self.directory / "store"
        self.model = Model()
        self.handles: list[Repository] = []

    @initialize(compression=st.sampled_from(["auto", "lz4", "none"]))
    def create(self, compression: Any) -> None:
        castore.init(self.path, compression=compression).close()
        self.handles = [castore.open(self.path), castore.open(self.path)]
        self._save(0, "main", {"model": {"weight": array(0)}, "step": 0}, 0, parent=None)

    def teardown(self) -> None:
        for handle in self.handles:
            handle.close()
        shutil.rmtree(self.directory)

    # ---- saving --------------------------------------------------------------------------------------------------

    @rule(which=HANDLES, branch=BRANCHES, state=STATES, step=st.none() | st.integers(0, 3))
    def save(self, which: int, branch: str, state: State, step: int | None) -> None:
        self._save(which, branch, state, step, parent=None)

    @when_saved
    @rule(which=HANDLES, branch=BRANCHES, state=STATES, data=st.data())
    def save_with_parent(self, which: int, branch: str, state: State, data: st.DataObject) -> None:
        self._save(which, branch, state, None, parent=data.draw(self._refs()))

    @when_saved
    @rule(which=HANDLES, data=st.data())
    def save_again_what_is_there(self, which: int, data: st.DataObject) -> None:
        known = self.model.snapshots[data.draw(st.sampled_from(list(self.model.snapshots)))]
        snapshot = self._save(which, "main", known.state, None, parent=None)
        if snapshot is not None:
            assert snapshot.new_bytes == 0

    def _save(
        self, which: int, branch: str, state: State, step: int | None, *, parent: str | None
    ) -> castore.Snapshot | None:
        model, handle = self.model, self.handles[which]
        head = model.branches.get(branch)
        seen = head if parent is not None else model.seen[which].get(branch, head)
        parents = (self._resolve(parent),) if parent is not None else (seen,) if seen is not None else ()
        options: dict[str, Any] = {"branch": branch, "step": step, "parent": parent}
        if seen is None and branch in model.tags:
            with pytest.raises(RefExistsError):
                self._run_save(handle, state, options)
            return None
        if parent is None:
            model.seen[which][branch] = seen
        if seen != head:
            with pytest.raises(ConflictError) as caught:
                self._run_save(handle, state, options)
            error = caught.value
            assert (error.expected_id, error.found_id) == (seen, head)
            model.snapshots[error.snapshot_id] = Saved(state, parents, step)
            return None
        snapshot = self._run_save(handle, state, options)
        assert snapshot.parents == parents
        model.snapshots[snapshot.id] = Saved(state, parents, step)
        model.branches[branch] = model.seen[which][branch] = snapshot.id
        return snapshot

    def _run_save(self, handle: Repository, state: State, options: dict[str, Any]) -> castore.Snapshot:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", castore.StaleSaveWarning)
            return handle.save(state, **options)

    # ---- loading -------------------------------------------------------------------------------------------------

    @when_saved
    @rule(which=HANDLES, data=st.data())
    def load(self, which: int, data: st.DataObject) -> None:
        ref = data.draw(self._refs())
        assert_same(self.handles[which].load(ref), self._state(ref))
        self._note(which, ref)

    @when_saved
    @rule(which=HANDLES, data=st.data(), paths=st.lists(PARTS, min_size=1))
    def load_a_part(self, which: int, data: st.DataObject, paths: list[str]) -> None:
        ref = data.draw(self._refs())
        state = self._state(ref)
        parts = {
            "model": {"model": state["model"]},
            "*/weight": {"model": {"weight": state["model"]["weight"]}},
            "list/**": {"list": state["list"]} if "list" in state else None,
            "1": {1: state[1]} if 1 in state else None,
            "~s:1": {"1": state["1"]} if "1" in state else None,
        }
        if any(parts[path] is None for path in paths):
            with pytest.raises(PathNotFoundError):
                self.handles[which].load(ref, paths=paths)
        else:
            found = self.handles[which].load(ref, paths=paths)
            wanted: State = {key: value for path in paths for key, value in (parts[path] or {}).items()}
            if "model" in paths:
                wanted["model"] = state["model"]
            assert_same(found, {key: wanted[key] for key in state if key in wanted})
        self._note(which, ref)

    @when_saved
    @rule(which=HANDLES, data=st.data(), start=st.integers(-70, 70), count=st.integers(0, 70))
    def read_rows(self, which: int, data: st.DataObject, start: int, count: int) -> None:
        ref = data.draw(self._refs())
        rows = slice(start, start + count)
        found = self.handles[which].read(ref, "model/weight", rows=rows)
        assert_same(found, self._state(ref)["model"]["weight"][rows])

    @when_saved
    @rule(which=HANDLES, data=st.data(), live=STATES)
    def load_into(self, which: int, data: st.DataObject, live: State) -> None:
        ref = data.draw(self._refs())
        state = self._state(ref)
        live = {**live, "model": {name: values.copy() for name, values in live["model"].items()}}
        weight = live["model"]["weight"]
        try:
            found = self.handles[which].load(ref, into=live)
        except StateMismatchError:
            assert {name: _type(value) for name, value in live.items()} != {
                name: _type(value) for name, value in state.items()
            }
        else:
            assert found is live
            assert live["model"]["weight"] is weight
            assert_same(found["model"]["weight"], state["model"]["weight"])
            assert found["step"] == state["step"]
        self._note(which, ref)

    # ---- refs ----------------------------------------------------------------------------------------------------

    @when_saved
    @rule(which=HANDLES, name=BRANCHES, move=st.booleans(), data=st.data())
    def make_branch(self, which: int, name: str, move: bool, data: st.DataObject) -> None:
        model = self.model
        ref = data.draw(self._refs())
        target = self._resolve(ref)
        if (name in model.branches and not move) or (name not in model.branches and name in model.tags):
            with pytest.raises(RefExistsError):
                self.handles[which].branch(name, at=ref, move=move)
        else:
            assert self.handles[which].branch(name, at=ref, move=move).snapshot_id == target
            model.branches[name] = model.seen[which][name] = target

    @when_saved
    @rule(which=HANDLES, name=TAGS, data=st.data())
    def make_tag(self, which: int, name: str, data: st.DataObject) -> None:
        model = self.model
        ref = data.draw(self._refs())
        if name in model.tags or name in model.branches:
            with pytest.raises(RefExistsError):
                self.handles[which].tag(name, at=ref)
        else:
            model.tags[name] = self.handles[which].tag(name, at=ref).snapshot_id
            assert model.tags[name] == self._resolve(ref)

    @rule(which=HANDLES, name=BRANCHES)
    def delete_branch(self, which: int, name: str) -> None:
        if name in self.model.branches:
            self.handles[which].delete_branch(name)
            del self.model.branches[name]
            self.model.seen[which][name] = None
        else:
            with pytest.raises(UnknownRefError):
                self.handles[which].delete_branch(name)

    @rule(which=HANDLES, name=TAGS)
    def delete_tag(self, which: int, name: str) -> None:
        if name in self.model.tags:
            self.handles[which].delete_tag(name)
            del self.model.tags[name]
        else:
            with pytest.raises(UnknownRefError):
                self.handles[which].delete_tag(name)

    # ---- the life of handles and of the index --------------------------------------------------------------------

    @rule(which=HANDLES)
    def close(self, which: int) -> None:
        """The next use opens it again, and it still knows the heads that it has seen."""
        self.handles[which].close()

    @rule(which=HANDLES)
    def reopen(self, which: int) -> None:
        self.handles[which].close()
        self.handles[which] = castore.open(self.path)
        self.model.seen[which].clear()

    @rule(how=st.sampled_from(["deleted", "emptied", "garbage", "cut", "flipped"]), data=st.data())
    def damage_the_index(self, how: str, data: st.DataObject) -> None:
        """While nobody has it open: a mapped file that shrinks kills its process, whoever it is."""
        for handle in self.handles:
            handle.close()
        cache = self.path / "cache"
        if how == "deleted":
            shutil.rmtree(cache, ignore_errors=True)
            return
        for file in [path for path in cache.rglob("*") if path.is_file()]:
            content = bytearray(file.read_bytes())
            if how == "flipped" and content:
                content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
            cut = content[: len(content) // 3]
            file.write_bytes({"emptied": b"", "garbage": b"\xa5" * 9000, "cut": cut}.get(how, content))

    @rule(which=HANDLES)
    def reindex(self, which: int) -> None:
        self.handles[which].reindex()

    @rule(which=HANDLES)
    def verify(self, which: int) -> None:
        report = self.handles[which].verify(data=True)
        assert report.ok, report.problems
        assert set(report.orphans) == self.model.orphans()

    @when_saved
    @rule(which=HANDLES, data=st.data())
    def diff(self, which: int, data: st.DataObject) -> None:
        a, b = (data.draw(st.sampled_from(list(self.model.snapshots))) for _ in range(2))
        found = self.handles[which].diff(a, b)
        (weight,) = [leaf for leaf in found.leaves if leaf.path == "model/weight"]
        left, right = (self.model.snapshots[ref].state["model"]["weight"] for ref in (a, b))
        assert (weight.status == "same") == (left.tobytes() == right.tobytes())
        ids = [self.handles[which].snapshot(ref).state_id for ref in (a, b)]
        assert ids[0] != ids[1] or found.identical

    # ---- what always holds ---------------------------------------------------------------------------------------

    @invariant()
    def refs_are_those_of_the_model(self) -> None:
        for handle in self.handles:
            assert {ref.name: ref.snapshot_id for ref in handle.branches()} == self.model.branches
            assert {ref.name: ref.snapshot_id for ref in handle.tags()} == self.model.tags

    @invariant()
    def every_history_is_that_of_the_model(self) -> None:
        for handle in self.handles:
            for name, head in self.model.branches.items():
                history = self.model.history(head)
                assert [snapshot.id for snapshot in handle.log(f"heads/{name}")] == history
            assert {snapshot.id for snapshot in handle.orphans()} == self.model.orphans()

    # ---- refs as people write them -------------------------------------------------------------------------------

    def _refs(self) -> st.SearchStrategy[str]:
        model = self.model
        names = [f"heads/{name}" for name in model.branches] + [f"tags/{name}" for name in model.tags]
        back = [
            f"heads/{name}~{steps}"
            for name, head in model.branches.items()
            for steps in range(1, len(model.history(head)))
        ]
        # In the order in which they were made: ids are random, and hypothesis must be able to do the same again.
        return st.sampled_from(list(model.snapshots) + names + back)

    def _resolve(self, ref: str) -> str:
        name, _, steps = ref.partition("~")
        kind, _, rest = name.partition("/")
        if kind == "heads":
            return self.model.history(self.model.branches[rest])[int(steps or 0)]
        return self.model.tags[rest] if kind == "tags" else name

    def _state(self, ref: str) -> State:
        return self.model.snapshots[self._resolve(ref)].state

    def _note(self, which: int, ref: str) -> None:
        """To load a branch by its name is to have seen its head."""
        if ref.startswith("heads/") and "~" not in ref:
            self.model.seen[which][ref.removeprefix("heads/")] = self._resolve(ref)


def _type(value: Any) -> Any:
    """What must agree before anything is loaded into a live state."""
    if isinstance(value, dict):
        return {name: _type(child) for name, child in value.items()}
    return (value.dtype, value.shape) if isinstance(value, np.ndarray) else type(value)


RepositoryMachine.TestCase.settings = settings(
    max_examples=(settings.default.max_examples if settings.default else 100) * 2 // 5, stateful_step_count=40
)
TestRepository = pytest.mark.slow(RepositoryMachine.TestCase)
