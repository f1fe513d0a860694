"""Codec 3: the bytes of each element regrouped by significance, each plane entropy-coded on its own.

Training floats have almost random mantissas and very predictable exponents. Rotating a float left by one bit moves the
sign to the low end and fills the top plane with the exponent; that plane then shrinks to about a third and the others
do not shrink at all, so they are stored as they are and cost a copy.

    0  1  w: element width 1, 2, 4 or 8
    1  1  mode: how elements were changed before they were split (below)
    2  2  flags    1: groups of zeros were left out
    4  4  alpha, float32: the factor of mode 4, else 1.0
    8     w plane heads, least significant plane first
              method   1    0 raw, 1 zstd, 2 one repeated byte
              length   4    stored bytes of the plane
    8+5w  with flag 1: the bitmap of kept groups, one bit for 32 elements, least significant bit first; the last group
          may be short. A plane then holds the bytes of the kept elements only, the others are zero
          the planes, then the raw_bytes % w bytes that fill no element

    mode  0 as they are    1 rotated left by one bit
          2 zigzag(element - base)    3 element ^ base    4 zigzag(element - prediction)

Elements are unsigned integers that wrap around. zigzag(d) = (d << 1) ^ (d >> bits - 1), the right shift being
arithmetic. The prediction (w = 4 only) is the float32 product alpha * base, rounded to nearest even, where the exponent
field of the base is in 8..246, and the base itself elsewhere; alpha is in 0.5..2, so that no subnormal, infinity or NaN
takes part. Modes 2 to 4 occur in codecs 16 and 18 only.

Planes of codec 18 hold the elements, after groups of zeros were left out, sorted by class; those of one class stay in
their order. The class is the top byte of the base's element rotated left by one bit: the exponent of a float32 or
bfloat16. w is 2, 4 or 8. A zstd frame may end blocks where classes end; a reader need not know of it.

The zstd parameters switch off almost all match finding: on exponent planes spurious matches displace cheap literals,
and higher levels make the result larger (DESIGN figures: 67.5 % of bf16 here, 69.6 % at level 1, 71.4 % at level 3).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import zstandard

from castore.codec import transform
from castore.codec.base import Elements
from castore.codec.entropy import Spread, estimate
from castore.codec.transform import Bytes, Mode, Planes
from castore.codec.zstd_frame import ThreadContexts, decompressed
from castore.errors import CodecError
from castore.ids import Buffer

METHOD_RAW, METHOD_ZSTD, METHOD_CONSTANT = 0, 1, 2
_HEAD = struct.Struct("<BBHf")
_PLANE = struct.Struct("<BI")

KEEP_SHARE_MAX = 0.98
"""A plane that zstd does not bring below this share is stored raw: 2 % is less than what its decoding costs a load."""

SAMPLE_BYTES_MIN = 16 * 1024
"""Planes up to this long are tried as they are; of longer ones a sample decides first."""
_SPREAD = Spread(8, 512)
_SAMPLE_SHARE_MAX = 0.985
"""Order-0 entropy of the sample (bits / 8) above which a plane is taken to be noise."""

_THOROUGH_LEVEL = 19
"""For archives. Levels in between lose; the parser of the highest ones finds what repeats in upper planes: 1 to 4 % of
the stored bytes on real runs, at a hundredth of the speed."""

_GROUPED = 1
_MODES = {mode.value: mode for mode in Mode}


def _tuned_compressor() -> zstandard.ZstdCompressor:
    return zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(
            strategy=zstandard.STRATEGY_FAST,
            hash_log=6,
            chain_log=6,
            search_log=1,
            min_match=7,
            window_log=17,
            write_content_size=False,
            write_checksum=False,
        )
    )


def _thorough_compressor() -> zstandard.ZstdCompressor:
    return zstandard.ZstdCompressor(level=_THOROUGH_LEVEL, write_content_size=False, write_checksum=False)


_contexts = ThreadContexts(_tuned_compressor)
_thorough_contexts = ThreadContexts(_thorough_compressor)


class BytePlanes:
    """Byte planes, each raw, zstd or constant."""

    number = 3
    name = "planes"

    def encode(self, raw: Buffer, elements: Elements) -> bytes | None:
        """Planes of `elements.item_bytes`; floats are rotated first."""
        width = elements.item_bytes
        if len(raw) < 2 * width:
            return None
        mode = Mode.ROTATE if elements.is_float else Mode.PLAIN
        return encode_planes(transform.split(raw, width, mode=mode), raw, mode=mode)

    def decode(self, stored: memoryview, out: memoryview) -> None:
        """Decode each plane and put the elements together again."""
        decode_planes(stored, out, base=None)


def encode_planes(
    planes: Planes, raw: Buffer, *, mode: Mode, alpha: float = 1.0, thorough: bool = False
) -> bytes | None:
    """The payload for split elements, or None when nothing is gained. `raw` gives the tail.

    `thorough` searches long for the shortest planes; any reader decodes them.
    """
    width = len(planes.array)
    methods, bodies = zip(
        *(_encode_plane(plane, planes.cuts, thorough=thorough) for plane in planes.array), strict=True
    )
    tail = memoryview(raw)[len(raw) // width * width :]
    kept = planes.kept or b""
    total = _HEAD.size + width * _PLANE.size + len(kept) + sum(map(len, bodies)) + len(tail)
    if total >= len(raw):
        return None
    flags = _GROUPED if planes.kept is not None else 0
    heads = (_PLANE.pack(method, len(body)) for method, body in zip(methods, bodies, strict=True))
    return b"".join((_HEAD.pack(width, mode, flags, alpha), *heads, kept, *bodies, tail))


def _encode_plane(plane: Bytes, cuts: Sequence[int], *, thorough: bool) -> tuple[int, Buffer]:
    view = plane.data
    if len(plane) == 0 or looks_random(plane):
        return METHOD_RAW, view
    if plane[0] == plane[-1] and not np.any(plane != plane[0]):
        return METHOD_CONSTANT, bytes(view[:1])
    encoded = _contexts.compressor.compress(view) if len(cuts) < 2 else _compressed_apart(view, cuts)
    if thorough:
        encoded = min(encoded, _thorough_contexts.compressor.compress(view), key=len)
    return (METHOD_ZSTD, encoded) if len(encoded) < KEEP_SHARE_MAX * len(view) else (METHOD_RAW, view)


def _compressed_apart(view: memoryview, cuts: Sequence[int]) -> bytes:
    """One frame, in which each segment begins a block, and so has a code table of its own."""
    stream = _contexts.compressor.compressobj()
    parts: list[bytes] = []
    for start, end in pairwise((0, *cuts)):
        parts += stream.compress(view[start:end]), stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    return b"".join((*parts, stream.flush()))


def looks_random(plane: Bytes) -> bool:
    """Whether a sample of a plane has no order-0 redundancy worth coding; never for short planes."""
    if len(plane) < SAMPLE_BYTES_MIN:
        return False
    return estimate(plane.data, 1, _SPREAD, mode=Mode.PLAIN, grouped=False).share > _SAMPLE_SHARE_MAX


def decode_planes(stored: memoryview, out: memoryview, *, base: Buffer | None, ordered: bool = False) -> None:
    """Fill `out` from a payload, with a base of the same length or without. Raises CodecError."""
    width, mode, grouped, alpha = _decode_head(stored)
    if (mode in transform.BASE_MODES) is not (base is not None):
        raise CodecError(f"planes: mode {mode} {'has no' if base is None else 'takes no'} base")
    if base is not None and len(base) != len(out):
        raise CodecError(f"planes: expected a base of {len(out)} bytes, found {len(base)}")
    if ordered and width == 1:
        raise CodecError("planes: elements of one byte are not ordered")
    items = len(out) // width
    position = _HEAD.size + width * _PLANE.size
    kept = None
    count = items
    if grouped:
        kept = stored[position : position + transform.kept_bytes(items)]
        position += transform.kept_bytes(items)
        if len(kept) != transform.kept_bytes(items):
            raise CodecError(f"planes: expected a bitmap of {transform.kept_bytes(items)} bytes, found {len(kept)}")
        count = transform.kept_count(kept, items)
    planes: list[Buffer] = []
    for index in range(width):
        method, length = _PLANE.unpack_from(stored, _HEAD.size + index * _PLANE.size)
        body = stored[position : position + length]
        if len(body) != length:
            raise CodecError(f"planes: plane {index}: expected {length} bytes, found {len(body)}")
        planes.append(_decode_plane(method, body, count, index))
        position += length
    tail = stored[position:]
    if len(tail) != len(out) - items * width:
        raise CodecError(f"planes: expected a tail of {len(out) - items * width} bytes, found {len(tail)}")
    transform.merge(planes, out[: items * width], mode=mode, kept=kept, base=base, alpha=alpha, ordered=ordered)
    out[items * width :] = tail


def _decode_head(stored: memoryview) -> tuple[int, Mode, bool, float]:
    if len(stored) < _HEAD.size:
        raise CodecError(f"planes: expected a head of {_HEAD.size} bytes, found {len(stored)}")
    width, number, flags, alpha = _HEAD.unpack_from(stored)
    mode = _MODES.get(number)
    valid = width in transform.WIDTHS and flags & ~_GROUPED == 0
    if mode is None or not valid or len(stored) < _HEAD.size + width * _PLANE.size:
        raise CodecError(f"planes: width {width}, mode {number}, flags {flags} in {len(stored)} bytes cannot be")
    if mode is Mode.SCALED and not (width == 4 and transform.ALPHA_MIN <= alpha <= transform.ALPHA_MAX):
        raise CodecError(f"planes: a factor of {alpha} for elements of {width} bytes cannot be")
    return width, mode, bool(flags & _GROUPED), alpha


def _decode_plane(method: int, body: memoryview, items: int, index: int) -> Buffer:
    if method == METHOD_RAW and len(body) == items:
        return body
    if method == METHOD_CONSTANT and len(body) == 1:
        return bytes(body) * items
    if method != METHOD_ZSTD:
        raise CodecError(f"planes: plane {index}: method {method} with {len(body)} bytes for {items} elements")
    return decompressed(_contexts.decompressor, body, items)
