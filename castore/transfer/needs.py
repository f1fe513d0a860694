"""The chunks of one snapshot, each with what it holds and what a codec may know of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from castore.codec.base import PLAIN, Elements
from castore.format.manifest import Entry, chunk_bytes
from castore.format.pack import RecordKind
from castore.format.snapshot import SnapshotRecord
from castore.ids import ChunkId
from castore.options import PART_CHUNKS_MAX, RUN_BYTES_MIN
from castore.snapshots import split_ids

_WIDTHS = (1, 2, 4, 8)


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


def elements_of(entry: Entry) -> Elements:
    """Width and kind of the numbers in an array, from its type's name alone: torch may not be here."""
    count = math.prod(entry.shape)
    if not entry.dtype or not count or entry.raw_bytes % count:
        return PLAIN
    width, name = entry.raw_bytes // count, entry.dtype
    is_complex = name.startswith("complex") or name[1:2] == "c"
    is_float = is_complex or name.startswith(("float", "bfloat")) or (name[:1] in "<=" and name[1:2] == "f")
    width = width // 2 if is_complex else width
    return Elements(width, is_float=is_float) if width in _WIDTHS else PLAIN
