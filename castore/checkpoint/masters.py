"""Which float32 leaf a 16-bit leaf may be the rounding of: found by content, never by name.

A state in mixed precision holds each weight twice. The pair is looked for among the leaves of one state: as many
elements, and a sample of the one, rounded by any rule, is that of the other. Chunks are then proved one by one when
they are written, so a wrong guess costs time and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from castore.checkpoint.plan import LeafChunks, Source
from castore.codec.derived import COPY_ITEM_BYTES, MASTER_ITEM_BYTES
from castore.codec.rounding import Rule
from castore.codec.transform import kernel
from castore.ids import Buffer, ChunkId
from castore.options import GRID_BYTES

_WINDOWS, _WINDOW_ITEMS = 4, 16
"""The sample: 64 elements spread over the leaf. Windows start on multiples of their length, so none straddles two
chunks."""
_CANDIDATES_MAX = 4
"""Leaves that agree in the sample and are tried for each chunk: more than one where leaves hold the same values."""

_Sample = bytes


@dataclass(frozen=True, slots=True)
class Master:
    """What one chunk may be the rounding of."""

    rule: Rule
    chunk_ids: tuple[ChunkId, ...]
    """One or two chunks of the master leaf."""
    sources: tuple[Source, ...]


def find_masters(leaves: Sequence[LeafChunks]) -> dict[ChunkId, tuple[Master, ...]]:
    """Chunks of 16-bit floats → what each may be the rounding of, the likeliest first. Reads samples only."""
    copies = [leaf for leaf in leaves if _holds_floats(leaf, COPY_ITEM_BYTES)]
    wanted_bytes = {2 * leaf.raw_bytes for leaf in copies}
    samples: dict[tuple[int, _Sample], list[tuple[Rule, LeafChunks]]] = {}
    if wanted_bytes:
        for leaf in leaves:
            if leaf.raw_bytes in wanted_bytes and _holds_floats(leaf, MASTER_ITEM_BYTES):
                sample = _sample(leaf, MASTER_ITEM_BYTES)
                rounded = bytearray(len(sample) // 2)
                for rule in Rule:
                    kernel.derive(sample, rounded, rule)
                    samples.setdefault((leaf.raw_bytes, bytes(rounded)), []).append((rule, leaf))
    found: dict[ChunkId, tuple[Master, ...]] = {}
    for leaf in copies:
        agreeing = samples.get((2 * leaf.raw_bytes, _sample(leaf, COPY_ITEM_BYTES)), ())
        for chunk_id, masters in _by_chunk(leaf, agreeing[:_CANDIDATES_MAX]):
            found.setdefault(chunk_id, masters)
    return found


def _by_chunk(
    leaf: LeafChunks, agreeing: Sequence[tuple[Rule, LeafChunks]]
) -> Iterator[tuple[ChunkId, tuple[Master, ...]]]:
    """The chunks of a copy, each with the two chunks of every candidate that cover the same elements."""
    for index, chunk_id in enumerate(leaf.ids if agreeing else ()):
        part = slice(2 * index, 2 * index + 2)
        yield chunk_id, tuple(Master(rule, other.ids[part], other.sources[part]) for rule, other in agreeing)


def _holds_floats(leaf: LeafChunks, item_bytes: int) -> bool:
    elements = leaf.sources[0].elements
    return elements.is_float and elements.item_bytes == item_bytes and leaf.raw_bytes % item_bytes == 0


def _sample(leaf: LeafChunks, item_bytes: int) -> _Sample:
    """The same elements of every leaf with as many elements, whatever their width."""
    last = leaf.raw_bytes // item_bytes // _WINDOW_ITEMS - 1
    windows = sorted({last * window // (_WINDOWS - 1) for window in range(_WINDOWS)})
    return b"".join(_window(leaf, window * _WINDOW_ITEMS * item_bytes, item_bytes) for window in windows)


def _window(leaf: LeafChunks, start: int, item_bytes: int) -> bytes:
    index, offset = divmod(start, GRID_BYTES)
    return bytes(memoryview(leaf.sources[index].read())[offset : offset + _WINDOW_ITEMS * item_bytes])


def usable_masters(
    masters: Iterable[Master], depths: Mapping[ChunkId, int], *, chunk_id: ChunkId, depth_max: int
) -> list[tuple[Master, int]]:
    """Masters that a chunk may rest on, with the depth of the deeper of their records."""
    usable = []
    for master in masters:
        found = [depths.get(master_id) for master_id in master.chunk_ids]
        known = [depth for depth in found if depth is not None and depth <= depth_max]
        if len(known) == len(found) and chunk_id not in master.chunk_ids:
            usable.append((master, max(known)))
    return usable


def read_all(master: Master) -> list[Buffer]:
    """The raw bytes of the master's chunks."""
    return [source.read() for source in master.sources]
