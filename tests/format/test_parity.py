"""The bytes of parity files are pinned; a layout that does not add up is refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from castore.errors import ChecksumError, FormatError, UnsupportedFormatError
from castore.format.layout import parity_name, parse_parity_name
from castore.format.parity import (
    HEADER_BYTES,
    ParityHeader,
    ParityLayout,
    decode_parity_header,
    decode_sums,
    encode_parity_header,
    encode_sums,
)
from castore.hashing import checksum
from castore.ids import PackId

PACK = PackId("0123456789abcdef" * 2)
LAYOUT = ParityLayout(1_000_000, 100, 10, 10_048, 4096)
HEADER = ParityHeader(LAYOUT, PACK, bytes(range(16)), 0x1122334455667788)
PINNED = (
    "434153545041524901006400"
    "0a000000"
    "00100000"
    "00000000"
    "40420f0000000000"
    "4027000000000000"
    "0123456789abcdef0123456789abcdef"
    "000102030405060708090a0b0c0d0e0f"
    "8877665544332211"
    "0000000000000000"
)


def test_the_header_is_pinned_and_comes_back() -> None:
    data = encode_parity_header(HEADER)
    assert len(data) == HEADER_BYTES
    assert data[:-8].hex() == PINNED
    assert data[-8:] == checksum(data[:-8]).to_bytes(8, "little")
    assert decode_parity_header(data, where="w") == HEADER


def test_a_layout_adds_up() -> None:
    assert LAYOUT.stretch_count == 110
    assert LAYOUT.column_count == 3
    assert [LAYOUT.column_bytes(column) for column in range(3)] == [4096, 4096, 1856]
    assert LAYOUT.table_bytes == 8 * 110 * 3
    assert LAYOUT.file_bytes == 2 * (96 + 2640) + 10 * 10_048
    start = 96 + 2640
    places = [LAYOUT.parity_offset(row, column) for row in range(10) for column in range(3)]
    assert places[:4] == [start, start + 4096, start + 8192, start + 10_048]
    ends = [LAYOUT.parity_offset(row, column) + LAYOUT.column_bytes(column) for row in range(10) for column in range(3)]
    assert places[1:] == ends[:-1]
    assert ends[-1] == start + 10 * 10_048


def test_slabs_follow_each_other_without_gaps() -> None:
    layout = ParityLayout(3 * 64 * 150, 3, 2, 64 * 150, 64)
    assert layout.column_count == 150  # slabs of 64, 64 and 22 columns
    cells = sorted(
        (layout.parity_offset(row, column), layout.column_bytes(column)) for row in range(2) for column in range(150)
    )
    assert cells[0][0] == HEADER_BYTES + layout.table_bytes
    assert all(at + length == after for (at, length), (after, _) in pairwise(cells))
    assert layout.parity_offset(1, 0) - layout.parity_offset(0, 0) == 64 * 64
    assert layout.parity_offset(1, 128) - layout.parity_offset(0, 128) == 22 * 64


@pytest.mark.parametrize(
    "changes",
    [
        {"data_count": 0},
        {"parity_count": 0},
        {"data_count": 250},
        {"stretch_bytes": 10_000},
        {"stretch_bytes": 64},
        {"stretch_bytes": 20_096},
        {"cell_bytes": 0},
        {"cell_bytes": 100},
        {"cell_bytes": 2 << 20},
        {"pack_bytes": 1_004_801},
        {"pack_bytes": 0},
    ],
    ids=str,
)
def test_a_layout_that_does_not_add_up_is_refused(changes: dict[str, int]) -> None:
    data = encode_parity_header(replace(HEADER, layout=replace(LAYOUT, **changes)))
    with pytest.raises(FormatError, match="do not describe"):
        decode_parity_header(data, where="w")


def test_changed_foreign_and_newer_headers_are_refused() -> None:
    data = bytearray(encode_parity_header(HEADER))
    data[30] ^= 1
    with pytest.raises(ChecksumError):
        decode_parity_header(data, where="w")
    with pytest.raises(FormatError, match="magic"):
        decode_parity_header(b"CASTPACK" + data[8:], where="w")
    newer = bytearray(encode_parity_header(HEADER))
    newer[8] = 9
    newer[-8:] = checksum(newer[:-8]).to_bytes(8, "little")
    with pytest.raises(UnsupportedFormatError):
        decode_parity_header(newer, where="w")


def test_the_table_has_a_checksum() -> None:
    table = encode_sums([1, 2**64 - 1, 3])
    header = replace(HEADER, table_checksum=checksum(table))
    assert list(decode_sums(table, header, where="w")) == [1, 2**64 - 1, 3]
    with pytest.raises(ChecksumError, match="table"):
        decode_sums(table[:-1] + b"\x01", header, where="w")


def test_names_are_built_and_parsed() -> None:
    assert parity_name(PACK) == f"parity/01/{PACK}.parity"
    assert parse_parity_name(parity_name(PACK)) == PACK
    for name in (
        f"parity/{PACK}.parity",
        f"parity/02/{PACK}.parity",
        f"packs/01/{PACK}.parity",
        f"parity/01/{PACK}.pack",
    ):
        assert parse_parity_name(name) is None
