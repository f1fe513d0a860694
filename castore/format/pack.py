"""Pack files: immutable runs of records, then a table, then a trailer. All integers are little-endian; n is the width
of a chunk id (16 for xxh3-128, 32 for blake3); every record starts on a multiple of 8 bytes; gaps are zero.

    header (64 bytes)
        0   8  magic "CASTPACK"
        8   2  format version
       10   1  hash algorithm number        1 xxh3-128, 2 blake3
       11   1  n
       12   4  zero
       16   8  created, ns since 1970
       24  16  pack id
       40  16  repository id
       56   8  xxh3-64 of bytes 0-55

    record (32 + 2n bytes, then the stored payload)
        0   4  magic "CREC"
        4   1  record kind                  1 leaf data, 2 manifest part, 3 id list
        5   1  depth                        bases to read before this one decodes; 0 without a base, at most 16
        6   2  flags                        0
        8   4  codec chain                  up to four codec numbers in order of encoding, 0 ends it
       12   4  stored bytes
       16   4  raw bytes
       20   8  checksum                     xxh3-64 of the stored payload
       28   n  chunk id
     28+n   n  base id                      zero without a base
    28+2n   4  low half of the xxh3-64 of bytes 0-27+2n

    run record (32 + c(n+8) bytes, zeros up to a page, then the payload on a multiple of 4096)
        0   4  magic "CRUN"
        4   1  record kind
        5   1  n
        6   2  flags                        0
        8   4  c, chunk count
       12   4  bytes from the magic to the payload
       16   8  payload bytes                c-1 chunks of 1 MiB and a last one, raw, without gaps
       24   8  xxh3-64 of bytes 0-23 and of the c rows below
       32      c rows: chunk id (n), checksum of that chunk's payload (8)

    table: one row of 32 + 2n bytes for each chunk
        0   n  chunk id
        n   n  base id
       2n   8  offset of the stored payload in this file
     2n+8   4  stored bytes
    2n+12   4  raw bytes
    2n+16   8  checksum
    2n+24   4  codec chain
    2n+28   1  record kind
    2n+29   1  depth
    2n+30   2  flags                        1: the chunk lies in a run

    trailer (64 bytes, the end of the file)
        0   8  magic "CASTTAIL"
        8   8  table offset
       16   8  row count
       24   8  xxh3-64 of the table
       32  16  pack id
       48   8  zero
       56   8  xxh3-64 of bytes 0-55

A reader trusts the trailer, then the table. When either is damaged it scans for record magics on multiples of 8 and
checks each header's checksum, so that damage costs the records it hit and no others.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from castore.errors import ChecksumError, FormatError, UnsupportedFormatError
from castore.hashing import Hasher, checksum, hasher_numbered
from castore.ids import Buffer, ChunkId, PackId
from castore.options import GRID_BYTES, PAGE_BYTES, PART_BYTES_MAX, RECORD_STORED_BYTES_MAX, TABLE_ROWS_MAX

PACK_VERSION = 0
PACK_MAGIC = b"CASTPACK"
RECORD_MAGIC = b"CREC"
RUN_MAGIC = b"CRUN"
TRAILER_MAGIC = b"CASTTAIL"

HEADER_BYTES = 64
TRAILER_BYTES = 64
RUN_FIXED_BYTES = 4 + 1 + 1 + 2 + 4 + 4 + 8 + 8
ALIGN_BYTES = 8
CHAIN_LENGTH_MAX = 4
FLAG_IN_RUN = 1
DEPTH_MAX = 16
"""Deepest record of any valid pack, far above what writers make: a reader keeps one chunk in memory for each level."""

_HEADER = struct.Struct("<8sHBB4xQ16s16sQ")
_TRAILER = struct.Struct("<8sQQQ16s8xQ")
_RUN_FIXED = struct.Struct("<4sBBHIIQQ")
_RECORD = {n: struct.Struct(f"<4sBBH4sIIQ{n}s{n}sI") for n in (16, 32)}
_ROW = {n: struct.Struct(f"<{n}s{n}sQIIQ4sBBH") for n in (16, 32)}
_RUN_ROW = {n: struct.Struct(f"<{n}sQ") for n in (16, 32)}

Chain = tuple[int, ...]


class RecordKind(IntEnum):
    """What a chunk holds. Permanent; 0 is never written."""

    LEAF = 1
    PART = 2
    ID_LIST = 3


@dataclass(frozen=True, slots=True)
class PackHeader:
    """The first 64 bytes of a pack."""

    pack_id: PackId
    repository_id: bytes
    hasher: Hasher
    created_ns: int


@dataclass(frozen=True, slots=True)
class Row:
    """Where and how one chunk is stored in one pack: a row of the table."""

    chunk_id: ChunkId
    offset: int
    """Of the stored payload, in bytes from the start of the pack."""
    stored_bytes: int
    raw_bytes: int
    checksum: int
    chain: Chain
    kind: RecordKind
    depth: int = 0
    base_id: ChunkId | None = None
    in_run: bool = False


@dataclass(frozen=True, slots=True)
class Trailer:
    """Where the table is."""

    pack_id: PackId
    table_offset: int
    row_count: int
    table_checksum: int


def aligned(offset: int) -> int:
    """The next multiple of 8."""
    return -(-offset // ALIGN_BYTES) * ALIGN_BYTES


def record_header_bytes(id_bytes: int) -> int:
    """Length of a record's header."""
    return _RECORD[id_bytes].size


