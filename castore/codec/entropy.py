"""What a sample says of the size that entropy coding will reach, so that work is only spent where it pays."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from castore.codec import transform
from castore.codec.transform import Mode
from castore.ids import Buffer


@dataclass(frozen=True, slots=True)
class Spread:
    """A sample: so many windows of so many bytes, spread evenly. Of a shorter buffer, all of it."""

    windows: int
    window_bytes: int
    """A multiple of GROUP_ITEMS elements."""

    @property
    def total_bytes(self) -> int:
        """Length of the sample of a long buffer."""
        return self.windows * self.window_bytes


@dataclass(frozen=True, slots=True)
class Estimate:
    """What byte planes of a buffer would come to."""

    share: float
    """Order-0 entropy (Shannon) of all planes, with the Miller-Madow correction for samples, as a share of the raw
    bytes."""
    zero_share: float
    """Elements that are zero after the change that the mode names: those equal to their base."""


def estimate(
    raw: Buffer,
    width: int,
    spread: Spread,
    *,
    mode: Mode,
    base: Buffer | None = None,
    alpha: float = 1.0,
    grouped: bool = True,
    ordered: bool = False,
) -> Estimate:
    """What planes of elements changed by `mode` would come to; groups of zeros are left out where `grouped`, elements
    sorted by the class of their base where `ordered`.
    """
    items = min(len(raw), spread.total_bytes) // width
    if items == 0:
        return Estimate(0.0, 0.0)
    segment_items = _SEGMENT_ITEMS_MIN if ordered else 0
    information, distinct, _, zeros, segments = transform.kernel.sample(
        raw, base, width, mode, alpha, spread.windows, spread.window_bytes, grouped, segment_items, _TABLE
    )
    correction = (distinct - segments * width) / (2 * math.log(2))
    return Estimate((information / _UNIT + correction) / (8 * width * items), zeros / items)


def median_ratio(raw: Buffer, base: Buffer, spread: Spread, *, items_max: int) -> tuple[float, int]:
    """The lower median of new to old float32 in at most `items_max` elements of a sample, and of how many: those whose
    old value is not near zero.
    """
    return transform.kernel.ratio(raw, base, spread.windows, spread.window_bytes, items_max)


_SEGMENT_ITEMS_MIN = 512
"""Of a sample. Fewer tell too little of a distribution."""
SAMPLE_ITEMS_MAX = 16 * 1024
_UNIT = 1 << 16


def _table() -> npt.NDArray[np.int64]:
    counts = np.arange(SAMPLE_ITEMS_MAX + 1, dtype=np.float64)
    counts[1:] *= np.log2(counts[1:])
    return np.rint(counts * _UNIT).astype(np.int64)


_TABLE = _table().data
"""n log2 n for every count that a sample can have: the information of N bytes is N log2 N - sum of n log2 n, in bits.
In fixed point, so that sums do not depend on their order."""
