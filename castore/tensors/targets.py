"""Target: where the logical bytes of one array leaf go when it is loaded.

    destination                                   direct   how
    new row-major array in host memory            yes      memory() is the array itself
    live row-major array in host memory           no       write() copies: its bytes must be verified first
    any other array in host memory                no       write() scatters the range
    conjugated or negated tensor                  no       write() stores what reads as these bytes
    tensor on a device                            no       write() copies the range to the device

A new tensor gets its saved strides. Its memory is not zeroed: the caller fills all of it or throws it away.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from castore.errors import CastoreError, FormatError, UsageError
from castore.format.manifest import Entry, Kind
from castore.ids import Buffer
from castore.tensors.arrays import Array, describe, words_on_device, words_on_host
from castore.tensors.dtypes import checked_raw_bytes, is_numpy_name, numpy_dtype, torch_dtype
from castore.tensors.lazy import require_torch
from castore.tensors.payloads import flat_bytes
from castore.tensors.strided import (
    is_dense,
    memory_array,
    rectangle_count,
    rectangles,
    row_major_stride,
    scatter,
)

HUGE_PAGES_BYTES_MIN = 4 * 1024 * 1024
"""New tensors from this size on ask for huge pages. Filling 256 MiB of fresh memory takes 0.17 s with 4 KiB
pages (65536 faults) and 0.04 s with 2 MiB pages; below 4 MiB too little of a block is aligned to gain. numpy
asks by itself."""

ARRAY_KINDS = frozenset({Kind.TENSOR, Kind.NDARRAY, Kind.STORAGE})
"""Kinds that `allocate` makes; the others that have bytes are made by `decode_value`."""

_MADV_HUGEPAGE = 14
_PAGE_BYTES = 4096
_DIMENSIONS_MAX = 64


class Target(Protocol):
    """A writable destination of one leaf.

    Contract: every byte 0..raw_bytes is written once, through `memory()` if `direct`, else through `write`;
    ranges may come in any order and from any thread. `finish` is called once, after the last of them.
    """

    @property
    def raw_bytes(self) -> int:
        """Length of the leaf."""
        ...

    @property
    def direct(self) -> bool:
        """Whether `memory` may be used, even before the bytes are verified: nobody else can see it yet."""
        ...

    def memory(self) -> memoryview:
        """The leaf's own memory, writable, in logical order. Only if `direct`."""
        ...

    def write(self, start: int, data: Buffer) -> None:
        """Put logical bytes at `start`. Always possible."""
        ...

    def finish(self) -> None:
        """The leaf is complete."""
        ...


class ArrayTarget:
    """The target of a tensor or ndarray. A live one is never `direct`: bytes are verified before it sees
    them.
    """

    __slots__ = ("_flat", "array", "direct", "raw_bytes")

    def __init__(self, array: Array, *, live: bool) -> None:
        self.array = array
        self.raw_bytes = array.raw_bytes
        self._flat = flat_bytes(array, writable=True)
        self.direct = self._flat is not None and not live

    def memory(self) -> memoryview:
        """The array's own memory. Raises UsageError if not `direct`."""
        if self._flat is None or not self.direct:
            raise UsageError("this array is live, or not in host memory in row-major order; use write()")
        return self._flat.data

    def write(self, start: int, data: Buffer) -> None:
        """Copy `data` to logical position `start`."""
        source = memoryview(data).cast("B")
        stop = start + len(source)
        if not 0 <= start <= stop <= self.raw_bytes:
            raise UsageError(f"expected a range inside 0..{self.raw_bytes}, found {start}..{stop}")
        if start == stop:
            return
        if self._flat is not None:
            self._flat.data[start:stop] = source
        elif self.array.on_host and not self.array.is_lazy:
            scatter(words_on_host(self.array, writable=True), start, source)
        else:
            _scatter_tensor(self.array, start, source)

    def finish(self) -> None:
        """Tell autograd that the values changed, as an in-place operation would."""
        value = self.array.value
        if not isinstance(value, np.ndarray) and not value.is_inference():
            require_torch("a tensor").autograd.graph.increment_version(value)


