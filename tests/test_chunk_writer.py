"""Chunks are encoded by threads, written in order, and seen only when all of them are durable."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from castore import chunk_writer as module
from castore.backend import MemoryBackend
from castore.backend.base import Backend, PackSink
from castore.chunk_writer import BaseSource, ChunkWriter
from castore.codec.base import PLAIN, Elements
from castore.errors import ChecksumError, CodecError, NoSpaceError
from castore.format.layout import pack_name
from castore.format.pack import RecordKind
from castore.ids import Buffer, ChunkId
from castore.index import MemoryIndex
from castore.options import DELTA_DEPTH_MAX, ENCODE_AHEAD_CHUNKS, GRID_BYTES, Compression
from castore.pack.reader import read_header, read_table
from castore.store import ChunkStore, list_packs
from castore.threads import worker_count
from tests.suites.packs import CREATED_NS, HASHER, REPOSITORY_ID


def new_writer(backend: Backend, compression: Compression = "auto") -> ChunkWriter:
    return ChunkWriter(backend, HASHER, REPOSITORY_ID, compression=compression, now_ns=CREATED_NS)


def put(writer: ChunkWriter, raw: bytes, read: Callable[[], Buffer] | None = None) -> None:
    writer.put(
        HASHER.chunk_id(raw),
        read or (lambda: raw),
        raw_bytes=len(raw),
        elements=Elements(4, is_float=True),
        kind=RecordKind.LEAF,
    )


def chunk(number: int, length: int = 1000) -> bytes:
    return number.to_bytes(4, "little") * (length // 4)


def encode_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("castore-encode")]


@pytest.fixture(autouse=True)
def no_thread_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that passes has ended what it began."""
    failed = request.session.testsfailed
    yield
    assert request.session.testsfailed > failed or encode_threads() == []


# ---- finish ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["auto", "lz4", "none"])
def test_what_was_put_is_in_a_pack_and_can_be_read(compression: Compression) -> None:
    backend = MemoryBackend()
    writer = new_writer(backend, compression)
    chunks = [chunk(number, 10 * number) for number in range(1, 50)]
    for raw in chunks:
        put(writer, raw)
    (sealed,) = writer.finish()
    reader = backend.open_reader(pack_name(sealed.pack_id))
    header = read_header(reader, where="x", expected_id=sealed.pack_id)
    assert (header.repository_id, header.created_ns) == (REPOSITORY_ID, CREATED_NS)
    assert read_table(reader, where="x", expected_id=sealed.pack_id, hasher=HASHER) == list(sealed.rows)
    store = ChunkStore(backend, MemoryIndex(), HASHER)
    assert all(store.get(HASHER.chunk_id(raw)) == raw for raw in chunks)


def test_nothing_is_written_when_nothing_was_put() -> None:
    backend = MemoryBackend()
    assert new_writer(backend).finish() == []
    assert list(backend.list("")) == []


def test_nothing_is_seen_before_finish() -> None:
    backend = MemoryBackend()
    writer = new_writer(backend)
    for number in range(3 * ENCODE_AHEAD_CHUNKS):
        put(writer, chunk(number))
    assert list(backend.list("")) == []
    assert len(writer.finish()) == 1
    assert len(list(backend.list(""))) == 1


def test_records_stand_in_the_order_in_which_they_were_put() -> None:
    backend = MemoryBackend()
    writer = new_writer(backend)
    chunks = [chunk(number) for number in range(60)]

    def slowly(raw: bytes, seconds: float) -> Callable[[], bytes]:
        def read() -> bytes:
            time.sleep(seconds)
            return raw

        return read

    for number, raw in enumerate(chunks):
        put(writer, raw, slowly(raw, 0.01 if number % 7 == 0 else 0))
    (sealed,) = writer.finish()
    assert [row.chunk_id for row in sealed.rows] == [HASHER.chunk_id(raw) for raw in chunks]
    offsets = [row.offset for row in sealed.rows]
    assert offsets == sorted(offsets)


def test_kinds_and_lengths_are_kept() -> None:
    backend = MemoryBackend()
    writer = new_writer(backend)
    put(writer, bytes(1000))
    writer.put_bytes(HASHER.chunk_id(b"part" * 100), b"part" * 100, kind=RecordKind.PART, elements=PLAIN)
    writer.put_bytes(HASHER.chunk_id(b"\x91" * 48), b"\x91" * 48, kind=RecordKind.ID_LIST, elements=PLAIN)
    rows = writer.finish()[0].rows
    assert [(row.kind, row.raw_bytes) for row in rows] == [
        (RecordKind.LEAF, 1000),
        (RecordKind.PART, 400),
        (RecordKind.ID_LIST, 48),
    ]
    assert [row.chain for row in rows] == [(4,), (4,), (4,)]


