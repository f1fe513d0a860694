"""Which codec a chunk gets: decided by its content, never by its name, from a sample before the work is spent.

auto   constant → derived where it is the rounding of float32 chunks → delta where there is a base
       → planes (floats and wide integers) or zstd (bytes, repeating integers)
lz4    constant → lz4
none   raw always: such chunks form runs that can be mapped

Raw where nothing is gained.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from castore.codec.base import PLAIN, Elements
from castore.codec.registry import DELTA, DERIVED, ORDERED, chain_name, codec_numbered, decode_chain
from castore.codec.zstd_frame import ZstdFrame
from castore.errors import CodecError
from castore.format.pack import Chain
from castore.hashing import Hasher
from castore.ids import Buffer, ChunkId
from castore.options import Compression

if TYPE_CHECKING:
    from castore.codec.rounding import Rule

_CONSTANT, _LZ4, _ZSTD, _PLANES = 4, 1, 2, 3
_SAMPLE_BYTES = 16 * 1024
_REPEATS_SHARE = 0.5
_WORTH_SHARE = 0.97
"""A codec must bring a sample below this share; less is not worth decoding on every load."""


class _Proof(threading.local):
    """Reused memory to decode into: fresh memory costs more than the decoding."""

    def __init__(self) -> None:
        self.buffer = bytearray()
        self.masters = bytearray()


_proof = _Proof()
_thorough_zstd = ZstdFrame(level=19)


@dataclass(frozen=True, slots=True)
class Encoded:
    """A chunk as it will be stored."""

    chain: Chain
    payload: Buffer
    """The caller's own buffer when the chain is empty."""
    rests_on_base: bool = False


def encode_chunk(
    raw: Buffer,
    elements: Elements,
    compression: Compression,
    *,
    chunk_id: ChunkId,
    hasher: Hasher,
    base: Buffer | None = None,
    base_id: ChunkId | None = None,
    may_order: bool = False,
    thorough: bool = False,
) -> Encoded:
    """Encode one chunk and prove it: what is returned decodes to bytes of that chunk id. Never longer than raw.
    A base is hashed too, after the proof, where `base_id` names it: one that changed in memory only costs the
    difference, which would have proved itself right with it.
    Thread-safe. `may_order` allows for codec 18; `thorough` tries a chunk by itself too and searches long for the
    shortest, at 3 to 7 MB/s a core.

    Raises CodecError when it does not: the state was changed while it was being saved, or memory or a library is at
    fault.
    """
    tried = _attempts(raw, elements, compression, base, may_order=may_order, thorough=thorough)
    attempts = (encoded for encoded in tried if encoded)
    for encoded in sorted(attempts, key=lambda attempt: len(attempt.payload)) if thorough else attempts:
        used = base if encoded.rests_on_base else None
        _prove(encoded, len(raw), chunk_id, hasher, used)
        if used is None or base_id is None or hasher.digest(used) == base_id:
            return encoded
    return Encoded((), raw)


def encode_as_rounding(
    raw: Buffer,
    elements: Elements,
    rule: Rule,
    masters: Sequence[tuple[ChunkId, Buffer]],
    *,
    chunk_id: ChunkId,
    hasher: Hasher,
) -> Encoded | None:
    """The chunk as the rounding of its masters, proved; None when it is not, or repeats one unit, which is shorter.

    The masters are hashed too, after the proof: what was rounded is what their ids name.
    """
    from castore.codec.derived import encode_derived  # numpy costs 80 ms of start-up

    if _encode(_CONSTANT, raw, elements) is not None:
        return None
    encoded = Encoded((DERIVED,), encode_derived(rule), rests_on_base=True)
    proof, view = _proof_memory(len(raw)), _proof_memory(2 * len(raw), of="masters")
    start = 0
    for _, part in masters:
        view[start : start + len(part)] = part
        start += len(part)
    decode_chain(encoded.chain, memoryview(encoded.payload), proof, base=view)
    if hasher.digest(proof) != chunk_id:
        return None
    start = 0
    for master_id, part in masters:
        if hasher.digest(view[start : start + len(part)]) != master_id:
            return None
        start += len(part)
    return encoded