def row_bytes(id_bytes: int) -> int:
    """Length of a table row."""
    return _ROW[id_bytes].size


# ---- header and trailer ------------------------------------------------------------------------------------------


def encode_header(header: PackHeader) -> bytes:
    """64 bytes."""
    body = _HEADER.pack(
        PACK_MAGIC,
        PACK_VERSION,
        header.hasher.number,
        header.hasher.digest_bytes,
        header.created_ns,
        bytes.fromhex(header.pack_id),
        header.repository_id,
        0,
    )[:-8]
    return body + checksum(body).to_bytes(8, "little")


def decode_header(data: Buffer, *, where: str) -> PackHeader:
    """Raises FormatError, ChecksumError or UnsupportedFormatError."""
    if len(data) < HEADER_BYTES:
        raise FormatError(f"{where}: expected a header of {HEADER_BYTES} bytes, found {len(data)}")
    magic, version, algorithm, id_bytes, created_ns, pack_id, repository_id, found = _HEADER.unpack_from(data)
    if magic != PACK_MAGIC:
        raise FormatError(f"{where}: expected magic {PACK_MAGIC!r}, found {magic!r}: not a pack")
    _check_sum(where, "header", expected=found, found=checksum(memoryview(data)[: HEADER_BYTES - 8]))
    if version != PACK_VERSION:
        raise UnsupportedFormatError(f"{where}: pack version {version}; this castore reads version {PACK_VERSION}")
    hasher = hasher_numbered(algorithm)
    if id_bytes != hasher.digest_bytes:
        raise FormatError(f"{where}: expected ids of {hasher.digest_bytes} bytes, found {id_bytes}")
    return PackHeader(PackId(pack_id.hex()), repository_id, hasher, created_ns)


def encode_trailer(trailer: Trailer) -> bytes:
    """64 bytes."""
    body = _TRAILER.pack(
        TRAILER_MAGIC,
        trailer.table_offset,
        trailer.row_count,
        trailer.table_checksum,
        bytes.fromhex(trailer.pack_id),
        0,
    )[:-8]
    return body + checksum(body).to_bytes(8, "little")


def decode_trailer(data: Buffer, *, pack_bytes: int, id_bytes: int, where: str) -> Trailer:
    """The trailer, its claims compared with the length of the file. Raises FormatError or ChecksumError."""
    if len(data) != TRAILER_BYTES:
        raise FormatError(
            f"{where}: expected a trailer of {TRAILER_BYTES} bytes, found {len(data)}: the file is cut short"
        )
    magic, table_offset, row_count, table_checksum, pack_id, found = _TRAILER.unpack(data)
    if magic != TRAILER_MAGIC:
        raise FormatError(f"{where}: expected trailer magic {TRAILER_MAGIC!r}, found {magic!r}: cut short or foreign")
    _check_sum(where, "trailer", expected=found, found=checksum(memoryview(data)[: TRAILER_BYTES - 8]))
    end = table_offset + row_count * row_bytes(id_bytes) + TRAILER_BYTES
    if row_count > TABLE_ROWS_MAX or end != pack_bytes:
        raise FormatError(f"{where}: the trailer describes a file of {end} bytes, found {pack_bytes}")
    return Trailer(PackId(pack_id.hex()), table_offset, row_count, table_checksum)


# ---- records ---------------------------------------------------------------------------------------------------


