"""A pack is written front to back and appears whole, or not at all."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from castore.backend import MemoryBackend
from castore.backend.base import Backend
from castore.errors import NotFoundError, StorageError
from castore.format.layout import pack_name
from castore.format.pack import (
    HEADER_BYTES,
    TRAILER_BYTES,
    PackHeader,
    RecordKind,
    Row,
    decode_header,
    decode_record_header,
    decode_run_header,
    record_header_bytes,
)
from castore.hashing import checksum, hasher_for
from castore.ids import Buffer, ChunkId
from castore.options import GRID_BYTES, PAGE_BYTES
from castore.pack import writer as writer_module
from castore.pack.reader import read_table
from castore.pack.writer import PackWriter
from tests.suites.golden import assert_golden
from tests.suites.packs import CREATED_NS, HASHER, REPOSITORY_ID, new_writer, pack_id, write_pack

NAME = pack_name(pack_id(1))


def bytes_of(backend: Backend) -> bytes:
    return backend.read(NAME, max_bytes=1 << 30)


def chunk(raw: bytes) -> tuple[ChunkId, Callable[[], Buffer]]:
    return HASHER.chunk_id(raw), lambda: raw


def test_a_small_pack_is_pinned() -> None:
    backend = MemoryBackend()
    write_pack(backend, [b"hello chunk", b"", bytes(16)])
    assert_golden(
        bytes_of(backend),
        """
        434153545041434b010001100000000000002a36fe9c97170000000000000000
        0000000000000001000102030405060708090a0b0c0d0e0f3f75ab8e5f646fec
        4352454301000000000000000b0000000b00000038f894aeff3e379af70d2283
        faa3cfefecd16797edc0bb0100000000000000000000000000000000a637936b
        68656c6c6f206368756e6b000000000043524543010000000000000000000000
        00000000c294d3380580062d99aa06d3014798d86001c324468d497f00000000
        0000000000000000000000008349d60843524543010000000000000010000000
        10000000688952c7656aa6d0e5189a9599e3f86205ea23ef06e28b2d00000000
        0000000000000000000000005d83425e00000000000000000000000000000000
        f70d2283faa3cfefecd16797edc0bb0100000000000000000000000000000000
        80000000000000000b0000000b00000038f894aeff3e379a0000000001000000
        99aa06d3014798d86001c324468d497f00000000000000000000000000000000
        d0000000000000000000000000000000c294d3380580062d0000000001000000
        e5189a9599e3f86205ea23ef06e28b2d00000000000000000000000000000000
        10010000000000001000000010000000688952c7656aa6d00000000001000000
        434153545441494c20010000000000000300000000000000eb4338b2d5ce4aab
        0000000000000000000000000000000100000000000000008128851e1acfc66c
        """,
    )


@pytest.mark.parametrize("name", ["xxh3-128", "blake3"])
def test_what_was_appended_is_where_the_rows_say(name: str) -> None:
    hasher, backend = hasher_for(name), MemoryBackend()
    chunks = [bytes([number]) * (number * 37) for number in range(20)]
    sealed = write_pack(backend, chunks, hasher=hasher)
    data = bytes_of(backend)
    assert sealed.pack_id == pack_id(1)
    assert sealed.pack_bytes == len(data)
    assert decode_header(data, where="x").pack_id == pack_id(1)
    assert decode_header(data, where="x").repository_id == REPOSITORY_ID
    for raw, row in zip(chunks, sealed.rows, strict=True):
        assert row.chunk_id == hasher.chunk_id(raw)
        assert data[row.offset : row.offset + row.stored_bytes] == raw
        assert row.checksum == checksum(raw)
        start = row.offset - record_header_bytes(hasher.digest_bytes)
        assert start % 8 == 0
        assert decode_record_header(data[start:], offset=start, id_bytes=hasher.digest_bytes, where="x") == row
    reader = backend.open_reader(NAME)
    assert read_table(reader, where="x", expected_id=pack_id(1), hasher=hasher) == list(sealed.rows)


def test_encoded_records_and_deltas_carry_what_they_are() -> None:
    backend = MemoryBackend()
    writer = new_writer(backend)
    base_id = HASHER.chunk_id(b"base")
    row = writer.append(
        HASHER.chunk_id(b"raw"),
        b"stored",
        kind=RecordKind.PART,
        raw_bytes=999,
        chain=(16, 3),
        base_ids=(base_id,),
        depth=2,
    )
    assert row == Row(
        HASHER.chunk_id(b"raw"), 128, 6, 999, checksum(b"stored"), (16, 3), RecordKind.PART, 2, (base_id,)
    )
    assert writer.seal().rows == (row,)


def test_the_gaps_are_zero() -> None:
    backend = MemoryBackend()
    sealed = write_pack(backend, [b"\xff" * length for length in range(1, 20)])
    data = bytes_of(backend)
    for row, after in zip(sealed.rows, sealed.rows[1:], strict=False):
        end = row.offset + row.stored_bytes
        start = after.offset - record_header_bytes(16)
        assert 0 <= start - end < 8
        assert not any(data[end:start])


def test_a_run_starts_on_a_page_and_has_no_gaps() -> None:
    backend = MemoryBackend()
    writer = new_writer(backend)
    raw = [b"a" * GRID_BYTES, b"b" * GRID_BYTES, b"c" * 5]
    writer.append(HASHER.chunk_id(b"x"), b"x", kind=RecordKind.LEAF, raw_bytes=1, chain=())
    rows = writer.append_run([chunk(one) for one in raw], kind=RecordKind.LEAF, payload_bytes=2 * GRID_BYTES + 5)
    last = writer.append(HASHER.chunk_id(b"y"), b"y", kind=RecordKind.LEAF, raw_bytes=1, chain=())
    sealed = writer.seal()
    data = bytes_of(backend)
    assert sealed.rows == (sealed.rows[0], *rows, last)
    assert rows[0].offset % PAGE_BYTES == 0
    assert data[rows[0].offset : rows[0].offset + 2 * GRID_BYTES + 5] == b"".join(raw)
    assert [row.checksum for row in rows] == [checksum(one) for one in raw]
    start = 136  # header, record header, one byte, padding
    assert decode_run_header(data[start : rows[0].offset], offset=start, id_bytes=16, where="x") == rows
    reader = backend.open_reader(NAME)
    assert read_table(reader, where="x", expected_id=pack_id(1), hasher=HASHER) == list(sealed.rows)


def test_a_run_may_be_all_there_is() -> None:
    backend = MemoryBackend()
    writer = new_writer(backend)
    rows = writer.append_run([chunk(b"abc")], kind=RecordKind.LEAF, payload_bytes=3)
    assert rows[0].offset == PAGE_BYTES
    assert writer.seal().rows == tuple(rows)


def test_a_pack_may_hold_nothing() -> None:
    backend = MemoryBackend()
    sealed = new_writer(backend).seal()
    assert sealed.rows == ()
    assert sealed.pack_bytes == len(bytes_of(backend)) == HEADER_BYTES + TRAILER_BYTES


def test_nothing_is_seen_before_seal_and_nothing_after_abort() -> None:
    backend = MemoryBackend()
    writer = new_writer(backend)
    writer.append(HASHER.chunk_id(b"x"), b"x", kind=RecordKind.LEAF, raw_bytes=1, chain=())
    assert list(backend.list("")) == []
    with pytest.raises(NotFoundError):
        backend.read(NAME, max_bytes=1)
    writer.abort()
    writer.abort()
    assert list(backend.list("")) == []


def test_abort_after_seal_is_harmless() -> None:
    backend = MemoryBackend()
    writer = new_writer(backend)
    writer.seal()
    data = bytes_of(backend)
    writer.abort()
    assert bytes_of(backend) == data


def test_a_pack_never_replaces_another() -> None:
    backend = MemoryBackend()
    write_pack(backend, [b"first"])
    data = bytes_of(backend)
    with pytest.raises(StorageError, match="taken"):
        write_pack(backend, [b"second"])
    assert bytes_of(backend) == data


class Sink:
    """Notes what it is given."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.hints: list[int] = []
        self.ended = ""

    def write(self, *buffers: Buffer) -> None:
        self.buffers += buffers

    def flush_hint(self) -> None:
        self.hints.append(sum(map(len, self.buffers)))

    def commit(self) -> None:
        self.ended += "commit"

    def abort(self) -> None:
        self.ended += "abort"


