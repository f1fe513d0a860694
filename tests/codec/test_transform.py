"""Elements become byte planes and back: in C and in numpy the same, bit for bit, whatever the bits are."""

from __future__ import annotations

import importlib
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import product
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import castore.codec
from castore.codec import transform
from castore.codec.transform import BASE_MODES, GROUP_ITEMS, WIDTHS, Kernel, Mode, NumpyKernel
from tests.suites.flushed import flushed_denormals


def compiled_kernel() -> ModuleType | None:
    try:
        return importlib.import_module("castore.codec._kernel")
    except ImportError:
        return None


COMPILED = compiled_kernel()
needs_compiled = pytest.mark.skipif(
    COMPILED is None, reason="castore.codec._kernel is absent: built without a compiler"
)
KERNELS = pytest.mark.parametrize(
    "kernel", [NumpyKernel(), pytest.param(COMPILED, marks=needs_compiled)], ids=["numpy", "C"]
)

CASES = [(width, mode) for width in WIDTHS for mode in Mode if mode != Mode.SCALED or width == 4]
SIZES = (0, 1, 2, 31, 32, 33, 63, 64, 65, 1023, 1024, 1025, 2047, 2048, 3000)
"""Elements: around the group of 32 and the kernel's block of 1024."""
ALPHAS = (0.5, 0.97, 0.999, 1.001, 2.0)


def alpha_of(mode: Mode) -> float:
    return 0.999 if mode == Mode.SCALED else 1.0


