"""The Codec seam: one reversible step from bytes to bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from castore.ids import Buffer


@dataclass(frozen=True, slots=True)
class Elements:
    """What the chooser may know of the values in a chunk. It is advice: every codec is exact for any bytes."""

    item_bytes: int = 1
    """Width of one element: 1, 2, 4 or 8."""
    is_float: bool = False
    """Whether sign and exponent lead each element (complex numbers are pairs of such)."""


PLAIN = Elements()


class Codec(Protocol):
    """A reversible step with a permanent number.

    Contract: decode(encode(x)) == x for any bytes x. Stateless and thread-safe; heavy work happens in native calls that
    release the GIL. `encode` returns None when the step does not apply or does not make the data shorter. `decode`
    fills `out`, whose length is the declared raw length, exactly; it never writes outside it, never allocates more than
    a small multiple of it, and raises CodecError for any input that encode cannot have made or that decodes to another
    length.
    """

    @property
    def number(self) -> int:
        """1 to 255, written to disk, never reused."""
        ...

    @property
    def name(self) -> str:
        """For people: `castore du`, `castore show`."""
        ...

    def encode(self, raw: Buffer, elements: Elements) -> bytes | None:
        """The encoded bytes, shorter than `raw`, or None."""
        ...

    def decode(self, stored: memoryview, out: memoryview) -> None:
        """Fill `out` (writable, contiguous bytes) from `stored`."""
        ...
