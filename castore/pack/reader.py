"""Read a pack's table, or scan for its records when the table is damaged."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from castore.backend.base import RangeReader
from castore.errors import ChecksumError, DamageError, FormatError
from castore.format.pack import (
    ALIGN_BYTES,
    HEADER_BYTES,
    RECORD_MAGIC,
    RUN_MAGIC,
    TRAILER_BYTES,
    PackHeader,
    Row,
    Trailer,
    aligned,
    decode_header,
    decode_record_header,
    decode_run_fixed,
    decode_run_header,
    decode_table,
    decode_trailer,
    record_header_bytes,
    row_bytes,
)
from castore.hashing import Hasher
from castore.ids import PackId
from castore.options import PAGE_BYTES

_SCAN_BYTES = 4 * 1024 * 1024
_MAGICS = re.compile(re.escape(RECORD_MAGIC) + b"|" + re.escape(RUN_MAGIC))


def read_header(reader: RangeReader, *, where: str, expected_id: PackId | None = None) -> PackHeader:
    """The header, its id compared with the file's name when given. Raises DamageError or UnsupportedFormatError."""
    header = decode_header(reader.read(0, min(HEADER_BYTES, reader.size_bytes)), where=where)
    if expected_id is not None and header.pack_id != expected_id:
        raise ChecksumError(f"{where}: expected pack {expected_id}, found {header.pack_id}: the files were swapped")
    return header


@dataclass(frozen=True, slots=True)
class RawTable:
    """The table of a pack, not taken apart."""

    header: PackHeader
    trailer: Trailer
    data: bytes


def read_table(reader: RangeReader, *, where: str, expected_id: PackId, hasher: Hasher) -> list[Row]:
    """Every row of the pack, from its trailer and table. Raises DamageError when either cannot be trusted."""
    table = read_raw_table(reader, where=where, expected_id=expected_id, hasher=hasher)
    return decode_table(table.data, table.trailer, id_bytes=hasher.digest_bytes, where=where)


def read_raw_table(reader: RangeReader, *, where: str, expected_id: PackId, hasher: Hasher) -> RawTable:
    """Header, trailer and the bytes between, of which decode_table compares the checksum. Raises DamageError."""
    id_bytes = hasher.digest_bytes
    if reader.size_bytes < HEADER_BYTES + TRAILER_BYTES:
        raise FormatError(
            f"{where}: expected at least {HEADER_BYTES + TRAILER_BYTES} bytes, found {reader.size_bytes}: the pack is "
            "cut short"
        )
    header = read_header(reader, where=where, expected_id=expected_id)
    if header.hasher.number != hasher.number:
        raise FormatError(
            f"{where}: expected hash {hasher.name}, found {header.hasher.name}: a pack of another repository"
        )
    tail = reader.read(reader.size_bytes - TRAILER_BYTES, TRAILER_BYTES)
    trailer = decode_trailer(tail, pack_bytes=reader.size_bytes, id_bytes=id_bytes, where=where)
    if trailer.pack_id != expected_id:
        raise ChecksumError(f"{where}: expected the trailer of pack {expected_id}, found {trailer.pack_id}")
    return RawTable(header, trailer, reader.read(trailer.table_offset, trailer.row_count * row_bytes(id_bytes)))


@dataclass(frozen=True, slots=True)
class Gap:
    """A stretch of a pack where no record could be read."""

    offset: int
    length: int


def scan_records(reader: RangeReader, *, where: str, id_bytes: int) -> Iterator[Row | Gap]:
    """Every record whose header is whole, found without the table; what lies between them as gaps.

    Headers are checked, payloads are not. Table and trailer, when they are there, come out as the last gap.
    Takes time in proportion to the pack, whatever is in it: long headers of runs that prove to be none are read until
    they add up to the length of the pack, after that only those of one page.
    """
    position, gap_start = HEADER_BYTES, HEADER_BYTES
    budget = reader.size_bytes
    magics = _MagicFinder(reader)
    while position < reader.size_bytes:
        rows, end, read_bytes = _record_at(
            reader, position, where=where, id_bytes=id_bytes, run_bytes_max=max(budget, PAGE_BYTES)
        )
        if rows:
            if position > gap_start:
                yield Gap(gap_start, position - gap_start)
            yield from rows
            position = gap_start = end
        else:
            budget -= read_bytes
            position = magics.next_from(position + ALIGN_BYTES)
    if reader.size_bytes > gap_start:
        yield Gap(gap_start, reader.size_bytes - gap_start)


def _record_at(
    reader: RangeReader, offset: int, *, where: str, id_bytes: int, run_bytes_max: int
) -> tuple[list[Row], int, int]:
    """The rows of the record or run at `offset`, the offset after it, and the bytes of a run's header that were read;
    no rows when there is none.
    """
    where = f"{where}, record at {offset}"
    head = reader.read(offset, min(record_header_bytes(id_bytes), reader.size_bytes - offset))
    read_bytes = 0
    try:
        if head[:4] == RECORD_MAGIC:
            row = decode_record_header(head, offset=offset, id_bytes=id_bytes, where=where)
            return *_within([row], reader.size_bytes), read_bytes
        if head[:4] == RUN_MAGIC:
            _, run_bytes, _ = decode_run_fixed(head, id_bytes=id_bytes, where=where)
            read_bytes = min(run_bytes, reader.size_bytes - offset, run_bytes_max)
            rows = decode_run_header(reader.read(offset, read_bytes), offset=offset, id_bytes=id_bytes, where=where)
            return *_within(rows, reader.size_bytes), read_bytes
    except DamageError:
        pass
    return [], offset, read_bytes


def _within(rows: list[Row], pack_bytes: int) -> tuple[list[Row], int]:
    """Rows whose payload is all there, and the aligned end of the last."""
    kept = [row for row in rows if row.offset + row.stored_bytes <= pack_bytes]
    end = kept[-1].offset + kept[-1].stored_bytes if kept else 0
    return kept, aligned(end)


class _MagicFinder:
    """Looks for record magics, front to back; keeps its block, so that many false magics read it once."""

    def __init__(self, reader: RangeReader) -> None:
        self._reader = reader
        self._start = 0
        self._block = b""

    def next_from(self, offset: int) -> int:
        """The next aligned offset, from `offset` (aligned) on, that holds a magic; else the end of the file."""
        end = self._reader.size_bytes
        while offset < end:
            if not self._start <= offset < self._start + len(self._block):
                # Blocks start aligned and are a multiple of 8 long: no aligned magic straddles two of them.
                self._start, self._block = offset, self._reader.read(offset, min(_SCAN_BYTES, end - offset))
            found = _MAGICS.search(self._block, offset - self._start)
            while found is not None:
                if (self._start + found.start()) % ALIGN_BYTES == 0:
                    return self._start + found.start()
                # One byte on, not after the match: in "CRECREC" the second magic begins inside the first.
                found = _MAGICS.search(self._block, found.start() + 1)
            offset = self._start + len(self._block)
        return end
