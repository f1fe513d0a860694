"""float32 rounded to 16 bits: in C and in numpy the same bits, those of numpy and torch, flush-to-zero on or off."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from castore.codec.rounding import Rule
from castore.codec.transform import Kernel
from tests.codec.test_transform import COMPILED, KERNELS, needs_compiled

MANTISSAS = (
    0,
    1,
    0xFFF,
    0x1000,
    0x1001,
    0x3000,
    0x7FFF,
    0x8000,
    0x8001,
    0x18000,
    0x3FFFFF,
    0x400000,
    0x7FFFFF,
)
EDGES = np.array(
    [
        sign << 31 | exponent << 23 | mantissa
        for sign, exponent, mantissa in itertools.product((0, 1), range(256), MANTISSAS)
    ],
    np.uint32,
)
"""Every exponent and sign with mantissas at and around the ties: zeros, subnormals, infinities and NaN among them."""
NAN = (EDGES & 0x7FFFFFFF) > 0x7F800000
any_words = st.lists(st.integers(0, 2**32 - 1), max_size=200).map(lambda words: np.array(words, np.uint32))


def rounded(kernel: Kernel, words: npt.NDArray[np.uint32], rule: Rule) -> npt.NDArray[np.uint16]:
    out = np.empty(len(words), np.uint16)
    kernel.derive(words.tobytes(), out.view(np.uint8).data, rule)
    return out


def torch_rounded(words: npt.NDArray[np.uint32], dtype: torch.dtype) -> npt.NDArray[np.uint16]:
    copy = torch.from_numpy(words.view(np.float32)).to(dtype)
    return copy.view(torch.int16).numpy().view(np.uint16)


@KERNELS
def test_rounding_to_nearest_is_what_torch_does(kernel: Kernel) -> None:
    for rule, dtype in ((Rule.BFLOAT16_NEAREST, torch.bfloat16), (Rule.FLOAT16_NEAREST, torch.float16)):
        found = rounded(kernel, EDGES, rule)
        assert np.array_equal(found[~NAN], torch_rounded(EDGES, dtype)[~NAN])


@KERNELS
def test_a_nan_stays_one_with_its_sign(kernel: Kernel) -> None:
    for rule in (Rule.BFLOAT16_NEAREST, Rule.FLOAT16_NEAREST, Rule.FLOAT16_CUT):
        found = rounded(kernel, EDGES[NAN], rule)
        infinite = 0x7F80 if rule is Rule.BFLOAT16_NEAREST else 0x7C00
        assert ((found & 0x7FFF) > infinite).all()
        assert ((found >> 15) == (EDGES[NAN] >> 31)).all()


@KERNELS
def test_bfloat16_cut_off_is_the_upper_half(kernel: Kernel) -> None:
    assert np.array_equal(rounded(kernel, EDGES, Rule.BFLOAT16_CUT), (EDGES >> 16).astype(np.uint16))


@KERNELS
def test_float16_cut_off_is_the_nearest_towards_zero(kernel: Kernel) -> None:
    numbers = EDGES[~NAN].view(np.float32).astype(np.float64)
    found = rounded(kernel, EDGES[~NAN], Rule.FLOAT16_CUT)
    values = found.view(np.float16).astype(np.float64)
    assert (np.signbit(values) == np.signbit(numbers)).all()
    assert (np.abs(values) <= np.abs(numbers)).all()
    finite = np.isfinite(numbers)
    further = (found[finite] + np.uint16(1)).view(np.float16).astype(np.float64)
    assert (np.abs(further) > np.abs(numbers[finite])).all()
    assert np.isinf(values[~finite]).all()


@needs_compiled
@given(any_words, st.sampled_from(Rule))
def test_both_kernels_agree_on_any_bits(words: npt.NDArray[np.uint32], rule: Rule) -> None:
    from castore.codec.transform import NumpyKernel

    assert COMPILED is not None
    assert np.array_equal(rounded(COMPILED, words, rule), rounded(NumpyKernel(), words, rule))


@KERNELS
@pytest.mark.parametrize("rule", Rule)
def test_flush_to_zero_changes_nothing(kernel: Kernel, rule: Rule) -> None:
    before = rounded(kernel, EDGES, rule)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such setting")
    try:
        after = rounded(kernel, EDGES, rule)
    finally:
        torch.set_flush_denormal(False)
    assert np.array_equal(before, after)


@KERNELS
def test_lengths_that_do_not_fit_are_refused(kernel: Kernel) -> None:
    with pytest.raises(ValueError, match=r"derive needs|broadcast"):
        kernel.derive(bytes(16), bytearray(6), Rule.BFLOAT16_CUT)
