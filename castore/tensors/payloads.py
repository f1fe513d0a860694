"""Payload: the logical row-major bytes of one leaf, read range by range and copied only when they must be.

    value                              read(start, stop)
    bytes of a scalar                  slice of them
    row-major array in host memory     view of the array's own memory
    any other array in host memory     copy of that range
    conjugated or negated tensor       copy of that range
    tensor on a device                 copy of that range into host memory
    hull of overlapping views          view where views cover all of it, else a copy with the gaps as zeros

A payload keeps its value alive. Reading is thread-safe; what is read is what the memory holds at that moment.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from castore.errors import UsageError
from castore.tensors.arrays import Array, words_on_device, words_on_host
from castore.tensors.lazy import require_torch
from castore.tensors.strided import (
    Bytes,
    gather,
    host_words,
    memory_array,
    rectangle_count,
    rectangles,
)


class Payload(Protocol):
    """The logical row-major little-endian bytes of one leaf.

    Contract: `read` returns bytes start..stop as a one-dimensional memoryview of format "B"; it may be called
    from any thread, with any range inside 0..raw_bytes, any number of times.
    """

    @property
    def raw_bytes(self) -> int:
        """Length of the leaf."""
        ...

    @property
    def item_bytes(self) -> int:
        """Width of the numbers inside, for byte planes: 1, 2, 4 or 8."""
        ...

    @property
    def is_float(self) -> bool:
        """Whether these numbers are binary floating point (complex: pairs of such)."""
        ...

    def read(self, start: int, stop: int) -> memoryview:
        """Bytes start..stop."""
        ...


def _check_range(start: int, stop: int, raw_bytes: int) -> None:
    if not 0 <= start <= stop <= raw_bytes:
        raise UsageError(f"expected a range inside 0..{raw_bytes}, found {start}..{stop}")


class BytesPayload:
    """The payload of a value that was encoded into bytes."""

    __slots__ = ("_data", "is_float", "item_bytes", "raw_bytes")

    def __init__(self, data: bytes, *, item_bytes: int = 1, is_float: bool = False) -> None:
        self._data = data
        self.raw_bytes = len(data)
        self.item_bytes = item_bytes
        self.is_float = is_float

    def read(self, start: int, stop: int) -> memoryview:
        """A slice, without a copy."""
        _check_range(start, stop, self.raw_bytes)
        return memoryview(self._data)[start:stop]


class ArrayPayload:
    """The payload of a tensor or ndarray. `array` says where it lies."""

    __slots__ = ("array", "is_float", "item_bytes", "raw_bytes")

    def __init__(self, array: Array) -> None:
        self.array = array
        self.raw_bytes = array.raw_bytes
        self.item_bytes = array.element.plane_bytes
        self.is_float = array.element.is_float

    def read(self, start: int, stop: int) -> memoryview:
        """Bytes start..stop: the array's own memory where that is row-major and on the host, else a copy of
        the range.
        """
        _check_range(start, stop, self.raw_bytes)
        flat = flat_bytes(self.array)
        if flat is not None:
            return flat.data[start:stop]
        if start == stop:
            return memoryview(b"")
        if self.array.on_host and not self.array.is_lazy:
            return gather(words_on_host(self.array), start, stop).data
        return _gather_tensor(self.array, start, stop).data


def flat_bytes(array: Array, *, writable: bool = False) -> Bytes | None:
    """The logical bytes as they lie in host memory, without a copy; None when they do not."""
    if not array.is_plain_memory:
        return None
    raw_bytes = array.raw_bytes
    # An empty tensor may have the address 0, which numpy refuses.
    return (
        memory_array(array.address, (raw_bytes,), (1,), "|u1", owner=array.value, writable=writable)
        if raw_bytes
        else np.empty(0, np.uint8)
    )


def _gather_tensor(array: Array, start: int, stop: int) -> Bytes:
    """A copy of logical bytes start..stop of a tensor on any device, conjugated and negated as it says."""
    torch = require_torch("a tensor")
    if array.is_lazy:
        tensor, width = array.value.detach(), array.item_bytes
    else:
        tensor = words_on_device(array)
        width = tensor.element_size()
    if not tensor.shape:
        tensor = tensor.reshape(1)
    first, last = start // width, -(-stop // width)
    flat = torch.empty(last - first, dtype=tensor.dtype)
    at = 0
    for index in rectangles(tensor.shape, first, last):
        count = rectangle_count(tensor.shape, index)
        part = tensor[index]
        flat[at : at + count].view(part.shape).copy_(part)
        at += count
    data = memory_array(flat.data_ptr(), ((last - first) * width,), (1,), "|u1", owner=flat)
    return data[start - first * width : stop - first * width]


class HullPayload:
    """The payload of the memory under overlapping views: from the lowest to the highest byte of any of them.

    Bytes that no view covers are not part of the state: they read as zeros, so that they neither leak what
    else the memory holds nor make an unchanged state look changed.
    """

    __slots__ = ("_lock", "_low", "_members", "_ready", "is_float", "item_bytes", "raw_bytes")

    def __init__(self, members: Sequence[Array], low: int, high: int) -> None:
        self._members = tuple(members)
        self._low = low
        self._lock = threading.Lock()
        self._ready: Bytes | None = None
        elements = {member.element.plane_bytes for member in members}
        self.raw_bytes = high - low
        self.item_bytes = elements.pop() if len(elements) == 1 else 1
        self.is_float = all(member.element.is_float for member in members)

    def read(self, start: int, stop: int) -> memoryview:
        """Bytes start..stop of the hull."""
        _check_range(start, stop, self.raw_bytes)
        with self._lock:
            if self._ready is None:
                self._ready = self._own_memory() if self._is_covered() else self._assembled()
        return self._ready.data[start:stop]

    def _is_covered(self) -> bool:
        """Whether host views without gaps cover the hull, so that its memory can be read as it is."""
        covered = self._low
        dense = (member.hull for member in self._members if member.is_dense and member.on_host)
        for low, high in sorted(dense):
            if low > covered:
                return False
            covered = max(covered, high)
        return covered == self._low + self.raw_bytes

    def _own_memory(self) -> Bytes:
        return memory_array(self._low, (self.raw_bytes,), (1,), "|u1", owner=self._members)

    def _assembled(self) -> Bytes:
        """The hull put together from its views. Copies it: gaps, and overlaps on a device, are rare."""
        hull: Bytes = np.zeros(self.raw_bytes, np.uint8)
        base = hull.ctypes.data
        for member in self._members:
            address = base + member.address - self._low
            target = host_words(address, member.shape, member.stride, member.item_bytes, owner=hull, writable=True)
            target[...] = words_on_host(member) if member.on_host else words_on_device(member).cpu().numpy()
        return hull
