"""Headers, records, runs, tables and trailers of packs: pinned bytes, bounds checked before anything is allocated."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from castore.errors import CastoreError, ChecksumError, DamageError, FormatError, UnsupportedFormatError
from castore.format.pack import (
    BASES_MAX,
    HEADER_BYTES,
    RUN_FIXED_BYTES,
    TRAILER_BYTES,
    PackHeader,
    RecordKind,
    Row,
    Trailer,
    aligned,
    check_row,
    decode_header,
    decode_record_header,
    decode_run_fixed,
    decode_run_header,
    decode_table,
    decode_trailer,
    encode_header,
    encode_record_header,
    encode_run_header,
    encode_table,
    encode_trailer,
    record_header_bytes,
    row_bytes,
    run_header_bytes,
    table_bytes,
)
from castore.hashing import checksum, hasher_for
from castore.ids import ChunkId, PackId
from castore.options import GRID_BYTES, PAGE_BYTES, PART_BYTES_MAX, RECORD_STORED_BYTES_MAX, TABLE_ROWS_MAX
from tests.suites.golden import assert_golden

PACK = PackId("000102030405060708090a0b0c0d0e0f")
HEADER = PackHeader(PACK, b"R" * 16, hasher_for("xxh3-128"), 1_700_000_000_000_000_000)
ROW = Row(ChunkId(b"c" * 16), 128, 5, 9, 0x1122334455667788, (3,), RecordKind.LEAF)
DELTA = Row(ChunkId(b"d" * 16), 200, 5, 1 << 20, 7, (16, 3), RecordKind.LEAF, 2, (ChunkId(b"b" * 16),))
COPY = Row(ChunkId(b"e" * 16), 300, 1, 1 << 20, 6, (17,), RecordKind.LEAF, 1, (ChunkId(b"f" * 16), ChunkId(b"g" * 16)))
PART = Row(ChunkId(b"p" * 16), 4096, 10, 10, 8, (), RecordKind.PART)
IN_RUN = Row(ChunkId(b"r" * 16), 8192, 1 << 20, 1 << 20, 9, (), RecordKind.LEAF, in_run=True)
ROWS = (ROW, DELTA, PART, IN_RUN)


def with_sum(body: bytes) -> bytes:
    return body + checksum(body).to_bytes(8, "little")


def flips(data: bytes) -> list[bytes]:
    """Every single-bit change."""
    changed = []
    for position in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            changed.append(bytes(damaged))
    return changed


# ---- header ------------------------------------------------------------------------------------------------


def test_the_header_is_pinned() -> None:
    assert_golden(
        encode_header(HEADER),
        """
        434153545041434b010001100000000000002a36fe9c97170001020304050607
        08090a0b0c0d0e0f52525252525252525252525252525252a97292c3a64622c9
        """,
    )


@pytest.mark.parametrize("name", ["xxh3-128", "blake3"])
def test_a_header_comes_back(name: str) -> None:
    header = replace(HEADER, hasher=hasher_for(name))
    data = encode_header(header)
    assert len(data) == HEADER_BYTES
    found = decode_header(data + b"more", where="x")
    assert (found.pack_id, found.repository_id, found.created_ns) == (PACK, b"R" * 16, HEADER.created_ns)
    assert (found.hasher.name, found.hasher.digest_bytes) == (name, header.hasher.digest_bytes)


def test_every_flipped_bit_of_a_header_is_seen() -> None:
    for damaged in flips(encode_header(HEADER)):
        with pytest.raises(DamageError, match="packs/x"):
            decode_header(damaged, where="packs/x")


def test_a_header_that_cannot_be_is_named() -> None:
    body = encode_header(HEADER)[:-8]
    for data, kind, message in (
        (b"", FormatError, "a header of 64 bytes, found 0"),
        (body, FormatError, "found 56"),
        (b"PK\3\4" + bytes(60), FormatError, "not a pack"),
        (
            with_sum(body[:8] + b"\2\0" + body[10:]),
            UnsupportedFormatError,
            "pack version 2; this castore reads version 1",
        ),
        (with_sum(body[:10] + b"\7" + body[11:]), UnsupportedFormatError, "hash algorithm number 7"),
        (with_sum(body[:11] + b"\x20" + body[12:]), FormatError, "expected ids of 16 bytes, found 32"),
    ):
        with pytest.raises(kind, match=message):
            decode_header(data, where="packs/x")


# ---- trailer -----------------------------------------------------------------------------------------------

TRAILER = Trailer(PACK, 4096, 3, 0xAABBCCDDEEFF0011)
PACK_BYTES = 4096 + 3 * 64 + TRAILER_BYTES


def test_the_trailer_is_pinned_and_comes_back() -> None:
    data = encode_trailer(TRAILER)
    assert_golden(
        data,
        """
        434153545441494c001000000000000003000000000000001100ffeeddccbbaa
        000102030405060708090a0b0c0d0e0f0000000000000000dcca54f207374fdd
        """,
    )
    assert decode_trailer(data, pack_bytes=PACK_BYTES, id_bytes=16, where="x") == TRAILER


def test_every_flipped_bit_of_a_trailer_is_seen() -> None:
    for damaged in flips(encode_trailer(TRAILER)):
        with pytest.raises(DamageError, match="packs/x"):
            decode_trailer(damaged, pack_bytes=PACK_BYTES, id_bytes=16, where="packs/x")


def test_a_trailer_must_fit_the_file() -> None:
    data = encode_trailer(TRAILER)
    for pack_bytes in (0, PACK_BYTES - 1, PACK_BYTES + 1):
        with pytest.raises(FormatError, match=f"describes a file of {PACK_BYTES} bytes, found {pack_bytes}"):
            decode_trailer(data, pack_bytes=pack_bytes, id_bytes=16, where="x")
    huge = Trailer(PACK, 0, TABLE_ROWS_MAX + 1, 0)
    with pytest.raises(FormatError, match="describes a file"):
        decode_trailer(encode_trailer(huge), pack_bytes=(TABLE_ROWS_MAX + 1) * 64 + 64, id_bytes=16, where="x")
    for length in (0, 63, 65):
        with pytest.raises(FormatError, match=f"a trailer of 64 bytes, found {length}"):
            decode_trailer(bytes(length), pack_bytes=PACK_BYTES, id_bytes=16, where="x")


# ---- records -----------------------------------------------------------------------------------------------


def test_record_headers_are_pinned() -> None:
    assert_golden(
        encode_record_header(ROW, id_bytes=16),
        """
        4352454301000000030000000500000009000000887766554433221163636363
        63636363636363636363636300000000000000000000000000000000ff6b3689
        """,
    )
    assert_golden(
        encode_record_header(DELTA, id_bytes=16),
        """
        4352454301020000100300000500000000001000070000000000000064646464
        64646464646464646464646462626262626262626262626262626262445e1a2e
        """,
    )
    assert (record_header_bytes(16), record_header_bytes(32)) == (64, 96)


@pytest.mark.parametrize("row", [ROW, DELTA, COPY, PART], ids=["leaf", "delta", "copy", "part"])
@pytest.mark.parametrize("id_bytes", [16, 32])
def test_a_record_header_comes_back(row: Row, id_bytes: int) -> None:
    wide = replace(
        row,
        chunk_id=ChunkId(row.chunk_id * (id_bytes // 16)),
        base_ids=tuple(ChunkId(base_id * (id_bytes // 16)) for base_id in row.base_ids),
        offset=1000 + record_header_bytes(id_bytes, base_count=len(row.base_ids)),
    )
    data = encode_record_header(wide, id_bytes=id_bytes)
    assert len(data) == record_header_bytes(id_bytes, base_count=len(row.base_ids))
    assert decode_record_header(data + b"payload", offset=1000, id_bytes=id_bytes, where="x") == wide


def test_a_record_with_two_bases_names_both() -> None:
    assert_golden(
        encode_record_header(COPY, id_bytes=16),
        """
        4352454301010100110000000100000000001000060000000000000065656565
        6565656565656565656565656666666666666666666666666666666667676767
        676767676767676767676767a4b8baeb
        """,
    )
    assert (record_header_bytes(16, base_count=2), record_header_bytes(32, base_count=2)) == (80, 128)
    with pytest.raises(ValueError, match="at most 2 bases"):
        encode_record_header(replace(COPY, base_ids=COPY.base_ids * 2), id_bytes=16)


@pytest.mark.parametrize("zeroed", [44, 60], ids=["first", "second"])
def test_a_record_of_two_bases_with_a_zero_id_is_refused(zeroed: int) -> None:
    body = bytearray(encode_record_header(COPY, id_bytes=16)[:-4])
    body[zeroed : zeroed + 16] = bytes(16)
    sealed = bytes(body) + checksum(body).to_bytes(8, "little")[:4]
    with pytest.raises(FormatError, match="expected two bases"):
        decode_record_header(sealed, offset=0, id_bytes=16, where="x")


@pytest.mark.parametrize("row", [ROW, COPY], ids=["leaf", "copy"])
def test_every_flipped_bit_of_a_record_header_is_seen(row: Row) -> None:
    for damaged in flips(encode_record_header(row, id_bytes=16)):
        with pytest.raises(DamageError, match="pack, record"):
            decode_record_header(damaged, offset=0, id_bytes=16, where="pack, record")


def test_a_record_header_cut_short_is_named() -> None:
    data = encode_record_header(ROW, id_bytes=16)
    with pytest.raises(FormatError, match="a record header of 64 bytes, found 63"):
        decode_record_header(data[:-1], offset=0, id_bytes=16, where="x")


def test_a_kind_of_record_that_is_not_known_is_named() -> None:
    body = bytearray(encode_record_header(ROW, id_bytes=16)[:-4])
    body[4] = 9
    sealed = bytes(body) + (checksum(body) & 0xFFFFFFFF).to_bytes(4, "little")
    with pytest.raises(FormatError, match="record kind 9 is unknown"):
        decode_record_header(sealed, offset=0, id_bytes=16, where="x")


BAD_ROWS: tuple[dict[str, Any], ...] = (
    {"raw_bytes": GRID_BYTES + 1},
    {"raw_bytes": 2**32 - 1},
    {"stored_bytes": RECORD_STORED_BYTES_MAX + 1},
    {"chain": ()},
    {"depth": 1},
    {"base_ids": (ChunkId(b"b" * 16),)},
    {"kind": RecordKind.PART, "raw_bytes": PART_BYTES_MAX + 1},
    {"kind": RecordKind.PART, "stored_bytes": PART_BYTES_MAX + 1},
)


@pytest.mark.parametrize("fields", BAD_ROWS)
def test_a_row_beyond_the_bounds_is_refused_wherever_it_stands(fields: dict[str, Any]) -> None:
    row = replace(ROW, **fields)
    with pytest.raises(FormatError, match="declares"):
        check_row(row, where="x")
    with pytest.raises(FormatError, match="declares"):
        decode_record_header(encode_record_header(row, id_bytes=16), offset=0, id_bytes=16, where="x")
    with pytest.raises(FormatError, match="declares"):
        table([row])


def test_parts_may_be_longer_than_chunks_of_leaves() -> None:
    check_row(replace(PART, raw_bytes=PART_BYTES_MAX, stored_bytes=PART_BYTES_MAX), where="x")


def test_a_chain_has_no_holes() -> None:
    body = bytearray(encode_record_header(ROW, id_bytes=16)[:-4])
    body[8:12] = b"\x00\x03\x00\x00"
    sealed = bytes(body) + (checksum(body) & 0xFFFFFFFF).to_bytes(4, "little")
    with pytest.raises(FormatError, match=r"codec chain \(0, 3\)"):
        decode_record_header(sealed, offset=0, id_bytes=16, where="x")


@pytest.mark.parametrize("chain", [(1, 2, 3, 4, 5), (0,), (256,), (-1,)])
def test_a_chain_that_does_not_fit_is_a_mistake_of_the_caller(chain: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        encode_record_header(replace(ROW, chain=chain), id_bytes=16)


# ---- runs --------------------------------------------------------------------------------------------------

RUN = ((ChunkId(b"1" * 16), 11), (ChunkId(b"2" * 16), 22), (ChunkId(b"3" * 16), 33))
RUN_PAYLOAD_BYTES = 2 * GRID_BYTES + 5


def run_header(*, offset: int = 64, payload_bytes: int = RUN_PAYLOAD_BYTES) -> bytes:
    return encode_run_header(RUN, kind=RecordKind.LEAF, payload_bytes=payload_bytes, offset=offset, id_bytes=16)


def test_the_run_header_is_pinned() -> None:
    header = run_header()
    assert_golden(
        header[: RUN_FIXED_BYTES + 3 * 24],
        """
        4352554e0110000003000000c00f0000050020000000000048b19068d1a8aa0931313131313131313131313131313131
        0b0000000000000032323232323232323232323232323232160000000000000033333333333333333333333333333333
        2100000000000000
        """,
    )
    assert not any(header[RUN_FIXED_BYTES + 3 * 24 :])


@pytest.mark.parametrize("offset", [64, 72, 4096, 3992, 3984, 3976, 4088, 1 << 20])
def test_the_payload_of_a_run_starts_on_a_page(offset: int) -> None:
    length = run_header_bytes(3, offset=offset, id_bytes=16)
    assert (offset + length) % PAGE_BYTES == 0
    assert RUN_FIXED_BYTES + 3 * 24 <= length < RUN_FIXED_BYTES + 3 * 24 + PAGE_BYTES
    header = run_header(offset=offset)
    assert len(header) == length
    assert decode_run_fixed(header, id_bytes=16, where="x") == (3, length, RUN_PAYLOAD_BYTES)


def test_a_run_header_gives_the_rows_of_its_chunks() -> None:
    start = 64 + run_header_bytes(3, offset=64, id_bytes=16)
    rows = decode_run_header(run_header(), offset=64, id_bytes=16, where="x")
    assert [(row.chunk_id, row.checksum) for row in rows] == list(RUN)
    assert [row.offset for row in rows] == [start, start + GRID_BYTES, start + 2 * GRID_BYTES]
    assert [row.raw_bytes for row in rows] == [row.stored_bytes for row in rows] == [GRID_BYTES, GRID_BYTES, 5]
    assert all(row.in_run and row.chain == () and row.base_ids == () for row in rows)


def test_every_flipped_bit_of_a_run_header_is_seen() -> None:
    header = run_header()
    rows_end = RUN_FIXED_BYTES + 3 * 24
    for damaged in flips(header[:rows_end]):
        with pytest.raises(DamageError, match="x"):
            decode_run_header(damaged + header[rows_end:], offset=64, id_bytes=16, where="x")


def test_lengths_of_a_run_that_contradict_each_other_are_refused_before_anything_is_read() -> None:
    header = run_header()
    for at, value in (
        (8, (0).to_bytes(4, "little")),
        (8, (2**32 - 1).to_bytes(4, "little")),
        (12, (0).to_bytes(4, "little")),
        (12, (2**32 - 1).to_bytes(4, "little")),
        (16, (0).to_bytes(8, "little")),
        (16, (2**64 - 1).to_bytes(8, "little")),
        (5, b"\x20"),
    ):
        damaged = header[:at] + value + header[at + len(value) :]
        with pytest.raises(FormatError):
            decode_run_fixed(damaged, id_bytes=16, where="x")
    with pytest.raises(FormatError, match="a run header of 32 bytes, found 31"):
        decode_run_fixed(header[:31], id_bytes=16, where="x")
    with pytest.raises(FormatError, match="a run header of 104 bytes, found 100"):
        decode_run_header(header[:100], offset=64, id_bytes=16, where="x")


# ---- table -------------------------------------------------------------------------------------------------


def table(rows: list[Row], *, offset: int = 1 << 30) -> list[Row]:
    """Rows written and read again."""
    data = encode_table(rows, id_bytes=16)
    seconds = sum(len(row.base_ids) > 1 for row in rows)
    return decode_table(data, Trailer(PACK, offset, len(rows), checksum(data), seconds), id_bytes=16, where="x")


def test_second_bases_follow_the_rows() -> None:
    data = encode_table([COPY, PART], id_bytes=16)
    assert_golden(
        data,
        """
        6565656565656565656565656565656566666666666666666666666666666666
        2c01000000000000010000000000100006000000000000001100000001010200
        7070707070707070707070707070707000000000000000000000000000000000
        00100000000000000a0000000a00000008000000000000000000000002000000
        67676767676767676767676767676767
        """,
    )
    trailer = Trailer(PACK, 8192, 2, checksum(data), 1)
    assert_golden(
        encode_trailer(trailer),
        """
        434153545441494c002000000000000002000000000000000badfd19fa6ad02d
        000102030405060708090a0b0c0d0e0f0100000000000000eacade50b66a51a0
        """,
    )
    assert table_bytes(trailer, id_bytes=16) == len(data)
    with pytest.raises(FormatError, match="expected a table of 128 bytes, found 144"):
        decode_table(data, replace(trailer, second_base_count=0), id_bytes=16, where="x")
    without_flag = data[:62] + bytes(2) + data[64:]
    lying = replace(trailer, table_checksum=checksum(without_flag))
    with pytest.raises(FormatError, match="holds 1 second bases, its rows need 0"):
        decode_table(without_flag, lying, id_bytes=16, where="x")
    sealed = encode_trailer(replace(trailer, second_base_count=3))
    with pytest.raises(FormatError, match="describes a file"):
        decode_trailer(sealed, pack_bytes=8192 + 128 + 48 + 64, id_bytes=16, where="x")


def test_table_rows_are_pinned() -> None:
    assert_golden(
        encode_table(ROWS, id_bytes=16),
        """
        6363636363636363636363636363636300000000000000000000000000000000
        8000000000000000050000000900000088776655443322110300000001000000
        6464646464646464646464646464646462626262626262626262626262626262
        c800000000000000050000000000100007000000000000001003000001020000
        7070707070707070707070707070707000000000000000000000000000000000
        00100000000000000a0000000a00000008000000000000000000000002000000
        7272727272727272727272727272727200000000000000000000000000000000
        0020000000000000000010000000100009000000000000000000000001000100
        """,
    )
    assert (row_bytes(16), row_bytes(32)) == (64, 96)


def test_a_table_comes_back() -> None:
    assert table(list(ROWS)) == list(ROWS)
    assert table([]) == []


def test_a_table_that_changed_is_a_checksum_error() -> None:
    data = encode_table(ROWS, id_bytes=16)
    trailer = Trailer(PACK, 1 << 30, 4, checksum(data))
    for position in range(0, len(data), 5):
        damaged = data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]
        with pytest.raises(ChecksumError, match="packs/x: table"):
            decode_table(damaged, trailer, id_bytes=16, where="packs/x")


@pytest.mark.parametrize("offset", [0, 63, 4096, 4091 + 1, 2**64 - 1])
def test_a_row_outside_the_records_is_refused(offset: int) -> None:
    with pytest.raises(FormatError, match="outside the pack's records"):
        table([replace(ROW, offset=offset)], offset=4096)
    assert table([replace(ROW, offset=4091)], offset=4096)


@st.composite
def rows(draw: st.DrawFn) -> Row:
    kind = draw(st.sampled_from(list(RecordKind)))
    bases = draw(st.lists(st.binary(min_size=16, max_size=16).filter(any), max_size=BASES_MAX))
    chain = tuple(draw(st.lists(st.integers(1, 255), max_size=4)))
    raw_bytes = draw(st.integers(0, GRID_BYTES))
    stored_bytes = draw(st.integers(0, RECORD_STORED_BYTES_MAX)) if chain else raw_bytes
    return Row(
        ChunkId(draw(st.binary(min_size=16, max_size=16))),
        draw(st.integers(HEADER_BYTES, 1 << 40)),
        stored_bytes,
        raw_bytes,
        draw(st.integers(0, 2**64 - 1)),
        chain,
        kind,
        draw(st.integers(1, 16)) if bases else 0,
        tuple(map(ChunkId, bases)),
    )


@given(st.lists(rows(), max_size=5))
def test_any_rows_come_back(some: list[Row]) -> None:
    assert table(some, offset=1 << 50) == some
    for row in some:
        start = row.offset - record_header_bytes(16, base_count=len(row.base_ids))
        assert decode_record_header(encode_record_header(row, id_bytes=16), offset=start, id_bytes=16, where="x") == row


# ---- garbage -----------------------------------------------------------------------------------------------


@given(st.binary(max_size=140), st.booleans())
def test_garbage_is_a_typed_error_or_decodes(data: bytes, sealed: bool) -> None:
    calls = [
        lambda d: decode_header(d, where="x"),
        lambda d: decode_trailer(d, pack_bytes=1000, id_bytes=16, where="x"),
        lambda d: decode_record_header(d, offset=0, id_bytes=16, where="x"),
        lambda d: decode_run_header(d, offset=0, id_bytes=16, where="x"),
    ]
    for call, magic in zip(calls, (b"CASTPACK", b"CASTTAIL", b"CREC", b"CRUN"), strict=True):
        body = (magic + data).ljust(56, b"\0")[:56]
        for garbage in (data, with_sum(body), body + (checksum(body) & 0xFFFFFFFF).to_bytes(4, "little") * 2):
            with suppress(CastoreError):
                call(garbage)
    some = data[: len(data) // 64 * 64]
    with suppress(CastoreError):
        decode_table(some, Trailer(PACK, 4096, len(some) // 64, checksum(some)), id_bytes=16, where="x")


def test_offsets_are_rounded_up_to_eight() -> None:
    assert [aligned(offset) for offset in (0, 1, 7, 8, 9)] == [0, 8, 8, 8, 16]
