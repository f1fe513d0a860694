"""The chunks of one snapshot, each with what it holds and what a codec may know of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from castore.codec.base import PLAIN, Elements
from castore.format.manifest import Entry, chunk_bytes
from castore.format.pack import RecordKind
from castore.format.snapshot import SnapshotRecord
from castore.ids import ChunkId
from castore.manifests import elements_of, split_ids
from castore.options import PART_CHUNKS_MAX, RUN_BYTES_MIN


@dataclass(frozen=True, slots=True)
class Need:
    """One chunk that a snapshot needs."""

    kind: RecordKind
    raw_bytes: int
    """0 where only the chunk itself says: parts of a manifest."""
    elements: Elements
    path: str
    """Of a leaf that needs it; empty for parts."""


def leaf_needs(entries: Iterable[Entry], *, id_bytes: int) -> dict[ChunkId, Need]:
    """Every distinct chunk of leaf data, in the order of the leaves."""
    needs: dict[ChunkId, Need] = {}
    for entry in entries:
        if entry.chunks:
            elements = elements_of(entry)
            for index, chunk_id in enumerate(entry.chunk_ids(id_bytes)):
                raw_bytes = chunk_bytes(entry.raw_bytes, index)
                needs.setdefault(chunk_id, Need(RecordKind.LEAF, raw_bytes, elements, entry.path))
    return needs


def manifest_needs(record: SnapshotRecord, entries: Iterable[Entry], *, id_bytes: int) -> dict[ChunkId, Need]:
    """The parts of the manifest and the id lists of long leaves."""
    needs: dict[ChunkId, Need] = {}
    for entry in entries:
        for list_id in split_ids(entry.id_lists or b"", id_bytes):
            needs[list_id] = Need(RecordKind.ID_LIST, PART_CHUNKS_MAX * id_bytes, PLAIN, entry.path)
    needs.update((part_id, Need(RecordKind.PART, 0, PLAIN, "")) for part_id in record.part_ids)
    return needs


def run_leaves(entries: Sequence[Entry]) -> list[Entry]:
    """The leaves that a repository without compression stores as runs, so that they can be mapped."""
    return [entry for entry in entries if entry.chunks and entry.raw_bytes >= RUN_BYTES_MIN]
