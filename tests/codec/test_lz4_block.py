"""lz4 keeps the contract of a codec."""

from __future__ import annotations

from castore.codec.base import PLAIN, Elements
from castore.codec.lz4_block import Lz4Block
from tests.suites.codec_suite import CodecSuite, build, decoded


class TestLz4Block(CodecSuite):
    number = 1

    def examples(self) -> list[tuple[bytes, Elements]]:
        return [(build("text", 1, 5000), PLAIN), (bytes(100_000), PLAIN)]


def test_pinned_bytes_decode_for_ever() -> None:
    assert decoded(Lz4Block(), bytes.fromhex("3f61626303000f506263616263"), 42) == b"abc" * 14


def test_no_length_stands_in_front() -> None:
    encoded = Lz4Block().encode(bytes(1000), PLAIN)
    assert encoded is not None
    assert len(encoded) < 20
