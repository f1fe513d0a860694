"""What a collection plans and what it did, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from castore.ids import PackId, SnapshotId

PendingKind = Literal["writer", "grace", "space", "damage", "limit", "temporary", "target"]


@dataclass(frozen=True, slots=True)
class Pending:
    """What could not be freed yet, and why."""

    kind: PendingKind
    """writer: a lease is older than the condemnation. grace: an orphan may still be adopted. space: no room to copy out
    what is live. damage: a record that is needed cannot be read. limit: more would be rewritten than one collection
    may. temporary: a file may still be being written. target: the size that was asked for is not reached."""
    message: str
    bytes: int = 0
    """Of the files concerned; 0 where that is not known."""
    until_ns: int | None = None
    """When it ends by itself, ns since 1970."""
    pid: int | None = None
    host: str | None = None


@dataclass(frozen=True, slots=True)
class GcReport:
    """The account of one collection; of a dry run, what it would do."""

    dry_run: bool
    snapshots: Mapping[SnapshotId, str]
    """Removed → why."""
    packs_deleted: tuple[PackId, ...]
    """Without those that were copied out of."""
    packs_rewritten: tuple[PackId, ...]
    """Deleted after what is live in them had been copied out."""
    freed_bytes: int
    """Of the files removed, less what was copied. Negative where copying came before deleting could."""
    copied_bytes: int
    """Of new packs."""
    pending: tuple[Pending, ...]
    live_bytes: int
    """Of records that snapshots need, bases included."""
    pinned_bytes: int
    """The part of it that only differences need."""
    pinned_by: Mapping[SnapshotId, int]
    """Snapshot whose differences pin most → bytes that they pin, largest first."""
    rebased_bytes: int
    """Pinned bytes that became free because what rested on them was stored anew."""
    wasted_bytes: int
    """Dead bytes inside packs that are kept."""
    total_bytes: int
    """Of all packs afterwards."""
    snapshot_count: int
    """Live ones."""
    chunk_count: int
    """Distinct live chunks, bases included."""
    ledger_bytes: int
    """Memory that the marks took."""
    notes: tuple[str, ...]
    """What else is worth knowing: litter that was removed, history that is missing, damage."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing is pending but grace periods, which end by themselves."""
        return all(pending.kind == "grace" for pending in self.pending)

    @property
    def is_cut_short(self) -> bool:
        """Whether the limit on copying left work that the next collection can do at once."""
        return any(pending.kind == "limit" for pending in self.pending)

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self) | {"is_complete": self.is_complete}
