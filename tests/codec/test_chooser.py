"""Each chunk gets the codec that its bytes deserve, and no record counts that was not decoded and compared."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from castore.codec import delta
from castore.codec.base import PLAIN, Codec, Elements
from castore.codec.chooser import Encoded, encode_chunk
from castore.codec.registry import decode_chain
from castore.errors import CodecError
from castore.hashing import hasher_for
from castore.ids import Buffer
from castore.options import COMPRESSIONS, GRID_BYTES, Compression
from tests.suites.codec_suite import any_bytes, any_elements, build
from tests.suites.flushed import flushed_denormals

XXH3 = hasher_for("xxh3-128")
BF16, FP32, FP64, INT64 = (
    Elements(2, is_float=True),
    Elements(4, is_float=True),
    Elements(8, is_float=True),
    Elements(8),
)
LZ4, ZSTD, PLANES, CONSTANT, DELTA = (1,), (2,), (3,), (4,), (16,)
RAW = ()


def encode(
    raw: Buffer, elements: Elements = PLAIN, compression: Compression = "auto", *, base: Buffer | None = None
) -> Encoded:
    """Encode, and see for oneself that it decodes."""
    encoded = encode_chunk(raw, elements, compression, chunk_id=XXH3.chunk_id(raw), hasher=XXH3, base=base)
    out = bytearray(len(raw))
    used = base if encoded.rests_on_base else None
    decode_chain(encoded.chain, memoryview(encoded.payload), memoryview(out), base=used)
    assert out == raw
    assert len(encoded.payload) <= len(raw)
    assert encoded.rests_on_base == (encoded.chain == DELTA)
    return encoded


def share(encoded: Encoded, raw: bytes) -> float:
    return len(encoded.payload) / len(raw)


def normal(dtype: str, items: int = GRID_BYTES // 4, seed: int = 1) -> bytes:
    return (np.random.default_rng(seed).standard_normal(items) * 0.02).astype(dtype).tobytes()


def bf16(items: int = GRID_BYTES // 2) -> bytes:
    words = np.frombuffer(normal("<f4", items), "<u4")
    return (words >> 16).astype("<u2").tobytes()


# ---- the choice --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("elements", [PLAIN, BF16, FP32, FP64, INT64])
@pytest.mark.parametrize("compression", ["auto", "lz4"])
def test_zeros_and_other_repeated_elements_cost_a_few_bytes(elements: Elements, compression: Compression) -> None:
    width = elements.item_bytes
    for raw in (bytes(GRID_BYTES), bytes(range(1, width + 1)) * 5000):
        encoded = encode(raw, elements, compression)
        assert encoded.chain == CONSTANT
        assert len(encoded.payload) <= width


@pytest.mark.parametrize("elements", [PLAIN, BF16, FP32, FP64, INT64])
@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("length", [100, 20_000, GRID_BYTES])
def test_noise_stays_raw_and_is_not_copied(elements: Elements, compression: Compression, length: int) -> None:
    noise = build("noise", 1, length)
    encoded = encode(noise, elements, compression)
    assert encoded.chain == RAW
    assert encoded.payload is noise


@pytest.mark.parametrize(
    ("raw", "elements", "at_most"),
    [
        (normal("<f4"), FP32, 0.86),
        (bf16(), BF16, 0.70),
        (normal("<f8", GRID_BYTES // 8), FP64, 0.96),
        (normal("<f2", GRID_BYTES // 2), BF16, 0.95),
        (normal("<f4", 3000) + b"odd", FP32, 0.90),
    ],
    ids=["fp32", "bf16", "fp64", "fp16", "short fp32"],
)
def test_floats_shrink_by_their_exponents(raw: bytes, elements: Elements, at_most: float) -> None:
    encoded = encode(raw, elements)
    assert encoded.chain == PLANES
    assert share(encoded, raw) < at_most


def test_token_ids_that_repeat_use_zstd() -> None:
    words = np.random.default_rng(1).integers(0, 30_000, (200, 6))
    sentences = words[np.random.default_rng(2).zipf(1.5, 20_000) % 200]
    raw = sentences.astype("<i8").tobytes()[:GRID_BYTES]
    encoded = encode(raw, INT64)
    assert encoded.chain == ZSTD
    assert share(encoded, raw) < 0.1


def test_integers_that_do_not_repeat_use_planes() -> None:
    raw = np.random.default_rng(1).integers(0, 2**33, GRID_BYTES // 8).astype("<i8").tobytes()
    encoded = encode(raw, INT64)
    assert encoded.chain == PLANES
    assert share(encoded, raw) < 0.6


def test_text_uses_zstd() -> None:
    for length in (500, GRID_BYTES):
        assert encode(build("text", 1, length)).chain == ZSTD


def test_bytes_whose_middle_is_noise_are_taken_for_noise() -> None:
    raw = bytes(300_000) + build("noise", 1, 300_000) + bytes(300_000)
    assert encode(raw).chain == RAW
    assert encode(raw, FP32).chain == PLANES, "planes are sampled each on its own, all along the chunk"


def test_lz4_uses_nothing_but_lz4_and_constant() -> None:
    assert encode(build("text", 1, 5000), PLAIN, "lz4").chain == LZ4
    assert encode(normal("<f4"), FP32, "lz4").chain == RAW
    assert encode(bytes(5000), FP32, "lz4").chain == CONSTANT


@given(any_bytes, any_elements)
def test_none_leaves_every_chunk_as_it_is(raw: bytes, elements: Elements) -> None:
    encoded = encode(raw, elements, "none", base=bytes(len(raw)))
    assert encoded.chain == RAW
    assert encoded.payload is raw


@given(any_bytes, any_elements, st.sampled_from(COMPRESSIONS), st.booleans())
def test_any_chunk_is_encoded_exactly_and_never_longer(
    raw: bytes, elements: Elements, compression: Compression, with_base: bool
) -> None:
    encode(raw, elements, compression, base=raw[::-1] if with_base else None)


def test_an_empty_chunk_is_raw() -> None:
    for compression in COMPRESSIONS:
        assert encode(b"", FP32, compression) == Encoded((), b"")


def test_a_base_is_used_where_it_pays() -> None:
    base = np.frombuffer(normal("<f4"), "<f4")
    noise = np.random.default_rng(9).standard_normal(len(base))
    raw = (base + noise * 1e-6).astype("<f4").tobytes()
    encoded = encode(raw, FP32, base=base.tobytes())
    assert encoded.chain == DELTA
    assert share(encoded, raw) < 0.6
    assert encode(raw, FP32, base=normal("<f4", seed=5)).chain == PLANES
    assert encode(raw, FP32, "lz4", base=base.tobytes()).chain == RAW, "deltas belong to auto"


def test_a_constant_chunk_rests_on_no_base() -> None:
    assert encode(bytes(GRID_BYTES), FP32, base=normal("<f4")).chain == CONSTANT


# ---- odd floats --------------------------------------------------------------------------------------------


ODD = {
    "NaN payloads": np.tile(np.array([0x7FC00000, 0x7FC00001, 0xFFC12345, 0x7F800001, 0xFFFFFFFF], "<u4"), 9000),
    "negative zeros": np.where(np.arange(50_000) % 3 == 0, 0x80000000, 0).astype("<u4"),
    "all negative zeros": np.full(50_000, 0x80000000, "<u4"),
    "subnormals": np.random.default_rng(1).integers(0, 1 << 23, 50_000).astype("<u4"),
    "signed subnormals": (np.arange(50_000) % 77 + ((np.arange(50_000) % 2) << 31)).astype("<u4"),
    "infinities": np.tile(np.array([0x7F800000, 0xFF800000, 0x7F7FFFFF], "<u4"), 9000),
}


@pytest.mark.parametrize("flush", [False, True], ids=["denormals kept", "denormals flushed"])
@pytest.mark.parametrize("name", ODD)
def test_odd_floats_survive_bit_for_bit(name: str, flush: bool) -> None:
    raw = ODD[name].tobytes()
    base = np.roll(ODD[name], 1).tobytes()
    with flushed_denormals() if flush else nullcontext():
        for elements in (FP32, BF16, FP64, INT64, PLAIN):
            for compression in COMPRESSIONS:
                encode(raw, elements, compression)
                encode(raw, elements, compression, base=base)


# ---- the proof ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "elements", "compression"),
    [
        (normal("<f4"), FP32, "auto"),
        (build("text", 1, 50_000), PLAIN, "auto"),
        (build("text", 1, 50_000), PLAIN, "lz4"),
        (build("int64", 1, 50_000), INT64, "auto"),
        (bytes(50_000), PLAIN, "auto"),
    ],
    ids=["planes", "zstd", "lz4", "int64", "constant"],
)
def test_a_buffer_that_changes_between_hashing_and_encoding_is_noticed(
    raw: bytes, elements: Elements, compression: Compression
) -> None:
    state = bytearray(raw)
    chunk_id = XXH3.chunk_id(state)
    assert encode_chunk(state, elements, compression, chunk_id=chunk_id, hasher=XXH3).chain != RAW
    for position in (0, len(state) // 3, len(state) - 1):
        state[position] ^= 1
        with pytest.raises(CodecError, match=f"does not decode to chunk {chunk_id.hex()}; was the state changed"):
            # A changed byte of a constant chunk makes it one that zstd takes.
            encode_chunk(state, elements, compression, chunk_id=chunk_id, hasher=XXH3)
        state[position] ^= 1


def test_a_base_that_changes_while_it_is_used_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    base = bytearray(normal("<f4"))
    raw = (np.frombuffer(bytes(base), "<f4") * np.float32(1.000001)).tobytes()
    honest = delta.encode_delta

    def then_change(*args: object, **options: bool) -> bytes | None:
        payload = honest(*args, **options)  # type: ignore[arg-type]  # passed through as it came
        base[1000] ^= 1
        return payload

    monkeypatch.setattr(delta, "encode_delta", then_change)
    with pytest.raises(CodecError, match="delta: a fresh record of"):
        encode_chunk(raw, FP32, "auto", chunk_id=XXH3.chunk_id(raw), hasher=XXH3, base=base)


def test_a_codec_that_is_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        number, name = 2, "zstd"

        def encode(self, raw: Buffer, elements: Elements) -> bytes:
            return b"short"

        def decode(self, stored: memoryview, out: memoryview) -> None:
            out[:] = bytes(len(out))

    def wrong(number: int) -> Codec:
        return Wrong()

    monkeypatch.setattr("castore.codec.chooser.codec_numbered", wrong)
    monkeypatch.setattr("castore.codec.registry.codec_numbered", wrong)
    with pytest.raises(CodecError, match="test this machine's memory"):
        encode_chunk(build("noise", 1, 5000), PLAIN, "auto", chunk_id=XXH3.chunk_id(b"x"), hasher=XXH3)


def test_blake3_proves_as_well() -> None:
    blake3 = hasher_for("blake3")
    raw = normal("<f4", 5000)
    encoded = encode_chunk(raw, FP32, "auto", chunk_id=blake3.chunk_id(raw), hasher=blake3)
    assert encoded.chain == PLANES
    with pytest.raises(CodecError):
        encode_chunk(raw, FP32, "auto", chunk_id=blake3.chunk_id(b"x"), hasher=blake3)


def test_threads_do_not_disturb_each_other() -> None:
    inputs = [
        (build(kind, 1, 60_000 + 999 * index), FP32) for index, kind in enumerate(("float32", "text", "unit"))
    ] * 4
    start = threading.Barrier(4)

    def work(number: int) -> None:
        start.wait()
        for raw, elements in inputs[number:] + inputs[:number]:
            encode(raw, elements)

    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(work, range(4)):
            pass
