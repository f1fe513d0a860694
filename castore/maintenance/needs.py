"""What snapshots need: every chunk that their manifests name, and what is wrong with the manifests themselves."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping

from castore.errors import some
from castore.format.layout import PACKS, snapshot_name
from castore.format.manifest import Entry, chunk_bytes
from castore.format.snapshot import SnapshotRecord
from castore.ids import ChunkId, SnapshotId
from castore.maintenance.manifest_check import check_manifest
from castore.maintenance.parts import PartReader
from castore.maintenance.report import Findings
from castore.manifests import split_ids
from castore.marks import Thinning
from castore.repository import Handle

_NAMED_MAX = 10
"""Complaints about one manifest that are spelled out; the rest is counted."""


class NeededChunks:
    """Walks manifests, checks them, and collects every chunk that snapshots need."""

    def __init__(
        self, handle: Handle, parts: PartReader, findings: Findings, thinnings: Mapping[SnapshotId, Thinning]
    ) -> None:
        self.lengths: dict[ChunkId, int | None] = {}
        """Chunk → raw length that the manifests expect; None for parts and id lists."""
        self.reported: set[ChunkId] = set()
        """Parts and id lists that `report` names."""
        self._hasher = handle.hasher
        self._parts = parts
        self._findings = findings
        self._thinnings = thinnings
        self._collected: set[Hashable] = set()
        self.part_ids: set[ChunkId] = set()
        """The chunks among `lengths` that are manifest parts."""
        self._lost_parts: dict[ChunkId, tuple[str, list[SnapshotId]]] = {}
        self._lost_lists: dict[str, dict[SnapshotId, list[str]]] = {}

    def add(self, snapshot_id: SnapshotId, record: SnapshotRecord) -> None:
        """Check one snapshot's manifest and note what it needs."""
        where = snapshot_name(snapshot_id)
        entries: list[Entry] = []
        whole = True
        for part_id in record.part_ids:
            self.lengths.setdefault(part_id, None)
            self.part_ids.add(part_id)
            part = self._parts.read(part_id)
            if part.error:
                self.reported.add(part_id)
                self._lost_parts.setdefault(part_id, (part.error, []))[1].append(snapshot_id)
            for path, message in (part.unresolved or {}).items():
                self._lost_lists.setdefault(message, {}).setdefault(snapshot_id, []).append(path)
            whole = whole and not part.error and not part.unresolved
            entries.extend(part.entries)
        kept = self._parts.kept(record.part_ids, self._thinnings.get(snapshot_id))
        for (key, part), part_id in zip(kept, record.part_ids, strict=True):
            if key not in self._collected:
                self._collected.add(key)
                self._collect(part.entries, part_id)
        if whole:
            complaints = check_manifest(entries, record, self._hasher)
            if complaints:
                shown = some((f"{path!r}: {message}" for path, message in complaints), count=_NAMED_MAX)
                touched = sorted({path for path, _ in complaints if path})
                self._findings.problem("snapshot", where, f"the manifest is no state: {shown}", {snapshot_id: touched})

    def report(self) -> None:
        """Name the parts and id lists that cannot be read, each once."""
        for part_id, (message, snapshot_ids) in self._lost_parts.items():
            self._findings.loss(
                "part",
                PACKS,
                f"manifest part {part_id.hex()} cannot be read, so its leaves cannot be named: {message}",
                dict.fromkeys(snapshot_ids, ()),
                chunks=[part_id],
            )
        for message, affected in self._lost_lists.items():
            self._findings.loss("part", PACKS, f"the chunk ids of a long leaf cannot be read: {message}", affected)

    def _collect(self, entries: Collection[Entry], part_id: ChunkId) -> None:
        id_bytes = self._hasher.digest_bytes
        for entry in entries:
            for list_id in split_ids(entry.id_lists or b"", id_bytes):
                self.lengths.setdefault(list_id, None)
                if entry.chunks is None:
                    self.reported.add(list_id)
            for index, chunk_id in enumerate(entry.chunk_ids(id_bytes)):
                expected = chunk_bytes(entry.raw_bytes, index)
                if self.lengths.setdefault(chunk_id, expected) not in (None, expected):
                    self._findings.problem(
                        "part",
                        PACKS,
                        f"manifest part {part_id.hex()}, leaf {entry.path!r}: chunk {chunk_id.hex()} is "
                        f"expected to have {expected} bytes, and {self.lengths[chunk_id]} elsewhere",
                    )
