"""The conformance suite of castore.index.base.Index: subclass it with a fixture `index`, ids of 16 bytes."""

from __future__ import annotations

import functools
import random
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from castore.format.pack import RecordKind, Row
from castore.ids import ChunkId, PackId
from castore.index import Index, Location


@functools.cache
def chunk(number: int, *, id_bytes: int = 16) -> ChunkId:
    """Spread over the id space, as digests are."""
    return ChunkId(random.Random(number).randbytes(id_bytes))


@functools.cache
def pack(number: int) -> PackId:
    return PackId(random.Random(-1 - number).randbytes(16).hex())


def row(number: int, *, offset: int = 64, base: int | None = None, id_bytes: int = 16) -> Row:
    """A row whose every field depends on the number."""
    return Row(
        chunk(number, id_bytes=id_bytes),
        offset,
        stored_bytes=1000 + number,
        raw_bytes=1000 + number if number % 3 == 0 else 2000 + number,
        checksum=(number * 0x9E3779B97F4A7C15) & 0xFFFF_FFFF_FFFF_FFFF,
        chain=(1 + number % 5, 7)[: number % 3],
        kind=RecordKind(1 + number % 3),
        depth=0 if base is None else 1,
        base_ids=() if base is None else (chunk(base, id_bytes=id_bytes),),
        in_run=number % 2 == 0,
    )


def table(numbers: Iterable[int]) -> list[Row]:
    return [row(number, offset=64 + 4096 * at) for at, number in enumerate(numbers)]


def find_one(index: Index, number: int) -> tuple[Location, ...]:
    return index.find([chunk(number)])[0]


