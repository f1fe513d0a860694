"""Checks of packs: headers, tables, records and the index agree, and every byte is whole.

    structure   header, trailer and table decode; the index holds the rows of the table
    data        every record: header at its place = row of the table; stored bytes → checksum → decode →
                chunk id; the gaps between records are zero

So with `data` no byte of a pack may change unseen. Payloads are read by threads, a few MiB each at a time.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from castore.backend.base import RangeReader
from castore.chunk_writer import worker_count
from castore.codec.registry import decode_chain
from castore.errors import CastoreError, NotFoundError
from castore.format.layout import pack_name
from castore.format.pack import HEADER_BYTES, RUN_FIXED_BYTES, Row, aligned
from castore.hashing import CHECKSUM_BYTES
from castore.ids import ChunkId, PackId
from castore.index.base import Location
from castore.maintenance.report import Findings, some
from castore.maintenance.tables import read_rows, scan_rows
from castore.options import MIB, PAGE_BYTES
from castore.pack.reader import read_header
from castore.repository import Handle
from castore.store import ChunkStore, check_stored

_BATCH_BYTES = 4 * MIB
"""Stored bytes that a thread takes at a time: handing over costs nothing, and progress is seen."""
_BATCH_ROWS_MAX = 1024
_INDEX_BATCH_ROWS = 10_000

Needs = Mapping[ChunkId, int | None]
"""Every chunk that snapshots need, with the raw length that manifests expect (None: parts and id lists)."""


@dataclass(slots=True)
class PackState:
    """What the packs hold of the chunks that snapshots need."""

    whole: set[ChunkId] = field(default_factory=set)
    """Needed chunks that some pack holds: by its table, or with `data` by a record that was verified."""
    faults: list[tuple[str, Row, str]] = field(default_factory=list)
    """(pack file, row, message) of every record that cannot be used."""
    pack_count: int = 0
    checked_bytes: int = 0


def check_packs(
    handle: Handle,
    pack_ids: Iterable[PackId],
    needs: Needs,
    findings: Findings,
    *,
    data: bool,
    advance: Callable[[int], None],
) -> PackState:
    """Check packs; `advance` gets the bytes of their files as they are dealt with."""
    state = PackState()
    unneeded_bytes: list[int] = []
    with ThreadPoolExecutor(worker_count(), thread_name_prefix="castore-verify") as pool:
        for pack_id in pack_ids:
            try:
                reader = handle.backend.open_reader(pack_name(pack_id))
            except NotFoundError:
                findings.note(f"{pack_name(pack_id)} was removed while this ran")
                continue
            except CastoreError as error:
                findings.problem("pack", pack_name(pack_id), str(error))
                continue
            state.pack_count += 1
            try:
                check = _PackCheck(handle, reader, pack_id, needs=needs, findings=findings, state=state)
                if not check.run(pool if data else None, advance):
                    unneeded_bytes.append(reader.size_bytes)
            finally:
                reader.close()
    if unneeded_bytes:
        findings.note(
            f"{len(unneeded_bytes)} packs ({sum(unneeded_bytes)} bytes) hold nothing that a snapshot needs; "
            "gc may remove them"
        )
    return state


class _PackCheck:
    """One pack and what is found in it."""

    def __init__(
        self,
        handle: Handle,
        reader: RangeReader,
        pack_id: PackId,
        *,
        needs: Needs,
        findings: Findings,
        state: PackState,
    ) -> None:
        self._handle = handle
        self._needs = needs
        self._findings = findings
        self._state = state
        self._pack_id = pack_id
        self._name = pack_name(pack_id)
        self._reader = reader

    def run(self, pool: ThreadPoolExecutor | None, advance: Callable[[int], None]) -> bool:
        """Whether a snapshot needs anything in this pack. With a pool every record is read."""
        rows, from_table = self._rows()
        self._check_index(rows)
        left = self._reader.size_bytes
        if pool is None:
            for row in rows:
                self._count(row, "")
        else:
            if from_table:
                self._check_headers(rows)
            for row, message in self._read_records(rows, pool):
                self._count(row, message)
                self._state.checked_bytes += row.stored_bytes
                step = min(left, row.stored_bytes)
                advance(step)
                left -= step
        advance(left)
        return any(row.chunk_id in self._needs for row in rows)

    def _rows(self) -> tuple[list[Row], bool]:
        """The rows of the table (True), or where that is damaged those that a scan finds."""
        rows, error = read_rows(self._reader, self._pack_id, self._handle.hasher)
        if error:
            found = f"a scan found {len(rows)} whole records, `castore dump` shows them"
            self._findings.problem("pack", self._name, f"{error}; {found}")
            return rows, False
        if read_header(self._reader, where=self._name).repository_id != self._handle.config.repository_id:
            self._findings.note(f"{self._name} was written for another repository")
        return rows, True

    def _check_index(self, rows: Sequence[Row]) -> None:
        """Every row must be in the index as it is in the table: a reader looks there first."""
        wrong: list[Row] = []
        try:
            for start in range(0, len(rows), _INDEX_BATCH_ROWS):
                wrong += self._not_indexed(rows[start : start + _INDEX_BATCH_ROWS])
        except CastoreError as error:
            self._findings.problem("index", self._name, f"the index cannot be read: {error}; run `castore reindex`")
        if wrong:
            self._findings.problem(
                "index",
                self._name,
                f"{len(wrong)} of {len(rows)} rows are missing from the index or differ in it (chunks "
                f"{some(row.chunk_id.hex() for row in wrong)}); run `castore reindex`",
            )

    def _not_indexed(self, rows: Sequence[Row]) -> list[Row]:
        found = self._handle.store.find([row.chunk_id for row in rows])
        wanted = (Location(self._pack_id, row) for row in rows)
        return [location.row for location, hits in zip(wanted, found, strict=True) if location not in hits]

    def _check_headers(self, rows: Sequence[Row]) -> None:
        """Records as their own headers describe them, against the table; and the zeros between them."""
        scanned = {row.offset: row for row in scan_rows(self._reader, self._pack_id, self._handle.hasher)}
        for row in rows:
            found = scanned.pop(row.offset, None)
            if found != row:
                what = "is damaged" if found is None else "says something else"
                self._findings.problem(
                    "record",
                    self._name,
                    f"chunk {row.chunk_id.hex()}: the record header before offset {row.offset} {what}; "
                    "the table still finds the chunk, but a scan without the table would not",
                )
        if scanned:
            self._findings.problem(
                "pack", self._name, f"{len(scanned)} records (at {some(scanned)}) are not in the table"
            )
        ordered = sorted(rows, key=lambda row: row.offset)
        gaps = zero_ranges(ordered, id_bytes=self._handle.hasher.digest_bytes)
        dirty = [start for start, stop in gaps if self._holds_bytes(start, stop)]
        if dirty:
            self._findings.problem(
                "pack",
                self._name,
                f"expected zeros between the records at {some(dirty)}, found other bytes; no record is lost",
            )

    def _holds_bytes(self, start: int, stop: int) -> bool:
        """Whether a gap is anything but zeros."""
        if stop - start > PAGE_BYTES:
            return True
        try:
            return stop > start and any(self._reader.read(start, stop - start))
        except CastoreError:
            return True

    def _count(self, row: Row, message: str) -> None:
        """Note a record as whole or as faulty."""
        expected = self._needs.get(row.chunk_id)
        if not message and expected not in (None, row.raw_bytes):
            message = f"{_where(row)}: manifests expect {expected} raw bytes, the record declares {row.raw_bytes}"
        if message:
            self._state.faults.append((self._name, row, message))
        elif row.chunk_id in self._needs:
            self._state.whole.add(row.chunk_id)

    def _read_records(self, rows: Sequence[Row], pool: ThreadPoolExecutor) -> Iterator[tuple[Row, str]]:
        """Every row with what is wrong with its bytes; threads read ahead, at most two batches each."""
        pending: deque[Future[list[tuple[Row, str]]]] = deque()
        for batch in _batches(rows):
            pending.append(pool.submit(_check_batch, self._reader, batch, self._handle.store))
            if len(pending) >= 2 * worker_count():
                yield from pending.popleft().result()
        for future in pending:
            yield from future.result()


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
    while (
        last + 1 < len(rows)
        and rows[last + 1].in_run
        and rows[last + 1].offset == rows[last].offset + rows[last].stored_bytes
    ):
        last += 1
    return last + 1 - first


def _batches(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Neighbouring rows of together about _BATCH_BYTES."""
    batch: list[Row] = []
    total = 0
    for row in rows:
        batch.append(row)
        total += row.stored_bytes
        if total >= _BATCH_BYTES or len(batch) >= _BATCH_ROWS_MAX:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


