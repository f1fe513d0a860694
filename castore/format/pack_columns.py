"""A pack's table as columns: millions of rows without an object for each. The layout is drawn in pack.py.

Apart from pack.py because it needs numpy, which history and checks of structure do without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from castore.errors import ChecksumError, FormatError
from castore.format.pack import FLAG_TWO_BASES, Row, Trailer, row_bytes, table_bytes
from castore.hashing import checksum
from castore.ids import Buffer

Words = npt.NDArray[np.uint64]
"""Ids as rows of 64-bit words, two or four each: compared and hashed by the column."""

_ROW = {
    n: np.dtype(
        [
            ("chunk_id", f"V{n}"),
            ("base_id", f"V{n}"),
            ("offset", "<u8"),
            ("stored_bytes", "<u4"),
            ("raw_bytes", "<u4"),
            ("checksum", "<u8"),
            ("chain", "V4"),
            ("kind", "u1"),
            ("depth", "u1"),
            ("flags", "<u2"),
        ]
    )
    for n in (16, 32)
}


@dataclass(frozen=True, slots=True)
class TableColumns:
    """Some rows of a table."""

    chunk_ids: Words
    base_ids: Words
    """First bases; zero where there is none."""
    second_base_ids: Words
    """Of those rows that have one, in their order."""
    second_rows: npt.NDArray[np.int64]
    """Places of the rows that have a second base, ascending."""
    stored_bytes: npt.NDArray[np.uint32]
    depths: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.depths)


def decode_columns(data: Buffer, trailer: Trailer, *, id_bytes: int, where: str) -> TableColumns:
    """All rows of a table, its checksum compared. Copies what it keeps. Raises ChecksumError or FormatError."""
    found = checksum(data)
    if found != trailer.table_checksum:
        raise ChecksumError(
            f"{where}: table: expected checksum {trailer.table_checksum:016x}, found {found:016x}; the bytes changed"
        )
    if len(data) != table_bytes(trailer, id_bytes=id_bytes):
        raise FormatError(
            f"{where}: expected a table of {table_bytes(trailer, id_bytes=id_bytes)} bytes, found {len(data)}"
        )
    dtype = _ROW[id_bytes]
    assert dtype.itemsize == row_bytes(id_bytes)
    rows_end = trailer.row_count * dtype.itemsize
    rows = np.frombuffer(data, dtype, count=trailer.row_count)
    second_rows = np.flatnonzero(rows["flags"] & FLAG_TWO_BASES)
    if len(second_rows) != trailer.second_base_count:
        raise FormatError(
            f"{where}: the table holds {trailer.second_base_count} second bases, its rows need {len(second_rows)}"
        )
    base_ids = as_words(np.ascontiguousarray(rows["base_id"]).data, id_bytes)
    second_base_ids = as_words(bytes(memoryview(data)[rows_end:]), id_bytes)
    if not (base_ids[second_rows].any(axis=1).all() and second_base_ids.any(axis=1).all()):
        raise FormatError(f"{where}: expected two bases of every row that says so, found zeros")
    return TableColumns(
        as_words(np.ascontiguousarray(rows["chunk_id"]).data, id_bytes),
        base_ids,
        second_base_ids,
        second_rows,
        rows["stored_bytes"].astype(np.uint32),
        rows["depth"].astype(np.uint8),
    )


def as_words(ids: Buffer, id_bytes: int) -> Words:
    """Concatenated ids as rows of words, without a copy."""
    return np.frombuffer(ids, "<u8").reshape(-1, id_bytes // 8)


def columns_of(rows: Sequence[Row], *, id_bytes: int) -> TableColumns:
    """The same of rows that a scan found."""
    no_base = bytes(id_bytes)
    return TableColumns(
        as_words(b"".join(row.chunk_id for row in rows), id_bytes),
        as_words(b"".join(row.base_ids[0] if row.base_ids else no_base for row in rows), id_bytes),
        as_words(b"".join(base_id for row in rows for base_id in row.base_ids[1:]), id_bytes),
        np.array([place for place, row in enumerate(rows) if len(row.base_ids) > 1], np.int64),
        np.array([row.stored_bytes for row in rows], np.uint32),
        np.array([row.depth for row in rows], np.uint8),
    )
