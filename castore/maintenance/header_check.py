"""Checks of what lies around the payloads of a pack: record headers say what the table says, gaps are zero."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from castore.backend.base import RangeReader
from castore.errors import CastoreError, some
from castore.format.layout import pack_name
from castore.format.pack import HEADER_BYTES, RUN_FIXED_BYTES, Row, aligned
from castore.hashing import CHECKSUM_BYTES, Hasher
from castore.ids import PackId
from castore.maintenance.report import Findings
from castore.maintenance.tables import scan_rows
from castore.options import PAGE_BYTES


def check_headers(
    reader: RangeReader, rows: Sequence[Row], pack_id: PackId, hasher: Hasher, findings: Findings
) -> bool:
    """Whether records are as the table says by their own headers, with zeros between them; findings say what is not."""
    name = pack_name(pack_id)
    before = len(findings.problems)
    scanned = {row.offset: row for row in scan_rows(reader, pack_id, hasher)}
    for row in rows:
        found = scanned.pop(row.offset, None)
        if found != row:
            what = "is damaged" if found is None else "says something else"
            findings.problem(
                "record",
                name,
                f"chunk {row.chunk_id.hex()}: the record header before offset {row.offset} {what}; "
                "the table still finds the chunk, but a scan without the table would not; `castore repair` writes the "
                "pack again",
                chunks=[row.chunk_id],
                offset=row.offset,
            )
    if scanned:
        findings.problem("pack", name, f"{len(scanned)} records (at {some(scanned)}) are not in the table")
    ordered = sorted(rows, key=lambda row: row.offset)
    gaps = zero_ranges(ordered, id_bytes=hasher.digest_bytes)
    dirty = [start for start, stop in gaps if _holds_bytes(reader, start, stop)]
    if dirty:
        message = f"expected zeros between the records at {some(dirty)}, found other bytes; no record is lost"
        findings.problem("pack", name, message)
    return len(findings.problems) == before


def zero_ranges(rows: Sequence[Row], *, id_bytes: int) -> Iterator[tuple[int, int]]:
    """The (start, stop) of every gap that a writer fills with zeros, up to the table.

    `rows` are in the order of their offsets.
    """
    end = HEADER_BYTES
    for index, row in enumerate(rows):
        if row.in_run and index and rows[index - 1].in_run and row.offset == end:
            end += row.stored_bytes  # the next chunk of the same run
            continue
        start = aligned(end)
        yield end, start
        if row.in_run:
            yield start + RUN_FIXED_BYTES + _run_length(rows, index) * (id_bytes + CHECKSUM_BYTES), row.offset
        end = row.offset + row.stored_bytes
    yield end, aligned(end)


def _run_length(rows: Sequence[Row], first: int) -> int:
    """How many chunks the run has that begins with row `first`."""
    last = first
    while last + 1 < len(rows) and rows[last + 1].in_run:
        if rows[last + 1].offset != rows[last].offset + rows[last].stored_bytes:
            break
        last += 1
    return last + 1 - first


def _holds_bytes(reader: RangeReader, start: int, stop: int) -> bool:
    """Whether a gap is anything but zeros."""
    if stop - start > PAGE_BYTES:
        return True
    try:
        return stop > start and any(reader.read(start, stop - start))
    except CastoreError:
        return True
