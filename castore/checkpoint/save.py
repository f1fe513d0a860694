"""Save a state: plan, write packs, publish the snapshot, check, move the branch.

The order of writes is the product (ARCHITECTURE.md draws it):

    lease → list packs → hash → write packs (durable) → index → snapshot file (durable) → check → branch → check →
    report

The commit is the move of the branch. A crash before it leaves every earlier snapshot and the branch as they were; what
it leaves besides is garbage for gc. "Check" reads the condemned set and the pack listing again, after the root is
visible: a chunk that this save did not write because a pack had it, and whose pack is gone or condemned by now, is
written again.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from castore.checkpoint.plan import HashedState, Write, hash_state, new_bytes, plan_manifest, plan_writes
from castore.checkpoint.request import SaveRequest, check_request
from castore.checkpoint.session import WriteSession
from castore.errors import CastoreError, ConflictError, LowSpaceWarning, StaleSaveWarning, note_moved
from castore.format.identity import state_id
from castore.format.layout import snapshot_name, tag_name
from castore.format.manifest import Entry, Kind
from castore.format.snapshot import SnapshotRecord
from castore.ids import SnapshotId
from castore.leases import check_not_condemned, is_condemned, writer_lease
from castore.manifests import leaf_table
from castore.marks import note_orphan
from castore.progress import Meter
from castore.refs import check_free, check_tag_free, create_tag, delete_ref_file, move_branch, read_branch, resolve
from castore.repository import Handle
from castore.snapshots import Snapshot, make_snapshot, read_record, write_record
from castore.tensors import FlatState, flatten

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all); from the saving thread, so it must be quick."""

NONCE_BYTES = 8


def save(handle: Handle, state: Any, request: SaveRequest, *, progress: Progress | None = None) -> Snapshot:
    """Save `state` and move the branch; returns when all of it is durable.

    Reads the state's memory without copying it: nobody may change it meanwhile. Raises UnsupportedLeafError,
    UsageError, ConflictError, NoSpaceError or StorageError; the branch is then where it was, unless a note of the error
    says that it has moved (a tag could not be made, a directory not be synced, a warning was made an error).
    """
    request = check_request(request)
    return save_flat(handle, flatten(state, allow_pickle=request.allow_pickle), request, progress=progress)


def save_flat(handle: Handle, flat: FlatState, request: SaveRequest, *, progress: Progress | None) -> Snapshot:
    """Save a flat state, live or staged; `request` has been checked. Else as `save`."""
    handle.config.check_features("write", where=handle.backend.location)
    now_ns = handle.clock()
    lease_s = handle.config.options.lease_s
    with writer_lease(handle.backend, purpose="save", now_ns=now_ns, lease_s=lease_s) as lease:
        parent = _expected_head(handle, request)
        for tag in request.tags:
            check_tag_free(handle.backend, tag)
        raw_bytes = sum(payload.raw_bytes for payload in flat.payloads if payload)
        meter = Meter(progress, 2 * raw_bytes, beat=lease.beat)
        handle.bases.set_budget(handle.base_memory_bytes)
        hashed = hash_state(flat, handle.hasher, progress=meter.advance)
        session = WriteSession(handle, now_ns)
        try:
            previous = _read_parent(handle, parent)
            record = _write_chunks(session, hashed, request, parent=parent, previous=previous, meter=meter)
            snapshot_id = _publish(session, record)
            session.remember_bases({chunk_id for leaf in hashed.leaves for chunk_id in leaf.ids})
            meter.finish()
            snapshot_id = _commit(session, request, parent, record, snapshot_id)
            handle.note_written(snapshot_id, hashed.entries)
        except BaseException:
            session.abort()
            raise
    try:
        if previous is not None:
            _warn_if_stale(request, hashed, previous)
    except BaseException as error:  # warnings are errors here, or Ctrl-C struck
        note_moved(error, request.branch, snapshot_id)
        raise
    return make_snapshot(snapshot_id, record, lambda _: leaf_table(hashed.entries, handle.hasher))


