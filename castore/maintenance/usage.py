"""Where the bytes of a repository are: by snapshot, by group of leaves, by codec, and what is no payload.

Every byte of a pack file is counted once:

    pack files = leaves (by group) + manifests + unreferenced + overhead

A chunk that several leaves hold counts for the group that is seen first, newest snapshot first; a second copy
of it in another pack is unreferenced. Overhead is headers, tables, trailers and padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from castore.codec.registry import chain_name
from castore.errors import CastoreError, UnknownRefError
from castore.format.layout import CACHE, PACKS, SNAPSHOTS, pack_name, parse_pack_name, parse_snapshot_name
from castore.format.pack import Row
from castore.format.snapshot import SnapshotRecord
from castore.ids import ChunkId, PackId, SnapshotId
from castore.maintenance.parts import Part, PartReader
from castore.maintenance.tables import open_rows
from castore.repository import Handle
from castore.snapshots import read_record, split_ids

Progress = Callable[[int, int], None]
"""Called with (files read, files in all)."""

MANIFEST_GROUP = "~manifest"
"""Not a group of leaves: parts and id lists. No path begins like this."""
_SHARED = SnapshotId("")
"""Owner of a chunk that several snapshots need."""


@dataclass(frozen=True, slots=True)
class SnapshotUsage:
    """One snapshot."""

    snapshot_id: SnapshotId
    branch: str
    step: int | None
    time_ns: int
    raw_bytes: int
    """Bytes of its leaves: what a plain checkpoint would hold."""
    new_bytes: int
    """Raw bytes that no pack held before it was saved."""
    stored_bytes: int
    """Bytes that its save added to packs."""
    exclusive_bytes: int
    """Stored bytes of chunks that no other snapshot needs: what gc could free if it were forgotten."""


@dataclass(frozen=True, slots=True)
class GroupUsage:
    """All leaves whose paths begin alike."""

    path: str
    raw_bytes: int
    """Summed over all snapshots: what as many plain checkpoints would hold."""
    stored_bytes: int
    """In packs, each chunk once."""


@dataclass(frozen=True, slots=True)
class CodecUsage:
    """All records of one codec chain, also those that nobody needs."""

    name: str
    chunk_count: int
    raw_bytes: int
    stored_bytes: int


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes of a repository."""

    snapshots: tuple[SnapshotUsage, ...]
    """Newest first."""
    groups: tuple[GroupUsage, ...]
    """Largest first."""
    codecs: tuple[CodecUsage, ...]
    """Largest first."""
    raw_bytes: int
    """Of all snapshots together."""
    pack_count: int
    pack_bytes: int
    """Of the files."""
    leaf_bytes: int
    """Stored payload of chunks that snapshots need."""
    manifest_bytes: int
    """Stored payload of manifest parts and id lists."""
    unreferenced_bytes: int
    """Stored payload that no snapshot needs: orphans of crashed saves, second copies. gc frees it."""
    overhead_bytes: int
    """Headers, tables, trailers and padding of packs."""
    snapshot_bytes: int
    """Of the snapshot files."""
    cache_bytes: int
    """Of the index; it may be deleted."""
    unreadable: tuple[str, ...]
    """Files and manifest parts that are damaged: what they hold is missing above."""

    @property
    def total_bytes(self) -> int:
        """All files."""
        return self.pack_bytes + self.snapshot_bytes + self.cache_bytes

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self) | {"total_bytes": self.total_bytes}


def usage(handle: Handle, *, depth: int = 1, progress: Progress | None = None) -> Usage:
    """Add up where the bytes are; `depth` levels of a path make a group (0: one group of all).

    Reads snapshot files, manifests and pack tables, and no payload of a leaf. Damage goes to `unreadable`.
    """
    unreadable: list[str] = []
    records, snapshot_bytes = _read_records(handle, unreadable)
    pack_files = {
        pack_id: info.size_bytes for info in handle.backend.list(PACKS) if (pack_id := parse_pack_name(info.name))
    }
    meter = _Meter(progress, len(records) + len(pack_files))
    tally = _Tally(PartReader(handle), id_bytes=handle.hasher.digest_bytes, depth=depth)
    for snapshot_id, record in records.items():
        tally.add_snapshot(snapshot_id, record.part_ids)
        meter.step()
    for pack_id in sorted(pack_files):
        tally.add_rows(_read_rows(handle, pack_id, unreadable))
        meter.step()
    unreadable.extend(tally.unreadable)
    stored, groups = tally.stored, tally.group_usage()
    leaf_bytes = sum(group.stored_bytes for group in groups)
    pack_bytes = sum(pack_files.values())
    return Usage(
        tuple(_snapshot_usage(snapshot_id, record, tally.exclusive) for snapshot_id, record in records.items()),
        groups,
        tally.codec_usage(),
        sum(record.raw_bytes for record in records.values()),
        len(pack_files),
        pack_bytes,
        leaf_bytes,
        stored.get(MANIFEST_GROUP, 0),
        tally.unreferenced_bytes,
        pack_bytes - leaf_bytes - stored.get(MANIFEST_GROUP, 0) - tally.unreferenced_bytes,
        snapshot_bytes,
        sum(info.size_bytes for info in handle.backend.list(CACHE)),
        tuple(unreadable),
    )


