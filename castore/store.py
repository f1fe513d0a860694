"""The chunk store: which chunks are there, and their bytes, verified.

Invariants:

1. Packs are the truth. The index is a hint that is brought in line with the pack listing; a location counts only when
   its pack stands in the latest listing.
2. Bytes are handed out only after their chunk id was recomputed; a damaged location is passed over for another one.
3. Readers hold no lease. When a pack has gone, chunks are looked up once more before they are reported missing.

Thread-safe. Nothing here writes packs (chunk_writer.py does).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Protocol

from castore.backend.base import Backend, RangeReader
from castore.codec.registry import DERIVED, base_lengths, chain_name, decode_chain
from castore.damage_marks import leave_mark, readable_marks
from castore.errors import (
    CastoreError,
    ChecksumError,
    ChunkMissingError,
    DamageError,
    FormatError,
    NotFoundError,
    RepositoryAccessError,
    StorageError,
    UnsupportedFormatError,
)
from castore.format.layout import PACKS, pack_name, parse_pack_name
from castore.format.pack import Row, check_row
from castore.hashing import Hasher, checksum
from castore.ids import ChunkId, PackId
from castore.index.base import Index, Location
from castore.options import TWO_BASES_DEPTH_MAX
from castore.pack.reader import Gap, read_table, scan_records

_OPEN_READERS_MAX = 64
_MARKS_LEFT_MAX = 100
"""Records that one store marks as damaged: a repository in a worse state is for repair."""
_INDEX_BATCH_ROWS = 200_000
"""Rows added to the index per transaction when it is rebuilt: bounds memory, and an interrupted rebuild keeps most."""

_NOTED_BASES_MAX = 4096
"""Two windows of read-ahead and more; what was forgotten is looked up again."""

Locations = tuple[Location, ...]


class ChunkStore:
    """Look-up and reading of chunks in one repository."""

    def __init__(self, backend: Backend, index: Index, hasher: Hasher) -> None:
        self._backend = backend
        self._index = index
        self.hasher = hasher
        self._lock = threading.Lock()
        self._listing: frozenset[PackId] | None = None
        self._readers = _ReaderCache(backend)
        self._reread: set[PackId] = set()
        """Packs whose tables were read again because the index was doubted."""
        self._sizes: dict[PackId, int] = {}
        self._bad: set[tuple[PackId, int]] = set()
        self._marks_known: set[str] = set()
        self._marks_left = 0
        self._noted_bases: dict[ChunkId, Locations] = {}
        """Locations of bases that were looked up together, before the records that rest on them are read."""
        self.damaged_packs: dict[PackId, CastoreError] = {}
        """Packs whose table could not be read when they were indexed; what a scan found of them is in use."""

    # ---- look-up -----------------------------------------------------------------------------------------------

    def refresh(self) -> frozenset[PackId]:
        """List the packs and bring the index in line: add tables of new packs, forget those that are gone."""
        with self._lock:
            # In this order: a pack that another process adds between the two looks must not be forgotten again.
            self._noted_bases = {}
            known = self._index.packs()
            self._sizes = pack_sizes(self._backend)
            listing = frozenset(self._sizes)
            self._index.forget(known - listing)
            self._add_tables(sorted(listing - known))
            self._listing = listing
            self._read_marks()
            self._readers.keep_only(listing)  # an open file keeps the space of a pack that was collected
            self.damaged_packs = {pack_id: e for pack_id, e in self.damaged_packs.items() if pack_id in listing}
            return listing

    def rebuild(self) -> int:
        """Throw the index away and build it again from the packs; returns the number of packs."""
        with self._lock:
            self._index.clear()
            self.damaged_packs = {}
            self._reread.clear()
            self._forget_damage()
        return len(self.refresh())

    def find(self, ids: Sequence[ChunkId]) -> list[Locations]:
        """Locations of each chunk in the packs of the latest listing, the preferred first; empty where there is none.
        Parallel to ids.
        """
        listing = self._listing if self._listing is not None else self.refresh()
        return [_by_preference(hit for hit in hits if hit.pack_id in listing) for hits in self._index.find(ids)]

    def find_sound(self, ids: Sequence[ChunkId]) -> list[Locations]:
        """As `find`, without locations known to be damaged or cut off: what a save may rely on."""
        return [tuple(hit for hit in hits if self._is_sound(hit)) for hits in self.find(ids)]

    def _is_sound(self, hit: Location) -> bool:
        cut = hit.row.offset + hit.row.stored_bytes > self._sizes.get(hit.pack_id, 0)
        return not cut and (hit.pack_id, hit.row.offset) not in self._bad

    def mark_bad(self, pack_id: PackId, row: Row, *, why: str) -> None:
        """Remember that a record did not read right, also for processes to come: the next save writes its chunk
        again.
        """
        with self._lock:
            if (pack_id, row.offset) in self._bad:
                return
            self._bad.add((pack_id, row.offset))
            self._marks_left += 1
            if self._marks_left > _MARKS_LEFT_MAX:
                return
        leave_mark(self._backend, pack_id, [row.offset], why=why)

    def forget_damage(self) -> None:
        """Remember nothing of damaged records but what marks say from now on: somebody repaired them."""
        with self._lock:
            self._forget_damage()

    def _forget_damage(self) -> None:
        self._bad.clear()
        self._marks_known.clear()
        self._marks_left = 0

    def _read_marks(self) -> None:
        """Take in what others found to be damaged. Under the lock."""
        for mark in readable_marks(self._backend, known=self._marks_known):
            self._marks_known.add(mark.name)
            self._bad.update((mark.pack_id, offset) for offset in mark.offsets)

    def locate(self, ids: Collection[ChunkId]) -> dict[ChunkId, Locations]:
        """Locations of every chunk; a miss lists the packs again before it counts. Missing chunks map to ()."""
        wanted = list(ids)
        found = dict(zip(wanted, self.find(wanted), strict=True))
        missing = [chunk_id for chunk_id, hits in found.items() if not hits]
        if missing:
            self.refresh()
            found.update(zip(missing, self.find(missing), strict=True))
        return found

    def note_bases(self, locations: Iterable[Locations]) -> list[Location]:
        """Look up in one go, level by level, what reading these chunks will read: their first locations and the bases
        under them, in that order. Chunk by chunk a third of the time of a load went into transactions of the index.
        """
        needed = [hits[0] for hits in locations if hits]
        level = needed
        while base_ids := {base_id: hit.row.depth for hit in level for base_id in hit.row.base_ids}:
            noted = dict(zip(base_ids, self.find(list(base_ids)), strict=True))
            if len(self._noted_bases) > _NOTED_BASES_MAX:
                self._noted_bases = {}
            self._noted_bases.update((base_id, hits) for base_id, hits in noted.items() if hits)
            level = [
                shallower[0]
                for base_id, depth in base_ids.items()
                if (shallower := [hit for hit in noted[base_id] if hit.row.depth < depth])
            ]
            needed += level
        return needed

    def add(self, tables: Mapping[PackId, Sequence[Row]]) -> None:
        """Make packs known that this process has just sealed."""
        with self._lock:
            self._index.add(tables)
            if self._listing is not None:
                self._listing |= tables.keys()
                self._sizes.update((pack_id, _end(rows)) for pack_id, rows in tables.items())

    def forget(self, pack_ids: Collection[PackId]) -> None:
        """Let go of packs that are about to be deleted: nothing is found in them any more, and no file stays open."""
        with self._lock:
            self._noted_bases = {}
            self._index.forget(pack_ids)
            if self._listing is not None:
                self._listing -= frozenset(pack_ids)
            self._readers.keep_only(self._readers.open_packs() - frozenset(pack_ids))

    def _add_tables(self, pack_ids: Iterable[PackId]) -> None:
        batch: dict[PackId, Sequence[Row]] = {}
        rows = 0
        for pack_id in pack_ids:
            table = self._table_or_salvage(pack_id)
            if table is None:
                continue
            batch[pack_id] = table
            rows += len(table)
            if rows >= _INDEX_BATCH_ROWS:
                self._index.add(batch)
                batch, rows = {}, 0
        if batch:
            self._index.add(batch)

    def _table_or_salvage(self, pack_id: PackId) -> list[Row] | None:
        """The rows of a pack; from a scan when its table is damaged; None when it has gone or cannot be read now."""
        name = pack_name(pack_id)
        try:
            reader = self._backend.open_reader(name)
            try:
                return self._read_rows(reader, pack_id)
            finally:
                reader.close()
        except NotFoundError:
            return None
        except (StorageError, RepositoryAccessError) as error:
            # One bad sector must not keep the other packs from being read; the next refresh tries again.
            self.damaged_packs[pack_id] = error
            return None

    def _read_rows(self, reader: RangeReader, pack_id: PackId) -> list[Row]:
        name = pack_name(pack_id)
        try:
            return read_table(reader, where=name, expected_id=pack_id, hasher=self.hasher)
        except DamageError as error:
            self.damaged_packs[pack_id] = error
            found = scan_records(reader, where=name, id_bytes=self.hasher.digest_bytes)
            return [row for row in found if not isinstance(row, Gap)]

    # ---- reading -----------------------------------------------------------------------------------------------

    def get(self, chunk_id: ChunkId) -> bytearray:
        """The raw bytes of one chunk, verified. Raises ChunkMissingError or another DamageError."""
        locations = self.locate([chunk_id])[chunk_id]
        out = bytearray(locations[0].row.raw_bytes if locations else 0)
        self.read_into(chunk_id, locations, memoryview(out))
        return out

    def read_into(self, chunk_id: ChunkId, locations: Locations, out: memoryview, *, verify: bool = True) -> None:
        """Fill `out`, exactly the chunk's raw length, from the first location that is whole.

        `verify=False` trusts the checksum of the stored bytes and does not recompute the chunk id.
        Raises ChunkMissingError when no pack has it, else the damage of the last location tried.
        """
        try:
            self._read_any(chunk_id, locations, out, verify=verify)
        except NotFoundError:
            # The pack was collected after the look-up: its live chunks were copied out before.
            self._readers.close_missing()
            self.refresh()
            self._read_any(chunk_id, self.find([chunk_id])[0], out, verify=verify)
        except DamageError:
            # The index is a hint: where a pack's own table says otherwise, the table is right.
            reread = self._reread_tables({location.pack_id for location in locations})
            found = self.find([chunk_id])[0] if reread else ()
            if not found:
                raise
            self._read_any(chunk_id, found, out, verify=verify)

    def _reread_tables(self, pack_ids: Collection[PackId]) -> bool:
        """Index packs again from their own tables, each at most once; whether that was done for any."""
        with self._lock:
            doubted = set(pack_ids) - self._reread
            self._reread |= doubted
            if doubted:
                self._readers.close_missing()
                self._noted_bases = {}
                self._index.forget(doubted)
                self._add_tables(sorted(doubted))
            return bool(doubted)

    def _read_any(self, chunk_id: ChunkId, locations: Locations, out: memoryview, *, verify: bool) -> None:
        failure: Exception = ChunkMissingError(
            f"chunk {chunk_id.hex()}: no pack of {self._backend.location} holds it; run `castore verify` to see what "
            "is affected"
        )
        for location in locations:
            try:
                self._read_one(location, out, verify=verify)
            except DamageError as error:
                self.mark_bad(location.pack_id, location.row, why=str(error))
                failure = failure if isinstance(failure, NotFoundError) else error
            except (StorageError, RepositoryAccessError, UnsupportedFormatError) as error:
                # A pack that has gone outweighs damage: the chunk may have moved, so it is looked up again.
                failure = failure if isinstance(failure, NotFoundError) else error
            else:
                return
        raise failure

    def _read_one(self, location: Location, out: memoryview, *, verify: bool) -> None:
        row = location.row
        where = f"pack {location.pack_id}, record of chunk {row.chunk_id.hex()} at {row.offset}"
        check_row(row, where=where)  # the index is a hint, for lengths too
        if row.raw_bytes != len(out):
            raise ChecksumError(f"{where}: expected {len(out)} raw bytes, found {row.raw_bytes} declared")
        reader = self._readers.open(location.pack_id)
        self._decode(row, reader, out, where=where, verify=verify, verify_base=False)
        if not verify or self.hasher.digest(out) == row.chunk_id:
            return
        if row.base_ids:
            # A place of a base may hold other bytes than its id says: take one that does not, or hear which is bad.
            self._decode(row, reader, out, where=where, verify=verify, verify_base=True)
        found = self.hasher.digest(out)
        if found != row.chunk_id:
            raise ChecksumError(
                f"{where}: expected these bytes to hash to the chunk's id, found {found.hex()}; run `castore verify "
                "--data`"
            )

    def _decode(
        self, row: Row, reader: RangeReader, out: memoryview, *, where: str, verify: bool, verify_base: bool
    ) -> None:
        """Read one record and undo its chain. A raw one is left to its chunk id when that is verified."""
        if not row.chain:
            reader.read_into(row.offset, out)
            if not verify:
                check_stored(row, out, where=where)
            return
        base = self.read_base(row, where=where, verify=verify_base) if row.base_ids else None
        stored = _memory(_STORED, row.stored_bytes)
        reader.read_into(row.offset, stored)
        check_stored(row, stored, where=where)
        try:
            decode_chain(row.chain, stored, out, base=base)
        except DamageError as error:
            raise type(error)(f"{where}: {error}") from error

    def open_pack(self, pack_id: PackId) -> RangeReader:
        """A pack, open for reading; the store closes it. Raises NotFoundError when it has gone."""
        return self._readers.open(pack_id)

    def read_base(self, row: Row, *, where: str, verify: bool = False) -> memoryview:
        """The raw bytes of a record's bases, one after the other, in memory of this thread, until the next record of
        that depth is read.

        Only locations less deep than the record count, so that reading ends whatever the packs say. The bases' ids
        are not recomputed by default: the id of what rests on them vouches for all.
        """
        lengths = base_lengths(row.chain, row.raw_bytes)
        if len(lengths) != len(row.base_ids):
            name = chain_name(row.chain)
            raise FormatError(
                f"{where}: {name} of {row.raw_bytes} bytes needs {len(lengths)} bases, found {len(row.base_ids)}"
            )
        if len(lengths) > 1 and row.depth > TWO_BASES_DEPTH_MAX:
            raise FormatError(
                f"{where}: expected two bases at a depth of at most {TWO_BASES_DEPTH_MAX}, found {row.depth}"
            )
        out = _memory(row.depth, sum(lengths))
        start = 0
        for base_id, length in zip(row.base_ids, lengths, strict=True):
            try:
                self._read_base(base_id, row.depth, out[start : start + length], verify=verify)
            except DamageError as error:
                role = "master" if row.chain == (DERIVED,) else "delta base"
                raise type(error)(f"{where}: its {role} {base_id.hex()} cannot be read: {error}") from error
            start += length
        return out

    def _read_base(self, base_id: ChunkId, depth: int, out: memoryview, *, verify: bool) -> None:
        """Fill `out` from a location less deep than that: one that was looked up ahead, else from what is there now."""

        def shallower(hits: Locations) -> Locations:
            return tuple(hit for hit in hits if hit.row.depth < depth)

        noted = shallower(self._noted_bases.get(base_id, ()))
        if noted:
            with suppress(CastoreError):
                self._read_any(base_id, noted, out, verify=verify)
                return
        self._read_any(base_id, shallower(self.locate([base_id])[base_id]), out, verify=verify)

    def peek(self, location: Location, count_bytes: int) -> bytes:
        """The first stored bytes of a record, not verified: a hint. Raises DamageError, StorageError, NotFoundError."""
        row = location.row
        return self._readers.open(location.pack_id).read(row.offset, min(count_bytes, row.stored_bytes))

    def check(self, location: Location) -> None:
        """Compare a record's stored bytes with their checksum. Raises DamageError, StorageError or NotFoundError."""
        row = location.row
        where = f"pack {location.pack_id}, record of chunk {row.chunk_id.hex()} at {row.offset}"
        check_row(row, where=where)
        stored = _memory(_STORED, row.stored_bytes)
        try:
            self._readers.open(location.pack_id).read_into(row.offset, stored)
            check_stored(row, stored, where=where)
        except DamageError as error:
            self.mark_bad(location.pack_id, row, why=str(error))
            raise

    def read_record(self, location: Location) -> tuple[bytearray, bytearray]:
        """The stored and the raw bytes of one record, in fresh memory: checksum, decoding and chunk id verified.

        The two are one object for a record without a codec. Raises DamageError, StorageError or NotFoundError.
        """
        reader = self._readers.open(location.pack_id)
        where = f"pack {location.pack_id}"
        return read_proven(reader, location.row, self.hasher, where=where, read_base=self.read_base)

    def close(self) -> None:
        """Close files and the index."""
        self._readers.close()
        self._index.close()


