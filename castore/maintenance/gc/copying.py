"""Copy records from pack to pack: the stored bytes unchanged, and never unproven.

Checksum, decoding and chunk id are verified for every record, so no rot is given a fresh checksum. A leaf that lies in
one run keeps its run, so that it can still be mapped.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from castore.backend.base import RangeReader
from castore.errors import DamageError, StorageError
from castore.format.layout import pack_name
from castore.format.pack import PackHeader, Row
from castore.ids import Buffer, new_pack_id
from castore.maintenance.chunks import ChunkReader
from castore.options import GRID_BYTES
from castore.pack.writer import PackWriter, SealedPack
from castore.repository import Handle
from castore.store import read_proven


class Copier:
    """Appends verified records to a pack of its own. Nothing is visible before `seal`."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle
        self._chunks = ChunkReader(handle)
        self._pack: PackWriter | None = None

    @property
    def pack_bytes(self) -> int:
        """Appended since the last seal."""
        return self._pack.pack_bytes if self._pack is not None else 0

    def verified(self, reader: RangeReader, row: Row, *, where: str) -> bytearray:
        """The stored bytes of a record that decodes to its chunk. Raises DamageError."""
        hasher, read_base = self._handle.hasher, self._chunks.read_base
        return read_proven(reader, row, hasher, where=where, read_base=read_base)[0]

    def copy(self, reader: RangeReader, unit: Unit, *, where: str) -> None:
        """Append one record, or a run. Raises DamageError with nothing appended, NoSpaceError or StorageError."""
        if unit.is_run:
            self._copy_run(reader, unit.rows, where=where)
            return
        (row,) = unit.rows
        self.append(row, self.verified(reader, row, where=where))

    def append(self, row: Row, payload: Buffer) -> None:
        """Append a record that was proven: `row` says all of it but its place and checksum."""
        self._open().append(
            row.chunk_id,
            payload,
            kind=row.kind,
            raw_bytes=row.raw_bytes,
            chain=row.chain,
            base_ids=row.base_ids,
            depth=row.depth,
        )

    def _copy_run(self, reader: RangeReader, rows: Sequence[Row], *, where: str) -> None:
        for row in rows:  # before anything is appended; a run may be larger than memory, so it is read again below
            self.verified(reader, row, where=where)
        payload_bytes = sum(row.stored_bytes for row in rows)
        chunks = [(row.chunk_id, partial(self.verified, reader, row, where=where)) for row in rows]
        try:
            self._open().append_run(chunks, kind=rows[0].kind, payload_bytes=payload_bytes)
        except DamageError as error:  # half a run is in the pack
            raise StorageError(
                f"{where}: a record was whole when it was read first and is not any more: {error}"
            ) from error

    def seal(self) -> SealedPack | None:
        """Make the pack durable and known to the index; None when nothing was appended."""
        if self._pack is None:
            return None
        pack, self._pack = self._pack.seal(), None
        self._handle.store.add({pack.pack_id: pack.rows})
        return pack

    def abort(self) -> None:
        """Drop what is not sealed."""
        if self._pack is not None:
            self._pack.abort()
            self._pack = None

    def _open(self) -> PackWriter:
        if self._pack is None:
            handle, pack_id = self._handle, new_pack_id()
            header = PackHeader(pack_id, handle.config.repository_id, handle.hasher, handle.clock())
            self._pack = PackWriter(handle.backend.create_stream(pack_name(pack_id)), header)
        return self._pack


@dataclass(frozen=True, slots=True)
class Unit:
    """Records that are copied together."""

    place: int
    """Of the first in the table; the others follow it there."""
    rows: tuple[Row, ...]
    is_run: bool = False
    """A whole run; else it is one record."""


def units(table: Sequence[Row], wanted: Collection[int]) -> Iterator[Unit]:
    """The records at these places of a pack's table, in its order: whole runs together, all else by itself."""
    run: list[int] = []
    for place, row in enumerate(table):
        if run and not (row.in_run and _follows(table[run[-1]], row)):
            yield from _run_or_rows(table, run, wanted)
            run = []
        if row.in_run:
            run.append(place)
        elif place in wanted:
            yield Unit(place, (row,))
    yield from _run_or_rows(table, run, wanted)


def _follows(last: Row, row: Row) -> bool:
    """Whether two chunks lie in the same run: between runs there is a header."""
    return last.stored_bytes == GRID_BYTES and row.offset == last.offset + GRID_BYTES


def _run_or_rows(table: Sequence[Row], run: Sequence[int], wanted: Collection[int]) -> Iterator[Unit]:
    kept = [place for place in run if place in wanted]
    if kept and len(kept) == len(run):
        yield Unit(run[0], tuple(table[place] for place in run), is_run=True)
    else:
        yield from (Unit(place, (table[place],)) for place in kept)