def test_a_run_stands_between_the_records_put_before_and_after() -> None:
    backend = MemoryBackend()
    writer = new_writer(backend, "none")
    first, last = b"first" * 10, b"last" * 10
    run = [b"a" * GRID_BYTES, b"b" * 100]
    put(writer, first)
    pairs = [(HASHER.chunk_id(raw), lambda raw=raw: raw) for raw in run]
    writer.put_run(pairs, kind=RecordKind.LEAF, payload_bytes=GRID_BYTES + 100)
    put(writer, last)
    (sealed,) = writer.finish()
    assert [row.chunk_id for row in sealed.rows] == [HASHER.chunk_id(raw) for raw in (first, *run, last)]
    assert [row.in_run for row in sealed.rows] == [False, True, True, False]
    store = ChunkStore(backend, MemoryIndex(), HASHER)
    assert store.get(HASHER.chunk_id(run[1])) == run[1]


# ---- bases -----------------------------------------------------------------------------------------------


def floats(seed: int) -> bytes:
    return np.random.default_rng(seed).standard_normal(5000).astype("<f4").tobytes()


def stepped(raw: bytes) -> bytes:
    return (np.frombuffer(raw, "<f4") * np.float32(1.0001)).tobytes()


def put_on(writer: ChunkWriter, raw: bytes, base: BaseSource) -> None:
    writer.put(
        HASHER.chunk_id(raw),
        lambda: raw,
        raw_bytes=len(raw),
        elements=Elements(4, is_float=True),
        kind=RecordKind.LEAF,
        base=base,
    )


def source(raw: bytes, depth: int = 0) -> BaseSource:
    return BaseSource(HASHER.chunk_id(raw), depth, lambda: raw)


def test_a_chunk_may_rest_on_a_base_and_its_record_says_so() -> None:
    backend = MemoryBackend()
    writer = new_writer(backend)
    first = floats(1)
    second = stepped(first)
    third = stepped(second)
    put(writer, first)
    put_on(writer, second, source(first))
    put_on(writer, third, source(second, depth=1))
    rows = writer.finish()[0].rows
    assert [row.depth for row in rows] == [0, 1, 2]
    assert [row.base_ids for row in rows] == [(), (HASHER.chunk_id(first),), (HASHER.chunk_id(second),)]
    assert [row.chain for row in rows] == [(3,), (16,), (16,)]
    assert rows[1].stored_bytes < rows[0].stored_bytes / 2
    store = ChunkStore(backend, MemoryIndex(), HASHER)
    assert [store.get(HASHER.chunk_id(raw)) for raw in (third, second, first)] == [third, second, first]


def test_a_base_that_does_not_help_is_not_named() -> None:
    writer = new_writer(MemoryBackend())
    put_on(writer, floats(1), source(floats(2)))
    (row,) = writer.finish()[0].rows
    assert (row.chain, row.depth, row.base_ids) == ((3,), 0, ())


def test_a_damaged_base_is_done_without() -> None:
    def read() -> bytes:
        raise ChecksumError("the base is damaged")

    backend = MemoryBackend()
    writer = new_writer(backend)
    first = floats(1)
    put_on(writer, stepped(first), BaseSource(HASHER.chunk_id(first), 0, read))
    (row,) = writer.finish()[0].rows
    assert row.base_ids == ()


def test_chunks_that_others_may_rest_on_are_handed_on() -> None:
    kept: dict[ChunkId, bytes] = {}
    writer = ChunkWriter(
        MemoryBackend(),
        HASHER,
        REPOSITORY_ID,
        compression="auto",
        now_ns=CREATED_NS,
        keep_base=lambda chunk_id, raw, _: kept.update({chunk_id: bytes(raw)}),
    )
    first = floats(1)
    deep = stepped(first)
    put(writer, first)
    put_on(writer, deep, source(first, depth=DELTA_DEPTH_MAX - 1))
    writer.put_bytes(HASHER.chunk_id(b"part" * 100), b"part" * 100, kind=RecordKind.PART, elements=PLAIN)
    writer.finish()
    assert kept == {HASHER.chunk_id(first): first}


# ---- rotation ----------------------------------------------------------------------------------------------


