"""Codec 3: the bytes of each element regrouped by significance, each plane entropy-coded on its own.

Training floats have almost random mantissas and very predictable exponents. Rotating a float left by one bit moves the
sign to the low end and fills the top plane with the exponent; that plane then shrinks to about a third and the others
do not shrink at all, so they are stored as they are and cost a copy.

    0  1  w: element width 1, 2, 4 or 8
    1  1  flags    1: every element was rotated left by one bit; 2: groups of zeros were left out
    2     w plane heads, least significant plane first
              method   1    0 raw, 1 zstd, 2 one repeated byte
              length   4    stored bytes of the plane
    2+5w  with flag 2: the bitmap of kept groups, one bit for 32 elements, least significant bit first; the last group
          may be short. A plane then holds the bytes of the kept elements only, the others are zero
          the planes, then the raw_bytes % w bytes that fill no element

The zstd parameters switch off almost all match finding: on exponent planes spurious matches displace cheap literals,
and higher levels make the result larger (DESIGN figures: 67.5 % of bf16 here, 69.6 % at level 1, 71.4 % at level 3).
"""

from __future__ import annotations

import math
import struct

import numpy as np
import zstandard

from castore.codec import transform
from castore.codec.base import Elements
from castore.codec.zstd_frame import ThreadContexts, decompress_exactly
from castore.errors import CodecError
from castore.ids import Buffer

METHOD_RAW, METHOD_ZSTD, METHOD_CONSTANT = 0, 1, 2
_HEAD = struct.Struct("<BB")
_PLANE = struct.Struct("<BI")

KEEP_SHARE_MAX = 0.98
"""A plane that zstd does not bring below this share is stored raw: 2 % is less than what its decoding costs a load."""

SAMPLE_BYTES_MIN = 16 * 1024
"""Planes up to this long are tried as they are; of longer ones a sample decides first."""
_SAMPLE_WINDOWS, _SAMPLE_WINDOW_BYTES = 8, 512
_SAMPLE_SHARE_MAX = 0.985
"""Order-0 entropy of the sample (bits / 8) above which a plane is taken to be noise."""

_ROTATED, _GROUPED = 1, 2


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


_contexts = ThreadContexts(_tuned_compressor)


class BytePlanes:
    """Byte planes, each raw, zstd or constant."""

    number = 3
    name = "planes"

    def encode(self, raw: Buffer, elements: Elements) -> bytes | None:
        """Planes of `elements.item_bytes`; floats are rotated first."""
        width = elements.item_bytes
        if len(raw) < 2 * width:
            return None
        planes = transform.split(raw, width, rotate=elements.is_float)
        return encode_planes(planes, raw, width, rotate=elements.is_float)

    def decode(self, stored: memoryview, out: memoryview) -> None:
        """Decode each plane and put the elements together again."""
        decode_planes(stored, out)


def encode_planes(planes: transform.Planes, raw: Buffer, width: int, *, rotate: bool) -> bytes | None:
    """The payload for split elements, or None when nothing is gained. `raw` gives the tail."""
    methods, bodies = zip(*(_encode_plane(planes.array[index]) for index in range(width)), strict=True)
    tail = memoryview(raw)[len(raw) // width * width :]
    kept = planes.kept or b""
    total = _HEAD.size + width * _PLANE.size + len(kept) + sum(map(len, bodies)) + len(tail)
    if total >= len(raw):
        return None
    flags = (_ROTATED if rotate else 0) | (_GROUPED if planes.kept is not None else 0)
    heads = (_PLANE.pack(method, len(body)) for method, body in zip(methods, bodies, strict=True))
    return b"".join((_HEAD.pack(width, flags), *heads, kept, *bodies, tail))


def _encode_plane(plane: np.ndarray) -> tuple[int, Buffer]:
    view = plane.data
    if len(plane) == 0 or looks_random(plane):
        return METHOD_RAW, view
    if plane[0] == plane[-1] and not np.any(plane != plane[0]):
        return METHOD_CONSTANT, bytes(view[:1])
    encoded = _contexts.compressor.compress(view)
    return (METHOD_ZSTD, encoded) if len(encoded) < KEEP_SHARE_MAX * len(view) else (METHOD_RAW, view)


def looks_random(plane: np.ndarray) -> bool:
    """Whether a sample of a long plane has no order-0 redundancy worth coding."""
    if len(plane) < SAMPLE_BYTES_MIN:
        return False
    step = (len(plane) - _SAMPLE_WINDOW_BYTES) // (_SAMPLE_WINDOWS - 1)
    windows = [plane[at * step : at * step + _SAMPLE_WINDOW_BYTES] for at in range(_SAMPLE_WINDOWS)]
    return order0_share(np.concatenate(windows)) > _SAMPLE_SHARE_MAX


def order0_share(sample: np.ndarray) -> float:
    """Order-0 entropy of bytes as a share of 8 bits (Shannon), with the Miller-Madow correction for small samples."""
    counts = np.bincount(sample, minlength=256)
    counts = counts[counts > 0]
    probabilities = counts / len(sample)
    bits = float(-(probabilities * np.log2(probabilities)).sum()) + (len(counts) - 1) / (2 * math.log(2) * len(sample))
    return bits / 8


def decode_planes(stored: memoryview, out: memoryview, *, base: Buffer | None = None) -> None:
    """Fill `out` from a payload. Raises CodecError."""
    width, flags = _decode_head(stored)
    items = len(out) // width
    position = _HEAD.size + width * _PLANE.size
    kept = None
    count = items
    if flags & _GROUPED:
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
    transform.merge(planes, out[: items * width], rotate=bool(flags & _ROTATED), kept=kept, base=base)
    out[items * width :] = tail


def _decode_head(stored: memoryview) -> tuple[int, int]:
    if len(stored) < _HEAD.size:
        raise CodecError(f"planes: expected a head of {_HEAD.size} bytes, found {len(stored)}")
    width, flags = _HEAD.unpack_from(stored)
    if (
        width not in transform.WIDTHS
        or flags & ~(_ROTATED | _GROUPED)
        or len(stored) < _HEAD.size + width * _PLANE.size
    ):
        raise CodecError(f"planes: width {width}, flags {flags} in {len(stored)} bytes cannot be")
    return width, flags


def _decode_plane(method: int, body: memoryview, items: int, index: int) -> Buffer:
    if method == METHOD_RAW and len(body) == items:
        return body
    if method == METHOD_CONSTANT and len(body) == 1:
        return bytes(body) * items
    if method != METHOD_ZSTD:
        raise CodecError(f"planes: plane {index}: method {method} with {len(body)} bytes for {items} elements")
    plane = transform.scratch(index, items).data
    decompress_exactly(_contexts.decompressor, body, plane)
    return plane
