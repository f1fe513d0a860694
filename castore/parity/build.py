"""Compute the parity of a pack: column by column, in memory of a slab's parity and one column."""

from __future__ import annotations

from collections.abc import Callable

import xxhash

from castore.backend.base import PackSink, RangeReader
from castore.errors import UsageError
from castore.format.parity import (
    ALIGN_BYTES,
    SLAB_COLUMNS,
    ParityHeader,
    ParityLayout,
    encode_parity_header,
    encode_sums,
)
from castore.hashing import checksum
from castore.ids import PackId
from castore.options import KIB
from castore.parity.code import ErasureCode

DATA_STRETCHES_MAX = 100
"""With m of them in parity, so many percent of overhead restore so many percent of the pack in one piece."""
STRETCH_BYTES_MIN = 4 * KIB
"""Of small packs: a sector is what disks lose."""
CELL_BYTES = 64 * KIB
"""What one flipped bit costs: small enough that scattered ones lie in columns of their own, large enough that the
checksums are an eight-thousandth."""


def plan_parity(pack_bytes: int, *, overhead_percent: int) -> ParityLayout:
    """How a pack is cut, so that parity takes `overhead_percent` of it, but at least one stretch.

    Raises UsageError for an overhead that is not in 1..100.
    """
    if not 1 <= overhead_percent <= 100:
        raise UsageError(f"overhead: expected 1 to 100 percent, found {overhead_percent}")
    least = -(-pack_bytes // DATA_STRETCHES_MAX)
    stretch_bytes = max(STRETCH_BYTES_MIN, -(-least // ALIGN_BYTES) * ALIGN_BYTES)
    data_count = -(-pack_bytes // stretch_bytes)
    parity_count = -(-data_count * overhead_percent // 100)
    return ParityLayout(pack_bytes, data_count, parity_count, stretch_bytes, min(CELL_BYTES, stretch_bytes))


def build_parity(
    pack: RangeReader, sink: PackSink, layout: ParityLayout, pack_id: PackId, *, progress: Callable[[int], None]
) -> None:
    """Write the parity file into `sink`, which the caller commits. Reads the pack twice; `progress` gets its bytes."""
    sums = [0] * (layout.stretch_count * layout.column_count)
    digest = _sum_data(pack, layout, sums)
    code = ErasureCode(layout.data_count, layout.parity_count)
    # Checksums of parity stand before it: it is computed once for them, and kept when it is one slab, as it mostly is.
    slabs = [range(first, min(first + SLAB_COLUMNS, layout.column_count)) for first in _slab_starts(layout)]
    kept: bytearray | None = None
    for slab in slabs:
        kept = _slab(pack, layout, code, slab, sums, progress=progress)
    table = encode_sums(sums)
    header = encode_parity_header(ParityHeader(layout, pack_id, digest, checksum(table)))
    sink.write(header, table)
    for slab in slabs:
        parity = kept if len(slabs) == 1 else _slab(pack, layout, code, slab, sums, progress=lambda _: None)
        assert parity is not None
        sink.write(parity)
        sink.flush_hint()
    sink.write(table, header)


def _slab_starts(layout: ParityLayout) -> range:
    return range(0, layout.column_count, SLAB_COLUMNS)


def _sum_data(pack: RangeReader, layout: ParityLayout, sums: list[int]) -> bytes:
    """Fill in the checksums of data cells; the digest of the whole pack."""
    digest = xxhash.xxh3_128()
    for stretch in range(layout.data_count):
        start = stretch * layout.stretch_bytes
        for column in range(layout.column_count):
            cell = read_cell(pack, layout, stretch, column)
            sums[layout.cell_index(stretch, column)] = checksum(cell)
            used = layout.pack_bytes - start - column * layout.cell_bytes
            if used > 0:
                digest.update(cell[:used])
    return digest.digest()


def _slab(
    pack: RangeReader,
    layout: ParityLayout,
    code: ErasureCode,
    columns: range,
    sums: list[int],
    *,
    progress: Callable[[int], None],
) -> bytearray:
    """The parity cells of a slab in the order of the file; their checksums are filled in."""
    offset = layout.parity_offset(0, columns.start)
    parity = bytearray(layout.parity_count * sum(layout.column_bytes(column) for column in columns))
    data = bytearray(layout.data_count * layout.cell_bytes)
    for column in columns:
        length = layout.column_bytes(column)
        view = memoryview(data)[: layout.data_count * length]
        for stretch in range(layout.data_count):
            view[stretch * length : (stretch + 1) * length] = read_cell(pack, layout, stretch, column)
        for row, cell in enumerate(code.encode(view)):
            at = layout.parity_offset(row, column) - offset
            parity[at : at + length] = cell
            sums[layout.cell_index(layout.data_count + row, column)] = checksum(cell)
        progress(layout.data_count * length)
    return parity


def read_cell(pack: RangeReader, layout: ParityLayout, stretch: int, column: int) -> bytes:
    """One data cell, filled up with zeros where the pack ends. Raises what the reader raises."""
    start = stretch * layout.stretch_bytes + column * layout.cell_bytes
    length = layout.column_bytes(column)
    used = max(0, min(length, layout.pack_bytes - start))
    return (pack.read(start, used) if used else b"").ljust(length, b"\0")
