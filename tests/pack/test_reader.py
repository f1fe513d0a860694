"""A pack is read by its table; when that is damaged a scan finds every record that was not hit."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from castore.backend import MemoryBackend
from castore.backend.base import RangeReader
from castore.codec.base import Elements
from castore.codec.chooser import encode_chunk
from castore.errors import ChecksumError, DamageError, FormatError
from castore.format import pack as pack_format
from castore.format.layout import pack_name
from castore.format.pack import (
    HEADER_BYTES,
    RECORD_MAGIC,
    RUN_FIXED_BYTES,
    RUN_MAGIC,
    RecordKind,
    Row,
    encode_record_header,
    record_header_bytes,
    row_bytes,
)
from castore.hashing import hasher_for
from castore.pack import reader as reader_module
from castore.pack.reader import Gap, read_header, read_table, scan_records
from castore.pack.writer import SealedPack
from tests.suites.packs import HASHER, flip, new_writer, pack_id, rewrite, write_pack

NAME = pack_name(pack_id(1))
SMALL_GRID = 512
"""In place of 1 MiB, so that a run of several chunks is a few kilobytes; nothing else of the format depends on it."""


def reader_of(data: bytes) -> RangeReader:
    backend = MemoryBackend()
    backend.put_if_absent(NAME, data)
    return backend.open_reader(NAME)


def scan(data: bytes) -> list[Row | Gap]:
    return list(scan_records(reader_of(data), where=NAME, id_bytes=16))


def rows_of(found: list[Row | Gap]) -> list[Row]:
    return [item for item in found if isinstance(item, Row)]


@dataclass(frozen=True)
class Extent:
    """What must be whole for a row to be found: the bytes of its header (for runs up to the last row)."""

    row: Row
    header: range


@dataclass(frozen=True)
class Sample:
    data: bytes
    sealed: SealedPack
    extents: tuple[Extent, ...]


@pytest.fixture(scope="module")
def sample() -> Iterator[Sample]:
    """A pack of raw and encoded records, parts and two runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_format, "GRID_BYTES", SMALL_GRID)
        yield make_sample()


