"""Checks of packs: headers, tables, records and the index agree, and what there is for every chunk.

    structure   header, trailer and table decode; the index holds the rows of the table; a record's base is there, and
                less deep than the record
    data        every record: header at its place = row of the table; its bytes (record_check.py); the gaps between
                records are zero

So with `data` no byte of a pack may change unseen.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from types import MappingProxyType

from castore.backend.base import Backend, RangeReader
from castore.errors import CastoreError, NotFoundError, some
from castore.format.layout import pack_name, parse_pack_name
from castore.format.pack import Row
from castore.ids import ChunkId, PackId
from castore.index.base import Location
from castore.maintenance.chunks import ChunkReader
from castore.maintenance.header_check import check_headers
from castore.maintenance.record_check import (
    Checked,
    Fault,
    Record,
    Threads,
    base_key,
    check_deltas,
    check_plain,
    check_stored_only,
    reading_threads,
)
from castore.maintenance.report import Findings
from castore.maintenance.tables import read_rows
from castore.pack.reader import read_header
from castore.repository import Handle

_INDEX_BATCH_ROWS = 10_000
_OPEN_READERS_MAX = 64

Needs = Mapping[ChunkId, int | None]
"""Every chunk that snapshots need, with the raw length that manifests expect (None: parts and id lists)."""


@dataclass(slots=True)
class Survey:
    """What the packs hold."""

    depths: dict[ChunkId, int] = field(default_factory=dict)
    """Every chunk that can be read, with the depth of its least deep record: by the tables, or with `data` by records
    that were verified."""
    faults: list[Fault] = field(default_factory=list)
    """Records that cannot be used."""
    pack_count: int = 0
    checked_bytes: int = 0
    damaged_packs: set[PackId] = field(default_factory=set)
    """Packs of which some byte is not as it was written, or cannot be read."""

    @property
    def suspect_packs(self) -> set[PackId]:
        """Those, and packs with records whose bases are there and cannot serve: it is the record that is wrong."""
        blamed = {parse_pack_name(fault.name) for fault in self.faults if self._is_to_blame(fault)}
        return self.damaged_packs | {pack_id for pack_id in blamed if pack_id is not None}

    def _is_to_blame(self, fault: Fault) -> bool:
        return bool(fault.base_ids) and self.depths.keys() >= set(fault.base_ids)


def check_packs(
    handle: Handle,
    pack_ids: Iterable[PackId],
    needs: Needs,
    findings: Findings,
    *,
    data: bool,
    advance: Callable[[int], None],
    known: Mapping[tuple[str, int], Fault] = MappingProxyType({}),
) -> Survey:
    """Check packs; `advance` gets the bytes of their files as they are dealt with.

    `known` are faults that a scrub found before: (pack file, offset) → fault.
    """
    with reading_threads() if data else nullcontext() as threads:
        check = _Check(handle, needs, findings, threads=threads, advance=advance, known=known)
        for pack_id in pack_ids:
            check.pack(pack_id)
        check.deltas()
    check.note_idle_packs()
    return check.survey


class _Check:
    """One walk over all packs. Records that rest on others come last, when it is known what can be read."""

    def __init__(
        self,
        handle: Handle,
        needs: Needs,
        findings: Findings,
        *,
        threads: Threads | None,
        advance: Callable[[int], None],
        known: Mapping[tuple[str, int], Fault],
    ) -> None:
        self.survey = Survey()
        self._known = known
        self._handle = handle
        self._needs = needs
        self._findings = findings
        self._threads = threads
        self._advance = advance
        self._deltas: list[tuple[PackId, Row]] = []
        self._idle: dict[PackId, tuple[int, frozenset[ChunkId]]] = {}
        """Size and chunks of packs in which no snapshot needs anything by itself."""

    def pack(self, pack_id: PackId) -> None:
        """Check one pack, but for what rests on bases."""
        name = pack_name(pack_id)
        try:
            reader = self._handle.backend.open_reader(name)
        except NotFoundError:
            self._findings.note(f"{name} was removed while this ran")
            return
        except CastoreError as error:
            self._findings.problem("pack", name, str(error))
            self.survey.damaged_packs.add(pack_id)
            return
        self.survey.pack_count += 1
        try:
            rows, from_table = self._rows(reader, pack_id)
            self._check_index(rows, pack_id)
            if from_table and self._threads is not None:
                hasher = self._handle.hasher
                if not check_headers(reader, rows, pack_id, hasher, self._findings):
                    self.survey.damaged_packs.add(pack_id)
            self._check_plain([Record(name, reader, row) for row in rows if not row.base_ids])
        finally:
            reader.close()
        deltas = [(pack_id, row) for row in rows if row.base_ids]
        self._deltas += deltas
        self._advance(max(0, reader.size_bytes - sum(row.stored_bytes for row in rows)))
        if not any(row.chunk_id in self._needs for row in rows):
            self._idle[pack_id] = reader.size_bytes, frozenset(row.chunk_id for row in rows)

    def deltas(self) -> None:
        """Check what rests on bases: the least deep first, and together what rests on the same bases."""
        self._deltas.sort(key=lambda item: (item[1].depth, *base_key(item[1]), item[0]))
        readers = _Readers(self._handle.backend)
        for _, level in groupby(self._deltas, key=lambda item: item[1].depth):
            usable = [record for item in level if (record := self._on_usable_base(*item, readers)) is not None]
            if self._threads is None:
                checked: Iterable[Checked] = ((record, None) for record in usable)
            else:
                chunks = ChunkReader(self._handle)
                checked = check_deltas(usable, chunks, self._handle.hasher, self._threads)
            self._count_all(checked)

    def note_idle_packs(self) -> None:
        """Packs that neither a snapshot nor a base of what a snapshot needs lies in."""
        pinned: set[ChunkId] = set()
        for _, row in reversed(self._deltas):
            if row.chunk_id in self._needs or row.chunk_id in pinned:
                pinned.update(row.base_ids)
        sizes = [size for size, chunks in self._idle.values() if pinned.isdisjoint(chunks)]
        if sizes:
            self._findings.note(
                f"{len(sizes)} packs ({sum(sizes)} bytes) hold nothing that a snapshot needs; gc may remove them"
            )

    # ---- tables and index ------------------------------------------------------------------------------------------

    def _rows(self, reader: RangeReader, pack_id: PackId) -> tuple[list[Row], bool]:
        """The rows of the table (True), or where that is damaged those that a scan finds."""
        name = pack_name(pack_id)
        rows, error = read_rows(reader, pack_id, self._handle.hasher)
        if error:
            found = f"a scan found {len(rows)} whole records, `castore dump` shows them"
            self._findings.problem("pack", name, f"{error}; {found}")
            self.survey.damaged_packs.add(pack_id)
            return rows, False
        if read_header(reader, where=name).repository_id != self._handle.config.repository_id:
            self._findings.note(f"{name} was written for another repository")
        return rows, True

    def _check_index(self, rows: Sequence[Row], pack_id: PackId) -> None:
        """Every row must be in the index as it is in the table: a reader looks there first."""
        wrong: list[Row] = []
        try:
            for start in range(0, len(rows), _INDEX_BATCH_ROWS):
                wrong += self._not_indexed(rows[start : start + _INDEX_BATCH_ROWS], pack_id)
        except CastoreError as error:
            message = f"the index cannot be read: {error}; run `castore reindex`"
            self._findings.problem("index", pack_name(pack_id), message)
        if wrong:
            self._findings.problem(
                "index",
                pack_name(pack_id),
                f"{len(wrong)} of {len(rows)} rows are missing from the index or differ in it (chunks "
                f"{some(row.chunk_id.hex() for row in wrong)}); run `castore reindex`",
            )

    def _not_indexed(self, rows: Sequence[Row], pack_id: PackId) -> list[Row]:
        found = self._handle.store.find([row.chunk_id for row in rows])
        wanted = (Location(pack_id, row) for row in rows)
        return [location.row for location, hits in zip(wanted, found, strict=True) if location not in hits]

    # ---- records ---------------------------------------------------------------------------------------------------

    def _check_plain(self, records: Sequence[Record]) -> None:
        if self._threads is None:
            self._count_all((record, None) for record in records)
        else:
            self._count_all(check_plain(records, self._handle.hasher, self._threads))

    def _on_usable_base(self, pack_id: PackId, row: Row, readers: _Readers) -> Record | None:
        """The record, or None and a fault when its base cannot serve."""
        name = pack_name(pack_id)
        try:
            record = Record(name, readers.open(name), row)
        except CastoreError as error:
            self._fail(Fault(name, row, str(error)))
            return None
        found = {base_id: self.survey.depths.get(base_id) for base_id in row.base_ids}
        lost = tuple(base_id for base_id, depth in found.items() if depth is None)
        deep = {base_id: depth for base_id, depth in found.items() if depth is not None and depth >= row.depth}
        if not lost and not deep:
            return record
        if lost:
            names = " and ".join(base_id.hex() for base_id in lost)
            fault = Fault(name, row, f"chunk {row.chunk_id.hex()}: its base {names} cannot be read", lost)
        else:
            names = " and ".join(f"{base_id.hex()} is at depth {depth}" for base_id, depth in deep.items())
            message = f"chunk {row.chunk_id.hex()} at depth {row.depth}: its base {names}; expected less"
            fault = Fault(name, row, message)
        self._fail((check_stored_only(record) if self._threads is not None else None) or fault)
        return None

    def _count_all(self, checked: Iterable[Checked]) -> None:
        for record, found in checked:
            row = record.row
            fault = found or self._known.get((record.name, row.offset))
            expected = self._needs.get(row.chunk_id)
            if fault is None and expected not in (None, row.raw_bytes):
                message = f"manifests expect {expected} raw bytes, the record declares {row.raw_bytes}"
                # The record is as it was written, so its pack is not damaged: it is the manifest that lies.
                fault = Fault(record.name, row, f"chunk {row.chunk_id.hex()} at {row.offset}: {message}")
                self.survey.faults.append(fault)
                self._done(row)
            elif fault is not None:
                self._fail(fault)
            else:
                depths = self.survey.depths
                depths[row.chunk_id] = min(row.depth, depths.get(row.chunk_id, row.depth))
                self._done(row)

    def _fail(self, fault: Fault) -> None:
        self.survey.faults.append(fault)
        pack_id = parse_pack_name(fault.name)
        if pack_id is not None and not fault.base_ids:
            self.survey.damaged_packs.add(pack_id)
        self._done(fault.row)

    def _done(self, row: Row) -> None:
        if self._threads is not None:
            self.survey.checked_bytes += row.stored_bytes
        self._advance(row.stored_bytes)


class _Readers:
    """Open packs, the latest last, so that thousands of packs do not use up the file descriptors."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._readers: OrderedDict[str, RangeReader] = OrderedDict()

    def open(self, name: str) -> RangeReader:
        """Closed by its last reference: threads may still be reading when another pack takes its place."""
        reader = self._readers.pop(name, None) or self._backend.open_reader(name)
        self._readers[name] = reader
        if len(self._readers) > _OPEN_READERS_MAX:
            self._readers.popitem(last=False)
        return reader
