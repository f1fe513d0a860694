"""History as the commands read it: from ref and snapshot files alone, one by one, so that a damaged one costs its own
line and no others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from castore.errors import DamageError, UnknownRefError
from castore.format.layout import BRANCHES, TAGS, decode_ref_name
from castore.ids import SnapshotId
from castore.marks import Forgotten, forgotten_ids, read_forgotten, read_thinning, thinned_ids
from castore.refs import Ref, read_branch, read_tag
from castore.snapshots import Snapshot, make_snapshot, read_record

if TYPE_CHECKING:
    from castore.backend.base import Backend


@dataclass(frozen=True, slots=True)
class Refs:
    """Every ref that can be read, and the file names of those that cannot."""

    branches: list[Ref] = field(default_factory=list)
    tags: list[Ref] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)
    """File name → what is wrong."""
    at: dict[SnapshotId, dict[str, list[str]]] = field(default_factory=dict)
    """Snapshot → {"branches": names, "tags": names}: a log asks for it on every line."""

    def here(self, snapshot_id: SnapshotId) -> dict[str, list[str]]:
        """The names at a snapshot, by kind."""
        return self.at.get(snapshot_id, {"branches": [], "tags": []})

    def names_of(self, snapshot_id: SnapshotId) -> list[str]:
        """What decorates a snapshot: branches, then "tag: NAME"."""
        here = self.here(snapshot_id)
        return here["branches"] + [f"tag: {name}" for name in here["tags"]]


def read_refs(backend: Backend) -> Refs:
    """All branches and tags, by name; damage is noted and not raised."""
    refs = Refs()
    kinds = (("branches", BRANCHES, refs.branches, read_branch), ("tags", TAGS, refs.tags, read_tag))
    for kind, prefix, found, read in kinds:
        for info in backend.list(prefix):
            try:
                name = decode_ref_name(info.name.removeprefix(prefix))
                snapshot_id = read(backend, name)
            except DamageError as error:
                refs.damaged[info.name] = str(error)
                continue
            if snapshot_id is not None:
                found.append(Ref(name, snapshot_id, info.modified_ns))
                refs.at.setdefault(snapshot_id, {"branches": [], "tags": []})[kind].append(name)
    return refs


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One snapshot that history names: there, forgotten, gone, or damaged."""

    id: SnapshotId
    snapshot: Snapshot | None
    damage: str = ""
    mark: Forgotten | None = None
    """Of a forgotten one: history goes on behind it."""
    parents: tuple[SnapshotId, ...] = ()
    """Empty when the snapshot cannot be read."""

    @property
    def is_gap(self) -> bool:
        """Whether it is passed over."""
        return self.mark is not None and self.snapshot is None


class EntryReader:
    """Reads log entries; which snapshots have marks is listed once."""

    def __init__(self, backend: Backend, refs: Refs, *, start: SnapshotId | None = None) -> None:
        self._backend = backend
        self._shown = {*refs.at, start}
        """What a ref names is there even when it has a marker; so is what was asked for."""
        self._forgotten = forgotten_ids(self._backend)
        self._thinned = thinned_ids(self._backend)

    def read(self, snapshot_id: SnapshotId) -> LogEntry:
        """One entry; damage is noted and not raised."""
        mark = None
        try:
            if snapshot_id in self._forgotten:
                mark = read_forgotten(self._backend, snapshot_id)
                if mark is not None and snapshot_id not in self._shown:
                    return LogEntry(snapshot_id, None, "", mark, mark.parents)
            overlay = read_thinning(self._backend, snapshot_id) if snapshot_id in self._thinned else None
            # Not repository.snapshot(id): an id that is looked up as a ref lists all snapshots.
            record = read_record(self._backend, snapshot_id)
        except UnknownRefError:
            return LogEntry(snapshot_id, None)
        except DamageError as error:
            return LogEntry(snapshot_id, None, str(error))
        snapshot = make_snapshot(snapshot_id, record, lambda _: (), overlay)
        return LogEntry(snapshot_id, snapshot, "", mark, record.parents)
