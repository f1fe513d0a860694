"""What `save` takes, refuses, writes and says; the order of its writes is tested in test_crash.py."""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

import castore
from castore.api import Repository
from castore.backend import MemoryBackend
from castore.errors import (
    CodecError,
    InvalidNameError,
    RefExistsError,
    RepositoryExistsError,
    RepositoryNotFoundError,
    StorageError,
    UnknownRefError,
    UnsupportedLeafError,
    UsageError,
)
from castore.format.pack import RecordKind
from castore.options import KIB, RepositoryOptions
from castore.repository import Handle
from tests.checkpoint.repositories import HookedBackend, at_call, create_on, files_of, held_leases, open_on, packs_of
from tests.checkpoint.states import assert_same, training_state


@pytest.fixture
def repo() -> Repository:
    return create_on(MemoryBackend())


def noise(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, count, np.uint8)


# ---- what it returns ---------------------------------------------------------------------------------------------


def test_a_snapshot_says_all_about_itself(tmp_path: Path) -> None:
    with castore.init(tmp_path / "store") as repo:
        before = dt.datetime.now(dt.UTC)
        first = repo.save({"w": np.zeros(10)})
        snapshot = repo.save(
            {"w": np.arange(1000, dtype=np.float32), "n": 7},
            step=100,
            metrics={"loss": 1.25, "seen": 10**12},
            metadata={"lr": 2e-5, "nested": {"list": [1, None, True, "x"]}},
            message="first line\nsecond",
            tags=("best", "v1/release"),
        )
        assert before <= snapshot.created_at <= dt.datetime.now(dt.UTC)
        assert (snapshot.branch, snapshot.step, snapshot.parents) == ("main", 100, (first.id,))
        assert snapshot.metrics == {"loss": 1.25, "seen": 10**12}
        assert snapshot.metadata == {"lr": 2e-5, "nested": {"list": [1, None, True, "x"]}}
        assert snapshot.message == "first line\nsecond"
        assert snapshot.raw_bytes == 4001
        assert snapshot.new_bytes == 4000
        assert snapshot.stored_bytes > 0
        assert snapshot.software.startswith("castore")
        assert [(leaf.path, leaf.shape, leaf.raw_bytes, leaf.chunk_count) for leaf in snapshot.leaves] == [
            ("w", (1000,), 4000, 1),
            ("n", (), 1, 0),
        ]
        assert {ref.name: ref.snapshot_id for ref in repo.tags()} == {"best": snapshot.id, "v1/release": snapshot.id}
        with pytest.raises(dataclasses.FrozenInstanceError):
            snapshot.step = 3  # type: ignore[misc]
    with castore.open(tmp_path / "store") as repo:
        assert repo.snapshot("main") == snapshot
        assert repo.snapshot("best").leaves == snapshot.leaves


def test_the_root_of_a_state_may_be_anything(repo: Repository) -> None:
    for state in ({}, [], (), None, 7, "text", 2.5, np.arange(300), [[], {}, ()], {"": {"": 1}}):
        repo.save(state)
        assert_same(repo.load("main"), state)


def test_bytes_are_counted_as_they_are(repo: Repository) -> None:
    repo.save({"a": noise(0, 3000)})
    snapshot = repo.save({"a": noise(0, 3000), "b": noise(1, 2000), "c": noise(1, 2000), "small": noise(2, 100)})
    assert snapshot.raw_bytes == 3000 + 2000 + 2000 + 100
    assert snapshot.new_bytes == 2000, "equal content is one chunk, and small leaves live in the manifest"
    packs = [name for name in files_of(repo.handle.backend) if name.startswith("packs/")]
    assert len(packs) == 2
    assert 2000 < snapshot.stored_bytes < 2000 + 2 * KIB


