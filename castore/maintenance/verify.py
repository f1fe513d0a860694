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

from collections.abc import Callable, Collection, Hashable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from castore.backend.base import Backend
from castore.errors import CastoreError, DamageError, UnknownRefError
from castore.format.config import decode_config
from castore.format.layout import (
    BRANCHES,
    CONFIG,
    GC,
    PACKS,
    SNAPSHOTS,
    TAGS,
    check_ref_name,
    decode_ref_name,
    parse_pack_name,
    parse_snapshot_name,
    snapshot_name,
)
from castore.format.manifest import Entry, chunk_bytes
from castore.format.snapshot import SnapshotRecord
from castore.ids import ChunkId, PackId, SnapshotId
from castore.leases import condemned_packs, list_leases
from castore.maintenance.losses import report_losses
from castore.maintenance.manifest_check import check_manifest
from castore.maintenance.pack_check import check_packs
from castore.maintenance.parts import PartReader
from castore.maintenance.report import Findings, Problem, VerifyReport, some
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
from castore.snapshots import read_record, split_ids
from castore.store import list_packs

__all__ = ["Problem", "VerifyReport", "verify"]

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) of pack files."""

_EVER_NS = 2**63 - 1
_NAMED_MAX = 10
"""Complaints about one manifest that are spelled out; the rest is counted."""

Records = Mapping[SnapshotId, SnapshotRecord]


def verify(handle: Handle, *, data: bool = False, progress: Progress | None = None) -> VerifyReport:
    """Check everything; with `data` also read, decode and hash every record of every pack.

    Takes no lease and writes nothing but the index cache. Raises only what is no damage: StorageError when
    the repository's directory itself cannot be listed.
    """
    findings = Findings()
    _check_config(handle, findings)
    refs = _read_refs(handle, findings)
    marks = _read_marks(handle, findings)
    records, unreadable = _read_snapshots(handle, findings, refs, marks)
    _check_heads(refs, records.keys() | unreadable, findings)
    parts = PartReader(handle)
    needs = _Needs(handle, parts, findings, marks.thinnings)
    for snapshot_id, record in records.items():
        needs.add(snapshot_id, record)
    needs.report()
    pack_ids, total_bytes = _list_packs(handle, findings)
    survey = check_packs(handle, pack_ids, needs.lengths, findings, data=data, advance=_meter(progress, total_bytes))
    snapshots = {snapshot_id: record.part_ids for snapshot_id, record in records.items()}
    report_losses(
        parts, snapshots, needs.lengths, survey, findings, explained=needs.reported, thinnings=marks.thinnings
    )
    _check_gc(handle, findings)
    _note_leftovers(handle, findings)
    return VerifyReport(
        tuple(findings.problems),
        len(records) + len(unreadable),
        survey.pack_count,
        len(needs.lengths),
        survey.checked_bytes,
        data,
        _orphans(refs, records, marks, findings),
        tuple(findings.notes),
        findings.damaged,
    )


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
    handle: Handle, findings: Findings, refs: Mapping[str, Ref], marks: _Marks
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
class _Marks:
    """The marks that can be read."""

    forgotten: Mapping[SnapshotId, Forgotten]
    thinnings: Mapping[SnapshotId, Thinning]


def _read_marks(handle: Handle, findings: Findings) -> _Marks:
    for name, error in damaged_marks(handle.backend).items():
        advice = "forget, thin or undelete the snapshot again to write it anew; gc refuses to run until then"
        findings.problem("mark", name, f"{error}; {advice}")
    return _Marks(
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


def _orphans(refs: Mapping[str, Ref], records: Records, marks: _Marks, findings: Findings) -> tuple[SnapshotId, ...]:
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
    try:
        ended = [lease.name for lease in list_leases(handle.backend) if not lease.held]
    except CastoreError as error:
        findings.note(f"leases cannot be listed: {error}")
        return
    if ended:
        findings.note(f"{len(ended)} leases that no process of this host holds ({some(ended)})")


# ---- manifests ---------------------------------------------------------------------------------------------


class _Needs:
    """Walks manifests, checks them, and collects every chunk that snapshots need."""

    def __init__(
        self, handle: Handle, parts: PartReader, findings: Findings, thinnings: Mapping[SnapshotId, Thinning]
    ) -> None:
        self.lengths: dict[ChunkId, int | None] = {}
        """Chunk → raw length that the manifests expect; None for parts and id lists."""
        self.reported: set[ChunkId] = set()
        """Parts and id lists that `report` names."""
        self._hasher = handle.hasher
        self._parts = parts
        self._findings = findings
        self._thinnings = thinnings
        self._collected: set[Hashable] = set()
        self._lost_parts: dict[ChunkId, tuple[str, list[SnapshotId]]] = {}
        self._lost_lists: dict[str, dict[SnapshotId, list[str]]] = {}

    def add(self, snapshot_id: SnapshotId, record: SnapshotRecord) -> None:
        """Check one snapshot's manifest and note what it needs."""
        where = snapshot_name(snapshot_id)
        entries: list[Entry] = []
        whole = True
        for part_id in record.part_ids:
            self.lengths.setdefault(part_id, None)
            part = self._parts.read(part_id)
            if part.error:
                self.reported.add(part_id)
                self._lost_parts.setdefault(part_id, (part.error, []))[1].append(snapshot_id)
            for path, message in (part.unresolved or {}).items():
                self._lost_lists.setdefault(message, {}).setdefault(snapshot_id, []).append(path)
            whole = whole and not part.error and not part.unresolved
            entries.extend(part.entries)
        kept = self._parts.kept(record.part_ids, self._thinnings.get(snapshot_id))
        for (key, part), part_id in zip(kept, record.part_ids, strict=True):
            if key not in self._collected:
                self._collected.add(key)
                self._collect(part.entries, part_id)
        if whole:
            complaints = check_manifest(entries, record, self._hasher)
            if complaints:
                shown = some((f"{path!r}: {message}" for path, message in complaints), count=_NAMED_MAX)
                touched = sorted({path for path, _ in complaints if path})
                self._findings.problem("snapshot", where, f"the manifest is no state: {shown}", {snapshot_id: touched})

    def report(self) -> None:
        """Name the parts and id lists that cannot be read, each once."""
        for part_id, (message, snapshot_ids) in self._lost_parts.items():
            self._findings.problem(
                "part",
                PACKS,
                f"manifest part {part_id.hex()} cannot be read, so its leaves cannot be named: {message}",
                dict.fromkeys(snapshot_ids, ()),
            )
        for message, affected in self._lost_lists.items():
            self._findings.problem("part", PACKS, f"the chunk ids of a long leaf cannot be read: {message}", affected)

    def _collect(self, entries: Collection[Entry], part_id: ChunkId) -> None:
        id_bytes = self._hasher.digest_bytes
        for entry in entries:
            for list_id in split_ids(entry.id_lists or b"", id_bytes):
                self.lengths.setdefault(list_id, None)
                if entry.chunks is None:
                    self.reported.add(list_id)
            for index, chunk_id in enumerate(entry.chunk_ids(id_bytes)):
                expected = chunk_bytes(entry.raw_bytes, index)
                if self.lengths.setdefault(chunk_id, expected) not in (None, expected):
                    self._findings.problem(
                        "part",
                        PACKS,
                        f"manifest part {part_id.hex()}, leaf {entry.path!r}: chunk {chunk_id.hex()} is "
                        f"expected to have {expected} bytes, and {self.lengths[chunk_id]} elsewhere",
                    )


# ---- packs -------------------------------------------------------------------------------------------------


def _list_packs(handle: Handle, findings: Findings) -> tuple[list[PackId], int]:
    """The packs, after the index was brought in line with them, and the bytes of their files."""
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
    return sorted(listing), sum(sizes.get(pack_id, 0) for pack_id in listing)


def _meter(progress: Progress | None, total_bytes: int) -> Callable[[int], None]:
    done = 0

    def advance(count_bytes: int) -> None:
        nonlocal done
        done = min(total_bytes, done + count_bytes)
        if progress is not None:
            progress(done, total_bytes)

    return advance
