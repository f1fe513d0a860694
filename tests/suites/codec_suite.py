"""The conformance suite of castore.codec.base.Codec: subclass it and give the codec's number."""

from __future__ import annotations

import contextlib
import random
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from castore.codec.base import PLAIN, Codec, Elements
from castore.codec.registry import codec_numbered
from castore.errors import CodecError, UnsupportedFormatError

ALL_ELEMENTS = (PLAIN, *(Elements(width, is_float) for width in (1, 2, 4, 8) for is_float in (False, True)))
REFUSALS = (CodecError, UnsupportedFormatError)
BOMB_BYTES = 64 * 1024 * 1024

# Every subclass runs the same method, which hypothesis reports unless told that it is meant.
inherited = settings(suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow])


def build(kind: str, seed: int, length: int) -> bytes:
    """Bytes of a kind that training states hold, any length: the last element may be cut."""
    rng = np.random.default_rng(seed)
    items = length // 2 + 1
    if kind == "noise":
        return rng.bytes(length)
    if kind == "unit":
        unit = rng.bytes(2 ** (seed % 5))
        return (unit * length)[:length]
    if kind == "nearly constant":
        data = bytearray(length)
        if length:
            data[seed % length] = 1
        return bytes(data)
    if kind == "text":
        return (b"the quick brown fox %d " % seed * length)[:length]
    if kind == "float16":
        return rng.standard_normal(items).astype("<f2").tobytes()[:length]
    if kind == "float32":
        return (rng.standard_normal(items) * 0.02).astype("<f4").tobytes()[:length]
    if kind == "float64":
        return rng.standard_normal(items).astype("<f8").tobytes()[:length]
    assert kind == "int64"
    return rng.integers(0, 1000, items).astype("<i8").tobytes()[:length]


KINDS = ("noise", "unit", "nearly constant", "text", "float16", "float32", "float64", "int64")
built = st.builds(build, st.sampled_from(KINDS), st.integers(0, 99), st.integers(0, 20_000))
any_bytes = st.one_of(st.binary(max_size=300), built)
any_elements = st.sampled_from(ALL_ELEMENTS)


def decoded(codec: Codec, stored: bytes, raw_bytes: int) -> bytes:
    """Decode into the middle of a larger buffer and see that nothing beside it was touched."""
    memory = bytearray(b"\xa5" * (raw_bytes + 64))
    try:
        codec.decode(memoryview(stored), memoryview(memory)[32 : 32 + raw_bytes])
    finally:
        assert memory[:32] == memory[32 + raw_bytes :] == b"\xa5" * 32, "wrote outside of `out`"
    return bytes(memory[32 : 32 + raw_bytes])