@dataclass(frozen=True, slots=True)
class _Parent:
    head: SnapshotId | None
    """Where the branch must be for the move to succeed."""
    parents: tuple[SnapshotId, ...]


def _expected_head(handle: Handle, request: SaveRequest) -> _Parent:
    """The head that the branch must have: what this handle last saw, else what it finds now."""
    seen = handle.seen_head(request.branch) if request.parent is None else None
    head = seen.snapshot_id if seen is not None else read_branch(handle.backend, request.branch)
    if head is None:
        check_free(handle.backend, request.branch, as_tag=False)
    if request.parent is not None:
        # After the head: a branch that moves in between makes a conflict, not a history without that move.
        continued = resolve(handle.backend, request.parent)
        check_not_condemned(handle.backend, continued)
        return _Parent(head, (continued,))
    if seen is None:
        handle.note_head(request.branch, head)
    return _Parent(head, (head,) if head is not None else ())


def _publish(session: WriteSession, record: SnapshotRecord) -> SnapshotId:
    """Make the snapshot visible, durably, then check that all of it is there: the file itself too.

    A collector that took us for dead, because we slept past our lease, may have condemned the file as an orphan. What
    was condemned never comes back under its name, so the record then gets another one.
    """
    while True:
        snapshot_id = write_record(session.handle.backend, record, session.handle.hasher)
        session.heal()
        if not _is_going(session, snapshot_id):
            return snapshot_id
        record = replace(record, nonce=os.urandom(NONCE_BYTES))


def _is_going(session: WriteSession, snapshot_id: SnapshotId) -> bool:
    # The condemned set before the file, as in WriteSession.heal.
    backend = session.handle.backend
    return is_condemned(backend, snapshot_id) or backend.stat(snapshot_name(snapshot_id)) is None


def _commit(
    session: WriteSession, request: SaveRequest, parent: _Parent, record: SnapshotRecord, snapshot_id: SnapshotId
) -> SnapshotId:
    """Move the branch, then make the tags, then check; returns the id that the branch names in the end."""
    handle, branch = session.handle, request.branch
    try:
        if parent.head is not None and parent.head not in parent.parents:
            note_orphan(handle.backend, parent.head, now_ns=session.now_ns)  # the branch goes elsewhere
        if not move_branch(handle.backend, branch, expected_id=parent.head, new_id=snapshot_id, now_ns=session.now_ns):
            found = read_branch(handle.backend, branch)
            raise ConflictError(branch, snapshot_id=snapshot_id, expected_id=parent.head, found_id=found)
        handle.note_head(branch, snapshot_id)
        for tag in request.tags:
            create_tag(handle.backend, tag, snapshot_id, now_ns=session.now_ns)
        session.heal()
        while _is_going(session, snapshot_id):
            snapshot_id = _replace(session, request, record, snapshot_id)
    except BaseException as error:
        # The branch may have moved all the same: its last sync failed, Ctrl-C struck, or a tag could not be made.
        with suppress(CastoreError):
            if read_branch(handle.backend, branch) == snapshot_id:
                handle.note_head(branch, snapshot_id)
                note_moved(error, branch, snapshot_id)
        raise
    return snapshot_id


def _replace(session: WriteSession, request: SaveRequest, record: SnapshotRecord, going_id: SnapshotId) -> SnapshotId:
    """Publish the snapshot under another name and move the refs of this save there."""
    handle, branch, now_ns = session.handle, request.branch, session.now_ns
    snapshot_id = _publish(session, replace(record, nonce=os.urandom(NONCE_BYTES)))
    if not move_branch(handle.backend, branch, expected_id=going_id, new_id=snapshot_id, now_ns=now_ns):
        found = read_branch(handle.backend, branch)
        raise ConflictError(branch, snapshot_id=snapshot_id, expected_id=going_id, found_id=found)
    handle.note_head(branch, snapshot_id)
    for tag in request.tags:
        delete_ref_file(handle.backend, tag_name(tag))
        create_tag(handle.backend, tag, snapshot_id, now_ns=now_ns)
    session.heal()
    return snapshot_id


