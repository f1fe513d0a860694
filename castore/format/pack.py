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

    record (32 + 2n bytes, 32 + 3n with two bases, then the stored payload)
        0   4  magic "CREC"
        4   1  record kind                  1 leaf data, 2 manifest part, 3 id list
        5   1  depth                        bases to read before this one decodes; 0 without a base, at most 16
        6   2  flags                        1: the record rests on two bases
        8   4  codec chain                  up to four codec numbers in order of encoding, 0 ends it
       12   4  stored bytes
       16   4  raw bytes
       20   8  checksum                     xxh3-64 of the stored payload
       28   n  chunk id
     28+n   n  base id                      zero without a base
    28+2n   n  second base id               with flag 1 only
      end   4  low half of the xxh3-64 of all bytes before

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

    table: one row of 32 + 2n bytes for each chunk, then the second base ids (n each), in the order of their rows
        0   n  chunk id
        n   n  base id
       2n   8  offset of the stored payload in this file
     2n+8   4  stored bytes
    2n+12   4  raw bytes
    2n+16   8  checksum
    2n+24   4  codec chain
    2n+28   1  record kind
    2n+29   1  depth
    2n+30   2  flags                        1: the chunk lies in a run   2: it rests on two bases

    trailer (64 bytes, the end of the file)
        0   8  magic "CASTTAIL"
        8   8  table offset
       16   8  row count
       24   8  xxh3-64 of the table
       32  16  pack id
       48   8  count of second base ids
       56   8  xxh3-64 of bytes 0-55

A reader trusts the trailer, then the table. When either is damaged it scans for record magics on multiples of 8 and
checks each header's checksum, so that damage costs the records it hit and no others.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from castore.errors import ChecksumError, FormatError, UnsupportedFormatError
from castore.hashing import Hasher, checksum, hasher_numbered
from castore.ids import Buffer, ChunkId, PackId
from castore.options import GRID_BYTES, PAGE_BYTES, PART_BYTES_MAX, RECORD_STORED_BYTES_MAX, TABLE_ROWS_MAX

PACK_VERSION = 1
PACK_MAGIC = b"CASTPACK"
RECORD_MAGIC = b"CREC"
RUN_MAGIC = b"CRUN"
TRAILER_MAGIC = b"CASTTAIL"

HEADER_BYTES = 64
TRAILER_BYTES = 64
RUN_FIXED_BYTES = 4 + 1 + 1 + 2 + 4 + 4 + 8 + 8
ALIGN_BYTES = 8
CHAIN_LENGTH_MAX = 4
FLAG_IN_RUN, FLAG_TWO_BASES = 1, 2
RECORD_TWO_BASES = 1
BASES_MAX = 2
"""A 16-bit copy of a float32 leaf covers two chunks of it for each of its own; nothing needs more."""
DEPTH_MAX = 16
"""Deepest record of any valid pack, far above what writers make: a reader keeps one chunk in memory for each level."""

_HEADER = struct.Struct("<8sHBB4xQ16s16sQ")
_TRAILER = struct.Struct("<8sQQQ16sQQ")
_RUN_FIXED = struct.Struct("<4sBBHIIQQ")
_RECORD = {n: struct.Struct(f"<4sBBH4sIIQ{n}s{n}s") for n in (16, 32)}
_RECORD_SUM_BYTES = 4
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
    base_ids: tuple[ChunkId, ...] = ()
    """All chunks that must be read before this one decodes: none, one, or two. Whatever keeps, copies or checks
    records walks all of them."""
    in_run: bool = False


@dataclass(frozen=True, slots=True)
class Trailer:
    """Where the table is."""

    pack_id: PackId
    table_offset: int
    row_count: int
    table_checksum: int
    second_base_count: int = 0


def aligned(offset: int) -> int:
    """The next multiple of 8."""
    return -(-offset // ALIGN_BYTES) * ALIGN_BYTES


def record_header_bytes(id_bytes: int, *, base_count: int = 0) -> int:
    """Length of the header of a record that rests on so many bases."""
    return _RECORD[id_bytes].size + max(0, base_count - 1) * id_bytes + _RECORD_SUM_BYTES


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
        trailer.second_base_count,
        0,
    )[:-8]
    return body + checksum(body).to_bytes(8, "little")


def decode_trailer(data: Buffer, *, pack_bytes: int, id_bytes: int, where: str) -> Trailer:
    """The trailer, its claims compared with the length of the file. Raises FormatError or ChecksumError."""
    if len(data) != TRAILER_BYTES:
        raise FormatError(
            f"{where}: expected a trailer of {TRAILER_BYTES} bytes, found {len(data)}: the file is cut short"
        )
    magic, table_offset, row_count, table_checksum, pack_id, second_base_count, found = _TRAILER.unpack(data)
    if magic != TRAILER_MAGIC:
        raise FormatError(f"{where}: expected trailer magic {TRAILER_MAGIC!r}, found {magic!r}: cut short or foreign")
    _check_sum(where, "trailer", expected=found, found=checksum(memoryview(data)[: TRAILER_BYTES - 8]))
    trailer = Trailer(PackId(pack_id.hex()), table_offset, row_count, table_checksum, second_base_count)
    end = table_offset + table_bytes(trailer, id_bytes=id_bytes) + TRAILER_BYTES
    if row_count > TABLE_ROWS_MAX or second_base_count > row_count or end != pack_bytes:
        raise FormatError(f"{where}: the trailer describes a file of {end} bytes, found {pack_bytes}")
    return trailer


def table_bytes(trailer: Trailer, *, id_bytes: int) -> int:
    """Length of the table."""
    return trailer.row_count * row_bytes(id_bytes) + trailer.second_base_count * id_bytes


