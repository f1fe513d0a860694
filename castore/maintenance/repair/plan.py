"""What a repair will do, as a value: planned from an examination, so that a dry run is the same without the acting.

damaged packs          → salvage their records into new packs, then quarantine them
chunks that are lost   → write them again from another source that holds their content
what stays lost        → mark the snapshots, leaf by leaf; unmark those that are whole again
unreadable files       → quarantine snapshots and condemned sets
refs                   → offer the newest whole snapshot of the same branch
the index              → build it again
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from castore.damage_marks import mark_names, read_mark
from castore.errors import CastoreError, DamageError, RepositoryAccessError, StorageError, UnsupportedFormatError
from castore.format.layout import (
    BRANCHES,
    GC,
    TAGS,
    check_ref_name,
    decode_ref_name,
    is_condemned_name,
    pack_name,
    parse_lost_name,
    snapshot_name,
)
from castore.format.pack import RecordKind
from castore.format.snapshot import rebuild_snapshot
from castore.format.textfile import decode_text_file
from castore.ids import ChunkId, PackId, SnapshotId
from castore.losses import Loss, make_loss
from castore.maintenance.parts import affected_leaves
from castore.maintenance.repair.salvage import Salvage, plan_salvage
from castore.maintenance.repair.sources import ChunkSource, ReadRaw
from castore.maintenance.verify import Examination
from castore.marks import damaged_marks
from castore.options import SNAPSHOT_BYTES_MAX, TEXT_FILE_BYTES_MAX
from castore.pack.reader import read_header
from castore.repository import Handle
from castore.snapshots import read_record


@dataclass(frozen=True, slots=True)
class SetAside:
    """A file that goes to quarantine as it is."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Restore:
    """A snapshot whose body is whole, in a file that is damaged around it or has the name of another."""

    name: str
    """Where it lies."""
    named: SnapshotId
    """What the file is called after."""
    snapshot_id: SnapshotId
    """What it is, by its digest."""


@dataclass(frozen=True, slots=True)
class Heal:
    """A lost chunk that is written again."""

    chunk_id: ChunkId
    kind: RecordKind
    source: int
    """Place among the sources."""
    read: ReadRaw = field(repr=False, compare=False)
    """Its content, from there."""


@dataclass(frozen=True, slots=True)
class RefOffer:
    """A branch or tag that names nothing that can be read, and where it could point instead."""

    file_name: str
    name: str
    is_branch: bool
    reason: str
    offered: SnapshotId | None
    """The newest whole snapshot that was saved to that branch; None: there is none, or it is a tag."""