def test_a_pack_is_sealed_when_it_is_large_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PACK_BYTES_MAX", 10_000)
    backend = MemoryBackend()
    writer = new_writer(backend, "none")
    chunks = [chunk(number, 3000) for number in range(10)]
    for raw in chunks:
        put(writer, raw)
    sealed = writer.finish()
    assert [len(pack.rows) for pack in sealed] == [4, 4, 2]
    assert [row.chunk_id for pack in sealed for row in pack.rows] == [HASHER.chunk_id(raw) for raw in chunks]
    assert list_packs(backend) == {pack.pack_id for pack in sealed}
    assert len({pack.pack_id for pack in sealed}) == 3
    for pack in sealed:
        size = backend.stat(pack_name(pack.pack_id))
        assert size is not None
        assert size.size_bytes == pack.pack_bytes
    store = ChunkStore(backend, MemoryIndex(), HASHER)
    assert all(store.get(HASHER.chunk_id(raw)) == raw for raw in chunks)


def test_a_long_run_is_not_torn_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PACK_BYTES_MAX", 10_000)
    backend = MemoryBackend()
    writer = new_writer(backend, "none")
    raw = [b"a" * GRID_BYTES, b"b" * GRID_BYTES]
    pairs = [(HASHER.chunk_id(one), lambda one=one: one) for one in raw]
    writer.put_run(pairs, kind=RecordKind.LEAF, payload_bytes=2 * GRID_BYTES)
    put(writer, b"next" * 10)
    assert [len(pack.rows) for pack in writer.finish()] == [2, 1]


# ---- abort -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, ENCODE_AHEAD_CHUNKS, 3 * ENCODE_AHEAD_CHUNKS])
def test_abort_leaves_nothing(count: int) -> None:
    backend = MemoryBackend()
    writer = new_writer(backend)
    for number in range(count):
        put(writer, chunk(number))
    writer.abort()
    writer.abort()
    assert list(backend.list("")) == []
    assert encode_threads() == []


def test_abort_after_finish_is_harmless() -> None:
    backend = MemoryBackend()
    writer = new_writer(backend)
    put(writer, chunk(1))
    sealed = writer.finish()
    writer.abort()
    assert list_packs(backend) == {pack.pack_id for pack in sealed}


def test_abort_does_not_encode_what_is_still_waiting() -> None:
    writer = new_writer(MemoryBackend())
    gate, reads = threading.Event(), []

    def read(number: int) -> bytes:
        gate.wait(20)
        reads.append(number)
        return chunk(number)

    for number in range(ENCODE_AHEAD_CHUNKS):
        put(writer, chunk(number), lambda number=number: read(number))
    threading.Timer(0.05, gate.set).start()
    writer.abort()
    assert len(reads) <= worker_count()


def test_packs_that_were_sealed_by_rotation_stay_as_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PACK_BYTES_MAX", 2000)
    monkeypatch.setattr(module, "_BATCH_BYTES", 1)
    monkeypatch.setattr(module, "_THREAD_BYTES_MIN", 1)
    backend = MemoryBackend()
    writer = new_writer(backend, "none")
    for number in range(ENCODE_AHEAD_CHUNKS + 4):
        put(writer, chunk(number))
    writer.abort()
    assert len(list_packs(backend)) == 2


# ---- errors ------------------------------------------------------------------------------------------------


class ReadError(Exception):
    pass


def failing() -> bytes:
    raise ReadError


@pytest.mark.parametrize("position", [0, 1, ENCODE_AHEAD_CHUNKS, 2 * ENCODE_AHEAD_CHUNKS + 1])
def test_an_error_in_an_encoding_thread_surfaces_and_abort_leaves_nothing(position: int) -> None:
    backend = MemoryBackend()
    writer = new_writer(backend)

    def save() -> None:
        for number in range(3 * ENCODE_AHEAD_CHUNKS):
            put(writer, chunk(number), failing if number == position else None)
        writer.finish()

    with pytest.raises(ReadError):
        save()
    writer.abort()
    assert list(backend.list("")) == []


def test_a_state_that_changes_while_it_is_saved_is_noticed() -> None:
    backend = MemoryBackend()
    writer = new_writer(backend)
    state = bytearray(b"\x01\x02\x03\x04" * 10_000)
    put(writer, bytes(state), lambda: state)
    writer.abort()
    writer = new_writer(backend)
    chunk_id = HASHER.chunk_id(state)
    state[12_345] ^= 1
    writer.put(chunk_id, lambda: state, raw_bytes=len(state), elements=Elements(4), kind=RecordKind.LEAF)
    with pytest.raises(CodecError, match=rf"does not decode to chunk {chunk_id.hex()}; was the state changed"):
        writer.finish()
    writer.abort()
    assert list(backend.list("")) == []