def on_sink() -> tuple[Sink, PackWriter]:
    sink = Sink()
    return sink, PackWriter(sink, PackHeader(pack_id(1), REPOSITORY_ID, HASHER, CREATED_NS))


def test_payloads_are_not_copied_on_the_way() -> None:
    sink, writer = on_sink()
    payload, run = memoryview(bytearray(100)), memoryview(bytearray(50))
    writer.append(HASHER.chunk_id(payload), payload, kind=RecordKind.LEAF, raw_bytes=100, chain=())
    writer.append_run([(HASHER.chunk_id(run), lambda: run)], kind=RecordKind.LEAF, payload_bytes=50)
    assert any(buffer is payload for buffer in sink.buffers)
    assert any(buffer is run for buffer in sink.buffers)


def test_pack_bytes_counts_what_was_appended() -> None:
    sink, writer = on_sink()
    assert writer.pack_bytes == 0
    for length in (1, 8, 1000):
        writer.append(HASHER.chunk_id(b"x"), bytes(length), kind=RecordKind.LEAF, raw_bytes=length, chain=())
        assert writer.pack_bytes == sum(map(len, sink.buffers))
    assert writer.seal().pack_bytes == writer.pack_bytes == sum(map(len, sink.buffers))
    assert sink.ended == "commit"


def test_write_back_is_asked_for_every_so_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "_FLUSH_BYTES", 1000)
    sink, writer = on_sink()
    for _ in range(10):
        writer.append(HASHER.chunk_id(b"x"), bytes(300), kind=RecordKind.LEAF, raw_bytes=300, chain=())
    assert len(sink.hints) == 3
    assert all(after - before >= 1000 for before, after in zip([0, *sink.hints], sink.hints, strict=False))


def test_the_chunks_of_a_run_are_read_twice_and_one_at_a_time() -> None:
    _, writer = on_sink()
    reads: list[int] = []

    def read(index: int) -> bytes:
        reads.append(index)
        return bytes(GRID_BYTES)

    chunks = [(HASHER.chunk_id(b"x"), lambda index=index: read(index)) for index in range(3)]
    writer.append_run(chunks, kind=RecordKind.LEAF, payload_bytes=3 * GRID_BYTES)
    assert reads == [0, 1, 2, 0, 1, 2]