class ReadBase(Protocol):
    """Gives the raw bytes of a record's bases, one after the other."""

    def __call__(self, row: Row, *, where: str) -> memoryview: ...


def read_proven(
    reader: RangeReader, row: Row, hasher: Hasher, *, where: str, read_base: ReadBase
) -> tuple[bytearray, bytearray]:
    """The stored and the raw bytes of one record of a pack, in fresh memory: checksum, decoding and chunk id verified.

    The two are one object for a record without a codec. `where` names the pack. Raises DamageError, StorageError,
    NotFoundError or UnsupportedFormatError.
    """
    where = f"{where}, record of chunk {row.chunk_id.hex()} at {row.offset}"
    check_row(row, where=where)
    stored = raw = bytearray(row.stored_bytes)
    reader.read_into(row.offset, memoryview(stored))
    check_stored(row, memoryview(stored), where=where)
    if row.chain:
        base = read_base(row, where=where) if row.base_ids else None
        raw = bytearray(row.raw_bytes)
        try:
            decode_chain(row.chain, memoryview(stored), memoryview(raw), base=base)
        except DamageError as error:
            raise type(error)(f"{where}: {error}") from error
    found = hasher.digest(raw)
    if found != row.chunk_id:
        raise ChecksumError(f"{where}: expected these bytes to hash to the chunk's id, found {found.hex()}")
    return stored, raw


