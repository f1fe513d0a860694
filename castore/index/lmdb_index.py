"""The index in an LMDB file: what the tables of all packs say, in one B-tree that many processes share.

    entries of the data file, in three databases; numbers are big-endian, so that LMDB's order is ours
        locations    chunk id (n)        → location, one for each place where the chunk lies
        packs        pack id (16)        → pack number (4), row count (8)
        numbers      pack number (4)     → pack id (16)

    location (35 bytes, and n for each base)
        0   4  pack number
        4   8  offset
       12   4  stored bytes
       16   4  raw bytes
       20   8  checksum
       28   4  codec chain
       32   1  record kind
       33   1  depth
       34   1  flags                        1: the chunk lies in a run
       35      base ids (n each)

A pack number stands for 16 bytes of pack id: 16 + 35 bytes and 10 of LMDB's own make 61, at the usual fill of
two thirds 92 bytes for each location (measured with ids of 16 bytes; free pages left by a rebuild or gc come to
as much again, and later saves use them up).

To forget packs, all locations are scanned for their numbers: 0.3 s for each million (measured). A list of chunk
ids for each pack would save that, for 16 more bytes in each location; but gc, which alone forgets packs, does it
rarely, for many at a time, and has read every manifest before. The scan runs in a read transaction, which nobody
waits for; the write transaction only deletes.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from castore.errors import DamageError
from castore.format.pack import BASES_MAX, CHAIN_LENGTH_MAX, RecordKind, Row
from castore.ids import PACK_ID_BYTES, ChunkId, PackId
from castore.index.base import Location
from castore.index.lmdb_environment import Databases, Environment, Transaction
from castore.index.lmdb_registry import acquire, release

_LOCATIONS, _PACKS, _NUMBERS = b"locations", b"packs", b"numbers"
_DATABASES = {_LOCATIONS: True, _PACKS: False, _NUMBERS: False}
"""Name → whether a key may have several values."""

_NUMBER = struct.Struct(">I")
_PACK = struct.Struct(">IQ")
_LOCATION = struct.Struct(f">QIIQ{CHAIN_LENGTH_MAX}sBBB")
_BASE_AT = _NUMBER.size + _LOCATION.size
_KIND_AT = _BASE_AT - 3
_KINDS = {int(kind): kind for kind in RecordKind}
_IN_RUN = 1

_Item = tuple[bytes, bytes]


def open_lmdb_index(cache_dir: Path, *, repository_id: bytes, id_bytes: int) -> LmdbIndex:
    """The index in that directory, which is created; empty when there is none, or none that can be trusted.

    Verifies the whole file (120 ms for 3 million chunks in the page cache). Waits up to 10 s for another
    process. Raises StorageError when the directory cannot be used: permission, full disk, a lock held for ever.
    """
    return LmdbIndex(_open_environment(cache_dir, repository_id, id_bytes))


def _open_environment(directory: Path, repository_id: bytes, id_bytes: int) -> Environment:
    return acquire(directory, repository_id=repository_id, id_bytes=id_bytes, databases=_DATABASES)


class LmdbIndex:
    """An Index that handles, threads and processes share. Any method may raise StorageError: no cache here."""

    def __init__(self, environment: Environment) -> None:
        self._shared = environment
        self._id_bytes = environment.id_bytes
        self._closed = False

    def find(self, ids: Sequence[ChunkId]) -> list[tuple[Location, ...]]:
        """See Index.find."""
        self._check_widths(ids)
        found = self._environment().read(partial(_look_up, ids=sorted(set(ids))))
        return [tuple(found.get(chunk_id, ())) for chunk_id in ids]

    def packs(self) -> frozenset[PackId]:
        """See Index.packs."""
        return self._environment().read(_pack_ids)

    def add(self, tables: Mapping[PackId, Sequence[Row]]) -> None:
        """See Index.add."""
        keys = {_pack_key(pack_id): pack_id for pack_id in tables}
        new = self._environment().read(partial(_unknown, pack_keys=keys)) if keys else []
        # Everything is encoded before the write transaction, which other processes wait for.
        encoded = {key: self._encode(tables[keys[key]]) for key in new}
        if encoded:
            self._environment().write(partial(_put_tables, tables=encoded))

    def forget(self, packs: Collection[PackId]) -> None:
        """See Index.forget."""
        left = [_pack_key(pack_id) for pack_id in packs]
        while left:
            doomed = self._environment().read(partial(_scan, pack_keys=left))
            if not doomed.numbers:
                return
            left = self._environment().write(partial(_delete, doomed=doomed))

    def clear(self) -> None:
        """See Index.clear."""
        self._environment().empty()

    def close(self) -> None:
        """See Index.close."""
        if not self._closed:
            self._closed = True
            release(self._shared)

    def _environment(self) -> Environment:
        if self._closed:
            raise ValueError("the index is closed")
        if self._shared.pid != os.getpid():  # forked: the parent's environment must not be touched
            self._shared = _open_environment(self._shared.directory, self._shared.repository_id, self._id_bytes)
        return self._shared

    def _encode(self, rows: Sequence[Row]) -> list[_Item]:
        """Chunk ids and locations, less the pack number."""
        self._check_widths([row.chunk_id for row in rows])
        self._check_widths([base_id for row in rows for base_id in row.base_ids])
        return sorted({(row.chunk_id, _encode_row(row)) for row in rows})

    def _check_widths(self, ids: Iterable[ChunkId]) -> None:
        for chunk_id in ids:
            if len(chunk_id) != self._id_bytes:
                raise ValueError(f"expected a chunk id of {self._id_bytes} bytes, found {len(chunk_id)}")


# ---- inside a transaction ----------------------------------------------------------------------------------


def _look_up(transaction: Transaction, databases: Databases, *, ids: Sequence[ChunkId]) -> dict[bytes, list[Location]]:
    pack_ids: dict[bytes, PackId] = {}
    found: dict[bytes, list[Location]] = {}
    for chunk_id, location in transaction.cursor(databases[_LOCATIONS]).getmulti(ids, dupdata=True):
        number = location[: _NUMBER.size]
        if number not in pack_ids:
            pack_ids[number] = _pack_id(transaction.get(number, db=databases[_NUMBERS]))
        found.setdefault(chunk_id, []).append(Location(pack_ids[number], _decode_row(ChunkId(chunk_id), location)))
    return found


def _pack_ids(transaction: Transaction, databases: Databases) -> frozenset[PackId]:
    return frozenset(_pack_id(key) for key in transaction.cursor(databases[_PACKS]).iternext(values=False))


def _unknown(transaction: Transaction, databases: Databases, *, pack_keys: Iterable[bytes]) -> list[bytes]:
    return [key for key in pack_keys if transaction.get(key, db=databases[_PACKS]) is None]


def _put_tables(transaction: Transaction, databases: Databases, *, tables: Mapping[bytes, Sequence[_Item]]) -> None:
    packs, numbers = databases[_PACKS], databases[_NUMBERS]
    last = transaction.cursor(numbers)
    next_number = int.from_bytes(last.key(), "big") + 1 if last.last() else 0
    items: list[_Item] = []
    for pack_key, rows in tables.items():
        if transaction.get(pack_key, db=packs) is not None:
            continue  # another process was faster
        number = _NUMBER.pack(next_number)
        next_number += 1
        transaction.put(pack_key, number + len(rows).to_bytes(8, "big"), db=packs)
        transaction.put(number, pack_key, db=numbers)
        items += [(chunk_id, number + location) for chunk_id, location in rows]
    # In the order of the tree each page is touched once, however many tables there are.
    transaction.cursor(databases[_LOCATIONS]).putmulti(sorted(items))


@dataclass(frozen=True, slots=True)
class _Doomed:
    """What goes with some packs: their numbers, and every location that carries one."""

    numbers: dict[bytes, bytes]
    items: list[_Item]


def _scan(transaction: Transaction, databases: Databases, *, pack_keys: Iterable[bytes]) -> _Doomed:
    numbers: dict[bytes, bytes] = {}
    row_count = 0
    for key in pack_keys:
        value = transaction.get(key, db=databases[_PACKS])
        if value is not None:
            number, rows = _PACK.unpack(value)
            numbers[key] = _NUMBER.pack(number)
            row_count += rows
    wanted, width = frozenset(numbers.values()), _NUMBER.size
    every = transaction.cursor(databases[_LOCATIONS]).iternext() if row_count else ()
    items = islice((item for item in every if item[1][:width] in wanted), row_count)
    return _Doomed(numbers, list(items))


def _delete(transaction: Transaction, databases: Databases, *, doomed: _Doomed) -> list[bytes]:
    """Delete packs; returns those that have another number since the scan (forgotten and added by somebody
    else).
    """
    packs = databases[_PACKS]
    found = {key: transaction.get(key, b"", db=packs)[: _NUMBER.size] for key in doomed.numbers}
    gone = {number for key, number in doomed.numbers.items() if found[key] == number}
    for chunk_id, location in doomed.items:
        if location[: _NUMBER.size] in gone:
            transaction.delete(chunk_id, location, db=databases[_LOCATIONS])
    for key, number in doomed.numbers.items():
        if number in gone:
            transaction.delete(key, db=packs)
            transaction.delete(number, db=databases[_NUMBERS])
    return [key for key, number in found.items() if number and number not in gone]


# ---- bytes -------------------------------------------------------------------------------------------------


def _encode_row(row: Row) -> bytes:
    """A location less its pack number."""
    if len(row.chain) > CHAIN_LENGTH_MAX:
        raise ValueError(f"expected a codec chain of at most {CHAIN_LENGTH_MAX}, found {row.chain}")
    fixed = _LOCATION.pack(
        row.offset,
        row.stored_bytes,
        row.raw_bytes,
        row.checksum,
        bytes(row.chain),
        row.kind,
        row.depth,
        _IN_RUN if row.in_run else 0,
    )
    return fixed + b"".join(row.base_ids)


def _decode_row(chunk_id: ChunkId, location: bytes) -> Row:
    """Raises DamageError."""
    bases, n = location[_BASE_AT:], len(chunk_id)
    odd = len(location) < _BASE_AT or len(bases) % n or len(bases) > BASES_MAX * n
    if odd or location[_KIND_AT] not in _KINDS:
        raise DamageError(f"index entry of chunk {chunk_id.hex()}: {location.hex()} is no location")
    offset, stored, raw, checksum, chain, kind, depth, flags = _LOCATION.unpack_from(location, _NUMBER.size)
    return Row(
        chunk_id,
        offset,
        stored,
        raw,
        checksum,
        tuple(chain.rstrip(b"\0")),
        _KINDS[kind],
        depth,
        tuple(ChunkId(bases[at : at + n]) for at in range(0, len(bases), n)),
        bool(flags & _IN_RUN),
    )


def _pack_key(pack_id: PackId) -> bytes:
    key = bytes.fromhex(pack_id)
    if len(key) != PACK_ID_BYTES:
        raise ValueError(f"expected a pack id of {2 * PACK_ID_BYTES} hex digits, found {pack_id!r}")
    return key


def _pack_id(key: bytes | None) -> PackId:
    if key is None or len(key) != PACK_ID_BYTES:
        raise DamageError(f"the index has no pack id of {PACK_ID_BYTES} bytes where one is needed, found {key!r}")
    return PackId(key.hex())