class _Memory(threading.local):
    """Reused by each thread: fresh memory costs a page fault every 4 KiB."""

    def __init__(self) -> None:
        self.stored = bytearray()
        self.raw = bytearray()


_memory = _Memory()


def _check_batch(reader: RangeReader, rows: Sequence[Row], store: ChunkStore) -> list[tuple[Row, str]]:
    """Each row with what is wrong with its bytes; empty when nothing is."""
    return [(row, _check_record(reader, row, store)) for row in rows]


def _check_record(reader: RangeReader, row: Row, store: ChunkStore) -> str:
    where = _where(row)
    if len(_memory.stored) < row.stored_bytes:
        _memory.stored = bytearray(row.stored_bytes)
    if len(_memory.raw) < row.raw_bytes:
        _memory.raw = bytearray(row.raw_bytes)
    stored, raw = memoryview(_memory.stored)[: row.stored_bytes], memoryview(_memory.raw)[: row.raw_bytes]
    try:
        reader.read_into(row.offset, stored)
        check_stored(row, stored, where=where)
        if row.chain:
            base = store.read_base(row, where=where, verify=True) if row.base_id is not None else None
            decode_chain(row.chain, stored, raw, base=base)
    except CastoreError as error:
        message = str(error)
        return message if message.startswith(where) else f"{where}: {message}"
    found = store.hasher.digest(raw if row.chain else stored)
    if found != row.chunk_id:
        return f"{where}: the checksum is right, the bytes hash to {found.hex()}: wrong since they were written"
    return ""


def _where(row: Row) -> str:
    return f"chunk {row.chunk_id.hex()} at {row.offset}"