def test_the_one_liners_make_their_repository(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "store"
    snapshot = castore.save(training_state(1), path, step=3, tags=("t",))
    assert snapshot.step == 3
    assert snapshot.leaves, "the table is still to be had after the handle was closed"
    assert_same(castore.load(path), training_state(1))
    assert_same(castore.load(path, "t", paths=["epoch"]), {"epoch": 1 / 3})
    with pytest.raises(RepositoryNotFoundError, match="castore init"):
        castore.load(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_repository_is_made_once(tmp_path: Path) -> None:
    with castore.init(tmp_path / "store", hash="xxh3-128", compression="lz4") as repo:
        assert (repo.options.hash, repo.options.compression) == ("xxh3-128", "lz4")
    with pytest.raises(RepositoryExistsError):
        castore.init(tmp_path / "store")
    with castore.open(tmp_path / "store", create=True) as repo:
        assert repo.options.compression == "lz4"
    with pytest.raises(RepositoryNotFoundError):
        castore.open(tmp_path / "none")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(UsageError, match="not empty"):
        castore.init(tmp_path / "full")
    for options in ({"hash": "md5"}, {"compression": "zip"}, {"lease_s": 0}, {"orphan_grace_s": -1}):
        with pytest.raises(UsageError):
            castore.init(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


# ---- what it refuses ---------------------------------------------------------------------------------------------

CYCLE: list[Any] = []
CYCLE.append(CYCLE)

BAD_REQUESTS: list[Mapping[str, Any]] = [
    {"step": 1.0},
    {"step": True},
    {"step": "7"},
    {"step": 2**63},
    {"step": np.float32(3)},
    {"step": np.arange(2)},
    {"metrics": {"loss": "low"}},
    {"metrics": {"loss": None}},
    {"metrics": {"loss": True}},
    {"metrics": {"loss": 1j}},
    {"metrics": {"loss": [1.0]}},
    {"metrics": {"loss": np.arange(3.0)}},
    {"metrics": {"loss": 10**400}},
    {"metrics": {1: 1.0}},
    {"metrics": {"\ud800": 1.0}},
    {"metrics": [("loss", 1.0)]},
    {"metadata": {"x": {1, 2}}},
    {"metadata": {"x": math.nan}},
    {"metadata": {"x": math.inf}},
    {"metadata": {"x": b"bytes"}},
    {"metadata": {"x": 2**64}},
    {"metadata": {"x": {3: "int key"}}},
    {"metadata": {3: "int key"}},
    {"metadata": {"x": np.arange(2)}},
    {"metadata": {"x": object()}},
    {"metadata": {"x": CYCLE}},
    {"metadata": {"x": "\udcff"}},
    {"metadata": {"\udcff": 1}},
    {"metadata": ["x"]},
    {"message": None},
    {"message": b"bytes"},
    {"message": "\ud800"},
    {"tags": "best"},
    {"tags": ("best", "best")},
    {"tags": ("main",)},
]


@pytest.mark.parametrize("request_", BAD_REQUESTS, ids=lambda request: repr(request)[:60])
def test_a_bad_request_is_refused_before_anything_is_written(repo: Repository, request_: Mapping[str, Any]) -> None:
    """Some were found out only after the packs were written, others made a snapshot that nobody could read again."""
    before = files_of(repo.handle.backend)
    with pytest.raises(UsageError):
        repo.save(training_state(1), **request_)
    assert files_of(repo.handle.backend) == before


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a b",
        "a..b",
        ".a",
        "a/",
        "/a",
        "a//b",
        "a.lock",
        "-a",
        "a~1",
        "a@3",
        "a:b",
        "a\n",
        "heads/a",
        "\ud800",
        "x" * 300,
    ],
)
def test_names_follow_the_rules_of_git(repo: Repository, name: str) -> None:
    before = files_of(repo.handle.backend)
    for request in ({"branch": name}, {"tags": (name,)}):
        with pytest.raises(InvalidNameError):
            repo.save({}, **request)
    assert files_of(repo.handle.backend) == before


@pytest.mark.parametrize("name", ["feature/x", "ünï-çode", "UPPER", "v1.0", "a-b_c", "100", "tags", "con", "x" * 200])
def test_other_names_are_free(repo: Repository, name: str) -> None:
    snapshot = repo.save({"x": 1}, branch=name, tags=(f"{name}-tag",))
    assert repo.snapshot(name).id == snapshot.id == repo.snapshot(f"{name}-tag").id
    assert [ref.name for ref in repo.branches()] == [name]


def test_numbers_of_other_libraries_are_numbers(repo: Repository) -> None:
    snapshot = repo.save(
        {},
        step=np.int64(7),
        metrics={"a": np.float32(0.1), "b": np.int8(3), "c": decimal.Decimal("1.5"), "d": math.nan, "e": -math.inf},
        metadata=MappingProxyType({"tuple": (1, 2), "empty": ()}),
    )
    found = repo.snapshot(snapshot.id)
    assert (found.step, type(found.step)) == (7, int)
    assert found.metrics["a"] == float(np.float32(0.1))
    assert found.metrics["b"] == 3
    assert math.isnan(found.metrics["d"])
    assert found.metrics["e"] == -math.inf
    assert found.metadata == {"tuple": [1, 2], "empty": []}


def test_metadata_that_would_make_the_snapshot_unreadable_is_refused(
    repo: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was written, the branch moved to it, and then nothing on that branch could be read any more."""
    head = repo.save({}).id
    monkeypatch.setattr("castore.snapshots.SNAPSHOT_BYTES_MAX", 10_000)
    with pytest.raises(UsageError, match="part of the state"):
        repo.save({}, metadata={"log": "x" * 10_000})
    assert repo.snapshot("main").id == head
    repo.save({}, metadata={"log": "x" * 9000})


def test_a_tag_that_is_taken_is_refused_before_anything_is_written(repo: Repository) -> None:
    repo.save({"x": 1}, tags=("best",))
    repo.branch("fork")
    before = files_of(repo.handle.backend)
    for tag in ("best", "fork"):
        with pytest.raises(RefExistsError, match=tag):
            repo.save({"x": 2}, tags=("fine", tag))
    assert files_of(repo.handle.backend) == before


def test_a_branch_never_takes_the_name_of_a_tag(repo: Repository) -> None:
    """With a parent given, and after the branch was deleted, it did: every later use of the name was ambiguous."""
    repo.save({"x": 1})
    repo.branch("fork")
    repo.delete_branch("fork")
    repo.tag("fork")
    for parent in (None, "main"):
        with pytest.raises(RefExistsError, match="already a tag"):
            repo.save({"x": 2}, branch="fork", parent=parent)
    assert [ref.name for ref in repo.branches()] == ["main"]


def test_an_unknown_parent_is_refused(repo: Repository) -> None:
    repo.save({"x": 1})
    with pytest.raises(UnknownRefError):
        repo.save({"x": 2}, parent="mian")
    assert len(list(repo.snapshots())) == 1


@dataclasses.dataclass
class Opaque:
    handle: object


def test_what_has_no_encoding_is_named_with_its_path_and_type(repo: Repository) -> None:
    before = files_of(repo.handle.backend)
    for state, path in (
        ({"model": {"hooks": [1, lambda: None]}}, "model/hooks/1"),
        ({"a": Opaque(object())}, "a/handle"),
        ({"a": {1, 2}}, "a"),
    ):
        with pytest.raises(UnsupportedLeafError) as caught:
            repo.save(state)
        assert caught.value.path == path
        assert caught.value.type_name in str(caught.value)
    assert files_of(repo.handle.backend) == before


def test_a_pickle_must_be_allowed_twice(repo: Repository) -> None:
    repo.save({"set": {1, 2}, "x": 1}, allow_pickle=True)
    with pytest.raises(castore.PickleRefusedError, match="set"):
        repo.load("main")
    assert repo.load("main", allow_pickle=True) == {"set": {1, 2}, "x": 1}
    assert repo.load("main", paths=["x"]) == {"x": 1}
    with pytest.raises(castore.PickleRefusedError):
        repo.read("main", "set")
    assert repo.read("main", "set", allow_pickle=True) == {1, 2}


# ---- what it writes ----------------------------------------------------------------------------------------------


def written_by(repo: Repository, state: Any, **options: Any) -> tuple[castore.Snapshot, int]:
    """The snapshot, and how many bytes all files of the repository grew."""
    before = files_of(repo.handle.backend)
    snapshot = repo.save(state, **options)
    after = files_of(repo.handle.backend)
    return snapshot, sum(map(len, after.values())) - sum(map(len, before.values()))


@pytest.mark.parametrize("compression", ["auto", "lz4", "none"])
def test_a_resave_writes_no_chunk_and_hardly_anything_else(compression: Any) -> None:
    repo = create_on(MemoryBackend(), RepositoryOptions(compression=compression))
    state = {f"layer.{index}": noise(index, 3000) for index in range(500)}
    repo.save(state, step=1)
    packs = packs_of(repo)
    again, grown = written_by(repo, state)
    assert packs_of(repo) == packs
    assert (again.new_bytes, again.stored_bytes) == (0, 0)
    assert grown < 64 * KIB
    assert grown < 1 * KIB, "one snapshot file, one moved branch"


def test_a_counter_that_moves_rewrites_one_part_of_the_manifest(repo: Repository) -> None:
    state = {f"layer.{index}": noise(index, 300) for index in range(5000)}
    repo.save({**state, "step": 1})
    snapshot, grown = written_by(repo, {**state, "step": 2})
    assert snapshot.new_bytes == 0
    assert grown < 64 * KIB


def test_a_fork_costs_no_bytes_but_its_name(repo: Repository) -> None:
    repo.save(training_state(1))
    before = files_of(repo.handle.backend)
    repo.branch("fork")
    repo.tag("here")
    after = files_of(repo.handle.backend)
    assert {name for name in after if name not in before} == {"refs/branches/fork", "refs/tags/here"}
    assert all(after[name] == data for name, data in before.items())
    assert sum(len(after[name]) for name in after.keys() - before.keys()) < 1 * KIB


def test_one_changed_chunk_of_a_long_leaf_is_written_alone(repo: Repository) -> None:
    long = noise(0, 5 << 20)
    repo.save({"long": long})
    changed = long.copy()
    changed[3 << 20] ^= 1
    snapshot = repo.save({"long": changed})
    assert snapshot.new_bytes == 1 << 20
    assert_same(repo.load("main"), {"long": changed})
    assert_same(repo.load("main~1"), {"long": long})


def test_scalars_never_shift_tensor_bytes(repo: Repository) -> None:
    """Files cut into chunks find nothing again once a number before them moved."""
    weights = noise(0, 100_000)
    repo.save({"epoch": 9, "log": [], "weights": weights})
    snapshot = repo.save({"epoch": 10**30, "log": ["much"] * 1000, "new": noise(1, 50), "weights": weights})
    assert snapshot.new_bytes == 0


def test_large_text_and_bytes_spill_into_chunks(repo: Repository) -> None:
    state = {"text": "é" * 200_000, "bytes": noise(0, 2_500_000).tobytes(), "short": "é" * 100}
    snapshot, _ = written_by(repo, state)
    assert {leaf.path: leaf.chunk_count for leaf in snapshot.leaves} == {"text": 1, "bytes": 3, "short": 0}
    parts = sum(row.raw_bytes for row in _rows(repo) if row.kind is RecordKind.PART)
    assert parts < 1 * KIB, "the manifest does not hold them"
    assert_same(repo.load("main"), state)
    assert repo.save({**state, "short": "x"}).new_bytes == 0


def _rows(repo: Repository) -> list[Any]:
    from castore.format.layout import pack_name
    from castore.pack.reader import read_table

    handle = repo.handle
    return [
        row
        for pack_id in packs_of(repo)
        for row in read_table(
            handle.backend.open_reader(pack_name(pack_id)), where="pack", expected_id=pack_id, hasher=handle.hasher
        )
    ]


def test_aliases_are_stored_once_and_come_back_aliased(repo: Repository) -> None:
    shared = noise(0, 5000)
    snapshot = repo.save({"a": shared, "b": [shared], "copy": shared.copy()})
    assert snapshot.new_bytes == 5000
    assert snapshot.raw_bytes == 10_000
    state = repo.load("main")
    assert state["a"] is state["b"][0]
    assert state["copy"] is not state["a"]
    state["a"][0] ^= 1
    assert state["copy"][0] != state["a"][0]


def test_a_state_is_read_in_place_and_left_alone(repo: Repository) -> None:
    array = np.arange(1000.0)[::2]
    array.setflags(write=False)
    state = {"a": array, "nested": {"list": [1, 2]}}
    repo.save(state)
    assert state["a"] is array
    assert state["nested"] == {"list": [1, 2]}
    assert_same(repo.load("main")["a"], array)


# ---- identity ----------------------------------------------------------------------------------------------------


def test_equal_content_has_one_state_id_however_it_is_stored(tmp_path: Path) -> None:
    """By every compression, as a difference, deduplicated, in another order of saves, with other strides."""
    ids = set()
    for compression in ("auto", "lz4", "none"):
        repo = create_on(MemoryBackend(), RepositoryOptions(compression=compression))
        repo.save(training_state(1), step=1, message="anything")
        ids.add(repo.save(training_state(2)).state_id)
        ids.add(repo.save(training_state(2), branch="again", metadata={"x": 1}).state_id)
    with castore.init(tmp_path / "store") as repo:
        state = training_state(2)
        state["model"]["head"] = np.asfortranarray(state["model"]["head"])
        ids.add(repo.save(state).state_id)
    assert len(ids) == 1


def test_any_difference_in_content_is_another_state_id(repo: Repository) -> None:
    states: list[Any] = [
        {"a": 1},
        {"a": True},
        {"a": 1.0},
        {"a": "1"},
        {"b": 1},
        {1: 1},
        {"1": 1},
        {"a": [1]},
        {"a": (1,)},
        {"a": np.int64(1)},
        {"a": np.array(1)},
        {"a": np.array([1])},
        {"a": np.array([1], np.int32)},
        {"a": -0.0},
        {"a": 0.0},
        {"a": None},
        {},
        [],
        {"a": {}},
        {"a": 1, "b": 2},
        {"a": 1, "b": {}},
    ]
    ids = [repo.save(state).state_id for state in states]
    assert len(set(ids)) == len(states)


def test_the_hash_is_part_of_identity() -> None:
    pytest.importorskip("blake3")
    snapshots = [
        create_on(MemoryBackend(), RepositoryOptions(hash=name)).save(training_state(1))
        for name in ("xxh3-128", "blake3")
    ]
    assert snapshots[0].state_id != snapshots[1].state_id
    assert [len(snapshot.id) for snapshot in snapshots] == [32, 64]


def test_two_saves_of_one_state_are_two_snapshots(repo: Repository) -> None:
    first, second = repo.save({"x": 1}), repo.save({"x": 1})
    assert first.id != second.id
    assert first.state_id == second.state_id


# ---- while it runs -----------------------------------------------------------------------------------------------


def test_progress_grows_to_its_end(repo: Repository) -> None:
    for _ in range(2):  # the second time nothing is written
        calls: list[tuple[int, int]] = []
        repo.save(training_state(1), progress=lambda *call, calls=calls: calls.append(call))
        done = [call[0] for call in calls]
        assert done == sorted(done)
        assert len({total for _, total in calls}) == 1
        assert calls[-1][0] == calls[-1][1] > 0


def test_a_progress_callback_that_raises_ends_the_save(repo: Repository) -> None:
    """Ctrl-C in a progress bar, at every point at which it is called."""
    head = repo.save(training_state(1)).id
    steps: list[int] = []
    repo.save(training_state(9), branch="count", progress=lambda done, total: steps.append(done))
    for stop_at in range(len(steps)):
        calls: list[int] = []

        def stop(done: int, total: int, calls: list[int] = calls, stop_at: int = stop_at) -> None:
            calls.append(done)
            if len(calls) > stop_at:
                raise KeyboardInterrupt

        try:
            repo.save(training_state(2), progress=stop)
        except KeyboardInterrupt:
            assert held_leases(repo.handle.backend) == []
            assert repo.snapshot("main").id == head or len(calls) == len(steps)
        head = repo.save(training_state(3)).id
        assert_same(repo.load("main"), training_state(3))


@pytest.mark.parametrize("compression", ["auto", "lz4", "none"])
@pytest.mark.parametrize("kind", ["noise", "numbers"])
def test_a_state_that_changes_while_it_is_saved_is_found_out(compression: Any, kind: str) -> None:
    """Chunks stored raw went unproved: other bytes under the id, for this snapshot and all later ones that share it."""
    repo = create_on(MemoryBackend(), RepositoryOptions(compression=compression))
    array = noise(0, 200_000) if kind == "noise" else np.arange(50_000, dtype=np.float32)
    original = array.copy()
    head = repo.save({"x": 1}).id
    hashed = False

    def change(done: int, total: int) -> None:
        nonlocal hashed
        if not hashed:
            array[1000:1010] += 1
        hashed = True

    with pytest.raises(CodecError, match="changed"):
        repo.save({"array": array}, progress=change)
    assert repo.snapshot("main").id == head
    assert repo.orphans() == []
    # What was written is not there for the next save to rely on, nor in memory to take differences from.
    repo.save({"array": original})
    assert_same(repo.load("main"), {"array": original})
    near = original.copy()
    near[0] += 1
    repo.save({"array": near})
    assert_same(open_on(repo.handle.backend).load("main"), {"array": near})


def test_a_state_that_changes_after_it_was_encoded_spoils_no_later_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy kept as the base of later differences was taken from the live state after the record was proved."""
    from castore.host_memory import BufferPool

    repo = create_on(MemoryBackend())
    repo.handle.base_memory_bytes = 1 << 30
    array = np.random.default_rng(0).standard_normal(50_000).astype(np.float32)
    repo.save({"array": array})
    array *= np.float32(1.0001)
    copy = BufferPool.copy
    saved = array.copy()

    def change_first(pool: BufferPool, raw: Any) -> Any:
        if bytes(raw) == saved.tobytes():
            array[:100] += 1
        return copy(pool, raw)

    with monkeypatch.context() as patch:
        patch.setattr(BufferPool, "copy", change_first)
        repo.save({"array": array})
    assert array[0] != saved[0], "nothing was kept in memory"
    assert_same(repo.load("main"), {"array": saved})
    repo.save({"array": saved * np.float32(1.0001)})
    assert_same(open_on(repo.handle.backend).load("main"), {"array": saved * np.float32(1.0001)})


def test_an_interrupt_right_after_the_commit_does_not_make_the_next_save_a_conflict() -> None:
    """The branch had moved, but the handle had not taken note: it lost every later race against itself."""
    backend = create_on(MemoryBackend()).handle.backend
    count = HookedBackend(backend)
    open_on(count).save(training_state(1), tags=("a",))
    swap = [operation for operation, _ in count.calls].index("compare_and_swap")
    for number in range(swap + 1, len(count.calls)):
        own = HookedBackend(create_on(MemoryBackend()).handle.backend, at_call(number, interrupt))
        repo = open_on(own)
        with pytest.raises(KeyboardInterrupt) as caught:
            repo.save(training_state(1), tags=("a",))
        head = repo.snapshot("main")
        if count.calls[number][0] != "release":
            assert head.id[:12] in caught.value.__notes__[0]
        assert repo.save(training_state(2)).parents == (head.id,)


def interrupt() -> None:
    raise KeyboardInterrupt


def test_an_error_after_the_commit_says_that_the_branch_has_moved() -> None:
    inner = create_on(MemoryBackend()).handle.backend

    def fail(operation: str, name: str) -> None:
        if name == "refs/tags/best" and operation == "compare_and_swap":
            raise StorageError("no more")

    repo = open_on(HookedBackend(inner, fail))
    with pytest.raises(StorageError, match="no more") as caught:
        repo.save(training_state(1), tags=("best",))
    assert "branch 'main' has moved to the new snapshot" in caught.value.__notes__[0]
    assert_same(repo.load("main"), training_state(1))
    assert repo.tags() == []


def test_the_clock_comes_in_as_an_argument(tmp_path: Path) -> None:
    castore.init(tmp_path / "store").close()
    from castore.repository import open_repository

    handle: Handle = open_repository(tmp_path / "store", clock=lambda: 1_700_000_000_123_456_789)
    with Repository(tmp_path / "store", handle) as repo:
        snapshot = repo.save({})
        assert snapshot.created_at == dt.datetime(2023, 11, 14, 22, 13, 20, 123457, dt.UTC)
        assert repo.branches()[0].time_ns == 1_700_000_000_123_456_789


# ---- warnings ----------------------------------------------------------------------------------------------------


def test_a_step_that_moves_while_no_tensor_does_is_warned_of(repo: Repository) -> None:
    state = training_state(1)
    repo.save(state, step=1)
    with pytest.warns(castore.StaleSaveWarning, match="step 2: all") as caught:
        repo.save(state, step=2)
    assert caught[0].filename == __file__
    repo.save(state, step=2)
    repo.save(state)
    repo.save(training_state(2), step=3)


# ---- many things -------------------------------------------------------------------------------------------------


def test_a_state_of_many_small_leaves_is_saved_in_reasonable_time(repo: Repository) -> None:
    state = {f"layer.{index}": {"weight": noise(index, 300), "step": index} for index in range(3000)}
    begun_s = time.perf_counter()
    repo.save(state)
    assert_same(repo.load("main"), state)
    assert time.perf_counter() - begun_s < 30


def test_a_leaf_of_more_chunks_than_one_part_holds_keeps_its_ids_in_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("plan", "bases", "fetch", "load"):
        monkeypatch.setattr(f"castore.checkpoint.{module}.GRID_BYTES", 1024, raising=False)
    monkeypatch.setattr("castore.format.manifest.GRID_BYTES", 1024)
    repo = create_on(MemoryBackend())
    array = noise(0, 1024 * 2500 + 7)
    repo.save({"long": array, "after": 1})
    array2 = array.copy()
    array2[0] ^= 1
    second, grown = written_by(repo, {"long": array2, "after": 1})
    assert second.new_bytes == 1024
    assert grown < 24 * KIB, "one list of ids, not all three"
    fresh = open_on(repo.handle.backend)
    assert_same(fresh.load("main"), {"long": array2, "after": 1})
    assert_same(fresh.load("main~1"), {"long": array, "after": 1})
    assert_same(fresh.read("main", "long", rows=slice(1024 * 2400, 1024 * 2400 + 5)), array2[1024 * 2400 :][:5])


def test_a_snapshot_file_and_refs_can_be_read_by_people(tmp_path: Path) -> None:
    with castore.init(tmp_path / "store") as repo:
        snapshot = repo.save({"x": 1}, branch="Feature/ä")
    (ref,) = (tmp_path / "store" / "refs" / "branches").iterdir()
    line, digest = ref.read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["snapshot"] == snapshot.id
    assert json.loads(line)["name"] == "Feature/ä"
    assert digest.startswith("xxh3-128:")
