"""Codec 16: the difference of a chunk from a base chunk, as byte planes (payload as in byte_planes.py, modes 2 to 4).

Dense training changes every float at every step, but little: the difference of the integer views (the distance in units
in the last place) is small, its upper planes are nearly empty, and it beats XOR by 2 to 6 points on fp32. XOR wins
where few elements changed. A scaled base wins where an optimizer decays untouched values: the second moment of a row
that no token touched is its old value times beta2^k, which one factor for the chunk predicts to the last bit or nearly
so.

Codec 18: the same, the elements sorted by the exponents of the base. A step of training moves weights of all sizes by
about as much, so the smaller a weight, the more units in the last place it moves: sorted, each range of sizes gets a
code table of its own. That is 6 % of the weights of a fine-tune and 1.4 % of its later saves.

Which of them, if any, is decided for each chunk from a sample, by estimated entropy, never by the leaf's name.
"""

from __future__ import annotations

from dataclasses import dataclass

from castore.codec import transform
from castore.codec.base import Elements
from castore.codec.byte_planes import decode_planes, encode_planes
from castore.codec.entropy import Spread, estimate, median_ratio
from castore.codec.transform import ALPHA_MAX, ALPHA_MIN, Mode
from castore.ids import Buffer

_SPREAD = Spread(8, 2048)
"""The sample: 8 places spread over the chunk, 16 KiB in all (1.6 % of a chunk)."""
_RATIO_ITEMS = 1024
_XOR_EQUAL_SHARE_MIN = 0.05
"""XOR is only tried where at least this share of the sampled elements did not change."""
_PREFER_SELF = 1.03
"""A delta must promise to be this much smaller than the chunk by itself: it costs a load the reading of its base."""
_PREFER_UNSCALED = 1.01
"""A factor must promise to gain this much: multiplying costs a pass, on every load too."""
_ORDER_GAIN_MIN = 0.012
"""Sorting must promise to save this share of the raw bytes, not of the stored ones: what it costs goes with the raw
ones (a good third more time for the chunk, on a save and on every load). A fine-tune keeps 95 % of the gain so."""


@dataclass(frozen=True, slots=True)
class Choice:
    """How to encode a chunk, and what share of the raw bytes the sample promises."""

    mode: Mode
    alpha: float
    share: float
    ordered: bool = False
    """As codec 18."""


def choose(raw: Buffer, base: Buffer, elements: Elements, *, may_order: bool = False) -> Choice:
    """The best mode for a chunk that has a base of the same length; ROTATE or PLAIN means: by itself. `may_order`
    allows for codec 18.
    """
    width = elements.item_bytes
    alone = Mode.ROTATE if elements.is_float else Mode.PLAIN
    best = Choice(alone, 1.0, estimate(raw, width, _SPREAD, mode=alone).share / _PREFER_SELF)
    difference = estimate(raw, width, _SPREAD, mode=Mode.DIFFERENCE, base=base)
    if difference.share < best.share:
        best = Choice(Mode.DIFFERENCE, 1.0, difference.share)
    if difference.zero_share >= _XOR_EQUAL_SHARE_MIN:
        share = estimate(raw, width, _SPREAD, mode=Mode.XOR, base=base).share
        if share < best.share:
            best = Choice(Mode.XOR, 1.0, share)
    if width == 4 and elements.is_float and (alpha := _decay(raw, base)) is not None:
        share = estimate(raw, width, _SPREAD, mode=Mode.SCALED, base=base, alpha=alpha).share * _PREFER_UNSCALED
        if share < best.share:
            best = Choice(Mode.SCALED, alpha, share)
    if may_order and best.mode in (Mode.DIFFERENCE, Mode.SCALED) and elements.is_float and width > 1:
        share = estimate(raw, width, _SPREAD, mode=best.mode, base=base, alpha=best.alpha, ordered=True).share
        if share + _ORDER_GAIN_MIN < best.share:
            best = Choice(best.mode, best.alpha, share, ordered=True)
    return best


def encode_delta(
    raw: Buffer, base: Buffer, elements: Elements, choice: Choice, *, thorough: bool = False
) -> bytes | None:
    """The payload of codec 16 or 18, as the choice says, or None when it would not be shorter than `raw`."""
    planes = transform.split(
        raw, elements.item_bytes, mode=choice.mode, base=base, alpha=choice.alpha, ordered=choice.ordered
    )
    return encode_planes(planes, raw, mode=choice.mode, alpha=choice.alpha, thorough=thorough)


def decode_delta(stored: memoryview, out: memoryview, base: Buffer, *, ordered: bool = False) -> None:
    """Fill `out` from a payload of codec 16, or 18 when `ordered`, and the base's raw bytes. Raises CodecError."""
    decode_planes(stored, out, base=base, ordered=ordered)


def _decay(raw: Buffer, base: Buffer) -> float | None:
    """The median ratio of new to old floats, if it can serve as a factor: untouched values decay by one ratio."""
    ratio, usable = median_ratio(raw, base, _SPREAD, items_max=_RATIO_ITEMS)
    if usable < _RATIO_ITEMS // 16:
        return None
    return ratio if ALPHA_MIN <= ratio <= ALPHA_MAX and ratio != 1.0 else None
