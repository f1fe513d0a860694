"""Where the bytes of a repository are: by snapshot, by group of leaves, by codec, and what is no payload.

Every byte of a pack file is counted once:

    pack files = leaves (by group) + manifests + unreferenced + overhead

A chunk that several leaves hold counts for the group that is seen first, newest snapshot first; a second copy of it in
another pack is unreferenced. A base that no snapshot needs itself counts for what rests on it. Overhead is headers,
tables, trailers and padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from castore.errors import CastoreError, UnknownRefError
from castore.format.layout import (
    CACHE,
    PACKS,
    PARITY,
    QUARANTINE,
    SNAPSHOTS,
    pack_name,
    parse_pack_name,
    parse_snapshot_name,
)
from castore.format.pack import Row
from castore.format.snapshot import SnapshotRecord
from castore.ids import PackId, SnapshotId
from castore.maintenance.parts import PartReader
from castore.maintenance.tables import open_rows
from castore.maintenance.tally import MANIFEST, Tally
from castore.marks import Thinning, forgotten_ids, read_thinning, thinned_ids
from castore.progress import Meter
from castore.refs import list_branches, list_tags
from castore.repository import Handle
from castore.snapshots import read_record

Progress = Callable[[int, int], None]
"""Called with (files read, files in all)."""


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
    """Stored bytes that no other snapshot needs, through bases either: what gc could free if it were forgotten."""


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
    """Stored payload of chunks that snapshots need, and of the bases that those rest on."""
    pinned_bytes: int
    """The part of `leaf_bytes` that is kept only because differences rest on it."""
    manifest_bytes: int
    """Stored payload of manifest parts and id lists."""
    unreferenced_bytes: int
    """Stored payload that no snapshot needs: what was forgotten or thinned, left by crashed saves, second copies. gc
    frees it."""
    overhead_bytes: int
    """Headers, tables, trailers and padding of packs."""
    forgotten_count: int
    """Snapshots that wait for gc: what only they need is unreferenced."""
    snapshot_bytes: int
    """Of the snapshot files."""
    cache_bytes: int
    """Of the index; it may be deleted."""
    parity_bytes: int
    """Of the parity of packs."""
    quarantine_bytes: int
    """Of what repairs put aside; it may be deleted."""
    unreadable: tuple[str, ...]
    """Files and manifest parts that are damaged: what they hold is missing above."""

    @property
    def total_bytes(self) -> int:
        """All files but refs, marks and the like, which are small."""
        return self.pack_bytes + self.parity_bytes + self.snapshot_bytes + self.cache_bytes + self.quarantine_bytes

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self) | {"total_bytes": self.total_bytes}


def usage(handle: Handle, *, depth: int = 1, progress: Progress | None = None) -> Usage:
    """Add up where the bytes are; `depth` levels of a path make a group (0: one group of all).

    Reads snapshot files, manifests and pack tables, and no payload of a leaf. Damage goes to `unreadable`.
    """
    unreadable: list[str] = []
    records, snapshot_bytes = _read_records(handle, unreadable)
    forgotten_count = len(records)
    records = _without_forgotten(handle, records, unreadable)
    forgotten_count -= len(records)
    overlays = _overlays(handle, unreadable)
    pack_files = {
        pack_id: info.size_bytes for info in handle.backend.list(PACKS) if (pack_id := parse_pack_name(info.name))
    }
    meter = Meter(progress, len(records) + len(pack_files))
    tally = Tally(PartReader(handle), id_bytes=handle.hasher.digest_bytes, depth=depth)
    for snapshot_id, record in records.items():
        tally.add_snapshot(snapshot_id, record.part_ids, overlays.get(snapshot_id))
        meter.advance()
    for pack_id in sorted(pack_files):
        tally.add_rows(_read_rows(handle, pack_id, unreadable))
        meter.advance()
    totals = tally.totals()
    groups = tuple(GroupUsage(path, raw, stored) for path, (raw, stored) in totals.groups.items() if path != MANIFEST)
    _, manifest_bytes = totals.groups.get(MANIFEST, (0, 0))
    leaf_bytes = sum(group.stored_bytes for group in groups)
    pack_bytes = sum(pack_files.values())
    codecs = (CodecUsage(name, *counts) for name, counts in totals.codecs.items())
    return Usage(
        snapshots=tuple(_snapshot_usage(key, record, totals.exclusive) for key, record in records.items()),
        groups=tuple(sorted(groups, key=lambda group: (-group.stored_bytes, -group.raw_bytes, group.path))),
        codecs=tuple(sorted(codecs, key=lambda codec: (-codec.stored_bytes, codec.name))),
        raw_bytes=sum(record.raw_bytes for record in records.values()),
        pack_count=len(pack_files),
        pack_bytes=pack_bytes,
        leaf_bytes=leaf_bytes,
        pinned_bytes=totals.pinned_bytes,
        manifest_bytes=manifest_bytes,
        unreferenced_bytes=totals.unreferenced_bytes,
        overhead_bytes=pack_bytes - leaf_bytes - manifest_bytes - totals.unreferenced_bytes,
        forgotten_count=forgotten_count,
        snapshot_bytes=snapshot_bytes,
        cache_bytes=_listed_bytes(handle, CACHE),
        parity_bytes=_listed_bytes(handle, PARITY),
        quarantine_bytes=_listed_bytes(handle, QUARANTINE),
        unreadable=(*unreadable, *tally.unreadable),
    )


def _listed_bytes(handle: Handle, prefix: str) -> int:
    return sum(info.size_bytes for info in handle.backend.list(prefix))


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


def _without_forgotten(
    handle: Handle, records: dict[SnapshotId, SnapshotRecord], unreadable: list[str]
) -> dict[SnapshotId, SnapshotRecord]:
    """What is forgotten and named by no ref is as good as gone."""
    gone = set(forgotten_ids(handle.backend))
    for list_refs in (list_branches, list_tags):
        try:
            gone -= {ref.snapshot_id for ref in list_refs(handle.backend)} if gone else set()
        except CastoreError as error:
            unreadable.append(str(error))
    return {snapshot_id: record for snapshot_id, record in records.items() if snapshot_id not in gone}


def _overlays(handle: Handle, unreadable: list[str]) -> Mapping[SnapshotId, Thinning]:
    overlays: dict[SnapshotId, Thinning] = {}
    for snapshot_id in thinned_ids(handle.backend):
        try:
            overlay = read_thinning(handle.backend, snapshot_id)
        except CastoreError as error:
            unreadable.append(str(error))
            continue
        if overlay is not None:
            overlays[snapshot_id] = overlay
    return overlays


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
