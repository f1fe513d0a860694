"""The snapshots of the source, and the way from one to the next: across what was forgotten or is left out."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence

from castore.errors import DamageError, UnknownRefError
from castore.format.snapshot import SnapshotRecord
from castore.ids import SnapshotId
from castore.marks import Forgotten, forgotten
from castore.refs import list_branches, list_tags
from castore.repository import Handle
from castore.snapshots import read_record
from castore.transfer.moved import MovedSnapshots

NOT_SENT = "not sent: history was cut"
"""Reason of a mark that stands for a snapshot which the target never had: a later push may still bring it."""


class History:
    """Reads each record once."""

    def __init__(
        self, source: Handle, heads: Collection[SnapshotId], *, left_out: frozenset[SnapshotId] = frozenset()
    ) -> None:
        self._source = source
        self._left_out = left_out
        named = {ref.snapshot_id for ref in (*list_branches(source.backend), *list_tags(source.backend))}
        self._marks = {
            found: mark
            for found, mark in forgotten(source.backend).items()
            if found not in named and found not in heads  # a ref outweighs a marker
        }
        self._records: dict[SnapshotId, SnapshotRecord | None] = {}
        self.gaps: set[SnapshotId] = set()
        self.passed: set[SnapshotId] = set()
        """Snapshots that were stepped over."""

    def record(self, snapshot_id: SnapshotId) -> SnapshotRecord | None:
        """None when it is gone. Raises DamageError."""
        if snapshot_id not in self._records:
            try:
                self._records[snapshot_id] = read_record(self._source.backend, snapshot_id)
            except UnknownRefError:
                self._records[snapshot_id] = None
            except DamageError as error:
                error.args = (
                    f"{error}; history before it cannot be sent: give `--depth`, or forget that snapshot",
                    *error.args[1:],
                )
                raise
        return self._records[snapshot_id]

    def parents(self, snapshot_id: SnapshotId) -> list[SnapshotId]:
        """The nearest ancestors that are sent, or were cut off."""
        found: dict[SnapshotId, None] = {}
        pending = deque(self._named_parents(snapshot_id))
        seen: set[SnapshotId] = set()
        while pending:
            parent = pending.popleft()
            if parent in seen:
                continue
            seen.add(parent)
            if parent in self._marks or parent in self._left_out:
                self.passed.add(parent)
                pending.extend(self._named_parents(parent))
            else:
                found[parent] = None
        return list(found)

    def _named_parents(self, snapshot_id: SnapshotId) -> tuple[SnapshotId, ...]:
        if snapshot_id in self._marks:
            return self._marks[snapshot_id].parents
        record = self.record(snapshot_id)
        return record.parents if record is not None else ()

    def parents_first(self, heads: Sequence[SnapshotId], *, depth: int | None) -> list[SnapshotId]:
        """The heads and their ancestors, at most `depth` levels of each."""
        chosen: dict[SnapshotId, None] = {}
        level = list(dict.fromkeys(heads))
        count = 0
        while level and (depth is None or count < depth):
            chosen.update(dict.fromkeys(level))
            parents = (parent for snapshot_id in level for parent in self.parents(snapshot_id))
            level = [parent for parent in dict.fromkeys(parents) if parent not in chosen]
            count += 1
        where = self._source.backend.location
        for head in heads:
            if self.record(head) is None:
                raise UnknownRefError(f"{where} has no snapshot {head}: its ref names one that is gone")
        present = {snapshot_id for snapshot_id in chosen if self.record(snapshot_id) is not None}
        self.gaps |= chosen.keys() - present
        return list(self._ordered(present, heads))

    def _ordered(self, present: set[SnapshotId], heads: Iterable[SnapshotId]) -> Iterator[SnapshotId]:
        done: set[SnapshotId] = set()
        for head in heads:
            stack = [(head, False)]
            while stack:
                snapshot_id, is_ready = stack.pop()
                if snapshot_id in done or snapshot_id not in present:
                    continue
                if is_ready:
                    done.add(snapshot_id)
                    yield snapshot_id
                else:
                    stack.append((snapshot_id, True))
                    stack.extend((parent, False) for parent in self.parents(snapshot_id))

    def tombstones(self, chosen: Collection[SnapshotId], *, now_ns: int) -> tuple[Forgotten, ...]:
        """A mark for each snapshot that history passes through, or ends at, without its being sent."""
        marks: dict[SnapshotId, Forgotten] = {}
        sent = set(chosen)
        pending = [parent for snapshot_id in chosen for parent in self._named_parents(snapshot_id)]
        while pending:
            parent = pending.pop()
            if parent in sent or parent in marks:
                continue
            if parent in self._marks:
                marks[parent] = self._marks[parent]
                pending.extend(self._marks[parent].parents)
            else:
                marks[parent] = self._not_sent(parent, now_ns)
        return tuple(marks.values())

    def _not_sent(self, snapshot_id: SnapshotId, now_ns: int) -> Forgotten:
        try:
            record = self.record(snapshot_id)
        except DamageError:
            record = None
        branch, step, time_ns = (record.branch, record.step, record.time_ns) if record else ("", None, 0)
        return Forgotten(snapshot_id, (), branch, step, time_ns, now_ns, NOT_SENT)

    def reaches(self, head: SnapshotId, wanted: SnapshotId, moved: MovedSnapshots) -> bool:
        """Whether the target's snapshot `wanted` stands for `head` or one of its ancestors."""
        seen: set[SnapshotId] = set()
        pending = [head]
        while pending:
            snapshot_id = pending.pop()
            if snapshot_id in seen:
                continue
            seen.add(snapshot_id)
            # What is gone or forgotten here is an ancestor all the same: its child names it.
            if moved.find(snapshot_id) == wanted or (moved.same_hash and snapshot_id == wanted):
                return True
            pending.extend(self._named_parents(snapshot_id))
        return False
