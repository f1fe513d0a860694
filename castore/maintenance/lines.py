"""The history of a repository as lines for the rules of retention: one for each branch, one for what only a tag
reaches. Reads refs, marks and snapshot files; no manifest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from castore.backend.base import Backend
from castore.errors import DamageError, UnknownRefError
from castore.format.snapshot import SnapshotRecord
from castore.ids import SnapshotId
from castore.maintenance.retention import Candidate, Line
from castore.marks import Forgotten, across, forgotten
from castore.refs import list_branches, list_tags
from castore.snapshots import read_record


@dataclass(frozen=True, slots=True)
class History:
    """What the refs reach and is not forgotten."""

    lines: tuple[Line, ...]
    heads: Mapping[SnapshotId, tuple[str, ...]]
    """Snapshot → branches that are at it."""
    tags: Mapping[SnapshotId, tuple[str, ...]]
    """Snapshot → tags that name it."""
    records: Mapping[SnapshotId, SnapshotRecord]
    unreadable: Mapping[SnapshotId, str]
    """Snapshots that are damaged, or gone without a marker → why. What lies behind them is on no line."""


def read_history(backend: Backend) -> History:
    """Follow every ref to its end. Raises DamageError when a ref or a marker cannot be read."""
    branches, tags = list_branches(backend), list_tags(backend)
    heads = _by_snapshot((ref.snapshot_id, ref.name) for ref in branches)
    tagged = _by_snapshot((ref.snapshot_id, ref.name) for ref in tags)
    named = heads.keys() | tagged.keys()  # kept even when it has a marker
    reader = _Reader(backend, {found: mark for found, mark in forgotten(backend).items() if found not in named})
    lines = [Line(ref.name, tuple(reader.candidates(ref.snapshot_id))) for ref in branches]
    on_branches = {found.snapshot_id for line in lines for found in line.snapshots}
    for ref in tags:
        rest = [found for found in reader.candidates(ref.snapshot_id) if found.snapshot_id not in on_branches]
        if rest:
            lines.append(Line(f"tag {ref.name}", tuple(rest), is_branch=False))
    return History(tuple(lines), heads, tagged, reader.records, reader.unreadable)


def _by_snapshot(pairs: Iterator[tuple[SnapshotId, str]]) -> dict[SnapshotId, tuple[str, ...]]:
    names: dict[SnapshotId, tuple[str, ...]] = {}
    for snapshot_id, name in pairs:
        names[snapshot_id] = (*names.get(snapshot_id, ()), name)
    return names


class _Reader:
    """Reads each record once."""

    def __init__(self, backend: Backend, marks: Mapping[SnapshotId, Forgotten]) -> None:
        self.records: dict[SnapshotId, SnapshotRecord] = {}
        self.unreadable: dict[SnapshotId, str] = {}
        self._backend = backend
        self._marks = marks

    def candidates(self, head: SnapshotId) -> Iterator[Candidate]:
        """The history of a head: its first parents, newest first, then what only other parents reach, by time."""
        seen: set[SnapshotId] = set()
        beside: list[SnapshotId] = []
        yield from self._first_parents(head, seen, beside)
        others: list[Candidate] = []
        while beside:
            others.extend(self._first_parents(beside.pop(), seen, beside))
        yield from sorted(others, key=lambda found: found.time_ns, reverse=True)

    def _first_parents(self, start: SnapshotId, seen: set[SnapshotId], beside: list[SnapshotId]) -> Iterator[Candidate]:
        current: SnapshotId | None = start
        while current is not None and current not in seen:
            seen.add(current)
            record = self._read(current)
            if record is None:
                return
            yield Candidate(current, record.step, record.time_ns, record.metrics)
            parents, _ = across(record.parents, self._marks)
            current = parents[0] if parents else None
            beside.extend(parents[1:])

    def _read(self, snapshot_id: SnapshotId) -> SnapshotRecord | None:
        if snapshot_id not in self.records and snapshot_id not in self.unreadable:
            try:
                self.records[snapshot_id] = read_record(self._backend, snapshot_id)
            except UnknownRefError:
                self.unreadable[snapshot_id] = "it is not there, and was not forgotten"
            except DamageError as error:
                self.unreadable[snapshot_id] = str(error)
        return self.records.get(snapshot_id)
