"""zstd keeps the contract of a codec, and believes no frame more than the record."""

from __future__ import annotations

import pytest
import zstandard

from castore.codec.base import PLAIN, Elements
from castore.codec.zstd_frame import ZstdFrame
from castore.errors import CodecError
from tests.suites.codec_suite import CodecSuite, build, decoded


class TestZstdFrame(CodecSuite):
    number = 2

    def examples(self) -> list[tuple[bytes, Elements]]:
        return [(build("text", 1, 5000), PLAIN), (build("int64", 1, 100_000), Elements(8))]


def test_pinned_bytes_decode_for_ever() -> None:
    stored = bytes.fromhex("28b52ffd00004d00001861626301002cdd10")
    assert decoded(ZstdFrame(), stored, 42) == b"abc" * 14


def test_a_frame_carries_neither_size_nor_checksum() -> None:
    encoded = ZstdFrame().encode(build("text", 1, 5000), PLAIN)
    assert encoded is not None
    frame = zstandard.get_frame_parameters(encoded)
    assert zstandard.frame_content_size(encoded) == -1
    assert not frame.has_checksum


def test_a_frame_of_another_writer_may_say_its_size_if_it_is_the_right_one() -> None:
    raw = build("text", 1, 5000)
    stored = zstandard.ZstdCompressor(write_content_size=True, write_checksum=True).compress(raw)
    assert decoded(ZstdFrame(), stored, 5000) == raw
    with pytest.raises(CodecError, match="expected 4999 bytes, found a frame of 5000"):
        decoded(ZstdFrame(), stored, 4999)


def test_nothing_may_follow_the_frame() -> None:
    encoded = ZstdFrame().encode(bytes(5000), PLAIN)
    assert encoded is not None
    for extra in (b"\0", encoded):
        with pytest.raises(CodecError):
            decoded(ZstdFrame(), encoded + extra, 5000)