def bombs() -> dict[str, bytes]:
    """Small inputs that hold much more than is asked for, in the containers that codecs use."""
    zeros = bytes(BOMB_BYTES)
    silent = zstandard.ZstdCompressor(level=1, write_content_size=False).compress(zeros)
    declared = zstandard.ZstdCompressor(level=1, write_content_size=True).compress(zeros)
    long_match = b"\x1f\x00\x01\x00" + b"\xff" * (BOMB_BYTES // 255) + b"\x00"
    planes = {
        f"planes of {name}": b"\1\0\0\0\0\0\x80\x3f" + b"\1" + len(frame).to_bytes(4, "little") + frame
        for name, frame in (("silent frames", silent), ("frames that say so", declared))
    }
    return {"silent frame": silent, "frame that says so": declared, "lz4 match": long_match, **planes}


class CodecSuite:
    """Reads as the contract does."""

    number: int

    @property
    def codec(self) -> Codec:
        return codec_numbered(self.number)

    def examples(self) -> list[tuple[bytes, Elements]]:
        """Inputs that this codec makes shorter."""
        raise NotImplementedError

    def test_the_number_and_the_name_are_permanent(self) -> None:
        names = {1: "lz4", 2: "zstd", 3: "planes", 4: "constant"}
        assert self.codec.number == self.number
        assert self.codec.name == names[self.number]

    @inherited
    @given(raw=any_bytes, elements=any_elements)
    def test_any_bytes_come_back_and_are_never_longer(self, raw: bytes, elements: Elements) -> None:
        encoded = self.codec.encode(raw, elements)
        if encoded is not None:
            assert len(encoded) < len(raw)
            assert decoded(self.codec, encoded, len(raw)) == raw

    def test_the_examples_shrink_and_come_back(self) -> None:
        for raw, elements in self.examples():
            encoded = self.codec.encode(raw, elements)
            assert encoded is not None
            assert len(encoded) < len(raw)
            assert decoded(self.codec, encoded, len(raw)) == raw

    def test_elements_are_advice_and_exactness_needs_none(self) -> None:
        for raw, _ in self.examples():
            for elements in ALL_ELEMENTS:
                for length in (len(raw), len(raw) - 1, len(raw) - 3):
                    encoded = self.codec.encode(raw[:length], elements)
                    assert encoded is None or decoded(self.codec, encoded, length) == raw[:length]

    @pytest.mark.parametrize("raw", [b"", b"\0", b"ab"])
    def test_what_cannot_shrink_is_none(self, raw: bytes) -> None:
        for elements in ALL_ELEMENTS:
            assert self.codec.encode(raw, elements) is None

    def test_any_contiguous_buffer_is_taken_and_none_is_changed(self) -> None:
        for raw, elements in self.examples():
            expected = self.codec.encode(raw, elements)
            padded = bytearray(b"x" + raw + b"x")
            for buffer in (bytearray(raw), memoryview(raw), memoryview(padded)[1:-1]):
                assert self.codec.encode(buffer, elements) == expected
            assert padded == b"x" + raw + b"x"

    @inherited
    @given(stored=st.binary(max_size=200), raw_bytes=st.integers(0, 3000))
    def test_garbage_is_refused_by_a_typed_error(self, stored: bytes, raw_bytes: int) -> None:
        with contextlib.suppress(REFUSALS):
            decoded(self.codec, stored, raw_bytes)

    def test_damaged_encodings_are_refused_by_a_typed_error_or_decode_to_the_length(self) -> None:
        rng = random.Random(1)
        for raw, elements in self.examples():
            encoded = self.codec.encode(raw, elements)
            assert encoded is not None
            for _ in range(150):
                damaged = bytearray(encoded)
                for _ in range(rng.randrange(1, 4)):
                    damaged[rng.randrange(min(len(damaged), 64))] = rng.randrange(256)
                cut = rng.randrange(len(damaged) + 1) if rng.random() < 0.3 else len(damaged)
                with contextlib.suppress(REFUSALS):
                    decoded(self.codec, bytes(damaged[:cut]), len(raw))

    def test_another_length_than_was_encoded_is_refused(self) -> None:
        for raw, elements in self.examples():
            encoded = self.codec.encode(raw, elements)
            assert encoded is not None
            for raw_bytes in (0, 1, len(raw) - 1, len(raw) + 1):
                if self.number == 4 and raw_bytes % len(encoded) == 0:
                    continue  # a repeated unit has every length that it divides
                with pytest.raises(CodecError):
                    decoded(self.codec, encoded, raw_bytes)
            with pytest.raises(CodecError):
                decoded(self.codec, b"", len(raw))

    def test_decoding_never_takes_more_memory_than_was_asked_for(self) -> None:
        for name, bomb in bombs().items():
            tracemalloc.start()
            try:
                with pytest.raises(REFUSALS):
                    decoded(self.codec, bomb, 1000)
                peak_bytes = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
            assert peak_bytes < len(bomb) + 1_000_000, name

    def test_threads_do_not_disturb_each_other(self) -> None:
        inputs = [(raw[shift:], elements) for raw, elements in self.examples() for shift in range(8)]

        def round_trips(index: int) -> int:
            for raw, elements in inputs[index:] + inputs[:index]:
                encoded = self.codec.encode(raw, elements)
                if encoded is not None and decoded(self.codec, encoded, len(raw)) != raw:
                    return 1
            return 0

        with ThreadPoolExecutor(4) as pool:
            assert sum(pool.map(round_trips, range(len(inputs)))) == 0
