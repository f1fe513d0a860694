"""Checks of the small files: config, refs, snapshots, marks, condemned sets; and what crashes left behind.

What can be read is returned, what cannot is a finding. Refs are read before snapshots, as writers make them last.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass

from castore.backend.base import Backend
from castore.errors import CastoreError, DamageError, UnknownRefError, some
from castore.format.config import decode_config
from castore.format.layout import (
    BRANCHES,
    CONFIG,
    GC,
    QUARANTINE,
    SNAPSHOTS,
    TAGS,
    check_ref_name,
    decode_ref_name,
    parse_snapshot_name,
    snapshot_name,
)
from castore.format.snapshot import SnapshotRecord
from castore.ids import SnapshotId
from castore.leases import condemned_packs, condemned_snapshots, list_leases
from castore.maintenance.report import Findings
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
from castore.refs import Ref, read_branch, read_tag
from castore.repository import Handle
from castore.snapshots import read_record

_EVER_NS = 2**63 - 1
Records = Mapping[SnapshotId, SnapshotRecord]


@dataclass(frozen=True, slots=True)
class Marks:
    """The marks that can be read."""

    forgotten: Mapping[SnapshotId, Forgotten]
    thinnings: Mapping[SnapshotId, Thinning]


def check_config(handle: Handle, findings: Findings) -> None:
    """Whether it is the one that this handle was opened with."""
    try:
        found = decode_config(handle.backend.read(CONFIG, max_bytes=TEXT_FILE_BYTES_MAX), where=CONFIG)
    except CastoreError as error:
        findings.problem("config", CONFIG, f"{error}; restore it from a copy")
        return
    if found != handle.config:
        findings.problem("config", CONFIG, "it is not the one that this repository was opened with; open it again")


def read_refs(handle: Handle, findings: Findings) -> dict[str, Ref]:
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


def check_heads(refs: Mapping[str, Ref], there: Collection[SnapshotId], findings: Findings) -> None:
    """Whether refs name snapshots that are there."""
    for file_name, ref in refs.items():
        if ref.snapshot_id not in there:
            findings.problem(
                "ref",
                file_name,
                f"{ref.name!r} names snapshot {ref.snapshot_id}, which is not there; move it or delete it",
                {ref.snapshot_id: ()},
            )


def read_snapshots(
    handle: Handle, findings: Findings, refs: Mapping[str, Ref], marks: Marks
) -> tuple[dict[SnapshotId, SnapshotRecord], set[SnapshotId]]:
    """The records, newest first, and the ids of those that cannot be read.

    Passed over, as gc may be half through with them: forgotten snapshots that no ref names, and condemned ones that no
    ref reaches.
    """
    condemned = frozenset[SnapshotId]()
    with suppress(CastoreError):  # `check_gc` says so
        condemned = condemned_snapshots(handle.backend)
    waiting = marks.forgotten.keys() - {ref.snapshot_id for ref in refs.values()}
    waiting_count = 0
    records: dict[SnapshotId, SnapshotRecord] = {}
    errors: dict[SnapshotId, CastoreError] = {}
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
            errors[snapshot_id] = error
    going = (condemned & (records.keys() | errors.keys())) - _reached(refs, records, marks)
    records = {snapshot_id: record for snapshot_id, record in records.items() if snapshot_id not in going}
    unreadable = errors.keys() - going
    for snapshot_id in sorted(unreadable):
        names = [ref.name for ref in refs.values() if ref.snapshot_id == snapshot_id]
        named = f" (named by {some(names)})" if names else ""
        findings.problem("snapshot", snapshot_name(snapshot_id), f"{errors[snapshot_id]}{named}", {snapshot_id: ()})
    for snapshot_id, record in records.items():
        for parent in record.parents:
            if parent not in records and parent not in unreadable and parent not in marks.forgotten:
                findings.note(f"parent {parent} of snapshot {snapshot_id} is gone: its history ends there")
    if waiting_count:
        findings.note(
            f"{waiting_count} forgotten snapshots wait for gc; `castore undelete` brings them back until then"
        )
    if going:
        findings.note(f"{len(going)} snapshots that no ref reaches are being collected")
    newest_first = sorted(records.items(), key=lambda item: item[1].time_ns, reverse=True)
    return dict(newest_first), unreadable


def read_marks(handle: Handle, findings: Findings) -> Marks:
    """Those of forgetting and thinning."""
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


def find_orphans(refs: Mapping[str, Ref], records: Records, marks: Marks, findings: Findings) -> tuple[SnapshotId, ...]:
    """The snapshots that no ref reaches, newest first."""
    reached = _reached(refs, records, marks)
    orphans = tuple(snapshot_id for snapshot_id in records if snapshot_id not in reached)
    if orphans and any(problem.kind in ("ref", "snapshot") for problem in findings.problems):
        findings.note("some orphans may only be cut off by the damage to refs and snapshots named above")
    return orphans


def _reached(refs: Mapping[str, Ref], records: Records, marks: Marks) -> set[SnapshotId]:
    """What refs name, and what is reached from there through parents, across tombstones."""
    reached: set[SnapshotId] = set()
    pending = [ref.snapshot_id for ref in refs.values()]
    while pending:
        snapshot_id = pending.pop()
        if snapshot_id not in reached:
            reached.add(snapshot_id)
            found = records.get(snapshot_id) or marks.forgotten.get(snapshot_id)
            pending.extend(found.parents if found is not None else ())
    return reached


def check_gc(handle: Handle, findings: Findings) -> None:
    """Whether the condemned sets can be read."""
    try:
        condemned_packs(handle.backend)
    except CastoreError as error:
        findings.problem("gc", GC, f"{error}; saves and gc refuse to run until it can be read")


def note_leftovers(handle: Handle, findings: Findings) -> None:
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
