"""Ranges of strided arrays against plain numpy indexing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from castore.tensors.strided import (
    extent,
    gather,
    host_words,
    is_dense,
    may_overlap_itself,
    rectangle_count,
    rectangles,
    row_major_stride,
    scatter,
)

SHAPES = st.lists(st.integers(1, 4), max_size=4).map(tuple)


@given(SHAPES, st.data())
def test_rectangles_hold_exactly_the_range_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    count = int(np.prod(shape, dtype=int))
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    numbers = np.arange(count).reshape(shape)
    found = [numbers[index].ravel() for index in rectangles(shape, start, stop)]
    assert np.concatenate([np.empty(0, int), *found]).tolist() == list(range(start, stop))
    assert len(found) <= max(1, 2 * len(shape) - 1)
    assert [len(part) for part in found] == [rectangle_count(shape, index) for index in rectangles(shape, start, stop)]


@given(SHAPES, st.permutations(range(4)), st.sampled_from([1, 2, 3, 4, 5, 8, 12, 16, 24]), st.data())
def test_scatter_is_the_inverse_of_gather(
    shape: tuple[int, ...], order: list[int], item_bytes: int, data: st.DataObject
) -> None:
    axes = [axis for axis in order if axis < len(shape)]
    items = np.frombuffer(
        np.random.default_rng(0).bytes(int(np.prod(shape, dtype=int)) * item_bytes), f"|V{item_bytes}"
    )
    array = items.reshape(shape).transpose(axes)
    expected = array.tobytes()
    words = host_words(array.ctypes.data, array.shape, array.strides, item_bytes, owner=array)
    start = data.draw(st.integers(0, len(expected)))
    stop = data.draw(st.integers(start, len(expected)))
    assert gather(words, start, stop).tobytes() == expected[start:stop]
    target = np.zeros(shape, f"|V{item_bytes}").transpose(axes)
    writable = host_words(target.ctypes.data, target.shape, target.strides, item_bytes, owner=target, writable=True)
    if start < stop:
        scatter(writable, start, expected[start:stop])
    assert target.tobytes() == bytes(start) + expected[start:stop] + bytes(len(expected) - stop)


@pytest.mark.parametrize(
    ("shape", "stride", "dense", "overlaps"),
    [
        ((), (), True, False),
        ((2, 3), (3, 1), True, False),
        ((2, 3), (1, 2), True, False),
        ((2, 3), (4, 1), False, False),
        ((2, 3), (0, 1), False, True),
        ((2, 3), (1, 1), False, True),
        ((2, 3), (-3, 1), True, False),
        ((1, 3), (99, 1), True, False),
        ((1, 3), (0, 1), True, False),
        ((0, 3), (7, 7), True, False),
        ((3, 2), (2, 3), False, True),
    ],
)
def test_layouts_are_told_apart(shape: tuple[int, ...], stride: tuple[int, ...], dense: bool, overlaps: bool) -> None:
    assert is_dense(shape, stride, 1) is dense
    assert may_overlap_itself(shape, stride, 1) is overlaps


@given(SHAPES, st.lists(st.integers(-5, 5), min_size=4, max_size=4))
def test_the_hull_is_where_the_elements_are(shape: tuple[int, ...], steps: list[int]) -> None:
    stride = [step * 4 for step in steps[: len(shape)]]
    offsets = [sum(i * s for i, s in zip(index, stride, strict=True)) for index in np.ndindex(*shape)]
    assert extent(shape, stride, 4) == (min(offsets), max(offsets) + 4)


def test_row_major_strides_are_numpys() -> None:
    for shape in [(), (3,), (2, 3, 4), (1, 5)]:
        assert row_major_stride(shape, 8) == np.empty(shape).strides
