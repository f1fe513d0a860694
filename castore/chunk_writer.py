"""Write the new chunks of one save into packs: encoded by threads, appended in order, sealed together.

    put(…) ──▶ encode (threads, bounded queue) ──▶ append in the order of put ──▶ finish: seal, add to the index

Everything is invisible until `finish`; `abort` leaves nothing. One writer belongs to one thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from castore.backend.base import Backend
from castore.codec.base import Elements
from castore.codec.chooser import Encoded, encode_as_rounding, encode_chunk
from castore.errors import CastoreError, CodecError
from castore.format.layout import pack_name
from castore.format.pack import PackHeader, RecordKind
from castore.hashing import Hasher
from castore.ids import Buffer, ChunkId, PackId, new_pack_id
from castore.options import DELTA_DEPTH_MAX, ENCODE_AHEAD_CHUNKS, PACK_BYTES_MAX, Compression
from castore.pack.writer import PackWriter, SealedPack
from castore.threads import worker_count

if TYPE_CHECKING:
    from castore.codec.rounding import Rule

ReadRaw = Callable[[], Buffer]
KeepBase = Callable[[ChunkId, Buffer, ChunkId | None], None]
"""Gets a chunk, its raw bytes, and the base that it was compared with, which later ones will not need for it."""


@dataclass(frozen=True, slots=True)
class BaseSource:
    """A chunk to take a difference from."""

    chunk_id: ChunkId
    depth: int
    """Of its own record."""
    read: Callable[[], Buffer]
    """Its raw bytes, as long as the new chunk's. May raise CastoreError: the new chunk is then stored by itself."""


@dataclass(frozen=True, slots=True)
class MasterSource:
    """float32 chunks that a chunk of 16-bit floats may be the rounding of."""

    rule: Rule
    chunk_ids: tuple[ChunkId, ...]
    depth: int
    """Of the deepest of their records."""
    read: Callable[[], Sequence[Buffer]]
    """Their raw bytes."""


@dataclass(frozen=True, slots=True)
class Coded:
    """An encoded chunk and what its record rests on."""

    encoded: Encoded
    base_ids: tuple[ChunkId, ...] = ()
    depth: int = 0


@dataclass(frozen=True, slots=True)
class _Job:
    chunk_id: ChunkId
    kind: RecordKind
    raw_bytes: int
    encode: Callable[[], Coded | None]


@dataclass(frozen=True, slots=True)
class _Pending:
    jobs: Sequence[_Job]
    coded: Future[list[Coded | None]]


_BATCH_BYTES = 256 * 1024
"""Smaller chunks are handed to a thread together: handing over costs as much as encoding one."""
_THREAD_BYTES_MIN = 64 * 1024
"""Mean length of the chunks of a batch from which on a thread encodes it. Smaller ones spend most of their time in the
interpreter, which runs one thread at a time: the save of a LoRA (76 chunks of 12 to 48 KiB) took 15 ms longer with
two."""


