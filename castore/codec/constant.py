"""Codec 4: one unit of 1, 2, 4, 8 or 16 bytes, repeated. Zeroed moments and fresh biases cost a few bytes."""

from __future__ import annotations

from castore.codec.base import Elements
from castore.errors import CodecError
from castore.ids import Buffer

_UNIT_BYTES = (1, 2, 4, 8, 16)
_PROBE_BYTES = 64


class Constant:
    """The unit; the raw length says how often."""

    number = 4
    name = "constant"

    def encode(self, raw: Buffer, elements: Elements) -> bytes | None:
        """The shortest unit that repeats through all of `raw`, or None."""
        data = memoryview(raw)
        for unit_bytes in _UNIT_BYTES:
            unit = bytes(data[:unit_bytes])
            if len(data) < 2 * unit_bytes or len(data) % unit_bytes:
                return None
            # A short prefix rules nearly every chunk out before the whole is looked at.
            if data[:_PROBE_BYTES] == _repeat(unit, min(_PROBE_BYTES, len(data))) and bytes(data) == _repeat(unit, len(data)):
                return unit
        return None

    def decode(self, stored: memoryview, out: memoryview) -> None:
        """Fill `out` with the unit."""
        if len(stored) not in _UNIT_BYTES or len(out) % len(stored):
            raise CodecError(f"constant: expected a unit that divides {len(out)} bytes, found {len(stored)}")
        out[:] = _repeat(bytes(stored), len(out))


def _repeat(unit: bytes, length: int) -> bytes:
    return unit * (length // len(unit)) + unit[: length % len(unit)]
