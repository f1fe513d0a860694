"""Columns say what the rows say."""

from __future__ import annotations

import pytest

from castore.errors import ChecksumError, FormatError
from castore.format.pack import RecordKind, Row, Trailer, decode_table, encode_table, row_bytes
from castore.format.pack_columns import columns_of, decode_columns
from castore.hashing import checksum
from castore.ids import ChunkId, PackId


def rows_of(id_bytes: int) -> list[Row]:
    def chunk(number: int) -> ChunkId:
        return ChunkId(bytes([number]) * id_bytes)

    return [
        Row(chunk(1), 64, 100, 200, 5, (3,), RecordKind.LEAF),
        Row(chunk(2), 1 << 40, 70_000, 1 << 20, 2**64 - 1, (16,), RecordKind.LEAF, 2, (chunk(1),)),
        Row(chunk(3), 5000, 1, 1 << 20, 9, (17,), RecordKind.LEAF, 3, (chunk(2), chunk(1))),
        Row(chunk(255), 9000, 0, 0, 0, (), RecordKind.PART, in_run=True),
    ]


@pytest.mark.parametrize("id_bytes", [16, 32])
def test_columns_say_what_the_rows_say(id_bytes: int) -> None:
    rows = rows_of(id_bytes)
    data = encode_table(rows, id_bytes=id_bytes)
    trailer = Trailer(PackId("0" * 32), 64, len(rows), checksum(data), second_base_count=1)
    for columns in (
        decode_columns(data, trailer, id_bytes=id_bytes, where="x"),
        columns_of(rows, id_bytes=id_bytes),
    ):
        assert [words.tobytes() for words in columns.chunk_ids] == [row.chunk_id for row in rows]
        no_base = bytes(id_bytes)
        assert [words.tobytes() for words in columns.base_ids] == [
            row.base_ids[0] if row.base_ids else no_base for row in rows
        ]
        assert [words.tobytes() for words in columns.second_base_ids] == [row.base_ids[1] for row in rows[2:3]]
        assert columns.second_rows.tolist() == [2]
        assert columns.stored_bytes.tolist() == [row.stored_bytes for row in rows]
        assert columns.depths.tolist() == [row.depth for row in rows]
        assert len(columns) == len(rows)


def test_a_table_that_changed_is_refused() -> None:
    data = bytearray(encode_table(rows_of(16), id_bytes=16))
    trailer = Trailer(PackId("0" * 32), 64, 4, checksum(data), second_base_count=1)
    data[70] ^= 1
    with pytest.raises(ChecksumError, match="where"):
        decode_columns(data, trailer, id_bytes=16, where="where")


@pytest.mark.parametrize("id_bytes", [16, 32])
@pytest.mark.parametrize("which", ["first", "second"])
def test_a_row_of_two_bases_with_a_zero_id_is_refused_as_rows_and_as_columns(which: str, id_bytes: int) -> None:
    rows = rows_of(id_bytes)
    data = bytearray(encode_table(rows, id_bytes=id_bytes))
    start = 2 * row_bytes(id_bytes) + id_bytes if which == "first" else len(data) - id_bytes
    data[start : start + id_bytes] = bytes(id_bytes)
    trailer = Trailer(PackId("0" * 32), 1 << 41, len(rows), checksum(data), second_base_count=1)
    for decode in (decode_table, decode_columns):
        with pytest.raises(FormatError, match="expected two bases"):
            decode(data, trailer, id_bytes=id_bytes, where="x")


def test_an_empty_table_has_no_columns() -> None:
    assert len(decode_columns(b"", Trailer(PackId("0" * 32), 64, 0, checksum(b"")), id_bytes=16, where="x")) == 0
    assert len(columns_of([], id_bytes=32)) == 0