def inputs(width: int, items: int, seed: int) -> tuple[bytes, bytes]:
    """Elements and a base that is near, equal in places (whole groups), far in others."""
    rng = np.random.default_rng(seed)
    word = np.dtype(f"<u{width}")
    base = rng.integers(0, 2 ** (8 * width), items, dtype=word, endpoint=False)
    raw = base + rng.integers(-2, 3, items).astype(word)
    for start in range(0, items, 3 * GROUP_ITEMS):
        raw[start : start + GROUP_ITEMS] = base[start : start + GROUP_ITEMS]
        base[start + GROUP_ITEMS : start + 2 * GROUP_ITEMS] = 0
        raw[start + GROUP_ITEMS : start + 2 * GROUP_ITEMS] = 0
    raw[items // 2 :] ^= rng.integers(0, 2, items - items // 2).astype(word) << word.type(8 * width - 1)
    tail = b"tail"[: seed % width]
    return raw.tobytes() + tail, base.tobytes() + tail


def unaligned(data: bytes, offset: int) -> memoryview:
    """The same bytes, `offset` bytes behind an address that every element would like."""
    memory = bytearray(offset) + bytearray(data) + bytearray(b"x" * 8)
    return memoryview(memory)[offset : offset + len(data)]


def split(
    kernel: Any,
    raw: bytes,
    base: bytes | None,
    width: int,
    mode: Mode,
    *,
    offset: int = 0,
    grouped: bool = True,
    alpha: float | None = None,
) -> tuple[list[bytes], bytes | None]:
    """Planes (of the kept elements) and the bitmap; `offset` misplaces every buffer."""
    items = len(raw) // width
    planes = unaligned(bytes(width * items), offset)
    kept = unaligned(bytes(transform.kept_bytes(items)), offset) if grouped else None
    other = unaligned(base, (offset + 3) % 8) if base is not None else None
    factor = alpha_of(mode) if alpha is None else alpha
    count = kernel.split(unaligned(raw, offset), other, planes, kept, width, mode, factor, None)
    rows = [bytes(planes[index * items : index * items + count]) for index in range(width)]
    return rows, bytes(kept) if kept is not None else None


def merge(
    kernel: Any,
    planes: tuple[list[bytes], bytes | None],
    base: bytes | None,
    length: int,
    mode: Mode,
    *,
    offset: int = 0,
    alpha: float | None = None,
) -> bytes:
    rows, kept = planes
    out = unaligned(bytes(length), offset)
    other = unaligned(base, (offset + 5) % 8) if base is not None else None
    factor = alpha_of(mode) if alpha is None else alpha
    kernel.merge(tuple(unaligned(row, offset) for row in rows), kept, other, out, len(rows), mode, factor, False)
    return bytes(out)


# ---- against the formulas ----------------------------------------------------------------------------------


def plainly(raw: bytes, base: bytes, width: int, mode: Mode) -> list[int]:
    """The changed elements, one at a time, by the formulas at the head of _kernel.c (without scaling)."""
    bits, changed = 8 * width, []
    for at in range(0, len(raw) // width * width, width):
        element, other = (int.from_bytes(data[at : at + width], "little") for data in (raw, base))
        if mode == Mode.ROTATE:
            element = (element << 1 | element >> (bits - 1)) % 2**bits
        elif mode == Mode.XOR:
            element ^= other
        elif mode == Mode.DIFFERENCE:
            difference = (element - other) % 2**bits
            sign = 2**bits - 1 if difference >> (bits - 1) else 0
            element = (difference << 1) % 2**bits ^ sign
        changed.append(element)
    return changed


@KERNELS
@pytest.mark.parametrize(("width", "mode"), [case for case in CASES if case[1] != Mode.SCALED])
def test_planes_hold_what_the_formulas_say(kernel: Kernel, width: int, mode: Mode) -> None:
    raw, base = inputs(width, 200, 1)
    changed = plainly(raw, base, width, mode)
    groups = [changed[at : at + GROUP_ITEMS] for at in range(0, 200, GROUP_ITEMS)]
    kept = [element for group in groups if any(group) for element in group]
    bitmap = sum(1 << index for index, group in enumerate(groups) if any(group))
    rows, found = split(kernel, raw, base if mode in BASE_MODES else None, width, mode)
    assert found == bitmap.to_bytes(1, "little")
    assert rows == [bytes(element >> (8 * index) & 255 for element in kept) for index in range(width)]
    whole, _ = split(kernel, raw, base if mode in BASE_MODES else None, width, mode, grouped=False)
    assert whole == [bytes(element >> (8 * index) & 255 for element in changed) for index in range(width)]


@KERNELS
def test_small_differences_of_either_sign_get_small_codes(kernel: Kernel) -> None:
    base = np.full(5, 1000, "<u4")
    raw = (base.astype(np.int64) + np.array([0, -1, 1, -2, 2])).astype("<u4")
    rows, _ = split(kernel, raw.tobytes(), base.tobytes(), 4, Mode.DIFFERENCE)
    assert rows == [bytes([0, 1, 2, 3, 4]), bytes(5), bytes(5), bytes(5)]


@KERNELS
def test_a_scaled_base_predicts_the_rounded_product(kernel: Kernel) -> None:
    rng = np.random.default_rng(2)
    base = rng.standard_normal(500).astype("<f4")
    for alpha in ALPHAS:
        raw = base * np.float32(alpha)
        rows, kept = split(kernel, raw.tobytes(), base.tobytes(), 4, Mode.SCALED, alpha=alpha)
        assert rows == [b""] * 4, "every product was predicted to the last bit"
        assert kept == bytes(2)
        assert merge(kernel, (rows, kept), base.tobytes(), 2000, Mode.SCALED, alpha=alpha) == raw.tobytes()


# ---- back again --------------------------------------------------------------------------------------------


@KERNELS
@pytest.mark.parametrize(("width", "mode"), CASES)
def test_merging_undoes_splitting(kernel: Kernel, width: int, mode: Mode) -> None:
    for items, grouped in product(SIZES, (True, False)):
        raw, base = inputs(width, items, items)
        other = base if mode in BASE_MODES else None
        rows, kept = split(kernel, raw, other, width, mode, grouped=grouped)
        whole = len(raw) // width * width
        assert merge(kernel, (rows, kept), other, whole, mode) == raw[:whole], (items, grouped)


@needs_compiled
@pytest.mark.parametrize(("width", "mode"), CASES)
def test_the_compiled_kernel_does_the_same_as_its_twin(width: int, mode: Mode) -> None:
    twin = NumpyKernel()
    for items, grouped, offset in product(SIZES, (True, False), (0, 1, 7)):
        raw, base = inputs(width, items, items + offset)
        other = base if mode in BASE_MODES else None
        expected = split(twin, raw, other, width, mode, grouped=grouped)
        found = split(COMPILED, raw, other, width, mode, grouped=grouped, offset=offset)
        assert found == expected, (items, grouped, offset)
        whole = len(raw) // width * width
        back = merge(COMPILED, expected, other, whole, mode, offset=offset)
        assert back == merge(twin, found, other, whole, mode, offset=offset) == raw[:whole], (items, grouped, offset)


@needs_compiled
@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_the_kernels_agree_on_any_bytes(data: st.DataObject) -> None:
    width, mode = data.draw(st.sampled_from(CASES))
    raw = data.draw(st.binary(max_size=400))
    base = data.draw(st.binary(min_size=len(raw), max_size=len(raw))) if mode in BASE_MODES else None
    alpha = data.draw(st.floats(0.5, 2.0, width=32))
    offset = data.draw(st.integers(0, 7))
    expected = split(NumpyKernel(), raw, base, width, mode, alpha=alpha)
    assert split(COMPILED, raw, base, width, mode, alpha=alpha, offset=offset) == expected
    whole = len(raw) // width * width
    for kernel in (NumpyKernel(), COMPILED):
        assert merge(kernel, expected, base, whole, mode, alpha=alpha, offset=offset) == raw[:whole]


# ---- odd floats --------------------------------------------------------------------------------------------

ODD_WORDS = np.array(
    [
        *(0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x007FFFFF, 0x00800000, 0x04000000, 0x03FFFFFF),
        *(0x7F800000, 0xFF800000, 0x7F800001, 0x7FC00000, 0xFFC00001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F7FFFFF),
        *(0x7B7FFFFF, 0x7B800000, 0x3F800000, 0xBF800000, 0x3F800001, 0x7F000000, 0x00400000, 0x80000002),
    ],
    "<u4",
)
"""Zeros, subnormals, the least normal, infinities, quiet and signalling NaNs with payloads, the borders of scaling."""


@KERNELS
@pytest.mark.parametrize("flush", [False, True], ids=["denormals kept", "denormals flushed"])
def test_odd_floats_survive_whatever_the_processor_does_with_them(kernel: Kernel, flush: bool) -> None:
    raw = np.tile(ODD_WORDS, len(ODD_WORDS)).tobytes()
    base = np.repeat(ODD_WORDS, len(ODD_WORDS)).tobytes()
    cases = [(mode, alpha) for mode in Mode for alpha in (ALPHAS if mode == Mode.SCALED else (1.0,))]
    expected = [
        split(NumpyKernel(), raw, base if mode in BASE_MODES else None, 4, mode, alpha=alpha) for mode, alpha in cases
    ]
    with flushed_denormals() if flush else nullcontext():
        for (mode, alpha), planes in zip(cases, expected, strict=True):
            other = base if mode in BASE_MODES else None
            assert split(kernel, raw, other, 4, mode, alpha=alpha) == planes, (mode, alpha)
            assert merge(kernel, planes, other, len(raw), mode, alpha=alpha) == raw, (mode, alpha)


# ---- the functions in front --------------------------------------------------------------------------------


@pytest.mark.parametrize("use", ["best", "numpy"])
@pytest.mark.parametrize(("width", "mode"), CASES)
def test_split_and_merge_choose_memory_and_leave_groups_out(
    monkeypatch: pytest.MonkeyPatch, use: str, width: int, mode: Mode
) -> None:
    if use == "numpy":
        monkeypatch.setattr(transform, "kernel", NumpyKernel())
    for items in (0, 5, 100, 3000):
        raw, base = inputs(width, items, 3)
        other = base if mode in BASE_MODES else None
        planes = transform.split(raw, width, mode=mode, base=other, alpha=alpha_of(mode))
        kept = planes.array.shape[1]
        assert planes.array.shape[0] == width
        assert (planes.kept is None) == (kept == items)
        if planes.kept is not None:
            assert transform.kept_count(planes.kept, items) == kept
        out = memoryview(bytearray(items * width))
        rows = [row.tobytes() for row in planes.array]
        transform.merge(rows, out, mode=mode, kept=planes.kept, base=other, alpha=alpha_of(mode))
        assert out == raw[: items * width]


@pytest.mark.parametrize(
    ("bitmap", "items", "count"),
    [(b"\0", 32, 0), (b"\1", 32, 32), (b"\1", 5, 5), (b"\3", 33, 33), (b"\2", 33, 1), (b"\xff", 64, 64), (b"", 0, 0)],
)
def test_the_bitmap_tells_how_many_elements_are_kept(bitmap: bytes, items: int, count: int) -> None:
    assert transform.kept_count(bitmap, items) == count
    assert transform.kept_bytes(items) == len(bitmap)


def test_threads_have_memory_of_their_own() -> None:
    states = [inputs(4, 3000, seed) for seed in range(8)]

    def work(index: int) -> bool:
        for _ in range(10):
            raw, base = states[index]
            planes = transform.split(raw, 4, mode=Mode.DIFFERENCE, base=base)
            rows = [row.tobytes() for row in planes.array]
            out = memoryview(bytearray(12_000))
            transform.merge(rows, out, mode=Mode.DIFFERENCE, kept=planes.kept, base=base)
            if out != raw[:12_000]:
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))