@pytest.mark.parametrize("compression", ["auto", "none"])
def test_raw_bytes_that_change_before_they_are_written_are_noticed(compression: Compression) -> None:
    # Raw chunks are written from the state's own memory, so the record would name bytes that it does not hold.
    backend = MemoryBackend()
    writer = new_writer(backend, compression)
    state = bytearray(random.Random(1).randbytes(5000))
    chunk_id = HASHER.chunk_id(state)
    writer.put(chunk_id, lambda: state, raw_bytes=5000, elements=PLAIN, kind=RecordKind.LEAF)
    state[100] ^= 1
    with pytest.raises(CodecError, match=f"chunk {chunk_id.hex()}: its bytes changed|does not decode"):
        writer.finish()
    writer.abort()
    assert list(backend.list("")) == []


def test_a_run_that_changes_before_it_is_written_is_noticed() -> None:
    backend = MemoryBackend()
    writer = new_writer(backend, "none")
    state = bytearray(b"ab" * 5000)
    pair = (HASHER.chunk_id(state), lambda: state)
    state[100] ^= 1
    with pytest.raises(CodecError, match="its bytes changed between hashing and writing"):
        writer.put_run([pair], kind=RecordKind.LEAF, payload_bytes=10_000)
    writer.abort()
    assert list(backend.list("")) == []


class FullBackend(MemoryBackend):
    """A disk with room for so many bytes."""

    def __init__(self, room_bytes: int) -> None:
        super().__init__()
        self.room_bytes = room_bytes
        self.aborted: list[str] = []

    def create_stream(self, name: str) -> PackSink:
        inner, outer = super().create_stream(name), self

        class Sink:
            flush_hint = inner.flush_hint
            commit = inner.commit

            def write(self, *buffers: Buffer) -> None:
                outer.room_bytes -= sum(map(len, buffers))
                if outer.room_bytes < 0:
                    raise NoSpaceError(f"{name}: cannot write: no space left")
                inner.write(*buffers)

            def abort(self) -> None:
                outer.aborted.append(name)
                inner.abort()

        return Sink()


@pytest.mark.parametrize("room_bytes", [0, 63, 64, 5000, 20_000])
def test_a_full_disk_is_an_error_and_leaves_nothing(room_bytes: int) -> None:
    backend = FullBackend(room_bytes)
    writer = new_writer(backend, "none")

    def save() -> None:
        for number in range(40):
            put(writer, chunk(number))
        writer.finish()

    with pytest.raises(NoSpaceError):
        save()
    writer.abort()
    assert list(backend.list("")) == []
    assert len(backend.aborted) == 1


def test_small_chunks_are_encoded_where_they_are_put() -> None:
    """A second thread would only wait for the interpreter; large ones have threads of their own."""
    writer = new_writer(MemoryBackend())
    threads: dict[int, set[str]] = {}

    def read(length: int) -> bytes:
        threads.setdefault(length, set()).add(threading.current_thread().name)
        return chunk(length, length)

    for length in (GRID_BYTES, GRID_BYTES, *[4000] * 200):
        put(writer, chunk(length, length), lambda length=length: read(length))
    writer.finish()
    assert threads[4000] == {threading.current_thread().name}
    assert all(name.startswith("castore-encode") for name in threads[GRID_BYTES])


# ---- bounds ------------------------------------------------------------------------------------------------


def test_put_blocks_while_the_queue_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BATCH_BYTES", 1)
    monkeypatch.setattr(module, "_THREAD_BYTES_MIN", 1)
    writer = new_writer(MemoryBackend())
    gate, accepted = threading.Event(), []

    def read(number: int) -> bytes:
        gate.wait(20)
        return chunk(number)

    def save() -> None:
        for number in range(ENCODE_AHEAD_CHUNKS + 5):
            put(writer, chunk(number), lambda number=number: read(number))
            accepted.append(number)
        writer.finish()

    saving = threading.Thread(target=save)
    saving.start()
    deadline = time.monotonic() + 20
    while len(accepted) < ENCODE_AHEAD_CHUNKS and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    assert len(accepted) == ENCODE_AHEAD_CHUNKS
    gate.set()
    saving.join(20)
    assert len(accepted) == ENCODE_AHEAD_CHUNKS + 5
