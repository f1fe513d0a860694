"""Checks of the bytes of records: stored bytes → checksum → decode → chunk id.

Records that stand by themselves are read in the order of their pack. Records that rest on a base are read together
with all others that rest on it, so that a base is decoded once for all of them and not once for each. Threads take a
few MiB at a time; memory holds a few MiB a thread.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby

from castore.backend.base import RangeReader
from castore.codec.registry import base_lengths, decode_chain
from castore.errors import CastoreError, ChecksumError, UnsupportedFormatError
from castore.format.pack import Row
from castore.hashing import Hasher
from castore.ids import Buffer, ChunkId
from castore.maintenance.chunks import ChunkReader
from castore.options import MIB
from castore.store import check_stored

_BATCH_BYTES = 4 * MIB
"""Stored bytes that a thread takes at a time: handing over costs nothing, and progress is seen."""
_BATCH_RECORDS_MAX = 1024


@dataclass(frozen=True, slots=True)
class Record:
    """A row of a table and the open pack that it belongs to."""

    name: str
    """Of the pack file."""
    reader: RangeReader
    row: Row


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a record cannot be used."""

    name: str
    row: Row
    message: str
    base_ids: tuple[ChunkId, ...] = ()
    """Set when nothing is wrong but these bases of it."""
    unsupported: bool = False
    """Set when it needs a newer castore: no damage."""


Checked = tuple[Record, Fault | None]


@dataclass(frozen=True, slots=True)
class Threads:
    """Threads that read, and how many batches may be under way."""

    pool: ThreadPoolExecutor
    ahead: int


@contextmanager
def reading_threads() -> Iterator[Threads]:
    """Threads for the block."""
    # Not at the head of the file: it brings numpy, and whoever checks the structure alone reads no records.
    from castore.threads import worker_count

    count = worker_count()
    with ThreadPoolExecutor(count, thread_name_prefix="castore-verify") as pool:
        yield Threads(pool, 2 * count)


def base_key(row: Row) -> tuple[tuple[ChunkId, ...], tuple[int, ...]]:
    """Equal for rows of one depth whose bases are read into memory alike, so that this is done once for all of them."""
    return row.base_ids, base_lengths(row.chain, row.raw_bytes)


def check_plain(records: Iterable[Record], hasher: Hasher, threads: Threads) -> Iterator[Checked]:
    """Read and decode records without a base; yields each, in order, with what is wrong with it."""
    return _in_threads(records, lambda batch: [(record, _check(record, hasher)) for record in batch], threads)


def check_deltas(records: Iterable[Record], chunks: ChunkReader, hasher: Hasher, threads: Threads) -> Iterator[Checked]:
    """The same for records with a base, which come sorted by `base_key`."""
    return _in_threads(records, lambda batch: list(_check_by_base(batch, chunks, hasher)), threads)


def check_record(record: Record, chunks: ChunkReader, hasher: Hasher) -> Fault | None:
    """Read, decode and hash one record, whatever it rests on; what is wrong with it."""
    if not record.row.base_ids:
        return _check(record, hasher)
    ((_, fault),) = _check_by_base([record], chunks, hasher)
    return fault


def check_stored_only(record: Record) -> Fault | None:
    """Read a record and compare its checksum, where its base is not to be had."""
    return _fault(record, lambda where: _read_stored(record, where))


def _in_threads(
    records: Iterable[Record], check: Callable[[list[Record]], list[Checked]], threads: Threads
) -> Iterator[Checked]:
    pending: deque[Future[list[Checked]]] = deque()
    try:
        for batch in _batches(records):
            pending.append(threads.pool.submit(check, batch))
            if len(pending) >= threads.ahead:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    finally:
        for future in pending:  # an error or Ctrl-C: nobody may close the packs under a reading thread
            future.cancel()
            with suppress(BaseException):
                future.result()


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Neighbouring records of together about _BATCH_BYTES."""
    batch: list[Record] = []
    total = 0
    for record in records:
        batch.append(record)
        total += record.row.stored_bytes
        if total >= _BATCH_BYTES or len(batch) >= _BATCH_RECORDS_MAX:
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


def _check_by_base(batch: Iterable[Record], chunks: ChunkReader, hasher: Hasher) -> Iterator[Checked]:
    for _, group in groupby(batch, key=lambda record: (record.row.depth, *base_key(record.row))):
        records = list(group)
        first = records[0]
        try:
            base = chunks.read_base(first.row, where=_where(first.row))
        except CastoreError as error:
            yield from ((record, _base_fault(record, str(error))) for record in records)
            continue
        yield from ((record, _check(record, hasher, base)) for record in records)


def _base_fault(record: Record, message: str) -> Fault:
    return check_stored_only(record) or Fault(record.name, record.row, message, record.row.base_ids)


def _check(record: Record, hasher: Hasher, base: Buffer | None = None) -> Fault | None:
    def decode(where: str) -> None:
        row, stored = record.row, _read_stored(record, where)
        raw = stored
        if row.chain:
            if len(_memory.raw) < row.raw_bytes:
                _memory.raw = bytearray(row.raw_bytes)
            raw = memoryview(_memory.raw)[: row.raw_bytes]
            decode_chain(row.chain, stored, raw, base=base)
        found = hasher.digest(raw)
        if found != row.chunk_id:
            raise ChecksumError(
                f"the checksum is right, but the bytes hash to {found.hex()}: they were wrong when they were written"
            )

    return _fault(record, decode)


def _fault(record: Record, read: Callable[[str], object]) -> Fault | None:
    where = _where(record.row)
    try:
        read(where)
    except CastoreError as error:
        message = str(error)
        message = message if message.startswith(where) else f"{where}: {message}"
        return Fault(record.name, record.row, message, unsupported=isinstance(error, UnsupportedFormatError))
    return None


def _read_stored(record: Record, where: str) -> memoryview:
    if len(_memory.stored) < record.row.stored_bytes:
        _memory.stored = bytearray(record.row.stored_bytes)
    stored = memoryview(_memory.stored)[: record.row.stored_bytes]
    record.reader.read_into(record.row.offset, stored)
    check_stored(record.row, stored, where=where)
    return stored


def _where(row: Row) -> str:
    return f"chunk {row.chunk_id.hex()} at {row.offset}"