def _read_records(handle: Handle, unreadable: list[str]) -> tuple[dict[SnapshotId, SnapshotRecord], int]:
    """The records, newest first, and the bytes of their files."""
    records: dict[SnapshotId, SnapshotRecord] = {}
    total = 0
    for info in handle.backend.list(SNAPSHOTS):
        snapshot_id = parse_snapshot_name(info.name)
        if snapshot_id is None or len(snapshot_id) != 2 * handle.hasher.digest_bytes:
            continue
        try:
            records[snapshot_id] = read_record(handle.backend, snapshot_id)
        except UnknownRefError:
            continue
        except CastoreError as error:
            unreadable.append(f"{info.name}: {error}")
        total += info.size_bytes
    return dict(sorted(records.items(), key=lambda item: item[1].time_ns, reverse=True)), total


def _read_rows(handle: Handle, pack_id: PackId, unreadable: list[str]) -> list[Row]:
    rows, error = open_rows(handle.backend, pack_id, handle.hasher)
    if error:
        unreadable.append(f"{pack_name(pack_id)}: {error}")
    return rows


def _snapshot_usage(
    snapshot_id: SnapshotId, record: SnapshotRecord, exclusive: Mapping[SnapshotId, int]
) -> SnapshotUsage:
    return SnapshotUsage(
        snapshot_id,
        record.branch,
        record.step,
        record.time_ns,
        record.raw_bytes,
        record.new_bytes,
        record.stored_bytes,
        exclusive.get(snapshot_id, 0),
    )


def group_of(path: str, depth: int) -> str:
    """The first `depth` levels of a path."""
    return "/".join(path.split("/")[:depth])


@dataclass(frozen=True, slots=True)
class _PartUse:
    """What one part names: its chunks by group, and raw bytes by group."""

    chunks: dict[ChunkId, str]
    raw_bytes: dict[str, int]


class _Tally:
    """Adds up snapshots first, then packs."""

    def __init__(self, parts: PartReader, *, id_bytes: int, depth: int) -> None:
        self._parts = parts
        self._id_bytes = id_bytes
        self._depth = depth
        self._uses: dict[ChunkId, _PartUse] = {}
        self._owners: dict[ChunkId, SnapshotId] = {}
        self._groups: dict[ChunkId, str] = {}
        self._raw: dict[str, int] = {}
        self._codecs: dict[str, list[int]] = {}
        self._counted: set[ChunkId] = set()
        self.stored: dict[str, int] = {}
        self.exclusive: dict[SnapshotId, int] = {}
        self.unreferenced_bytes = 0
        self.unreadable: list[str] = []

    def add_snapshot(self, snapshot_id: SnapshotId, part_ids: Iterable[ChunkId]) -> None:
        """Note who needs which chunk."""
        for part_id in part_ids:
            if part_id not in self._uses:
                part = self._parts.read(part_id)
                if part.error or part.unresolved:
                    self.unreadable.append(f"manifest part {part_id.hex()}: {part.error or 'an id list is lost'}")
                self._uses[part_id] = self._use(part_id, part)
            use = self._uses[part_id]
            for group, raw_bytes in use.raw_bytes.items():
                self._raw[group] = self._raw.get(group, 0) + raw_bytes
            for chunk_id, group in use.chunks.items():
                if self._owners.setdefault(chunk_id, snapshot_id) != snapshot_id:
                    self._owners[chunk_id] = _SHARED
                self._groups.setdefault(chunk_id, group)

    def _use(self, part_id: ChunkId, part: Part) -> _PartUse:
        chunks: dict[ChunkId, str] = {part_id: MANIFEST_GROUP}
        raw: dict[str, int] = {}
        for entry in part.entries:
            if not entry.has_bytes:
                continue
            group = group_of(entry.path, self._depth)
            raw[group] = raw.get(group, 0) + entry.raw_bytes
            chunks.update((chunk_id, group) for chunk_id in entry.chunk_ids(self._id_bytes))
            chunks.update((list_id, MANIFEST_GROUP) for list_id in split_ids(entry.id_lists or b"", self._id_bytes))
        return _PartUse(chunks, raw)

    def add_rows(self, rows: Iterable[Row]) -> None:
        """Count the records of one pack."""
        for row in rows:
            codec = self._codecs.setdefault(chain_name(row.chain), [0, 0, 0])
            codec[0] += 1
            codec[1] += row.raw_bytes
            codec[2] += row.stored_bytes
            owner = self._owners.get(row.chunk_id)
            if owner is None or row.chunk_id in self._counted:
                self.unreferenced_bytes += row.stored_bytes
                continue
            self._counted.add(row.chunk_id)
            group = self._groups[row.chunk_id]
            self.stored[group] = self.stored.get(group, 0) + row.stored_bytes
            if owner != _SHARED:
                self.exclusive[owner] = self.exclusive.get(owner, 0) + row.stored_bytes

    def group_usage(self) -> tuple[GroupUsage, ...]:
        """Largest first; without the manifests."""
        groups = (self._raw.keys() | self.stored.keys()) - {MANIFEST_GROUP}
        rows = [GroupUsage(group, self._raw.get(group, 0), self.stored.get(group, 0)) for group in groups]
        return tuple(sorted(rows, key=lambda row: (-row.stored_bytes, -row.raw_bytes, row.path)))

    def codec_usage(self) -> tuple[CodecUsage, ...]:
        """Largest first."""
        rows = [CodecUsage(name, *counts) for name, counts in self._codecs.items()]
        return tuple(sorted(rows, key=lambda row: (-row.stored_bytes, row.name)))


class _Meter:
    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def step(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)
