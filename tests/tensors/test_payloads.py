"""Reading memory: what is a view, what is a copy, and that only the range is copied."""

from __future__ import annotations

import gc
import threading
import tracemalloc
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from castore.errors import UnsupportedLeafError, UsageError
from castore.tensors import Payload, flatten
from castore.tensors.dtypes import torch_element
from tests.tensors.equality import array_bytes
from tests.tensors.strategies import TORCH_DTYPES

MIB = 1024 * 1024


def payload_of(value: Any) -> Payload:
    (payload,) = flatten(value).payloads
    assert payload is not None
    return payload


def address(view: memoryview) -> int:
    return np.frombuffer(view, np.uint8).ctypes.data


@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_a_contiguous_tensor_is_read_without_a_copy(dtype: torch.dtype) -> None:
    tensor = torch.empty(8, 8, dtype=dtype)
    assert address(payload_of(tensor).read(8, 16)) == tensor.data_ptr() + 8


def test_parameters_read_only_arrays_and_views_with_an_offset_are_read_without_a_copy() -> None:
    parameter = torch.nn.Parameter(torch.zeros(10))
    assert address(payload_of(parameter).read(4, 8)) == parameter.data_ptr() + 4
    rows = torch.arange(100.0).reshape(10, 10)[3:5]
    assert address(payload_of(rows).read(0, 8)) == rows.data_ptr()
    array = np.arange(10)
    array.flags.writeable = False
    assert address(payload_of(array).read(0, 8)) == array.ctypes.data


def test_what_is_read_cannot_be_written_to() -> None:
    view = payload_of(torch.zeros(4)).read(0, 16)
    assert view.readonly
    assert view.format == "B"
    assert view.ndim == 1


def test_a_payload_keeps_its_tensor_alive() -> None:
    tensor = torch.full((1000,), 3.0)
    alive = weakref.ref(tensor)
    payload = payload_of(tensor)
    view = payload.read(0, 4000)
    del tensor, payload
    gc.collect()
    assert alive() is not None
    assert np.frombuffer(view, "<f4").tolist() == [3.0] * 1000
    del view
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("make", [lambda: np.zeros((2048, 4096), "<f4").T, lambda: torch.zeros(2048, 4096).t().numpy()])
def test_a_range_of_a_transposed_matrix_copies_only_that_range(make: Any) -> None:
    payload = payload_of(make())
    payload.read(0, 16)
    tracemalloc.start()
    try:
        assert len(payload.read(5 * MIB, 6 * MIB)) == MIB
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1.5 * MIB


def test_ranges_may_be_read_from_many_threads() -> None:
    tensor = torch.arange(64 * 64 * 8, dtype=torch.float64).reshape(8, 64, 64).transpose(0, 2)
    payload, expected = payload_of(tensor), array_bytes(tensor)
    starts = list(range(0, payload.raw_bytes, 4096))
    with ThreadPoolExecutor(4) as pool:
        pieces = list(pool.map(lambda start: bytes(payload.read(start, start + 4096)), starts))
    assert b"".join(pieces) == expected


def test_a_gapped_hull_is_assembled_once_for_all_threads() -> None:
    base = torch.arange(4096.0).reshape(64, 64)
    flat = flatten([base[:, :40], base[:, 20:50]])
    hull = flat.payloads[-1]
    assert hull is not None
    barrier = threading.Barrier(4)

    def read(_: int) -> int:
        barrier.wait()
        return address(hull.read(0, 16))

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(read, range(4)))) == 1


@pytest.mark.parametrize(("start", "stop"), [(-1, 4), (4, 2), (0, 17), (17, 17)])
def test_ranges_outside_the_leaf_are_refused(start: int, stop: int) -> None:
    for value in (torch.zeros(4), torch.zeros(2, 2).t(), b"0123456789abcdef"):
        with pytest.raises(UsageError, match="expected a range"):
            payload_of(value).read(start, stop)


@pytest.mark.parametrize(
    ("value", "item_bytes", "is_float"),
    [
        (torch.zeros(1), 4, True),
        (torch.zeros(1, dtype=torch.bfloat16), 2, True),
        (torch.zeros(1, dtype=torch.float8_e5m2), 1, True),
        (torch.zeros(1, dtype=torch.complex64), 4, True),
        (torch.zeros(1, dtype=torch.complex128), 8, True),
        (torch.zeros(1, dtype=torch.int64), 8, False),
        (torch.zeros(1, dtype=torch.bool), 1, False),
        (np.zeros(1, "<f8"), 8, True),
        (np.zeros(1, ">f8"), 8, False),
        (np.zeros(1, "<c8"), 4, True),
        (np.zeros(1, "<U7"), 4, False),
        (np.zeros(1, "|S7"), 1, False),
        (np.zeros(1, "<M8[s]"), 8, False),
        (np.zeros(1, "<f16"), 8, False),
        (np.zeros(1, [("a", "<f4"), ("b", "<f4")]), 1, False),
        ([1.5] * 40, 8, True),
        ((1,) * 40, 8, False),
        ("text", 1, False),
    ],
)
def test_the_codec_learns_what_the_numbers_are(value: Any, item_bytes: int, is_float: bool) -> None:
    payload = payload_of(value)
    assert (payload.item_bytes, payload.is_float) == (item_bytes, is_float)


def test_overlapping_views_tell_the_codec_what_they_agree_on() -> None:
    base = torch.zeros(8)
    agreed = flatten([base, base[1:]]).payloads[-1]
    mixed = flatten([base, base.view(torch.int16)]).payloads[-1]
    assert agreed is not None
    assert mixed is not None
    assert (agreed.item_bytes, agreed.is_float) == (4, True)
    assert (mixed.item_bytes, mixed.is_float) == (1, False)


def test_every_dtype_of_this_torch_has_an_element() -> None:
    for dtype in TORCH_DTYPES:
        element = torch_element(dtype)
        assert element.item_bytes == dtype.itemsize
        assert element.plane_bytes in {1, 2, 4, 8}


def test_a_tensor_without_memory_is_refused_instead_of_read() -> None:
    freed = torch.zeros(10)
    freed.untyped_storage().resize_(0)
    with pytest.raises(UnsupportedLeafError, match="storage was freed"):
        flatten({"w": freed})
    with pytest.raises(UnsupportedLeafError, match="has no data"):
        flatten({"w": torch.zeros(2, device="meta")})


@pytest.mark.parametrize("bits", [0x7FC00123, 0x7F800001, 0x80000000, 0x00000001, 0xFFFFFFFF])
def test_lazily_conjugated_and_negated_tensors_keep_their_bits(bits: int) -> None:
    raw = np.array([bits, bits], "<u4")
    number = torch.from_numpy(raw.view("<c8").copy()).repeat(5)
    flipped = np.tile(np.array([bits, bits ^ 0x80000000], "<u4"), 5)
    assert payload_of(number.conj()).read(0, 40).tobytes() == flipped.tobytes()
    negated = torch._neg_view(torch.from_numpy(raw.view("<f4").copy()).repeat(5))
    assert payload_of(negated).read(4, 36).tobytes() == (np.tile(raw, 5) ^ 0x80000000).astype("<u4").tobytes()[4:36]