@dataclass(frozen=True, slots=True)
class RepairPlan:
    """Everything that a repair would do."""

    salvages: tuple[Salvage, ...]
    set_aside: tuple[SetAside, ...]
    unmarked: tuple[SetAside, ...]
    """Marks of forgetting, thinning and orphans that cannot be read; without them more is kept, never less."""
    restores: tuple[Restore, ...]
    heals: tuple[Heal, ...]
    losses: tuple[Loss, ...]
    """What stays lost, snapshot by snapshot."""
    new_losses: tuple[Loss, ...]
    """The part of it that was not marked as such, or not in this way."""
    healed: tuple[SnapshotId, ...]
    """Marked as lossy, and whole again or gone: the marks are taken away."""
    stale_marks: tuple[str, ...]
    """Marks of damaged records that are whole, or go with their packs."""
    refs: tuple[RefOffer, ...]
    rebuild_index: bool
    left: tuple[str, ...]
    """What no repair can mend, with the next step."""
    source_names: tuple[str, ...] = field(default=())

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do; refs may be broken all the same."""
        work = (
            self.salvages,
            self.set_aside,
            self.unmarked,
            self.heals,
            self.new_losses,
            self.healed,
            self.stale_marks,
        )
        return not any(work) and not self.rebuild_index

    @property
    def copied_bytes(self) -> int:
        """Stored bytes that are copied into new packs."""
        return sum(salvage.kept_bytes for salvage in self.salvages)

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "salvages": [
                {
                    "pack": salvage.pack_id,
                    "reason": salvage.reason,
                    "kept_count": len(salvage.kept),
                    "kept_bytes": salvage.kept_bytes,
                    "dropped": [row.chunk_id.hex() for row in salvage.dropped],
                }
                for salvage in self.salvages
            ],
            "set_aside": [{"file": file.name, "reason": file.reason} for file in (*self.set_aside, *self.unmarked)],
            "restores": [{"file": file.name, "snapshot": file.snapshot_id} for file in self.restores],
            "heals": [{"chunk": heal.chunk_id.hex(), "from": self.source_names[heal.source]} for heal in self.heals],
            "losses": {
                loss.snapshot_id: {
                    "leaves": list(loss.leaves),
                    "leaf_count": loss.leaf_count,
                    "parts": [part_id.hex() for part_id in loss.parts],
                }
                for loss in self.losses
            },
            "healed": list(self.healed),
            "stale_marks": list(self.stale_marks),
            "refs": [
                {"file": ref.file_name, "name": ref.name, "reason": ref.reason, "offered": ref.offered}
                for ref in self.refs
            ],
            "rebuild_index": self.rebuild_index,
            "left": list(self.left),
        }


def plan_repair(
    handle: Handle, found: Examination, sources: Sequence[ChunkSource], *, beat: Callable[[], None] = lambda: None
) -> RepairPlan:
    """Plan. Reads damaged packs once more, and the sources; writes nothing. `found` is an examination with data; `beat`
    is called at every step of long work.

    Raises UnsupportedFormatError when a pack is of a newer castore: what rests on it would look damaged.
    """
    _check_formats(handle, found)
    left: list[str] = []
    salvages = _plan_salvages(handle, found, left, beat)
    available = set(found.survey.depths)
    available.update(row.chunk_id for salvage in salvages for row in salvage.verified)
    heals = _plan_heals(found, available, sources, beat)
    available.update(heal.chunk_id for heal in heals)
    _revive(found, salvages, available)
    losses = _losses(handle, found, available)
    snapshots, restores = _unreadable_snapshots(handle, found, left)
    left += [problem.message for problem in found.findings.problems if problem.kind == "snapshot" and problem.leaves]
    set_aside = [*snapshots, *_unreadable_condemned(handle)]
    gone = {salvage.pack_id for salvage in salvages}
    return RepairPlan(
        tuple(salvages),
        tuple(set_aside),
        tuple(SetAside(name, str(error)) for name, error in sorted(damaged_marks(handle.backend).items())),
        tuple(restores.values()),
        tuple(heals),
        tuple(losses.values()),
        tuple(loss for loss in losses.values() if not _is_marked(found, loss)),
        _healed(found, losses),
        tuple(_stale_marks(handle, found, gone)),
        tuple(_offers(found, losses)),
        any(problem.kind == "index" for problem in found.findings.problems),
        tuple(left),
        tuple(source.name for source in sources),
    )


# ---- chunks ------------------------------------------------------------------------------------------------


def _check_formats(handle: Handle, found: Examination) -> None:
    for pack_id in sorted(found.survey.damaged_packs):
        name = pack_name(pack_id)
        with suppress(DamageError, StorageError, RepositoryAccessError):
            reader = handle.backend.open_reader(name)
            try:
                read_header(reader, where=name)
            finally:
                reader.close()


def _plan_salvages(handle: Handle, found: Examination, left: list[str], beat: Callable[[], None]) -> list[Salvage]:
    salvages = []
    for pack_id in sorted(found.survey.suspect_packs):
        name = pack_name(pack_id)
        problems = [problem.message for problem in found.findings.problems if problem.where == name]
        reason = problems[0] if problems else "damaged"
        try:
            salvage = plan_salvage(handle, pack_id, reason, there=found.survey.depths.keys(), beat=beat)
        except UnsupportedFormatError as error:
            left.append(f"{name}: {error}: it needs a newer castore, which is no damage")
        except CastoreError as error:
            left.append(f"{name}: {error}; run repair again when it can be opened")
        else:
            salvages.append(salvage)
    return salvages


def _plan_heals(
    found: Examination, available: Collection[ChunkId], sources: Sequence[ChunkSource], beat: Callable[[], None]
) -> list[Heal]:
    """Whatever the sources have of the chunks that snapshots need, and of bases that differences rest on."""
    needed = found.needs.lengths.keys() - set(available)
    bases = {base_id for fault in found.survey.faults for base_id in fault.base_ids} - set(available)
    wanted: set[ChunkId] = {*needed, *bases}
    heals = []
    for number, source in enumerate(sources):
        if not wanted:
            break
        for chunk_id, read in sorted(source.find(wanted, beat=beat).items()):
            wanted.discard(chunk_id)
            heals.append(Heal(chunk_id, _kind_of(found, chunk_id), number, read))
    return heals


def _kind_of(found: Examination, chunk_id: ChunkId) -> RecordKind:
    if chunk_id in found.needs.part_ids:
        return RecordKind.PART
    is_list = chunk_id in found.needs.lengths and found.needs.lengths[chunk_id] is None
    return RecordKind.ID_LIST if is_list else RecordKind.LEAF


def _revive(found: Examination, salvages: Sequence[Salvage], available: set[ChunkId]) -> None:
    """Add what is whole by itself and only lacked its base, once that is available."""
    resting = [row for salvage in salvages for row in salvage.resting]
    resting += [fault.row for fault in found.survey.faults if fault.base_ids]
    for row in sorted(resting, key=lambda row: row.depth):
        bases = set(row.base_ids)
        if bases <= available and not bases <= found.survey.depths.keys():
            available.add(row.chunk_id)


def _losses(handle: Handle, found: Examination, available: Collection[ChunkId]) -> dict[SnapshotId, Loss]:
    """Snapshot → what stays lost of it."""
    lost = found.needs.lengths.keys() - set(available)
    snapshots = {snapshot_id: record.part_ids for snapshot_id, record in found.records.items()}
    affected = affected_leaves(found.parts, snapshots, lost, found.marks.thinnings)
    leaves: dict[SnapshotId, set[str]] = {}
    parts: dict[SnapshotId, set[ChunkId]] = {}
    for chunk_id, touched in affected.items():
        for snapshot_id, paths in touched.items():
            leaves.setdefault(snapshot_id, set()).update(paths)
            if found.needs.lengths[chunk_id] is None:
                parts.setdefault(snapshot_id, set()).add(chunk_id)
    now_ns = handle.clock()
    return {
        snapshot_id: make_loss(snapshot_id, paths, sorted(parts.get(snapshot_id, ())), time_ns=now_ns)
        for snapshot_id, paths in leaves.items()
    }


def _is_marked(found: Examination, loss: Loss) -> bool:
    known = found.losses.get(loss.snapshot_id)
    return known is not None and (known.leaves, known.leaf_count, set(known.parts)) == (
        loss.leaves,
        loss.leaf_count,
        set(loss.parts),
    )


def _healed(found: Examination, losses: Mapping[SnapshotId, Loss]) -> tuple[SnapshotId, ...]:
    damaged = (parse_lost_name(name) for name in found.damaged_losses)
    marked = {*found.losses, *(snapshot_id for snapshot_id in damaged if snapshot_id is not None)}
    return tuple(sorted(marked - losses.keys()))


def _stale_marks(handle: Handle, found: Examination, gone: Collection[PackId]) -> list[str]:
    faulty = {(fault.name, fault.row.offset) for fault in found.survey.faults}
    stale = []
    for name in mark_names(handle.backend):
        try:
            mark = read_mark(handle.backend, name)
        except DamageError:
            stale.append(name)
            continue
        except CastoreError:
            continue
        stays = mark.pack_id in found.pack_ids and mark.pack_id not in gone
        if not stays or not any((pack_name(mark.pack_id), offset) in faulty for offset in mark.offsets):
            stale.append(name)
    return stale


# ---- files -------------------------------------------------------------------------------------------------


def _unreadable_snapshots(
    handle: Handle, found: Examination, left: list[str]
) -> tuple[list[SetAside], dict[SnapshotId, Restore]]:
    """Files to set aside, and the snapshots that they hold after all: their bodies are whole."""
    aside: list[SetAside] = []
    restores: dict[SnapshotId, Restore] = {}
    for snapshot_id in sorted(found.unreadable):
        name = snapshot_name(snapshot_id)
        try:
            read_record(handle.backend, snapshot_id)
        except (DamageError, UnsupportedFormatError) as error:
            restore = _restore(handle, name, snapshot_id)
            if restore is None and isinstance(error, UnsupportedFormatError):
                left.append(str(error))
                continue
            aside.append(SetAside(name, str(error)))
            if restore is not None and restore.snapshot_id not in found.records:
                restores[restore.snapshot_id] = restore
        except CastoreError as error:
            left.append(f"{name}: {error}")
    return aside, restores


def _restore(handle: Handle, name: str, snapshot_id: SnapshotId) -> Restore | None:
    try:
        data = handle.backend.read(name, max_bytes=SNAPSHOT_BYTES_MAX)
    except CastoreError:
        return None
    rebuilt = rebuild_snapshot(data, handle.hasher, named=snapshot_id)
    return Restore(name, snapshot_id, rebuilt[0]) if rebuilt is not None else None


def _unreadable_condemned(handle: Handle) -> list[SetAside]:
    """Condemned sets that nobody can read. Whoever wrote one is dead: the repair holds the claim of collectors."""
    aside = []
    for info in handle.backend.list(GC):
        if is_condemned_name(info.name):
            try:
                fields = decode_text_file(handle.backend.read(info.name, max_bytes=TEXT_FILE_BYTES_MAX), name=info.name)
                if all(isinstance(name, str) for name in fields.get("packs", [None])):
                    continue
                aside.append(SetAside(info.name, f"{info.name}: expected pack ids"))
            except DamageError as error:
                aside.append(SetAside(info.name, str(error)))
            except CastoreError:
                continue
    return aside


def _offers(found: Examination, losses: Mapping[SnapshotId, Loss]) -> list[RefOffer]:
    readable = {name: ref for name, ref in found.refs.items() if ref.snapshot_id in found.records}
    offers = []
    for problem in found.findings.problems:
        if problem.kind != "ref" or problem.where in readable:
            continue
        prefix = BRANCHES if problem.where.startswith(BRANCHES) else TAGS
        try:
            name = decode_ref_name(problem.where.removeprefix(prefix))
            check_ref_name(name)
        except CastoreError:
            continue  # no name of a ref: the finding says what to do with the file
        offers.append(_offer(found, losses, problem.where, name, problem.message, is_branch=prefix == BRANCHES))
    named = {offer.file_name for offer in offers}
    for file_name, ref in found.refs.items():
        if ref.snapshot_id in found.unreadable and file_name not in named:
            reason = f"{ref.name!r} names snapshot {ref.snapshot_id}, which cannot be read"
            is_branch = file_name.startswith(BRANCHES)
            offers.append(_offer(found, losses, file_name, ref.name, reason, is_branch=is_branch))
    return offers


def _offer(
    found: Examination,
    losses: Mapping[SnapshotId, Loss],
    file_name: str,
    name: str,
    reason: str,
    *,
    is_branch: bool,
) -> RefOffer:
    whole = (
        snapshot_id
        for snapshot_id, record in found.records.items()
        if is_branch and record.branch == name and snapshot_id not in losses
    )
    return RefOffer(file_name, name, is_branch, reason, next(whole, None))
