"""Manifests: the entries of a snapshot, read through the chunk store, and the leaf table made of them."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

from castore.codec.base import PLAIN, Elements
from castore.errors import FormatError
from castore.format.identity import entry_digest
from castore.format.manifest import Entry, Kind, chunk_count, decode_id_list, decode_part
from castore.format.snapshot import SnapshotRecord
from castore.hashing import Hasher
from castore.ids import ChunkId
from castore.marks import Thinning
from castore.options import PART_CHUNKS_MAX
from castore.snapshots import Leaf
from castore.store import ChunkStore

_CACHED_PARTS_MAX = 256
_TORCH_NAME = re.compile(r"(b?float|complex|u?int)(\d+)")
_NUMPY_NAME = re.compile(r"([<>|=])([a-zA-Z])(\d+)")
_WIDTH_MAX = 8


class ManifestReader:
    """Reads manifests through the chunk store; parts shared by snapshots are decoded once. Thread-safe."""

    def __init__(self, store: ChunkStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._parts: OrderedDict[ChunkId, tuple[Entry, ...]] = OrderedDict()

    def entries(self, record: SnapshotRecord) -> list[Entry]:
        """All entries in depth-first order, id lists resolved. Raises DamageError."""
        return [entry for part_id in record.part_ids for entry in self.part(part_id)]

    def part(self, part_id: ChunkId) -> tuple[Entry, ...]:
        """The entries of one part."""
        with self._lock:
            if part_id in self._parts:
                self._parts.move_to_end(part_id)
                return self._parts[part_id]
        where = f"manifest part {part_id.hex()}"
        if len(part_id) != self._store.hasher.digest_bytes:
            raise FormatError(f"{where}: expected an id of {self._store.hasher.digest_bytes} bytes: a foreign snapshot")
        raw = self._store.get(part_id)
        decoded = decode_part(raw, id_bytes=len(part_id), where=where)
        entries = tuple(self._resolved(entry, len(part_id), where) for entry in decoded)
        with self._lock:
            self._parts[part_id] = entries
            if len(self._parts) > _CACHED_PARTS_MAX:
                self._parts.popitem(last=False)
        return entries

    def _resolved(self, entry: Entry, id_bytes: int, where: str) -> Entry:
        if entry.id_lists is None:
            return entry
        remaining = chunk_count(entry.raw_bytes)
        ids = []
        for list_id in split_ids(entry.id_lists, id_bytes):
            count = min(remaining, PART_CHUNKS_MAX)
            ids.append(
                decode_id_list(bytes(self._store.get(list_id)), expected_count=count, id_bytes=id_bytes, where=where)
            )
            remaining -= count
        return replace(entry, chunks=b"".join(ids))


def split_ids(packed: bytes, id_bytes: int) -> list[ChunkId]:
    """Concatenated ids, taken apart."""
    return [ChunkId(packed[start : start + id_bytes]) for start in range(0, len(packed), id_bytes)]


def elements_of(entry: Entry) -> Elements:
    """What the dtype's name says of the numbers in a leaf, as a save sees them: torch and numpy may not be here."""
    if numpy_name := _NUMPY_NAME.match(entry.dtype):
        order, kind, width = numpy_name[1], numpy_name[2], int(numpy_name[3])
        width = {"c": width // 2, "U": 4, "S": 1, "V": 1}.get(kind, width)
        return Elements(max(1, min(width, _WIDTH_MAX)), is_float=kind in "fc" and order != ">" and width <= _WIDTH_MAX)
    if torch_name := _TORCH_NAME.match(entry.dtype):
        kind, width = torch_name[1], int(torch_name[2]) // 8
        width = width // 2 if kind == "complex" else width
        return Elements(max(1, min(width, _WIDTH_MAX)), is_float=not kind.endswith("int"))
    return PLAIN


def leaf_table(entries: Sequence[Entry], hasher: Hasher, thinning: Thinning | None = None) -> tuple[Leaf, ...]:
    """The leaves among the entries, hidden storages left out."""
    return tuple(
        _leaf(entry, hasher, dropped=thinning is not None and thinning.drops(entry.path))
        for entry in entries
        if not entry.is_container and entry.kind is not Kind.STORAGE
    )


def _leaf(entry: Entry, hasher: Hasher, *, dropped: bool) -> Leaf:
    digest = "" if entry.kind is Kind.ALIAS else entry_digest(hasher, entry).hex()
    count = len(entry.chunks or b"") // hasher.digest_bytes
    kind = entry.kind.name.lower()
    return Leaf(entry.path, kind, entry.dtype, entry.shape, entry.raw_bytes, count, digest, dropped)


def check_paths(entries: Sequence[Entry], *, where: str) -> None:
    """A manifest names every path once. Raises FormatError."""
    seen: set[str] = set()
    for entry in entries:
        if entry.path in seen:
            raise FormatError(f"{where}: path {entry.path!r} appears twice")
        seen.add(entry.path)
