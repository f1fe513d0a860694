"""Mapped leaves: what is mapped and what is copied, what a write reaches, what outlives what, and damage."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import castore
from castore.api import Repository
from castore.backend import LocalBackend, MemoryBackend
from castore.backend.local import LocalReader
from castore.checkpoint import mapping
from castore.errors import ChecksumError, DamageError, PickleRefusedError, UsageError
from castore.format.layout import PACKS, pack_name
from castore.options import MIB, RUN_BYTES_MIN, RepositoryOptions
from castore.store import ChunkStore
from tests.checkpoint.damage import flip_bit, places_of, rows_of
from tests.checkpoint.repositories import create_on, delete_packs, packs_of
from tests.checkpoint.states import assert_same
from tests.suites.forked import in_child

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc tells what is mapped"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),  # Python 3.12: our children are tame
]


@pytest.fixture
def repo(tmp_path: Path) -> Repository:
    return castore.init(tmp_path / "store", compression="none")


def noise(seed: int, count: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(count).astype(np.float32))


def assert_equal(found: Any, expected: Any) -> None:
    """Equal structure, types, dtypes, shapes and strides, and every bit."""
    assert_same(as_arrays(found), as_arrays(expected))


def as_arrays(state: Any) -> Any:
    """The state with each tensor as what it is and the bytes that it has."""
    if isinstance(state, torch.Tensor):
        raw = state.detach().contiguous().view(-1).view(torch.uint8).numpy()
        return (type(state).__name__, str(state.dtype), tuple(state.shape), state.stride(), state.requires_grad, raw)
    if isinstance(state, dict):
        return {key: as_arrays(value) for key, value in state.items()}
    if isinstance(state, list):
        return [as_arrays(value) for value in state]
    return state


def mapped_file(array: Any) -> str:
    """The file that the memory of an array is mapped from; empty for ordinary memory."""
    address = array.data_ptr() if isinstance(array, torch.Tensor) else array.ctypes.data
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, _, *name = line.split(maxsplit=5)
        low, high = (int(part, 16) for part in span.split("-"))
        if low <= address < high:
            return name[0] if name else ""
    raise AssertionError(f"nothing is at {address:#x}")


def is_mapped(array: Any) -> bool:
    return ".pack" in mapped_file(array)


def pack_files(repo: Repository) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in (repo.path / PACKS).rglob("*.pack")}


# ---- what is mapped ----------------------------------------------------------------------------------------------


def test_raw_leaves_are_mapped_and_equal(repo: Repository) -> None:
    state = {
        "weight": noise(0, 600_000).view(600, 1000),
        "small": noise(1, 100),
        "bf16": noise(2, 50_000).bfloat16(),
        "flags": torch.arange(3000) % 2 == 0,
        "array": np.arange(70_000, dtype=np.int64).reshape(7, 10_000),
        "records": np.zeros(900, [("a", "<i2"), ("b", ">f8")]),
        "parameter": torch.nn.Parameter(noise(3, 40_000)),
        "inline": torch.ones(3),
        "empty": torch.empty(0, 5),
        "number": 3,
    }
    repo.save(state)
    found = repo.load(mmap=True)
    assert_equal(found, state)
    assert isinstance(found["parameter"], torch.nn.Parameter)
    for name in ("weight", "small", "bf16", "flags", "array", "records", "parameter"):
        assert is_mapped(found[name]), name
        assert not is_mapped(repo.load()[name]), name
    assert not is_mapped(found["inline"])


@pytest.mark.parametrize("value", [noise(0, 64).to(torch.complex128), np.arange(400, dtype=np.longdouble)], ids=str)
def test_what_does_not_lie_on_a_multiple_of_its_width_is_copied(repo: Repository, value: Any) -> None:
    """Records begin on multiples of 8, runs on pages."""
    long = torch.zeros(RUN_BYTES_MIN // 16, dtype=torch.complex128)
    states = [{"value": value, "long": long}, {"other": noise(1, 101).double(), "value": value, "long": long}]
    mapped = []
    for index, state in enumerate(states):
        other = castore.init(repo.path.parent / f"store {index}", compression="none")
        other.save(state)
        found = other.load(mmap=True)
        assert_equal(found, state)
        (_, row), *_ = places_of(other, "main", "value")
        assert is_mapped(found["value"]) is (row.offset % 16 == 0)
        assert is_mapped(found["long"])
        mapped.append(is_mapped(found["value"]))
    assert not all(mapped), "neither place was misaligned: the test needs another neighbour"


def test_strides_are_restored_by_copying(repo: Repository) -> None:
    state = {
        "image": noise(0, 2 * 3 * 40 * 50).view(2, 3, 40, 50).to(memory_format=torch.channels_last),
        "fortran": np.asfortranarray(np.arange(24_000.0).reshape(600, 40)),
    }
    repo.save(state)
    found = repo.load(mmap=True)
    assert_equal(found, state)
    assert found["image"].stride() == state["image"].stride()  # type: ignore[attr-defined]
    assert found["fortran"].flags.f_contiguous
    assert not is_mapped(found["image"])
    assert not is_mapped(found["fortran"])


def test_aliases_and_views_share_the_mapping(repo: Repository) -> None:
    whole = noise(0, 100_000)
    state = {"tied": [whole, whole], "head": whole[:60_000], "tail": whole[40_000:]}
    repo.save(state)
    found = repo.load(mmap=True)
    assert_equal(found, state)
    assert is_mapped(found["tied"][0])
    found["tied"][0][50_000] = 7
    assert found["tied"][1][50_000] == found["head"][50_000] == found["tail"][10_000] == 7


def test_a_leaf_that_shares_chunks_with_another_is_copied(repo: Repository) -> None:
    first = noise(0, 3 * MIB // 4)
    second = torch.cat([first[: MIB // 4], noise(1, 2 * MIB // 4)])
    repo.save({"first": first, "second": second})
    found = repo.load(mmap=True)
    assert_equal(found, {"first": first, "second": second})
    assert is_mapped(found["first"])
    assert not is_mapped(found["second"])


def test_a_long_leaf_that_shares_little_is_stored_whole_to_be_mapped(repo: Repository) -> None:
    """The moments of an embedding share the zeros of rows that no token has touched; 47 MB were copied for 1 MiB."""
    shared = noise(0, MIB // 4)
    state = {"a": torch.cat([noise(1, 7 * MIB // 4), shared]), "b": torch.cat([noise(2, 7 * MIB // 4), shared])}
    snapshot = repo.save(state)
    assert snapshot.new_bytes == 15 * MIB, "what is written twice is new once"
    assert snapshot.stored_bytes > 16 * MIB
    found = repo.load(mmap=True)
    assert_equal(found, state)
    assert is_mapped(found["a"])
    assert is_mapped(found["b"])
    assert repo.save(state).stored_bytes < MIB


@pytest.mark.parametrize("compression", ["auto", "lz4"])
def test_encoded_leaves_are_copied(tmp_path: Path, compression: Any) -> None:
    state = {
        "encoded": torch.arange(500_000),
        "raw": torch.from_numpy(np.random.default_rng(0).integers(0, 256, 200_000, np.uint8)),
    }
    repo = castore.init(tmp_path / "store", compression=compression)
    repo.save(state)
    found = repo.load(mmap=True)
    assert_equal(found, state)
    assert not is_mapped(found["encoded"])
    assert is_mapped(found["raw"])


def test_a_backend_that_maps_nothing_is_read() -> None:
    repo = create_on(MemoryBackend(), RepositoryOptions(compression="none"))
    state = {"weight": noise(0, 400_000)}
    repo.save(state)
    assert_equal(repo.load(mmap=True), state)


def test_only_what_was_chosen_is_mapped_and_nothing_is_read(repo: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    repo.save({f"leaf {number}": noise(number, 300_000) for number in range(5)})
    (_, row), *_ = places_of(repo, "main", "leaf 3")
    spans: list[tuple[int, int]] = []
    hints: list[tuple[int, int]] = []
    sizes: list[int] = []
    plain_map, plain_read = LocalReader.map_range, LocalReader.read_into

    def map_range(self: LocalReader, offset: int, size_bytes: int) -> memoryview:
        spans.append((offset, size_bytes))
        return plain_map(self, offset, size_bytes)

    def read_into(self: LocalReader, offset: int, target: memoryview) -> None:
        sizes.append(len(target))
        plain_read(self, offset, target)

    def will_need(self: LocalReader, offset: int, size_bytes: int) -> None:
        hints.append((offset, size_bytes))

    fresh = castore.open(repo.path)
    assert fresh.snapshot().leaves
    monkeypatch.setattr(LocalReader, "will_need", will_need)
    monkeypatch.setattr(LocalReader, "map_range", map_range)
    monkeypatch.setattr(LocalReader, "read_into", read_into)
    found = fresh.load(paths=["leaf 3"], mmap=True)
    assert is_mapped(found["leaf 3"])
    assert spans == hints == [(row.offset, 1_200_000)]
    assert not sizes


def test_no_more_is_read_ahead_than_fits_into_memory(repo: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    repo.save({"a": noise(0, 300_000), "b": noise(1, 300_000)})
    hints: list[int] = []
    monkeypatch.setattr(LocalReader, "will_need", lambda _self, _offset, size_bytes: hints.append(size_bytes))
    monkeypatch.setattr(mapping, "available_bytes", lambda: 4 * 2_400_000)
    assert is_mapped(repo.load(mmap=True)["b"])
    assert hints == []
    monkeypatch.setattr(mapping, "available_bytes", lambda: 5 * 2_400_000)
    repo.load(mmap=True)
    assert 2_400_000 <= sum(hints) < 2_500_000


def test_where_the_values_go(repo: Repository) -> None:
    repo.save({"weight": noise(0, 100_000), "array": np.arange(50_000)})
    found = repo.load(mmap=True, device=torch.device("cpu"))
    assert is_mapped(found["weight"])
    found = repo.load(mmap=True, device="meta")
    assert found["weight"].device.type == "meta"
    assert is_mapped(found["array"])
    with pytest.raises(UsageError, match="choose"):
        repo.load(mmap=True, into={"weight": torch.zeros(100_000), "array": np.arange(50_000)})


def test_pickles_are_refused_before_anything_is_mapped(repo: Repository) -> None:
    repo.save({"odd": {1, 2}, "weight": noise(0, 100_000)}, allow_pickle=True)
    with pytest.raises(PickleRefusedError):
        repo.load(mmap=True)
    assert repo.load(mmap=True, allow_pickle=True)["odd"] == {1, 2}


@pytest.mark.parametrize("verify", [None, True, False])
def test_progress_grows_to_its_end(repo: Repository, verify: bool | None) -> None:
    first = noise(0, 3 * MIB // 4)
    repo.save({"mapped": first, "copied": torch.cat([first[: MIB // 4], noise(1, 100_000)]), "n": 1})
    calls: list[tuple[int, int]] = []
    repo.load(mmap=True, verify=verify, progress=lambda *call: calls.append(call))
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1] == (4 * MIB + 400_000, 4 * MIB + 400_000)


# ---- writing -----------------------------------------------------------------------------------------------------


def test_a_write_never_reaches_the_disk(repo: Repository) -> None:
    state = {"weight": noise(0, 600_000), "array": np.arange(100_000)}
    repo.save(state)
    before = pack_files(repo)
    found = repo.load(mmap=True)
    other = repo.load(mmap=True)
    found["weight"].mul_(3).add_(1)
    found["array"][:] = -1
    os.sync()
    assert pack_files(repo) == before
    assert_equal(other, state)
    assert_equal(repo.load(verify=True), state)
    assert (found["array"] == -1).all()
    assert torch.equal(found["weight"], state["weight"] * 3 + 1)


def test_training_goes_on_from_a_mapped_state(repo: Repository) -> None:
    model = torch.nn.Linear(300, 300)
    repo.save({"model": model.state_dict()}, step=1)
    fresh = torch.nn.Linear(300, 300)
    fresh.load_state_dict(repo.load(mmap=True)["model"], assign=True)
    fresh(torch.ones(2, 300)).sum().backward()
    torch.optim.SGD(fresh.parameters(), lr=0.1).step()
    repo.save({"model": fresh.state_dict()}, step=2)
    assert_equal(repo.load("main~1")["model"], model.state_dict())
    assert_equal(repo.load()["model"], fresh.state_dict())
    assert not torch.equal(fresh.bias, model.bias)


def test_one_tensor_is_pickled_without_its_neighbours(repo: Repository, tmp_path: Path) -> None:
    repo.save({"small": noise(0, 1000), "large": noise(1, 900_000)})
    torch.save(repo.load(mmap=True)["small"], tmp_path / "small.pt")
    assert (tmp_path / "small.pt").stat().st_size < 20_000


# ---- what outlives what ------------------------------------------------------------------------------------------


def remove_packs(repo: Repository) -> None:
    delete_packs(repo.handle.backend, packs_of(repo))


@pytest.mark.parametrize(
    "end", [remove_packs, Repository.close, lambda repo: shutil.rmtree(repo.path)], ids=["gc", "close", "rm -r"]
)
def test_the_mapping_outlives_the_pack_and_the_repository(repo: Repository, end: Callable[[Repository], None]) -> None:
    state = {"weight": noise(0, 600_000), "array": np.arange(100_000)}
    repo.save(state)
    found = castore.open(repo.path).load(mmap=True)
    end(repo)
    gc.collect()
    assert_equal(found, state)


def test_the_mapping_ends_with_its_last_array(repo: Repository) -> None:
    repo.save({"a": noise(0, 300_000), "b": np.arange(100_000)})
    name = mapped_file((found := repo.load(mmap=True))["a"])
    view = found["b"][5:]
    del found
    gc.collect()
    assert name in Path("/proc/self/maps").read_text()
    del view
    gc.collect()
    assert name not in Path("/proc/self/maps").read_text()


def test_a_forked_child_has_the_values_and_writes_to_its_own(repo: Repository) -> None:
    state = {"weight": noise(0, 600_000)}
    repo.save(state)
    before = pack_files(repo)
    found = repo.load(mmap=True)
    found["weight"][0] = 5

    def child() -> tuple[float, bool]:
        # With numpy: torch's threads are not there in a child.
        seen = float(found["weight"].numpy()[0])
        found["weight"].numpy()[:] = 0
        again = castore.open(repo.path).load(mmap=True)
        return seen, np.array_equal(again["weight"].numpy(), state["weight"].numpy())

    assert in_child(child) == (5.0, True)
    assert found["weight"][0] == 5
    assert torch.equal(found["weight"][1:], state["weight"][1:])
    assert pack_files(repo) == before


# ---- damage ------------------------------------------------------------------------------------------------------


def test_mapped_bytes_are_hashed_when_asked_for(repo: Repository) -> None:
    repo.save({"weight": noise(0, 600_000), "whole": noise(1, 300_000)})
    pack_id, row = places_of(repo, "main", "weight")[1]
    flip_bit(repo.handle.backend, pack_name(pack_id), row.offset + 100)
    rotten = castore.open(repo.path).load(mmap=True)["weight"]
    assert is_mapped(rotten)
    assert int((rotten != noise(0, 600_000)).sum()) == 1, "the default trusts the payload"
    with pytest.raises(ChecksumError, match="weight"):
        castore.open(repo.path).load(mmap=True, verify=True)
    assert not castore.open(repo.path).verify(data=True).ok
    sound = castore.open(repo.path).load(mmap=True, verify=True, paths=["whole"])
    assert is_mapped(sound["whole"])


def test_with_verify_a_rotten_leaf_is_read_from_elsewhere(repo: Repository, tmp_path: Path) -> None:
    state = {"weight": noise(0, 600_000)}
    repo.save(state)
    (pack_id,) = packs_of(repo)
    other = castore.init(tmp_path / "other", compression="none")
    other.save({"n": 1, **state})
    (copy_id,) = packs_of(other)
    shutil.copytree(other.path / PACKS, repo.path / PACKS, dirs_exist_ok=True)
    for damaged in (pack_id, copy_id):
        fresh = castore.init(tmp_path / damaged, compression="none")
        shutil.copytree(repo.path, fresh.path, dirs_exist_ok=True)
        row = next(row for row in rows_of(repo, damaged) if row.in_run)
        flip_bit(LocalBackend(fresh.path), pack_name(damaged), row.offset)
        assert_equal(castore.open(fresh.path).load(mmap=True, verify=True), state)


@pytest.mark.parametrize("opened_before", [True, False])
def test_a_pack_cut_short_is_an_error_and_no_signal(repo: Repository, opened_before: bool) -> None:
    """Also for a handle that opened the pack, and read the manifest at its end, when it was whole."""
    repo.save({"weight": noise(0, 600_000)})
    (path,) = (repo.path / PACKS).rglob("*.pack")

    def child() -> str:
        fresh = castore.open(repo.path)
        if opened_before:
            fresh.load(mmap=True)
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(DamageError) as caught:
            fresh.load(mmap=True)["weight"].numpy().sum()
        return str(caught.value)

    message = in_child(child)
    assert "truncated" in message
    assert ("weight" in message) is opened_before


def test_without_its_table_a_pack_is_read_and_not_mapped(repo: Repository) -> None:
    """Nothing vouches for the places then, but hashes do for the bytes."""
    state = {"weight": noise(0, 600_000)}
    repo.save(state)
    (path,) = (repo.path / PACKS).rglob("*.pack")
    os.truncate(path, path.stat().st_size - 1)
    found = castore.open(repo.path).load(mmap=True)
    assert_equal(found, state)
    assert not is_mapped(found["weight"])


def test_a_lying_index_maps_nothing_false(repo: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a hash of the bytes nobody would notice: the pack's own table has the last word."""
    state = {"a": noise(0, 300_000), "b": noise(1, 300_000)}
    repo.save(state)
    ((a_pack, a_row), *_), ((_, b_row), *_) = (places_of(repo, "main", name) for name in "ab")
    locate = ChunkStore.locate

    def lying(self: ChunkStore, ids: Any) -> Any:
        return {
            key: tuple(
                hit if hit.row != a_row else type(hit)(a_pack, replace(a_row, offset=b_row.offset)) for hit in hits
            )
            for key, hits in locate(self, ids).items()
        }

    monkeypatch.setattr(ChunkStore, "locate", lying)
    found = castore.open(repo.path).load(mmap=True)
    assert_equal(found, state)
    assert not is_mapped(found["a"])
    assert is_mapped(found["b"])
