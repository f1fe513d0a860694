"""What a verification found: values that people read and programs compare."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from castore.ids import ChunkId, SnapshotId
from castore.losses import Loss

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
    affected: tuple[tuple[SnapshotId, tuple[str, ...]], ...] = field(default=(), repr=False)
    """The same snapshot by snapshot."""
    chunks: tuple[ChunkId, ...] = field(default=(), repr=False)
    """The chunks in question, where it is about chunks or their records."""
    offset: int | None = None
    """Of the stored payload in the pack, where it is about one record."""

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "where": self.where,
            "kind": self.kind,
            "message": self.message,
            "snapshots": list(self.snapshots),
            "leaves": list(self.leaves),
            "affected": {snapshot_id: list(leaves) for snapshot_id, leaves in self.affected},
            "chunks": [chunk_id.hex() for chunk_id in self.chunks],
            "offset": self.offset,
        }


@dataclass(frozen=True, slots=True)
class ScrubCount:
    """Packs of an incremental verification: every byte of some was read now, of others lately, of others not yet."""

    read_count: int
    recent_count: int
    """Left out, since they were found whole within the given age."""
    pending_count: int
    """Not reached in the given time; the next run begins with them."""
    oldest_ns: int | None
    """When the pack that waits longest was last read, ns since 1970; None: some never was."""

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "read_count": self.read_count,
            "recent_count": self.recent_count,
            "pending_count": self.pending_count,
            "oldest_ns": self.oldest_ns,
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
    lost: tuple[tuple[SnapshotId, tuple[str, ...]], ...] = field(default=(), repr=False)
    scrub: ScrubCount | None = None
    """What an incremental verification got done; None when it was not one."""

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return not self.problems

    @property
    def lost_snapshots(self) -> dict[SnapshotId, tuple[str, ...]]:
        """Each snapshot of which a repair has marked leaves as lost, with those that still are: known, so no problem.

        No leaves: a manifest part is lost and with it their names.
        """
        return dict(self.lost)

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
            "lost_snapshots": {snapshot_id: list(leaves) for snapshot_id, leaves in self.lost},
            "orphans": list(self.orphans),
            "notes": list(self.notes),
            "scrub": None if self.scrub is None else self.scrub.to_json(),
        }


class Findings:
    """Problems and notes as they are found."""

    def __init__(self, known: Mapping[SnapshotId, Loss] = MappingProxyType({})) -> None:
        """`known` is what repairs have marked as lost."""
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self._known = known
        self._damaged: dict[SnapshotId, set[str]] = {}
        self._lost: dict[SnapshotId, set[str]] = {}

    def problem(
        self,
        kind: ProblemKind,
        where: str,
        message: str,
        affected: Affected | None = None,
        *,
        chunks: Collection[ChunkId] = (),
        offset: int | None = None,
    ) -> None:
        """Add a problem and what it touches."""
        touched = {snapshot_id: tuple(sorted(paths)) for snapshot_id, paths in (affected or {}).items()}
        for snapshot_id, paths in touched.items():
            self._damaged.setdefault(snapshot_id, set()).update(paths)
        leaves = sorted({path for paths in touched.values() for path in paths})
        self.problems.append(
            Problem(where, message, kind, tuple(touched), tuple(leaves), tuple(touched.items()), tuple(chunks), offset)
        )

    def loss(
        self, kind: ProblemKind, where: str, message: str, affected: Affected, *, chunks: Collection[ChunkId] = ()
    ) -> None:
        """Add that something is gone: no problem for the snapshots of which it is marked as lost."""
        fresh = {}
        for snapshot_id, paths in affected.items():
            known = self._known.get(snapshot_id)
            if known is not None and known.covers(paths):
                self._lost.setdefault(snapshot_id, set()).update(paths)
            else:
                fresh[snapshot_id] = paths
        if fresh:
            self.problem(kind, where, message, fresh, chunks=chunks)

    def note(self, text: str) -> None:
        """Add what is no damage."""
        self.notes.append(text)

    @property
    def damaged(self) -> tuple[tuple[SnapshotId, tuple[str, ...]], ...]:
        """For the report."""
        return _by_snapshot(self._damaged)

    @property
    def lost(self) -> tuple[tuple[SnapshotId, tuple[str, ...]], ...]:
        """The same of what is known to be lost."""
        return _by_snapshot(self._lost)


def _by_snapshot(paths: Mapping[SnapshotId, Collection[str]]) -> tuple[tuple[SnapshotId, tuple[str, ...]], ...]:
    return tuple((snapshot_id, tuple(sorted(found))) for snapshot_id, found in paths.items())
