"""Verify a repository: structure always, every stored byte on request.

    refs → snapshot files → manifests → packs (→ records) → what is lost, by snapshot and leaf

Roots are read before what they need, as writers make them last: beside running saves nothing looks missing
that is not. Damage is a finding, never an exception. One pass over the manifests collects what snapshots
need, one over the packs finds what is there; only when something is lost are the manifests read again, to
name the leaves. So each record is read once, however many snapshots share it (a base and a manifest part once
more, for what rests on them). Memory holds an entry for each chunk, the row of each record that has a base, and of
payloads a few MiB a thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from castore.damage_marks import leave_mark, readable_marks
from castore.errors import CastoreError, UsageError
from castore.format.layout import PACKS, pack_name, parse_pack_name
from castore.ids import PackId, SnapshotId
from castore.losses import Loss, read_losses
from castore.maintenance.attribution import report_losses
from castore.maintenance.file_check import (
    Marks,
    Records,
    check_config,
    check_gc,
    check_heads,
    find_orphans,
    note_leftovers,
    read_marks,
    read_refs,
    read_snapshots,
)
from castore.maintenance.gc.writers import Watch
from castore.maintenance.needs import NeededChunks
from castore.maintenance.pack_check import Survey, check_packs
from castore.maintenance.parts import PartReader
from castore.maintenance.record_check import Fault
from castore.maintenance.report import Findings, Problem, ScrubCount, VerifyReport
from castore.maintenance.scrub import Memory, load_memory, plan_scrub, remember, scrub
from castore.maintenance.scrub import count as count_scrubbed
from castore.progress import Meter
from castore.refs import Ref
from castore.repository import Handle
from castore.store import list_packs

__all__ = ["Examination", "Problem", "VerifyReport", "examine", "settled", "verify"]

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) of pack files."""

_OF_WRITERS = frozenset({"ref", "part", "chunk"})
"""Kinds of problems that a writer may be about to mend."""
_LOOKS_ENOUGH, _LOOKS_MAX = 8, 64
"""At a repository whose packs are being collected all the while. After enough of them, what two looks in a row find is
reported: damage stays, what a collector moves does not. After the most, whatever the last one found.
"""


@dataclass(frozen=True, slots=True)
class Examination:
    """Everything that a verification learns: what `verify` reports, and what `repair` plans with."""

    findings: Findings
    refs: Mapping[str, Ref]
    """File name → ref, of those that can be read."""
    records: Records
    """Newest first."""
    unreadable: frozenset[SnapshotId]
    marks: Marks
    parts: PartReader
    needs: NeededChunks
    survey: Survey
    losses: Mapping[SnapshotId, Loss]
    """What earlier repairs marked as lost."""
    damaged_losses: Collection[str]
    """Files of such marks that cannot be read."""
    pack_ids: tuple[PackId, ...]
    scrub: ScrubCount | None