# ---- records ---------------------------------------------------------------------------------------------------


def encode_record_header(row: Row, *, id_bytes: int) -> bytes:
    """The header that precedes the stored payload of `row`."""
    first, second = _pack_bases(row.base_ids, id_bytes)
    fixed = _RECORD[id_bytes].pack(
        RECORD_MAGIC,
        row.kind,
        row.depth,
        RECORD_TWO_BASES if second else 0,
        _pack_chain(row.chain),
        row.stored_bytes,
        row.raw_bytes,
        row.checksum,
        row.chunk_id,
        first,
    )
    body = fixed + second
    return body + _low_half(body)


def decode_record_header(data: Buffer, *, offset: int, id_bytes: int, where: str) -> Row:
    """The row of the record at `offset`, of which `data` holds the header. Raises FormatError or ChecksumError."""
    fixed = _RECORD[id_bytes]
    if len(data) < record_header_bytes(id_bytes):
        raise FormatError(
            f"{where}: expected a record header of {record_header_bytes(id_bytes)} bytes, found {len(data)}"
        )
    magic, kind, depth, flags, chain, stored, raw, sum_, chunk_id, base_id = fixed.unpack_from(data)
    if magic != RECORD_MAGIC:
        raise FormatError(f"{where}: expected record magic {RECORD_MAGIC!r}, found {magic!r}")
    length = record_header_bytes(id_bytes, base_count=BASES_MAX if flags & RECORD_TWO_BASES else 1)
    view = memoryview(data)[:length]
    if len(view) != length or _low_half(view[:-_RECORD_SUM_BYTES]) != bytes(view[-_RECORD_SUM_BYTES:]):
        raise ChecksumError(f"{where}: the record header changed after it was written; run `castore verify --data`")
    if flags & ~RECORD_TWO_BASES:
        raise FormatError(f"{where}: record flags {flags:#x} are unknown to this castore")
    row = Row(
        ChunkId(chunk_id),
        offset + length,
        stored,
        raw,
        sum_,
        _unpack_chain(chain),
        _record_kind(kind, where),
        depth,
        _unpack_bases(base_id, bytes(view[fixed.size : -_RECORD_SUM_BYTES]), where),
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


def encode_table(rows: Sequence[Row], *, id_bytes: int) -> bytes:
    """The rows, in the order given."""
    pack = _ROW[id_bytes].pack
    packed: list[bytes] = []
    seconds: list[bytes] = []
    for row in rows:
        first, second = _pack_bases(row.base_ids, id_bytes)
        seconds.append(second)
        packed.append(
            pack(
                row.chunk_id,
                first,
                row.offset,
                row.stored_bytes,
                row.raw_bytes,
                row.checksum,
                _pack_chain(row.chain),
                row.kind,
                row.depth,
                (FLAG_IN_RUN if row.in_run else 0) | (FLAG_TWO_BASES if second else 0),
            )
        )
    return b"".join((*packed, *seconds))


def decode_table(data: Buffer, trailer: Trailer, *, id_bytes: int, where: str) -> list[Row]:
    """All rows, each within the bounds of the file. Raises FormatError or ChecksumError."""
    _check_sum(where, "table", expected=trailer.table_checksum, found=checksum(data))
    if len(data) != table_bytes(trailer, id_bytes=id_bytes):
        raise FormatError(
            f"{where}: expected a table of {table_bytes(trailer, id_bytes=id_bytes)} bytes, found {len(data)}"
        )
    packed = _ROW[id_bytes]
    rows_end = trailer.row_count * packed.size
    rows = []
    next_second = rows_end
    for fields in packed.iter_unpack(memoryview(data)[:rows_end]):
        chunk_id, base_id, offset, stored, raw, sum_, chain, kind, depth, flags = fields
        second = b""
        if flags & FLAG_TWO_BASES:
            second = bytes(memoryview(data)[next_second : next_second + id_bytes])
            next_second += id_bytes
        row = Row(
            ChunkId(chunk_id),
            offset,
            stored,
            raw,
            sum_,
            _unpack_chain(chain),
            _record_kind(kind, where),
            depth,
            _unpack_bases(base_id, second, where),
            bool(flags & FLAG_IN_RUN),
        )
        check_row(row, where=where)
        if not HEADER_BYTES <= offset <= offset + stored <= trailer.table_offset:
            raise FormatError(f"{where}: chunk {chunk_id.hex()} lies at {offset}+{stored}, outside the pack's records")
        rows.append(row)
    if next_second != len(data):
        needed = (next_second - rows_end) // id_bytes
        raise FormatError(f"{where}: the table holds {trailer.second_base_count} second bases, its rows need {needed}")
    return rows


def _pack_bases(base_ids: tuple[ChunkId, ...], id_bytes: int) -> tuple[bytes, bytes]:
    """The first base id, zero without one, and the second, empty without one."""
    if len(base_ids) > BASES_MAX:
        raise ValueError(f"a record rests on at most {BASES_MAX} bases, not {len(base_ids)}")
    return (base_ids[0] if base_ids else bytes(id_bytes)), b"".join(base_ids[1:])


def _unpack_bases(first: bytes, second: bytes, where: str) -> tuple[ChunkId, ...]:
    """Both ids as a row has them; `second` is empty without a second base. Raises FormatError for one of zeros, and for
    one without a first.
    """
    if second and not (any(first) and any(second)):
        raise FormatError(f"{where}: expected two bases, found {first.hex()} and {second.hex()}")
    return tuple(ChunkId(base_id) for base_id in (first, second) if any(base_id))


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
        or (row.depth > 0) != bool(row.base_ids)
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
