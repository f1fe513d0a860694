"""Garbage collection: free what no root needs, beside savers and readers, and lose nothing.

    claim      collectors exclude each other
    look       packs, then leases, then roots: refs, ancestors, orphans within their grace; walk their manifests
    rebase     bases that only differences need, where that frees more than it costs (rebase.py)
    plan       dead snapshots; packs in which nothing is live, and packs in which little is (plan.py); a dry run ends
    condemn    durably, for good: from now on no writer relies on these packs, nobody makes these snapshots roots
    drain      wait for the writers that are older than the condemnation; what they hold up is left to the next run
    look again all roots, and packs that came since: what they need of what was condemned is not lost
    sweep      snapshot files, then packs: dead ones, then those that were copied out of (sweep.py)
    end        the condemned file goes last

Interrupted anywhere, a collection is simply run again: what was condemned is found in its file, and completed.

Why nothing is lost. A writer older than the condemnation is waited for, and its root is seen in the second look. A
younger one has read the condemned set before it looked anything up. Either checks, after its root is visible, the
condemned set and the listing of packs, and writes again what is going: so a writer that was taken for dead and only
slept heals itself. The pack listing of the first look is older than its roots, so a pack of a save that ended in
between is seen with its snapshot; packs of saves under way are left alone. And only what a durable condemned file names
is ever deleted, under names that are never used again: a collector that slept deletes nothing that anybody may use.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from castore.errors import UsageError
from castore.format.layout import drain_name, lost_name, orphan_name, snapshot_name, thin_name
from castore.ids import PackId, SnapshotId
from castore.leases import Condemned, HeldClaim, LeaseInfo, condemn, condemned_packs, read_condemned
from castore.maintenance.gc.claim import collector_claim, with_reserve
from castore.maintenance.gc.litter import (
    remove_dead_leases,
    remove_marks,
    remove_stale_drains,
    remove_stale_marks,
    remove_stale_parity,
    remove_temporaries,
)
from castore.maintenance.gc.plan import PackPlan, plan_packs
from castore.maintenance.gc.rebase import RebasePlan, plan_rebase, rebase
from castore.maintenance.gc.report import GcReport, Pending
from castore.maintenance.gc.survey import Progress, Survey
from castore.maintenance.gc.sweep import Sweeper, Swept
from castore.maintenance.gc.writers import Watch, older_leases
from castore.options import COLLECT_SPACE_BYTES_MIN, REPACK_BELOW, REPACK_BYTES_MAX
from castore.repository import Handle, make_reserve
from castore.store import pack_sizes

_PINNED_SHOWN_MAX = 10
_CONDEMNED_NAMES_MAX = 8000
"""Ids in one condemned file: with 64 digits each it stays below the limit of a text file."""


@dataclass(frozen=True, slots=True)
class GcRequest:
    """How to collect."""

    dry_run: bool = False
    repack_below: float = REPACK_BELOW
    """Packs of which a smaller share is live are rewritten; 0: none, 1: every pack with a dead byte."""
    repack_bytes_max: int = REPACK_BYTES_MAX
    wait_s: float | None = None
    """How long to wait for older writers; None: the lease length of the repository."""
    target_bytes: int | None = None
    """The size that `collect_to_target` comes down to."""

    def __post_init__(self) -> None:
        """Raises UsageError: before a policy is applied, or anything forgotten."""
        if not 0 <= self.repack_below <= 1:
            raise UsageError(f"repack_below: expected a share of 0 to 1, found {self.repack_below}")
        for name in ("repack_bytes_max", "wait_s", "target_bytes"):
            found = getattr(self, name)
            if found is not None and found < 0:
                raise UsageError(f"{name}: expected at least 0, found {found}")


def collect(
    handle: Handle,
    request: GcRequest,
    *,
    progress: Progress = lambda *_: None,
    monotonic_s: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], object] = time.sleep,
) -> GcReport:
    """Collect once. Blocks for the drain and the copying; savers and readers go on.

    Raises LeaseError (another collector is at work), DamageError (a ref, mark, snapshot or manifest cannot be read, so
    that it is not known what may go; nothing was freed), NoSpaceError, StorageError, RepositoryAccessError; after any
    of them, gc is simply run again.
    """
    handle.config.check_features("write", "gc", where=handle.backend.location)  # what must stay is copied first
    watch = Watch(lease_s=handle.config.options.lease_s, monotonic_s=monotonic_s, sleep=sleep)
    if request.dry_run:
        survey = Survey(handle, watch, progress=progress)
        plan = _plan(handle, survey, request)
        return _dry_report(survey, plan, _plan_rebase(handle, survey, request))
    with collector_claim(handle.backend, watch, now_ns=handle.clock()) as claim:
        return _Collection(handle, request, watch, progress, claim).run()


def _space_bytes(handle: Handle) -> int | None:
    """What copies may take of the free space; None when that is not known."""
    free_bytes = handle.backend.free_bytes()
    return None if free_bytes is None else max(0, free_bytes - COLLECT_SPACE_BYTES_MIN)


def _plan_rebase(handle: Handle, survey: Survey, request: GcRequest) -> RebasePlan:
    space_bytes = _space_bytes(handle)
    limit = request.repack_bytes_max if space_bytes is None else min(request.repack_bytes_max, space_bytes)
    return plan_rebase(survey.ledger.pinned_trees() if request.repack_below else (), written_bytes_max=limit)


def _plan(handle: Handle, survey: Survey, request: GcRequest) -> PackPlan:
    """Copies must fit the disk beside what is there: what dies without copying makes room first."""
    states = survey.pack_states()
    limit = request.repack_bytes_max
    space_bytes = _space_bytes(handle)
    if space_bytes is not None:
        dead_bytes = sum(state.pack_bytes for state in states if state.live_bytes == 0 and not state.untouchable)
        limit = min(limit, space_bytes + dead_bytes)
    return plan_packs(states, repack_below=request.repack_below, copied_bytes_max=limit)


class _Collection:
    """One run under the claim."""

    def __init__(self, handle: Handle, request: GcRequest, watch: Watch, progress: Progress, claim: HeldClaim) -> None:
        self._handle = handle
        self._backend = handle.backend
        self._request = request
        self._watch = watch
        self._show = progress
        self._claim = claim
        self._pending: list[Pending] = []
        self._freed_bytes = 0
        self._rebased_bytes = 0
        self._removed: dict[SnapshotId, str] = {}

    def run(self) -> GcReport:
        """All phases."""
        survey = Survey(self._handle, self._watch, progress=self._progress)
        self._rebase(survey)
        plan = _plan(self._handle, survey, self._request)
        self._condemn(survey, plan)
        condemned = read_condemned(self._backend)
        drained, waiting = self._drain(condemned)
        swept = Swept()
        if drained:
            survey.look_again()
            # Read again: a collector that slept may have condemned since what we would have relied on.
            going = condemned_packs(self._backend)
            survey.settle(going)
            self._remove_snapshots(survey, drained)
            swept = self._sweep_packs(survey, drained, going)
            self._remove_files(drained)
        litter = self._clean(survey)
        self._explain(survey, plan, swept, waiting)
        make_reserve(self._backend)
        return self._report(survey, swept, litter)

    def _progress(self, phase: str, done: int, total: int) -> None:
        self._claim.beat()
        self._show(phase, done, total)

    def _rebase(self, survey: Survey) -> None:
        """Free pinned bases, so that the plan finds them dead."""
        plan = _plan_rebase(self._handle, survey, self._request)
        if plan.trees:
            before = survey.ledger.by_pack().sum()
            trees = len(plan.trees)
            self._freed_bytes -= rebase(
                self._handle, survey.ledger, plan, advance=lambda done: self._progress("rebasing", done, trees)
            )
            survey.add_new_packs()
            self._rebased_bytes = int(before - survey.ledger.by_pack().sum())

    def _condemn(self, survey: Survey, plan: PackPlan) -> None:
        """What is condemned already is left out: it is in the file of an earlier run."""
        earlier = read_condemned(self._backend)
        packs = sorted({pack.pack_id for pack in plan.going}.difference(*(found.packs for found in earlier)))
        snapshots = sorted(set(survey.dead).difference(*(found.snapshots for found in earlier)))
        while packs or snapshots:
            some_packs, some_snapshots = packs[:_CONDEMNED_NAMES_MAX], snapshots[:_CONDEMNED_NAMES_MAX]
            packs, snapshots = packs[len(some_packs) :], snapshots[len(some_snapshots) :]
            now_ns = self._handle.clock()
            with_reserve(
                self._backend,
                partial(condemn, self._backend, packs=some_packs, snapshots=some_snapshots, now_ns=now_ns),
            )

    def _drain(self, condemned: Collection[Condemned]) -> tuple[list[Condemned], dict[str, list[LeaseInfo]]]:
        """Which condemned files no writer holds up any more, and who holds up the others."""
        names = {found.name: older_leases(self._backend, found.name) for found in condemned}
        wait_s = self._request.wait_s if self._request.wait_s is not None else self._handle.config.options.lease_s
        alive = self._watch.wait_for(
            self._backend,
            frozenset[str]().union(*names.values()),
            wait_s=wait_s,
            notice=lambda leases: self._progress(f"waiting for {_who(leases[0])}", 0, len(leases)),
        )
        waiting = {name: [lease for lease in alive if lease.name in older] for name, older in names.items()}
        return [found for found in condemned if not waiting[found.name]], waiting

    def _remove_snapshots(self, survey: Survey, drained: Collection[Condemned]) -> None:
        """Snapshot files before packs: a crash in between leaves garbage, the other way round it would leave damage."""
        for snapshot_id in sorted(frozenset[SnapshotId]().union(*(found.snapshots for found in drained))):
            if snapshot_id not in survey.dead:
                continue  # it became a root while we waited
            info = self._backend.stat(snapshot_name(snapshot_id))
            if info is not None and self._backend.delete(info.name):
                self._freed_bytes += info.size_bytes
                self._removed[snapshot_id] = survey.dead[snapshot_id]
                marks = thin_name(snapshot_id), orphan_name(snapshot_id), lost_name(snapshot_id)
                remove_marks(self._backend, marks)

    def _sweep_packs(self, survey: Survey, drained: Collection[Condemned], going: frozenset[PackId]) -> Swept:
        packs = frozenset[PackId]().union(*(found.packs for found in drained))
        total = sum(pack.pack_bytes for pack in survey.ledger.packs if pack.pack_id in packs)
        done = 0

        def advance(count_bytes: int) -> None:
            nonlocal done
            done += count_bytes
            self._progress("freeing", done, total)

        swept = Sweeper(self._handle, survey.ledger, going=going, drained=packs, advance=advance).run()
        self._freed_bytes += sum(pack.pack_bytes for pack in (*swept.deleted, *swept.rewritten)) - swept.copied_bytes
        return swept

    def _remove_files(self, drained: Collection[Condemned]) -> None:
        """A condemned file goes when none of its packs is left; until then they stay condemned."""
        standing = pack_sizes(self._backend).keys()
        for found in drained:
            if not found.packs & standing:
                self._backend.delete(found.name)
                self._backend.delete(drain_name(found.name))

    def _clean(self, survey: Survey) -> list[str]:
        """Remove what the dead left behind; what there is to say of it."""
        backend, notes = self._backend, []
        leases = remove_dead_leases(backend, self._watch)
        lease_s = self._handle.config.options.lease_s
        temporary_bytes, young = remove_temporaries(backend, claim_name=self._claim.name, lease_s=lease_s)
        self._freed_bytes += temporary_bytes
        remove_stale_drains(backend)
        parity_bytes = 0
        if survey.ledger.absent_count or survey.ledger.broken_count:
            notes.append("chunks that are needed are in no pack: parity is kept; run `castore repair`")
        else:
            parity_bytes = remove_stale_parity(backend)
        self._freed_bytes += parity_bytes
        marks = remove_stale_marks(backend, survey.roots)
        if young is not None:
            self._pending.append(young)
        if leases:
            notes.append(f"removed {leases} leases of writers that died")
        if temporary_bytes:
            notes.append(f"removed temporary files of {temporary_bytes} bytes")
        if parity_bytes:
            notes.append(f"removed parity of {parity_bytes} bytes with its packs")
        if marks:
            notes.append(f"removed {marks} marks of snapshots that nothing reaches any more")
        return notes

    def _explain(self, survey: Survey, plan: PackPlan, swept: Swept, waiting: Mapping[str, list[LeaseInfo]]) -> None:
        """Why what could be free is not."""
        for found in read_condemned(self._backend):
            size = sum(pack.pack_bytes for pack in survey.ledger.packs if pack.pack_id in found.packs)
            for lease in waiting.get(found.name, ()):
                message = f"{len(found.packs)} packs and {len(found.snapshots)} snapshots wait for {_who(lease)}"
                self._pending.append(Pending("writer", message, size, pid=lease.pid, host=lease.host))
        sizes = {pack.pack_id: pack.pack_bytes for pack in survey.ledger.packs}
        for pack_id, why in swept.damaged.items():
            message = f"pack {pack_id} is kept: {why}; run `castore repair`"
            self._pending.append(Pending("damage", message, sizes[pack_id]))
        for pack_id, why in swept.unspaced.items():
            message = f"pack {pack_id} is kept, there is no space to copy out what is live in it: {why}"
            self._pending.append(Pending("space", message, sizes[pack_id]))
        self._pending.extend(_unplanned(plan))
        self._pending.extend(_in_grace(survey))

    def _report(self, survey: Survey, swept: Swept, notes: list[str]) -> GcReport:
        return GcReport(
            dry_run=False,
            snapshots=self._removed,
            packs_deleted=tuple(pack.pack_id for pack in swept.deleted),
            packs_rewritten=tuple(pack.pack_id for pack in swept.rewritten),
            freed_bytes=self._freed_bytes,
            copied_bytes=swept.copied_bytes,
            rebased_bytes=self._rebased_bytes,
            pending=tuple(self._pending),
            **_account(survey, gone={pack.pack_id for pack in (*swept.deleted, *swept.rewritten)}),
            total_bytes=sum(pack_sizes(self._backend).values()),
            notes=(*survey.notes, *notes),
        )


def _dry_report(survey: Survey, plan: PackPlan, rebase_plan: RebasePlan) -> GcReport:
    going = {pack.pack_id for pack in plan.going}
    freed_bytes = sum(pack.pack_bytes for pack in plan.going) - plan.copied_bytes
    return GcReport(
        dry_run=True,
        snapshots=survey.dead,
        packs_deleted=tuple(pack.pack_id for pack in plan.dead),
        packs_rewritten=tuple(pack.pack_id for pack in plan.rewritten),
        freed_bytes=freed_bytes,
        copied_bytes=plan.copied_bytes,
        rebased_bytes=rebase_plan.freed_bytes,
        pending=(*_unplanned(plan), *_in_grace(survey)),
        **_account(survey, gone=going),
        total_bytes=sum(pack.pack_bytes for pack in survey.ledger.packs) - freed_bytes,
        notes=tuple(survey.notes),
    )


def _account(survey: Survey, *, gone: Collection[PackId]) -> dict[str, Any]:
    """What the ledger says of the bytes that stay."""
    ledger = survey.ledger
    pinned = sorted(ledger.pinned_by().items(), key=lambda item: -item[1])[:_PINNED_SHOWN_MAX]
    states = survey.pack_states()
    return {
        "live_bytes": int(ledger.by_pack().sum()),
        "pinned_bytes": int(ledger.by_pack(pinned=True).sum()),
        "pinned_by": {survey.snapshots[owner]: count_bytes for owner, count_bytes in pinned},
        "wasted_bytes": sum(state.wasted_bytes for state in states if state.pack_id not in gone),
        "snapshot_count": len(survey.roots.live),
        "chunk_count": ledger.live_count,
        "ledger_bytes": ledger.nbytes,
    }


def _unplanned(plan: PackPlan) -> Iterator[Pending]:
    if plan.left:
        wasted_bytes = sum(pack.wasted_bytes for pack in plan.left)
        message = f"{len(plan.left)} more packs could be rewritten: run gc again, or allow more bytes or space"
        yield Pending("limit", message, wasted_bytes)
    reasons = Counter(pack.untouchable for pack in plan.untouchable)
    for reason, count in reasons.items():
        wasted_bytes = sum(pack.wasted_bytes for pack in plan.untouchable if pack.untouchable == reason)
        yield Pending(
            "writer" if "save" in reason else "damage", f"{count} packs are left alone: {reason}", wasted_bytes
        )


def _in_grace(survey: Survey) -> Iterator[Pending]:
    for snapshot_id, until_ns in survey.roots.orphans.items():
        yield Pending("grace", f"orphan {snapshot_id[:12]} may still be adopted", until_ns=until_ns)


def _who(lease: LeaseInfo) -> str:
    return f"pid {lease.pid} on {lease.host} ({lease.purpose}, {lease.name})"