def make_sample() -> Sample:
    rng = random.Random(5)
    backend = MemoryBackend()
    writer = new_writer(backend)
    extents: list[Extent] = []

    def records(lengths: list[int]) -> None:
        for length in lengths:
            raw = rng.randbytes(length // 2) + bytes(length - length // 2)
            chunk_id = HASHER.chunk_id(raw)
            encoded = encode_chunk(raw, Elements(4), "auto", chunk_id=chunk_id, hasher=HASHER)
            start = pack_format.aligned(writer.pack_bytes) or HEADER_BYTES
            kind = rng.choice(list(RecordKind))
            row = writer.append(chunk_id, encoded.payload, kind=kind, raw_bytes=length, chain=encoded.chain)
            extents.append(Extent(row, range(start, start + record_header_bytes(16))))

    def run(length: int) -> None:
        raw = rng.randbytes(length)
        chunks = [raw[at : at + SMALL_GRID] for at in range(0, length, SMALL_GRID)]
        start = writer.pack_bytes
        pairs = [(HASHER.chunk_id(one), lambda one=one: one) for one in chunks]
        rows = writer.append_run(pairs, kind=RecordKind.LEAF, payload_bytes=length)
        header = range(start, start + RUN_FIXED_BYTES + 24 * len(chunks))
        extents.extend(Extent(row, header) for row in rows)

    records([1, 7, 8, 0, 500, 64, 301])
    run(3 * SMALL_GRID - 7)
    records([400, 3])
    run(SMALL_GRID)
    records([129])
    sealed = writer.seal()
    return Sample(backend.read(NAME, max_bytes=1 << 30), sealed, tuple(extents))


# ---- the table ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["xxh3-128", "blake3"])
def test_the_table_gives_every_row(name: str) -> None:
    backend, hasher = MemoryBackend(), hasher_for(name)
    sealed = write_pack(backend, [b"a", b"b" * 100], hasher=hasher)
    reader = backend.open_reader(NAME)
    assert read_table(reader, where=NAME, expected_id=pack_id(1), hasher=hasher) == list(sealed.rows)
    assert read_header(reader, where=NAME, expected_id=pack_id(1)).hasher.name == name


def table_error(change: Callable[[bytearray], object]) -> str:
    backend = MemoryBackend()
    write_pack(backend, [b"a" * 100, b"b" * 100])
    rewrite(backend, NAME, change)
    with pytest.raises(DamageError) as caught:
        read_table(backend.open_reader(NAME), where=NAME, expected_id=pack_id(1), hasher=HASHER)
    assert str(caught.value).startswith(NAME)
    return str(caught.value)


def cut(length: int) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        del data[length:]

    return change


def test_damage_to_header_table_or_trailer_is_told_apart() -> None:
    assert "header: expected checksum" in table_error(flip(30))
    assert "not a pack" in table_error(flip(0))
    assert "table: expected checksum" in table_error(flip(-100))
    assert "trailer: expected checksum" in table_error(flip(-20))
    assert "expected trailer magic" in table_error(flip(-64))
    assert "expected trailer magic" in table_error(cut(200))
    assert "at least 128 bytes, found 127: the pack is cut short" in table_error(cut(127))
    assert "found 0" in table_error(cut(0))
    assert "the trailer describes a file of" in table_error(lambda data: data.__setitem__(slice(100, 100), bytes(8)))


def test_a_pack_under_the_name_of_another_is_seen() -> None:
    backend = MemoryBackend()
    write_pack(backend, [b"a"])
    reader = backend.open_reader(NAME)
    with pytest.raises(ChecksumError, match=f"expected pack {pack_id(2)}, found {pack_id(1)}: the files were swapped"):
        read_table(reader, where="x", expected_id=pack_id(2), hasher=HASHER)
    with pytest.raises(FormatError, match="expected hash blake3, found xxh3-128: a pack of another repository"):
        read_table(reader, where="x", expected_id=pack_id(1), hasher=hasher_for("blake3"))


def test_a_trailer_of_another_pack_is_seen() -> None:
    backend = MemoryBackend()
    write_pack(backend, [b"a"], number=1)
    write_pack(backend, [b"a"], number=2)
    other = backend.read(pack_name(pack_id(2)), max_bytes=1 << 20)[-64:]

    def change(data: bytearray) -> None:
        data[-64:] = other

    rewrite(backend, NAME, change)
    with pytest.raises(ChecksumError, match="expected the trailer of pack"):
        read_table(backend.open_reader(NAME), where="x", expected_id=pack_id(1), hasher=HASHER)


def test_every_flipped_byte_outside_the_records_is_seen(sample: Sample) -> None:
    data = sample.data
    rows_end = len(data) - 64 - len(sample.sealed.rows) * row_bytes(16)
    for position in [*range(HEADER_BYTES), *range(rows_end, len(data))]:
        damaged = bytearray(data)
        damaged[position] ^= 0x40
        with pytest.raises(DamageError):
            read_table(reader_of(bytes(damaged)), where="x", expected_id=pack_id(1), hasher=HASHER)


# ---- the scan ----------------------------------------------------------------------------------------------


def test_a_scan_of_a_whole_pack_finds_what_the_table_says(sample: Sample) -> None:
    found = scan(sample.data)
    assert rows_of(found) == list(sample.sealed.rows)
    end = sample.sealed.rows[-1].offset + sample.sealed.rows[-1].stored_bytes
    rest = pack_format.aligned(end)
    assert [item for item in found if isinstance(item, Gap)] == [Gap(rest, len(sample.data) - rest)]


def test_a_pack_cut_anywhere_gives_every_record_before_the_cut(sample: Sample) -> None:
    borders = {border for row in sample.sealed.rows for border in (row.offset, row.offset + row.stored_bytes)}
    near = {border + step for border in borders for step in (-1, 0, 1)}
    for length in sorted(near | set(range(0, len(sample.data), 97))):
        found = scan(sample.data[:length])
        whole = [
            extent.row
            for extent in sample.extents
            if extent.header.stop <= length and extent.row.offset + extent.row.stored_bytes <= length
        ]
        assert rows_of(found) == whole, length
        check_cover(found, length)


def test_a_flipped_byte_costs_only_the_record_whose_header_it_hits(sample: Sample) -> None:
    for position in range(0, len(sample.data), 11):
        damaged = bytearray(sample.data)
        damaged[position] ^= 0x24
        expected = [extent.row for extent in sample.extents if position not in extent.header]
        assert rows_of(scan(bytes(damaged))) == expected, position


@pytest.mark.parametrize("length", [1, 4, 40, 512, 3000])
def test_a_zeroed_stretch_costs_only_the_records_that_it_hits(sample: Sample, length: int) -> None:
    for start in range(0, len(sample.data), 97):
        damaged = bytearray(sample.data)
        stop = min(len(damaged), start + length)
        damaged[start:stop] = bytes(stop - start)
        hit = [
            extent.row for extent in sample.extents if damaged[extent.header.start : extent.header.stop]
            != sample.data[extent.header.start : extent.header.stop]
        ]  # fmt: skip
        found = scan(bytes(damaged))
        assert rows_of(found) == [row for row in sample.sealed.rows if row not in hit], start
        check_cover(found, len(damaged))


@pytest.mark.parametrize("fill", [RECORD_MAGIC * 2, RUN_MAGIC * 2, b"CRE" * 8, b"\xff" * 8])
def test_false_magics_hide_nothing(sample: Sample, fill: bytes) -> None:
    for start in range(HEADER_BYTES, len(sample.data) - 200, 193):
        start -= start % 8
        damaged = bytearray(sample.data)
        damaged[start : start + 120] = (fill * 120)[:120]
        expected = [
            extent.row for extent in sample.extents
            if extent.header.stop <= start or extent.header.start >= start + 120
        ]  # fmt: skip
        assert rows_of(scan(bytes(damaged))) == expected, start


@pytest.mark.parametrize("tail", [b"CRE", b"xxCRE", b"CRECRE", b"CRECREC", b"CRUNCRE"])
def test_a_magic_that_begins_inside_a_false_one_is_found(tail: bytes) -> None:
    # Guards against a search that goes on behind each match: in "CRECREC" the true magic is the second.
    backend = MemoryBackend()
    payload = b"." * (64 - len(tail)) + tail
    sealed = write_pack(backend, [payload, b"second"])
    rewrite(backend, NAME, flip(HEADER_BYTES + 20))
    found = scan(backend.read(NAME, max_bytes=1 << 20))
    assert rows_of(found) == [sealed.rows[1]]


def test_the_scan_of_a_damaged_pack_reads_blocks_not_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "_SCAN_BYTES", 4096)
    backend = MemoryBackend()
    sealed = write_pack(backend, [b"\x11" * 100_000, b"last"])
    rewrite(backend, NAME, flip(HEADER_BYTES + 20))
    inner = backend.open_reader(NAME)
    reads: list[int] = []

    class Counting:
        size_bytes = inner.size_bytes

        def read(self, offset: int, size_bytes: int) -> bytes:
            reads.append(size_bytes)
            return inner.read(offset, size_bytes)

        read_into = inner.read_into
        close = inner.close

    found = list(scan_records(Counting(), where=NAME, id_bytes=16))
    assert rows_of(found) == [sealed.rows[1]]
    assert len(reads) < 40
    assert max(reads) == 4096


