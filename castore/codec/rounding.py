"""float32 rounded to 16 bits: the same on every machine, whatever its flush-to-zero setting.

    1  bfloat16, to nearest, ties to even      NaN: upper half, quiet bit set
    2  bfloat16, cut off                       the upper half of the bits, NaN included
    3  float16, to nearest, ties to even       NaN: sign, quiet bit and upper 10 bits of the payload
    4  float16, cut off (towards zero)         too large: the largest finite; NaN as in 3

_kernel.c has the same in C, in integer arithmetic, tested bit for bit. numpy's own conversion to float16 obeys no
flush-to-zero setting either: the processor's instruction ignores it for what comes out, a subnormal that goes in
rounds to zero anyway, and where there is no such instruction numpy counts in integers.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from castore.ids import Buffer

Words = npt.NDArray[np.uint32]


class Rule(IntEnum):
    """Format and rounding of a copy. Permanent: written into payloads."""

    BFLOAT16_NEAREST = 1
    BFLOAT16_CUT = 2
    FLOAT16_NEAREST = 3
    FLOAT16_CUT = 4


_INFINITE, _MAGNITUDE = 0x7F80_0000, np.uint32(0x7FFF_FFFF)


def round_words(master: Buffer, out: Buffer, rule: int) -> None:
    """Fill `out` (2 bytes an element) with the rounded elements of `master` (4 bytes an element)."""
    words = np.frombuffer(master, "<u4")
    nearest = rule in (Rule.BFLOAT16_NEAREST, Rule.FLOAT16_NEAREST)
    rounded = _to_bfloat16 if rule in (Rule.BFLOAT16_NEAREST, Rule.BFLOAT16_CUT) else _to_float16
    np.frombuffer(out, "<u2")[:] = rounded(words, nearest=nearest)


def _to_bfloat16(words: Words, *, nearest: bool) -> npt.NDArray[Any]:
    if not nearest:
        return words >> 16
    to_even = words + (np.uint32(0x7FFF) + (words >> 16 & 1)) >> 16
    return np.where(words & _MAGNITUDE > _INFINITE, words >> 16 | 0x40, to_even)


def _to_float16(words: Words, *, nearest: bool) -> npt.NDArray[Any]:
    magnitude = words & _MAGNITUDE
    with np.errstate(all="ignore"):
        to_even = magnitude.view("<f4").astype("<f2")
        rounded = to_even.view("<u2")
        if not nearest:
            rounded = rounded - (to_even.astype("<f4").view("<u4") > magnitude)
    nan = 0x7E00 | magnitude >> 13 & 0x3FF
    return words >> 16 & 0x8000 | np.where(magnitude > _INFINITE, nan, rounded)
