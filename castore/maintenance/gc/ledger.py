"""The ledger of a collection: every record of every pack, and which of them must stay, as columns.

    for each chunk      id 16 (32 with blake3), slots 8 to 16, best record 4, flags 1, owner 4
    for each record     chunk 4, base 4, pack 4, stored bytes 4, depth 1, kept 1

and, for the few records that rest on two bases, the record and the second base, 12; which makes about 55 bytes for a
chunk that is stored once. A dict of objects would take 700.

A chunk may have several records (two writers stored it at once, or it was copied out). Which one is relied on, its
`best`, is decided here: not in a pack that is going, then the least deep one, then the newest. What is kept is closed:
a kept record's base has a kept record that is less deep.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from castore.format.pack import ALIGN_BYTES, record_header_bytes, row_bytes
from castore.format.pack_columns import TableColumns, Words
from castore.ids import ChunkId, PackId
from castore.maintenance.gc.id_table import IdTable, Numbers

Rows = npt.NDArray[np.int64]
"""Numbers of records."""

_NONE = -1
_DIRECT, _WALKED = 1, 2
Item = TypeVar("Item", bound=np.generic)


@dataclass(frozen=True, slots=True)
class PackFile:
    """One pack of the ledger."""

    pack_id: PackId
    pack_bytes: int
    created_ns: int
    damage: str
    """Why its table cannot be trusted; empty when it can. Such a pack is never touched."""
    first_row: int
    row_count: int


@dataclass(frozen=True, slots=True)
class Tree:
    """Kept records that rest on each other, some of them only for the others' sake."""

    reference: int
    """The record whose chunk the others become differences from: one that is needed by itself."""
    rewritten: tuple[int, ...]
    """Records to store anew; the reference among them when it rests on what is pinned."""
    replaced_bytes: int
    """Of the pinned records and of those rewritten."""
    written_bytes: int
    """What storing anew is expected to take: the reference as much as the root does."""

    @property
    def freed_bytes(self) -> int:
        """Expected gain."""
        return self.replaced_bytes - self.written_bytes


