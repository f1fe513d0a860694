"""Incremental verification: read packs for a while, those first that were not read for longest, and remember it.

    memory of earlier runs ──▶ order, least recently read first ──▶ read until the time is up ──▶ memory
                                                                └──▶ faults, for the walk over the structure

The memory is a file of the cache: when it is gone or damaged, every pack counts as never read. It says when every byte
of a pack was last read, and whether all was right. A pack with damage waits its turn like any other, so that those
behind it are reached, but never counts as read lately; until it is read again, every run says what is known of it.

    cache/scrub      0   8  magic "CASTSCR2"
                     8      rows of 25 bytes: pack id (16), ns since 1970 (8), 1 where it was damaged, else 0 (1)
                   end   8  xxh3-64 of all before
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from castore.backend.base import Backend
from castore.errors import CastoreError, NotFoundError
from castore.format.layout import CACHE, pack_name
from castore.hashing import checksum
from castore.ids import PACK_ID_BYTES, PackId
from castore.maintenance.chunks import ChunkReader
from castore.maintenance.header_check import check_headers
from castore.maintenance.record_check import Fault, Record, Threads, check_deltas, check_plain, reading_threads
from castore.maintenance.report import Findings, ScrubCount
from castore.maintenance.tables import read_rows
from castore.repository import Handle

SCRUB_MEMORY = f"{CACHE}scrub"
_MAGIC = b"CASTSCR2"
_ROW = struct.Struct(f"<{PACK_ID_BYTES}sQ?")
_BYTES_MAX = 256 * 1024 * 1024
"""More than ten million packs."""


@dataclass(frozen=True, slots=True)
class LastRead:
    """The last reading of a whole pack."""

    time_ns: int
    """Since 1970."""
    was_damaged: bool = False


Memory = Mapping[PackId, LastRead]


@dataclass(frozen=True, slots=True)
class ScrubPlan:
    """Which packs to read."""

    order: tuple[PackId, ...]
    """The least recently read first."""
    recent: tuple[PackId, ...]
    """Read lately and found right, so left out."""


@dataclass(slots=True)
class Scrubbed:
    """What a scrub found."""

    whole: set[PackId] = field(default_factory=set)
    damaged: set[PackId] = field(default_factory=set)
    """Also packs that cannot be opened."""
    faults: dict[tuple[str, int], Fault] = field(default_factory=dict)
    """(pack file, offset) → what is wrong with the record."""
    checked_bytes: int = 0


def plan_scrub(pack_ids: Collection[PackId], memory: Memory, *, now_ns: int, max_age_s: float | None) -> ScrubPlan:
    """Pure: the packs that were not found right within `max_age_s` (None: all), those first that wait longest."""
    oldest_ns = now_ns + 1 if max_age_s is None else now_ns - int(max_age_s * 1e9)
    never = LastRead(0)

    def is_recent(pack_id: PackId) -> bool:
        last = memory.get(pack_id, never)
        return last.time_ns >= oldest_ns and not last.was_damaged

    waiting = sorted(pack_ids, key=lambda pack_id: (memory.get(pack_id, never).time_ns, pack_id))
    return ScrubPlan(
        tuple(pack_id for pack_id in waiting if not is_recent(pack_id)),
        tuple(pack_id for pack_id in waiting if is_recent(pack_id)),
    )


def scrub(
    handle: Handle,
    order: Sequence[PackId],
    findings: Findings,
    *,
    more: Callable[[], bool],
    advance: Callable[[PackId], None],
) -> Scrubbed:
    """Read every byte of packs while `more()`; at least of one, so that repeated runs always come round."""
    result = Scrubbed()
    with reading_threads() as threads:
        for number, pack_id in enumerate(order):
            if number and not more():
                break
            _scrub_pack(handle, pack_id, findings, threads, result)
            advance(pack_id)
    return result


def _scrub_pack(handle: Handle, pack_id: PackId, findings: Findings, threads: Threads, result: Scrubbed) -> None:
    name, hasher = pack_name(pack_id), handle.hasher
    try:
        reader = handle.backend.open_reader(name)
    except NotFoundError:
        return  # gone meanwhile
    except CastoreError:
        result.damaged.add(pack_id)  # the walk over the structure says what is wrong with it
        return
    try:
        rows, error = read_rows(reader, pack_id, hasher)
        sound = not error and check_headers(reader, rows, pack_id, hasher, findings)
        records = [Record(name, reader, row) for row in rows]
        plain = [record for record in records if not record.row.base_ids]
        deltas = sorted(
            (record for record in records if record.row.base_ids),
            key=lambda record: (record.row.depth, record.row.base_ids, record.row.raw_bytes),
        )
        for checked in (
            check_plain(plain, hasher, threads),
            check_deltas(deltas, ChunkReader(handle), hasher, threads),
        ):
            for record, fault in checked:
                result.checked_bytes += record.row.stored_bytes
                if fault is not None:
                    sound = sound and bool(fault.base_ids)  # what only lost its base is as it was written
                    result.faults[name, record.row.offset] = fault
        (result.whole if sound else result.damaged).add(pack_id)
    finally:
        reader.close()


def count(plan: ScrubPlan, result: Scrubbed, memory: Memory) -> ScrubCount:
    """For the report; `memory` is that of after the run."""
    read_count = len(result.whole) + len(result.damaged)
    pack_ids = (*plan.order, *plan.recent)
    times = [memory[pack_id].time_ns for pack_id in pack_ids if pack_id in memory]
    oldest_ns = min(times) if times and len(times) == len(pack_ids) else None
    return ScrubCount(read_count, len(plan.recent), len(plan.order) - read_count, oldest_ns)


# ---- memory --------------------------------------------------------------------------------------------------------


def load_memory(backend: Backend) -> Memory:
    """What earlier runs remember; nothing where that is damaged or absent."""
    try:
        return _decode(backend.read(SCRUB_MEMORY, max_bytes=_BYTES_MAX))
    except CastoreError:
        return {}


def remember(
    backend: Backend, *, whole: Collection[PackId], damaged: Collection[PackId], there: Collection[PackId], now_ns: int
) -> Memory:
    """Add what was found; returns all that is remembered. Where it cannot be written, nothing is, and that is all."""
    while True:
        try:
            old: bytes | None = backend.read(SCRUB_MEMORY, max_bytes=_BYTES_MAX)
        except NotFoundError:
            old = None
        except CastoreError:
            return {}
        kept = {pack_id: last for pack_id, last in _decode(old or b"").items() if pack_id in there}
        now, now_damaged = LastRead(now_ns), LastRead(now_ns, was_damaged=True)
        memory = {**kept, **dict.fromkeys(whole, now), **dict.fromkeys(damaged, now_damaged)}
        swapped = True
        with suppress(CastoreError):  # a read-only mount
            swapped = backend.compare_and_swap(SCRUB_MEMORY, expected=old, new=_encode(memory))
        if swapped:
            return memory


def _encode(memory: Memory) -> bytes:
    rows = b"".join(
        _ROW.pack(bytes.fromhex(pack_id), memory[pack_id].time_ns, memory[pack_id].was_damaged)
        for pack_id in sorted(memory)
    )
    body = _MAGIC + rows
    return body + checksum(body).to_bytes(8, "little")


def _decode(data: bytes) -> dict[PackId, LastRead]:
    body, sum_ = data[:-8], data[-8:]
    rows = body[len(_MAGIC) :]
    if not body.startswith(_MAGIC) or len(rows) % _ROW.size or checksum(body).to_bytes(8, "little") != sum_:
        return {}
    return {
        PackId(pack_id.hex()): LastRead(time_ns, was_damaged)
        for pack_id, time_ns, was_damaged in _ROW.iter_unpack(rows)
    }