def _write_chunks(
    session: WriteSession,
    hashed: HashedState,
    request: SaveRequest,
    *,
    parent: _Parent,
    previous: _Previous | None,
    meter: Meter,
) -> SnapshotRecord:
    """Write what is missing and describe the snapshot; nothing is visible yet but packs that nobody refers to."""
    handle = session.handle
    manifest = plan_manifest(hashed.entries, handle.hasher)
    sources = dict(manifest.sources)
    for leaf in hashed.leaves:
        sources.update(zip(leaf.ids, leaf.sources, strict=True))
    present = session.find_present(sources)
    if previous is not None:
        session.plan_deltas(hashed.entries, previous.entries)
    session.plan_copies(hashed.leaves)
    writes = plan_writes(hashed.leaves, present, compression=handle.config.options.compression)
    parts = [
        Write(((part_id, source),), as_run=False)
        for part_id, source in manifest.sources.items()
        if part_id not in present
    ]
    fresh_bytes = new_bytes(writes, present)
    meter.advance(max(0, hashed.raw_bytes - fresh_bytes))  # what needs no writing
    _warn_if_tight(handle, fresh_bytes)
    stored_bytes = session.write([*writes, *parts], progress=meter.advance)
    return SnapshotRecord(
        state_id(handle.hasher, hashed.entries),
        parent.parents,
        request.branch,
        request.step,
        session.now_ns,
        request.metrics,
        request.metadata,
        request.message,
        hashed.raw_bytes,
        fresh_bytes,
        stored_bytes,
        sum(not entry.is_container for entry in hashed.entries),
        manifest.part_ids,
        software(),
        os.urandom(NONCE_BYTES),
    )


@dataclass(frozen=True, slots=True)
class _Previous:
    """The snapshot that a save continues."""

    snapshot_id: SnapshotId
    step: int | None
    entries: Sequence[Entry]


def _read_parent(handle: Handle, parent: _Parent) -> _Previous | None:
    """The parent; None without one, or when it cannot be read: that only costs the differences from it."""
    for snapshot_id in parent.parents:
        with suppress(CastoreError):
            record = read_record(handle.backend, snapshot_id)
            entries = handle.written_entries(snapshot_id) or handle.manifests.entries(record)
            return _Previous(snapshot_id, record.step, entries)
    return None


def _warn_if_tight(handle: Handle, fresh_bytes: int) -> None:
    """Say so before the writing starts: a save that ends at a full disk has cost its time, and training goes on without
    a snapshot. How far the new chunks shrink is not known yet.
    """
    free_bytes = handle.backend.free_bytes()
    if free_bytes is not None and free_bytes < fresh_bytes:
        warnings.warn(
            f"{handle.backend.location}: this save has {fresh_bytes} new bytes before compression, and {free_bytes} "
            "are free: it may not fit; `castore forget` and `castore gc` make room",
            LowSpaceWarning,
            stacklevel=6,  # the caller of Repository.save
        )


def _warn_if_stale(request: SaveRequest, hashed: HashedState, previous: _Previous) -> None:
    """Say so when the step moved and no tensor did: a loop that trains a copy of what it saves has cost people days."""
    if request.step is None or previous.step is None or request.step == previous.step:
        return
    now, before = _arrays(hashed.entries), _arrays(previous.entries)
    if now and now == before:
        warnings.warn(
            f"step {request.step}: all {len(now)} tensors are bit for bit those of step {previous.step} (snapshot "
            f"{previous.snapshot_id[:12]}); is the state that is saved the one that is trained?",
            StaleSaveWarning,
            stacklevel=5,  # the caller of Repository.save
        )


def _arrays(entries: Iterable[Entry]) -> dict[str, bytes]:
    """Path → chunk ids of every array but step counters and the like, which live in the manifest."""
    return {entry.path: entry.chunks for entry in entries if entry.chunks and entry.kind in _ARRAYS}


_ARRAYS = frozenset({Kind.TENSOR, Kind.NDARRAY, Kind.STORAGE})


@cache
def software() -> str:
    """What wrote a snapshot, for its record."""
    with suppress(PackageNotFoundError):
        return f"castore {version('castore')}"
    return "castore (source tree)"