class IndexSuite:
    """Reads as the contract does, method by method."""

    # ---- find ----------------------------------------------------------------------------------------------

    def test_a_fresh_index_is_empty(self, index: Index) -> None:
        assert index.packs() == frozenset()
        assert index.find([chunk(1), chunk(2)]) == [(), ()]
        assert index.find([]) == []

    def test_every_field_of_a_row_comes_back(self, index: Index) -> None:
        rows = [
            row(1),
            row(2, offset=(1 << 64) - 1),
            row(3, base=1),
            Row(chunk(4), 64, 0, 0, (1 << 64) - 1, (255, 254, 253, 252), RecordKind.PART, in_run=True),
            Row(chunk(5), 64, 1 << 20, 1 << 20, 0, (), RecordKind.LEAF, 255, (ChunkId(b"\xff" * 16),) * 2),
            Row(ChunkId(bytes(16)), 64, 1, 1, 1, (), RecordKind.ID_LIST),
            Row(ChunkId(b"\xff" * 16), 64, 1, 1, 1, (), RecordKind.ID_LIST),
        ]
        index.add({pack(1): rows})
        found = index.find([each.chunk_id for each in rows])
        assert found == [(Location(pack(1), each),) for each in rows]

    def test_the_answer_is_parallel_to_the_question(self, index: Index) -> None:
        index.add({pack(1): table(range(10))})
        numbers = [7, 99, 3, 7, 98, 0]
        found = index.find([chunk(number) for number in numbers])
        assert [[hit.row.chunk_id for hit in hits] for hits in found] == [
            [chunk(number)] if number < 10 else [] for number in numbers
        ]

    def test_a_chunk_in_several_packs_is_found_in_all_of_them_in_the_order_of_adding(self, index: Index) -> None:
        numbers = [5, 1, 9, 3]
        for number in numbers:
            index.add({pack(number): table([number, 100])})
        assert [hit.pack_id for hit in find_one(index, 100)] == [pack(number) for number in numbers]

    def test_packs_of_one_call_are_ordered_as_given(self, index: Index) -> None:
        numbers = [8, 2, 6, 4]
        index.add({pack(number): table([100]) for number in numbers})
        assert [hit.pack_id for hit in find_one(index, 100)] == [pack(number) for number in numbers]

    def test_a_chunk_twice_in_one_pack_is_found_by_offset(self, index: Index) -> None:
        index.add({pack(1): [row(1, offset=900), row(2), row(1, offset=70), row(1, offset=900)]})
        assert [hit.row.offset for hit in find_one(index, 1)] == [70, 900]

    def test_an_id_that_begins_like_another_is_another(self, index: Index) -> None:
        index.add({pack(1): [Row(ChunkId(b"a" * 15 + b"b"), 64, 1, 1, 1, (), RecordKind.LEAF)]})
        assert index.find([ChunkId(b"a" * 16)]) == [()]

    # ---- add -----------------------------------------------------------------------------------------------

    def test_a_pack_is_added_once(self, index: Index) -> None:
        index.add({pack(1): table([1, 2])})
        index.add({pack(1): table([1, 2]), pack(2): table([2])})
        index.add({pack(1): table([3])})
        assert index.packs() == {pack(1), pack(2)}
        assert [hit.pack_id for hit in find_one(index, 1)] == [pack(1)]
        assert [hit.pack_id for hit in find_one(index, 2)] == [pack(1), pack(2)]
        assert find_one(index, 3) == ()

    def test_a_pack_without_rows_is_known(self, index: Index) -> None:
        index.add({pack(1): []})
        assert index.packs() == {pack(1)}
        index.forget([pack(1)])
        assert index.packs() == frozenset()

    def test_adding_nothing_does_nothing(self, index: Index) -> None:
        index.add({})
        assert index.packs() == frozenset()

    def test_many_tables_in_one_call(self, index: Index) -> None:
        index.add({pack(number): table(range(200 * number, 200 * number + 200)) for number in range(50)})
        assert index.packs() == {pack(number) for number in range(50)}
        found = index.find([chunk(number) for number in range(10_000)])
        assert [hits[0].pack_id for hits in found] == [pack(number // 200) for number in range(10_000)]

    # ---- forget, clear, close ------------------------------------------------------------------------------

    def test_forget_drops_the_locations_of_those_packs_alone(self, index: Index) -> None:
        index.add({pack(number): table([number, 100, 101]) for number in range(6)})
        index.forget([pack(1), pack(4), pack(77)])
        assert index.packs() == {pack(0), pack(2), pack(3), pack(5)}
        assert find_one(index, 1) == find_one(index, 4) == ()
        assert [hit.pack_id for hit in find_one(index, 100)] == [pack(0), pack(2), pack(3), pack(5)]
        assert len(find_one(index, 2)) == 1

    def test_forgetting_nothing_and_the_unknown_does_nothing(self, index: Index) -> None:
        index.add({pack(1): table([1])})
        index.forget([])
        index.forget([pack(2)])
        assert index.packs() == {pack(1)}

    def test_a_forgotten_pack_may_be_added_again(self, index: Index) -> None:
        index.add({pack(1): table([1, 9]), pack(2): table([2, 9])})
        index.forget([pack(2)])
        index.add({pack(3): table([3, 9])})
        index.add({pack(2): table([2, 9])})
        assert [hit.pack_id for hit in find_one(index, 9)] == [pack(1), pack(3), pack(2)]
        assert [hit.pack_id for hit in find_one(index, 2)] == [pack(2)]

    def test_clear_drops_everything(self, index: Index) -> None:
        index.add({pack(1): table(range(100))})
        index.clear()
        assert index.packs() == frozenset()
        assert find_one(index, 1) == ()
        index.add({pack(1): table([5])})
        assert [hit.pack_id for hit in find_one(index, 5)] == [pack(1)]

    def test_closing_twice_does_nothing(self, index: Index) -> None:
        index.close()
        index.close()

    # ---- against a model, and with threads -----------------------------------------------------------------

    def test_a_long_random_story_agrees_with_a_dict(self, index: Index) -> None:
        rng = random.Random(20)
        known: dict[PackId, list[Row]] = {}
        for _ in range(60):
            action = rng.random()
            if action < 0.6:
                new = {
                    pack(rng.randrange(40)): table(rng.sample(range(500), rng.randrange(60)))
                    for _ in range(rng.randrange(4))
                }
                index.add(new)
                for pack_id, rows in new.items():
                    known.setdefault(pack_id, rows)
            elif action < 0.97:
                gone = [pack(rng.randrange(40)) for _ in range(rng.randrange(5))]
                index.forget(gone)
                for pack_id in gone:
                    known.pop(pack_id, None)
            else:
                index.clear()
                known.clear()
            agrees(index, known, range(500))

    def test_threads_see_whole_transactions(self, index: Index) -> None:
        stop = threading.Event()

        def write(thread: int) -> None:
            for number in range(thread, 40, 2):
                index.add({pack(number): table([1000 + number, 2000 + number])})
                if number >= 4:
                    index.forget([pack(number - 4)])

        def read() -> None:
            while not stop.is_set():
                for number in range(40):
                    one, two = index.find([chunk(1000 + number), chunk(2000 + number)])
                    assert len(one) == len(two) <= 1
                    assert index.packs() <= {pack(each) for each in range(40)}

        with ThreadPoolExecutor(4) as pool:
            readers = [pool.submit(read) for _ in range(2)]
            try:
                list(pool.map(write, range(2)))
            finally:
                stop.set()
            for reader in readers:
                reader.result()
        assert index.packs() == {pack(number) for number in range(36, 40)}


def agrees(index: Index, known: dict[PackId, list[Row]], numbers: Sequence[int] | range) -> None:
    """The index holds these tables, and no location of another pack."""
    expected: dict[ChunkId, set[Location]] = {}
    for pack_id, rows in known.items():
        for each in rows:
            expected.setdefault(each.chunk_id, set()).add(Location(pack_id, each))
    assert index.packs() == known.keys()
    ids = [chunk(number) for number in numbers]
    found = index.find(ids)
    assert [set(hits) for hits in found] == [expected.get(chunk_id, set()) for chunk_id in ids]
    assert all(len(set(hits)) == len(hits) for hits in found)
