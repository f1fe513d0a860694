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
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass

from castore.backend.base import Backend
from castore.damage_marks import leave_mark, readable_marks
from castore.errors import CastoreError, DamageError, UnknownRefError, UsageError, some
from castore.format.config import decode_config
from castore.format.layout import (
    BRANCHES,
    CONFIG,
    GC,
    PACKS,
    QUARANTINE,
    SNAPSHOTS,
    TAGS,
    check_ref_name,
    decode_ref_name,
    pack_name,
    parse_pack_name,
    parse_snapshot_name,
)
from castore.format.snapshot import SnapshotRecord
from castore.ids import PackId, SnapshotId
from castore.leases import condemned_packs, list_leases
from castore.losses import Loss, read_losses
from castore.maintenance.attribution import report_losses
from castore.maintenance.needs import NeededChunks
from castore.maintenance.pack_check import Survey, check_packs
from castore.maintenance.parts import PartReader
from castore.maintenance.record_check import Fault
from castore.maintenance.report import Findings, Problem, ScrubCount, VerifyReport
from castore.maintenance.scrub import Memory, load_memory, plan_scrub, remember, scrub
from castore.maintenance.scrub import count as count_scrubbed
from castore.marks import (
    Forgotten,
    Mark,
    Thinning,
    damaged_marks,
    forgotten_ids,
    read_forgotten,
    read_thinning,
    thinned_ids,
)
from castore.options import TEXT_FILE_BYTES_MAX
from castore.progress import Meter
from castore.refs import Ref, read_branch, read_tag
from castore.repository import Handle
from castore.snapshots import read_record
from castore.store import list_packs

__all__ = ["Examination", "Problem", "VerifyReport", "examine", "settled", "verify"]

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) of pack files."""

_EVER_NS = 2**63 - 1
_LOOKS_MAX = 8
"""At a repository whose packs are being collected all the while; then what looks damaged is reported all the same."""
Records = Mapping[SnapshotId, SnapshotRecord]


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
    again what is in them. Looks again when packs went while it looked, as they do beside a collection. Raises only what
    is no damage: StorageError when the repository's directory itself cannot be listed, UsageError.
    """
    found = settled(
        handle,
        lambda: examine(handle, data=data, max_duration_s=max_duration_s, max_age_s=max_age_s, progress=progress),
    )
    findings = found.findings
    _check_gc(handle, findings)
    _note_leftovers(handle, findings)
    _note_losses(found)
    _leave_marks(handle, found.survey)
    return VerifyReport(
        tuple(findings.problems),
        len(found.records) + len(found.unreadable),
        found.survey.pack_count,
        len(found.needs.lengths),
        found.survey.checked_bytes,
        data or found.scrub is not None,
        _orphans(found.refs, found.records, found.marks, findings),
        tuple(findings.notes),
        findings.damaged,
        findings.lost,
        found.scrub,
    )


def settled(handle: Handle, look: Callable[[], Examination]) -> Examination:
    """Look again while packs go: a collector is at work, and what is missing was copied out or belongs to the gone."""
    looks = 0
    while True:
        before = list_packs(handle.backend)
        found = look()
        looks += 1
        problems = found.findings.problems
        stayed = before | set(found.pack_ids) <= list_packs(handle.backend)
        # A collector lets the index forget a pack before it removes it; the next look indexes it again where it stands.
        unindexed = looks == 1 and any(problem.kind == "index" for problem in problems)
        if not problems or looks == _LOOKS_MAX or (stayed and not unindexed):
            return found


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
    _check_config(handle, findings)
    refs = _read_refs(handle, findings)
    marks = _read_marks(handle, findings)
    records, unreadable = _read_snapshots(handle, findings, refs, marks)
    _check_heads(refs, records.keys() | unreadable, findings)
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


# ---- small files -------------------------------------------------------------------------------------------


def _check_config(handle: Handle, findings: Findings) -> None:
    try:
        found = decode_config(handle.backend.read(CONFIG, max_bytes=TEXT_FILE_BYTES_MAX), where=CONFIG)
    except CastoreError as error:
        findings.problem("config", CONFIG, f"{error}; restore it from a copy")
        return
    if found != handle.config:
        findings.problem("config", CONFIG, "it is not the one that this repository was opened with; open it again")


def _read_refs(handle: Handle, findings: Findings) -> dict[str, Ref]:
    """File name → ref, of those that can be read."""
    refs: dict[str, Ref] = {}
    for prefix, read in ((BRANCHES, read_branch), (TAGS, read_tag)):
        for info in handle.backend.list(prefix):
            try:
                name = decode_ref_name(info.name.removeprefix(prefix))
                check_ref_name(name)
                head = read(handle.backend, name)
            except CastoreError as error:
                advice = "make it again with `castore branch --move NAME REF`, or delete it"
                findings.problem("ref", info.name, f"{error}; {advice}")
                continue
            if head is not None:
                refs[info.name] = Ref(name, head, info.modified_ns)
    return refs


def _check_heads(refs: Mapping[str, Ref], there: Collection[SnapshotId], findings: Findings) -> None:
    for file_name, ref in refs.items():
        if ref.snapshot_id not in there:
            findings.problem(
                "ref",
                file_name,
                f"{ref.name!r} names snapshot {ref.snapshot_id}, which is not there; move it or delete it",
                {ref.snapshot_id: ()},
            )


