"""Arrays over memory that holds their bytes already."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given

from castore.errors import FormatError
from castore.format.manifest import Entry, Kind
from castore.tensors import adopt, can_adopt, flatten
from tests.tensors.equality import array_bytes
from tests.tensors.strategies import ndarrays, tensors


def memory_of(raw: bytes, *, offset: int = 0) -> memoryview:
    """Writable memory at an address that is `offset` more than a multiple of 64."""
    memory = bytearray(len(raw) + 128)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    start = -address % 64 + offset
    view = memoryview(memory)[start : start + len(raw)]
    view[:] = raw
    return view


def row_major_entry(value: Any) -> Entry:
    entry = flatten(value).entries[0]
    hints = {name: hint for name, hint in entry.hints.items() if name != "stride"}
    return Entry(entry.path, entry.kind, entry.dtype, entry.shape, entry.attrs, hints, entry.raw_bytes)


@given(tensors() | ndarrays())
def test_an_array_takes_the_memory_for_its_own(value: Any) -> None:
    entry = row_major_entry(value)
    if entry.kind not in (Kind.TENSOR, Kind.NDARRAY) or not entry.raw_bytes:
        return
    memory = memory_of(array_bytes(value))
    made = adopt(entry, memory)
    assert made is not None
    assert (made.dtype, tuple(made.shape)) == (value.dtype, tuple(value.shape))
    assert array_bytes(made) == array_bytes(value)
    memory[0] ^= 255
    assert array_bytes(made)[0] == memory[0], "it is the same memory"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("offset", [0, 1, 2, 4, 8, 16])
def test_a_tensor_is_only_made_at_a_multiple_of_its_width(dtype: torch.dtype, offset: int) -> None:
    value = torch.arange(100).to(dtype)
    made = adopt(row_major_entry(value), memory_of(array_bytes(value), offset=offset))
    assert (made is not None) is (offset % dtype.itemsize == 0)
    assert made is None or torch.equal(made, value)


def test_an_ndarray_is_only_made_where_numpy_calls_it_aligned() -> None:
    value = np.arange(100.0)
    assert adopt(row_major_entry(value), memory_of(value.tobytes(), offset=4)) is None
    packed = np.zeros(10, [("a", "|u1"), ("b", "<f8")])
    made = adopt(row_major_entry(packed), memory_of(packed.tobytes(), offset=3))
    assert made is not None, "a packed record has no alignment to keep"


def test_the_storage_is_the_leaf_and_no_more() -> None:
    value = torch.arange(100.0)
    whole = memory_of(bytes(1000))
    made = adopt(row_major_entry(value), whole[160:560])
    assert made is not None
    assert made.untyped_storage().nbytes() == 400


def test_an_entry_that_contradicts_itself_is_refused() -> None:
    for entry in (
        Entry("w", Kind.TENSOR, "float32", (100,), raw_bytes=404, chunks=b"x"),
        Entry("w", Kind.TENSOR, "no such", (100,), raw_bytes=400, chunks=b"x"),
        Entry("w", Kind.TENSOR, "<f4", (100,), raw_bytes=400, chunks=b"x"),
        Entry("w", Kind.NDARRAY, "<f4", (50, 3), raw_bytes=400, chunks=b"x"),
        Entry("w", Kind.NDARRAY, "|O", (50,), raw_bytes=400, chunks=b"x"),
        Entry("w", Kind.TENSOR, "quint8", (400,), raw_bytes=400, chunks=b"x"),
    ):
        with pytest.raises(FormatError):
            adopt(entry, memory_of(bytes(entry.raw_bytes)))


def test_what_can_be_adopted() -> None:
    plain = Entry("w", Kind.TENSOR, "float32", (100,), raw_bytes=400, chunks=b"x")
    array = Entry("w", Kind.NDARRAY, "<f4", (100,), raw_bytes=400, chunks=b"x")
    strided = Entry("w", Kind.TENSOR, "float32", (10, 10), hints={"stride": [1, 10]}, raw_bytes=400, chunks=b"x")
    text = Entry("w", Kind.STR, raw_bytes=400, chunks=b"x")
    inline = Entry("w", Kind.TENSOR, "float32", (1,), raw_bytes=4, inline=b"1234")
    devices: list[Any] = [None, "cpu", torch.device("cpu", 0), "cuda", "meta", torch.device("cuda", 1), 0]
    assert [can_adopt(plain, device=device) for device in devices] == [True] * 3 + [False] * 4
    assert all(can_adopt(array, device=device) for device in devices)
    assert not any(can_adopt(entry) for entry in (strided, text, inline))
