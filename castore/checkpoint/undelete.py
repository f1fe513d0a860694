"""Bring back what was forgotten or thinned, as long as gc has not freed it.

A forgotten snapshot that comes back is a root again, so the protocol is that of a save, with one step more in front:

    lease → check every chunk, copy out what is condemned → take the mark away → check again → report

The first check makes a crash harmless: the mark is only taken away from a snapshot that was whole. When the second one
finds that a collector was faster, the mark is put back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from castore.checkpoint.history import rescue
from castore.errors import CastoreError, ChunkMissingError, DamageError, SnapshotGoneError, UnknownRefError, UsageError
from castore.format.snapshot import SnapshotRecord
from castore.ids import SnapshotId
from castore.leases import writer_lease
from castore.marks import (
    Forgotten,
    Thinning,
    forget_snapshot,
    forgotten,
    forgotten_ids,
    note_orphan,
    read_forgotten,
    read_thinning,
    thin_snapshot,
    thinned_ids,
    unforget_snapshot,
    unthin_snapshot,
)
from castore.refs import ref_text, resolve
from castore.repository import Handle
from castore.snapshots import Snapshot, list_snapshot_ids, read_record


@dataclass(frozen=True, slots=True)
class ForgottenSnapshot:
    """A forgotten snapshot, as its marker tells it."""

    id: SnapshotId
    branch: str
    step: int | None
    created_at: datetime
    forgotten_at: datetime
    reason: str
    is_there: bool
    """Whether its file is still there: `undelete` may bring it back. Its chunks are only looked at then."""

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "id": self.id,
            "branch": self.branch,
            "step": self.step,
            "created_at": self.created_at.isoformat(),
            "forgotten_at": self.forgotten_at.isoformat(),
            "reason": self.reason,
            "is_there": self.is_there,
        }


@dataclass(frozen=True, slots=True)
class UndeleteReport:
    """What came back."""

    restored: tuple[tuple[SnapshotId, Literal["forgotten", "thinned"]], ...]
    """Each with what it was until now."""
    lost: tuple[tuple[SnapshotId, str], ...]
    """Snapshots that cannot come back: (id, why). Only when all were asked for; one that was named is an error."""

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {"restored": dict(self.restored), "lost": dict(self.lost)}


def list_forgotten(handle: Handle) -> list[ForgottenSnapshot]:
    """Every forgotten snapshot, the last forgotten first. Raises DamageError for a marker that cannot be read."""
    present = frozenset(list_snapshot_ids(handle.backend))
    found = [
        ForgottenSnapshot(
            mark.snapshot_id,
            mark.branch,
            mark.step,
            datetime.fromtimestamp(mark.time_ns / 1e9, UTC),
            datetime.fromtimestamp(mark.forgotten_ns / 1e9, UTC),
            mark.reason,
            mark.snapshot_id in present,
        )
        for mark in forgotten(handle.backend).values()
    ]
    return sorted(found, key=lambda one: (one.forgotten_at, one.created_at), reverse=True)


def undelete(handle: Handle, refs: Sequence[str | Snapshot] | None) -> UndeleteReport:
    """See `Repository.undelete`."""
    handle.config.check_features("write", where=handle.backend.location)
    if isinstance(refs, str | Snapshot):
        refs = [refs]
    if refs is not None and not refs:
        raise UsageError("ids: expected at least one snapshot; None brings back all that were forgotten")
    backend, now_ns = handle.backend, handle.clock()
    restored: list[tuple[SnapshotId, Literal["forgotten", "thinned"]]] = []
    lost: list[tuple[SnapshotId, str]] = []
    lease_s = handle.config.options.lease_s
    with writer_lease(backend, purpose="undelete", now_ns=now_ns, lease_s=lease_s) as lease:
        if refs is not None:
            restored.extend(_restore(handle, _resolve(handle, ref), now_ns, lease.beat) for ref in refs)
            return UndeleteReport(tuple(restored), ())
        for snapshot_id in sorted(forgotten_ids(backend) & set(list_snapshot_ids(backend))):
            try:
                record = _read(handle, snapshot_id)
                if snapshot_id in forgotten_ids(backend):  # else somebody brought it back since we looked
                    _remember(handle, snapshot_id, record, now_ns, lease.beat)
                    restored.append((snapshot_id, "forgotten"))
            except DamageError as error:
                lost.append((snapshot_id, str(error)))
    return UndeleteReport(tuple(restored), tuple(lost))


def _resolve(handle: Handle, ref: str | Snapshot) -> SnapshotId:
    """As `resolve`; a forgotten snapshot whose file is gone is known by its marker."""
    try:
        return resolve(handle.backend, ref)
    except UnknownRefError:
        text = ref_text(ref).lower()
        gone = [found for found in forgotten_ids(handle.backend) if found.startswith(text)]
        if len(gone) == 1:
            raise _gone(gone[0]) from None
        raise


def _gone(snapshot_id: SnapshotId) -> SnapshotGoneError:
    return SnapshotGoneError(f"snapshot {snapshot_id[:12]} was forgotten, and gc has freed it: it cannot come back")


def _read(handle: Handle, snapshot_id: SnapshotId) -> SnapshotRecord:
    try:
        return read_record(handle.backend, snapshot_id)
    except UnknownRefError as error:
        raise _gone(snapshot_id) from error


def _restore(
    handle: Handle, snapshot_id: SnapshotId, now_ns: int, beat: Callable[[], None]
) -> tuple[SnapshotId, Literal["forgotten", "thinned"]]:
    """One step back: a forgotten snapshot is remembered, as thin as it was; else a thinned one is made whole."""
    backend = handle.backend
    record = _read(handle, snapshot_id)
    if snapshot_id in forgotten_ids(backend):
        _remember(handle, snapshot_id, record, now_ns, beat)
        return snapshot_id, "forgotten"
    if snapshot_id in thinned_ids(backend):
        _make_whole(handle, snapshot_id, now_ns, beat)
        return snapshot_id, "thinned"
    raise UsageError(f"snapshot {snapshot_id[:12]} is neither forgotten nor thinned: nothing to bring back")


def _remember(
    handle: Handle, snapshot_id: SnapshotId, record: SnapshotRecord, now_ns: int, beat: Callable[[], None]
) -> None:
    try:
        mark = read_forgotten(handle.backend, snapshot_id)
    except DamageError:
        mark = None
    if mark is None:
        mark = Forgotten(snapshot_id, record.parents, record.branch, record.step, record.time_ns, now_ns, "unknown")
    _check(handle, snapshot_id, now_ns, beat, whole=False)
    # Perhaps no ref reaches it: then its grace period starts now, and not when it was saved.
    note_orphan(handle.backend, snapshot_id, now_ns=now_ns)
    unforget_snapshot(handle.backend, snapshot_id)
    try:
        _check(handle, snapshot_id, now_ns, beat, whole=False)
    except CastoreError:
        forget_snapshot(handle.backend, mark)
        raise


def _make_whole(handle: Handle, snapshot_id: SnapshotId, now_ns: int, beat: Callable[[], None]) -> None:
    try:
        overlay: Thinning | None = read_thinning(handle.backend, snapshot_id)
    except DamageError:
        overlay = None  # with all of its chunks there it is not needed
    _check(handle, snapshot_id, now_ns, beat, whole=True)
    unthin_snapshot(handle.backend, snapshot_id)
    try:
        _check(handle, snapshot_id, now_ns, beat, whole=True)
    except CastoreError:
        if overlay is not None:
            thin_snapshot(handle.backend, overlay)
        raise


def _check(handle: Handle, snapshot_id: SnapshotId, now_ns: int, beat: Callable[[], None], *, whole: bool) -> None:
    beat()
    try:
        rescue(handle, snapshot_id, listed=None, now_ns=now_ns, beat=beat, whole=whole)
    except SnapshotGoneError:
        raise
    except ChunkMissingError as error:
        raise SnapshotGoneError(
            f"snapshot {snapshot_id[:12]} cannot come back: gc has freed chunks that it needs ({error})"
        ) from error
