"""An array leaf where it lies in memory, the same for torch and numpy: address, shape, strides, element type.

Saving, alias detection and loading work on this description, so that none of them has to know 45 dtypes.
Nothing is read or copied here.

Strides and addresses are in bytes. Tensors that have no such description (sparse, quantized, nested, meta,
subclasses) are refused or taken apart before they get here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from castore.errors import UnsupportedLeafError
from castore.tensors.dtypes import Element, numpy_element, torch_element
from castore.tensors.lazy import require_torch
from castore.tensors.strided import (
    Words,
    extent,
    host_words,
    is_dense,
    may_overlap_itself,
    row_major_stride,
    word_layout,
)

_row_major_stride = lru_cache(row_major_stride)
CPU = "cpu"
Family = Literal["torch", "numpy"]


@dataclass(slots=True, eq=False)
class Array:
    """An array and where its elements lie. Not to be changed; `frozen` would treble what making one costs, which an
    asynchronous save does for every leaf while the training waits.
    """

    value: Any
    """The tensor or ndarray; it keeps the memory alive. See `let_go`."""
    family: Family
    device: str
    """"cpu", "cuda:0", …; always "cpu" for numpy."""
    address: int
    """Of the first element, on that device."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    element: Element
    conj: bool = False
    """The memory holds the complex conjugate of the value (torch does this lazily)."""
    neg: bool = False
    """The memory holds the negative of the value."""

    raw_bytes: int = 0
    """Length of its logical bytes."""
    row_major: bool = False
    """Whether the memory, from `address` on, is the logical bytes; computed once, for it is asked of every array."""
    object_hints: dict[str, Any] = field(default_factory=dict)
    """What belongs to the object rather than to its memory. Not to be changed."""

    @property
    def item_bytes(self) -> int:
        """Size of one element."""
        return self.element.item_bytes

    @property
    def on_host(self) -> bool:
        """Whether the processor can read it."""
        return self.device == CPU

    @property
    def on_cuda(self) -> bool:
        """Whether it lies on a CUDA device."""
        return self.device.startswith("cuda")

    @property
    def is_lazy(self) -> bool:
        """Whether the value is computed from the memory (conjugated or negated) when it is read."""
        return self.conj or self.neg

    @property
    def is_plain_memory(self) -> bool:
        """Whether its logical bytes lie in host memory, one behind another from `address` on."""
        return self.row_major and self.on_host and not self.is_lazy

    @property
    def hull(self) -> tuple[int, int]:
        """Lowest address and one past the highest."""
        if self.row_major:
            return self.address, self.address + self.raw_bytes
        low, high = extent(self.shape, self.stride, self.item_bytes)
        return self.address + low, self.address + high

    @property
    def is_dense(self) -> bool:
        """Whether the elements fill the hull without gap or overlap."""
        return self.row_major or is_dense(self.shape, self.stride, self.item_bytes)

    @property
    def may_overlap_itself(self) -> bool:
        """Whether two of its elements may share memory."""
        return not self.row_major and may_overlap_itself(self.shape, self.stride, self.item_bytes)

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for two arrays that are the same elements of the same memory."""
        return (
            self.family,
            self.device,
            self.address,
            self.element.name,
            self.shape,
            self.stride,
            self.conj,
            self.neg,
        )

    def let_go(self) -> None:
        """Keep the memory alive no longer. Where it was is then all that remains known, and that it is not the object
        of another description.
        """
        self.value = object()

    def stride_hint(self) -> list[int] | None:
        """Strides in elements if they are worth restoring: dense and not row-major; else None.

        For torch even where only axes of length 1 differ, because it reads the memory format from them; numpy gives
        these no meaning, so they are written as 1.
        """
        if self.raw_bytes == 0 or (self.row_major and 1 not in self.shape):
            return None
        if self.row_major and self.stride == row_major_stride(self.shape, self.item_bytes):
            return None
        if self.is_lazy or not self.is_dense or any(step < 0 for step in self.stride):
            return None
        if self.family == "torch":
            return [step // self.item_bytes for step in self.stride]
        if self.row_major:
            return None
        pairs = zip(self.shape, self.stride, strict=True)
        return [1 if size == 1 else step // self.item_bytes for size, step in pairs]


def numpy_array(value: np.ndarray[Any, Any], path: str) -> Array:
    """Describe an ndarray. Raises UnsupportedLeafError for element types without fixed bytes."""
    element = numpy_element(value.dtype, path)
    address: int = value.__array_interface__["data"][0]
    row_major = bool(value.flags.c_contiguous)
    stride = value.strides
    return Array(
        value, "numpy", CPU, address, value.shape, stride, element, raw_bytes=value.nbytes, row_major=row_major
    )


def torch_array(value: Any, path: str) -> Array:
    """Describe a strided, unquantized tensor. Raises UnsupportedLeafError when it has no memory."""
    dtype = value.dtype
    element = torch_element(dtype)
    size = element.item_bytes
    shape = tuple(value.shape)
    row_major = value.is_contiguous()
    if row_major and 1 not in shape:  # for an axis of length 1 torch may have any stride
        stride = _row_major_stride(shape, size)
    else:
        stride = tuple([step * size for step in value.stride()])
    raw_bytes = math.prod(shape) * size
    device = CPU if value.is_cpu else str(value.device)
    try:
        storage_bytes, address = value.untyped_storage().nbytes(), value.data_ptr()
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise UnsupportedLeafError(path, _tensor_type(value), f"its memory cannot be reached: {reason}") from error
    end = raw_bytes if row_major else extent(shape, stride, size)[1]
    if raw_bytes and value.storage_offset() * size + end > storage_bytes:
        # FSDP frees the storage of parameters that are not gathered; reading them would be a segmentation fault.
        raise UnsupportedLeafError(path, _tensor_type(value), "its storage was freed: gather or clone it before saving")
    conj, neg = dtype.is_complex and value.is_conj(), value.is_neg()
    return Array(
        value, "torch", device, address, shape, stride, element, conj, neg, raw_bytes, row_major, object_hints(value)
    )


def object_hints(tensor: Any) -> dict[str, Any]:
    """What belongs to the object of a tensor rather than to its memory."""
    hints: dict[str, Any] = {}
    if tensor.requires_grad:
        hints["requires_grad"] = True
    if type(tensor).__name__ == "Parameter":  # of torch.nn: no other class of that name gets here
        hints["parameter"] = True
    elif getattr(tensor, "_is_buffer", False):
        hints["buffer"] = bool(getattr(tensor, "persistent", True))
    return hints


def describe(value: Any, path: str) -> Array:
    """Describe a tensor or an ndarray."""
    return numpy_array(value, path) if isinstance(value, np.ndarray) else torch_array(value, path)


def _tensor_type(value: Any) -> str:
    kind = type(value)
    return f"{kind.__module__}.{kind.__qualname__}"


def words_on_host(array: Array, *, writable: bool = False) -> Words:
    """Its memory as integer words, without a copy; not conjugated or negated."""
    return host_words(array.address, array.shape, array.stride, array.item_bytes, owner=array.value, writable=writable)


def words_on_device(array: Array) -> Any:
    """Its memory as a tensor of integer words on its device, without a copy; not conjugated or negated."""
    torch = require_torch("a tensor")
    shape, stride, width = word_layout(array.shape, array.stride, array.item_bytes)
    dtype = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[width]
    storage = array.value.untyped_storage()
    offset = int(array.value.storage_offset()) * array.item_bytes // width
    empty = torch.empty(0, dtype=dtype, device=array.value.device)
    return empty.set_(storage, offset, shape, [step // width for step in stride])