def check_stored(row: Row, stored: memoryview, *, where: str) -> None:
    """Compare stored bytes with their checksum. Raises ChecksumError."""
    found = checksum(stored)
    if found != row.checksum:
        raise ChecksumError(
            f"{where}: expected checksum {row.checksum:016x} of {row.stored_bytes} stored bytes, found {found:016x}; "
            "the disk or a copy changed them: run `castore verify --data`"
        )


def preference(row: Row) -> tuple[int, int]:
    """Of several records of one chunk, the one with the smallest is read: the least deep, then the shortest."""
    return row.depth, row.stored_bytes


def _by_preference(hits: Iterable[Location]) -> Locations:
    found = tuple(hits)
    return found if len(found) < 2 else tuple(sorted(found, key=lambda hit: preference(hit.row)))


def _end(rows: Sequence[Row]) -> int:
    """Where the last payload of a pack ends: a lower bound of its length."""
    return max((row.offset + row.stored_bytes for row in rows), default=0)


def list_packs(backend: Backend) -> frozenset[PackId]:
    """The packs that stand in the repository now."""
    return frozenset(pack_sizes(backend))


def pack_sizes(backend: Backend) -> dict[PackId, int]:
    """The packs that stand in the repository now, with their lengths in bytes."""
    found = ((parse_pack_name(info.name), info.size_bytes) for info in backend.list(PACKS))
    return {pack_id: size_bytes for pack_id, size_bytes in found if pack_id is not None}


