"""Branches, tags and orphans: adding and removing roots.

Adding a root obeys the same protocol as a save: a writer lease, publish, then check. What the new root needs and a
collector has condemned is copied out of the condemned packs, verified on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from castore.backend.base import Backend
from castore.checkpoint.plan import chunk_lengths
from castore.chunk_writer import ChunkWriter
from castore.closure import closure
from castore.codec.base import Elements
from castore.errors import ConflictError, DamageError, RefExistsError, SnapshotGoneError, UnknownRefError
from castore.format.layout import branch_name, check_ref_name, tag_name
from castore.format.pack import RecordKind
from castore.format.snapshot import SnapshotRecord
from castore.ids import ChunkId, PackId, SnapshotId
from castore.leases import check_not_condemned, condemned_packs, writer_lease
from castore.manifests import split_ids
from castore.marks import (
    Thinning,
    forgotten,
    forgotten_ids,
    kept_entries,
    note_orphan,
    read_thinning,
    unforget_snapshot,
)
from castore.refs import (
    Ref,
    check_free,
    check_tag_free,
    create_tag,
    delete_ref_file,
    list_branches,
    list_tags,
    move_branch,
    read_branch,
    read_tag,
    resolve,
)
from castore.repository import Handle
from castore.snapshots import Snapshot, list_snapshot_ids, read_record
from castore.store import list_packs

_COPIED = Elements(4, is_float=True)
"""What is copied out of a condemned pack: its element type is not known here, and nearly all state is fp32."""


def make_branch(handle: Handle, name: str, *, at: str | Snapshot, move: bool) -> Ref:
    """Make or move a branch. See `Repository.branch`."""
    handle.config.check_features("write", where=handle.backend.location)
    check_ref_name(name)
    backend, now_ns = handle.backend, handle.clock()
    lease_s = handle.config.options.lease_s
    with writer_lease(backend, purpose="branch", now_ns=now_ns, lease_s=lease_s) as lease:
        listed = list_packs(backend)
        target = resolve(backend, at)
        try:
            found = read_branch(backend, name)
        except DamageError:
            if not move:
                raise
            delete_ref_file(backend, branch_name(name))
            found = None
        if found is not None and not move:
            raise RefExistsError(f"branch {name!r} exists and is at {found[:12]}; move it with move=True (`--move`)")
        if found is None:
            check_free(backend, name, as_tag=False)
        read_record(backend, target)
        check_not_condemned(backend, target)
        if found is not None:
            note_orphan(backend, found, now_ns=now_ns)
        if not move_branch(backend, name, expected_id=found, new_id=target, now_ns=now_ns):
            raise ConflictError(name, snapshot_id=target, expected_id=found, found_id=read_branch(backend, name))
        try:
            _adopt(handle, target, listed=listed, now_ns=now_ns, beat=lease.beat)
        except DamageError:
            move_branch(backend, name, expected_id=target, new_id=found, now_ns=now_ns)
            raise
        handle.note_head(name, target)
    return Ref(name, target, now_ns)


def make_tag(handle: Handle, name: str, *, at: str | Snapshot) -> Ref:
    """Make a tag. See `Repository.tag`."""
    handle.config.check_features("write", where=handle.backend.location)
    check_ref_name(name)
    backend, now_ns = handle.backend, handle.clock()
    lease_s = handle.config.options.lease_s
    with writer_lease(backend, purpose="tag", now_ns=now_ns, lease_s=lease_s) as lease:
        listed = list_packs(backend)
        target = resolve(backend, at)
        check_tag_free(backend, name)
        read_record(backend, target)
        check_not_condemned(backend, target)
        create_tag(backend, name, target, now_ns=now_ns)
        try:
            _adopt(handle, target, listed=listed, now_ns=now_ns, beat=lease.beat)
        except DamageError:
            delete_ref_file(backend, tag_name(name))
            raise
    return Ref(name, target, now_ns)


def remove_branch(handle: Handle, name: str) -> None:
    """Remove a branch. See `Repository.delete_branch`."""
    handle.config.check_features("write", where=handle.backend.location)
    check_ref_name(name)
    _note_end(handle, read_branch, name)
    if not delete_ref_file(handle.backend, branch_name(name)):
        known = [ref.name for ref in list_branches(handle.backend)]
        raise UnknownRefError(f"no branch is called {name!r}; there are: {', '.join(known) or 'none'}", known)
    handle.note_head(name, None)


def remove_tag(handle: Handle, name: str) -> None:
    """Remove a tag. See `Repository.delete_tag`."""
    handle.config.check_features("write", where=handle.backend.location)
    check_ref_name(name)
    _note_end(handle, read_tag, name)
    if not delete_ref_file(handle.backend, tag_name(name)):
        known = [ref.name for ref in list_tags(handle.backend)]
        raise UnknownRefError(f"no tag is called {name!r}; there are: {', '.join(known) or 'none'}", known)


def _note_end(handle: Handle, read: Callable[[Backend, str], SnapshotId | None], name: str) -> None:
    """Before a ref goes: the grace period of what it names starts now, however old that is."""
    with suppress(DamageError):
        snapshot_id = read(handle.backend, name)
        if snapshot_id is not None:
            note_orphan(handle.backend, snapshot_id, now_ns=handle.clock())


def orphan_ids(handle: Handle) -> list[SnapshotId]:
    """Snapshots that no branch or tag reaches and that were not forgotten, newest first.

    Raises DamageError for a ref or marker that cannot be read.
    """
    backend = handle.backend
    reached: set[SnapshotId] = set()
    marks = forgotten(backend)
    pending = [ref.snapshot_id for ref in (*list_branches(backend), *list_tags(backend))]
    while pending:
        snapshot_id = pending.pop()
        if snapshot_id in reached:
            continue
        reached.add(snapshot_id)
        if snapshot_id in marks:
            pending.extend(marks[snapshot_id].parents)
            continue
        try:
            pending.extend(read_record(backend, snapshot_id).parents)
        except (UnknownRefError, DamageError):
            continue  # a gap in history, or damage that verify names
    found = [snapshot_id for snapshot_id in list_snapshot_ids(backend) if snapshot_id not in reached | marks.keys()]
    return sorted(found, key=lambda snapshot_id: _time_ns(handle, snapshot_id), reverse=True)


def _time_ns(handle: Handle, snapshot_id: SnapshotId) -> int:
    try:
        return read_record(handle.backend, snapshot_id).time_ns
    except (UnknownRefError, DamageError):
        return 0


def _adopt(
    handle: Handle, snapshot_id: SnapshotId, *, listed: frozenset[PackId], now_ns: int, beat: Callable[[], None]
) -> None:
    """Check what a new ref names; a forgotten snapshot is remembered again, for the ref outweighs its marker."""
    is_marked = snapshot_id in forgotten_ids(handle.backend)
    rescue(handle, snapshot_id, listed=None if is_marked else listed, now_ns=now_ns, beat=beat)
    unforget_snapshot(handle.backend, snapshot_id)


def rescue(
    handle: Handle,
    snapshot_id: SnapshotId,
    *,
    listed: frozenset[PackId] | None,
    now_ns: int,
    beat: Callable[[], None],
    whole: bool = False,
) -> None:
    """Check, after the root is visible, that all of the snapshot is in packs that stay; copy out what is not.

    `listed` are the packs that stood, under our lease, before the root was made, when the snapshot was whole. While
    none of them has gone and nothing is condemned, this costs one listing; None: look at every chunk. `whole` asks for
    the leaves that thinning dropped, too. `beat` is called at every step of copying. Raises SnapshotGoneError or
    another DamageError when something is gone for good: a collector that did not see the root has come to its end.
    """
    while True:
        # The condemned set before the listing, for the reason given in save.py.
        check_not_condemned(handle.backend, snapshot_id)
        condemned = condemned_packs(handle.backend)
        try:
            record = read_record(handle.backend, snapshot_id)
        except UnknownRefError as error:
            raise SnapshotGoneError(f"snapshot {snapshot_id[:12]} was collected just now") from error
        if listed is not None and not condemned and listed <= list_packs(handle.backend):
            return
        handle.store.refresh()
        thinning = None if whole else read_thinning(handle.backend, snapshot_id)
        needed = _needed_chunks(handle, record, thinning)
        lost = needed.keys() - closure(needed, handle.store, condemned).keys()
        if not lost:
            return
        writer = ChunkWriter(
            handle.backend,
            handle.hasher,
            handle.config.repository_id,
            compression=handle.config.options.compression,
            now_ns=now_ns,
        )
        try:
            for chunk_id in sorted(lost):
                beat()
                raw = bytes(handle.store.get(chunk_id))
                writer.put_bytes(chunk_id, raw, kind=needed[chunk_id], elements=_COPIED)
            sealed = writer.finish()
        except BaseException:
            writer.abort()
            raise
        handle.store.add({pack.pack_id: pack.rows for pack in sealed})


def _needed_chunks(handle: Handle, record: SnapshotRecord, thinning: Thinning | None) -> dict[ChunkId, RecordKind]:
    """Every chunk that a snapshot needs, with what it holds."""
    entries = handle.manifests.entries(record)
    id_bytes = handle.hasher.digest_bytes
    needed = dict.fromkeys(chunk_lengths(kept_entries(entries, thinning), id_bytes), RecordKind.LEAF)
    for entry in entries:
        needed.update(dict.fromkeys(split_ids(entry.id_lists or b"", id_bytes), RecordKind.ID_LIST))
    needed.update(dict.fromkeys(record.part_ids, RecordKind.PART))
    return needed