def _scatter_tensor(array: Array, start: int, data: memoryview) -> None:
    """Write logical bytes into a tensor on any device, conjugated and negated as it says."""
    torch = require_torch("a tensor")
    tensor = array.value.detach() if array.is_lazy else words_on_device(array)
    width = tensor.element_size()
    if not tensor.shape:
        tensor = tensor.reshape(1)
    stop = start + len(data)
    if start % width or stop % width:
        raise UsageError(f"expected a range of whole {width}-byte words, found {start}..{stop}")
    # An aligned copy: the caller's bytes may start anywhere, and torch refuses read-only memory.
    flat = torch.empty((stop - start) // width, dtype=tensor.dtype)
    memory_array(flat.data_ptr(), (stop - start,), (1,), "|u1", owner=flat, writable=True).data[:] = data
    at = 0
    with torch.no_grad():
        for index in rectangles(tensor.shape, start // width, stop // width):
            count = rectangle_count(tensor.shape, index)
            part = tensor[index]
            part.copy_(flat[at : at + count].view(part.shape))
            at += count


def live_target(value: Any, entry: Entry) -> ArrayTarget:
    """The target that overwrites a live tensor or ndarray in place, whatever its strides and device.

    Raises UsageError when shape or element type differ from the entry's, or when it cannot be written to.
    """
    where = f"leaf {entry.path!r}"
    array = describe(value, entry.path)
    if (
        array.element.name != entry.dtype
        or array.shape != entry.shape
        or array.element.descr != entry.attrs.get("descr")
    ):
        raise UsageError(
            f"{where}: expected a live {entry.dtype} of shape {list(entry.shape)}, "
            f"found {array.element.name} of shape {list(array.shape)}"
        )
    checked_raw_bytes(entry, array.item_bytes, where)
    reason = not_writable(array)
    if reason:
        raise UsageError(f"{where}: the live array {reason}")
    return ArrayTarget(array, live=True)


def not_writable(array: Array) -> str:
    """Why an array cannot be filled in place; empty when it can."""
    if array.may_overlap_itself:
        return "is expanded: its elements share memory, and cannot be filled in place; use .contiguous()"
    if array.family == "numpy" and not array.value.flags.writeable:
        return "is read-only"
    return ""


# ---- new arrays --------------------------------------------------------------------------------------------


def allocate(entry: Entry, *, device: Any = None) -> tuple[Any, ArrayTarget]:
    """A new tensor or ndarray for an entry of ARRAY_KINDS, and its target.

    Tensors go to `device`, by default the CPU; numpy arrays always to the CPU. Parameter and requires_grad
    are restored later, by `unflatten`. Raises FormatError when the entry makes no sense, MissingExtraError
    without torch, and what torch raises when the device is absent or its memory is full.
    """
    where = f"leaf {entry.path!r}"
    is_numpy = is_numpy_array(entry, where)
    try:
        value = _new_ndarray(entry, where) if is_numpy else _new_tensor(entry, where, device)
    except (ValueError, OverflowError, TypeError, RuntimeError) as error:
        if entry.raw_bytes == 0 and not isinstance(error, CastoreError):
            # Nothing was asked for, so it was not memory that lacked: the shape beside the zero is out of
            # range.
            raise FormatError(f"{where}: no array has the shape {list(entry.shape)}: {error}") from error
        raise
    return value, ArrayTarget(describe(value, entry.path), live=False)


def is_numpy_array(entry: Entry, where: str) -> bool:
    """Whether an entry of ARRAY_KINDS is an ndarray rather than a tensor. Raises FormatError when it cannot be
    either.
    """
    if entry.kind not in ARRAY_KINDS:
        raise UsageError(f"{where}: {entry.kind.name} is no array")
    if len(entry.shape) > _DIMENSIONS_MAX:
        raise FormatError(f"{where}: expected at most {_DIMENSIONS_MAX} axes, found {len(entry.shape)}")
    is_numpy = is_numpy_name(entry.dtype)
    if is_numpy is (entry.kind is Kind.TENSOR) and entry.kind is not Kind.STORAGE:
        raise FormatError(f"{where}: {entry.kind.name} cannot have the dtype {entry.dtype!r}")
    return is_numpy


def _new_ndarray(entry: Entry, where: str) -> Any:
    dtype = numpy_dtype(entry, where)
    checked_raw_bytes(entry, dtype.itemsize, where)
    stride = _checked_stride(entry, where)
    if stride is None:
        value = np.empty(entry.shape, dtype)
    else:
        # Axes of length 1 last, wherever their stride would put them: so the strides of the result are the hint again.
        order = sorted(range(len(entry.shape)), key=lambda axis: (entry.shape[axis] == 1, -stride[axis], axis))
        value = np.empty([entry.shape[axis] for axis in order], dtype).transpose(np.argsort(order))
    if value.dtype != dtype:
        raise FormatError(f"{where}: numpy makes no arrays of {entry.dtype}")
    return value


def _new_tensor(entry: Entry, where: str, device: Any) -> Any:
    torch = require_torch(where)
    dtype = torch_dtype(entry.dtype, where)
    raw_bytes = checked_raw_bytes(entry, dtype.itemsize, where)
    stride = _checked_stride(entry, where) or row_major_stride(entry.shape, 1)
    value = torch.empty_strided(entry.shape, stride, dtype=dtype, device=device or "cpu")
    if value.device.type == "cpu" and raw_bytes >= HUGE_PAGES_BYTES_MIN:
        advise_huge_pages(value.data_ptr(), raw_bytes)
    return value


def _checked_stride(entry: Entry, where: str) -> Sequence[int] | None:
    """The stride hint, which must be dense: it decides how much is allocated. Raises FormatError."""
    stride = entry.hints.get("stride")
    if stride is None:
        return None
    limit = 2**62
    valid = isinstance(stride, list) and len(stride) == len(entry.shape)
    if (
        not valid
        or any(type(step) is not int or not 0 <= step < limit for step in stride)
        or not is_dense(entry.shape, stride, 1)
    ):
        raise FormatError(f"{where}: strides {str(stride)[:80]} do not fill the shape {list(entry.shape)}")
    checked: list[int] = stride
    return checked


def advise_huge_pages(address: int, length: int) -> None:
    """Ask the kernel to back the whole pages inside a range with huge ones. Advice: silently does nothing
    elsewhere.
    """
    madvise = _madvise()
    if madvise is not None:
        first = -(-address // _PAGE_BYTES) * _PAGE_BYTES
        last = (address + length) // _PAGE_BYTES * _PAGE_BYTES
        madvise(first, last - first, _MADV_HUGEPAGE)


@lru_cache(maxsize=1)
def _madvise() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