# ---- buffers that do not fit -------------------------------------------------------------------------------


@KERNELS
def test_buffers_that_are_too_short_are_refused_before_they_are_touched(kernel: Kernel) -> None:
    raw = bytes(range(200)) * 2
    planes, kept, out = memoryview(bytearray(400)), bytearray(1), memoryview(bytearray(400))
    rows = (bytes(100),) * 4
    for call in (
        lambda: kernel.split(raw, None, planes[:399], kept, 4, Mode.PLAIN, 1.0, None),
        lambda: kernel.split(raw, raw[:399], planes, kept, 4, Mode.XOR, 1.0, None),
        lambda: kernel.merge((bytes(100),) * 3 + (bytes(99),), None, None, out, 4, Mode.PLAIN, 1.0, False),
        lambda: kernel.merge(rows, None, raw[:399], out, 4, Mode.XOR, 1.0, False),
    ):
        with pytest.raises(ValueError, match=r"."):
            call()


@needs_compiled
def test_the_compiled_kernel_checks_what_numpy_cannot_get_wrong() -> None:
    assert COMPILED is not None
    raw, planes = bytes(64), bytearray(64)
    for width, mode, alpha, base in (
        (3, 0, 1.0, None),
        (0, 0, 1.0, None),
        (16, 0, 1.0, None),
        (4, 5, 1.0, None),
        (4, -1, 1.0, None),
        (4, Mode.XOR, 1.0, None),
        (4, Mode.DIFFERENCE, 1.0, None),
        (8, Mode.SCALED, 1.0, raw),
    ):
        with pytest.raises(ValueError, match=r"."):
            COMPILED.split(raw, base, planes, None, width, mode, alpha, None)
        with pytest.raises(ValueError, match=r"."):
            COMPILED.merge((bytes(64 // max(width, 1)),) * width, None, base, planes, width, mode, alpha, False)
    with pytest.raises(ValueError, match="plane"):
        COMPILED.merge((bytes(16),) * 3, None, None, planes, 4, Mode.PLAIN, 1.0, False)
    with pytest.raises(ValueError, match="plane"):
        COMPILED.merge((bytes(16), bytes(17), bytes(16), bytes(16)), None, None, planes, 4, Mode.PLAIN, 1.0, False)
    with pytest.raises(ValueError, match="kept"):
        COMPILED.split(raw, None, planes, bytearray(), 4, Mode.PLAIN, 1.0, None)
    with pytest.raises(ValueError, match="kept"):
        COMPILED.merge((bytes(16),) * 4, b"", None, planes, 4, Mode.PLAIN, 1.0, False)
    with pytest.raises((TypeError, BufferError)):
        COMPILED.split(raw, None, bytes(64), None, 4, Mode.PLAIN, 1.0, None)
    with pytest.raises((TypeError, BufferError)):
        COMPILED.split(raw, None, planes, bytes(1), 4, Mode.PLAIN, 1.0, None)


# ---- the choice --------------------------------------------------------------------------------------------


@needs_compiled
def test_the_compiled_kernel_is_used_where_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CASTORE_KERNEL", raising=False)
    assert transform._best_kernel() is COMPILED


def test_numpy_is_used_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASTORE_KERNEL", "numpy")
    assert isinstance(transform._best_kernel(), NumpyKernel)


def test_numpy_is_used_where_nothing_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CASTORE_KERNEL", raising=False)
    monkeypatch.setitem(sys.modules, "castore.codec._kernel", None)
    monkeypatch.delattr(castore.codec, "_kernel", raising=False)
    assert isinstance(transform._best_kernel(), NumpyKernel)
