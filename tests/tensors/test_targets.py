"""Places for loaded bytes: new arrays with their layout, live arrays of any layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from castore.errors import CastoreError, FormatError, UsageError
from castore.format.manifest import Entry, Kind
from castore.tensors import allocate, flatten, live_target
from castore.tensors.arrays import describe
from castore.tensors.targets import HUGE_PAGES_BYTES_MIN, advise_huge_pages
from tests.tensors.equality import array_bytes
from tests.tensors.round_trip import write_pieces
from tests.tensors.strategies import TORCH_DTYPES, ndarrays, tensors


def entry_of(value: Any) -> Entry:
    return flatten(value).entries[0]


def tensor_entry(shape: tuple[int, ...], dtype: str = "float32", **fields: Any) -> Entry:
    item_bytes = getattr(torch, dtype).itemsize
    return Entry("w", Kind.TENSOR, dtype, shape, raw_bytes=int(np.prod(shape, dtype=int)) * item_bytes, **fields)


@given(tensors() | ndarrays())
def test_new_arrays_have_the_layout_of_the_saved_one(value: Any) -> None:
    made, target = allocate(entry_of(value))
    assert tuple(made.shape) == tuple(value.shape)
    assert made.dtype == value.dtype
    assert target.raw_bytes == value.nbytes


@given(tensors(), st.binary(min_size=16, max_size=16))
def test_a_live_tensor_of_any_layout_takes_the_bytes(tensor: torch.Tensor, pattern: bytes) -> None:
    entry = entry_of(tensor)
    data = (pattern * (entry.raw_bytes // 16 + 1))[: entry.raw_bytes]
    if describe(tensor, "").may_overlap_itself:
        with pytest.raises(UsageError, match="expanded"):
            live_target(tensor, entry)
        return
    target = live_target(tensor, entry)
    pointer = tensor.data_ptr()
    write_pieces(target, data)
    assert tensor.data_ptr() == pointer
    assert array_bytes(tensor) == data


@given(ndarrays(), st.binary(min_size=16, max_size=16))
def test_a_live_ndarray_of_any_layout_takes_the_bytes(array: np.ndarray[Any, Any], pattern: bytes) -> None:
    entry = entry_of(array)
    data = (pattern * (entry.raw_bytes // 16 + 1))[: entry.raw_bytes]
    if not array.flags.writeable:
        with pytest.raises(UsageError, match="read-only"):
            live_target(array, entry)
        return
    write_pieces(live_target(array, entry), data, piece_bytes=5)
    assert array_bytes(array) == data


def test_only_new_row_major_arrays_on_the_host_are_direct() -> None:
    plain = tensor_entry((4, 4))
    assert allocate(plain)[1].direct
    assert not allocate(tensor_entry((4, 4), hints={"stride": [1, 4]}))[1].direct
    live = live_target(torch.zeros(4, 4), plain)
    assert not live.direct
    with pytest.raises(UsageError, match="use write"):
        live.memory()


def test_the_memory_of_a_new_tensor_is_the_tensor() -> None:
    value, target = allocate(tensor_entry((3,)))
    target.memory()[:] = np.array([1, 2, 3], "<f4").tobytes()
    assert value.tolist() == [1, 2, 3]


def test_filling_a_parameter_that_requires_grad_works_and_counts_as_a_change() -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    loss = (weight * weight).sum()
    version = weight._version
    write_pieces(live_target(weight, entry_of(weight)), np.ones(3, "<f4").tobytes())
    assert weight.tolist() == [1, 1, 1]
    assert weight.is_leaf
    assert weight._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_inference_tensor_can_be_filled() -> None:
    with torch.inference_mode():
        value = torch.zeros(3)
    write_pieces(live_target(value, entry_of(value)), np.ones(3, "<f4").tobytes())
    assert value.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("live", "entry"),
    [
        (torch.zeros(3), tensor_entry((4,))),
        (torch.zeros(3), tensor_entry((3,), "float16")),
        (torch.zeros(3, dtype=torch.float64), tensor_entry((3,))),
        (np.zeros(3, "<f4"), tensor_entry((3,))),
        (torch.zeros(1).expand(3), tensor_entry((3,))),
    ],
)
def test_a_live_array_of_another_form_is_refused(live: Any, entry: Entry) -> None:
    with pytest.raises(UsageError, match="leaf 'w'"):
        live_target(live, entry)


@pytest.mark.parametrize(
    "entry",
    [
        Entry("w", Kind.TENSOR, "float32", (3,), raw_bytes=13),
        Entry("w", Kind.TENSOR, "float33", (3,), raw_bytes=12),
        Entry("w", Kind.TENSOR, "quint8", (3,), raw_bytes=3),
        Entry("w", Kind.TENSOR, "float", (3,), raw_bytes=12),
        Entry("w", Kind.TENSOR, "<f4", (3,), raw_bytes=12),
        Entry("w", Kind.NDARRAY, "float32", (3,), raw_bytes=12),
        Entry("w", Kind.NDARRAY, "|O", (3,), raw_bytes=24),
        Entry("w", Kind.NDARRAY, "<f5", (3,), raw_bytes=12),
        Entry("w", Kind.NDARRAY, "<i4,<i4", (3,), raw_bytes=24),
        Entry("w", Kind.NDARRAY, "|V8", (3,), attrs={"descr": [8, False, [["a", None, "|O", [], 0]]]}, raw_bytes=24),
        Entry("w", Kind.NDARRAY, "|V8", (3,), attrs={"descr": [8, False, [["a", None, "<i8", [], 4]]]}, raw_bytes=24),
        Entry("w", Kind.NDARRAY, "|V8", (3,), attrs={"descr": "x"}, raw_bytes=24),
        Entry("w", Kind.TENSOR, "float32", (0, 2**70), raw_bytes=0),
        Entry("w", Kind.NDARRAY, "<f4", (0, 2**70), raw_bytes=0),
        Entry("w", Kind.TENSOR, "float32", (1,) * 65, raw_bytes=4),
        tensor_entry((2, 3), hints={"stride": [1, 1]}),
        tensor_entry((2, 3), hints={"stride": [2**40, 1]}),
        tensor_entry((2, 3), hints={"stride": [-3, 1]}),
        tensor_entry((2, 3), hints={"stride": [1]}),
        tensor_entry((2, 3), hints={"stride": "31"}),
    ],
)
def test_an_entry_that_makes_no_sense_is_refused_before_anything_is_allocated(entry: Entry) -> None:
    with pytest.raises(FormatError, match="leaf 'w'"):
        allocate(entry)


@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_every_dtype_can_be_allocated_and_filled(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    data = bytes(range(6 * dtype.itemsize))
    for hints in ({}, {"stride": [1, 2]}):
        value, target = allocate(tensor_entry((2, 3), name, hints=hints))
        write_pieces(target, data)
        assert value.dtype is dtype
        assert array_bytes(value) == data


def test_a_large_new_tensor_is_filled_as_any_other() -> None:
    count = HUGE_PAGES_BYTES_MIN // 4 + 3
    value, target = allocate(tensor_entry((count,)))
    target.memory()[:] = np.arange(count, dtype="<f4").tobytes()
    assert torch.equal(value, torch.arange(count, dtype=torch.float32))


def test_bad_advice_to_the_kernel_is_harmless() -> None:
    advise_huge_pages(4096, 1 << 20)
    advise_huge_pages(1, 10)


def test_a_kind_without_an_array_is_refused() -> None:
    with pytest.raises(UsageError, match="INT is no array"):
        allocate(Entry("w", Kind.INT, raw_bytes=1))


def test_the_device_can_be_chosen() -> None:
    value, _ = allocate(tensor_entry((3,), hints={"device": "cuda:7"}))
    assert value.device.type == "cpu"
    with pytest.raises((CastoreError, RuntimeError, AssertionError)):
        allocate(tensor_entry((3,)), device="cuda:99")


def test_a_range_outside_the_leaf_is_refused() -> None:
    _, target = allocate(tensor_entry((3,)))
    with pytest.raises(UsageError, match="expected a range"):
        target.write(8, b"12345678")
