"""Parity files: what restores lost stretches of one pack.

A pack is cut into k stretches of equal length, the last one filled up with zeros. m parity stretches of that length
are computed from them; any k of the k + m stretches give back all. Stretches are cut into cells, and each column of
cells is coded, and restored, by itself: what is lost may lie in other stretches in every column.

    header (96 bytes)
        0   8  magic "CASTPARI"
        8   2  format version
       10   2  k
       12   2  m                           k + m <= 255
       14   2  zero
       16   4  cell bytes                  a multiple of 64, at most 1 MiB; at most 2^24 cells in all
       20   4  zero
       24   8  pack bytes
       32   8  stretch bytes               a multiple of 64
       40  16  pack id
       56  16  xxh3-128 of the whole pack
       72   8  xxh3-64 of the table
       80   8  zero
       88   8  xxh3-64 of bytes 0-87
    table: the xxh3-64 of every cell, the columns of stretch 0, those of stretch 1, … of stretch k + m - 1
    parity cells: slabs of 64 columns; in each slab the cells of stretch k, then of stretch k + 1, …
    table and header once more: damage at either end leaves a copy

Column c holds bytes c * cell bytes and following of every stretch; the last one may be shorter. Bytes are elements of
GF(256) with the polynomial 0x11d. With d[j] the byte of stretch j, that of parity stretch k + i at the same place is
the sum over j of d[j] / ((k + i) xor j): a Cauchy matrix, of which every square part can be inverted.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from castore.errors import ChecksumError, FormatError, UnsupportedFormatError
from castore.hashing import checksum
from castore.ids import Buffer, PackId

PARITY_VERSION = 1
PARITY_MAGIC = b"CASTPARI"
HEADER_BYTES = 96
STRETCHES_MAX = 255
ALIGN_BYTES = 64
CELL_BYTES_MAX = 1 << 20
SLAB_COLUMNS = 64
CELLS_MAX = 1 << 24
"""128 MiB of checksums: packs of a tebibyte."""

_HEADER = struct.Struct("<8sHHHHIIQQ16s16sQQQ")


@dataclass(frozen=True, slots=True)
class ParityLayout:
    """How a pack is cut. See the module docstring."""

    pack_bytes: int
    data_count: int
    parity_count: int
    stretch_bytes: int
    cell_bytes: int

    @property
    def stretch_count(self) -> int:
        """K + m."""
        return self.data_count + self.parity_count

    @property
    def column_count(self) -> int:
        """Cells of a stretch."""
        return -(-self.stretch_bytes // self.cell_bytes)

    @property
    def table_bytes(self) -> int:
        """Length of one copy of the checksums."""
        return 8 * self.stretch_count * self.column_count

    @property
    def file_bytes(self) -> int:
        """Length of the parity file."""
        return 2 * (HEADER_BYTES + self.table_bytes) + self.parity_count * self.stretch_bytes

    def column_bytes(self, column: int) -> int:
        """Length of the cells of a column."""
        return min(self.cell_bytes, self.stretch_bytes - column * self.cell_bytes)

    def parity_offset(self, row: int, column: int) -> int:
        """Where the cell of parity stretch k + row lies in the file."""
        first = column - column % SLAB_COLUMNS
        slab_bytes = min(SLAB_COLUMNS * self.cell_bytes, self.stretch_bytes - first * self.cell_bytes)
        slab = HEADER_BYTES + self.table_bytes + first * self.cell_bytes * self.parity_count
        return slab + row * slab_bytes + (column - first) * self.cell_bytes

    def cell_index(self, stretch: int, column: int) -> int:
        """Place of a cell's checksum in the table."""
        return stretch * self.column_count + column


@dataclass(frozen=True, slots=True)
class ParityHeader:
    """The header of a parity file."""

    layout: ParityLayout
    pack_id: PackId
    pack_digest: bytes
    table_checksum: int


def encode_parity_header(header: ParityHeader) -> bytes:
    """96 bytes."""
    layout = header.layout
    body = _HEADER.pack(
        PARITY_MAGIC,
        PARITY_VERSION,
        layout.data_count,
        layout.parity_count,
        0,
        layout.cell_bytes,
        0,
        layout.pack_bytes,
        layout.stretch_bytes,
        bytes.fromhex(header.pack_id),
        header.pack_digest,
        header.table_checksum,
        0,
        0,
    )[:-8]
    return body + checksum(body).to_bytes(8, "little")


def decode_parity_header(data: Buffer, *, where: str) -> ParityHeader:
    """The header, its lengths bounded and consistent. Raises FormatError, ChecksumError or UnsupportedFormatError."""
    if len(data) != HEADER_BYTES:
        raise FormatError(f"{where}: expected a header of {HEADER_BYTES} bytes, found {len(data)}: cut short")
    magic, version, k, m, _, cell, _, pack_bytes, stretch, pack_id, digest, table_sum, _, found = _HEADER.unpack(data)
    if magic != PARITY_MAGIC:
        raise FormatError(f"{where}: expected magic {PARITY_MAGIC!r}, found {magic!r}: not a parity file")
    expected = checksum(memoryview(data)[: HEADER_BYTES - 8])
    if expected != found:
        raise ChecksumError(
            f"{where}: header: expected checksum {found:016x}, found {expected:016x}; the bytes changed"
        )
    if version != PARITY_VERSION:
        raise UnsupportedFormatError(f"{where}: parity version {version}; this castore reads version {PARITY_VERSION}")
    layout = ParityLayout(pack_bytes, k, m, stretch, cell)
    if (
        not (k and m and k + m <= STRETCHES_MAX)
        or not 0 < cell <= CELL_BYTES_MAX
        or cell % ALIGN_BYTES
        or not stretch
        or stretch % ALIGN_BYTES
        or not (k - 1) * stretch < pack_bytes <= k * stretch
        or layout.stretch_count * layout.column_count > CELLS_MAX
    ):
        raise FormatError(f"{where}: {k}+{m} stretches of {stretch} bytes do not describe a pack of {pack_bytes} bytes")
    return ParityHeader(layout, PackId(pack_id.hex()), digest, table_sum)


def encode_sums(sums: Sequence[int]) -> bytes:
    """The table."""
    return struct.pack(f"<{len(sums)}Q", *sums)


def decode_sums(data: Buffer, header: ParityHeader, *, where: str) -> Sequence[int]:
    """The checksums of all cells. Raises ChecksumError."""
    found = checksum(data)
    if found != header.table_checksum:
        raise ChecksumError(
            f"{where}: table: expected checksum {header.table_checksum:016x}, found {found:016x}; the bytes changed"
        )
    sums = array("Q", bytes(data))
    if sys.byteorder == "big":
        sums.byteswap()
    return sums
