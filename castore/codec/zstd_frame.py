"""Codec 2: one zstd frame at level 3. For text, manifests and integers with repeated patterns.

Contexts are kept per thread: creating one costs more than compressing a small chunk.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import zstandard

from castore.codec.base import Elements
from castore.errors import CodecError
from castore.ids import Buffer

_LEVEL = 3
_NOT_DECLARED = -1


class ThreadContexts(threading.local):
    """One compressor and one decompressor per thread."""

    def __init__(self, make_compressor: Callable[[], zstandard.ZstdCompressor]) -> None:
        self.compressor = make_compressor()
        self.decompressor = zstandard.ZstdDecompressor()


def decompressed(decompressor: zstandard.ZstdDecompressor, stored: Buffer, length: int) -> bytes:
    """The `length` bytes of one zstd frame. Raises CodecError, also when the frame holds more or fewer bytes."""
    try:
        # A frame that says how much it holds is believed by the library before `max_output_size` is.
        declared = zstandard.frame_content_size(stored)
        if declared not in (_NOT_DECLARED, length):
            raise CodecError(f"zstd: expected {length} bytes, found a frame of {declared}")
        decoded = decompressor.decompress(stored, max_output_size=length, allow_extra_data=False)
    except (zstandard.ZstdError, ValueError, MemoryError) as error:
        raise CodecError(f"zstd: expected {length} bytes: {error}") from error
    if len(decoded) != length:
        raise CodecError(f"zstd: expected {length} bytes, found {len(decoded)}")
    return decoded


class ZstdFrame:
    """One zstd frame without content size or checksum: the record has both."""

    number = 2
    name = "zstd"

    def __init__(self, level: int = _LEVEL) -> None:
        self._contexts = ThreadContexts(
            lambda: zstandard.ZstdCompressor(level=level, write_content_size=False, write_checksum=False)
        )

    def encode(self, raw: Buffer, elements: Elements) -> bytes | None:
        """A frame of this level; all levels are read alike."""
        encoded = self._contexts.compressor.compress(raw)
        return encoded if len(encoded) < len(raw) else None

    def decode(self, stored: memoryview, out: memoryview) -> None:
        """Bounded by the declared length."""
        out[:] = decompressed(self._contexts.decompressor, stored, len(out))
