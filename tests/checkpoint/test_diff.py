"""What changed between two snapshots: by ids alone, and as numbers."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import castore
from castore.api import Repository
from castore.backend import MemoryBackend
from castore.checkpoint.diff import Diff, LeafDiff
from castore.errors import DamageError, PathNotFoundError, UnknownRefError
from castore.options import MIB
from tests.checkpoint.damage import damage_leaf
from tests.checkpoint.repositories import create_on, open_on
from tests.suites.fault_backend import FaultBackend


@pytest.fixture
def repo() -> Repository:
    return create_on(MemoryBackend())


def diff_of(a: Any, b: Any, **options: Any) -> Diff:
    repo = create_on(MemoryBackend())
    repo.save(a, branch="a")
    repo.save(b, branch="b")
    found: Diff = repo.diff("a", "b", **options)
    return found


def leaf_of(a: Any, b: Any) -> LeafDiff:
    """The difference of one leaf."""
    (leaf,) = diff_of({"x": a}, {"x": b}).leaves
    return leaf


# ---- by ids ------------------------------------------------------------------------------------------------------


def test_leaves_are_added_removed_changed_or_the_same() -> None:
    diff = diff_of(
        {"same": np.ones(500), "changed": np.ones(500), "removed": 1, "number": 1, "type": 1},
        {"same": np.ones(500), "changed": np.zeros(500), "added": [2], "number": 2, "type": 1.0},
    )
    assert {leaf.path: leaf.status for leaf in diff.leaves} == {
        "added/0": "added",
        "changed": "changed",
        "number": "changed",
        "removed": "removed",
        "same": "same",
        "type": "changed",
    }
    assert [leaf.path for leaf in diff.leaves] == sorted(leaf.path for leaf in diff.leaves)
    assert [leaf.path for leaf in diff.with_status("added", "removed")] == ["added/0", "removed"]
    assert not diff.identical
    assert diff_of({"a": 1, "b": np.ones(999)}, {"b": np.ones(999), "a": 1}).identical


def test_shapes_and_dtypes_of_both_sides_are_told() -> None:
    leaf = leaf_of(np.ones((3, 4), np.float32), np.ones((12,), np.float64))
    assert (leaf.dtype_a, leaf.dtype_b, leaf.shape_a, leaf.shape_b) == ("<f4", "<f8", (3, 4), (12,))
    assert (leaf.raw_bytes_a, leaf.raw_bytes_b) == (48, 96)
    assert leaf.max_abs is None
    (gone,) = diff_of({"x": np.ones(3)}, {}).leaves
    assert (gone.shape_a, gone.shape_b, gone.dtype_b, gone.raw_bytes_b) == ((3,), (), "", 0)


def test_chunks_and_bytes_are_counted(repo: Repository) -> None:
    noise = np.random.default_rng(0).integers(0, 256, 4 * MIB, np.uint8)
    other = noise.copy()
    other[MIB] ^= 1
    repo.save({"long": noise, "gone": noise[:1000] ^ 1, "moved": noise[:5000] ^ 2})
    second = repo.save({"long": other, "here": noise[:5000] ^ 2})
    diff = repo.diff("main~1", "main", values=False)
    (leaf,) = diff.with_status("changed")
    assert (leaf.chunk_count, leaf.chunks_changed) == (4, 1)
    assert diff.bytes_shared == 3 * MIB + 5000, "what moved to another path is shared"
    assert diff.bytes_only_a == MIB + 1000
    assert diff.bytes_only_b == MIB == second.new_bytes
    assert 0 < diff.stored_only_b <= second.stored_bytes


def test_an_alias_is_compared_as_what_it_stands_for() -> None:
    shared = np.arange(500.0)
    diff = diff_of({"a": shared, "b": shared}, {"a": shared.copy(), "b": shared.copy()})
    assert diff.identical
    changed = diff_of({"a": shared, "b": shared}, {"a": shared, "b": shared + 1})
    assert [leaf.path for leaf in changed.with_status("changed")] == ["b"]
    assert changed.with_status("changed")[0].max_abs == 1.0


def test_globs_narrow_a_diff(repo: Repository) -> None:
    repo.save({"model": {"a": np.zeros(400), "b": 1}, "optimizer": {"a": 1}})
    repo.save({"model": {"a": np.ones(400), "b": 2}, "optimizer": {"a": 2, "c": 3}})
    diff = repo.diff("main~1", "main", paths=["model/**", "**/c"])
    assert [leaf.path for leaf in diff.leaves] == ["model/a", "model/b", "optimizer/c"]
    assert diff.bytes_only_b == 3200
    with pytest.raises(PathNotFoundError):
        repo.diff("main~1", "main", paths=["modle"])


def test_ids_are_compared_without_reading_a_leaf(repo: Repository) -> None:
    repo.save({"a": np.arange(50_000.0)})
    repo.save({"a": np.arange(50_000.0) + 1})
    damage_leaf(repo, "main", "a")
    damage_leaf(repo, "main~1", "a")
    counting = FaultBackend(repo.handle.backend)
    diff = open_on(counting).diff("main~1", "main", values=False)
    assert diff.with_status("changed")[0].max_abs is None
    assert sum(call.operation == "read_into" for call in counting.calls) == 2, "two parts of manifests"
    with pytest.raises(DamageError):
        open_on(repo.handle.backend).diff("main~1", "main")


def test_ids_are_compared_without_numpy(tmp_path: Path) -> None:
    with castore.init(tmp_path / "store") as repo:
        repo.save({"a": np.arange(500.0)})
        repo.save({"a": np.arange(500.0) + 1})
    program = (
        "import sys, castore\n"
        f"diff = castore.open({str(tmp_path / 'store')!r}).diff('main~1', 'main', values=False)\n"
        "assert len(diff.with_status('changed')) == 1\n"
        "assert not {'numpy', 'torch'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(castore.__file__).parents[1])


def test_both_sides_must_be_there(repo: Repository) -> None:
    repo.save({})
    for a, b in (("main~1", "main"), ("main", "mian")):
        with pytest.raises(UnknownRefError):
            repo.diff(a, b)


# ---- as numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", ["<f2", "<f4", ">f4", "<f8", "|i1", "<i2", ">i4", "<i8", "|u1", "<u4", "|b1", "<c8", ">c16"]
)
def test_numbers_are_those_of_numpy(dtype: str) -> None:
    generator = np.random.default_rng(0)
    a = generator.integers(0, 100, 3000).astype(dtype)
    b = generator.integers(0, 100, 3000).astype(dtype)
    leaf = leaf_of(a, b)
    x, y = _as_floats(a), _as_floats(b)
    assert leaf.max_abs == np.abs(y - x).max()
    assert leaf.relative_l2 == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x), rel=1e-12)
    assert leaf.cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-12)
    assert leaf.nonfinite_count == 0


def _as_floats(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind == "c":
        array = np.stack([array.real, array.imag], 1).ravel()
    return array.astype(np.float64)


finite = st.floats(-1e150, 1e150)


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=40))
def test_any_finite_numbers_are_compared(pairs: list[tuple[float, float]]) -> None:
    a, b = np.array(pairs).T.copy()
    leaf = leaf_of(a, b)
    if leaf.status == "same":
        assert a.tobytes() == b.tobytes()
        return
    assert leaf.max_abs == np.abs(b - a).max()
    assert leaf.relative_l2 is not None
    assert leaf.relative_l2 >= 0
    assert leaf.cosine is None or -1.0000001 <= leaf.cosine <= 1


def test_a_leaf_of_several_chunks_is_compared_as_one() -> None:
    a = np.random.default_rng(0).standard_normal(400_000)
    b = a.copy()
    b[[3, 200_000, 399_999]] += [1, -2, 3]
    leaf = leaf_of(a, b)
    assert leaf.max_abs == pytest.approx(3)
    assert leaf.relative_l2 == pytest.approx(math.sqrt(14) / np.linalg.norm(a))
    assert leaf.chunks_changed == 3


def test_numbers_that_are_not_finite_are_left_out_and_counted() -> None:
    a = np.array([1.0, math.nan, math.inf, 2.0])
    b = np.array([1.5, 1.0, math.inf, -math.inf])
    leaf = leaf_of(a, b)
    assert leaf.nonfinite_count == 3
    assert leaf.max_abs == 0.5
    all_nan = leaf_of(np.full(3, math.nan), np.zeros(3))
    assert (all_nan.nonfinite_count, all_nan.max_abs) == (3, 0.0)


def test_a_norm_of_zero_divides_nothing() -> None:
    grown = leaf_of(np.zeros(300), np.ones(300))
    assert (grown.relative_l2, grown.cosine, grown.max_abs) == (math.inf, None, 1.0)
    signed = leaf_of(np.zeros(3), -np.zeros(3))
    assert (signed.status, signed.relative_l2, signed.max_abs) == ("changed", 0.0, 0.0)


def test_plain_numbers_are_compared_too() -> None:
    assert leaf_of(3, 5).max_abs == 2.0
    assert leaf_of(1.5, -1.5).max_abs == 3.0
    assert leaf_of([1] * 50, [2] * 50).max_abs == 1.0
    assert leaf_of(np.float32(1), np.float32(3)).max_abs == 2.0
    assert leaf_of("a", "b").max_abs is None
    assert leaf_of(b"a", b"b").max_abs is None
    assert leaf_of(1, 1.5).max_abs is None
    assert leaf_of(None, 1).max_abs is None


def test_an_integer_beyond_any_float_is_no_number_to_compare() -> None:
    """It raised OverflowError."""
    leaf = leaf_of(10**400, 10**400 + 1)
    assert (leaf.status, leaf.max_abs, leaf.nonfinite_count) == ("changed", 0.0, 1)


def test_what_is_no_number_is_changed_and_nothing_more() -> None:
    a = np.zeros(5, [("a", "<i4"), ("b", "<f8")])
    b = a.copy()
    b["a"][0] = 1
    assert leaf_of(a, b).max_abs is None
    assert leaf_of(np.array(["x", "yz"]), np.array(["x", "yy"])).max_abs is None
    assert leaf_of(np.empty((0, 3)), np.empty((0, 3), np.float32)).max_abs is None


def test_a_diff_is_plain_json(repo: Repository) -> None:
    repo.save({"a": np.zeros(300), "n": math.nan})
    repo.save({"a": np.ones(300), "n": 1.0})
    fields = json.loads(json.dumps(repo.diff("main~1", "main").to_json(), allow_nan=False))
    assert fields["leaves"][0]["relative_l2"] == "inf"
    assert fields["leaves"][0]["shape_b"] == [300]
    assert fields["bytes_only_b"] == 2400


def test_progress_of_a_diff_grows_to_its_end(repo: Repository) -> None:
    repo.save({"a": np.zeros(300), "b": np.zeros(500), "same": 1})
    repo.save({"a": np.ones(300), "b": np.ones(500), "same": 1})
    calls: list[tuple[int, int]] = []
    repo.diff("main~1", "main", progress=lambda *call: calls.append(call))
    assert calls == [(4800, 12_800), (12_800, 12_800)]