def test_a_pack_full_of_false_runs_is_scanned_in_time_that_grows_with_its_length() -> None:
    # Guards against a pack of a stranger that makes every 8 bytes look like the long header of a run.
    count = 20_000
    header_bytes = RUN_FIXED_BYTES + 24 * count
    false = struct.pack("<4sBBHIIQQ", RUN_MAGIC, 1, 16, 0, count, header_bytes, count << 20, 0)
    backend = MemoryBackend()
    sealed = write_pack(backend, [false * 32_000, b"last"])
    rewrite(backend, NAME, flip(HEADER_BYTES + 20))
    inner = backend.open_reader(NAME)
    reads: list[int] = []

    class Counting:
        size_bytes = inner.size_bytes
        read_into = inner.read_into
        close = inner.close

        def read(self, offset: int, size_bytes: int) -> bytes:
            reads.append(size_bytes)
            return inner.read(offset, size_bytes)

    assert rows_of(list(scan_records(Counting(), where=NAME, id_bytes=16))) == [sealed.rows[1]]
    assert sum(reads) < 200 * inner.size_bytes


def test_a_magic_on_the_border_of_two_blocks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = MemoryBackend()
    sealed = write_pack(backend, [bytes(range(200)), b"second"])
    rewrite(backend, NAME, flip(HEADER_BYTES + 20))
    data = backend.read(NAME, max_bytes=1 << 20)
    for block in range(8, 400, 8):
        monkeypatch.setattr(reader_module, "_SCAN_BYTES", block)
        assert rows_of(scan(data)) == [sealed.rows[1]], block


def test_a_record_of_two_ids_in_a_row_is_no_record_of_the_other_width() -> None:
    backend = MemoryBackend()
    write_pack(backend, [b"a", b"b"], hasher=hasher_for("blake3"))
    data = backend.read(NAME, max_bytes=1 << 20)
    assert rows_of(scan(data)) == []


def test_records_inside_a_payload_are_no_records_of_the_pack() -> None:
    backend = MemoryBackend()
    row = Row(HASHER.chunk_id(b"x"), 0, 8, 8, 0, (), RecordKind.LEAF)
    sealed = write_pack(backend, [encode_record_header(row, id_bytes=16) + bytes(8), b"after"])
    found = scan(backend.read(NAME, max_bytes=1 << 20))
    assert rows_of(found) == list(sealed.rows)


def test_a_record_whose_payload_is_cut_is_none() -> None:
    backend = MemoryBackend()
    sealed = write_pack(backend, [b"a" * 100])
    end = sealed.rows[0].offset + 100
    data = backend.read(NAME, max_bytes=1 << 20)
    assert rows_of(scan(data[:end])) == [sealed.rows[0]]
    assert scan(data[: end - 1]) == [Gap(HEADER_BYTES, end - 1 - HEADER_BYTES)]


@given(
    st.binary(max_size=300), st.lists(st.sampled_from([RECORD_MAGIC, RUN_MAGIC, bytes(4), b"\xff" * 4]), max_size=40)
)
def test_any_bytes_can_be_scanned(noise: bytes, words: list[bytes]) -> None:
    for data in (noise, b"".join(words), bytes(64) + b"".join(words) + noise):
        found = scan(data)
        assert all(row.offset + row.stored_bytes <= len(data) for row in rows_of(found))
        check_cover(found, len(data))


def check_cover(found: list[Row | Gap], size_bytes: int) -> None:
    """Rows and gaps come in order, do not overlap, and reach to the end."""
    spans = [
        (item.offset, item.offset + (item.length if isinstance(item, Gap) else item.stored_bytes)) for item in found
    ]
    assert all(before[1] <= after[0] for before, after in pairwise(spans))
    last = spans[-1][1] if spans else HEADER_BYTES
    assert size_bytes - 8 < last <= max(size_bytes, HEADER_BYTES) or size_bytes <= HEADER_BYTES
