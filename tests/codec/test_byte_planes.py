"""Byte planes keep the contract of a codec; their container is pinned."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from castore.codec import transform
from castore.codec.base import PLAIN, Elements
from castore.codec.byte_planes import (
    METHOD_CONSTANT,
    METHOD_RAW,
    METHOD_ZSTD,
    BytePlanes,
    looks_random,
)
from castore.errors import CodecError
from tests.suites.codec_suite import CodecSuite, build, decoded
from tests.suites.golden import assert_golden

FLOAT = Elements(4, is_float=True)
HEAD_BYTES = 8


class TestBytePlanes(CodecSuite):
    number = 3

    def examples(self) -> list[tuple[bytes, Elements]]:
        sparse = np.zeros(5000, "<f4")
        sparse[1000:1100] = 1.5
        return [
            (build("float32", 1, 70_000), FLOAT),
            (build("float64", 1, 20_003), Elements(8, is_float=True)),
            (build("int64", 1, 20_000), Elements(8)),
            (build("float16", 1, 200_001), Elements(2, is_float=True)),
            (sparse.tobytes() + b"xyz", FLOAT),
        ]


def encode(raw: bytes, elements: Elements) -> bytes:
    encoded = BytePlanes().encode(raw, elements)
    assert encoded is not None
    return encoded


def methods(encoded: bytes) -> list[int]:
    return [encoded[HEAD_BYTES + 5 * index] for index in range(encoded[0])]


def payload(*planes: tuple[int, bytes], mode: int = 0, flags: int = 0, alpha: float = 1.0, rest: bytes = b"") -> bytes:
    """A payload put together by hand; `rest` goes behind the planes."""
    heads = b"".join(struct.pack("<BI", method, len(body)) for method, body in planes)
    bodies = b"".join(body for _, body in planes)
    return struct.pack("<BBHf", len(planes), mode, flags, alpha) + heads + bodies + rest


# ---- bytes -------------------------------------------------------------------------------------------------


def test_the_container_is_pinned() -> None:
    # fp32 between 1 and 2: after the rotation the exponent fills the top plane; two odd bytes follow.
    words = 0x3F800000 + np.arange(32, dtype="<u4") * 0x00030201
    assert_golden(
        encode(words.tobytes() + b"zz", FLOAT),
        """
        04 01 0000 0000803f
        00 20000000
        00 20000000
        00 20000000
        02 01000000
        00020406080a0c0e10121416181a1c1e20222426282a2c2e30323436383a3c3e
        0004080c1014181c2024282c3034383c4044484c5054585c6064686c7074787c
        00060c12181e242a30363c42484e545a60666c72787e848a90969ca2a8aeb4ba
        7f
        7a7a
        """,
    )


def test_groups_of_zeros_are_pinned() -> None:
    numbers = np.arange(32, dtype="<u2") * 0x0101
    words = np.zeros(300, "<u2")
    words[64:96] = 0x6501 + numbers
    words[288:] = 0xC8A0 + numbers[:12]
    assert_golden(
        encode(words.tobytes(), Elements(2)),
        """
        02 00 0100 0000803f
        00 2c000000
        00 2c000000
        0402
        0102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f20 a0a1a2a3a4a5a6a7a8a9aaab
        65666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f8081828384 c8c9cacbcccdcecfd0d1d2d3
        """,
    )


def test_pinned_zstd_planes_decode_for_ever() -> None:
    frame = bytes.fromhex("28b52ffd00005d00002001020304010099294704")
    stored = payload((METHOD_ZSTD, frame), (METHOD_CONSTANT, b"\x40"))
    raw = np.tile(np.array([0x4001, 0x4002, 0x4003, 0x4004], "<u2"), 40).tobytes()
    assert decoded(BytePlanes(), stored, 320) == raw


def test_a_payload_without_an_element_is_its_tail() -> None:
    assert decoded(BytePlanes(), payload(*[(METHOD_RAW, b"")] * 4, rest=b"abc"), 3) == b"abc"


# ---- choices -----------------------------------------------------------------------------------------------


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
    encoded = encode(raw, Elements(4))
    assert methods(encoded) == [METHOD_RAW, METHOD_ZSTD, METHOD_CONSTANT, METHOD_RAW]
    assert decoded(BytePlanes(), encoded, len(raw)) == raw


def test_a_plane_that_only_looks_constant_at_its_ends_is_exact() -> None:
    raw = bytearray(np.full(50_000, 1.5, "<f4").tobytes())
    raw[100_003] ^= 0x40
    assert decoded(BytePlanes(), encode(bytes(raw), FLOAT), len(raw)) == raw


def test_rows_of_zeros_cost_nothing_but_their_bits() -> None:
    rng = np.random.default_rng(5)
    rows = np.zeros((1000, 64), "<f4")
    touched = rng.integers(0, 1000, 100)
    rows[touched] = rng.standard_normal((100, 64))
    whole, alone = (len(encode(data.tobytes(), FLOAT)) for data in (rows, rows[np.unique(touched)]))
    assert whole < alone + 1000 * 64 // 32 // 8 + 100


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


def test_encoding_is_the_same_with_the_compiled_and_the_numpy_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    for raw, elements in TestBytePlanes().examples():
        with_best = encode(raw, elements)
        with monkeypatch.context() as patch:
            patch.setattr(transform, "kernel", transform.NumpyKernel())
            assert encode(raw, elements) == with_best
            assert decoded(BytePlanes(), with_best, len(raw)) == raw


# ---- what cannot be ----------------------------------------------------------------------------------------

FOUR = (METHOD_RAW, b"1234")


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (b"", "a head of 8 bytes, found 0"),
        (payload(FOUR)[:7], "a head of 8 bytes, found 7"),
        (payload(FOUR, FOUR, FOUR), "width 3"),
        (payload(), "width 0"),
        (payload(FOUR, mode=5), "mode 5"),
        (payload(FOUR, mode=255), "mode 255"),
        (payload(FOUR, mode=2), "has no base"),
        (payload(*[(METHOD_RAW, b"1")] * 4, mode=4), "has no base"),
        (payload(FOUR, mode=4, alpha=1.0), "a factor of 1.0 for elements of 1 bytes"),
        (payload(*[(METHOD_RAW, b"1")] * 4, mode=4, alpha=0.49), "a factor of 0.49"),
        (payload(*[(METHOD_RAW, b"1")] * 4, mode=4, alpha=float("nan")), "a factor of nan"),
        (payload(FOUR, flags=2), "flags 2"),
        (payload(FOUR)[:12], "in 12 bytes cannot be"),
        (payload(FOUR)[:-1], "plane 0: expected 4 bytes, found 3"),
        (payload((3, b"1234")), "method 3"),
        (payload((METHOD_RAW, b"123")), "method 0 with 3 bytes for 4 elements"),
        (payload((METHOD_RAW, b"12345")), "method 0 with 5 bytes for 4 elements"),
        (payload((METHOD_CONSTANT, b"12")), "method 2 with 2 bytes"),
        (payload((METHOD_ZSTD, b"1234")), "zstd"),
        (payload(FOUR, rest=b"5"), "a tail of 0 bytes, found 1"),
        (payload((METHOD_RAW, b"")[:2], flags=1)[:13], "a bitmap of 1 bytes, found 0"),
    ],
)
def test_a_container_that_cannot_be_is_named(stored: bytes, message: str) -> None:
    with pytest.raises(CodecError, match=message):
        decoded(BytePlanes(), stored, 4)


@pytest.mark.parametrize(("bitmap", "length"), [(b"\0", 4), (b"\2", 4), (b"\1", 3), (b"\1", 5), (b"\1", 0)])
def test_planes_that_do_not_fit_their_bitmap_are_refused(bitmap: bytes, length: int) -> None:
    head = payload((METHOD_RAW, bytes(length)), flags=1)
    stored = head[:13] + bitmap + head[13:]
    with pytest.raises(CodecError, match=r"plane 0|tail"):
        decoded(BytePlanes(), stored, 4)


def test_a_bitmap_may_say_that_nothing_was_kept() -> None:
    assert decoded(BytePlanes(), payload((METHOD_RAW, b""), flags=1, rest=b"\0"), 4) == bytes(4)