def _attempts(
    raw: Buffer,
    elements: Elements,
    compression: Compression,
    base: Buffer | None,
    *,
    may_order: bool,
    thorough: bool,
) -> Iterator[Encoded | None]:
    """The encodings worth trying, the best first; None for one that does not shrink the chunk."""
    if compression == "none" or len(raw) == 0:
        return
    yield _encode(_CONSTANT, raw, elements)
    if compression == "lz4":
        if _sample_shrinks(raw, _LZ4):
            yield _encode(_LZ4, raw, elements)
        return
    if base is not None:
        yield _encode_delta(raw, base, elements, may_order=may_order, thorough=thorough)
    if thorough:
        yield _encode_planes(raw, elements)
        if elements.item_bytes == 1 or _sample_shrinks(raw, _ZSTD, below=_REPEATS_SHARE):
            payload = _thorough_zstd.encode(raw, elements)
            yield Encoded((_ZSTD,), payload) if payload is not None else None
        return
    if elements.item_bytes == 1:
        if _sample_shrinks(raw, _ZSTD):
            yield _encode(_ZSTD, raw, elements)
        return
    # Integers often repeat in ways that planes cannot see (token ids); floats never do.
    repeats = not elements.is_float and _sample_shrinks(raw, _ZSTD, below=_REPEATS_SHARE)
    yield _encode(_ZSTD if repeats else _PLANES, raw, elements)


def _encode(number: int, raw: Buffer, elements: Elements) -> Encoded | None:
    payload = codec_numbered(number).encode(raw, elements)
    return Encoded((number,), payload) if payload is not None else None


def _encode_planes(raw: Buffer, elements: Elements) -> Encoded | None:
    """The chunk as byte planes, each as short as can be."""
    from castore.codec import transform  # numpy costs 80 ms of start-up
    from castore.codec.byte_planes import encode_planes

    mode = transform.Mode.ROTATE if elements.is_float else transform.Mode.PLAIN
    payload = encode_planes(transform.split(raw, elements.item_bytes, mode=mode), raw, mode=mode, thorough=True)
    return Encoded((_PLANES,), payload) if payload is not None else None


def _encode_delta(raw: Buffer, base: Buffer, elements: Elements, *, may_order: bool, thorough: bool) -> Encoded | None:
    """The chunk as a difference from a base of its length, if a sample says that this pays."""
    from castore.codec.delta import choose, encode_delta  # numpy costs 80 ms of start-up
    from castore.codec.transform import BASE_MODES

    choice = choose(raw, base, elements, may_order=may_order)
    if choice.mode not in BASE_MODES:
        return None
    payload = encode_delta(raw, base, elements, choice, thorough=thorough)
    chain = (ORDERED,) if choice.ordered else (DELTA,)
    return Encoded(chain, payload, rests_on_base=True) if payload is not None else None


def _sample_shrinks(raw: Buffer, number: int, *, below: float = _WORTH_SHARE) -> bool:
    """Whether a codec shrinks the middle of a long chunk; short chunks are simply tried."""
    if len(raw) <= _SAMPLE_BYTES:
        return below == _WORTH_SHARE or _shrinks(raw, number, below)
    start = (len(raw) - _SAMPLE_BYTES) // 2
    return _shrinks(memoryview(raw)[start : start + _SAMPLE_BYTES], number, below)


def _shrinks(sample: Buffer, number: int, below: float) -> bool:
    encoded = codec_numbered(number).encode(sample, PLAIN)
    return encoded is not None and len(encoded) < below * len(sample)


def _prove(encoded: Encoded, raw_bytes: int, chunk_id: ChunkId, hasher: Hasher, base: Buffer | None) -> None:
    """Decode and compare by digest, before the record counts: every record, not a sample (a fifth of the encoding)."""
    out = _proof_memory(raw_bytes)
    decode_chain(encoded.chain, memoryview(encoded.payload), out, base=base)
    if hasher.digest(out) != chunk_id:
        raise CodecError(
            f"{chain_name(encoded.chain)}: a fresh record of {raw_bytes} bytes does not decode to chunk "
            f"{chunk_id.hex()}; "
            "was the state changed by another thread during the save? If not, test this machine's memory"
        )


def _proof_memory(length: int, *, of: Literal["buffer", "masters"] = "buffer") -> memoryview:
    if len(getattr(_proof, of)) < length:
        setattr(_proof, of, bytearray(length))
    return memoryview(getattr(_proof, of))[:length]
