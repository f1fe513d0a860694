"""What a save will do, as pure values: the bytes of every leaf cut on the grid, hashed, and compared with what is
there.

Nothing here reads or writes the repository.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from castore.codec.base import Elements
from castore.format.identity import leaf_digest
from castore.format.manifest import Entry, Kind, chunk_bytes, chunk_count, cut_parts, encode_id_list, encode_part
from castore.format.pack import RecordKind
from castore.hashing import Hasher
from castore.ids import Buffer, ChunkId
from castore.options import GRID_BYTES, PART_CHUNKS_MAX, RUN_BYTES_MIN, RUN_SHARED_SHARE_MAX, Compression

if TYPE_CHECKING:
    from castore.tensors import FlatState, Payload


@dataclass(frozen=True, slots=True)
class Source:
    """Where the raw bytes of one chunk can be read while the save lasts."""

    read: Callable[[], Buffer]
    raw_bytes: int
    elements: Elements
    kind: RecordKind


@dataclass(frozen=True, slots=True)
class LeafChunks:
    """The chunks of one leaf that lie in packs, in grid order."""

    ids: tuple[ChunkId, ...]
    sources: tuple[Source, ...]
    raw_bytes: int


@dataclass(frozen=True, slots=True)
class HashedState:
    """A flat state whose bytes have been hashed: final entries, and the sources of all chunks."""

    entries: tuple[Entry, ...]
    leaves: tuple[LeafChunks, ...]
    """Of the leaves that have chunks, in the order of the entries."""
    raw_bytes: int


def hash_state(flat: FlatState, hasher: Hasher, *, progress: Callable[[int], None]) -> HashedState:
    """Read every leaf once, fill in inline bytes, chunk ids and the digests of views. `progress` gets bytes hashed."""
    entries: list[Entry] = []
    leaves: list[LeafChunks] = []
    for entry, payload in zip(flat.entries, flat.payloads, strict=True):
        if payload is None:
            entries.append(entry)
            continue
        hashed, leaf = _hash_leaf(entry, payload, hasher)
        entries.append(hashed)
        if leaf is not None:
            leaves.append(leaf)
        progress(payload.raw_bytes)
    raw_bytes = sum(entry.raw_bytes for entry in entries if entry.kind not in (Kind.ALIAS, Kind.VIEW))
    return HashedState(tuple(entries), tuple(leaves), raw_bytes)


def _hash_leaf(entry: Entry, payload: Payload, hasher: Hasher) -> tuple[Entry, LeafChunks | None]:
    length = payload.raw_bytes
    if entry.kind is Kind.VIEW:
        # A view's bytes are stored with its storage; its own digest keeps identity free of that.
        ids = b"".join(hasher.chunk_id(payload.read(start, stop)) for start, stop in grid(length))
        return replace(entry, digest=leaf_digest(hasher, length, ids)), None
    if chunk_count(length) == 0:
        return entry.with_bytes(inline=bytes(payload.read(0, length))), None
    sources = tuple(_source(payload, start, stop) for start, stop in grid(length))
    chunk_ids = tuple(hasher.chunk_id(source.read()) for source in sources)
    return entry.with_bytes(chunks=b"".join(chunk_ids)), LeafChunks(chunk_ids, sources, length)


def grid(raw_bytes: int) -> Iterator[tuple[int, int]]:
    """The (start, stop) of each chunk of a leaf; none for an empty leaf."""
    return ((start, min(start + GRID_BYTES, raw_bytes)) for start in range(0, raw_bytes, GRID_BYTES))


def _source(payload: Payload, start: int, stop: int) -> Source:
    elements = Elements(payload.item_bytes, is_float=payload.is_float)
    return Source(lambda: payload.read(start, stop), stop - start, elements, RecordKind.LEAF)


@dataclass(frozen=True, slots=True)
class ManifestPlan:
    """The parts of a manifest and every chunk that they need."""

    part_ids: tuple[ChunkId, ...]
    sources: Mapping[ChunkId, Source]
    """Parts and id lists by chunk id."""


def plan_manifest(entries: Sequence[Entry], hasher: Hasher) -> ManifestPlan:
    """Cut the entries into parts; equal entries give equal parts, whoever saves them."""
    sources: dict[ChunkId, Source] = {}

    def keep(raw: bytes, kind: RecordKind) -> ChunkId:
        chunk_id = hasher.chunk_id(raw)
        sources[chunk_id] = Source(lambda: raw, len(raw), Elements(), kind)
        return chunk_id

    stored = [_with_id_lists(entry, hasher.digest_bytes, keep) for entry in entries]
    part_ids = tuple(
        keep(encode_part(part), RecordKind.PART) for part in cut_parts(stored, id_bytes=hasher.digest_bytes)
    )
    return ManifestPlan(part_ids, sources)


def _with_id_lists(entry: Entry, id_bytes: int, keep: Callable[[bytes, RecordKind], ChunkId]) -> Entry:
    """A very long leaf keeps its chunk ids in lists of their own, so that one changed chunk rewrites one list."""
    packed = entry.chunks
    if packed is None or len(packed) <= PART_CHUNKS_MAX * id_bytes:
        return entry
    step = PART_CHUNKS_MAX * id_bytes
    lists = [keep(encode_id_list(packed[at : at + step]), RecordKind.ID_LIST) for at in range(0, len(packed), step)]
    return replace(entry, chunks=None, id_lists=b"".join(lists))


@dataclass(frozen=True, slots=True)
class Write:
    """Chunks to write together: one chunk as a record, or all chunks of a leaf as a run."""

    chunks: tuple[tuple[ChunkId, Source], ...]
    as_run: bool


def plan_writes(leaves: Iterable[LeafChunks], present: frozenset[ChunkId], *, compression: Compression) -> list[Write]:
    """The chunks that no usable pack holds, each once, in the order of the leaves.

    Without compression a leaf that is wholly new, or nearly so, becomes one run, so that it can be mapped.
    """
    writes: list[Write] = []
    planned = set(present)
    for leaf in leaves:
        fresh = [pair for pair in zip(leaf.ids, leaf.sources, strict=True) if pair[0] not in planned]
        shared_max = int(len(leaf.ids) * RUN_SHARED_SHARE_MAX)
        if compression == "none" and leaf.raw_bytes >= RUN_BYTES_MIN and len(fresh) + shared_max >= len(leaf.ids):
            writes.append(Write(tuple(zip(leaf.ids, leaf.sources, strict=True)), as_run=True))
            planned.update(leaf.ids)
            continue
        for chunk_id, source in fresh:
            if chunk_id not in planned:
                planned.add(chunk_id)
                writes.append(Write(((chunk_id, source),), as_run=False))
    return writes


def new_bytes(writes: Iterable[Write], present: frozenset[ChunkId]) -> int:
    """Raw bytes of the planned chunks that no usable pack holds, repeated ones counted once."""
    distinct = {chunk_id: source.raw_bytes for write in writes for chunk_id, source in write.chunks}
    return sum(length for chunk_id, length in distinct.items() if chunk_id not in present)


def chunk_lengths(entries: Iterable[Entry], id_bytes: int) -> dict[ChunkId, int]:
    """Every distinct chunk that entries name, with its raw length."""
    lengths: dict[ChunkId, int] = {}
    for entry in entries:
        for index, chunk_id in enumerate(entry.chunk_ids(id_bytes)):
            lengths[chunk_id] = chunk_bytes(entry.raw_bytes, index)
    return lengths
