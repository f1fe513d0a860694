"""The constant codec keeps the contract, and takes the shortest unit."""

from __future__ import annotations

import pytest

from castore.codec.base import PLAIN, Elements
from castore.codec.constant import Constant
from castore.errors import CodecError
from tests.suites.codec_suite import CodecSuite, decoded


class TestConstant(CodecSuite):
    number = 4

    def examples(self) -> list[tuple[bytes, Elements]]:
        return [(bytes(5000), PLAIN), (b"\x00\x00\x80\x3f" * 1000, Elements(4, is_float=True))]


@pytest.mark.parametrize("unit", [b"a", b"ab", b"abcd", b"abcdefgh", b"abcdefghijklmnop"])
@pytest.mark.parametrize("count", [2, 3, 5, 100, 10_000])
def test_the_shortest_unit_that_repeats_is_kept(unit: bytes, count: int) -> None:
    assert Constant().encode(unit * count, PLAIN) == unit
    assert decoded(Constant(), unit, len(unit) * count) == unit * count


@pytest.mark.parametrize("position", [0, 1, 63, 64, 65, 100, 4094, 4095])
def test_one_other_byte_anywhere_is_seen(position: int) -> None:
    raw = bytearray(4096)
    raw[position] = 1
    assert Constant().encode(raw, PLAIN) is None


@pytest.mark.parametrize("raw", [b"abc" * 100, b"ab" * 100 + b"a", b"abcdefghijklmnopq" * 8, b"a", b""])
def test_other_units_and_cut_ones_are_left_alone(raw: bytes) -> None:
    assert Constant().encode(raw, PLAIN) is None


@pytest.mark.parametrize(("stored", "raw_bytes"), [(b"", 8), (b"abc", 9), (b"abcd", 10), (b"a" * 32, 64)])
def test_a_unit_that_cannot_be_is_refused(stored: bytes, raw_bytes: int) -> None:
    with pytest.raises(CodecError, match=f"a unit that divides {raw_bytes} bytes, found {len(stored)}"):
        decoded(Constant(), stored, raw_bytes)


def test_a_unit_may_fill_nothing() -> None:
    assert decoded(Constant(), b"ab", 0) == b""
