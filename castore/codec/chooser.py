"""Which codec a chunk gets: decided by its content, never by its name, from a sample before the work is spent.

auto   constant → planes (floats and integers wider than a byte) or zstd (bytes), raw where nothing is gained
lz4    constant → lz4, raw where nothing is gained
none   raw always: such chunks form runs that can be mapped
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from castore.codec.base import PLAIN, Elements
from castore.codec.registry import codec_numbered, decode_chain
from castore.errors import CodecError
from castore.format.pack import Chain
from castore.hashing import Hasher
from castore.ids import Buffer, ChunkId
from castore.options import Compression

_CONSTANT, _LZ4, _ZSTD, _PLANES = 4, 1, 2, 3
_SAMPLE_BYTES = 16 * 1024
_WORTH_SHARE = 0.97
"""A codec must bring a sample below this share; less is not worth decoding on every load."""


class _Proof(threading.local):
    """Reused memory to decode into: fresh memory costs more than the decoding."""

    def __init__(self) -> None:
        self.buffer = bytearray()


_proof = _Proof()


@dataclass(frozen=True, slots=True)
class Encoded:
    """A chunk as it will be stored."""

    chain: Chain
    payload: Buffer
    """The caller's own buffer when the chain is empty."""


def encode_chunk(
    raw: Buffer, elements: Elements, compression: Compression, *, chunk_id: ChunkId, hasher: Hasher
) -> Encoded:
    """Encode one chunk and prove it: what is returned decodes to bytes of that chunk id. Never longer than raw.
    Thread-safe.

    Raises CodecError when it does not: the state was changed while it was being saved, or memory or a library is at
    fault.
    """
    for number in _candidates(raw, elements, compression):
        payload = codec_numbered(number).encode(raw, elements)
        if payload is not None:
            _prove(number, payload, len(raw), chunk_id, hasher)
            return Encoded((number,), payload)
    return Encoded((), raw)


def _candidates(raw: Buffer, elements: Elements, compression: Compression) -> tuple[int, ...]:
    if compression == "none" or len(raw) == 0:
        return ()
    if compression == "lz4":
        return (_CONSTANT, _LZ4) if _sample_shrinks(raw, _LZ4) else (_CONSTANT,)
    if elements.item_bytes > 1:
        # Integers often repeat in ways that planes cannot see (token ids); floats never do.
        repeats = not elements.is_float and _sample_shrinks(raw, _ZSTD, below=0.5)
        return (_CONSTANT, _ZSTD) if repeats else (_CONSTANT, _PLANES)
    return (_CONSTANT, _ZSTD) if _sample_shrinks(raw, _ZSTD) else (_CONSTANT,)


def _sample_shrinks(raw: Buffer, number: int, *, below: float = _WORTH_SHARE) -> bool:
    """Whether a codec shrinks the middle of a long chunk; short chunks are simply tried."""
    if len(raw) <= _SAMPLE_BYTES:
        return below == _WORTH_SHARE or _shrinks(raw, number, below)
    start = (len(raw) - _SAMPLE_BYTES) // 2
    return _shrinks(memoryview(raw)[start : start + _SAMPLE_BYTES], number, below)


def _shrinks(sample: Buffer, number: int, below: float) -> bool:
    encoded = codec_numbered(number).encode(sample, PLAIN)
    return encoded is not None and len(encoded) < below * len(sample)


def _prove(number: int, payload: Buffer, raw_bytes: int, chunk_id: ChunkId, hasher: Hasher) -> None:
    """Decode and compare by digest, before the record counts: every record, not a sample (10 % of a first save)."""
    if len(_proof.buffer) < raw_bytes:
        _proof.buffer = bytearray(raw_bytes)
    out = memoryview(_proof.buffer)[:raw_bytes]
    decode_chain((number,), memoryview(payload), out)
    if hasher.digest(out) != chunk_id:
        raise CodecError(
            f"codec {number}: a fresh record of {raw_bytes} bytes does not decode to chunk {chunk_id.hex()}; was the "
            "state "
            "changed by another thread during the save? If not, test this machine's memory"
        )
