"""What `load` and `read` give back, refuse, and touch."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import castore
from castore.api import Repository
from castore.backend import MemoryBackend
from castore.errors import (
    ChecksumError,
    ChunkMissingError,
    DamageError,
    FormatError,
    NotFoundError,
    PartialLoadError,
    PathNotFoundError,
    PickleRefusedError,
    SnapshotGoneError,
    StateMismatchError,
    UnknownClassError,
    UnknownRefError,
    UsageError,
)
from castore.format.layout import pack_name
from castore.options import GRID_BYTES, MIB, RepositoryOptions
from castore.threads import worker_count
from tests.checkpoint.damage import damage_leaf, flip_bit, forge_leaf, places_of, rows_of
from tests.checkpoint.repositories import HookedBackend, at_call, copied, create_on, delete_packs, open_on, packs_of
from tests.checkpoint.states import assert_same, training_state
from tests.suites.fault_backend import FaultBackend


@pytest.fixture
def repo() -> Repository:
    return create_on(MemoryBackend())


def noise(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, count, np.uint8)


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclasses.dataclass
class Settings:
    rate: float
    names: list[str]


# ---- whole states ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hash_name", ["xxh3-128", "blake3"])
@pytest.mark.parametrize("compression", ["auto", "lz4", "none"])
def test_a_state_comes_back_bit_for_bit(compression: Any, hash_name: Any) -> None:
    if hash_name == "blake3":
        pytest.importorskip("blake3")
    repo = create_on(MemoryBackend(), RepositoryOptions(hash=hash_name, compression=compression))
    state = training_state(1, frozen_bytes=3 * MIB, moving_bytes=2 * MIB + 4)
    repo.save(state)
    assert_same(open_on(repo.handle.backend).load("main"), state)
    assert_same(repo.load("main", verify=False), state)


def test_containers_come_back_as_they_were(repo: Repository) -> None:
    state = {
        "pair": Pair(1, [Pair("a", None)]),
        "settings": Settings(0.5, ["x"]),
        "ordered": OrderedDict([("z", 1), ("a", 2)]),
        "keys": {1: "int", "1": "str", "a/b": "slash", "a": {"b": "nested"}, "*": 1, "": 2, None: 3, (1, "x"): 4},
        "empty": [{}, [], ()],
        "tuple": (1, (2, [3])),
    }
    repo.save(state)
    found = repo.load("main")
    assert found == state
    assert type(found["pair"]) is Pair
    assert type(found["settings"]) is Settings
    assert type(found["ordered"]) is OrderedDict
    assert list(found["ordered"]) == ["z", "a"]
    assert list(found["keys"]) == list(state["keys"])


def test_classes_are_never_imported(repo: Repository) -> None:
    def elsewhere() -> type:
        class Hidden(NamedTuple):
            x: int

        return Hidden

    hidden = elsewhere()
    repo.save({"h": hidden(1), "y": 2})
    with pytest.raises(UnknownClassError, match="Hidden"):
        repo.load("main")
    assert repo.load("main", missing_classes="dict") == {"h": {"x": 1}, "y": 2}
    name = f"{hidden.__module__}:{hidden.__qualname__}"
    assert type(repo.load("main", classes={name: hidden})["h"]) is hidden
    assert repo.load("main", paths=["y"]) == {"y": 2}


def test_every_form_of_ref_loads(repo: Repository) -> None:
    first = repo.save({"n": 1}, step=10)
    second = repo.save({"n": 2}, step=20, tags=("best",))
    repo.branch("fork", at="main~1")
    for ref, number in (
        ("main", 2),
        ("main~1", 1),
        ("main~", 1),
        ("main@10", 1),
        ("main@20~1", 1),
        ("best", 2),
        ("tags/best", 2),
        ("heads/fork", 1),
        (first.id, 1),
        (second.id[:10], 2),
        (second.id[:10].upper(), 2),
    ):
        assert repo.load(ref) == {"n": number}, ref
    with pytest.raises(UnknownRefError, match="fork"):
        repo.load("frok")
    with pytest.raises(UnknownRefError, match=r"nearest steps: 10, 20|nearest steps: 20, 10"):
        repo.load("main@15")
    with pytest.raises(UnknownRefError, match="found 1"):
        repo.load("main~7")


def test_progress_grows_to_its_end(repo: Repository) -> None:
    repo.save({f"leaf {number}": noise(number, 1000) for number in range(200)})
    calls: list[tuple[int, int]] = []
    repo.load("main", progress=lambda *call: calls.append(call))
    done = [call[0] for call in calls]
    assert done == sorted(done)
    assert calls[-1] == (200_000, 200_000)


# ---- some of the paths -------------------------------------------------------------------------------------------

MODEL = {
    "model": {
        "encoder.0": {"weight": 1, "bias": 2, "attention": {"query": 3}},
        "encoder.1": {"weight": 4, "bias": 5, "attention": {"query": 6}},
        "head": {"weight": 7},
    },
    "optimizer": {"state": {0: {"step": 8}, 1: {"step": 9}}, "groups": [{"lr": 10}, {"lr": 11}]},
    "a*b": 12,
}


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["model/head"], {"model": {"head": {"weight": 7}}}),
        (["model/head/weight"], {"model": {"head": {"weight": 7}}}),
        (["model/*/bias"], {"model": {"encoder.0": {"bias": 2}, "encoder.1": {"bias": 5}}}),
        (
            ["model/encoder.*/**/query"],
            {"model": {f"encoder.{n}": {"attention": {"query": 3 * n + 3}} for n in (0, 1)}},
        ),
        (["**/step"], {"optimizer": {"state": {0: {"step": 8}, 1: {"step": 9}}}}),
        (["optimizer/state/1"], {"optimizer": {"state": {1: {"step": 9}}}}),
        (["optimizer/groups/1/lr"], {"optimizer": {"groups": {1: {"lr": 11}}}}),
        (["optimizer/groups"], {"optimizer": {"groups": [{"lr": 10}, {"lr": 11}]}}),
        (["a%2Ab"], {"a*b": 12}),
        (["**"], MODEL),
        (["model/head", "a%2Ab"], {"model": {"head": {"weight": 7}}, "a*b": 12}),
        (["*/head/**"], {"model": {"head": {"weight": 7}}}),
    ],
)
def test_globs_choose_leaves(repo: Repository, paths: list[str], expected: Any) -> None:
    repo.save(MODEL)
    assert_same(repo.load("main", paths=paths), expected)


def test_a_glob_that_matches_nothing_names_what_is_near(repo: Repository) -> None:
    repo.save(MODEL)
    with pytest.raises(PathNotFoundError, match="model/head/weight") as caught:
        repo.load("main", paths=["model/head/wieght"])
    assert "model/head/weight" in caught.value.near
    with pytest.raises(PathNotFoundError):
        repo.load("main", paths=["model/head", "model/encoder.7"])


def test_only_the_chunks_of_chosen_leaves_are_read(repo: Repository) -> None:
    backend = repo.handle.backend
    repo.save({"big": noise(0, 3 * MIB), "small": noise(1, 5000), "n": 1})
    counting = FaultBackend(backend)
    fresh = open_on(counting)
    assert_same(fresh.load("main", paths=["small"]), {"small": noise(1, 5000)})
    assert chunk_reads(counting) == 2, "one part of the manifest, one chunk"


def chunk_reads(backend: FaultBackend) -> int:
    """Reads of records; tables are read with read_range."""
    return sum(call.operation == "read_into" for call in backend.calls)


def test_a_partial_load_of_aliases_keeps_them_whole(repo: Repository) -> None:
    shared = noise(0, 1000)
    repo.save({"a": shared, "b": shared, "c": [shared]})
    assert_same(repo.load("main", paths=["b"]), {"b": shared})
    found = repo.load("main", paths=["b", "c"])
    assert found["b"] is found["c"][0]


# ---- one leaf ----------------------------------------------------------------------------------------------------


def test_a_leaf_is_read_alone_and_by_rows(repo: Repository) -> None:
    table = np.arange(300_000 * 3, dtype=np.int64).reshape(-1, 3)
    repo.save({"table": table, "n": 5, "text": "x" * 1000, "none": None, "list": [1, 2], "scalar": np.float32(2)})
    assert_same(repo.read("main", "table"), table)
    assert repo.read("main", "n") == 5
    assert repo.read("main", "text") == "x" * 1000
    assert repo.read("main", "none") is None
    assert_same(repo.read("main", "scalar"), np.float32(2))
    assert repo.read("main", "list/1") == 2
    for rows in (
        slice(0, 3),
        slice(43_689, 43_692),  # over the border of two chunks
        slice(-2, None),
        slice(None),
        slice(7, 7),
        slice(9, 2),
        slice(299_999, 10**9),
    ):
        assert_same(repo.read("main", "table", rows=rows), table[rows])


@pytest.mark.parametrize(
    ("start", "stop", "reads"), [(0, 1, 1), (0, 43_690, 1), (43_690, 43_692, 2), (100_000, 100_001, 1), (5, 5, 0)]
)
def test_rows_read_only_the_chunks_that_hold_them(repo: Repository, start: int, stop: int, reads: int) -> None:
    table = np.random.default_rng(0).integers(0, 2**40, (300_000, 3))
    repo.save({"table": table})
    counting = FaultBackend(repo.handle.backend)
    assert_same(open_on(counting).read("main", "table", rows=slice(start, stop)), table[start:stop])
    assert chunk_reads(counting) == 1 + reads, "the manifest, and what was asked for"


def test_rows_of_odd_arrays(repo: Repository) -> None:
    arrays = {
        "fortran": np.asfortranarray(np.arange(24_000.0).reshape(600, 40)),
        "inline": np.arange(30, dtype=np.uint8).reshape(10, 3),
        "empty": np.empty((0, 5), np.float32),
        "thin": np.empty((7, 0), np.float32),
        "strided": np.arange(10_000)[::7],
        "big_endian": np.arange(5000, dtype=">i4"),
        "records": np.zeros(500, [("a", "<i2"), ("b", ">f8")]),
    }
    repo.save(arrays)
    for name, array in arrays.items():
        for rows in (slice(1, 4), slice(None, -2), slice(3, 3)):
            found = repo.read("main", name, rows=rows)
            assert found.dtype == array.dtype
            assert found.shape == array[rows].shape
            assert found.tobytes() == array[rows].tobytes()


def test_rows_of_what_has_none_are_refused(repo: Repository) -> None:
    repo.save({"n": 1, "scalar": np.array(3.0), "text": "abc", "array": np.arange(10)})
    for path in ("n", "scalar", "text"):
        with pytest.raises(UsageError, match=path):
            repo.read("main", path, rows=slice(0, 1))
    with pytest.raises(UsageError, match="step"):
        repo.read("main", "array", rows=slice(0, 9, 2))


def test_a_path_that_is_no_leaf_is_refused_with_near_ones(repo: Repository) -> None:
    repo.save(MODEL)
    for path in ("model/haed/weight", "model/head", "", "optimizer/state/2"):
        with pytest.raises(PathNotFoundError):
            repo.read("main", path)
    with pytest.raises(PathNotFoundError, match="model/head/weight"):
        repo.read("main", "model/haed/weight")
    with pytest.raises(KeyError):
        repo.read("main", "nothing")


# ---- into a live state -------------------------------------------------------------------------------------------


def live_state() -> dict[str, Any]:
    state = training_state(5)
    state["extra"] = {"history": [1.0, 2.0], "name": "old"}
    return state


def test_arrays_are_filled_in_place_and_values_replaced(repo: Repository) -> None:
    saved = {**training_state(1), "extra": {"history": [5.0, 6.0, 7.0], "name": "new"}}
    repo.save(saved)
    live = live_state()
    arrays = dict(live["model"])
    history = live["extra"]["history"]
    found = repo.load("main", into=live)
    assert found is live
    assert_same(live, saved)
    for name, array in arrays.items():
        assert live["model"][name] is array
    assert live["extra"]["history"] is history


def test_arrays_are_filled_whatever_their_strides(repo: Repository) -> None:
    array = np.arange(60_000, dtype=np.float32).reshape(200, 300)
    repo.save({"a": array, "b": array + 1})
    memory = np.zeros((400, 600), np.float32)
    live = {"a": memory[::2, ::2], "b": np.zeros((300, 200), np.float32).T}
    repo.load("main", into=live)
    assert_same(live["a"].copy(), array)
    assert_same(live["b"].copy(), array + 1)
    assert not memory[1::2].any()
    assert not memory[:, 1::2].any()


def test_every_mismatch_is_reported_at_once_and_nothing_is_touched(repo: Repository) -> None:
    repo.save(
        {
            "same": np.ones(500),
            "shape": np.ones((2, 3)),
            "dtype": np.ones(3),
            "kind": 1,
            "only_saved": 2,
            "tiny": np.ones(2),
        }
    )
    live: dict[str, Any] = {
        "same": np.zeros(500),
        "shape": np.zeros((3, 2)),
        "dtype": np.zeros(3, np.float32),
        "kind": np.zeros(1),
        "only_live": {"x": 1},
        "tiny": np.zeros(2),
    }
    before = copy.deepcopy(live)
    for strict in (True, False):
        with pytest.raises(StateMismatchError) as caught:
            repo.load("main", into=live, strict=strict)
        error = caught.value
        assert error.missing == ("only_live/x",)
        assert error.unexpected == ("only_saved",)
        assert [text.split(":")[0] for text in error.mismatched] == ["shape", "dtype", "kind"]
        assert "<f4" in error.mismatched[1]
        assert "<f8" in error.mismatched[1]
        assert ("only_live/x" in str(error)) is strict
        assert "nothing was touched" in str(error)
        assert_same(live, before)


def test_without_strict_what_both_have_is_loaded(repo: Repository) -> None:
    repo.save({"a": np.ones(500), "n": 1, "only_saved": np.ones(3)})
    live = {"a": np.zeros(500), "n": 0, "only_live": np.zeros(4)}
    with pytest.raises(StateMismatchError, match="strict=False"):
        repo.load("main", into=live)
    found = repo.load("main", into=live, strict=False)
    assert found is live
    assert_same(live, {"a": np.ones(500), "n": 1, "only_live": np.zeros(4)})


def test_paths_and_into_touch_only_what_was_chosen(repo: Repository) -> None:
    repo.save(training_state(1))
    live = training_state(5)
    repo.load("main", into=live, paths=["model/head", "epoch"])
    expected = training_state(5)
    expected["model"]["head"] = training_state(1)["model"]["head"]
    expected["epoch"] = training_state(1)["epoch"]
    assert_same(live, expected)


def test_an_array_that_cannot_be_written_is_a_mismatch(repo: Repository) -> None:
    repo.save({"a": np.ones(500), "b": np.ones(3)})
    live = {"a": np.zeros(500), "b": np.zeros(3)}
    live["a"].setflags(write=False)
    with pytest.raises(StateMismatchError, match="read-only"):
        repo.load("main", into=live)
    assert not live["b"].any()


def test_damage_before_anything_was_overwritten_touches_nothing(repo: Repository) -> None:
    """Leaves that live in the manifest were overwritten while the load was still being planned, and then it failed
    without a word of them.
    """
    repo.save({"big": noise(0, 5000), "n": 1})
    missing = packs_of(repo)
    repo.save({"big": noise(0, 5000), "n": 1, "tiny": np.ones(4)})
    delete_packs(repo.handle.backend, missing)
    fresh = open_on(repo.handle.backend)
    live = {"big": np.zeros(5000, np.uint8), "n": 0, "tiny": np.zeros(4)}
    with pytest.raises(ChunkMissingError, match="big"):
        fresh.load("main", into=live)
    assert_same(live, {"big": np.zeros(5000, np.uint8), "n": 0, "tiny": np.zeros(4)})


def test_a_refused_pickle_touches_nothing(repo: Repository) -> None:
    repo.save({"a": np.ones(500), "tiny": np.ones(2), "s": {1}}, allow_pickle=True)
    live = {"a": np.zeros(500), "tiny": np.zeros(2), "s": {2}}
    with pytest.raises(PickleRefusedError):
        repo.load("main", into=live)
    assert not live["a"].any()
    assert not live["tiny"].any()
    assert repo.load("main", into=live, allow_pickle=True)["s"] == {1}


def test_damage_midway_names_the_leaves_that_are_overwritten(repo: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("castore.checkpoint.fetch.worker_count", lambda: 1)  # so that "midway" is a place
    state = {f"leaf {number}": noise(number, 3000) for number in range(6)}
    repo.save({**state, "tiny": np.ones(3)})
    damage_leaf(repo, "main", "leaf 3")
    live = {**{name: np.zeros_like(array) for name, array in state.items()}, "tiny": np.zeros(3)}
    with pytest.raises(PartialLoadError, match="leaf 3") as caught:
        open_on(repo.handle.backend).load("main", into=live)
    assert caught.value.overwritten == ("leaf 0", "leaf 1", "leaf 2")
    assert isinstance(caught.value.__cause__, ChecksumError)
    for number in range(6):
        expected = state[f"leaf {number}"] if number < 3 else np.zeros(3000, np.uint8)
        assert_same(live[f"leaf {number}"], expected)
    assert not live["tiny"].any()


def test_no_unverified_byte_reaches_a_live_array(repo: Repository) -> None:
    """Of a leaf of several chunks, the damaged one is left as it was."""
    array = noise(0, 3 * MIB)
    repo.save({"a": array})
    damage_leaf(repo, "main", "a", chunk=1)
    live = {"a": np.zeros_like(array)}
    with pytest.raises(PartialLoadError) as caught:
        open_on(repo.handle.backend).load("main", into=live)
    assert caught.value.overwritten == ("a",)
    assert not live["a"][MIB : 2 * MIB].any()


def test_into_and_a_fresh_load_agree_on_every_kind_of_value(repo: Repository) -> None:
    state = {
        "int": 10**30,
        "float": -0.0,
        "bytes": b"\0" * 300,
        "text": "ä" * 500,
        "tuple": (1, (2.5, None)),
        "settings": Settings(0.1, ["a", "b"]),
        "pair": Pair(np.ones(200), "x"),
        "list": [np.zeros(3), {"deep": np.arange(400)}],
    }
    repo.save(state)
    live = {
        "int": 0,
        "float": 1.0,
        "bytes": b"",
        "text": "",
        "tuple": (0, (0.0, None)),
        "settings": Settings(0.0, []),
        "pair": Pair(np.zeros(200), ""),
        "list": [np.ones(3), {"deep": np.zeros(400, np.int64)}],
    }
    deep = live["list"][1]["deep"]
    found = repo.load("main", into=live)
    again = repo.load("main")
    assert found["settings"] == again["settings"] == state["settings"]
    assert found["pair"].second == "x"
    assert_same(found["pair"].first, state["pair"].first)
    for name in ("int", "float", "bytes", "text", "tuple", "list"):
        assert_same(found[name], again[name])
        assert_same(found[name], state[name])
    assert found["list"][1]["deep"] is deep


# ---- damage ------------------------------------------------------------------------------------------------------


def test_damage_is_found_on_read_and_the_leaf_named(repo: Repository) -> None:
    repo.save({"good": noise(0, 3000), "bad": noise(1, 3000)})
    damage_leaf(repo, "main", "bad")
    fresh = open_on(repo.handle.backend)
    for load in (
        lambda: fresh.load("main"),
        lambda: fresh.read("main", "bad"),
        lambda: fresh.load("main", verify=False),
    ):
        with pytest.raises(ChecksumError, match=r"leaf 'bad': pack .* record of chunk"):
            load()
    assert_same(fresh.read("main", "good"), noise(0, 3000))


@pytest.mark.parametrize("compression", ["auto", "none"])
def test_any_flipped_bit_of_a_pack_is_found_or_does_not_matter(compression: Any) -> None:
    """Wherever it is: in a header, a payload, the padding, the table, the trailer. Wrong values never come back."""
    repo = create_on(MemoryBackend(), RepositoryOptions(compression=compression))
    state = {"a": noise(0, 700), "b": np.arange(300.0), "c": "text" * 100, "n": 1}
    repo.save(state)
    (pack_id,) = packs_of(repo)
    backend = repo.handle.backend
    size = len(backend.read(pack_name(pack_id), max_bytes=1 << 20))
    found_out = 0
    for offset in range(0, size, 7 if compression == "auto" else 31):
        own = copied(backend)
        flip_bit(own, pack_name(pack_id), offset)
        try:
            assert_same(open_on(own).load("main"), state)
        except DamageError:
            found_out += 1
    assert found_out > 10


def test_a_checksum_that_is_right_over_wrong_bytes_is_found_by_verification_alone(repo: Repository) -> None:
    repo.save({"a": noise(0, 3000), "b": 1})
    forge_leaf(repo, "main", "a", noise(7, 3000).tobytes())
    fresh = open_on(repo.handle.backend)
    with pytest.raises(ChecksumError, match="hash to the chunk's id"):
        fresh.load("main")
    assert_same(fresh.load("main", verify=False)["a"], noise(7, 3000))
    with pytest.raises(ChecksumError):
        fresh.read("main", "a")
    assert_same(fresh.read("main", "a", verify=False), noise(7, 3000))


def test_a_second_copy_of_a_chunk_stands_in_for_a_damaged_one() -> None:
    """Two writers stored the same content at once: either copy will do."""
    backend = MemoryBackend()
    create_on(backend).save({"n": 0})
    state = {"a": noise(0, 3000)}
    first = open_on(backend)

    def save_too() -> None:
        open_on(backend).save(state, branch="other")

    hooked = open_on(HookedBackend(backend, at_call(0, save_too, operation="create_stream")))
    hooked.save(state, branch="mine")
    fresh = open_on(backend)
    assert len(packs_of(fresh)) == 3
    pack_id, row = places_of(first, "mine", "a")[0]
    flip_bit(backend, pack_name(pack_id), row.offset + 9)
    assert_same(open_on(backend).load("mine"), state)
    assert_same(open_on(backend).load("other"), state)
    assert not open_on(backend).verify(data=True).ok


def test_a_missing_pack_is_named_with_the_leaves_that_it_takes(repo: Repository) -> None:
    repo.save({"old": noise(0, 3000)})
    gone = packs_of(repo)
    repo.save({"old": noise(0, 3000), "new": noise(1, 3000)})
    delete_packs(repo.handle.backend, gone)
    fresh = open_on(repo.handle.backend)
    with pytest.raises(ChunkMissingError, match="old") as caught:
        fresh.load("main")
    assert not isinstance(caught.value, SnapshotGoneError)
    assert_same(fresh.load("main", paths=["new"]), {"new": noise(1, 3000)})
    with pytest.raises(ChunkMissingError):
        fresh.load("main~1")


def test_a_snapshot_that_is_collected_while_it_is_read_is_gone_not_damaged(repo: Repository) -> None:
    """In several packs: what is open already can be read to its end."""
    state = {"a": noise(0, 3000), "b": noise(1, 3000), "c": noise(2, 3000)}
    repo.save({"a": state["a"]})
    repo.save({"a": state["a"], "b": state["b"]})
    orphan = repo.save(state).id
    assert len(packs_of(repo)) == 3
    backend = repo.handle.backend
    calls = HookedBackend(copied(backend))
    open_on(calls).load(orphan)
    gone = 0
    for number in range(1, len(calls.calls)):
        own = copied(backend)

        def collect(own: MemoryBackend = own) -> None:
            own.delete(f"snapshots/{orphan}")
            delete_packs(own, packs_of(open_on(own)))

        fresh = open_on(HookedBackend(own, at_call(number, collect)))
        try:
            assert_same(fresh.load(orphan), state)
        except (SnapshotGoneError, UnknownRefError):
            gone += 1
    assert gone


def test_a_pack_that_was_rewritten_while_it_is_read_is_found_in_its_new_place(repo: Repository) -> None:
    """A reader holds no lease: a collector that moves live chunks must not disturb it."""
    state = {"a": noise(0, 3000), "b": noise(1, 3000)}
    repo.save(state)
    backend = repo.handle.backend
    (old,) = packs_of(repo)
    calls = HookedBackend(copied(backend))
    open_on(calls).load("main")
    for number in range(len(calls.calls)):
        own = copied(backend)

        def repack(own: MemoryBackend = own) -> None:
            other = open_on(own)
            forge_leaf(other, "main", "a", noise(0, 3000).tobytes())  # the true bytes, in a new pack

        fresh = open_on(HookedBackend(own, at_call(number, repack)))
        assert_same(fresh.load("main"), state)
        assert old not in packs_of(fresh)


def test_a_damaged_manifest_part_is_named(repo: Repository) -> None:
    repo.save({"a": noise(0, 3000)})
    (pack_id,) = packs_of(repo)
    (part,) = [row for row in rows_of(repo, pack_id) if row.raw_bytes != 3000]
    flip_bit(repo.handle.backend, pack_name(pack_id), part.offset + 3)
    with pytest.raises(DamageError):
        open_on(repo.handle.backend).load("main")
    # History needs no manifest.
    assert len(list(open_on(repo.handle.backend).log("main"))) == 1


def test_a_damaged_snapshot_file_is_damage_and_a_missing_one_unknown(repo: Repository) -> None:
    first = repo.save({"n": 1})
    second = repo.save({"n": 2})
    flip_bit(repo.handle.backend, f"snapshots/{second.id}", 40)
    fresh = open_on(repo.handle.backend)
    with pytest.raises(DamageError, match=second.id):
        fresh.load("main")
    with pytest.raises(DamageError):
        fresh.load("main~1")
    assert fresh.load(first.id) == {"n": 1}
    repo.handle.backend.delete(f"snapshots/{second.id}")
    with pytest.raises(UnknownRefError, match=second.id):
        fresh.load("main")


def test_damage_of_the_index_costs_nothing_but_time(tmp_path: Path) -> None:
    with castore.init(tmp_path / "store") as repo:
        repo.save(training_state(1))
        repo.save(training_state(2))
    for name in ("data.mdb", "lock.mdb", "index.lmdb"):
        for path in (tmp_path / "store" / "cache").rglob(name):
            path.write_bytes(b"\xff" * 5000)
    with castore.open(tmp_path / "store") as repo:
        assert_same(repo.load("main"), training_state(2))
        assert repo.save(training_state(2)).new_bytes == 0
    for path in (tmp_path / "store" / "cache").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with castore.open(tmp_path / "store") as repo:
        assert_same(repo.load("main~1"), training_state(2))
        assert repo.reindex().pack_count == 2


def test_a_file_of_another_kind_in_place_of_a_pack_is_damage(repo: Repository) -> None:
    repo.save({"a": noise(0, 3000)})
    backend = repo.handle.backend
    (pack_id,) = packs_of(repo)
    for data in (b"", b"PK\3\4", b"\0" * 4096, b"x" * 100_000):
        backend.delete(pack_name(pack_id))
        backend.put_if_absent(pack_name(pack_id), data)
        with pytest.raises((DamageError, NotFoundError, FormatError)):
            open_on(backend).load("main")


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_error_that_is_none_of_ours_stops_the_loading_too(tmp_path: Path, error: type[BaseException]) -> None:
    """All that was queued was fetched first."""
    with castore.init(tmp_path / "store") as repo:
        repo.save({"w": np.random.default_rng(0).integers(0, 256, 100 * GRID_BYTES, np.uint8)})
        fetched = 0

        def progress(done: int, total: int) -> None:
            nonlocal fetched
            fetched += 1
            raise error

        with pytest.raises(error):
            repo.load(progress=progress)
    assert fetched <= worker_count()
