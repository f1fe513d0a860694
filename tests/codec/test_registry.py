"""Codec numbers are permanent, and what a number does not mean is said."""

from __future__ import annotations

import subprocess
import sys

import pytest

from castore.codec import registry
from castore.codec.base import PLAIN
from castore.codec.registry import NAMES, chain_name, codec_numbered, decode_chain
from castore.errors import CodecError, UnsupportedFormatError


def test_numbers_are_permanent() -> None:
    pinned = {1: "lz4", 2: "zstd", 3: "planes", 4: "constant", 16: "delta", 17: "derived", 18: "ordered"}
    assert pinned == NAMES, "a number more needs a feature flag (docs/FORMAT.md), a number less breaks the format"
    for number in (1, 2, 3, 4):
        codec = codec_numbered(number)
        assert (codec.number, codec.name) == (number, NAMES[number])
        assert codec_numbered(number) is codec


def test_the_table_in_the_docstring_is_the_real_one() -> None:
    for number, name in NAMES.items():
        assert f"    {number:<4} {name}" in (registry.__doc__ or "")


@pytest.mark.parametrize("number", [0, 5, 15, 16, 17, 255, -1])
def test_other_numbers_are_of_a_newer_castore(number: int) -> None:
    with pytest.raises(UnsupportedFormatError, match=f"codec {number} is unknown to this castore; install a newer one"):
        codec_numbered(number)


def test_chains_have_names_for_people() -> None:
    assert chain_name(()) == "raw"
    assert chain_name((3,)) == "planes"
    assert chain_name((16, 3)) == "delta+planes"
    assert chain_name((99,)) == "codec-99"


def undo(chain: tuple[int, ...], stored: bytes, raw_bytes: int, base: bytes | None = None) -> bytes:
    out = bytearray(raw_bytes)
    decode_chain(chain, memoryview(stored), memoryview(out), base=base)
    return bytes(out)


def test_the_empty_chain_is_a_copy_of_the_right_length() -> None:
    assert undo((), b"abc", 3) == b"abc"
    for raw_bytes in (0, 2, 4):
        with pytest.raises(CodecError, match=f"raw: expected {raw_bytes} bytes, found 3"):
            undo((), b"abc", raw_bytes)


def test_a_chain_of_one_is_that_codec() -> None:
    for number in (1, 2, 3, 4):
        raw = b"\x01\x02" * 3000
        encoded = codec_numbered(number).encode(raw, PLAIN)
        assert encoded is not None
        assert undo((number,), encoded, 6000) == raw


@pytest.mark.parametrize("chain", [(1, 2), (3, 3), (16, 3), (99,), (0,)])
def test_chains_that_are_not_known_say_so(chain: tuple[int, ...]) -> None:
    with pytest.raises(UnsupportedFormatError, match="unknown to this castore; install a newer one"):
        undo(chain, b"abc", 3)


def test_a_delta_has_a_base_and_nothing_else_has() -> None:
    with pytest.raises(CodecError, match="delta: has no base"):
        undo((16,), b"abc", 3)
    for chain in ((), (1,), (3,)):
        with pytest.raises(CodecError, match="takes no base"):
            undo(chain, b"abc", 3, base=b"abc")


def test_history_is_read_without_numpy() -> None:
    code = (
        "import sys; from castore.codec.registry import decode_chain, codec_numbered; codec_numbered(2); "
        "codec_numbered(4); sys.exit('numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