_STORED = 0
"""Key of the memory for stored bytes; that for bases has the depth, at least 1, of the record that rests on them."""


class _ThreadMemory(threading.local):
    """Memory reused by each thread: fresh memory costs a page fault every 4 KiB."""

    def __init__(self) -> None:
        self.buffers: dict[int, bytearray] = {}


_thread_memory = _ThreadMemory()


def _memory(key: int, length: int) -> memoryview:
    buffer = _thread_memory.buffers.get(key)
    if buffer is None or len(buffer) < length:
        buffer = _thread_memory.buffers[key] = bytearray(length)
    return memoryview(buffer)[:length]


class _ReaderCache:
    """Open packs, least recently used first, so that thousands of packs do not use up the file descriptors."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._lock = threading.Lock()
        self._readers: OrderedDict[PackId, RangeReader] = OrderedDict()

    def open(self, pack_id: PackId) -> RangeReader:
        with self._lock:
            reader = self._readers.pop(pack_id, None)
            if reader is None:
                reader = self._backend.open_reader(pack_name(pack_id))
            self._readers[pack_id] = reader
            if len(self._readers) > _OPEN_READERS_MAX:
                # Not closed here: another thread may be reading. The last reference closes it.
                self._readers.popitem(last=False)
            return reader

    def open_packs(self) -> frozenset[PackId]:
        with self._lock:
            return frozenset(self._readers)

    def keep_only(self, pack_ids: Collection[PackId]) -> None:
        """Let go of the others; who is reading one goes on, the last reference closes it."""
        with self._lock:
            for pack_id in self._readers.keys() - pack_ids:
                del self._readers[pack_id]

    def close_missing(self) -> None:
        """Forget everything, so that the next open sees what is there now."""
        with self._lock:
            self._readers.clear()

    def close(self) -> None:
        with self._lock:
            for reader in self._readers.values():
                reader.close()
            self._readers.clear()