def _read_snapshots(
    handle: Handle, findings: Findings, refs: Mapping[str, Ref], marks: Marks
) -> tuple[dict[SnapshotId, SnapshotRecord], set[SnapshotId]]:
    """The records, newest first, and the ids of those that cannot be read.

    Forgotten snapshots that no ref names are passed over: gc may be half through with them.
    """
    waiting = marks.forgotten.keys() - {ref.snapshot_id for ref in refs.values()}
    waiting_count = 0
    records: dict[SnapshotId, SnapshotRecord] = {}
    unreadable: set[SnapshotId] = set()
    for info in handle.backend.list(SNAPSHOTS):
        snapshot_id = parse_snapshot_name(info.name)
        if snapshot_id is None or len(snapshot_id) != 2 * handle.hasher.digest_bytes:
            findings.note(f"{info.name} is no snapshot of this repository; it is ignored")
            continue
        if snapshot_id in waiting:
            waiting_count += 1
            continue
        try:
            records[snapshot_id] = read_record(handle.backend, snapshot_id)
        except UnknownRefError:
            findings.note(f"{info.name} was removed while this ran")
        except CastoreError as error:
            unreadable.add(snapshot_id)
            names = [ref.name for ref in refs.values() if ref.snapshot_id == snapshot_id]
            named = f" (named by {some(names)})" if names else ""
            findings.problem("snapshot", info.name, f"{error}{named}", {snapshot_id: ()})
    for snapshot_id, record in records.items():
        for parent in record.parents:
            if parent not in records and parent not in unreadable and parent not in marks.forgotten:
                findings.note(f"parent {parent} of snapshot {snapshot_id} is gone: its history ends there")
    if waiting_count:
        findings.note(
            f"{waiting_count} forgotten snapshots wait for gc; `castore undelete` brings them back until then"
        )
    newest_first = sorted(records.items(), key=lambda item: item[1].time_ns, reverse=True)
    return dict(newest_first), unreadable


@dataclass(frozen=True, slots=True)
class Marks:
    """The marks that can be read."""

    forgotten: Mapping[SnapshotId, Forgotten]
    thinnings: Mapping[SnapshotId, Thinning]


def _read_marks(handle: Handle, findings: Findings) -> Marks:
    for name, error in damaged_marks(handle.backend).items():
        advice = "forget, thin or undelete the snapshot again to write it anew; gc refuses to run until then"
        findings.problem("mark", name, f"{error}; {advice}")
    return Marks(
        _readable(handle, forgotten_ids(handle.backend), read_forgotten),
        _readable(handle, thinned_ids(handle.backend), read_thinning),
    )


def _readable(
    handle: Handle, snapshot_ids: Collection[SnapshotId], read: Callable[[Backend, SnapshotId], Mark | None]
) -> dict[SnapshotId, Mark]:
    found: dict[SnapshotId, Mark] = {}
    for snapshot_id in snapshot_ids:
        with suppress(DamageError):  # named already
            mark = read(handle.backend, snapshot_id)
            if mark is not None:
                found[snapshot_id] = mark
    return found


def _orphans(refs: Mapping[str, Ref], records: Records, marks: Marks, findings: Findings) -> tuple[SnapshotId, ...]:
    reached: set[SnapshotId] = set()
    pending = [ref.snapshot_id for ref in refs.values()]
    while pending:
        snapshot_id = pending.pop()
        found = records.get(snapshot_id) or marks.forgotten.get(snapshot_id)
        if found is not None and snapshot_id not in reached:
            reached.add(snapshot_id)
            pending.extend(found.parents)
    orphans = tuple(snapshot_id for snapshot_id in records if snapshot_id not in reached)
    if orphans and any(problem.kind in ("ref", "snapshot") for problem in findings.problems):
        findings.note("some orphans may only be cut off by the damage to refs and snapshots named above")
    return orphans


def _check_gc(handle: Handle, findings: Findings) -> None:
    try:
        condemned_packs(handle.backend)
    except CastoreError as error:
        findings.problem("gc", GC, f"{error}; saves and gc refuse to run until it can be read")


def _note_leftovers(handle: Handle, findings: Findings) -> None:
    """What crashes leave behind: harmless."""
    temporaries = list(handle.backend.temporaries(modified_before_ns=_EVER_NS))
    if temporaries:
        total = sum(info.size_bytes for info in temporaries)
        findings.note(f"{len(temporaries)} temporary files ({total} bytes): saves in progress, or left by a crash")
    quarantined = list(handle.backend.list(QUARANTINE))
    if quarantined:
        total = sum(info.size_bytes for info in quarantined)
        findings.note(
            f"{len(quarantined)} files ({total} bytes) in {QUARANTINE}: put there by repairs, yours to delete"
        )
    try:
        ended = [lease.name for lease in list_leases(handle.backend) if not lease.held]
    except CastoreError as error:
        findings.note(f"leases cannot be listed: {error}")
        return
    if ended:
        findings.note(f"{len(ended)} leases that no process of this host holds ({some(ended)})")


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
