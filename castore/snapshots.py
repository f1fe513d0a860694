"""Snapshots: read and write their files, follow their parents, and read their leaf tables.

A `Snapshot` is a value. Its manifest is only read when `leaves` is asked for.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from castore.backend.base import Backend
from castore.errors import FormatError, NotFoundError, StorageError, UnknownRefError, UsageError
from castore.format.identity import entry_digest
from castore.format.layout import SNAPSHOTS, parse_snapshot_name, snapshot_name
from castore.format.manifest import Entry, Kind, chunk_count, decode_id_list, decode_part
from castore.format.snapshot import SnapshotRecord, decode_snapshot, encode_snapshot
from castore.hashing import Hasher
from castore.ids import ChunkId, SnapshotId, StateId
from castore.marks import Thinning, forgotten_ids, read_forgotten
from castore.options import PART_CHUNKS_MAX, SNAPSHOT_BYTES_MAX
from castore.store import ChunkStore

_CACHED_PARTS_MAX = 256


@dataclass(frozen=True, slots=True)
class Leaf:
    """One row of a snapshot's leaf table."""

    path: str
    kind: str
    """"tensor", "ndarray", "float", "alias", …"""
    dtype: str
    """Of arrays: torch's name or numpy's code; else empty."""
    shape: tuple[int, ...]
    raw_bytes: int
    chunk_count: int
    """0 for a leaf that lives in the manifest."""
    digest: str
    """Hex digest of the leaf's bytes: equal digests, equal bytes. Empty for an alias."""
    dropped: bool = False
    """Whether thinning took it from this snapshot; its digest stays."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The immutable record of one training state."""

    id: SnapshotId
    state_id: StateId
    """Names the content: two states are bit-equal when their state ids are."""
    parents: tuple[SnapshotId, ...]
    branch: str
    step: int | None
    created_at: datetime
    """When the save was asked for, in UTC."""
    metrics: Mapping[str, float] = field(hash=False)
    metadata: Mapping[str, Any] = field(hash=False)
    message: str
    raw_bytes: int
    """Bytes of all leaves."""
    new_bytes: int
    """Raw bytes of the chunks that no pack held before."""
    stored_bytes: int
    """Bytes that this save added to packs, headers and tables included."""
    leaf_count: int
    software: str
    _read_leaves: Callable[[SnapshotId], tuple[Leaf, ...]] = field(repr=False, compare=False)
    dropped: tuple[str, ...] = field(default=(), compare=False)
    """Globs of the leaves that thinning dropped, as of when this value was made; empty: the snapshot is whole."""

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """The leaf table, containers left out; reads the manifest and no tensor. Raises DamageError."""
        return self._read_leaves(self.id)


def make_snapshot(
    snapshot_id: SnapshotId,
    record: SnapshotRecord,
    read_leaves: Callable[[SnapshotId], tuple[Leaf, ...]],
    thinning: Thinning | None = None,
) -> Snapshot:
    """The public value for a record."""
    return Snapshot(
        snapshot_id,
        record.state_id,
        record.parents,
        record.branch,
        record.step,
        datetime.fromtimestamp(record.time_ns / 1e9, UTC),
        record.metrics,
        record.metadata,
        record.message,
        record.raw_bytes,
        record.new_bytes,
        record.stored_bytes,
        record.leaf_count,
        record.software,
        read_leaves,
        thinning.dropped if thinning is not None else (),
    )


def write_record(backend: Backend, record: SnapshotRecord, hasher: Hasher) -> SnapshotId:
    """Make the snapshot file durable; returns its id. Raises UsageError when it would be too large to be read again."""
    snapshot_id, data = encode_snapshot(record, hasher)
    if len(data) > SNAPSHOT_BYTES_MAX:
        raise UsageError(
            f"metadata: expected a snapshot file of at most {SNAPSHOT_BYTES_MAX} bytes, found {len(data)}; "
            "save large values as part of the state"
        )
    decode_snapshot(data, where=snapshot_name(snapshot_id), expected_id=snapshot_id)
    if not backend.put_if_absent(snapshot_name(snapshot_id), data):
        raise StorageError(
            f"snapshot {snapshot_id} is there already; its nonce repeats, so this machine's randomness is broken"
        )
    return snapshot_id


def read_record(backend: Backend, snapshot_id: SnapshotId) -> SnapshotRecord:
    """The record of one snapshot. Raises UnknownRefError when there is none, or DamageError."""
    name = snapshot_name(snapshot_id)
    try:
        data = backend.read(name, max_bytes=SNAPSHOT_BYTES_MAX)
    except NotFoundError as error:
        raise UnknownRefError(f"{backend.location} has no snapshot {snapshot_id}") from error
    return decode_snapshot(data, where=name, expected_id=snapshot_id)


