"""Byte planes keep the contract of a codec; their container is pinned."""

from __future__ import annotations

import numpy as np
import pytest

from castore.codec import transform
from castore.codec.base import PLAIN, Elements
from castore.codec.byte_planes import (
    METHOD_CONSTANT,
    METHOD_RAW,
    METHOD_ZSTD,
    BytePlanes,
    decode_planes_head,
    encode_planes,
    looks_random,
    order0_share,
)
from castore.errors import CodecError
from tests.suites.codec_suite import CodecSuite, build, decoded
from tests.suites.golden import assert_golden

FLOAT = Elements(4, is_float=True)


class TestBytePlanes(CodecSuite):
    number = 3

    def examples(self) -> list[tuple[bytes, Elements]]:
        return [
            (build("float32", 1, 70_000), FLOAT),
            (build("float64", 1, 20_003), Elements(8, is_float=True)),
            (build("int64", 1, 20_000), Elements(8)),
            (build("float16", 1, 200_001), Elements(2, is_float=True)),
        ]


def methods(encoded: bytes) -> list[int]:
    return [encoded[2 + 5 * index] for index in range(encoded[0])]


def test_the_container_is_pinned() -> None:
    # Eight fp32 between 1 and 2: after the rotation the exponent fills the top plane; two odd bytes follow.
    words = 0x3F800000 + np.arange(8, dtype="<u4") * 0x00030201
    encoded = BytePlanes().encode(words.tobytes() + b"zz", FLOAT)
    assert encoded is None, "eight elements do not outweigh the heads"
    words = np.tile(words, 2)
    encoded = BytePlanes().encode(words.tobytes() + b"zz", FLOAT)
    assert encoded is not None
    assert_golden(
        encoded,
        """
        04 01
        00 10000000
        00 10000000
        00 10000000
        02 01000000
        00020406080a0c0e00020406080a0c0e
        0004080c1014181c0004080c1014181c
        00060c12181e242a00060c12181e242a
        7f
        7a7a
        """,
    )


def test_pinned_zstd_planes_decode_for_ever() -> None:
    frame = "28b52ffd00005d00002001020304010099294704"
    stored = bytes.fromhex("02 00  01 14000000  02 01000000" + frame + "40")
    raw = np.tile(np.array([0x4001, 0x4002, 0x4003, 0x4004], "<u2"), 40).tobytes()
    assert decoded(BytePlanes(), stored, 320) == raw


def test_each_plane_has_the_method_that_fits_it() -> None:
    rng = np.random.default_rng(3)
    planes = np.stack(
        [
            rng.integers(0, 256, 100_000, np.uint8),
            rng.integers(0, 4, 100_000, np.uint8),
            np.full(100_000, 7, np.uint8),
            rng.integers(0, 256, 100_000, np.uint8),
        ]
    )
    raw = np.ascontiguousarray(planes.T).tobytes()
    encoded = BytePlanes().encode(raw, Elements(4))
    assert encoded is not None
    assert methods(encoded) == [METHOD_RAW, METHOD_ZSTD, METHOD_CONSTANT, METHOD_RAW]
    assert decoded(BytePlanes(), encoded, len(raw)) == raw


def test_a_plane_that_only_looks_constant_at_its_ends_is_exact() -> None:
    raw = bytearray(np.full(50_000, 1.5, "<f4").tobytes())
    raw[100_003] ^= 0x40
    encoded = BytePlanes().encode(raw, FLOAT)
    assert encoded is not None
    assert decoded(BytePlanes(), encoded, len(raw)) == raw


def test_noise_is_not_made_longer() -> None:
    noise = build("noise", 1, 300_000)
    for elements in (PLAIN, FLOAT, Elements(8, is_float=True)):
        assert BytePlanes().encode(noise, elements) is None


def test_the_sample_tells_noise_from_what_shrinks() -> None:
    rng = np.random.default_rng(4)
    noise = rng.integers(0, 256, 1 << 20, np.uint8)
    assert looks_random(noise)
    assert not looks_random(noise[:1000]), "short planes are simply tried"
    assert not looks_random(rng.integers(0, 200, 1 << 20, np.uint8))
    assert order0_share(np.zeros(1000, np.uint8)) == 0
    assert order0_share(np.repeat(np.arange(256, dtype=np.uint8), 1000)) == pytest.approx(1, abs=0.001)


def test_encoding_is_the_same_with_the_compiled_and_the_numpy_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = build("float32", 1, 100_003)
    with_best = BytePlanes().encode(raw, FLOAT)
    monkeypatch.setattr(transform, "kernel", transform.NumpyKernel())
    assert BytePlanes().encode(raw, FLOAT) == with_best
    assert with_best is not None
    assert decoded(BytePlanes(), with_best, len(raw)) == raw


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (b"", "head of 2 bytes, found 0"),
        (b"\x03\x00" + bytes(15), "width 3"),
        (b"\x00\x00", "width 0"),
        (b"\x04\x02" + bytes(20), "rotation 2"),
        (b"\x04\x00" + bytes(19), "in 21 bytes"),
        (b"\x01\x00" + b"\x00\x05\x00\x00\x00" + b"1234", "expected 5 bytes, found 4"),
        (b"\x01\x00" + b"\x03\x04\x00\x00\x00" + b"1234", "method 3"),
        (b"\x01\x00" + b"\x00\x03\x00\x00\x00" + b"123", "method 0 with 3 bytes for 4 elements"),
        (b"\x01\x00" + b"\x02\x02\x00\x00\x00" + b"12", "method 2 with 2 bytes"),
        (b"\x01\x00" + b"\x00\x04\x00\x00\x00" + b"12345", "a tail of 0 bytes, found 1"),
        (b"\x01\x00" + b"\x01\x04\x00\x00\x00" + b"1234", "zstd"),
    ],
)
def test_a_container_that_cannot_be_is_named(stored: bytes, message: str) -> None:
    with pytest.raises(CodecError, match=message):
        decoded(BytePlanes(), stored, 4)


def test_the_head_tells_width_and_rotation() -> None:
    assert decode_planes_head(memoryview(b"\x02\x01" + bytes(10))) == (2, True)
    planes = np.zeros((2, 100), np.uint8)
    encoded = encode_planes(planes, bytes(200), 2, rotate=False)
    assert encoded is not None
    assert decode_planes_head(memoryview(encoded)) == (2, False)
