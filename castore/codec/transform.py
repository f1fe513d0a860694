"""Elements ↔ byte planes, with or without a base: in C where the package was built with a compiler, in numpy elsewhere.

Both do the same bit for bit (tests/codec/test_transform.py). The C kernel needs one pass over memory, numpy one for each
step. CASTORE_KERNEL=numpy selects numpy, for comparison.

Scratch arrays are kept per thread and reused: fresh memory costs a page fault every 4 KiB, which is slower than the work.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from castore.ids import Buffer

WIDTHS = (1, 2, 4, 8)
Bytes = npt.NDArray[np.uint8]
_WORD: dict[int, np.dtype[Any]] = {1: np.dtype("u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4"), 8: np.dtype("<u8")}


class Kernel(Protocol):
    """The functions of the compiled kernel, and of its numpy twin."""

    def split(self, raw: Buffer, base: Buffer | None, planes: Buffer, width: int, rotate: bool, /) -> None:
        """Elements to planes: `planes` holds width * items bytes, least significant plane first."""
        ...

    def merge(self, planes: tuple[Buffer, ...], base: Buffer | None, out: Buffer, width: int, rotate: bool, /) -> None:
        """Planes to elements."""
        ...


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.arrays: dict[int, Bytes] = {}


_scratch = _Scratch()
_SPLIT_SLOT, _WORD_SLOT = -1, -2


def scratch(slot: int, length: int) -> Bytes:
    """A reused array of `length` bytes, valid until the same thread asks for the same slot again."""
    array = _scratch.arrays.get(slot)
    if array is None or len(array) < length:
        array = _scratch.arrays[slot] = np.empty(length, np.uint8)
    return array[:length]


def split(raw: Buffer, width: int, *, rotate: bool, base: Buffer | None = None) -> Bytes:
    """Planes of shape (width, items), least significant first, in scratch memory; bytes past the last element are ignored.

    Without a base `rotate` turns every element left by one bit. With one an element becomes zigzag(element - base),
    both taken as wrapping integers.
    """
    items = len(raw) // width
    planes = scratch(_SPLIT_SLOT, width * items)
    kernel.split(raw, base, memoryview(planes), width, rotate)
    return planes.reshape(width, items)


def merge(planes: Sequence[Buffer], out: memoryview, *, rotate: bool, base: Buffer | None = None) -> None:
    """The inverse of split: fill the elements of `out` from planes of equal length."""
    kernel.merge(tuple(planes), base, out, len(planes), rotate)


class NumpyKernel:
    """The same transform with numpy."""

    def split(self, raw: Buffer, base: Buffer | None, planes: Buffer, width: int, rotate: bool, /) -> None:
        """See Kernel."""
        items = len(raw) // width
        words = np.frombuffer(raw, _WORD[width], count=items)
        changed = scratch(_WORD_SLOT, width * items).view(_WORD[width])
        if base is not None:
            np.subtract(words, np.frombuffer(base, _WORD[width], count=items), out=changed)
            sign = np.right_shift(changed.view(f"<i{width}"), 8 * width - 1).view(_WORD[width])
            np.left_shift(changed, 1, out=changed)
            np.bitwise_xor(changed, sign, out=changed)
            words = changed
        elif rotate:
            np.left_shift(words, 1, out=changed)
            np.bitwise_or(changed, np.right_shift(words, 8 * width - 1), out=changed)
            words = changed
        columns = words.view(np.uint8).reshape(items, width)
        target = np.frombuffer(planes, np.uint8, count=width * items).reshape(width, items)
        for index in range(width):
            target[index] = columns[:, index]

    def merge(self, planes: tuple[Buffer, ...], base: Buffer | None, out: Buffer, width: int, rotate: bool, /) -> None:
        """See Kernel."""
        items = len(out) // width
        target = np.frombuffer(out, np.uint8, count=items * width)
        columns = target.reshape(items, width)
        for index, plane in enumerate(planes):
            columns[:, index] = np.frombuffer(plane, np.uint8, count=items)
        words = target.view(_WORD[width])
        if base is not None:
            sign = np.negative(np.bitwise_and(words, 1))
            np.right_shift(words, 1, out=words)
            np.bitwise_xor(words, sign, out=words)
            np.add(words, np.frombuffer(base, _WORD[width], count=items), out=words)
        elif rotate:
            low = np.left_shift(words, 8 * width - 1)
            np.right_shift(words, 1, out=words)
            np.bitwise_or(words, low, out=words)


def _best_kernel() -> Kernel:
    if os.environ.get("CASTORE_KERNEL") != "numpy":
        try:
            from castore.codec import _kernel
        except ImportError:
            pass  # installed without a compiler
        else:
            return _kernel
    return NumpyKernel()


kernel: Kernel = _best_kernel()