class ChunkWriter:
    """Appends chunks to packs of its own."""

    def __init__(
        self,
        backend: Backend,
        hasher: Hasher,
        repository_id: bytes,
        *,
        compression: Compression,
        now_ns: int,
        may_order: bool = False,
        keep_base: KeepBase | None = None,
    ) -> None:
        """`may_order` allows for records of codec 18. `keep_base` gets every chunk that later ones may rest on, where
        it is encoded.
        """
        self._backend = backend
        self._hasher = hasher
        self._repository_id = repository_id
        self._compression: Compression = compression
        self._now_ns = now_ns
        self._may_order = may_order
        self._keep_base = keep_base
        self._pool: ThreadPoolExecutor | None = None
        self._batch: list[_Job] = []
        self._batch_bytes = 0
        self._pending: deque[_Pending] = deque()
        self._pack: PackWriter | None = None
        self._sealed: list[SealedPack] = []
        self._depths: dict[ChunkId, int] = {}

    def put(
        self,
        chunk_id: ChunkId,
        read: ReadRaw,
        *,
        raw_bytes: int,
        elements: Elements,
        kind: RecordKind,
        base: BaseSource | None = None,
        masters: Sequence[MasterSource] = (),
    ) -> None:
        """Schedule one chunk; `read` is called here or from another thread. Blocks while the queue is full.

        Where it is the rounding of one of `masters`, it is stored as that; else as what is shortest.
        """
        encode = partial(self._encode, chunk_id, read, elements, kind, base=base, masters=masters)
        self.put_coded(chunk_id, encode, raw_bytes=raw_bytes, kind=kind)

    def put_coded(
        self, chunk_id: ChunkId, encode: Callable[[], Coded | None], *, raw_bytes: int, kind: RecordKind
    ) -> None:
        """Schedule one chunk whose encoding is the caller's: `encode` is called here or from another thread and proves
        what it gives; with None nothing is written. Blocks while the queue is full.
        """
        self._batch.append(_Job(chunk_id, kind, raw_bytes, encode))
        self._batch_bytes += raw_bytes
        if self._batch_bytes >= _BATCH_BYTES:
            self._submit_batch()

    def _submit_batch(self) -> None:
        """Have the batch encoded in a thread; in this one where that is faster, or when the interpreter is shutting
        down and starts no more.
        """
        while len(self._pending) >= ENCODE_AHEAD_CHUNKS:
            self._append_next()
        jobs, in_thread = self._batch, self._batch_bytes >= _THREAD_BYTES_MIN * len(self._batch)
        self._batch, self._batch_bytes = [], 0
        self._pending.append(_Pending(jobs, (self._start(jobs) if in_thread else None) or _done(_encode_all(jobs))))

    def _start(self, jobs: Sequence[_Job]) -> Future[list[Coded | None]] | None:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(worker_count(), thread_name_prefix="castore-encode")
        try:
            return self._pool.submit(_encode_all, jobs)
        except RuntimeError:
            return None

    def put_bytes(self, chunk_id: ChunkId, raw: bytes, *, kind: RecordKind, elements: Elements) -> None:
        """Schedule a chunk that is already in memory."""
        self.put(chunk_id, lambda: raw, raw_bytes=len(raw), elements=elements, kind=kind)

    def put_run(self, chunks: Sequence[tuple[ChunkId, ReadRaw]], *, kind: RecordKind, payload_bytes: int) -> None:
        """Append a whole raw leaf as one run, so that it can be mapped."""
        self._append_all()
        self._open_pack().append_run(chunks, kind=kind, payload_bytes=payload_bytes)
        for chunk_id, read in chunks:
            self._prove_raw(chunk_id, read())
        self._rotate()

    def finish(self) -> list[SealedPack]:
        """Append what is pending and seal; returns the packs, durable and visible. Empty when nothing was put."""
        self._append_all()
        self._stop_pool()
        self._seal()
        return self._sealed

    def abort(self) -> None:
        """Drop everything that is not sealed. Harmless after finish."""
        for pending in self._pending:
            pending.coded.cancel()
        self._pending.clear()
        self._batch.clear()
        self._stop_pool()
        if self._pack is not None:
            self._pack.abort()
            self._pack = None

    def depths(self) -> dict[ChunkId, int]:
        """The depth of every record so far. Waits for those that are still being encoded."""
        self._append_all()
        return self._depths

    def _encode(
        self,
        chunk_id: ChunkId,
        read: ReadRaw,
        elements: Elements,
        kind: RecordKind,
        *,
        base: BaseSource | None,
        masters: Sequence[MasterSource],
    ) -> Coded:
        raw = read()
        for master in masters:
            parts = tuple(zip(master.chunk_ids, master.read(), strict=True))
            rounded = encode_as_rounding(raw, elements, master.rule, parts, chunk_id=chunk_id, hasher=self._hasher)
            if rounded is not None:
                return Coded(rounded, master.chunk_ids, master.depth + 1)
        other: Buffer | None = None
        if base is not None:
            with suppress(CastoreError):
                other = base.read()
        encoded = encode_chunk(
            raw,
            elements,
            self._compression,
            chunk_id=chunk_id,
            hasher=self._hasher,
            base=other,
            base_id=base.chunk_id if base is not None else None,
            may_order=self._may_order,
        )
        coded = Coded(encoded)
        if base is not None and encoded.rests_on_base:
            coded = Coded(encoded, (base.chunk_id,), base.depth + 1)
        if self._keep_base is not None and coded.depth < DELTA_DEPTH_MAX and kind is RecordKind.LEAF:
            self._keep_base(chunk_id, raw, base.chunk_id if base is not None else None)
        return coded

    def _append_all(self) -> None:
        if self._batch:
            self._submit_batch()
        while self._pending:
            self._append_next()

    def _append_next(self) -> None:
        # Nothing here holds the future on: its error would hold this frame, and with it the state, in a cycle.
        jobs, results = self._pending[0].jobs, self._pending[0].coded.result()
        self._pending.popleft()
        for job, coded in zip(jobs, results, strict=True):
            if coded is not None:
                self._append(job, coded)

    def _append(self, job: _Job, coded: Coded) -> None:
        self._open_pack().append(
            job.chunk_id,
            coded.encoded.payload,
            kind=job.kind,
            raw_bytes=job.raw_bytes,
            chain=coded.encoded.chain,
            base_ids=coded.base_ids,
            depth=coded.depth,
        )
        self._depths[job.chunk_id] = coded.depth
        if not coded.encoded.chain:
            self._prove_raw(job.chunk_id, coded.encoded.payload)
        self._rotate()

    def _prove_raw(self, chunk_id: ChunkId, raw: Buffer) -> None:
        """Raw bytes go from the state's own memory to the pack: hashed again after the write, they were right in it."""
        if self._hasher.digest(raw) != chunk_id:
            raise CodecError(
                f"chunk {chunk_id.hex()}: its bytes changed between hashing and writing; was the state changed by "
                "another thread during the save? If not, test this machine's memory"
            )

    def _open_pack(self) -> PackWriter:
        if self._pack is None:
            pack_id: PackId = new_pack_id()
            header = PackHeader(pack_id, self._repository_id, self._hasher, self._now_ns)
            self._pack = PackWriter(self._backend.create_stream(pack_name(pack_id)), header)
        return self._pack

    def _rotate(self) -> None:
        if self._pack is not None and self._pack.pack_bytes >= PACK_BYTES_MAX:
            self._seal()

    def _seal(self) -> None:
        if self._pack is not None:
            self._sealed.append(self._pack.seal())
            self._pack = None

    def _stop_pool(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


def _done(coded: list[Coded | None]) -> Future[list[Coded | None]]:
    future: Future[list[Coded | None]] = Future()
    future.set_result(coded)
    return future


def _encode_all(jobs: Sequence[_Job]) -> list[Coded | None]:
    return [job.encode() for job in jobs]
