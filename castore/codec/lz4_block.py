"""Codec 1: one lz4 block without a length prefix. Fast (about 4 GB/s on noise), for repeated bytes, not for floats."""

from __future__ import annotations

import lz4.block

from castore.codec.base import Elements
from castore.errors import CodecError
from castore.ids import Buffer


class Lz4Block:
    """One lz4 block."""

    number = 1
    name = "lz4"

    def encode(self, raw: Buffer, elements: Elements) -> bytes | None:
        """lz4's default level."""
        encoded: bytes = lz4.block.compress(raw, store_size=False)
        return encoded if len(encoded) < len(raw) else None

    def decode(self, stored: memoryview, out: memoryview) -> None:
        """Bounded by the declared length."""
        try:
            decoded = lz4.block.decompress(stored, uncompressed_size=len(out))
        except (lz4.block.LZ4BlockError, ValueError, MemoryError, OverflowError) as error:
            raise CodecError(f"lz4: expected {len(out)} bytes: {error}") from error
        if len(decoded) != len(out):
            raise CodecError(f"lz4: expected {len(out)} bytes, found {len(decoded)}")
        out[:] = decoded
