"""Codec 16: the difference of a chunk from a base chunk, as byte planes (payload as in byte_planes.py, modes 2 to 4).

Dense training changes every float at every step, but little: the difference of the integer views (the distance in units
in the last place) is small, its upper planes are nearly empty, and it beats XOR by 2 to 6 points on fp32. XOR wins
where few elements changed. A scaled base wins where an optimizer decays untouched values: the second moment of a row
that no token touched is its old value times beta2^k, which one factor for the chunk predicts to the last bit or nearly
so.

Which of them, if any, is decided for each chunk from a sample, by estimated entropy, never by the leaf's name.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from castore.codec import transform
from castore.codec.base import Elements
from castore.codec.byte_planes import decode_planes, encode_planes
from castore.codec.entropy import order0_shares
from castore.codec.transform import ALPHA_MAX, ALPHA_MIN, Mode
from castore.ids import Buffer

_WINDOWS, _WINDOW_BYTES = 8, 2048
"""The sample: 8 places spread over the chunk, 16 KiB in all (1.6 % of a chunk)."""
_RATIO_ITEMS = 1024
_XOR_EQUAL_SHARE_MIN = 0.05
"""XOR is only tried where at least this share of the sampled elements did not change."""
_PREFER_SELF = 1.03
"""A delta must promise to be this much smaller than the chunk by itself: it costs a load the reading of its base."""
_PREFER_UNSCALED = 1.01
"""A factor must promise to gain this much: multiplying costs a pass, on every load too."""


@dataclass(frozen=True, slots=True)
class Choice:
    """How to encode a chunk, and what share of the raw bytes the sample promises."""

    mode: Mode
    alpha: float
    share: float


def choose(raw: Buffer, base: Buffer, elements: Elements) -> Choice:
    """The best mode for a chunk that has a base of the same length; ROTATE or PLAIN means: by itself."""
    width = elements.item_bytes
    sample, other = _sample(raw, width), _sample(base, width)
    alone = Mode.ROTATE if elements.is_float else Mode.PLAIN
    best = Choice(alone, 1.0, _share(sample, None, width, alone) / _PREFER_SELF)
    candidates = [(Mode.DIFFERENCE, 1.0)]
    if np.count_nonzero(sample == other) >= _XOR_EQUAL_SHARE_MIN * len(sample):
        candidates.append((Mode.XOR, 1.0))
    if width == 4 and elements.is_float and (alpha := _decay(sample, other)) is not None:
        candidates.append((Mode.SCALED, alpha))
    for mode, alpha in candidates:
        share = _share(sample, other, width, mode, alpha) * (_PREFER_UNSCALED if mode is Mode.SCALED else 1)
        if share < best.share:
            best = Choice(mode, alpha, share)
    return best


def encode_delta(
    raw: Buffer, base: Buffer, elements: Elements, choice: Choice, *, thorough: bool = False
) -> bytes | None:
    """The payload of codec 16, or None when it would not be shorter than `raw`."""
    planes = transform.split(raw, elements.item_bytes, mode=choice.mode, base=base, alpha=choice.alpha)
    return encode_planes(planes, raw, mode=choice.mode, alpha=choice.alpha, thorough=thorough)


def decode_delta(stored: memoryview, out: memoryview, base: Buffer) -> None:
    """Fill `out` from a payload and the base's raw bytes. Raises CodecError."""
    decode_planes(stored, out, base=base)


def _sample(data: Buffer, width: int) -> npt.NDArray[np.uint8]:
    """Windows spread evenly, each starting on an element."""
    array = np.frombuffer(data, np.uint8)
    if len(array) <= _WINDOWS * _WINDOW_BYTES:
        return array[: len(array) // width * width]
    step = (len(array) - _WINDOW_BYTES) // (_WINDOWS - 1) // width * width
    return np.concatenate([array[at * step : at * step + _WINDOW_BYTES] for at in range(_WINDOWS)])


def _share(
    sample: npt.NDArray[np.uint8],
    other: npt.NDArray[np.uint8] | None,
    width: int,
    mode: Mode,
    alpha: float = 1.0,
) -> float:
    """Estimated share of the raw bytes: order-0 entropy (Shannon) of each plane of the elements that are kept."""
    base = other.data if other is not None else None
    planes = transform.split(sample.data, width, mode=mode, base=base, alpha=alpha).array
    kept = planes.shape[1]
    share = float(np.mean(order0_shares(planes)))
    return share * float(kept) / max(1, len(sample) // width)


def _decay(sample: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> float | None:
    """The median ratio of new to old floats, if it can serve as a factor: untouched values decay by one ratio."""
    new, old = sample.view(np.float32), other.view(np.float32)
    step = max(1, len(new) // _RATIO_ITEMS)
    new, old = new[::step], old[::step]
    usable = np.isfinite(new) & np.isfinite(old) & (np.abs(old) > np.float32(1e-30))
    if np.count_nonzero(usable) < _RATIO_ITEMS // 16:
        return None
    with np.errstate(over="ignore", under="ignore"):
        ratio = float(np.median(new[usable] / old[usable]))
    return ratio if ALPHA_MIN <= ratio <= ALPHA_MAX and ratio != 1.0 else None
