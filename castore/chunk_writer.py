"""Write the new chunks of one save into packs: encoded by threads, appended in order, sealed together.

    put(…) ──▶ encode (threads, bounded queue) ──▶ append in the order of put ──▶ finish: seal, add to the index

Everything is invisible until `finish`; `abort` leaves nothing. One writer belongs to one thread.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from castore.backend.base import Backend
from castore.codec.base import Elements
from castore.codec.chooser import Encoded, encode_chunk
from castore.format.layout import pack_name
from castore.format.pack import PackHeader, RecordKind
from castore.hashing import Hasher
from castore.ids import Buffer, ChunkId, PackId, new_pack_id
from castore.options import ENCODE_AHEAD_CHUNKS, PACK_BYTES_MAX, Compression
from castore.pack.writer import PackWriter, SealedPack

ReadRaw = Callable[[], Buffer]


def worker_count() -> int:
    """Threads for hashing, coding and reading: one per core that this process may use, at most 8."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@dataclass(frozen=True, slots=True)
class _Pending:
    chunk_id: ChunkId
    kind: RecordKind
    raw_bytes: int
    encoded: Future[Encoded]


class ChunkWriter:
    """Appends chunks to packs of its own."""

    def __init__(
        self, backend: Backend, hasher: Hasher, repository_id: bytes, *, compression: Compression, now_ns: int
    ) -> None:
        self._backend = backend
        self._hasher = hasher
        self._repository_id = repository_id
        self._compression: Compression = compression
        self._now_ns = now_ns
        self._pool: ThreadPoolExecutor | None = None
        self._pending: deque[_Pending] = deque()
        self._pack: PackWriter | None = None
        self._sealed: list[SealedPack] = []

    def put(self, chunk_id: ChunkId, read: ReadRaw, *, raw_bytes: int, elements: Elements, kind: RecordKind) -> None:
        """Schedule one chunk; `read` is called from another thread. Blocks while the queue is full."""
        while len(self._pending) >= ENCODE_AHEAD_CHUNKS:
            self._append_next()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(worker_count(), thread_name_prefix="castore-encode")
        future = self._pool.submit(self._encode, chunk_id, read, elements)
        self._pending.append(_Pending(chunk_id, kind, raw_bytes, future))

    def put_bytes(self, chunk_id: ChunkId, raw: bytes, *, kind: RecordKind, elements: Elements) -> None:
        """Schedule a chunk that is already in memory."""
        self.put(chunk_id, lambda: raw, raw_bytes=len(raw), elements=elements, kind=kind)

    def put_run(self, chunks: Sequence[tuple[ChunkId, ReadRaw]], *, kind: RecordKind, payload_bytes: int) -> None:
        """Append a whole raw leaf as one run, so that it can be mapped."""
        self._append_all()
        self._open_pack().append_run(chunks, kind=kind, payload_bytes=payload_bytes)
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
            pending.encoded.cancel()
        self._pending.clear()
        self._stop_pool()
        if self._pack is not None:
            self._pack.abort()
            self._pack = None

    def _encode(self, chunk_id: ChunkId, read: ReadRaw, elements: Elements) -> Encoded:
        return encode_chunk(read(), elements, self._compression, chunk_id=chunk_id, hasher=self._hasher)

    def _append_all(self) -> None:
        while self._pending:
            self._append_next()

    def _append_next(self) -> None:
        pending = self._pending.popleft()
        encoded = pending.encoded.result()
        self._open_pack().append(
            pending.chunk_id, encoded.payload, kind=pending.kind, raw_bytes=pending.raw_bytes, chain=encoded.chain
        )
        self._rotate()

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