def encode_record_header(row: Row, *, id_bytes: int) -> bytes:
    """The header that precedes the stored payload of `row`."""
    body = _RECORD[id_bytes].pack(
        RECORD_MAGIC,
        row.kind,
        row.depth,
        0,
        _pack_chain(row.chain),
        row.stored_bytes,
        row.raw_bytes,
        row.checksum,
        row.chunk_id,
        row.base_id or bytes(id_bytes),
        0,
    )[:-4]
    return body + _low_half(body)


def decode_record_header(data: Buffer, *, offset: int, id_bytes: int, where: str) -> Row:
    """The row of the record at `offset`, of which `data` holds the header. Raises FormatError or ChecksumError."""
    header = _RECORD[id_bytes]
    if len(data) < header.size:
        raise FormatError(f"{where}: expected a record header of {header.size} bytes, found {len(data)}")
    view = memoryview(data)[: header.size]
    magic, kind, depth, flags, chain, stored, raw, sum_, chunk_id, base_id, _ = header.unpack(view)
    if magic != RECORD_MAGIC:
        raise FormatError(f"{where}: expected record magic {RECORD_MAGIC!r}, found {magic!r}")
    if _low_half(view[:-4]) != bytes(view[-4:]):
        raise ChecksumError(f"{where}: the record header changed after it was written; run `castore verify --data`")
    if flags:
        raise FormatError(f"{where}: record flags {flags:#x} are unknown to this castore")
    row = Row(
        ChunkId(chunk_id),
        offset + header.size,
        stored,
        raw,
        sum_,
        _unpack_chain(chain),
        _record_kind(kind, where),
        depth,
        ChunkId(base_id) if any(base_id) else None,
    )
    check_row(row, where=where)
    return row


def encode_run_header(
    rows: Sequence[tuple[ChunkId, int]], *, kind: RecordKind, payload_bytes: int, offset: int, id_bytes: int
) -> bytes:
    """The header of a run whose magic lies at `offset`, padded so that the payload starts on a page.

    `rows` are the chunk ids and payload checksums.
    """
    length = run_header_bytes(len(rows), offset=offset, id_bytes=id_bytes)
    packed_rows = b"".join(_RUN_ROW[id_bytes].pack(*row) for row in rows)
    fixed = _RUN_FIXED.pack(RUN_MAGIC, kind, id_bytes, 0, len(rows), length, payload_bytes, 0)[:-8]
    header = fixed + checksum(fixed + packed_rows).to_bytes(8, "little") + packed_rows
    return header.ljust(length, b"\0")