class Ledger:
    """Records of packs, by number. Belongs to one thread."""

    def __init__(self, id_bytes: int) -> None:
        self.packs: list[PackFile] = []
        self.numbers: dict[PackId, int] = {}
        """Pack id → place in `packs`."""
        self.absent_count = 0
        """Chunks that were marked and that no pack holds, as of the latest `settle`."""
        self.broken_count = 0
        """Bases of kept records that no pack holds less deep, as of the latest `settle`."""
        self._id_bytes = id_bytes
        self._table = IdTable(id_bytes)
        self._best = _Column(np.int32, fill=_NONE)
        self._flags = _Column(np.uint8)
        self._owner = _Column(np.int32, fill=_NONE)
        self._chunk = _Column(np.int32)
        self._base = _Column(np.int32)
        self._second_rows = _Column(np.int64)
        """Records that rest on two bases, ascending."""
        self._second_base = _Column(np.int32)
        self._pack = _Column(np.int32)
        self._stored = _Column(np.uint32)
        self._depth = _Column(np.uint8)
        self._kept = _Column(np.bool_)
        self._going: frozenset[PackId] = frozenset()
        self._several: Rows = np.zeros(0, np.int64)
        """Records of chunks that have more than one, by chunk, the most preferred first."""
        self._several_chunks: Numbers = np.zeros(0, np.int32)

    @property
    def live_count(self) -> int:
        """Distinct chunks of which a record is kept."""
        return int(np.count_nonzero(self.live_chunks()))

    @property
    def nbytes(self) -> int:
        """Memory in use."""
        columns = (
            self._best,
            self._flags,
            self._owner,
            self._chunk,
            self._base,
            self._second_rows,
            self._second_base,
            self._pack,
            self._stored,
        )
        return self._table.nbytes + sum(column.nbytes for column in (*columns, self._depth, self._kept))

    # ---- records -----------------------------------------------------------------------------------------------

    def add_pack(
        self, pack_id: PackId, columns: TableColumns, *, pack_bytes: int, created_ns: int, damage: str
    ) -> None:
        """Add the records of one pack, in the order of its table."""
        first_row, count = len(self._chunk), len(columns)
        chunks = self._table.intern(columns.chunk_ids)
        with_base = columns.base_ids.any(axis=1)
        bases = np.full(count, _NONE, np.int32)
        bases[with_base] = self._table.intern(columns.base_ids[with_base])
        seconds = self._table.intern(columns.second_base_ids)
        self._extend_chunks()
        self._second_rows.append(columns.second_rows + first_row)
        self._second_base.append(seconds)
        self._chunk.append(chunks)
        self._base.append(bases)
        self._pack.append(np.full(count, len(self.packs), np.int32))
        self._stored.append(columns.stored_bytes)
        self._depth.append(columns.depths)
        self._kept.append(np.zeros(count, np.bool_))
        self.numbers[pack_id] = len(self.packs)
        self.packs.append(PackFile(pack_id, pack_bytes, created_ns, damage, first_row, count))

    def _extend_chunks(self) -> None:
        self._best.extend_to(len(self._table))
        self._flags.extend_to(len(self._table))
        self._owner.extend_to(len(self._table))

    # ---- marks -------------------------------------------------------------------------------------------------

    def chunks(self, ids: Words) -> Numbers:
        """Numbers of chunks; also of those that no pack of the ledger holds yet."""
        numbers = self._table.intern(ids)
        self._extend_chunks()
        return numbers

    def id_of(self, chunk: int) -> ChunkId:
        """The chunk id."""
        return ChunkId(self._table.id_of(chunk))

    def mark(self, chunks: Numbers, *, owner: int) -> None:
        """A snapshot needs these chunks. The first `owner` of a chunk is remembered, to say for whom it is kept."""
        self._flags.values[chunks] |= _DIRECT
        free = chunks[self._owner.values[chunks] < 0]
        self._owner.values[free] = owner

    def walk(self, chunks: Numbers) -> npt.NDArray[np.bool_]:
        """Of manifest parts: which are walked for the first time; from now on they are walked."""
        fresh: npt.NDArray[np.bool_] = (self._flags.values[chunks] & _WALKED) == 0
        self._flags.values[chunks] |= _WALKED
        return fresh

    def settle(self, going: Iterable[PackId]) -> None:
        """Decide what is kept for what was marked, when these packs are going."""
        self._going = frozenset(going)
        self._choose_best()
        kept = self._kept.values
        kept[:] = False
        self.broken_count = 0
        best, depth = self._best.values, self._depth.values
        rows: Rows = best[np.flatnonzero(self._flags.values & _DIRECT)].astype(np.int64)
        self.absent_count = int(np.count_nonzero(rows < 0))
        rows = rows[rows >= 0]
        kept[rows] = True
        while len(rows):
            rows, bases = self._rests_on(rows)
            below = best[bases]
            fits = (below >= 0) & (depth[below] < depth[rows])
            odd = [
                self._keep_below(int(base), int(depth[row]))
                for row, base in zip(rows[~fits], bases[~fits], strict=True)
            ]
            fresh = np.unique(np.concatenate([below[fits].astype(np.int64), np.array(odd, np.int64)]))
            fresh = fresh[fresh >= 0]
            rows = fresh[~kept[fresh]]
            kept[rows] = True

    def _rests_on(self, rows: Rows) -> tuple[Rows, Numbers]:
        """Each of these records with each of its bases."""
        base = self._base.values
        first = rows[base[rows] >= 0]
        places, has_second = self._second_places(rows)
        second = self._second_base.values[places[has_second]]
        return np.concatenate([first, rows[has_second]]), np.concatenate([base[first], second])

    def _second_places(self, rows: Rows) -> tuple[Rows, npt.NDArray[np.bool_]]:
        """Where each of these records stands among those with two bases, and whether it does."""
        second_rows = self._second_rows.values
        places = np.searchsorted(second_rows, rows)
        has_second = np.zeros(len(rows), np.bool_)
        inside = places < len(second_rows)
        has_second[inside] = second_rows[places[inside]] == rows[inside]
        return places, has_second

    def rows_of(self, chunk: int) -> list[int]:
        """Every record of a chunk, the best first."""
        start, stop = np.searchsorted(self._several_chunks, [chunk, chunk + 1])
        if start < stop:
            return [int(row) for row in self._several[start:stop]]
        best = int(self._best.values[chunk])
        return [best] if best >= 0 else []

    def _keep_below(self, chunk: int, depth: int) -> int:
        """The best record of a base that is less deep; -1 when there is none."""
        fitting = [row for row in self.rows_of(chunk) if self._depth.values[row] < depth]
        self.broken_count += not fitting
        return fitting[0] if fitting else _NONE

    def _choose_best(self) -> None:
        chunk, best = self._chunk.values, self._best.values
        best[:] = _NONE
        best[chunk] = np.arange(len(chunk), dtype=np.int32)
        counts = np.bincount(chunk, minlength=len(best)) if len(chunk) else np.zeros(0, np.int64)
        several = np.flatnonzero(counts[chunk] > 1)
        del counts
        going = np.array([pack.pack_id in self._going for pack in self.packs], np.bool_)
        created = np.array([pack.created_ns for pack in self.packs], np.int64)
        pack = self._pack.values[several]
        order = np.lexsort((-created[pack], self._depth.values[several], going[pack], chunk[several]))
        self._several = several[order]
        self._several_chunks = chunk[self._several]
        first = np.flatnonzero(np.diff(self._several_chunks, prepend=np.int32(_NONE)))
        best[self._several_chunks[first]] = self._several[first]

    # ---- what was decided ----------------------------------------------------------------------------------------

    def chunk_of(self, row: int) -> int:
        """The chunk that a record holds."""
        return int(self._chunk.values[row])

    def bases_of(self, row: int) -> list[int]:
        """The chunks that a record rests on."""
        return [int(base) for base in self._rests_on(np.array([row], np.int64))[1]]

    def depth_of(self, row: int) -> int:
        """The depth of a record."""
        return int(self._depth.values[row])

    def stored_of(self, row: int) -> int:
        """Bytes that a record takes in its pack, header and table row included."""
        return int(self.record_bytes(np.array([row]))[0])

    def pack_of(self, row: int) -> PackFile:
        """The pack that a record lies in."""
        return self.packs[int(self._pack.values[row])]

    def is_kept(self, row: int) -> bool:
        """Whether the record is relied on."""
        return bool(self._kept.values[row])

    def keep(self, row: int) -> None:
        """Rely on a record after all: another one of its chunk proved to be damaged."""
        self._kept.values[row] = True

    def record_bytes(self, rows: Rows) -> npt.NDArray[np.int64]:
        """Bytes that records take in their packs: header, payload, padding and table row."""
        overhead = record_header_bytes(self._id_bytes) + row_bytes(self._id_bytes)
        stored = self._stored.values[rows].astype(np.int64)
        second = self._second_places(rows)[1] * (2 * self._id_bytes)  # in the header and in the table
        sizes: npt.NDArray[np.int64] = -(-stored // ALIGN_BYTES) * ALIGN_BYTES + overhead + second
        return sizes

    def live_chunks(self) -> npt.NDArray[np.bool_]:
        """By chunk: whether some record of it is kept."""
        live = np.zeros(len(self._table), np.bool_)
        live[self._chunk.values[self._kept.values]] = True
        return live

    def needed_rows(self, pack_number: int, live: npt.NDArray[np.bool_]) -> Rows:
        """Records of a pack whose chunk is live, whichever record of it is relied on."""
        pack = self.packs[pack_number]
        rows = np.arange(pack.first_row, pack.first_row + pack.row_count)
        return rows[live[self._chunk.values[rows]]]

    def pinned_by(self) -> dict[int, int]:
        """Owner → bytes of records that only differences need, those of its chunks first among them."""
        chunk, depth = self._chunk.values, self._depth.values
        kept = np.flatnonzero(self._kept.values)
        owner = self._owner.values.copy()
        for level in range(int(depth[kept].max(initial=0)), 0, -1):  # a pinned base may rest on another one
            rows, bases = self._rests_on(kept[depth[kept] == level])
            free = owner[bases] < 0
            owner[bases[free]] = owner[chunk[rows[free]]]
        pinned = kept[(self._flags.values[chunk[kept]] & _DIRECT) == 0]
        sizes = self.record_bytes(pinned)
        owners = owner[chunk[pinned]]
        found, of = np.unique(owners, return_inverse=True)
        sums = np.bincount(of, weights=sizes.astype(np.float64))
        return dict(zip(found.tolist(), sums.astype(np.int64).tolist(), strict=True))

    def bytes_by_owner(self, count: int) -> npt.NDArray[np.int64]:
        """By owner: bytes of kept records that would not be needed without it and all owners after it."""
        chunk, depth = self._chunk.values, self._depth.values
        kept = np.flatnonzero(self._kept.values)
        owner = np.where(self._owner.values < 0, np.int32(count), self._owner.values)
        for level in range(int(depth[kept].max(initial=0)), 0, -1):
            rows, bases = self._rests_on(kept[depth[kept] == level])
            np.minimum.at(owner, bases, owner[chunk[rows]])
        weights = self.record_bytes(kept).astype(np.float64)
        return np.bincount(owner[chunk[kept]], weights=weights, minlength=count)[:count].astype(np.int64)

    def pinned_trees(self) -> Iterator[Tree]:
        """Every tree that pins something, and how it could do without."""
        chunk, base, depth, best = self._chunk.values, self._base.values, self._depth.values, self._best.values
        kept = np.flatnonzero(self._kept.values)
        direct = (self._flags.values[chunk[kept]] & _DIRECT) != 0
        if direct.all():
            return
        root = kept.copy()
        for _ in range(int(depth[kept].max(initial=0))):
            above = base[root] >= 0
            below = best[base[root[above]]]
            root[above] = np.where(below >= 0, below, root[above])
        pinning = np.flatnonzero(np.isin(root, root[~direct]) & (base[root] < 0))
        if not len(pinning):
            return  # what is pinned rests on bases that no pack holds
        order = pinning[np.lexsort((depth[kept[pinning]], root[pinning]))]
        starts = np.flatnonzero(np.diff(root[order], prepend=_NONE))
        second_rows = self._second_rows.values
        tied = frozenset(self._second_base.values[self._kept.values[second_rows]].tolist())
        for start, stop in zip(starts, [*starts[1:], len(order)], strict=True):
            members = order[start:stop]
            tree = self._tree(int(root[members[0]]), kept[members].tolist(), direct[members].tolist(), tied)
            if tree is not None:
                yield tree

    def _tree(self, root: int, rows: list[int], direct: list[bool], tied: frozenset[int]) -> Tree | None:
        """How to store one tree anew, least deep records first. `tied` are chunks that are the second base of a kept
        record, which is a member of the tree of its first.
        """
        needed = [row for row, is_direct in zip(rows, direct, strict=True) if is_direct]
        pinned = [row for row, is_direct in zip(rows, direct, strict=True) if not is_direct]
        chunks_pinned = {self.chunk_of(row) for row in pinned}
        if not needed or root not in rows or chunks_pinned & tied:
            return None  # the records are not those that are relied on, or another tree rests on what is pinned
        # What rests on needed chunks alone stays: those do not become deeper.
        rewritten = [row for row in needed if chunks_pinned.intersection(self.bases_of(row))]
        if any(len(self.bases_of(row)) > 1 for row in rewritten):
            return None  # a rounded copy costs a byte where its masters are
        is_root_needed = root in needed
        reference = root if is_root_needed else needed[0]
        replaced_bytes = sum(self.stored_of(row) for row in (*pinned, *rewritten))
        written_bytes = sum(self.stored_of(row) for row in rewritten)
        if not is_root_needed:
            written_bytes += self.stored_of(root) - self.stored_of(reference)
        return Tree(reference, tuple(rewritten), replaced_bytes, written_bytes)

    def kept_by_pack(self) -> npt.NDArray[np.int64]:
        """By pack: kept records."""
        return np.bincount(self._pack.values[self._kept.values], minlength=len(self.packs))

    def by_pack(self, *, pinned: bool = False) -> npt.NDArray[np.int64]:
        """By pack: bytes of kept records; with `pinned` only of those that nothing but differences needs."""
        chosen = self._kept.values.copy()
        if pinned:
            chosen &= (self._flags.values[self._chunk.values] & _DIRECT) == 0
        rows = np.flatnonzero(chosen)
        weights = self.record_bytes(rows).astype(np.float64)
        sums = np.bincount(self._pack.values[rows], weights=weights, minlength=len(self.packs))
        return sums.astype(np.int64)


class _Column(Generic[Item]):
    """An array that grows in place: `realloc` moves pages of a large one, and copies nothing."""

    def __init__(self, dtype: type[Item], *, fill: int = 0) -> None:
        self._data: npt.NDArray[Item] = np.zeros(0, dtype)
        self._fill = fill
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        return self._data.nbytes

    @property
    def values(self) -> npt.NDArray[Item]:
        """What is in it, to be changed in place. Not to be used after the column has grown."""
        return self._data[: self._count]

    def append(self, values: npt.NDArray[Item]) -> None:
        start = self._count
        self.extend_to(start + len(values))
        self.values[start:] = values

    def extend_to(self, count: int) -> None:
        if count > len(self._data):
            self._data.resize(max(count, len(self._data) * 5 // 4), refcheck=False)
        self._data[self._count : count] = self._fill
        self._count = max(self._count, count)
