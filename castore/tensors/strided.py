"""Row-major bytes of arrays that lie in memory in any other way, and back.

Bytes are moved as unsigned integers ("words" of 8, 4, 2 or 1 bytes), never as floats or records: a copy
through a numeric type could quieten a NaN, and numpy's record copies leave out padding.

A range of row-major elements of a strided array is a few rectangles: a partial row, whole rows, a partial
row, the partial rows cut in the same way one dimension further in. So a chunk of a transposed matrix is read
without copying the matrix, in at most 2 * ndim - 1 strided copies.

Strides are in bytes everywhere in this module.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from castore.ids import Buffer

_TILE_ITEMS = 16
"""Width of a tile: a cache line of float32. Measured with 8 to 256 for 2, 4 and 8 bytes: best or second for each."""
_LONG_STRIDE_BYTES = 256
"""From this stride on tiles pay."""

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[Any]
Index = tuple[int | slice, ...]


class _Interface:
    """A piece of memory as numpy's array interface sees it; arrays made from it keep `owner` alive."""

    __slots__ = ("__array_interface__", "owner")

    def __init__(self, interface: dict[str, Any], owner: object) -> None:
        self.__array_interface__ = interface
        self.owner = owner


def memory_array(
    address: int,
    shape: Sequence[int],
    stride: Sequence[int],
    code: str,
    *,
    owner: object,
    writable: bool = False,
) -> npt.NDArray[Any]:
    """An array over memory that somebody else owns, without a copy. The caller answers for the address."""
    interface = {
        "version": 3,
        "shape": tuple(shape),
        "strides": tuple(stride),
        "typestr": code,
        "data": (address, not writable),
    }
    return np.asarray(_Interface(interface, owner))


def row_major_stride(shape: Sequence[int], item: int) -> tuple[int, ...]:
    """Strides of a row-major array of that shape, in the unit of `item`."""
    stride = [item] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        stride[axis] = stride[axis + 1] * max(1, shape[axis + 1])
    return tuple(stride)


def is_dense(shape: Sequence[int], stride: Sequence[int], item: int) -> bool:
    """Whether the elements fill their hull without gap or overlap: a row-major array with its axes permuted
    or reversed.
    """
    if 0 in shape:
        return True
    expected = item
    for step, size in sorted((abs(step), size) for size, step in zip(shape, stride, strict=True) if size != 1):
        if step != expected:
            return False
        expected *= size
    return True


def may_overlap_itself(shape: Sequence[int], stride: Sequence[int], item: int) -> bool:
    """Whether two elements may share memory, as in an expanded tensor. True also where it would take long to
    find out.
    """
    if 0 in shape:
        return False
    span = item
    for step, size in sorted((abs(step), size) for size, step in zip(shape, stride, strict=True) if size != 1):
        if step < span:
            return True
        span = step * (size - 1) + span
    return False


def extent(shape: Sequence[int], stride: Sequence[int], item: int) -> tuple[int, int]:
    """Lowest and one past the highest byte of the hull, relative to the first element; (0, 0) when empty."""
    if 0 in shape:
        return 0, 0
    reach = [step * (size - 1) for size, step in zip(shape, stride, strict=True)]
    return sum(step for step in reach if step < 0), sum(step for step in reach if step > 0) + item


def rectangles(shape: Sequence[int], start: int, stop: int) -> Iterator[Index]:
    """Indices of the rectangles that hold row-major elements start..stop, in that order."""
    if start < stop:
        yield from _rectangles(tuple(shape), start, stop, ())


def _rectangles(shape: tuple[int, ...], start: int, stop: int, prefix: Index) -> Iterator[Index]:
    if not shape:
        yield prefix
        return
    if len(shape) == 1:
        yield (*prefix, slice(start, stop))
        return
    inner = math.prod(shape[1:])
    first, head = divmod(start, inner)
    last, tail = divmod(stop, inner)
    if first == last:
        yield from _rectangles(shape[1:], head, tail, (*prefix, first))
        return
    if head:
        yield from _rectangles(shape[1:], head, inner, (*prefix, first))
        first += 1
    if first < last:
        yield (*prefix, slice(first, last))
    if tail:
        yield from _rectangles(shape[1:], 0, tail, (*prefix, last))


def rectangle_count(shape: Sequence[int], index: Index) -> int:
    """How many elements a rectangle holds."""
    sizes = [part.stop - part.start if isinstance(part, slice) else 1 for part in index]
    return math.prod(sizes) * math.prod(shape[len(index) :])


# ---- words -------------------------------------------------------------------------------------------------


def word_bytes_of(item_bytes: int) -> int:
    """The widest word, up to 8 bytes, that divides an element."""
    return next(width for width in (8, 4, 2, 1) if item_bytes % width == 0)


def word_layout(
    shape: Sequence[int], stride: Sequence[int], item_bytes: int
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Shape, strides and word width of the same memory as words: wide elements get an axis of their own."""
    width = word_bytes_of(item_bytes)
    if item_bytes == width and shape:
        return tuple(shape), tuple(stride), width
    return (*shape, item_bytes // width), (*stride, width), width


def host_words(
    address: int,
    shape: Sequence[int],
    stride: Sequence[int],
    item_bytes: int,
    *,
    owner: object,
    writable: bool = False,
) -> Words:
    """An array in host memory as words, without a copy."""
    word_shape, word_stride, width = word_layout(shape, stride, item_bytes)
    return memory_array(
        address,
        word_shape,
        word_stride,
        f"|u{width}" if width == 1 else f"<u{width}",
        owner=owner,
        writable=writable,
    )


def gather(words: Words, start: int, stop: int) -> Bytes:
    """A fresh copy of logical bytes start..stop."""
    width = words.dtype.itemsize
    first, last = start // width, -(-stop // width)
    flat: Words = np.empty(last - first, words.dtype)
    at = 0
    for index in rectangles(words.shape, first, last):
        part = words[index]
        _copy(flat[at : at + part.size].reshape(part.shape), part)
        at += part.size
    return flat.view(np.uint8)[start - first * width : stop - first * width]


def scatter(words: Words, start: int, data: Buffer) -> None:
    """Write logical bytes from `start` on; words that are covered in part keep the rest."""
    stop = start + len(memoryview(data).cast("B"))
    width = words.dtype.itemsize
    first, last = start // width, -(-stop // width)
    source: Bytes = np.frombuffer(data, np.uint8)
    if start % width or stop % width:
        patched = gather(words, first * width, last * width)
        patched[start - first * width : stop - first * width] = source
        source = patched
    flat = memory_array(source.ctypes.data, (last - first,), (width,), words.dtype.str, owner=source)
    at = 0
    for index in rectangles(words.shape, first, last):
        count = rectangle_count(words.shape, index)
        part = words[index]
        _copy(part, flat[at : at + count].reshape(part.shape))
        at += count


def _copy(target: Words, source: Words) -> None:
    """Copy between arrays of one shape, one of which is row-major.

    numpy walks along the last axis. Where that is a long way in the other array, every element costs a cache line, so
    the copy goes by tiles: a 4096 x 4096 matrix of float32 is read transposed at 0.8 instead of 0.16 GB/s.
    """
    width = target.shape[-1]
    rows = target.size // width if width else 0
    last = max(abs(target.strides[-1]), abs(source.strides[-1]))
    if rows < _TILE_ITEMS or width <= _TILE_ITEMS or last < _LONG_STRIDE_BYTES:
        target[...] = source
        return
    for column in range(0, width, _TILE_ITEMS):
        target[..., column : column + _TILE_ITEMS] = source[..., column : column + _TILE_ITEMS]
