"""Chunks on their way: read at the source, verified, written into packs of the target.

    locate ─▶ read, checksum, decode, chunk id (threads) ─▶ append in order ─▶ seal at PUSH_PACK_BYTES_MAX

Stored bytes are copied as they are where the target encodes as the source does and the base travels too or is there
already; else a chunk is encoded anew. Nothing is appended whose decoded bytes were not hashed on the way, so rot stays
where it is.

Invariants:

1. A record is only written after, and rests only on, a base that is present and less deep than itself.
2. What was sealed is durable: an interrupted push finds it by its chunk ids.

Belongs to one thread.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from castore.codec.base import Elements
from castore.codec.chooser import encode_chunk
from castore.codec.registry import DIFFERENCES, ORDERED
from castore.errors import CastoreError
from castore.format.layout import pack_name
from castore.format.manifest import Entry
from castore.format.pack import Chain, PackHeader, RecordKind
from castore.ids import Buffer, ChunkId, new_pack_id
from castore.index import Location
from castore.options import DELTA_DEPTH_MAX, ENCODE_AHEAD_CHUNKS, MIB
from castore.pack.writer import PackWriter
from castore.repository import Handle
from castore.threads import worker_count
from castore.transfer.needs import Need
from castore.transfer.target_chunks import Stored, TargetChunks

PUSH_PACK_BYTES_MAX = 64 * MIB
"""Packs of a push are sealed at this size: an interruption costs at most so much, and one fsync each costs nothing."""
_SHARED_BASE_MIN = 2
"""A base that no snapshot needs travels when at least so many chunks rest on it: they are larger without it."""


@dataclass(frozen=True, slots=True)
class _Item:
    """One chunk to send."""

    chunk_id: ChunkId
    """At the source."""
    need: Need
    location: Location | None
    bases: tuple[ChunkId, ...]
    """What it is to rest on, by ids at the source."""
    copies: bool
    """Whether the stored bytes are copied."""


@dataclass(frozen=True, slots=True)
class _Arrived:
    """A chunk that was read and verified."""

    chunk_id: ChunkId
    """At the target."""
    raw: Buffer
    payload: Buffer
    chain: Chain
    rests_on_base: bool
    depth: int
    """Of the record that was copied."""


class Sender:
    """Sends chunks from one repository to another, under a writer lease of the target."""

    def __init__(
        self,
        source: Handle,
        target: Handle,
        *,
        now_ns: int,
        reencode: bool = False,
        check: bool = False,
        progress: Callable[[int], None] = lambda _: None,
        pack_bytes_max: int = PUSH_PACK_BYTES_MAX,
    ) -> None:
        """`progress` gets the raw bytes of chunks that were dealt with."""
        self.source = source
        self.target = target
        self.same_hash = source.hasher.number == target.hasher.number
        self.ids: dict[ChunkId, ChunkId] = {}
        """Source id → target id under another hash; with one hash it stays empty."""
        self.sent_count = 0
        self.sent_raw_bytes = 0
        self.stored_bytes = 0
        """Of sealed packs."""
        self._now_ns = now_ns
        self._compression = target.config.options.compression
        self._copies = not reencode and self._compression == source.config.options.compression
        self.takes_bases = not self._copies and self._compression == "auto"
        """Whether what is sent may rest on `bases` of `send`."""
        self._progress = progress
        self._pack_bytes_max = pack_bytes_max
        self.there = TargetChunks(target, check=check, knows_ids=self.same_hash)
        self._pool: ThreadPoolExecutor | None = None
        self._pending: deque[tuple[_Item, Future[_Arrived]]] = deque()
        self._pack: PackWriter | None = None

    # ---- what is there ---------------------------------------------------------------------------------------

    def target_id(self, chunk_id: ChunkId) -> ChunkId | None:
        """The id at the target; None under another hash when the chunk was not read yet."""
        return chunk_id if self.same_hash else self.ids.get(chunk_id)

    # ---- sending ---------------------------------------------------------------------------------------------

    def send(self, needs: Mapping[ChunkId, Need], *, bases: Mapping[ChunkId, ChunkId]) -> None:
        """Bring all chunks to the target that it lacks; afterwards `target_id` knows each.

        `bases` are chunks of the parent snapshot that new encodings may rest on, by ids of the source.
        """
        known = {chunk_id: target_id for chunk_id in needs if (target_id := self.target_id(chunk_id)) is not None}
        present = self.there.find_present(known.values())
        lacking = [chunk_id for chunk_id in needs if known.get(chunk_id) not in present]
        self._progress(sum(need.raw_bytes for chunk_id, need in needs.items() if known.get(chunk_id) in present))
        for item in self._plan(lacking, needs, bases):
            while len(self._pending) >= ENCODE_AHEAD_CHUNKS:
                self._append_next()
            self._submit(item)
        while self._pending:
            self._append_next()

    def send_run(self, entry: Entry) -> bool:
        """Send a whole leaf as one run, if the target lacks all of it. Nothing is done when it has a part."""
        chunk_ids = entry.chunk_ids(self.source.hasher.digest_bytes)
        if len(set(chunk_ids)) != len(chunk_ids):
            return False
        for chunk_id in chunk_ids:
            if not self.same_hash and chunk_id not in self.ids:
                self.ids[chunk_id] = self.target.hasher.chunk_id(self._read(chunk_id, entry.path))
        target_ids = [chunk_id if self.same_hash else self.ids[chunk_id] for chunk_id in chunk_ids]
        if self.there.find_present(target_ids):
            return False

        def reader(chunk_id: ChunkId) -> Callable[[], Buffer]:
            # Read, and verified, each time that the writer asks: a leaf may be larger than the memory.
            return lambda: self._read(chunk_id, entry.path)

        chunks = [(new, reader(old)) for new, old in zip(target_ids, chunk_ids, strict=True)]
        self._open_pack().append_run(chunks, kind=RecordKind.LEAF, payload_bytes=entry.raw_bytes)
        for target_id in target_ids:
            self.there.note(target_id, Stored(0, None))
        self.sent_count += len(chunks)
        self.sent_raw_bytes += entry.raw_bytes
        self._progress(entry.raw_bytes)
        self._rotate()
        return True

    def put(self, raw: bytes, *, kind: RecordKind) -> ChunkId:
        """Send bytes that were made here: a part of a manifest under another hash."""
        chunk_id = self.target.hasher.chunk_id(raw)
        if not self.there.find_present([chunk_id]):
            self._append_raw(chunk_id, raw, kind, Elements())
        return chunk_id

    def read_leaf(self, entry: Entry) -> bytearray:
        """The verified bytes of a leaf of the source, in memory."""
        if entry.inline is not None:
            return bytearray(entry.inline)
        chunk_ids = entry.chunk_ids(self.source.hasher.digest_bytes)
        return bytearray().join(self._read(chunk_id, entry.path) for chunk_id in chunk_ids)

    @property
    def open_bytes(self) -> int:
        """Of the pack that is not sealed yet."""
        return self._pack.pack_bytes if self._pack is not None else 0

    def seal(self) -> None:
        """Make everything that was sent durable and findable."""
        if self._pack is not None:
            sealed = self._pack.seal()
            self._pack = None
            self.stored_bytes += sealed.pack_bytes
            self.there.add_pack(sealed)

    def close(self) -> None:
        """Drop what is not sealed. Harmless after `seal`."""
        for _, future in self._pending:
            future.cancel()
        self._pending.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        if self._pack is not None:
            self._pack.abort()
            self._pack = None

    # ---- planning --------------------------------------------------------------------------------------------

    def _plan(
        self, lacking: Sequence[ChunkId], needs: Mapping[ChunkId, Need], bases: Mapping[ChunkId, ChunkId]
    ) -> list[_Item]:
        """The chunks in the order in which they are sent: bases before what rests on them."""
        if not self._copies:
            self._look_up(bases[chunk_id] for chunk_id in lacking if chunk_id in bases)
            return [self._anew(chunk_id, needs[chunk_id], bases) for chunk_id in lacking]
        rows = {chunk_id: hits[0] for chunk_id, hits in self.source.store.locate(lacking).items() if hits}
        all_needs = {**dict.fromkeys(rows), **{chunk_id: needs[chunk_id] for chunk_id in lacking}}
        self._add_shared_bases(rows, all_needs)
        self._look_up(base for location in rows.values() for base in location.row.base_ids)
        order = sorted(
            (chunk_id for chunk_id in all_needs if chunk_id in rows),
            key=lambda chunk_id: (rows[chunk_id].row.depth, rows[chunk_id].pack_id, rows[chunk_id].row.offset),
        )
        depths: dict[ChunkId, int] = {}
        items: list[_Item] = []
        for chunk_id in order:
            location, need = rows[chunk_id], all_needs[chunk_id]
            assert need is not None
            row = location.row
            held = all(self._will_hold(base, depths, below=row.depth) for base in row.base_ids)
            copies = held and (row.chain != (ORDERED,) or self.target.config.may_order)
            depths[chunk_id] = row.depth if held else 0
            items.append(_Item(chunk_id, need, location, row.base_ids if held else (), copies))
        # What the source does not find is asked for all the same: the error of reading it says what is wrong.
        items.extend(
            _Item(chunk_id, needs[chunk_id], None, (), copies=False) for chunk_id in lacking if chunk_id not in rows
        )
        return items

    def _add_shared_bases(self, rows: dict[ChunkId, Location], needs: dict[ChunkId, Need | None]) -> None:
        """Let bases travel that no snapshot needs, where several chunks rest on them."""
        while True:
            resting = Counter(base for location in rows.values() for base in location.row.base_ids)
            self._look_up(resting)
            like = {base: needs[chunk_id] for chunk_id, location in rows.items() for base in location.row.base_ids}
            shared = {
                base: like[base]
                for base, count in resting.items()
                if count >= _SHARED_BASE_MIN and base not in rows and not self._has(base)
            }
            found = {base: hits[0] for base, hits in self.source.store.locate(shared).items() if hits}
            if not found:
                return
            rows.update(found)
            needs.update((base, shared[base]) for base in found)

    def _look_up(self, chunk_ids: Iterable[ChunkId]) -> None:
        """See which of these the target has, together: what asks for each of them is then answered from memory."""
        target_ids = (self.target_id(chunk_id) for chunk_id in chunk_ids)
        self.there.find_present(target_id for target_id in target_ids if target_id is not None)

    def _has(self, chunk_id: ChunkId) -> bool:
        target_id = self.target_id(chunk_id)
        return target_id is not None and bool(self.there.find_present([target_id]))

    def _will_hold(self, base: ChunkId, depths: Mapping[ChunkId, int], *, below: int) -> bool:
        """Whether the target has, or by then will have, a base less deep than `below`."""
        if base in depths:
            return depths[base] < below
        return self._usable(base, below=below)

    def _usable(self, base: ChunkId, *, below: int) -> bool:
        """Whether the target has a base less deep than `below`; one that this run did not write is checked first."""
        if not self._has(base):
            return False
        target_id = self.target_id(base)
        assert target_id is not None
        return self.there.can_carry(target_id, below=below)

    def _anew(self, chunk_id: ChunkId, need: Need, bases: Mapping[ChunkId, ChunkId]) -> _Item:
        """A chunk to encode by the target's options, with the base that a save would take."""
        base = bases.get(chunk_id)
        while base is not None and not self._usable(base, below=DELTA_DEPTH_MAX):
            target_id = self.target_id(base)
            stored = self.there.stored(target_id) if target_id is not None else None
            base = stored.base if stored is not None else None
        return _Item(chunk_id, need, None, (base,) if base is not None and base != chunk_id else (), copies=False)

    # ---- reading and appending -------------------------------------------------------------------------------

    def _submit(self, item: _Item) -> None:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(worker_count(), thread_name_prefix="castore-send")
        self._pending.append((item, self._pool.submit(self._fetch, item)))

    def _fetch(self, item: _Item) -> _Arrived:
        """Read one chunk and prove it; runs in a thread."""
        if item.copies and item.location is not None:
            with suppress(CastoreError):  # the reading below tries every other place, or says what is wrong
                stored, raw = self.source.store.read_record(item.location)
                row = item.location.row
                return _Arrived(self._new_id(item, raw), raw, stored, row.chain, bool(row.base_ids), row.depth)
        raw = self._read(item.chunk_id, item.need.path)
        base: Buffer | None = None
        if item.bases and not item.copies:
            with suppress(CastoreError):
                base = self.source.store.get(item.bases[0])
        if base is not None and len(base) != len(raw):
            base = None
        new_id = self._new_id(item, raw)
        encoded = encode_chunk(
            raw,
            item.need.elements,
            self._compression,
            chunk_id=new_id,
            hasher=self.target.hasher,
            base=base,
            base_id=item.bases[0] if base is not None and self.same_hash else None,
            may_order=self.target.config.may_order,
        )
        return _Arrived(new_id, raw, encoded.payload, encoded.chain, encoded.rests_on_base, 0)

    def _new_id(self, item: _Item, raw: Buffer) -> ChunkId:
        return item.chunk_id if self.same_hash else self.target.hasher.chunk_id(raw)

    def _read(self, chunk_id: ChunkId, path: str) -> bytearray:
        """The verified raw bytes of a chunk of the source; an error names the leaf."""
        try:
            return self.source.store.get(chunk_id)
        except CastoreError as error:
            what = f"leaf {path!r}" if path else "its manifest"
            error.args = (f"{what} of {self.source.backend.location}: {error}", *error.args[1:])
            raise

    def _append_next(self) -> None:
        item, future = self._pending.popleft()
        arrived = future.result()
        self._progress(item.need.raw_bytes)
        if not self.same_hash:
            self.ids[item.chunk_id] = arrived.chunk_id
            if self.there.find_present([arrived.chunk_id]):
                return
        if not arrived.rests_on_base:
            self._append(arrived, item, depth=0, bases=())
            return
        depth = arrived.depth if item.copies else 1 + self._depth_of(item.bases[0])
        below = depth if item.copies else DELTA_DEPTH_MAX
        if not all(self._usable(base, below=below) for base in item.bases):
            # A base was found at the target under its new id, deeper than this record: by itself, then.
            self._append_raw(arrived.chunk_id, arrived.raw, item.need.kind, item.need.elements)
            return
        self._append(arrived, item, depth=depth, bases=item.bases)

    def _depth_of(self, base: ChunkId) -> int:
        target_id = self.target_id(base)
        assert target_id is not None
        stored = self.there.stored(target_id)
        assert stored is not None
        return stored.depth

    def _append(self, arrived: _Arrived, item: _Item, *, depth: int, bases: tuple[ChunkId, ...]) -> None:
        target_ids = [self.target_id(base) for base in bases]
        self._open_pack().append(
            arrived.chunk_id,
            arrived.payload,
            kind=item.need.kind,
            raw_bytes=len(arrived.raw),
            chain=arrived.chain,
            base_ids=tuple(target_id for target_id in target_ids if target_id is not None),
            depth=depth,
        )
        self.there.note(arrived.chunk_id, Stored(depth, bases[0] if arrived.chain in DIFFERENCES else None))
        self._count(len(arrived.raw))

    def _append_raw(self, chunk_id: ChunkId, raw: Buffer, kind: RecordKind, elements: Elements) -> None:
        encoded = encode_chunk(raw, elements, self._compression, chunk_id=chunk_id, hasher=self.target.hasher)
        self._open_pack().append(chunk_id, encoded.payload, kind=kind, raw_bytes=len(raw), chain=encoded.chain)
        self.there.note(chunk_id, Stored(0, None))
        self._count(len(raw))

    def _count(self, raw_bytes: int) -> None:
        self.sent_count += 1
        self.sent_raw_bytes += raw_bytes
        self._rotate()

    def _open_pack(self) -> PackWriter:
        if self._pack is None:
            pack_id = new_pack_id()
            header = PackHeader(pack_id, self.target.config.repository_id, self.target.hasher, self._now_ns)
            self._pack = PackWriter(self.target.backend.create_stream(pack_name(pack_id)), header)
        return self._pack

    def _rotate(self) -> None:
        if self.open_bytes >= self._pack_bytes_max:
            self.seal()
