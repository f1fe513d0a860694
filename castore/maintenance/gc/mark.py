"""Mark: walk the manifests of live snapshots and note in the ledger which chunks they need.

A part that snapshots share is read once, however many share it. What cannot be read ends the collection: what it needs
is not known, so nothing may be freed. The exception is what a repair has marked as lost of the snapshot (losses.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from castore.errors import DamageError, FormatError
from castore.format.manifest import Entry, Kind, decode_part, part_references
from castore.format.pack_columns import as_words
from castore.format.snapshot import SnapshotRecord
from castore.ids import Buffer, ChunkId, SnapshotId
from castore.losses import read_losses
from castore.maintenance.chunks import ChunkReader
from castore.maintenance.gc.ledger import Ledger
from castore.manifests import split_ids
from castore.marks import Thinning, keeps_chunks, needed_paths
from castore.repository import Handle

_ThinKey = tuple[ChunkId, tuple[str, ...], frozenset[str]]


class Marker:
    """Marks snapshots, each once. Belongs to one thread."""

    def __init__(self, handle: Handle, ledger: Ledger) -> None:
        self.snapshots: list[SnapshotId] = []
        """Those that were marked; `Ledger.mark` knows them by their place here."""
        self._ledger = ledger
        self._id_bytes = handle.hasher.digest_bytes
        self._chunks = ChunkReader(handle)
        self._marked: dict[SnapshotId, Thinning | None] = {}
        self._references: dict[ChunkId, tuple[Entry, ...]] = {}
        """Part → its aliases and views, of parts that thinned snapshots share."""
        self._thinned: set[_ThinKey] = set()
        self._batch: list[bytes] = []
        self._losses = read_losses(handle.backend)[0]
        self._lost: frozenset[ChunkId] = frozenset()
        """Of the snapshot that is being marked: parts and id lists that may be missing."""
        self._given_up: set[ChunkId] = set()
        """Those that were: no snapshot that a repair did not mark may share them."""

    def add(
        self,
        live: Mapping[SnapshotId, SnapshotRecord],
        thinnings: Mapping[SnapshotId, Thinning],
        *,
        step: Callable[[], object] = lambda: None,
    ) -> None:
        """Mark those that are not marked yet; `step` is called after each. What was marked stays so.

        Raises DamageError, which names the snapshot, when a manifest cannot be read.
        """
        for snapshot_id, record in live.items():
            thinning = thinnings.get(snapshot_id)
            if self._marked.get(snapshot_id, thinning) != thinning or snapshot_id not in self._marked:
                try:
                    self._add(snapshot_id, record, thinning)
                except DamageError as error:
                    raise type(error)(
                        f"snapshot {snapshot_id}: its manifest cannot be read, so nothing is freed: {error}; run "
                        f"`castore repair`, or give it up with `castore forget {snapshot_id[:12]}`"
                    ) from error
                self._marked[snapshot_id] = thinning
            step()

    def _add(self, snapshot_id: SnapshotId, record: SnapshotRecord, thinning: Thinning | None) -> None:
        if any(len(part_id) != self._id_bytes for part_id in record.part_ids):
            raise FormatError(f"expected part ids of {self._id_bytes} bytes: a foreign snapshot")
        loss = self._losses.get(snapshot_id)
        self._lost = frozenset(loss.parts if loss is not None else ())
        for part_id in self._given_up.intersection(record.part_ids) - self._lost:
            self._chunks.get(part_id)
        owner = len(self.snapshots)
        self.snapshots.append(snapshot_id)
        if thinning is None:
            fresh = self._unwalked(record.part_ids)
            found = map(self._get, fresh) if self._lost else self._chunks.get_many(fresh)
            for part_id, raw in zip(fresh, found, strict=True):
                if raw:
                    self._note(*self._named(part_id, raw))
        else:
            self._add_thinned(record.part_ids, thinning)
        self._note(b"".join(record.part_ids))
        self._flush(owner)

    def _unwalked(self, part_ids: Sequence[ChunkId]) -> list[ChunkId]:
        """The parts that are walked for the first time."""
        distinct = list(dict.fromkeys(part_ids))
        fresh = self._ledger.walk(self._ledger.chunks(as_words(b"".join(distinct), self._id_bytes)))
        return [distinct[place] for place in np.flatnonzero(fresh)]

    def _named(self, part_id: ChunkId, raw: Buffer) -> list[bytes]:
        """Ids that a part names, those of its id lists and what these name included."""
        where = f"manifest part {part_id.hex()}"
        chunks, id_lists = part_references(raw, id_bytes=self._id_bytes, where=where)
        lists = [bytes(self._get(list_id)) for list_id in split_ids(id_lists, self._id_bytes)]
        if any(len(ids) % self._id_bytes for ids in lists):
            raise FormatError(f"{where}: expected id lists of whole ids")
        return [chunks, id_lists, *lists]

    def _get(self, chunk_id: ChunkId) -> bytes | bytearray:
        """The bytes of a part or id list; none where it is known to be lost. Raises DamageError."""
        try:
            return self._chunks.get(chunk_id)
        except DamageError:
            if chunk_id not in self._lost:
                raise
            self._given_up.add(chunk_id)
            return b""

    # ---- thinned snapshots ---------------------------------------------------------------------------------------

    def _add_thinned(self, part_ids: Sequence[ChunkId], thinning: Thinning) -> None:
        """Parts and id lists stay; of the leaves, those that the overlay keeps."""
        decoded: dict[ChunkId, list[Entry]] = {}
        for part_id in part_ids:
            if part_id not in self._references:
                decoded[part_id] = self._entries(part_id)
                self._references[part_id] = tuple(
                    entry for entry in decoded[part_id] if entry.kind in (Kind.ALIAS, Kind.VIEW)
                )
        references = [entry for part_id in part_ids for entry in self._references[part_id]]
        needed = needed_paths(references, thinning)
        for part_id in part_ids:
            key = (part_id, thinning.dropped, needed)
            if key not in self._thinned:
                self._note_kept(decoded.get(part_id) or self._entries(part_id), thinning, needed)
                self._thinned.add(key)

    def _note_kept(self, entries: Sequence[Entry], thinning: Thinning, needed: frozenset[str]) -> None:
        for entry in entries:
            self._note(entry.id_lists or b"")
            if (entry.chunks or entry.id_lists) and keeps_chunks(entry, thinning, needed):
                self._note(entry.chunks or b"")
                self._note(*(bytes(self._get(found)) for found in split_ids(entry.id_lists or b"", self._id_bytes)))

    def _entries(self, part_id: ChunkId) -> list[Entry]:
        where = f"manifest part {part_id.hex()}"
        raw = self._get(part_id)
        return decode_part(raw, id_bytes=self._id_bytes, where=where) if raw else []

    # ---- ids, many at a time -------------------------------------------------------------------------------------

    def _note(self, *ids: bytes) -> None:
        self._batch += ids

    def _flush(self, owner: int) -> None:
        found = self._ledger.chunks(as_words(b"".join(self._batch), self._id_bytes))
        self._batch = []
        self._ledger.mark(found, owner=owner)
