"""Bit patterns that arithmetic would change: what training leaves in tensors now and then."""

from __future__ import annotations

EXPONENT_BITS = {2: (5, 8), 4: (8,), 8: (11,)}


def odd_words(width: int) -> list[int]:
    """Of every format of that width: zeros, subnormals, the smallest normal, one, the largest, infinities, NaN."""
    bits = 8 * width
    found = {0, 1, (1 << bits) - 1, 1 << (bits - 1)}
    for exponent_bits in EXPONENT_BITS.get(width, ()):
        mantissa_bits = bits - 1 - exponent_bits
        infinity = ((1 << exponent_bits) - 1) << mantissa_bits
        one = ((1 << (exponent_bits - 1)) - 1) << mantissa_bits
        positive = {1, (1 << mantissa_bits) - 1, 1 << mantissa_bits, one, infinity - 1, infinity, infinity + 1}
        positive |= {infinity | 1 << (mantissa_bits - 1), infinity | (1 << mantissa_bits) - 1}
        found |= positive | {word | 1 << (bits - 1) for word in positive}
    return sorted(found)
