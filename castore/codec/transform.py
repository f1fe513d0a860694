"""Elements ↔ byte planes, with numpy. One module, so that a compiled transform can take its place.

Scratch arrays are kept per thread and reused: fresh memory costs a page fault every 4 KiB, which is slower than the work.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from castore.ids import Buffer

WIDTHS = (1, 2, 4, 8)
_WORD = {1: np.dtype("u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4"), 8: np.dtype("<u8")}


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.arrays: dict[int, np.ndarray] = {}


_scratch = _Scratch()
_SPLIT_SLOT, _WORD_SLOT = -1, -2


def scratch(slot: int, length: int) -> np.ndarray:
    """A reused uint8 array of `length` bytes, valid until the same thread asks for the same slot again."""
    array = _scratch.arrays.get(slot)
    if array is None or len(array) < length:
        array = _scratch.arrays[slot] = np.empty(length, np.uint8)
    return array[:length]


def split(raw: Buffer, width: int, *, rotate: bool) -> np.ndarray:
    """Planes of shape (width, items), least significant first, in scratch memory; bytes past the last element are ignored.

    `rotate` turns every element left by one bit first.
    """
    items = len(raw) // width
    words = np.frombuffer(raw, _WORD[width], count=items)
    planes = scratch(_SPLIT_SLOT, width * items).reshape(width, items)
    if rotate:
        rotated = scratch(_WORD_SLOT, width * items).view(_WORD[width])
        np.left_shift(words, 1, out=rotated)
        top = np.right_shift(words, 8 * width - 1)
        np.bitwise_or(rotated, top, out=rotated)
        words = rotated
    columns = words.view(np.uint8).reshape(items, width)
    for index in range(width):
        planes[index] = columns[:, index]
    return planes


def merge(planes: Sequence[Buffer], out: memoryview, *, rotate: bool) -> None:
    """The inverse of split: fill the elements of `out` from planes of equal length."""
    width = len(planes)
    items = len(out) // width
    target = np.frombuffer(out, np.uint8, count=items * width)
    columns = target.reshape(items, width)
    for index, plane in enumerate(planes):
        columns[:, index] = np.frombuffer(plane, np.uint8)
    if rotate:
        words = target.view(_WORD[width])
        low = np.left_shift(words, 8 * width - 1)
        np.right_shift(words, 1, out=words)
        np.bitwise_or(words, low, out=words)
