"""Codec 4: one unit of 1, 2, 4, 8 or 16 bytes, repeated. Zeroed moments and fresh biases cost a few bytes."""

from __future__ import annotations

from castore.codec.base import Elements
from castore.errors import CodecError
from castore.hashing import checksum
from castore.ids import Buffer

_UNIT_BYTES = (1, 2, 4, 8, 16)
_PROBES = 8


class Constant:
    """The unit; the raw length says how often."""

    number = 4
    name = "constant"

    def encode(self, raw: Buffer, elements: Elements) -> bytes | None:
        """The shortest unit that repeats through all of `raw`, or None."""
        data = memoryview(raw)
        if len(data) % _UNIT_BYTES[-1] == 0 and data[: _UNIT_BYTES[-1]] != data[-_UNIT_BYTES[-1] :]:
            return None  # whatever the unit: its length divides that of both ends. This rules nearly every chunk out
        for unit_bytes in _UNIT_BYTES:
            if len(data) < 2 * unit_bytes or len(data) % unit_bytes:
                return None
            # Probes before the whole is looked at.
            if _probes_repeat(data, unit_bytes) and _equals_itself_shifted(data, unit_bytes):
                return bytes(data[:unit_bytes])
        return None

    def decode(self, stored: memoryview, out: memoryview) -> None:
        """Fill `out` with the unit."""
        if len(stored) not in _UNIT_BYTES or len(out) % len(stored):
            raise CodecError(f"constant: expected a unit that divides {len(out)} bytes, found {len(stored)}")
        out[:] = _repeat(bytes(stored), len(out))


def _probes_repeat(data: memoryview, unit_bytes: int) -> bool:
    unit = bytes(data[:unit_bytes])
    last = len(data) // unit_bytes - 1
    places = {last * index // _PROBES for index in range(_PROBES + 1)}
    return all(data[place * unit_bytes : (place + 1) * unit_bytes] == unit for place in places)


def _equals_itself_shifted(data: memoryview, unit_bytes: int) -> bool:
    """Bytes that equal themselves shifted by one unit repeat it. Checksums first: they are faster than a comparison."""
    left, right = data[unit_bytes:], data[:-unit_bytes]
    return checksum(left) == checksum(right) and bytes(left) == bytes(right)


def _repeat(unit: bytes, length: int) -> bytes:
    return unit * (length // len(unit))
