"""Collect until the packs take no more than a given size, as far as the stored policy allows.

The policy says which snapshots may go; of those the oldest are forgotten, and only as many as it takes. How many that
is, is known beforehand: snapshots are marked in the order of their worth, so that a chunk belongs to the most valuable
snapshot that needs it, and a base to that of what rests on it. What goes with the last of them is then a sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from castore.format.pack import HEADER_BYTES, TRAILER_BYTES
from castore.ids import SnapshotId
from castore.maintenance.forget import forget_by_policy, forget_named
from castore.maintenance.gc.collect import GcRequest, collect
from castore.maintenance.gc.report import GcReport, Pending
from castore.maintenance.gc.survey import Progress, Survey
from castore.maintenance.gc.writers import Watch
from castore.maintenance.policy import Policy, read_policy
from castore.maintenance.thin import thin_old
from castore.repository import Handle


@dataclass(frozen=True, slots=True)
class TargetPlan:
    """Which snapshots to give up for a size."""

    dropped: tuple[SnapshotId, ...]
    """Oldest first."""
    expected_bytes: int
    """Of all packs without them and without waste."""
    excess_bytes: int
    """By how much that misses the size; 0 when it is reached."""


def plan_target(sizes: Sequence[tuple[SnapshotId, int]], *, fixed_bytes: int, target_bytes: int) -> TargetPlan:
    """`sizes` are the snapshots that may go, oldest first, with the bytes that go with each when those before it have
    gone; `fixed_bytes` is what stays in any case.
    """
    expected_bytes = fixed_bytes + sum(size for _, size in sizes)
    dropped: list[SnapshotId] = []
    for snapshot_id, size in sizes:
        if expected_bytes <= target_bytes:
            break
        dropped.append(snapshot_id)
        expected_bytes -= size
    return TargetPlan(tuple(dropped), expected_bytes, max(0, expected_bytes - target_bytes))


def collect_to_target(
    handle: Handle, request: GcRequest, *, progress: Progress = lambda *_: None, **time: Any
) -> GcReport:
    """Collect as `collect` does, after forgetting what it takes. Raises what `collect` raises.

    Thinning by the policy comes first, as it costs least. Whatever was forgotten can be undeleted until it is swept, so
    a collection that fails afterwards has lost nothing. A dry run counts without thinning.
    """
    target_bytes = request.target_bytes
    assert target_bytes is not None
    policy = read_policy(handle.backend)
    watch = Watch(lease_s=handle.config.options.lease_s, **time)
    plan = _plan(handle, watch, policy, target_bytes, progress)
    too_large = bool(plan.dropped) or plan.excess_bytes > 0
    if too_large and policy is not None and policy.older_than is not None and not request.dry_run:
        thin_old(handle, policy.thin, older_than=policy.older_than, must_match=False)
        plan = _plan(handle, watch, policy, target_bytes, progress)
    if plan.dropped and not request.dry_run:
        forget_named(handle, plan.dropped)
    report = collect(handle, replace(request, repack_below=1.0), progress=progress, **time)
    if request.dry_run and plan.dropped:
        going = dict.fromkeys(plan.dropped, "would be forgotten by the stored policy")
        freed_bytes = report.freed_bytes + report.total_bytes - plan.expected_bytes
        report = replace(
            report,
            snapshots={**report.snapshots, **going},
            freed_bytes=freed_bytes,
            total_bytes=plan.expected_bytes,
            notes=(*report.notes, "for a size, packs and bytes are only known when the snapshots are forgotten"),
        )
    if report.total_bytes <= target_bytes:
        return report
    return replace(report, pending=(*report.pending, _shortfall(report, plan, policy, target_bytes)))


def _plan(handle: Handle, watch: Watch, policy: Policy | None, target_bytes: int, progress: Progress) -> TargetPlan:
    allowed: list[SnapshotId] = []
    if policy is not None and policy.keep is not None:
        choices = forget_by_policy(handle, policy.keep, dry_run=True).dropped
        newest_first = sorted(choices, key=lambda choice: choice.created_at, reverse=True)
        allowed = [choice.snapshot_id for choice in newest_first]
    survey = Survey(handle, watch, progress=progress, last=allowed)
    by_owner = survey.ledger.bytes_by_owner(len(survey.snapshots)).tolist()
    sizes = dict(zip(survey.snapshots, by_owner, strict=True))
    droppable = [(snapshot_id, sizes.pop(snapshot_id)) for snapshot_id in reversed(allowed) if snapshot_id in sizes]
    fixed_bytes = sum(sizes.values()) + (HEADER_BYTES + TRAILER_BYTES) * len(survey.ledger.packs)
    return plan_target(droppable, fixed_bytes=fixed_bytes, target_bytes=target_bytes)


def _shortfall(report: GcReport, plan: TargetPlan, policy: Policy | None, target_bytes: int) -> Pending:
    missing = report.total_bytes - target_bytes
    if plan.excess_bytes == 0:
        why = "what is pending or wasted must go first: run gc again"
    elif policy is None or policy.keep is None:
        why = "no policy is stored that says which snapshots may be forgotten: `castore policy` stores one"
    else:
        why = f"the stored policy, refs and grace periods keep at least {plan.expected_bytes} bytes"
    return Pending("target", f"{target_bytes} bytes cannot be reached, {missing} are too many: {why}", missing)