def list_snapshot_ids(backend: Backend, *, prefix: str = "") -> Iterator[SnapshotId]:
    """Ids of the snapshots that are there, in order, those that begin with `prefix`."""
    for info in backend.list(SNAPSHOTS + prefix):
        snapshot_id = parse_snapshot_name(info.name)
        if snapshot_id is not None:
            yield snapshot_id


def ancestry(backend: Backend, start: SnapshotId) -> Iterator[tuple[SnapshotId, SnapshotRecord]]:
    """The snapshot and its first parents, newest first; ends at the first one or where a parent is gone.

    Forgotten snapshots are passed over, whether or not they have been collected, and history goes on behind them; only
    `start` is taken as it is.
    """
    current: SnapshotId | None = start
    forgotten: frozenset[SnapshotId] | None = None
    passed: set[SnapshotId] = set()
    while current is not None:
        try:
            record = read_record(backend, current)
        except UnknownRefError:
            if current == start:
                raise
            return
        yield current, record
        current = record.parents[0] if record.parents else None
        while current is not None and current not in passed:
            if forgotten is None:
                forgotten = forgotten_ids(backend)
            mark = read_forgotten(backend, current) if current in forgotten else None
            if mark is None:
                break
            passed.add(current)  # a snapshot cannot name itself as an ancestor, a marker might
            current = mark.parents[0] if mark.parents else None
        else:
            return


class ManifestReader:
    """Reads manifests through the chunk store; parts shared by snapshots are decoded once. Thread-safe."""

    def __init__(self, store: ChunkStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._parts: OrderedDict[ChunkId, tuple[Entry, ...]] = OrderedDict()

    def entries(self, record: SnapshotRecord) -> list[Entry]:
        """All entries in depth-first order, id lists resolved. Raises DamageError."""
        return [entry for part_id in record.part_ids for entry in self.part(part_id)]

    def part(self, part_id: ChunkId) -> tuple[Entry, ...]:
        """The entries of one part."""
        with self._lock:
            if part_id in self._parts:
                self._parts.move_to_end(part_id)
                return self._parts[part_id]
        where = f"manifest part {part_id.hex()}"
        if len(part_id) != self._store.hasher.digest_bytes:
            raise FormatError(f"{where}: expected an id of {self._store.hasher.digest_bytes} bytes: a foreign snapshot")
        raw = self._store.get(part_id)
        decoded = decode_part(raw, id_bytes=len(part_id), where=where)
        entries = tuple(self._resolved(entry, len(part_id), where) for entry in decoded)
        with self._lock:
            self._parts[part_id] = entries
            if len(self._parts) > _CACHED_PARTS_MAX:
                self._parts.popitem(last=False)
        return entries

    def _resolved(self, entry: Entry, id_bytes: int, where: str) -> Entry:
        if entry.id_lists is None:
            return entry
        remaining = chunk_count(entry.raw_bytes)
        ids = []
        for list_id in split_ids(entry.id_lists, id_bytes):
            count = min(remaining, PART_CHUNKS_MAX)
            ids.append(
                decode_id_list(bytes(self._store.get(list_id)), expected_count=count, id_bytes=id_bytes, where=where)
            )
            remaining -= count
        return replace(entry, chunks=b"".join(ids))


def split_ids(packed: bytes, id_bytes: int) -> list[ChunkId]:
    """Concatenated ids, taken apart."""
    return [ChunkId(packed[start : start + id_bytes]) for start in range(0, len(packed), id_bytes)]


def leaf_table(entries: Sequence[Entry], hasher: Hasher, thinning: Thinning | None = None) -> tuple[Leaf, ...]:
    """The leaves among the entries, hidden storages left out."""
    return tuple(
        _leaf(entry, hasher, dropped=thinning is not None and thinning.drops(entry.path))
        for entry in entries
        if not entry.is_container and entry.kind is not Kind.STORAGE
    )


def _leaf(entry: Entry, hasher: Hasher, *, dropped: bool) -> Leaf:
    digest = "" if entry.kind is Kind.ALIAS else entry_digest(hasher, entry).hex()
    count = len(entry.chunks or b"") // hasher.digest_bytes
    kind = entry.kind.name.lower()
    return Leaf(entry.path, kind, entry.dtype, entry.shape, entry.raw_bytes, count, digest, dropped)


def check_paths(entries: Sequence[Entry], *, where: str) -> None:
    """A manifest names every path once. Raises FormatError."""
    seen: set[str] = set()
    for entry in entries:
        if entry.path in seen:
            raise FormatError(f"{where}: path {entry.path!r} appears twice")
        seen.add(entry.path)