def run_header_bytes(count: int, *, offset: int, id_bytes: int) -> int:
    """Bytes from the magic at `offset` to the page where the payload starts."""
    end = offset + RUN_FIXED_BYTES + count * _RUN_ROW[id_bytes].size
    return -(-end // PAGE_BYTES) * PAGE_BYTES - offset


def decode_run_fixed(data: Buffer, *, id_bytes: int, where: str) -> tuple[int, int, int]:
    """(chunk count, header bytes, payload bytes) of a run, bounded but not yet checked by its checksum."""
    if len(data) < RUN_FIXED_BYTES:
        raise FormatError(f"{where}: expected a run header of {RUN_FIXED_BYTES} bytes, found {len(data)}")
    magic, _, width, _, count, header_bytes, payload_bytes, _ = _RUN_FIXED.unpack_from(data)
    if magic != RUN_MAGIC or width != id_bytes:
        raise FormatError(
            f"{where}: expected run magic {RUN_MAGIC!r} with ids of {id_bytes} bytes, found {magic!r}, {width}"
        )
    rows_end = RUN_FIXED_BYTES + count * _RUN_ROW[id_bytes].size
    if not rows_end <= header_bytes < rows_end + PAGE_BYTES or -(-payload_bytes // GRID_BYTES) != count or count == 0:
        raise FormatError(f"{where}: run lengths contradict each other: {count} chunks, {payload_bytes} payload bytes")
    return count, header_bytes, payload_bytes


def decode_run_header(data: Buffer, *, offset: int, id_bytes: int, where: str) -> list[Row]:
    """The rows of the run whose magic lies at `offset`; `data` holds its whole header. Raises FormatError,
    ChecksumError.
    """
    count, header_bytes, payload_bytes = decode_run_fixed(data, id_bytes=id_bytes, where=where)
    rows_end = RUN_FIXED_BYTES + count * _RUN_ROW[id_bytes].size
    if len(data) < rows_end:
        raise FormatError(f"{where}: expected a run header of {rows_end} bytes, found {len(data)}")
    view = memoryview(data)
    kind, stored_sum = view[4], int.from_bytes(view[24:32], "little")
    _check_sum(where, "run header", expected=stored_sum, found=checksum(bytes(view[:24]) + bytes(view[32:rows_end])))
    start = offset + header_bytes
    return [
        run_row(
            ChunkId(chunk_id), sum_, index, start=start, payload_bytes=payload_bytes, kind=_record_kind(kind, where)
        )
        for index, (chunk_id, sum_) in enumerate(_RUN_ROW[id_bytes].iter_unpack(view[RUN_FIXED_BYTES:rows_end]))
    ]


def run_row(chunk_id: ChunkId, sum_: int, index: int, *, start: int, payload_bytes: int, kind: RecordKind) -> Row:
    """The table row of chunk `index` of a run whose payload starts at `start`."""
    length = min(GRID_BYTES, payload_bytes - index * GRID_BYTES)
    return Row(chunk_id, start + index * GRID_BYTES, length, length, sum_, (), kind, in_run=True)


# ---- table -----------------------------------------------------------------------------------------------------


def encode_table(rows: Iterable[Row], *, id_bytes: int) -> bytes:
    """The rows, in the order given."""
    pack = _ROW[id_bytes].pack
    no_base = bytes(id_bytes)
    return b"".join(
        pack(
            row.chunk_id,
            row.base_id or no_base,
            row.offset,
            row.stored_bytes,
            row.raw_bytes,
            row.checksum,
            _pack_chain(row.chain),
            row.kind,
            row.depth,
            FLAG_IN_RUN if row.in_run else 0,
        )
        for row in rows
    )


def decode_table(data: Buffer, trailer: Trailer, *, id_bytes: int, where: str) -> list[Row]:
    """All rows, each within the bounds of the file. Raises FormatError or ChecksumError."""
    _check_sum(where, "table", expected=trailer.table_checksum, found=checksum(data))
    no_base = bytes(id_bytes)
    rows = []
    for chunk_id, base_id, offset, stored, raw, sum_, chain, kind, depth, flags in _ROW[id_bytes].iter_unpack(data):
        row = Row(
            ChunkId(chunk_id),
            offset,
            stored,
            raw,
            sum_,
            _unpack_chain(chain),
            _record_kind(kind, where),
            depth,
            None if base_id == no_base else ChunkId(base_id),
            bool(flags & FLAG_IN_RUN),
        )
        check_row(row, where=where)
        if not HEADER_BYTES <= offset <= offset + stored <= trailer.table_offset:
            raise FormatError(f"{where}: chunk {chunk_id.hex()} lies at {offset}+{stored}, outside the pack's records")
        rows.append(row)
    return rows


def check_row(row: Row, *, where: str) -> None:
    """Bounds that every row obeys, checked before a byte is allocated for it. Raises FormatError."""
    raw_max = GRID_BYTES if row.kind is RecordKind.LEAF else PART_BYTES_MAX
    stored_max = RECORD_STORED_BYTES_MAX if row.kind is RecordKind.LEAF else PART_BYTES_MAX
    unequal = (not row.chain and row.stored_bytes != row.raw_bytes) or 0 in row.chain
    if (
        row.raw_bytes > raw_max
        or row.stored_bytes > stored_max
        or unequal
        or row.depth > DEPTH_MAX
        or (row.depth > 0) != (row.base_id is not None)
    ):
        raise FormatError(
            f"{where}: chunk {row.chunk_id.hex()} declares {row.stored_bytes} stored and {row.raw_bytes} raw bytes at "
            f"depth {row.depth}, codec chain {row.chain}; expected at most {stored_max} and {raw_max}, equal without "
            "codec"
        )


def _pack_chain(chain: Chain) -> bytes:
    if len(chain) > CHAIN_LENGTH_MAX or not all(0 < number < 256 for number in chain):
        raise ValueError(f"codec chain {chain} does not fit")
    return bytes(chain).ljust(CHAIN_LENGTH_MAX, b"\0")


def _unpack_chain(packed: bytes) -> Chain:
    return tuple(packed.rstrip(b"\0"))


def _record_kind(number: int, where: str) -> RecordKind:
    try:
        return RecordKind(number)
    except ValueError as error:
        raise FormatError(f"{where}: record kind {number} is unknown to this castore") from error


def _low_half(data: Buffer) -> bytes:
    return (checksum(data) & 0xFFFFFFFF).to_bytes(4, "little")


def _check_sum(where: str, what: str, *, expected: int, found: int) -> None:
    if expected != found:
        raise ChecksumError(
            f"{where}: {what}: expected checksum {expected:016x}, found {found:016x}; the bytes changed"
        )
