"""What the proofs do to a repository, in one place."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from castore.api import Repository
from castore.checkpoint.undelete import undelete as undelete_refs
from castore.closure import closure
from castore.format.pack import ALIGN_BYTES, HEADER_BYTES, TRAILER_BYTES, record_header_bytes, row_bytes
from castore.ids import ChunkId, SnapshotId
from castore.maintenance.forget import forget_named
from castore.maintenance.gc.collect import GcRequest
from castore.maintenance.gc.collect import collect as collect_once
from castore.maintenance.gc.report import GcReport
from castore.maintenance.thin import thin_named
from castore.manifests import split_ids
from castore.snapshots import read_record

RECORD_OVERHEAD_BYTES = record_header_bytes(16) + row_bytes(16) + ALIGN_BYTES
PACK_OVERHEAD_BYTES = HEADER_BYTES + TRAILER_BYTES


def collect(
    repo: Repository,
    *,
    monotonic_s: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], object] = time.sleep,
) -> GcReport:
    """Collect garbage as thoroughly as can be: every pack with a dead byte is rewritten."""
    return collect_once(repo.handle, GcRequest(repack_below=1.0), monotonic_s=monotonic_s, sleep=sleep)


def forget(repo: Repository, snapshot_ids: Sequence[str]) -> None:
    """Forget snapshots by id."""
    forget_named(repo.handle, snapshot_ids)


def undelete(repo: Repository, snapshot_ids: Sequence[str]) -> None:
    """Bring forgotten snapshots back."""
    undelete_refs(repo.handle, snapshot_ids)


def thin(repo: Repository, globs: Sequence[str], snapshot_ids: Sequence[str]) -> None:
    """Drop leaves of snapshots that are kept."""
    thin_named(repo.handle, globs, snapshot_ids)


def live_bytes(repo: Repository) -> tuple[int, int]:
    """Stored bytes of every record that a snapshot needs, bases included, and what they may take beyond that: a header,
    a table row and padding each, and the frame of each pack. Counted from the manifests, not by gc's own ledger.
    """
    handle = repo.handle
    needed = {chunk_id for snapshot in repo.snapshots() for chunk_id in _needed_by(repo, snapshot.id)}
    packs = handle.store.refresh()
    rests_on = closure(needed, handle.store, frozenset())
    assert rests_on.keys() == needed
    records = {(hit.pack_id, hit.row.offset): hit.row.stored_bytes for hits in rests_on.values() for hit in hits}
    return sum(records.values()), len(records) * RECORD_OVERHEAD_BYTES + len(packs) * PACK_OVERHEAD_BYTES


def _needed_by(repo: Repository, snapshot_id: SnapshotId) -> set[ChunkId]:
    handle = repo.handle
    record = read_record(handle.backend, snapshot_id)
    id_bytes = handle.hasher.digest_bytes
    found = set(record.part_ids)
    for entry in handle.manifests.entries(record):
        found.update(entry.chunk_ids(id_bytes))
        found.update(split_ids(entry.id_lists or b"", id_bytes))
    return found
