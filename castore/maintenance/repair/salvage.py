"""Save records out of a damaged pack: those that read right, wherever its table or a scan finds them.

table and scan ──▶ each record once ──▶ decoded and hashed ──▶ kept
                                  └─▶ checksum right, its base lost ──▶ kept as it is: the base may come back
                                  └─▶ anything else stays behind in quarantine
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from castore.backend.base import RangeReader
from castore.errors import CastoreError, DamageError, UnsupportedFormatError
from castore.format.layout import pack_name
from castore.format.pack import PackHeader, Row
from castore.ids import ChunkId, PackId, new_pack_id
from castore.maintenance.chunks import ChunkReader
from castore.maintenance.record_check import Record, check_record
from castore.maintenance.tables import read_rows, scan_rows
from castore.options import GRID_BYTES
from castore.pack.reader import read_header
from castore.pack.writer import PackWriter, SealedPack
from castore.repository import Handle
from castore.store import check_stored


@dataclass(frozen=True, slots=True)
class Salvage:
    """What can be saved out of one pack."""

    pack_id: PackId
    reason: str
    """What is wrong with the pack."""
    verified: tuple[Row, ...]
    resting: tuple[Row, ...]
    """Whole by their checksum, but resting on bases that are lost."""
    dropped: tuple[Row, ...]

    @property
    def kept(self) -> tuple[Row, ...]:
        """All that is copied, in the order of the pack."""
        return tuple(sorted((*self.verified, *self.resting), key=lambda row: row.offset))

    @property
    def kept_bytes(self) -> int:
        """Stored bytes that are copied."""
        return sum(row.stored_bytes for row in (*self.verified, *self.resting))


def plan_salvage(
    handle: Handle,
    pack_id: PackId,
    reason: str,
    *,
    there: Collection[ChunkId],
    beat: Callable[[], None] = lambda: None,
) -> Salvage:
    """Read a damaged pack and say what can be saved; `there` are the chunks that can be read. `beat` is called for each
    record.

    Raises UnsupportedFormatError when the pack, or one of its records, is of a newer castore and so no damage, or
    StorageError when the file cannot be opened.
    """
    name, hasher = pack_name(pack_id), handle.hasher
    chunks = ChunkReader(handle)
    reader = handle.backend.open_reader(name)
    try:
        with suppress(DamageError):
            read_header(reader, where=name)
        table, _ = read_rows(reader, pack_id, hasher)
        verified: dict[int, Row] = {}
        resting: dict[int, Row] = {}
        dropped: dict[int, Row] = {}
        for row in dict.fromkeys((*table, *scan_rows(reader, pack_id, hasher))):
            beat()
            if row.offset in verified:
                continue
            fault = check_record(Record(name, reader, row), chunks, hasher)
            if fault is None:
                verified[row.offset] = row
            elif fault.unsupported:
                raise UnsupportedFormatError(fault.message)
            elif set(fault.base_ids) - set(there):
                resting[row.offset] = row
            else:
                dropped[row.offset] = row
        resting = {offset: row for offset, row in resting.items() if offset not in verified}
        lost = {offset: row for offset, row in dropped.items() if offset not in verified and offset not in resting}
        return Salvage(pack_id, reason, tuple(verified.values()), tuple(resting.values()), tuple(lost.values()))
    finally:
        reader.close()


def write_salvage(handle: Handle, salvage: Salvage, *, beat: Callable[[], None] = lambda: None) -> SealedPack | None:
    """Copy what can be saved into a new pack, durably; every record is compared with its checksum once more. `beat` is
    called for each record or run.

    None when there is nothing. Raises DamageError when a record that read right before does not now, or StorageError;
    nothing is left behind then.
    """
    if not salvage.kept:
        return None
    name, pack_id = pack_name(salvage.pack_id), new_pack_id()
    header = PackHeader(pack_id, handle.config.repository_id, handle.hasher, handle.clock())
    writer = PackWriter(handle.backend.create_stream(pack_name(pack_id)), header)
    try:
        reader = handle.backend.open_reader(name)
        try:
            for unit in _units(salvage.kept):
                beat()
                _copy(writer, reader, unit, where=name)
        finally:
            reader.close()
        return writer.seal()
    except BaseException:
        with suppress(CastoreError):
            writer.abort()
        raise


def _units(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Single records, and stretches of runs that can be runs again: every chunk but the last is whole."""
    unit: list[Row] = []
    for row in rows:
        last = unit[-1] if unit else None
        follows = (
            last is not None
            and last.in_run
            and row.in_run
            and last.kind == row.kind
            and last.raw_bytes == GRID_BYTES
            and last.offset + GRID_BYTES == row.offset
        )
        if not follows and unit:
            yield unit
            unit = []
        unit.append(row)
    if unit:
        yield unit


def _copy(writer: PackWriter, reader: RangeReader, unit: Sequence[Row], *, where: str) -> None:
    if unit[0].in_run:
        chunks = [(row.chunk_id, partial(_stored, reader, row, where=where)) for row in unit]
        writer.append_run(chunks, kind=unit[0].kind, payload_bytes=sum(row.raw_bytes for row in unit))
        return
    (row,) = unit
    writer.append(
        row.chunk_id,
        _stored(reader, row, where=where),
        kind=row.kind,
        raw_bytes=row.raw_bytes,
        chain=row.chain,
        base_ids=row.base_ids,
        depth=row.depth,
    )


def _stored(reader: RangeReader, row: Row, *, where: str) -> memoryview:
    stored = memoryview(bytearray(row.stored_bytes))
    reader.read_into(row.offset, stored)
    check_stored(row, stored, where=f"{where}, record of chunk {row.chunk_id.hex()} at {row.offset}")
    return stored
