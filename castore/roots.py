"""What must be kept: the live snapshots of a repository, what keeps them alive, and what may go.

    live   what a ref names · what is reached from there through parents, across tombstones, and is not forgotten ·
           orphans within their grace period, and what is reached from them in the same way
    dead   the other snapshot files that can be read: forgotten, or orphaned for too long

A ref outweighs a marker: a snapshot that a branch or tag names is live even when it was forgotten. An orphan also stays
as long as a save may be under way that made it: its commit is still to come.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from castore.backend.base import Backend
from castore.errors import DamageError, UnknownRefError
from castore.format.layout import (
    LOST,
    SNAPSHOTS,
    forgotten_name,
    lost_name,
    orphan_name,
    parse_lost_name,
    parse_snapshot_name,
    thin_name,
)
from castore.format.snapshot import SnapshotRecord
from castore.ids import SnapshotId
from castore.leases import list_leases
from castore.marks import Forgotten, Thinning, across, forgotten, orphan_notes, thinnings
from castore.refs import list_branches, list_tags
from castore.snapshots import read_record


@dataclass(frozen=True, slots=True)
class Roots:
    """The snapshots of a repository at one time, judged."""

    heads: Mapping[SnapshotId, str]
    """What branches and tags name → which of them does."""
    live: Mapping[SnapshotId, SnapshotRecord]
    """What must stay readable, whole but for what `thinnings` drops."""
    thinnings: Mapping[SnapshotId, Thinning]
    """Of live snapshots."""
    orphans: Mapping[SnapshotId, int]
    """Live ones that no ref reaches → when they may go, ns since 1970; those that only other orphans reach are not
    listed."""
    dead: Mapping[SnapshotId, str]
    """Snapshot files that may go → why. Their markers stay."""
    damaged: Mapping[SnapshotId, str]
    """Snapshot files that cannot be read and are not forgotten → why. Nothing may be freed before they are: what they
    and their ancestors need is not known."""
    missing: Mapping[SnapshotId, str]
    """Snapshots that a ref or a live snapshot names, and that are neither there nor forgotten → what names them. Their
    ancestors are not known either."""
    contracted: Mapping[SnapshotId, tuple[Forgotten, Forgotten]]
    """Tombstone → what it says, and what it says when it stands for the tombstones behind it too. To be put there
    before the stale marks go, which those are among."""
    stale_marks: tuple[str, ...]
    """Files that say nothing any more: tombstones that no history reaches through; overlays, notes and losses of
    snapshots that are gone."""


def live_roots(backend: Backend, *, now_ns: int, grace_ns: int) -> Roots:
    """Judge every snapshot. Reads every snapshot file and mark once; no manifest.

    `grace_ns` is how long orphans are kept. Raises DamageError when a ref or a mark cannot be read: to guess would be
    to lose data.
    """
    # Refs first: a snapshot committed after this look is an orphan within its grace, or made by a save under way.
    heads = {ref.snapshot_id: f"branch {ref.name!r}" for ref in list_branches(backend)}
    heads |= {ref.snapshot_id: f"tag {ref.name!r}" for ref in list_tags(backend)}
    marks = forgotten(backend)
    walk = _Walk(backend, heads, marks)
    for head, what in heads.items():
        walk.reach(head, what)
    notes = orphan_notes(backend)
    expired_before_ns = min(
        [now_ns - grace_ns, *(lease.started_ns for lease in list_leases(backend) if lease.may_be_alive)]
    )
    present = _present(backend)
    orphaned = walk.read_all(present - walk.live.keys() - marks.keys())
    orphans: dict[SnapshotId, int] = {}
    for snapshot_id, record in sorted(orphaned.items(), key=lambda item: item[1].time_ns, reverse=True):
        since_ns = max(record.time_ns, notes.get(snapshot_id, 0))
        if since_ns >= expired_before_ns and snapshot_id not in walk.live:
            orphans[snapshot_id] = since_ns + grace_ns
            walk.reach(snapshot_id, "an orphan")
    dead = dict.fromkeys(present - walk.live.keys() - walk.damaged.keys(), "no branch or tag reaches it")
    dead |= {found: f"forgotten: {marks[found].reason}" for found in dead.keys() & marks.keys()}
    overlays = thinnings(backend)
    # Also what a snapshot names that may go: undelete may bring it back before it does.
    gone = {found: mark for found, mark in marks.items() if found not in present}
    named = {parent for record in (*walk.live.values(), *orphaned.values()) for parent in record.parents}
    named |= {parent for found in marks.keys() & present for parent in marks[found].parents}
    named &= gone.keys()
    stale = [
        *(forgotten_name(found) for found in gone.keys() - named),
        *(thin_name(found) for found in overlays.keys() - present),
        *(lost_name(found) for found in _marked_as_lost(backend) - present),
        *(orphan_name(found) for found, ns in notes.items() if found not in present or ns < expired_before_ns),
    ]
    return Roots(
        heads,
        walk.live,
        {found: overlay for found, overlay in overlays.items() if found in walk.live},
        orphans,
        dead,
        walk.damaged,
        walk.missing,
        _contract(gone, named),
        tuple(sorted(stale)),
    )


class _Walk:
    """Follows parents, across forgotten snapshots."""

    def __init__(self, backend: Backend, heads: Collection[SnapshotId], marks: Mapping[SnapshotId, Forgotten]) -> None:
        self.live: dict[SnapshotId, SnapshotRecord] = {}
        self.damaged: dict[SnapshotId, str] = {}
        self.missing: dict[SnapshotId, str] = {}
        self._backend = backend
        self._heads = heads
        self._marks = marks
        self._seen: set[SnapshotId] = set()

    def reach(self, start: SnapshotId, named_by: str) -> None:
        """Everything that is reached from a root is live, but for what is forgotten."""
        pending = [(start, named_by)]
        while pending:
            snapshot_id, what = pending.pop()
            if snapshot_id in self._seen:
                continue
            self._seen.add(snapshot_id)
            mark = self._marks.get(snapshot_id)
            if mark is not None and snapshot_id not in self._heads:
                pending.extend((parent, f"tombstone {snapshot_id[:12]}") for parent in mark.parents)
                continue
            record = self._read(snapshot_id)
            if record is not None:
                self.live[snapshot_id] = record
                pending.extend((parent, f"snapshot {snapshot_id[:12]}") for parent in record.parents)
            elif snapshot_id not in self.damaged:
                self.missing[snapshot_id] = what

    def read_all(self, snapshot_ids: Iterable[SnapshotId]) -> dict[SnapshotId, SnapshotRecord]:
        """The records of those that can be read."""
        found = ((snapshot_id, self._read(snapshot_id)) for snapshot_id in snapshot_ids)
        return {snapshot_id: record for snapshot_id, record in found if record is not None}

    def _read(self, snapshot_id: SnapshotId) -> SnapshotRecord | None:
        """The record; None when it is gone, or damaged, which is noted."""
        try:
            return read_record(self._backend, snapshot_id)
        except UnknownRefError:
            return None
        except DamageError as error:
            self.damaged[snapshot_id] = str(error)
            return None


def _present(backend: Backend) -> set[SnapshotId]:
    names = (parse_snapshot_name(info.name) for info in backend.list(SNAPSHOTS))
    return {snapshot_id for snapshot_id in names if snapshot_id is not None}


def _marked_as_lost(backend: Backend) -> set[SnapshotId]:
    names = (parse_lost_name(info.name) for info in backend.list(LOST))
    return {snapshot_id for snapshot_id in names if snapshot_id is not None}


def _contract(
    gone: Mapping[SnapshotId, Forgotten], named: Collection[SnapshotId]
) -> dict[SnapshotId, tuple[Forgotten, Forgotten]]:
    """For each of the named tombstones the one that stands for those behind it, where there are any: else a run that
    keeps its last three snapshots would keep a tombstone for each save it ever made.
    """
    contracted: dict[SnapshotId, tuple[Forgotten, Forgotten]] = {}
    for snapshot_id in named:
        mark = gone[snapshot_id]
        parents, passed = across(mark.parents, gone)
        if passed - {snapshot_id}:
            count = sum(gone[found].count for found in passed | {snapshot_id})
            contracted[snapshot_id] = (mark, replace(mark, parents=tuple(parents), count=count))
    return contracted
