"""The store finds chunks in packs, trusts no index, and hands out no byte that it has not verified."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from castore.backend import LocalBackend, MemoryBackend
from castore.backend.base import Backend, RangeReader
from castore.codec.base import Elements
from castore.codec.chooser import encode_chunk
from castore.codec.registry import DERIVED
from castore.errors import (
    ChecksumError,
    ChunkMissingError,
    CodecError,
    DamageError,
    NotFoundError,
    StorageError,
    UnsupportedFormatError,
)
from castore.format.layout import pack_name
from castore.format.pack import RecordKind, Row
from castore.hashing import hasher_for
from castore.ids import ChunkId, PackId
from castore.index import Location, MemoryIndex
from castore.store import ChunkStore, check_stored, list_packs
from tests.suites.packs import HASHER, flip, ids_of, new_writer, pack_id, rewrite, write_pack

RNG = random.Random(1)
CHUNKS = [RNG.randbytes(length) for length in (10, 500, 3000)] + [bytes(5000), b"text " * 500]
IDS = ids_of(CHUNKS)
ONE = CHUNKS[1]
ID = IDS[1]


def open_store(backend: Backend, index: MemoryIndex | None = None) -> ChunkStore:
    return ChunkStore(backend, index or MemoryIndex(), HASHER)


def read(store: ChunkStore, chunk_id: ChunkId = ID, *, raw_bytes: int = len(ONE), verify: bool = True) -> bytes:
    out = bytearray(raw_bytes)
    store.read_into(chunk_id, store.locate([chunk_id])[chunk_id], memoryview(out), verify=verify)
    return bytes(out)


def two_packs() -> MemoryBackend:
    """The chunk in packs 1 and 2."""
    backend = MemoryBackend()
    write_pack(backend, CHUNKS, number=1)
    write_pack(backend, CHUNKS[::-1], number=2)
    return backend


def payload_at(backend: Backend, number: int, chunk_id: ChunkId = ID) -> int:
    """Where the stored bytes of a chunk begin in a pack."""
    (location,) = (hit for hit in open_store(backend).locate([chunk_id])[chunk_id] if hit.pack_id == pack_id(number))
    return location.row.offset


# ---- look-up -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["xxh3-128", "blake3"])
@pytest.mark.parametrize("compression", ["auto", "lz4", "none"])
def test_what_packs_hold_is_found_and_read(name: str, compression: str) -> None:
    hasher, backend = hasher_for(name), MemoryBackend()
    write_pack(backend, CHUNKS, hasher=hasher, compression=compression, elements=Elements(4))
    store = ChunkStore(backend, MemoryIndex(), hasher)
    for raw in CHUNKS:
        assert store.get(hasher.chunk_id(raw)) == raw


def test_look_ups_are_parallel_to_the_ids_and_misses_are_empty() -> None:
    backend = MemoryBackend()
    write_pack(backend, CHUNKS)
    store = open_store(backend)
    missing = HASHER.chunk_id(b"missing")
    found = store.find([IDS[2], missing, IDS[0], IDS[2]])
    assert [len(hits) for hits in found] == [1, 0, 1, 1]
    assert found[0] == found[3]
    assert store.locate([missing, ID])[missing] == ()
    assert store.find([]) == []


def test_every_place_of_a_chunk_is_found() -> None:
    hits = open_store(two_packs()).locate([ID])[ID]
    assert sorted(hit.pack_id for hit in hits) == [pack_id(1), pack_id(2)]


def test_the_first_look_lists_the_packs_and_a_miss_lists_them_again() -> None:
    backend = MemoryBackend()
    write_pack(backend, CHUNKS[:1], number=1)
    store = open_store(backend)
    assert store.find([IDS[0]])[0]
    write_pack(backend, CHUNKS[1:2], number=2)
    assert store.find([ID]) == [()], "another process wrote it after the listing"
    assert len(store.locate([ID])[ID]) == 1
    assert store.refresh() == {pack_id(1), pack_id(2)}


def test_a_location_counts_only_while_its_pack_stands_in_the_listing() -> None:
    backend, index = two_packs(), MemoryIndex()
    store = open_store(backend, index)
    store.refresh()
    backend.delete(pack_name(pack_id(1)))
    assert store.refresh() == {pack_id(2)}
    assert index.packs() == {pack_id(2)}
    assert [hit.pack_id for hit in store.find([ID])[0]] == [pack_id(2)]


def test_an_index_that_runs_ahead_of_the_packs_is_not_believed() -> None:
    backend, index = MemoryBackend(), MemoryIndex()
    write_pack(backend, CHUNKS[:1], number=1)
    index.add({pack_id(9): [Row(ID, 128, 500, 500, 0, (), RecordKind.LEAF)]})
    store = open_store(backend, index)
    assert store.find([ID]) == [()]
    with pytest.raises(ChunkMissingError):
        store.get(ID)


def test_a_location_that_another_process_adds_counts_from_the_next_listing_on() -> None:
    backend, index = MemoryBackend(), MemoryIndex()
    write_pack(backend, CHUNKS[:1], number=1)
    store = open_store(backend, index)
    store.refresh()
    sealed = write_pack(backend, CHUNKS, number=2)
    index.add({sealed.pack_id: sealed.rows})
    assert store.find([ID]) == [()]
    store.refresh()
    assert len(store.find([ID])[0]) == 1


def test_a_pack_sealed_by_this_process_needs_no_listing() -> None:
    backend = MemoryBackend()
    store = open_store(backend)
    assert store.refresh() == frozenset()
    sealed = write_pack(backend, CHUNKS)
    store.add({sealed.pack_id: sealed.rows})
    assert len(store.find([ID])[0]) == 1
    assert store.get(ID) == ONE


def test_a_pack_added_before_the_first_listing_is_found() -> None:
    backend = MemoryBackend()
    store = open_store(backend)
    sealed = write_pack(backend, CHUNKS)
    store.add({sealed.pack_id: sealed.rows})
    assert store.get(ID) == ONE


def test_rebuild_makes_the_index_from_the_packs() -> None:
    backend, index = two_packs(), MemoryIndex()
    store = open_store(backend, index)
    store.refresh()
    index.clear()
    index.add({pack_id(1): []})
    assert len(store.find([ID])[0]) == 0
    assert store.rebuild() == 2
    assert len(store.find([ID])[0]) == 2


def test_a_rebuild_commits_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("castore.store._INDEX_BATCH_ROWS", 2)
    batches: list[int] = []

    class Noting(MemoryIndex):
        def add(self, tables: Mapping[PackId, Sequence[Row]]) -> None:
            batches.append(sum(map(len, tables.values())))
            super().add(tables)

    backend = MemoryBackend()
    for number in range(1, 6):
        write_pack(backend, [b"%d" % number], number=number)
    open_store(backend, Noting()).refresh()
    assert batches == [2, 2, 1]


def test_files_that_are_no_packs_are_passed_over() -> None:
    backend = MemoryBackend()
    write_pack(backend, CHUNKS)
    for name in ("packs/README", f"packs/ff/{pack_id(3)}.pack", "packs/00/x.pack"):
        backend.put_if_absent(name, b"")
    assert list_packs(backend) == {pack_id(1)}
    assert open_store(backend).get(ID) == ONE


# ---- several locations -------------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", [True, False])
def test_a_damaged_place_is_passed_over_for_another(verify: bool) -> None:
    for number in (1, 2):
        backend = two_packs()
        rewrite(backend, pack_name(pack_id(number)), flip(payload_at(backend, number) + 7))
        assert read(open_store(backend), verify=verify) == ONE


def test_when_all_places_are_damaged_the_damage_is_named() -> None:
    backend = two_packs()
    for number in (1, 2):
        rewrite(backend, pack_name(pack_id(number)), flip(payload_at(backend, number)))
    for verify in (True, False):
        with pytest.raises(ChecksumError, match=f"pack {pack_id(2)}, record of chunk {ID.hex()} at"):
            read(open_store(backend), verify=verify)


def test_every_flipped_byte_of_a_payload_is_seen() -> None:
    backend = MemoryBackend()
    sealed = write_pack(backend, [CHUNKS[4]], compression="auto")
    (row,) = sealed.rows
    assert row.chain != ()
    data = backend.read(pack_name(pack_id(1)), max_bytes=1 << 20)
    for position in range(row.offset, row.offset + row.stored_bytes):
        damaged = MemoryBackend()
        changed = bytearray(data)
        changed[position] ^= 1
        damaged.put_if_absent(pack_name(pack_id(1)), changed)
        with pytest.raises(ChecksumError, match="stored bytes, found"):
            open_store(damaged).get(row.chunk_id)


def test_a_pack_cut_in_a_payload_is_a_typed_error() -> None:
    backend = MemoryBackend()
    write_pack(backend, [ONE])
    store = open_store(backend)
    store.refresh()
    rewrite(backend, pack_name(pack_id(1)), lambda data: data.__delitem__(slice(300, None)))
    with pytest.raises(DamageError, match="truncated"):
        read(store)


def test_a_codec_of_a_newer_castore_is_passed_over_for_another_place() -> None:
    backend = MemoryBackend()
    writer = new_writer(backend, 1)
    writer.append(ID, b"??", kind=RecordKind.LEAF, raw_bytes=len(ONE), chain=(99,))
    writer.seal()
    with pytest.raises(UnsupportedFormatError, match="codec 99 is unknown"):
        read(open_store(backend))
    write_pack(backend, [ONE], number=2)
    assert read(open_store(backend)) == ONE


def test_a_record_that_does_not_decode_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = MemoryBackend()
    writer = new_writer(backend, 1)
    writer.append(ID, b"no zstd", kind=RecordKind.LEAF, raw_bytes=len(ONE), chain=(2,))
    writer.seal()
    with pytest.raises(CodecError, match=f"pack {pack_id(1)}, record of chunk {ID.hex()} at 128: zstd"):
        read(open_store(backend))


def test_a_record_of_other_bytes_with_the_right_checksum_is_seen_by_its_id() -> None:
    backend = MemoryBackend()
    writer = new_writer(backend, 1)
    writer.append(ID, bytes(len(ONE)), kind=RecordKind.LEAF, raw_bytes=len(ONE), chain=())
    writer.seal()
    with pytest.raises(ChecksumError, match="expected these bytes to hash to the chunk's id"):
        read(open_store(backend))
    assert read(open_store(backend), verify=False) == bytes(len(ONE)), "verify=False trusts the checksum"


def test_a_length_that_the_manifest_does_not_expect_is_refused_before_a_byte_is_read() -> None:
    backend = MemoryBackend()
    write_pack(backend, CHUNKS)
    for raw_bytes in (0, len(ONE) - 1, len(ONE) + 1):
        with pytest.raises(ChecksumError, match=f"expected {raw_bytes} raw bytes, found {len(ONE)} declared"):
            read(open_store(backend), raw_bytes=raw_bytes)


def test_a_disk_that_refuses_one_place_is_passed_over() -> None:
    class Refusing(MemoryBackend):
        refuse = ""

        def open_reader(self, name: str) -> RangeReader:
            if name == self.refuse:
                raise StorageError(f"{name}: cannot read: Input/output error")
            return super().open_reader(name)

    backend = Refusing()
    for number in (1, 2):
        write_pack(backend, [ONE], number=number)
    store = open_store(backend)
    store.refresh()
    backend.refuse = pack_name(pack_id(1))
    assert read(store) == ONE


# ---- bases -------------------------------------------------------------------------------------------------

BASE = np.random.default_rng(1).standard_normal(5000).astype("<f4").tobytes()
DELTA = (np.frombuffer(BASE, "<f4") * np.float32(1.0001)).tobytes()
SECOND = (np.frombuffer(DELTA, "<f4") * np.float32(1.0001)).tobytes()
FLOAT = Elements(4, is_float=True)


def write_delta(
    backend: Backend, raw: bytes, base: bytes, *, depth: int, number: int, base_id: ChunkId | None = None
) -> Row:
    """A pack with one record that rests on a base."""
    chunk_id = HASHER.chunk_id(raw)
    encoded = encode_chunk(raw, FLOAT, "auto", chunk_id=chunk_id, hasher=HASHER, base=base)
    assert encoded.rests_on_base
    writer = new_writer(backend, number)
    row = writer.append(
        chunk_id,
        encoded.payload,
        kind=RecordKind.LEAF,
        raw_bytes=len(raw),
        chain=encoded.chain,
        base_ids=(base_id or HASHER.chunk_id(base),),
        depth=depth,
    )
    writer.seal()
    return row


def delta_packs() -> MemoryBackend:
    """The base in packs 1 and 2, a difference in 3, a difference from that in 4."""
    backend = MemoryBackend()
    write_pack(backend, [BASE], number=1, compression="auto", elements=FLOAT)
    write_pack(backend, [BASE], number=2)
    write_delta(backend, DELTA, BASE, depth=1, number=3)
    write_delta(backend, SECOND, DELTA, depth=2, number=4)
    return backend


@pytest.mark.parametrize("verify", [True, False])
def test_chunks_that_rest_on_others_are_read_with_them(verify: bool) -> None:
    store = open_store(delta_packs())
    for raw in (SECOND, DELTA, BASE, SECOND):
        assert read(store, HASHER.chunk_id(raw), raw_bytes=len(raw), verify=verify) == raw


@pytest.mark.parametrize("verify", [True, False])
def test_a_damaged_base_is_passed_over_for_another_place(verify: bool) -> None:
    for number in (1, 2):
        backend = delta_packs()
        rewrite(backend, pack_name(pack_id(number)), flip(payload_at(backend, number, HASHER.chunk_id(BASE)) + 5))
        found = read(open_store(backend), HASHER.chunk_id(SECOND), raw_bytes=len(SECOND), verify=verify)
        assert found == SECOND


def test_a_rotten_base_is_named() -> None:
    backend = delta_packs()
    for number in (1, 2):
        rewrite(backend, pack_name(pack_id(number)), flip(payload_at(backend, number, HASHER.chunk_id(BASE)) + 5))
    with pytest.raises(
        ChecksumError, match=rf"chunk {HASHER.chunk_id(DELTA).hex()} at .*: its delta base \w+ cannot be read"
    ):
        open_store(backend).get(HASHER.chunk_id(SECOND))


def test_a_missing_base_is_named() -> None:
    backend = delta_packs()
    collect(backend, 1, 2)
    with pytest.raises(
        ChunkMissingError, match=rf"its delta base \w+ cannot be read: chunk {HASHER.chunk_id(BASE).hex()}"
    ):
        open_store(backend).get(HASHER.chunk_id(DELTA))


def test_a_base_that_moved_is_looked_up_again() -> None:
    backend = delta_packs()
    store = open_store(backend)
    locations = store.locate([HASHER.chunk_id(SECOND)])[HASHER.chunk_id(SECOND)]
    write_pack(backend, [BASE, DELTA], number=9)
    collect(backend, 1, 2, 3)
    out = bytearray(len(SECOND))
    store.read_into(HASHER.chunk_id(SECOND), locations, memoryview(out))
    assert out == SECOND


def test_a_base_that_was_looked_up_ahead_and_has_moved_since_is_read_where_it_is_now() -> None:
    """A process verifies, then collects: its own sweep moves the bases that were looked up before."""
    backend = delta_packs()
    store = open_store(backend)
    (location,) = store.locate([HASHER.chunk_id(SECOND)])[HASHER.chunk_id(SECOND)]
    store.note_bases([(location,)])
    store.add({pack_id(9): write_pack(backend, [DELTA], number=9).rows})
    store.forget([pack_id(3)])
    collect(backend, 3)
    assert store.read_base(location.row, where="here", verify=True) == DELTA


def test_a_base_that_was_looked_up_ahead_and_has_rotted_is_read_elsewhere() -> None:
    backend = delta_packs()
    store = open_store(backend)
    (location,) = store.locate([HASHER.chunk_id(SECOND)])[HASHER.chunk_id(SECOND)]
    store.note_bases([(location,)])
    store.add({pack_id(9): write_pack(backend, [DELTA], number=9).rows})
    rewrite(backend, pack_name(pack_id(3)), flip(payload_at(backend, 3, HASHER.chunk_id(DELTA)) + 5))
    assert store.read_base(location.row, where="here", verify=True) == DELTA


def test_rows_of_records_with_two_bases_each_are_refused_before_they_are_read() -> None:
    """Each level doubles what is read: sixteen of them, a few kilobytes, would keep a reader busy for an hour."""
    backend, raw = MemoryBackend(), bytes(range(256)) * 4096
    ids = [HASHER.chunk_id(raw), *(HASHER.chunk_id(bytes([level])) for level in range(16))]
    writer = new_writer(backend, 1)
    writer.append(ids[0], raw, kind=RecordKind.LEAF, raw_bytes=len(raw), chain=())
    for depth, (below, chunk_id) in enumerate(pairwise(ids), 1):
        writer.append(
            chunk_id,
            b"\1",
            kind=RecordKind.LEAF,
            raw_bytes=len(raw),
            chain=(DERIVED,),
            base_ids=(below, below),
            depth=depth,
        )
    writer.seal()
    with pytest.raises(DamageError, match="at a depth of at most 8"):
        open_store(backend).get(ids[-1])


def test_records_that_rest_on_each_other_end_in_an_error() -> None:
    # Two writers stored each chunk as a difference from the other: a depth must grow, so no circle is followed.
    backend = MemoryBackend()
    write_delta(backend, DELTA, BASE, depth=1, number=1)
    write_delta(backend, BASE, DELTA, depth=1, number=2)
    store = open_store(backend)
    for raw in (DELTA, BASE):
        with pytest.raises(ChunkMissingError, match=r"its delta base \w+ cannot be read"):
            store.get(HASHER.chunk_id(raw))
    write_pack(backend, [BASE], number=3)
    for raw in (DELTA, BASE):
        assert store.rebuild() == 3
        assert store.get(HASHER.chunk_id(raw)) == raw


def test_a_difference_from_other_bytes_than_it_names_is_seen() -> None:
    backend = MemoryBackend()
    write_pack(backend, [BASE, SECOND], number=1)
    write_delta(backend, DELTA, BASE, depth=1, number=2, base_id=HASHER.chunk_id(SECOND))
    with pytest.raises(ChecksumError, match="hash to the chunk's id"):
        open_store(backend).get(HASHER.chunk_id(DELTA))


def test_threads_read_differences_at_once() -> None:
    store = open_store(delta_packs())

    def work(number: int) -> int:
        order = [(SECOND, DELTA, BASE)[(number + step) % 3] for step in range(5)]
        return sum(store.get(HASHER.chunk_id(raw)) != raw for raw in order * 10)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [0, 0, 0, 0]


# ---- packs that go -----------------------------------------------------------------------------------------


def collect(backend: Backend, *numbers: int, into: int | None = None) -> None:
    """What gc does: copy the live chunk to a new pack, then delete."""
    if into is not None:
        write_pack(backend, [ONE], number=into)
    for number in numbers:
        backend.delete(pack_name(pack_id(number)))


def read_stale(backend: Backend, change: Callable[[], object]) -> bytes:
    """Look up, let something happen, then read with the old locations."""
    store = open_store(backend)
    locations = store.locate([ID])[ID]
    change()
    out = bytearray(len(ONE))
    store.read_into(ID, locations, memoryview(out))
    return bytes(out)


def test_a_pack_that_vanished_after_the_look_up_leads_to_a_second_one() -> None:
    backend = MemoryBackend()
    write_pack(backend, CHUNKS, number=1)
    assert read_stale(backend, lambda: collect(backend, 1, into=3)) == ONE


def test_a_pack_that_vanished_beside_a_damaged_one_leads_to_a_second_look_up_too() -> None:
    # Guards against the damage of the last place tried hiding that the first had moved.
    for gone, damaged in ((1, 2), (2, 1)):
        backend = two_packs()
        position = payload_at(backend, damaged)
        rewrite(backend, pack_name(pack_id(damaged)), flip(position))
        assert read_stale(backend, lambda gone=gone, backend=backend: collect(backend, gone, into=3)) == ONE


def test_a_chunk_that_was_collected_is_missing() -> None:
    backend = two_packs()
    with pytest.raises(ChunkMissingError, match=f"chunk {ID.hex()}: no pack of memory: holds it"):
        read_stale(backend, lambda: collect(backend, 1, 2))


def test_an_open_pack_stays_readable_after_it_was_deleted(tmp_path: Path) -> None:
    backend = LocalBackend(tmp_path)
    write_pack(backend, CHUNKS)
    store = open_store(backend)
    assert store.get(IDS[2]) == CHUNKS[2]
    backend.delete(pack_name(pack_id(1)))
    assert read(store) == ONE


def test_a_pack_that_goes_between_listing_and_reading_its_table_is_left_out() -> None:
    class Vanishing(MemoryBackend):
        def open_reader(self, name: str) -> RangeReader:
            self.delete(pack_name(pack_id(1)))
            return super().open_reader(name)

    backend = Vanishing()
    write_pack(backend, CHUNKS, number=1)
    write_pack(backend, [ONE], number=2)
    store = open_store(backend)
    assert [hit.pack_id for hit in store.find([ID])[0]] == [pack_id(2)]
    assert store.damaged_packs == {}


def test_open_packs_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("castore.store._OPEN_READERS_MAX", 2)
    opened: list[str] = []

    class Counting(MemoryBackend):
        def open_reader(self, name: str) -> RangeReader:
            opened.append(name)
            return super().open_reader(name)

    backend = Counting()
    for number in range(1, 5):
        write_pack(backend, [bytes([number]) * 9], number=number)
    store = open_store(backend)
    store.refresh()
    opened.clear()
    for number in (1, 2, 1, 2, 3, 2, 3, 1):
        store.get(HASHER.chunk_id(bytes([number]) * 9))
    assert [name[-6] for name in opened] == ["1", "2", "3", "1"]


# ---- damaged tables ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [-10, -100, 20])
def test_a_pack_with_a_damaged_trailer_table_or_header_is_salvaged(position: int) -> None:
    backend = MemoryBackend()
    write_pack(backend, CHUNKS, compression="auto")
    rewrite(backend, pack_name(pack_id(1)), flip(position))
    store = open_store(backend)
    for raw, chunk_id in zip(CHUNKS, IDS, strict=True):
        assert store.get(chunk_id) == raw
    assert list(store.damaged_packs) == [pack_id(1)]
    assert isinstance(store.damaged_packs[pack_id(1)], DamageError)


def test_a_pack_cut_short_gives_the_records_before_the_cut() -> None:
    backend = MemoryBackend()
    sealed = write_pack(backend, CHUNKS)
    rewrite(backend, pack_name(pack_id(1)), lambda data: data.__delitem__(slice(sealed.rows[2].offset + 10, None)))
    store = open_store(backend)
    assert [len(hits) for hits in store.find(IDS)] == [1, 1, 0, 0, 0]
    assert store.get(ID) == ONE
    with pytest.raises(ChunkMissingError):
        store.get(IDS[2])


def test_a_pack_that_is_no_pack_at_all_harms_nothing_else() -> None:
    backend = MemoryBackend()
    for number, data in enumerate((b"", b"x", bytes(1000), b"PK\3\4" + bytes(500)), start=2):
        backend.put_if_absent(pack_name(pack_id(number)), data)
    write_pack(backend, CHUNKS, number=1)
    store = open_store(backend)
    assert read(store) == ONE
    assert sorted(store.damaged_packs) == [pack_id(number) for number in (2, 3, 4, 5)]


def test_damaged_packs_are_forgotten_with_their_files() -> None:
    backend = MemoryBackend()
    backend.put_if_absent(pack_name(pack_id(2)), b"x")
    store = open_store(backend)
    store.refresh()
    assert list(store.damaged_packs) == [pack_id(2)]
    backend.delete(pack_name(pack_id(2)))
    store.refresh()
    assert store.damaged_packs == {}


# ---- an index that lies ------------------------------------------------------------------------------------


class LyingIndex(MemoryIndex):
    """Says of every chunk what `change` makes of the truth."""

    def __init__(self, change: Callable[[Row], Row]) -> None:
        super().__init__()
        self._change = change

    def find(self, ids: Sequence[ChunkId]) -> list[tuple[Location, ...]]:
        return [tuple(Location(hit.pack_id, self._change(hit.row)) for hit in hits) for hits in super().find(ids)]


@pytest.mark.parametrize(
    "change",
    [
        lambda row: replace(row, offset=row.offset + 8),
        lambda row: replace(row, offset=2**63),
        lambda row: replace(row, stored_bytes=row.stored_bytes - 1, raw_bytes=row.raw_bytes - 1),
        lambda row: replace(row, raw_bytes=row.raw_bytes + 1),
        lambda row: replace(row, checksum=0, chain=(1,)),
        lambda row: replace(row, chain=(2,)),
        lambda row: replace(row, chain=(200,)),
        lambda row: replace(row, chain=(1, 3)),
    ],
)
def test_an_index_that_lies_leads_to_a_typed_error_and_never_to_wrong_bytes(change: Callable[[Row], Row]) -> None:
    backend = MemoryBackend()
    write_pack(backend, CHUNKS)
    with pytest.raises((DamageError, UnsupportedFormatError)):
        read(open_store(backend, LyingIndex(change)))


def test_an_index_that_names_the_record_of_another_chunk_is_seen_by_the_id() -> None:
    backend = MemoryBackend()
    sealed = write_pack(backend, [ONE, ONE[::-1]])
    other = sealed.rows[1]
    lying = LyingIndex(lambda row: replace(row, offset=other.offset, checksum=other.checksum))
    with pytest.raises(ChecksumError, match="hash to the chunk's id"):
        read(open_store(backend, lying))


def test_an_index_that_forgets_all_the_time_costs_time_and_nothing_else() -> None:
    class Forgetful(MemoryIndex):
        def packs(self) -> frozenset[PackId]:
            self.clear()
            return super().packs()

        def forget(self, packs: Collection[PackId]) -> None:
            assert not packs

    backend = MemoryBackend()
    write_pack(backend, CHUNKS)
    store = open_store(backend, Forgetful())
    assert store.get(ID) == ONE
    assert store.get(IDS[0]) == CHUNKS[0]


# ---- threads and the rest ----------------------------------------------------------------------------------


def test_threads_read_at_once_while_packs_come_and_go() -> None:
    backend = two_packs()
    store = open_store(backend)

    def work(number: int) -> int:
        if number == 0:
            for extra in range(10, 20):
                write_pack(backend, [ONE], number=extra)
                store.refresh()
                backend.delete(pack_name(pack_id(extra)))
            return 0
        wanted = list(zip(CHUNKS, IDS, strict=True)) * 20
        return sum(store.get(chunk_id) != raw for raw, chunk_id in wanted)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [0, 0, 0, 0]


def test_a_closed_store_lets_go_of_its_files(tmp_path: Path) -> None:
    backend = LocalBackend(tmp_path)
    write_pack(backend, CHUNKS)
    before = len(list(Path("/proc/self/fd").iterdir()))
    store = open_store(backend)
    store.get(ID)
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 1
    store.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_missing_backend_file_is_not_mistaken_for_a_missing_chunk() -> None:
    class Unreadable(MemoryBackend):
        def open_reader(self, name: str) -> RangeReader:
            raise StorageError(f"{name}: cannot read: Input/output error")

    backend = MemoryBackend()
    write_pack(backend, CHUNKS)
    index = MemoryIndex()
    open_store(backend, index).refresh()
    broken = Unreadable()
    broken.put_if_absent(pack_name(pack_id(1)), b"whatever")
    with pytest.raises(StorageError, match="Input/output error") as caught:
        read(open_store(broken, index))
    assert not isinstance(caught.value, NotFoundError)


def test_stored_bytes_are_compared_with_their_checksum() -> None:
    backend = MemoryBackend()
    (row,) = write_pack(backend, [ONE]).rows
    check_stored(row, memoryview(ONE), where="x")
    with pytest.raises(ChecksumError, match=rf"x: expected checksum {row.checksum:016x} of 500 stored bytes, found"):
        check_stored(row, memoryview(bytes(500)), where="x")
