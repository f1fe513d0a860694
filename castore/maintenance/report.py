"""What a verification found: values that people read and programs compare."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from castore.ids import SnapshotId

ProblemKind = Literal["config", "ref", "snapshot", "part", "chunk", "pack", "record", "index", "gc", "mark"]

Affected = Mapping[SnapshotId, Collection[str]]
"""Snapshots that some damage touches, each with the paths of its leaves that cannot be read.

No paths: they are unknown (a lost manifest), or all of them are touched (a lost snapshot file)."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is not as it must be."""

    where: str
    """The file, by its name in the repository."""
    message: str
    """What was expected, what was found, and the next step."""
    kind: ProblemKind
    snapshots: tuple[SnapshotId, ...] = ()
    """The snapshots that cannot be read whole because of it; empty when nothing is lost."""
    leaves: tuple[str, ...] = ()
    """Paths of the leaves of those snapshots that it touches; empty when they cannot be told."""

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "where": self.where,
            "kind": self.kind,
            "message": self.message,
            "snapshots": list(self.snapshots),
            "leaves": list(self.leaves),
        }


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The result of `verify`."""

    problems: tuple[Problem, ...]
    snapshot_count: int
    pack_count: int
    chunk_count: int
    """Distinct chunks that snapshots need."""
    checked_bytes: int
    """Stored bytes that were read, decoded and hashed; 0 without `data`."""
    with_data: bool
    orphans: tuple[SnapshotId, ...]
    """Snapshots that no branch or tag reaches, newest first."""
    notes: tuple[str, ...]
    """What is worth knowing and no damage: gone parents, packs that nobody needs, what crashes left."""
    damaged: tuple[tuple[SnapshotId, tuple[str, ...]], ...] = field(repr=False)

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return not self.problems

    @property
    def damaged_snapshots(self) -> dict[SnapshotId, tuple[str, ...]]:
        """Each snapshot that cannot be read whole, with the leaves that are lost, where they can be told."""
        return dict(self.damaged)

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "ok": self.ok,
            "with_data": self.with_data,
            "snapshot_count": self.snapshot_count,
            "pack_count": self.pack_count,
            "chunk_count": self.chunk_count,
            "checked_bytes": self.checked_bytes,
            "problems": [problem.to_json() for problem in self.problems],
            "damaged_snapshots": {snapshot_id: list(leaves) for snapshot_id, leaves in self.damaged},
            "orphans": list(self.orphans),
            "notes": list(self.notes),
        }


class Findings:
    """Problems and notes as they are found."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self._damaged: dict[SnapshotId, set[str]] = {}

    def problem(self, kind: ProblemKind, where: str, message: str, affected: Affected | None = None) -> None:
        """Add a problem and what it touches."""
        touched = affected or {}
        for snapshot_id, paths in touched.items():
            self._damaged.setdefault(snapshot_id, set()).update(paths)
        leaves = sorted({path for paths in touched.values() for path in paths})
        self.problems.append(Problem(where, message, kind, tuple(touched), tuple(leaves)))

    def note(self, text: str) -> None:
        """Add what is no damage."""
        self.notes.append(text)

    @property
    def damaged(self) -> tuple[tuple[SnapshotId, tuple[str, ...]], ...]:
        """For the report."""
        return tuple((snapshot_id, tuple(sorted(paths))) for snapshot_id, paths in self._damaged.items())


def some(items: Iterable[object], *, count: int = 3) -> str:
    """The first few of many, for a message."""
    shown = [str(item) for item in items]
    more = f" and {len(shown) - count} more" if len(shown) > count else ""
    return ", ".join(shown[:count]) + more
