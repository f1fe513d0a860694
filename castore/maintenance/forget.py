"""Forget snapshots, by policy or by name. Frees nothing: gc does, and until then undelete brings them back.

    lease → read history → plan → one marker for each dropped snapshot (durable) → read the refs again → report

Each marker stands by itself, so a crash leaves some of the snapshots forgotten and the others as they were; forgetting
again does the rest. A ref that was put on a dropped snapshot meanwhile wins: its marker is taken away, by whichever of
the two looks last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from castore.errors import DamageError, UnknownRefError, UsageError
from castore.format.snapshot import SnapshotRecord
from castore.ids import SNAPSHOT_ID_DIGITS, SnapshotId, is_hex
from castore.leases import writer_lease
from castore.maintenance.inference import infer_mark
from castore.maintenance.lines import read_history
from castore.maintenance.retention import Choice, Keep, plan_retention
from castore.marks import Forgotten, forget_snapshot, read_forgotten, unforget_snapshot
from castore.progress import Meter
from castore.refs import list_branches, list_tags, ref_text, resolve
from castore.repository import Handle
from castore.snapshots import Snapshot, read_record

Progress = Callable[[int, int], None]
"""Called with (markers written, markers in all)."""


@dataclass(frozen=True, slots=True)
class ForgetReport:
    """What was forgotten, or would be."""

    kept: tuple[Choice, ...]
    """Each with its reasons; empty when snapshots were forgotten by name."""
    dropped: tuple[Choice, ...]
    unreadable: tuple[tuple[SnapshotId, str], ...]
    """Snapshots on the way that cannot be read, which no policy drops: (id, why). Forget them by id."""
    dry_run: bool

    @property
    def forgotten(self) -> tuple[SnapshotId, ...]:
        """The snapshots that are forgotten now because of this call; none after a dry run."""
        return () if self.dry_run else tuple(choice.snapshot_id for choice in self.dropped)

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "dry_run": self.dry_run,
            "kept": [choice.to_json() for choice in self.kept],
            "dropped": [choice.to_json() for choice in self.dropped],
            "unreadable": dict(self.unreadable),
        }


def forget_by_policy(
    handle: Handle, keep: Keep, *, dry_run: bool = False, progress: Progress | None = None
) -> ForgetReport:
    """Forget what no rule keeps. See `Repository.forget`."""
    if dry_run:
        return _planned(handle, keep)[0]
    handle.config.check_features("write", where=handle.backend.location)
    now_ns, lease_s = handle.clock(), handle.config.options.lease_s
    with writer_lease(handle.backend, purpose="forget", now_ns=now_ns, lease_s=lease_s) as lease:
        report, records = _planned(handle, keep)
        reason = f"policy: {keep.text()}"
        marks = [
            _mark(choice.snapshot_id, records[choice.snapshot_id], reason=reason, now_ns=now_ns)
            for choice in report.dropped
        ]
        return _carry_out(handle, replace(report, dry_run=False), marks, Meter(progress, len(marks), beat=lease.beat))


def forget_named(handle: Handle, refs: Sequence[str | Snapshot], *, dry_run: bool = False) -> ForgetReport:
    """Forget the snapshots that refs mean, damaged ones too. See `Repository.forget`."""
    if isinstance(refs, str | Snapshot):
        refs = [refs]
    if not refs:
        raise UsageError("ids: expected at least one snapshot to forget")
    backend, now_ns = handle.backend, handle.clock()
    if dry_run:
        return ForgetReport((), _choices(_named_marks(handle, refs, now_ns)), (), dry_run=True)
    handle.config.check_features("write", where=backend.location)
    lease_s = handle.config.options.lease_s
    with writer_lease(backend, purpose="forget", now_ns=now_ns, lease_s=lease_s) as lease:
        marks = _named_marks(handle, refs, now_ns)
        report = ForgetReport((), _choices(marks), (), dry_run=False)
        return _carry_out(handle, report, marks, Meter(None, len(marks), beat=lease.beat))


def _planned(handle: Handle, keep: Keep) -> tuple[ForgetReport, Mapping[SnapshotId, SnapshotRecord]]:
    history = read_history(handle.backend)
    plan = plan_retention(keep, history.lines, tags=history.tags)
    report = ForgetReport(plan.kept, plan.dropped, tuple(history.unreadable.items()), dry_run=True)
    return report, history.records


def _mark(snapshot_id: SnapshotId, record: SnapshotRecord, *, reason: str, now_ns: int) -> Forgotten:
    return Forgotten(snapshot_id, record.parents, record.branch, record.step, record.time_ns, now_ns, reason)


def _carry_out(handle: Handle, report: ForgetReport, marks: Sequence[Forgotten], meter: Meter) -> ForgetReport:
    """Write the markers, then let refs win that were made meanwhile."""
    for mark in marks:
        forget_snapshot(handle.backend, mark)
        meter.advance()
    won = {snapshot_id: why for snapshot_id, why in _named_by_refs(handle).items() if snapshot_id in report.forgotten}
    for snapshot_id in won:
        unforget_snapshot(handle.backend, snapshot_id)
    kept = [
        replace(choice, reasons=(f"{won[choice.snapshot_id]}, made meanwhile",))
        for choice in report.dropped
        if choice.snapshot_id in won
    ]
    dropped = tuple(choice for choice in report.dropped if choice.snapshot_id not in won)
    return replace(report, kept=(*report.kept, *kept), dropped=dropped)


def _named_by_refs(handle: Handle) -> dict[SnapshotId, str]:
    named = {ref.snapshot_id: f"tag {ref.name}" for ref in list_tags(handle.backend)}
    return named | {ref.snapshot_id: f"head of {ref.name}" for ref in list_branches(handle.backend)}


# ---- by name ---------------------------------------------------------------------------------------------------


def _named_marks(handle: Handle, refs: Sequence[str | Snapshot], now_ns: int) -> list[Forgotten]:
    """A marker for each snapshot that is not forgotten yet. Raises UsageError for one that a ref names."""
    named = _named_by_refs(handle)
    marks: dict[SnapshotId, Forgotten] = {}
    for ref in refs:
        snapshot_id = _resolve(handle, ref)
        if snapshot_id in named:
            raise UsageError(
                f"snapshot {snapshot_id[:12]} is {named[snapshot_id]}: move or delete that first (`castore branch "
                "--move NAME REF`, `castore tag --delete NAME`)"
            )
        if not _is_forgotten(handle, snapshot_id):
            marks.setdefault(snapshot_id, _mark_of(handle, snapshot_id, now_ns))
    return list(marks.values())


def _resolve(handle: Handle, ref: str | Snapshot) -> SnapshotId:
    """As `resolve`, and also the whole id of a snapshot whose file is gone: history may still name it."""
    try:
        return resolve(handle.backend, ref)
    except UnknownRefError:
        text = ref_text(ref).lower()
        if is_hex(text) and len(text) in SNAPSHOT_ID_DIGITS:
            return SnapshotId(text)
        raise


def _is_forgotten(handle: Handle, snapshot_id: SnapshotId) -> bool:
    try:
        return read_forgotten(handle.backend, snapshot_id) is not None
    except DamageError:
        return False  # a damaged marker is written again


def _mark_of(handle: Handle, snapshot_id: SnapshotId, now_ns: int) -> Forgotten:
    try:
        record = read_record(handle.backend, snapshot_id)
    except (UnknownRefError, DamageError) as error:
        return infer_mark(handle.backend, snapshot_id, why=error, now_ns=now_ns)
    return _mark(snapshot_id, record, reason="by name", now_ns=now_ns)


def _choices(marks: Sequence[Forgotten]) -> tuple[Choice, ...]:
    return tuple(
        Choice(
            mark.snapshot_id,
            (mark.branch,) if mark.branch else (),
            mark.step,
            datetime.fromtimestamp(mark.time_ns / 1e9, UTC),
            (mark.reason,),
        )
        for mark in marks
    )
