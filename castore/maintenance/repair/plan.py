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
from castore.format.layout import pack_name, parse_lost_name
from castore.format.pack import RecordKind
from castore.ids import ChunkId, PackId, SnapshotId
from castore.losses import Loss, make_loss
from castore.maintenance.parts import affected_leaves
from castore.maintenance.repair.files import (
    RefOffer,
    Restore,
    SetAside,
    ref_offers,
    unreadable_condemned,
    unreadable_snapshots,
)
from castore.maintenance.repair.salvage import Salvage, plan_salvage
from castore.maintenance.repair.sources import ChunkSource, ReadRaw
from castore.maintenance.verify import Examination
from castore.marks import damaged_marks
from castore.pack.reader import read_header
from castore.repository import Handle


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
    snapshots, restores = unreadable_snapshots(handle, found, left)
    left += [problem.message for problem in found.findings.problems if problem.kind == "snapshot" and problem.leaves]
    set_aside = [*snapshots, *unreadable_condemned(handle)]
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
        tuple(ref_offers(found, losses)),
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
