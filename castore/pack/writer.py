"""Write one pack: append records and runs in order, then seal it with its table and trailer.

The pack becomes visible, whole and durable, only in `seal`. Not thread-safe: one writer, one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from castore.backend.base import PackSink
from castore.format.pack import (
    HEADER_BYTES,
    Chain,
    PackHeader,
    RecordKind,
    Row,
    Trailer,
    aligned,
    encode_header,
    encode_record_header,
    encode_run_header,
    encode_table,
    encode_trailer,
    record_header_bytes,
    run_header_bytes,
    run_row,
)
from castore.hashing import checksum
from castore.ids import Buffer, ChunkId, PackId

_FLUSH_BYTES = 16 * 1024 * 1024
"""Ask for write-back every so often: the final fsync then finds most pages clean."""


@dataclass(frozen=True, slots=True)
class SealedPack:
    """A pack that is durable."""

    pack_id: PackId
    rows: tuple[Row, ...]
    pack_bytes: int


class PackWriter:
    """Appends to one pack."""

    def __init__(self, sink: PackSink, header: PackHeader) -> None:
        self._sink = sink
        self._header = header
        self._id_bytes = header.hasher.digest_bytes
        self._rows: list[Row] = []
        self._offset = 0
        self._flushed = 0

    @property
    def pack_bytes(self) -> int:
        """Bytes appended so far."""
        return self._offset

    def append(
        self,
        chunk_id: ChunkId,
        payload: Buffer,
        *,
        kind: RecordKind,
        raw_bytes: int,
        chain: Chain,
        base_ids: tuple[ChunkId, ...] = (),
        depth: int = 0,
    ) -> Row:
        """Append one record; the payload is written without a copy."""
        self._begin()
        start = self._offset + record_header_bytes(self._id_bytes, base_count=len(base_ids))
        row = Row(chunk_id, start, len(payload), raw_bytes, checksum(payload), chain, kind, depth, base_ids)
        end = start + len(payload)
        padding = bytes(aligned(end) - end)
        self._write(encode_record_header(row, id_bytes=self._id_bytes), payload, padding)
        self._rows.append(row)
        return row

    def append_run(
        self, chunks: Sequence[tuple[ChunkId, Callable[[], Buffer]]], *, kind: RecordKind, payload_bytes: int
    ) -> list[Row]:
        """Append the raw chunks of one leaf as one run. Each reader is called twice: for the checksum, then to
        write.
        """
        self._begin()
        sums = [(chunk_id, checksum(read())) for chunk_id, read in chunks]
        n = self._id_bytes
        start = self._offset + run_header_bytes(len(chunks), offset=self._offset, id_bytes=n)
        rows = [
            run_row(chunk_id, sum_, index, start=start, payload_bytes=payload_bytes, kind=kind)
            for index, (chunk_id, sum_) in enumerate(sums)
        ]
        self._write(encode_run_header(sums, kind=kind, payload_bytes=payload_bytes, offset=self._offset, id_bytes=n))
        for _, read in chunks:
            self._write(read())
        self._write(bytes(aligned(self._offset) - self._offset))
        self._rows.extend(rows)
        return rows

    def seal(self) -> SealedPack:
        """Write table and trailer and make the pack durable and visible. Blocks until it is."""
        self._begin()
        table = encode_table(self._rows, id_bytes=self._id_bytes)
        second_bases = sum(len(row.base_ids) > 1 for row in self._rows)
        trailer = Trailer(self._header.pack_id, self._offset, len(self._rows), checksum(table), second_bases)
        self._write(table, encode_trailer(trailer))
        self._sink.commit()
        return SealedPack(self._header.pack_id, tuple(self._rows), self._offset)

    def abort(self) -> None:
        """Leave nothing behind; harmless after seal."""
        self._sink.abort()

    def _begin(self) -> None:
        if self._offset == 0:
            self._write(encode_header(self._header))
            assert self._offset == HEADER_BYTES

    def _write(self, *buffers: Buffer) -> None:
        self._sink.write(*buffers)
        self._offset += sum(len(buffer) for buffer in buffers)
        if self._offset - self._flushed >= _FLUSH_BYTES:
            self._sink.flush_hint()
            self._flushed = self._offset
