"""Estimates from samples: against Shannon's formula, and the compiled kernel against its twin."""

from __future__ import annotations

import math
from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from castore.codec import transform
from castore.codec.entropy import _TABLE, _UNIT, Spread, estimate, median_ratio
from castore.codec.transform import BASE_MODES, WIDTHS, Kernel, Mode, NumpyKernel

COMPILED = transform.kernel if not isinstance(transform.kernel, NumpyKernel) else None
KERNELS = pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(NumpyKernel(), id="numpy"),
        pytest.param(COMPILED, id="compiled", marks=pytest.mark.skipif(COMPILED is None, reason="no compiled kernel")),
    ],
)
SPREAD = Spread(8, 2048)


@pytest.fixture(params=["numpy", "compiled"])
def either_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "compiled" and COMPILED is None:
        pytest.skip("no compiled kernel")
    monkeypatch.setattr(transform, "kernel", NumpyKernel() if request.param == "numpy" else COMPILED)


def shannon_bits(row: bytes) -> float:
    return sum(count * math.log2(len(row) / count) for count in Counter(row).values())


@pytest.mark.usefixtures("either_kernel")
class TestEstimate:
    def test_it_is_shannons_entropy_of_each_plane(self) -> None:
        raw = np.random.default_rng(1).binomial(40, 0.3, 2000).astype("<u2").tobytes()
        planes = [raw[0::2], raw[1::2]]
        correction = sum(len(set(plane)) - 1 for plane in planes) / (2 * math.log(2))
        expected = (sum(map(shannon_bits, planes)) + correction) / (8 * len(raw))
        assert estimate(raw, 2, SPREAD, mode=Mode.PLAIN).share == pytest.approx(expected, abs=1e-5)

    def test_all_bytes_alike_are_nothing_and_all_bytes_different_are_everything(self) -> None:
        assert estimate(b"\7" * 5000, 1, SPREAD, mode=Mode.PLAIN).share == pytest.approx(0, abs=1e-6)
        even = np.repeat(np.arange(256, dtype=np.uint8), 60).tobytes()
        assert estimate(even, 1, SPREAD, mode=Mode.PLAIN).share == pytest.approx(1, abs=0.002)

    def test_groups_of_zeros_cost_nothing_where_they_are_left_out(self) -> None:
        noise = np.random.default_rng(2).integers(1, 256, 32 * 100, np.uint8)
        half = np.concatenate([noise, np.zeros_like(noise)]).tobytes()
        alone = estimate(noise.tobytes(), 1, SPREAD, mode=Mode.PLAIN).share
        assert estimate(half, 1, SPREAD, mode=Mode.PLAIN).share == pytest.approx(alone / 2, rel=0.01)
        assert estimate(half, 1, SPREAD, mode=Mode.PLAIN, grouped=False).share > 0.6
        assert estimate(half, 1, SPREAD, mode=Mode.PLAIN).zero_share == 0.5

    def test_what_equals_its_base_is_zero(self) -> None:
        base = np.arange(1000, dtype="<u4")
        raw = base.copy()
        raw[::4] += 1
        found = estimate(raw.tobytes(), 4, SPREAD, mode=Mode.DIFFERENCE, base=base.tobytes())
        assert found.zero_share == 0.75

    def test_an_empty_buffer_is_no_trap(self) -> None:
        assert estimate(b"", 4, SPREAD, mode=Mode.ROTATE).share == 0
        assert estimate(b"abc", 4, SPREAD, mode=Mode.ROTATE).share == 0

    def test_a_sample_is_taken_from_the_whole_of_a_long_buffer(self) -> None:
        long = np.zeros(1 << 20, np.uint8)
        long[: 1 << 19] = np.random.default_rng(3).integers(0, 256, 1 << 19, np.uint8)
        assert estimate(long.tobytes(), 1, SPREAD, mode=Mode.PLAIN).share == pytest.approx(0.5, abs=0.08)


@pytest.mark.usefixtures("either_kernel")
class TestMedianRatio:
    def test_it_is_the_lower_median_of_what_can_be_divided(self) -> None:
        old = np.array([1, 2, 4, 0, np.inf, np.nan, 1e-40, 8], "<f4")
        new = np.array([3, 2, 2, 5, 1.0000, 1.0000, 1.000, np.inf], "<f4")
        assert median_ratio(new.tobytes(), old.tobytes(), SPREAD, items_max=100) == (1.0, 3)

    def test_nothing_to_divide_is_no_ratio(self) -> None:
        assert median_ratio(bytes(400), bytes(400), SPREAD, items_max=100) == (0.0, 0)

    def test_at_most_so_many_are_looked_at(self) -> None:
        ones = np.ones(100_000, "<f4").tobytes()
        ratio, usable = median_ratio(ones, ones, SPREAD, items_max=64)
        assert (ratio, usable) == (1.0, 64)


@pytest.mark.skipif(COMPILED is None, reason="no compiled kernel")
class TestTwins:
    def test_samples_agree_to_the_last_bit(self) -> None:
        assert COMPILED is not None
        rng = np.random.default_rng(4)
        for items, width, mode in product((0, 1, 31, 1000, 4096, 70_001), WIDTHS, Mode):
            if mode == Mode.SCALED and width != 4:
                continue
            raw, base = (rng.integers(0, 40, items * width, np.uint8).tobytes() for _ in range(2))
            other = base if mode in BASE_MODES else None
            may_order = other is not None and width > 1
            for grouped, segment_items in product((True, False), (0, 1, 512) if may_order else (0,)):
                arguments = (raw, other, width, mode, 0.875, 8, 2048, grouped, segment_items, _TABLE)
                assert COMPILED.sample(*arguments) == NumpyKernel().sample(*arguments), (items, width, mode, grouped)

    @given(st.data())
    def test_ratios_agree_on_any_bytes(self, data: st.DataObject) -> None:
        assert COMPILED is not None
        raw = data.draw(st.binary(max_size=600))
        base = data.draw(st.binary(min_size=len(raw), max_size=len(raw)))
        items_max = data.draw(st.integers(1, 40))
        arguments = (raw, base, 3, 64, items_max)
        assert COMPILED.ratio(*arguments) == NumpyKernel().ratio(*arguments)

    def test_arguments_that_do_not_fit_are_refused(self) -> None:
        assert COMPILED is not None
        raw = bytes(4096)
        for windows, window_bytes, table in ((1, 128, _TABLE), (8, 0, _TABLE), (8, 100, _TABLE), (8, 128, bytes(64))):
            with pytest.raises(ValueError, match=r"."):
                COMPILED.sample(raw, None, 4, Mode.PLAIN, 1.0, windows, window_bytes, True, 0, table)
        for base, windows, items_max in ((raw[:-1], 8, 10), (raw, 1, 10), (raw, 8, 0), (raw, 8, 5000)):
            with pytest.raises(ValueError, match=r"."):
                COMPILED.ratio(raw, base, windows, 128, items_max)


@KERNELS
def test_information_is_counted_in_units_of_the_table(kernel: Kernel) -> None:
    found = kernel.sample(b"\1\2" * 32, None, 1, Mode.PLAIN, 1.0, 8, 2048, True, 0, _TABLE)
    assert found == (64 * _UNIT, 2, 64, 0, 1)
