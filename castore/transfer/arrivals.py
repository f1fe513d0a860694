"""Snapshot files of the target, and the marks beside them: made visible once their chunks are durable.

Marks come first. Without its overlay a thinned snapshot would look damaged; without tombstones, and the note of when
its grace began, a collector could not tell what it may take.
"""

from __future__ import annotations

from collections.abc import Iterable

from castore.backend.base import Backend
from castore.errors import DamageError
from castore.format.layout import snapshot_name
from castore.ids import SnapshotId
from castore.marks import (
    Forgotten,
    Thinning,
    forget_snapshot,
    forgotten,
    forgotten_ids,
    note_orphan,
    thin_snapshot,
    thinned_ids,
    unforget_snapshot,
)
from castore.snapshots import list_snapshot_ids, read_record
from castore.transfer.history import NOT_SENT


class Arrivals:
    """Snapshots that wait to be published, and those that were. Belongs to one thread."""

    def __init__(self, target: Backend, tombstones: Iterable[Forgotten], *, now_ns: int, check: bool) -> None:
        """`check`: replace a snapshot file that is rotten."""
        self._target = target
        self._now_ns = now_ns
        self._check = check
        self._tombstones = {mark.snapshot_id: mark for mark in tombstones}
        self._overlays: dict[SnapshotId, Thinning] = {}
        self._forgotten = forgotten(target)
        self._files: dict[SnapshotId, bytes] = {}
        self._parents: set[SnapshotId] = set()
        """Of the waiting files."""
        self._visible: set[SnapshotId] = set()

    @property
    def waiting_count(self) -> int:
        """Snapshots that are not published yet."""
        return len(self._files)

    def add(self, snapshot_id: SnapshotId, data: bytes, *, parents: Iterable[SnapshotId]) -> None:
        """A snapshot, parents before children."""
        self._files[snapshot_id] = data
        self._parents.update(parents)

    def add_overlay(self, overlay: Thinning) -> None:
        """The snapshot, which the target lacks, arrives thinned."""
        self._overlays[overlay.snapshot_id] = overlay

    def has_overlay(self, snapshot_id: SnapshotId) -> bool:
        """Whether the snapshot arrived thinned."""
        return snapshot_id in self._overlays

    def was_dropped(self, snapshot_id: SnapshotId) -> bool:
        """Whether the target has forgotten it on purpose."""
        mark = self._forgotten.get(snapshot_id)
        return mark is not None and mark.reason != NOT_SENT

    def publish(self) -> None:
        """Make the waiting snapshots visible, durably, parents first; their chunks are sealed."""
        if not self._files:
            return
        present = set(list_snapshot_ids(self._target))
        for snapshot_id in self._tombstones.keys() - present - forgotten_ids(self._target):
            forget_snapshot(self._target, self._tombstones[snapshot_id])
        for snapshot_id in self._files.keys() & self._overlays.keys():
            thin_snapshot(self._target, self._overlays[snapshot_id])
        for snapshot_id in self._files.keys() - present - self._parents:
            # Its record is as old as the save: without the note an interrupted push would be collected at once.
            note_orphan(self._target, snapshot_id, now_ns=self._now_ns)
        for snapshot_id, data in self._files.items():
            self._write(snapshot_id, data)
            mark_there = self._forgotten.get(snapshot_id)
            if mark_there is not None and mark_there.reason == NOT_SENT:
                self.revive(snapshot_id)
        self._visible |= self._files.keys()
        self._files.clear()
        self._parents.clear()

    def _write(self, snapshot_id: SnapshotId, data: bytes) -> None:
        name = snapshot_name(snapshot_id)
        if self._target.put_if_absent(name, data) or not self._check:
            return
        try:
            read_record(self._target, snapshot_id)
        except DamageError:
            self._target.delete(name)
            self._target.put_if_absent(name, data)

    def revive(self, snapshot_id: SnapshotId) -> None:
        """Take the mark away that the target forgot it, or never had it."""
        if self._forgotten.pop(snapshot_id, None) is not None:
            unforget_snapshot(self._target, snapshot_id)

    def stand(self) -> bool:
        """Whether all that was published is still there: no collector took a file before a ref made it needed."""
        present = set(list_snapshot_ids(self._target))
        marks = present | forgotten_ids(self._target)
        return (
            self._visible <= present
            and (not self._visible or self._tombstones.keys() <= marks)
            and self._overlays.keys() <= thinned_ids(self._target)
        )
