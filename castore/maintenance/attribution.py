"""What damage means: which snapshots and leaves are lost through which record, chunk or base."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from castore.errors import some
from castore.format.layout import PACKS
from castore.ids import ChunkId, SnapshotId
from castore.maintenance.pack_check import Needs, Survey
from castore.maintenance.parts import PartReader, affected_leaves
from castore.maintenance.record_check import Fault
from castore.maintenance.report import Findings
from castore.marks import Thinning


def report_losses(
    parts: PartReader,
    snapshots: Mapping[SnapshotId, tuple[ChunkId, ...]],
    needs: Needs,
    survey: Survey,
    findings: Findings,
    *,
    explained: Collection[ChunkId],
    thinnings: Mapping[SnapshotId, Thinning],
) -> None:
    """Name every faulty record and every absent chunk with all that need it, also through records that rest on it.

    Chunks in `explained` were named before. A record that lacks nothing but its base goes with the base.
    """
    touched = _Touched(parts, snapshots, needs, survey, thinnings)
    baseless = 0
    for fault in survey.faults:
        chunk_id = fault.row.chunk_id
        if touched.goes_with_base(fault):
            continue
        affected = {} if chunk_id in survey.depths else touched.by(chunk_id)
        if affected:
            findings.problem("record", fault.name, fault.message, affected, chunks=[chunk_id], offset=fault.row.offset)
        elif _lacks_base(fault, survey):
            baseless += 1  # garbage, or left over where a chunk was saved again: gc keeps the bases of what is needed
        else:
            why = "another copy of it is whole" if chunk_id in survey.depths else "no snapshot needs it"
            message = f"{fault.message}; nothing is lost: {why}"
            findings.problem("record", fault.name, message, chunks=[chunk_id], offset=fault.row.offset)
    if baseless:
        findings.note(
            f"{baseless} differences that no snapshot needs have lost their base; gc frees them with their packs"
        )
    recorded = {fault.row.chunk_id for fault in survey.faults}
    _report_absent(sorted(touched.lost - recorded - set(explained)), touched, findings)
    for fault in survey.faults:
        # Records that rest on each other in a circle have no other cause than themselves.
        if touched.goes_with_base(fault) and fault.row.chunk_id not in touched.named:
            affected = touched.by(fault.row.chunk_id)
            if affected:
                findings.loss("record", fault.name, fault.message, affected, chunks=[fault.row.chunk_id])


def _lacks_base(fault: Fault, survey: Survey) -> bool:
    """Whether a base is gone, or there only too deep: its own was collected, and rebased or pushed it came again."""
    depth = fault.row.depth
    return any(survey.depths.get(base_id, depth) >= depth for base_id in fault.base_ids)


class _Touched:
    """Which leaves of which snapshots cannot be read without a chunk that is lost."""

    def __init__(
        self,
        parts: PartReader,
        snapshots: Mapping[SnapshotId, tuple[ChunkId, ...]],
        needs: Needs,
        survey: Survey,
        thinnings: Mapping[SnapshotId, Thinning],
    ) -> None:
        self.named: set[ChunkId] = set()
        """Lost chunks that `by` was asked for, or that rest on them."""
        self._survey = survey
        self._resting: dict[ChunkId, set[ChunkId]] = {}
        """Lost base → lost chunks whose records rest on it."""
        for fault in survey.faults:
            if self.goes_with_base(fault):
                for base_id in set(fault.base_ids) - survey.depths.keys():
                    self._resting.setdefault(base_id, set()).add(fault.row.chunk_id)
        needed = needs.keys() - survey.depths.keys()
        self._affected = affected_leaves(parts, snapshots, needed, thinnings)
        self.lost = needed | self._resting.keys()

    def goes_with_base(self, fault: Fault) -> bool:
        """Whether the fault is nothing but a lost base, which is named by itself."""
        readable = self._survey.depths.keys()
        return fault.row.chunk_id not in readable and bool(set(fault.base_ids) - readable)

    def by(self, chunk_id: ChunkId) -> dict[SnapshotId, set[str]]:
        """Snapshot → leaves that need the chunk itself or what rests on it."""
        merged: dict[SnapshotId, set[str]] = {}
        seen: set[ChunkId] = set()
        pending = [chunk_id]
        while pending:
            current = pending.pop()
            if current not in seen:
                seen.add(current)
                pending.extend(self._resting.get(current, ()))
                for snapshot_id, paths in self._affected.get(current, {}).items():
                    merged.setdefault(snapshot_id, set()).update(paths)
        self.named |= seen
        return merged


def _report_absent(chunk_ids: Collection[ChunkId], touched: _Touched, findings: Findings) -> None:
    """One problem for all absent chunks that the same snapshots need."""
    groups: dict[tuple[SnapshotId, ...], list[ChunkId]] = {}
    leaves: dict[tuple[SnapshotId, ...], dict[SnapshotId, set[str]]] = {}
    for chunk_id in chunk_ids:
        affected = touched.by(chunk_id)
        key = tuple(sorted(affected))
        groups.setdefault(key, []).append(chunk_id)
        for snapshot_id, paths in affected.items():
            leaves.setdefault(key, {}).setdefault(snapshot_id, set()).update(paths)
    for key, absent in groups.items():
        if key:
            findings.loss(
                "chunk",
                PACKS,
                f"{len(absent)} chunks that {len(key)} snapshots need are in no pack (expected "
                f"{some(chunk_id.hex() for chunk_id in absent)}): a pack was removed, cut short or damaged; restore it "
                "from a copy and run `castore reindex`, or let `castore repair` look for their content elsewhere",
                leaves[key],
                chunks=absent,
            )
