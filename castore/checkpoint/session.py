"""One save's dealings with the store: what is there already, what new chunks rest on, writing, and healing.

The invariant that heal() keeps: every chunk of the snapshot, bases included, lies in a pack that stands and is not
condemned, as of a look taken after the snapshot became visible.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from itertools import groupby

from castore.checkpoint.bases import Base, candidates, plan_bases, reference_of
from castore.checkpoint.masters import Master, find_masters, read_all, usable_masters
from castore.checkpoint.plan import LeafChunks, Source, Write
from castore.chunk_writer import BaseSource, ChunkWriter, MasterSource
from castore.closure import closure
from castore.codec.registry import DIFFERENCES
from castore.format.manifest import Entry
from castore.format.pack import Row
from castore.ids import Buffer, ChunkId
from castore.index import Location
from castore.leases import condemned_packs
from castore.options import DELTA_DEPTH_MAX, GRID_BYTES
from castore.repository import Handle
from castore.store import Locations, list_packs


class WriteSession:
    """Looks up, writes and heals the chunks of one snapshot, under its writer lease."""

    def __init__(self, handle: Handle, now_ns: int) -> None:
        self.handle = handle
        self.now_ns = now_ns
        self._condemned = condemned_packs(handle.backend)
        handle.store.refresh()
        self._sources: Mapping[ChunkId, Source] = {}
        self._bases: Mapping[ChunkId, Base] = {}
        self._masters: Mapping[ChunkId, Sequence[Master]] = {}
        self._memory = handle.bases
        self._base_uses: Mapping[ChunkId, int] = {}
        self._pinned: frozenset[ChunkId] = frozenset()
        self._relied_on: dict[ChunkId, Locations] = {}
        """Chunks of the snapshot and the locations they rest on, bases included."""
        self._keeps_bases = False
        """Not for a snapshot without a parent: most are never followed by another of the same process, and reading an
        anchor back costs less than touching that much fresh memory."""
        self._writer: ChunkWriter | None = None

    def find_present(self, sources: Mapping[ChunkId, Source]) -> frozenset[ChunkId]:
        """The chunks that lie, with their bases, in packs of a listing taken under our lease that are not condemned."""
        self._sources = sources
        self._relied_on = closure(sources, self.handle.store, self._condemned)
        return frozenset(self._relied_on)

    def plan_deltas(self, entries: Iterable[Entry], parents: Iterable[Entry]) -> None:
        """Choose bases from the entries of the parent snapshot."""
        if self.handle.config.options.compression == "auto":
            wanted = candidates(entries, parents, id_bytes=self.handle.hasher.digest_bytes)
            fresh = {chunk_id: base for chunk_id, base in wanted.items() if chunk_id not in self._relied_on}
            self._bases = plan_bases(fresh, self.handle.store, self._condemned)
            self._base_uses = Counter(base.chunk_id for base in self._bases.values())
            self._pinned = frozenset(self._base_uses)
            self._memory.pin(self._pinned)
            self._keeps_bases = True

    def plan_copies(self, leaves: Sequence[LeafChunks]) -> None:
        """Find the 16-bit leaves that may be roundings of others."""
        if self.handle.config.options.compression == "auto":
            self._masters = find_masters(leaves)

    def write(self, writes: Iterable[Write], *, progress: Callable[[int], None]) -> int:
        """Write chunks into new packs, durably, and add them to the index; returns the bytes of the packs."""
        handle = self.handle
        self._writer = ChunkWriter(
            handle.backend,
            handle.hasher,
            handle.config.repository_id,
            compression=handle.config.options.compression,
            may_order=handle.config.may_order,
            now_ns=self.now_ns,
            keep_base=self._keep_base if self._keeps_bases else None,
        )
        for is_copy, group in groupby(sorted(writes, key=self._may_be_copy), key=self._may_be_copy):
            # Copies come last: the depth of what they may rest on is known by then.
            written = self._writer.depths() if is_copy else {}
            self._put_all(group, written, progress)
        sealed = self._writer.finish()
        self._writer = None  # it holds on to this session, and both to the state: nothing may wait for a collection
        if sealed:
            handle.store.add({pack.pack_id: pack.rows for pack in sealed})
        for pack in sealed:
            for row in pack.rows:
                self._relied_on[row.chunk_id] = (Location(pack.pack_id, row), *self._below(row))
        return sum(pack.pack_bytes for pack in sealed)

    def _put_all(
        self, writes: Iterable[Write], written: Mapping[ChunkId, int], progress: Callable[[int], None]
    ) -> None:
        """`written`: depths of the records of this save that a copy may rest on."""
        assert self._writer is not None
        for write in writes:
            if write.as_run:
                chunks = [(chunk_id, source.read) for chunk_id, source in write.chunks]
                payload_bytes = sum(source.raw_bytes for _, source in write.chunks)
                self._writer.put_run(chunks, kind=write.chunks[0][1].kind, payload_bytes=payload_bytes)
            else:
                for chunk_id, source in write.chunks:
                    self._put(self._writer, chunk_id, source, written)
            progress(sum(source.raw_bytes for _, source in write.chunks))

    def _below(self, row: Row) -> Locations:
        """What the bases of a record of this save rest on."""
        if row.chain in DIFFERENCES:
            return self._bases[row.chunk_id].rests_on
        return tuple(location for master_id in row.base_ids for location in self._relied_on[master_id])

    def heal(self) -> None:
        """Publish, then check: write again what was collected since we looked, until all of it is there."""
        while True:
            # In this order: a pack condemned after this look is condemned after our root became visible, so that the
            # collector saves what we need. The other way round, one could be deleted and forgotten between the two.
            condemned = condemned_packs(self.handle.backend)
            usable = list_packs(self.handle.backend) - condemned
            lost = [
                chunk_id
                for chunk_id, rests_on in self._relied_on.items()
                if any(location.pack_id not in usable for location in rests_on)
            ]
            if not lost:
                return
            self._bases, self._masters = {}, {}  # by themselves: what they would rest on may be going too
            writes = [Write(((chunk_id, self._sources[chunk_id]),), as_run=False) for chunk_id in lost]
            self.write(writes, progress=lambda _: None)

    def remember_bases(self, chunk_ids: Collection[ChunkId]) -> None:
        """Keep in memory only what the next save to continue from these chunks will take differences from."""
        references = (self._relied_on.get(chunk_id) for chunk_id in chunk_ids)
        self._unpin()
        self._memory.keep_only({reference_of(rests_on) for rests_on in references if rests_on})

    def abort(self) -> None:
        """Leave no half-written pack behind."""
        if self._writer is not None:
            self._writer.abort()
            self._writer = None
        self._unpin()

    def _unpin(self) -> None:
        """When no encoding thread is at work any more."""
        pinned, self._pinned = self._pinned, frozenset()
        self._memory.unpin(pinned)

    def _put(self, writer: ChunkWriter, chunk_id: ChunkId, source: Source, written: Mapping[ChunkId, int]) -> None:
        base = self._bases.get(chunk_id)
        writer.put(
            chunk_id,
            source.read,
            raw_bytes=source.raw_bytes,
            elements=source.elements,
            kind=source.kind,
            base=self._base_source(base, source.raw_bytes) if base is not None else None,
            masters=self._master_sources(chunk_id, written),
        )

    def _may_be_copy(self, write: Write) -> bool:
        return any(chunk_id in self._masters for chunk_id, _ in write.chunks)

    def _master_sources(self, chunk_id: ChunkId, written: Mapping[ChunkId, int]) -> list[MasterSource]:
        """What a chunk may be the rounding of, where that is stored less deep than a difference may be."""
        masters = self._masters.get(chunk_id)
        if not masters:
            return []
        depths = {
            master_id: written[master_id] if master_id in written else self._relied_on[master_id][0].row.depth
            for master in masters
            for master_id in master.chunk_ids
            if master_id in written or master_id in self._relied_on
        }
        usable = usable_masters(masters, depths, chunk_id=chunk_id, depth_max=DELTA_DEPTH_MAX)
        return [
            MasterSource(master.rule, master.chunk_ids, depth, partial(read_all, master)) for master, depth in usable
        ]

    def _keep_base(self, chunk_id: ChunkId, raw: Buffer, instead_of: ChunkId | None) -> None:
        """Called when a chunk is encoded that will be the next reference at its place: its base has been that."""
        # Several places may be compared with it now, and it may itself be a chunk of this snapshot.
        if instead_of is not None and self._base_uses[instead_of] == 1 and instead_of not in self._relied_on:
            self._memory.give_up(instead_of)
        self._memory.put(chunk_id, raw)

    def _base_source(self, base: Base, raw_bytes: int) -> BaseSource:
        """A base from memory, else from the repository.

        One that is read is kept where the chunk that rests on it will be too deep to be the next reference itself.
        """
        store, memory = self.handle.store, self._memory

        def read() -> Buffer:
            kept = memory.get(base.chunk_id)
            if kept is not None:
                # The disk is looked at too: a difference from a rotten record could never be read again.
                for location in base.rests_on:
                    store.check(location)
                return kept
            out = memoryview(_scratch.buffer)[:raw_bytes]
            store.read_into(base.chunk_id, base.rests_on[:1], out)
            if base.depth + 1 >= DELTA_DEPTH_MAX:
                memory.put(base.chunk_id, out)
            return out

        return BaseSource(base.chunk_id, base.depth, read)


class _BaseBuffer(threading.local):
    """Where an encoding thread reads a base that memory does not hold."""

    def __init__(self) -> None:
        self.buffer = bytearray(GRID_BYTES)


_scratch = _BaseBuffer()
