"""Elements ↔ byte planes, with or without a base: in C where the package was built with a compiler, in numpy elsewhere.

Both do the same bit for bit (tests/codec/test_transform.py). The C kernel needs one pass over memory, numpy one for
each step. CASTORE_KERNEL=numpy selects numpy, for comparison.

Scratch arrays are kept per thread and reused: fresh memory costs a page fault every 4 KiB, which is slower than the
work.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from castore.codec.rounding import round_words
from castore.ids import Buffer

WIDTHS = (1, 2, 4, 8)
Bytes = npt.NDArray[np.uint8]
_WORD: dict[int, np.dtype[Any]] = {1: np.dtype("u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4"), 8: np.dtype("<u8")}


GROUP_ITEMS = 32
"""Elements that are left out together when they are all zero. A row of an embedding that no token touched is a run of
zeros in the moments, and of unchanged elements in a delta; 32 divides the usual row lengths, and its bitmap costs
1/1024 of fp32 data."""


class Mode(IntEnum):
    """How elements are changed before they are split. Permanent: written into payloads. _kernel.c has the formulas."""

    PLAIN = 0
    ROTATE = 1
    DIFFERENCE = 2
    XOR = 3
    SCALED = 4


BASE_MODES = frozenset({Mode.DIFFERENCE, Mode.XOR, Mode.SCALED})
ALPHA_MIN, ALPHA_MAX = 0.5, 2.0
"""Factors of a scaled base. Within these bounds no product of a base that is scaled leaves the normal floats."""


class Kernel(Protocol):
    """The functions of the compiled kernel, and of its numpy twin; _kernel.c says what they do."""

    def split(
        self,
        raw: Buffer,
        base: Buffer | None,
        planes: Buffer,
        kept: Buffer | None,
        width: int,
        mode: int,
        alpha: float,
        counts: Buffer | None,
        /,
    ) -> int:
        """Elements to planes; returns how many elements were kept. With `counts` (256 uint32) the planes are ordered,
        and it gets the number of elements of each class.
        """
        ...

    def merge(
        self,
        planes: tuple[Buffer, ...],
        kept: Buffer | None,
        base: Buffer | None,
        out: Buffer,
        width: int,
        mode: int,
        alpha: float,
        ordered: bool,
        /,
    ) -> None:
        """Planes to elements."""
        ...

    def sample(
        self,
        raw: Buffer,
        base: Buffer | None,
        width: int,
        mode: int,
        alpha: float,
        windows: int,
        window_bytes: int,
        grouped: bool,
        segment_items: int,
        table: Buffer,
        /,
    ) -> tuple[int, int, int, int, int]:
        """What `split` would make of a sample: order-0 information of all planes in units of `table` (n log2 n as
        int64), different bytes of all planes, elements that are kept, elements that are zero, segments. There is one
        segment, or with `segment_items` as many as ordered planes fall into.
        """
        ...

    def ratio(self, raw: Buffer, base: Buffer, windows: int, window_bytes: int, items_max: int, /) -> tuple[float, int]:
        """Lower median of new to old float32 in a sample, 0 without any, and of how many."""
        ...

    def derive(self, master: Buffer, out: Buffer, rule: int, /) -> None:
        """float32 rounded to 16 bits: see rounding.py."""
        ...


@dataclass(frozen=True, slots=True)
class Planes:
    """Elements regrouped by significance."""

    array: Bytes
    """Shape (width, kept elements), least significant plane first; scratch memory of the thread that split."""
    kept: bytes | None
    """Bitmap of the groups that were kept, least significant bit first; None when all were."""
    cuts: tuple[int, ...] = ()
    """Where the distribution of ordered elements changes: ends of segments, the last one of all. Empty: nowhere."""


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


def kept_bytes(items: int) -> int:
    """Length of the bitmap of kept groups."""
    return -(-items // (8 * GROUP_ITEMS))


def split(
    raw: Buffer, width: int, *, mode: Mode, base: Buffer | None = None, alpha: float = 1.0, ordered: bool = False
) -> Planes:
    """Planes of the elements of `raw`; bytes past the last element are ignored.

    Groups that are all zero after the change that `mode` names are left out. Modes in BASE_MODES need a base that is as
    long as `raw`; SCALED needs width 4 and a factor that is exact in float32, within ALPHA_MIN to ALPHA_MAX. `ordered`
    sorts the elements by the class of their base (_kernel.c) and needs one, and a width of at least 2.
    """
    assert base is not None or not ordered
    items = len(raw) // width
    memory = scratch(_SPLIT_SLOT, width * items)
    kept = bytearray(kept_bytes(items))
    counts = np.empty(_CLASSES, np.uint32) if ordered else None
    count = kernel.split(raw, base, memory.data, kept, width, mode, alpha, counts.data if counts is not None else None)
    cuts = tuple(segment_ends(counts.tolist(), SEGMENT_ITEMS_MIN)) if counts is not None else ()
    return Planes(memory.reshape(width, items)[:, :count], None if count == items else bytes(kept), cuts)


def segment_ends(counts: Sequence[int], items_min: int) -> Iterator[int]:
    """Ends of segments of whole classes with at least so many elements, but for the last."""
    start = end = 0
    for count in counts:
        end += count
        if end - start >= items_min:
            yield end
            start = end
    if end > start:
        yield end


def merge(
    planes: Sequence[Buffer],
    out: memoryview,
    *,
    mode: Mode,
    kept: Buffer | None = None,
    base: Buffer | None = None,
    alpha: float = 1.0,
    ordered: bool = False,
) -> None:
    """The inverse of split: fill the elements of `out` from planes of equal length."""
    kernel.merge(tuple(planes), kept, base, out, len(planes), mode, alpha, ordered)


def kept_count(kept: Buffer, items: int) -> int:
    """How many of `items` elements lie in kept groups."""
    groups = -(-items // GROUP_ITEMS)
    bits = int.from_bytes(kept, "little") & (1 << groups) - 1
    count = bits.bit_count() * GROUP_ITEMS
    tail = items % GROUP_ITEMS
    return count - (GROUP_ITEMS - tail) if tail and bits >> groups - 1 else count


@dataclass(frozen=True, slots=True)
class _Windows:
    """Where a sample is taken: windows spread evenly, each starting on an element; a short buffer is one window."""

    count: int
    bytes: int
    step: int

    @staticmethod
    def over(length: int, width: int, count: int, window_bytes: int) -> _Windows:
        if length <= count * window_bytes:
            return _Windows(1, length // width * width, 0)
        return _Windows(count, window_bytes, (length - window_bytes) // (count - 1) // width * width)

    def of(self, data: Buffer) -> Bytes:
        """The sample."""
        array = np.frombuffer(data, np.uint8)
        return np.concatenate([array[at * self.step : at * self.step + self.bytes] for at in range(self.count)])


_RATIO_EXPONENT_MIN = 28
"""Old values whose exponent field is below are too near to zero for a ratio: 2^-99."""


class NumpyKernel:
    """The same transform with numpy."""

    def split(
        self,
        raw: Buffer,
        base: Buffer | None,
        planes: Buffer,
        kept: Buffer | None,
        width: int,
        mode: int,
        alpha: float,
        counts: Buffer | None,
        /,
    ) -> int:
        """See Kernel."""
        items = len(raw) // width
        words = np.frombuffer(raw, _WORD[width], count=items)
        changed = scratch(_WORD_SLOT, width * items).view(_WORD[width])
        if mode == Mode.ROTATE:
            np.left_shift(words, 1, out=changed)
            np.bitwise_or(changed, np.right_shift(words, 8 * width - 1), out=changed)
            words = changed
        elif base is not None and mode == Mode.XOR:
            words = np.bitwise_xor(words, _prediction(base, width, items, mode, alpha), out=changed)
        elif base is not None and mode != Mode.PLAIN:
            np.subtract(words, _prediction(base, width, items, mode, alpha), out=changed)
            sign = np.right_shift(changed.view(f"<i{width}"), 8 * width - 1).view(_WORD[width])
            np.left_shift(changed, 1, out=changed)
            words = np.bitwise_xor(changed, sign, out=changed)
        if kept is not None:
            words = _compact(words, kept)
        if base is not None and counts is not None:
            classes = _classes(base, kept, items, width)
            words = words[np.argsort(classes, kind="stable")]
            np.frombuffer(counts, np.uint32)[:] = np.bincount(classes, minlength=_CLASSES)
        columns = words.view(np.uint8).reshape(len(words), width)
        target = np.frombuffer(planes, np.uint8, count=width * items).reshape(width, items)
        for index in range(width):
            target[index, : len(words)] = columns[:, index]
        return len(words)

    def merge(
        self,
        planes: tuple[Buffer, ...],
        kept: Buffer | None,
        base: Buffer | None,
        out: Buffer,
        width: int,
        mode: int,
        alpha: float,
        ordered: bool,
        /,
    ) -> None:
        """See Kernel."""
        items = len(out) // width
        words = np.frombuffer(out, _WORD[width], count=items)
        mask = _element_mask(kept, items) if kept is not None else None
        packed = words if mask is None else np.empty(int(mask.sum()), _WORD[width])
        columns = packed.view(np.uint8).reshape(len(packed), width)
        places: Any = slice(None)
        if ordered:
            assert base is not None
            places = np.argsort(_classes(base, kept, items, width), kind="stable")
        for index, plane in enumerate(planes):
            columns[places, index] = np.frombuffer(plane, np.uint8, count=len(packed))
        if mask is not None:
            words[:] = 0
            words[mask] = packed
        if mode == Mode.ROTATE:
            low = np.left_shift(words, 8 * width - 1)
            np.right_shift(words, 1, out=words)
            np.bitwise_or(words, low, out=words)
        elif base is not None and mode == Mode.XOR:
            np.bitwise_xor(words, _prediction(base, width, items, mode, alpha), out=words)
        elif base is not None and mode != Mode.PLAIN:
            sign = np.negative(np.bitwise_and(words, 1))
            np.right_shift(words, 1, out=words)
            np.bitwise_xor(words, sign, out=words)
            np.add(words, _prediction(base, width, items, mode, alpha), out=words)

    def sample(
        self,
        raw: Buffer,
        base: Buffer | None,
        width: int,
        mode: int,
        alpha: float,
        windows: int,
        window_bytes: int,
        grouped: bool,
        segment_items: int,
        table: Buffer,
        /,
    ) -> tuple[int, int, int, int, int]:
        """See Kernel."""
        spread = _Windows.over(len(raw), width, windows, window_bytes)
        new = spread.of(raw)
        old = spread.of(base) if base is not None else None
        items = len(new) // width
        planes, kept = np.empty(width * items, np.uint8), bytearray(kept_bytes(items))
        before = old.data if old is not None else None
        count = self.split(new.data, before, planes.data, None, width, mode, alpha, None)
        zeros = int(np.count_nonzero(~planes.reshape(width, items).any(axis=0)))
        if grouped:
            count = self.split(new.data, before, planes.data, kept, width, mode, alpha, None)
        if count == 0:
            return 0, 0, 0, zeros, 0
        rows, ends = planes.reshape(width, items)[:, :count], [count]
        if segment_items:
            assert old is not None
            classes = _classes(old.data, kept if grouped else None, items, width)
            rows = rows[:, np.argsort(classes, kind="stable")]
            ends = list(segment_ends(np.bincount(classes, minlength=_CLASSES).tolist(), segment_items))
        weights = np.frombuffer(table, np.int64)
        information = distinct = 0
        for start, end in pairwise((0, *ends)):
            for row in rows[:, start:end]:
                tally = np.bincount(row, minlength=256)
                information += int(weights[end - start] - weights[tally].sum())
                distinct += int(np.count_nonzero(tally))
        return information, distinct, count, zeros, len(ends)

    def ratio(self, raw: Buffer, base: Buffer, windows: int, window_bytes: int, items_max: int, /) -> tuple[float, int]:
        """See Kernel."""
        spread = _Windows.over(len(raw), 4, windows, window_bytes)
        new, old = spread.of(raw).view(np.float32), spread.of(base).view(np.float32)
        step = max(1, -(-len(new) // items_max))
        new, old = new[::step], old[::step]
        exponents = old.view(np.uint32) >> 23 & 255
        usable = np.isfinite(new) & (exponents >= _RATIO_EXPONENT_MIN) & (exponents < 255)
        with np.errstate(over="ignore", under="ignore"):
            ratios = new[usable] / old[usable]
        if len(ratios) == 0:
            return 0.0, 0
        rank = (len(ratios) - 1) // 2
        return float(np.partition(ratios, rank)[rank]), len(ratios)

    def derive(self, master: Buffer, out: Buffer, rule: int, /) -> None:
        """See Kernel."""
        round_words(master, out, rule)


_CLASSES = 256
SEGMENT_ITEMS_MIN = 8192
"""Ordered elements that are coded together at least: each segment has a code table of its own, of up to 130 bytes. On
the full fine-tune 4096, 8192, 16 384 and 32 768 come to 35.26, 35.26, 35.28 and 35.32 % of raw."""


def _classes(base: Buffer, kept: Buffer | None, items: int, width: int) -> Bytes:
    """The class of each kept element: the top byte of its base rotated left by one bit."""
    words = np.frombuffer(base, _WORD[width], count=items)
    classes = (words >> 8 * width - 9 & 255).astype(np.uint8)
    return classes if kept is None else classes[_element_mask(kept, items)]


_SCALED_EXPONENT_MIN, _SCALED_EXPONENT_MAX = 8, 246


def _prediction(base: Buffer, width: int, items: int, mode: int, alpha: float) -> npt.NDArray[Any]:
    """The base, or what it predicts in mode SCALED."""
    words = np.frombuffer(base, _WORD[width], count=items)
    if mode != Mode.SCALED:
        return words
    exponent = (words >> 23) & 255
    scalable = (exponent >= _SCALED_EXPONENT_MIN) & (exponent <= _SCALED_EXPONENT_MAX)
    safe = np.where(scalable, words, np.float32(1).view(np.uint32)).view(np.float32)
    scaled = (safe * np.float32(alpha)).view(np.uint32)
    return np.where(scalable, scaled, words)


def _compact(words: npt.NDArray[Any], kept: Buffer) -> npt.NDArray[Any]:
    """Leave out the groups that are all zero, and note the others in the bitmap."""
    items = len(words)
    whole = items // GROUP_ITEMS * GROUP_ITEMS
    groups = words[:whole].reshape(-1, GROUP_ITEMS).any(axis=1)
    if whole < items:
        groups = np.append(groups, words[whole:].any())
    bitmap = np.frombuffer(kept, np.uint8)
    bitmap[:] = 0
    bits = np.packbits(groups, bitorder="little")
    bitmap[: len(bits)] = bits
    return words if groups.all() else words[np.repeat(groups, GROUP_ITEMS)[:items]]


def _element_mask(kept: Buffer, items: int) -> npt.NDArray[np.bool_]:
    bits = np.unpackbits(np.frombuffer(kept, np.uint8), bitorder="little", count=-(-items // GROUP_ITEMS))
    return np.repeat(bits.astype(bool), GROUP_ITEMS)[:items]


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