def verify(
    handle: Handle,
    *,
    data: bool = False,
    max_duration_s: float | None = None,
    max_age_s: float | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check everything; with `data` also read, decode and hash every record of every pack.

    `max_duration_s` or `max_age_s` make it incremental: packs are read, those first that were not read for longest,
    until the time is up, and those left out that were found whole within that age. The structure is checked in full.

    Takes no lease and writes nothing but the cache, and marks beside packs that are damaged, so that later saves store
    again what is in them. Looks again when packs went while it looked, as they do beside a collection, and when
    something is missing beside writers, for which it waits at most ten seconds. Raises only what is no damage:
    StorageError when the repository's directory itself cannot be listed, UsageError.
    """
    found = settled(
        handle,
        lambda: examine(handle, data=data, max_duration_s=max_duration_s, max_age_s=max_age_s, progress=progress),
    )
    findings = found.findings
    check_gc(handle, findings)
    note_leftovers(handle, findings)
    _note_losses(found)
    _leave_marks(handle, found.survey)
    return VerifyReport(
        tuple(findings.problems),
        len(found.records) + len(found.unreadable),
        found.survey.pack_count,
        len(found.needs.lengths),
        found.survey.checked_bytes,
        data or found.scrub is not None,
        find_orphans(found.refs, found.records, found.marks, findings),
        tuple(findings.notes),
        findings.damaged,
        findings.lost,
        found.scrub,
    )


def settled(handle: Handle, look: Callable[[], Examination]) -> Examination:
    """Look again while packs go: a collector is at work, and what is missing was copied out or belongs to the gone.
    And once more after a little waiting for the writers that were under way, when something is missing and nothing else
    is wrong: one that was taken for dead and woke up shows its snapshot first, then puts back what was collected of it.
    """
    watch = Watch(lease_s=handle.config.options.lease_s)
    has_waited = False
    looks = 0
    problems: Sequence[Problem] = ()
    while True:
        before, writers = list_packs(handle.backend), _writers(watch, handle)
        found = look()
        looks += 1
        earlier, problems = problems, found.findings.problems
        stayed = before | set(found.pack_ids) <= list_packs(handle.backend)
        # A collector lets the index forget a pack before it removes it; the next look indexes it again where it stands.
        unindexed = looks == 1 and any(problem.kind == "index" for problem in problems)
        is_steady = looks == _LOOKS_MAX or (looks >= _LOOKS_ENOUGH and problems == earlier)
        if not problems:
            return found
        if is_steady or (stayed and not unindexed):
            writers |= _writers(watch, handle)
            if has_waited or not writers or any(problem.kind not in _OF_WRITERS for problem in problems):
                return found
            watch.outwait(handle.backend, writers)
            has_waited, looks = True, 0


def _writers(watch: Watch, handle: Handle) -> frozenset[str]:
    with suppress(CastoreError):  # leases that cannot be listed are a note of the report
        return watch.writers(handle.backend)
    return frozenset()


def examine(
    handle: Handle,
    *,
    data: bool,
    max_duration_s: float | None = None,
    max_age_s: float | None = None,
    progress: Progress | None = None,
) -> Examination:
    """Check all but what is neither snapshot nor pack. As `verify`."""
    for name, value in (("max_duration_s", max_duration_s), ("max_age_s", max_age_s)):
        if value is not None and not value >= 0:
            raise UsageError(f"{name}: expected seconds of at least 0, found {value}")
    losses, damaged_losses = read_losses(handle.backend)
    findings = Findings(losses)
    for name, error in damaged_losses.items():
        findings.problem("mark", name, f"{error}; `castore repair` finds out again what is lost")
    check_config(handle, findings)
    refs = read_refs(handle, findings)
    marks = read_marks(handle, findings)
    records, unreadable = read_snapshots(handle, findings, refs, marks)
    check_heads(refs, records.keys() | unreadable, findings)
    parts = PartReader(handle)
    needs = NeededChunks(handle, parts, findings, marks.thinnings)
    for snapshot_id, record in records.items():
        needs.add(snapshot_id, record)
    needs.report()
    sizes = _list_packs(handle, findings)
    pack_ids = tuple(sorted(sizes))
    if max_duration_s is None and max_age_s is None:
        survey = check_packs(
            handle, pack_ids, needs.lengths, findings, data=data, advance=Meter(progress, sum(sizes.values())).advance
        )
        count = None
        if data:
            _remember(handle, set(pack_ids), survey, pack_ids)
    else:
        begun_s = time.monotonic()

        def more() -> bool:
            return max_duration_s is None or time.monotonic() - begun_s < max_duration_s

        memory = load_memory(handle.backend)
        plan = plan_scrub(sizes, memory, now_ns=handle.clock(), max_age_s=max_age_s)
        meter = Meter(progress, sum(sizes[pack_id] for pack_id in plan.order))
        scrubbed = scrub(handle, plan.order, findings, more=more, advance=lambda pack: meter.advance(sizes[pack]))
        survey = check_packs(
            handle, pack_ids, needs.lengths, findings, data=False, advance=lambda _: None, known=scrubbed.faults
        )
        survey.checked_bytes = scrubbed.checked_bytes
        survey.damaged_packs |= scrubbed.damaged
        _tell_known_damage(memory, set(pack_ids) - scrubbed.whole - survey.suspect_packs, findings)
        memory = _remember(handle, scrubbed.whole | scrubbed.damaged, survey, pack_ids)
        count = count_scrubbed(plan, scrubbed, memory)
    snapshots = {snapshot_id: record.part_ids for snapshot_id, record in records.items()}
    report_losses(
        parts, snapshots, needs.lengths, survey, findings, explained=needs.reported, thinnings=marks.thinnings
    )
    return Examination(
        findings,
        refs,
        records,
        frozenset(unreadable),
        marks,
        parts,
        needs,
        survey,
        losses,
        tuple(damaged_losses),
        pack_ids,
        count,
    )


def _remember(handle: Handle, read: Collection[PackId], survey: Survey, pack_ids: Collection[PackId]) -> Memory:
    suspect = survey.suspect_packs
    whole, damaged = set(read) - suspect, set(read) & suspect
    return remember(handle.backend, whole=whole, damaged=damaged, there=set(pack_ids), now_ns=handle.clock())


def _tell_known_damage(memory: Memory, unread: Collection[PackId], findings: Findings) -> None:
    """A run that does not come to a damaged pack must not look as if all were well."""
    for pack_id in sorted(unread):
        if pack_id in memory and memory[pack_id].was_damaged:
            advice = "`castore verify --data` says what"
            findings.problem(
                "pack", pack_name(pack_id), f"an earlier run found damage that this one did not reach; {advice}"
            )


def _leave_marks(handle: Handle, survey: Survey) -> None:
    """So that the next save, of whatever process, stores again what lies in damaged records."""
    known = {(mark.pack_id, offset) for mark in readable_marks(handle.backend) for offset in mark.offsets}
    standing = list_packs(handle.backend)
    fresh: dict[PackId, list[Fault]] = {}
    for fault in survey.faults:
        pack_id = parse_pack_name(fault.name)
        if pack_id in standing and not fault.base_ids and (pack_id, fault.row.offset) not in known:
            fresh.setdefault(pack_id, []).append(fault)
    for pack_id, faults in fresh.items():
        leave_mark(handle.backend, pack_id, [fault.row.offset for fault in faults], why=faults[0].message)


def _note_losses(found: Examination) -> None:
    told = dict(found.findings.lost).keys() | dict(found.findings.damaged).keys()
    for snapshot_id in found.losses:
        if snapshot_id not in told:
            gone = snapshot_id not in found.records
            state = "is gone" if gone else "is whole, as far as was checked"
            found.findings.note(f"lost/{snapshot_id} says that leaves are lost, and the snapshot {state}")


# ---- packs -------------------------------------------------------------------------------------------------


def _list_packs(handle: Handle, findings: Findings) -> dict[PackId, int]:
    """The packs with the bytes of their files, after the index was brought in line with them."""
    sizes: dict[PackId, int] = {}
    for info in handle.backend.list(PACKS):
        pack_id = parse_pack_name(info.name)
        if pack_id is None:
            findings.note(f"{info.name} is no pack of castore; it is ignored")
        else:
            sizes[pack_id] = info.size_bytes
    try:
        listing = handle.store.refresh()
    except CastoreError as error:
        findings.problem("index", PACKS, f"the packs cannot be indexed: {error}")
        listing = list_packs(handle.backend)
    return {pack_id: sizes.get(pack_id, 0) for pack_id in listing}
