"""What is kept is closed under bases, whichever of several records is relied on."""

from __future__ import annotations

import pytest

from castore.format.pack import RecordKind, Row
from castore.format.pack_columns import as_words, columns_of
from castore.ids import ChunkId, PackId
from castore.maintenance.gc.ledger import Ledger


def chunk(name: str) -> ChunkId:
    return ChunkId(name.encode().ljust(16, b"."))


def pack(number: int) -> PackId:
    return PackId(f"{number:032x}")


def row(name: str, bases: str = "", depth: int = 0, stored_bytes: int = 100) -> Row:
    """`bases`: one letter each."""
    base_ids = tuple(map(chunk, bases))
    return Row(chunk(name), 64, stored_bytes, 1000, 0, (16,) if bases else (), RecordKind.LEAF, depth, base_ids)


def ledger_of(*packs: list[Row], created_ns: list[int] | None = None) -> Ledger:
    ledger = Ledger(16)
    for number, rows in enumerate(packs):
        created = created_ns[number] if created_ns else number
        columns = columns_of(rows, id_bytes=16)
        ledger.add_pack(pack(number), columns, pack_bytes=1000, created_ns=created, damage="")
    return ledger


def mark(ledger: Ledger, *names: str, owner: int = 0) -> None:
    ledger.mark(ledger.chunks(as_words(b"".join(map(chunk, names)), 16)), owner=owner)


def kept(ledger: Ledger) -> list[int]:
    total = sum(file.row_count for file in ledger.packs)
    return [number for number in range(total) if ledger.is_kept(number)]


def test_bases_stay_transitively() -> None:
    ledger = ledger_of([row("a"), row("b", "a", 1)], [row("c", "b", 2), row("d")])
    mark(ledger, "c")
    ledger.settle(())
    assert kept(ledger) == [0, 1, 2]
    assert ledger.by_pack().tolist() == [2 * ledger.stored_of(0), ledger.stored_of(0)]
    assert ledger.by_pack(pinned=True).tolist() == [2 * ledger.stored_of(0), 0]


def test_of_several_records_the_least_deep_one_that_stays_is_relied_on() -> None:
    ledger = ledger_of([row("a")], [row("b", "a", 1)], [row("b")])
    mark(ledger, "b")
    ledger.settle(())
    assert kept(ledger) == [2]
    ledger.settle([pack(2)])
    assert kept(ledger) == [0, 1]
    assert ledger.rows_of(ledger.chunk_of(1)) == [1, 2]


def test_of_equal_records_the_newest_is_relied_on() -> None:
    ledger = ledger_of([row("a")], [row("a")], [row("a")], created_ns=[5, 7, 6])
    mark(ledger, "a")
    ledger.settle(())
    assert kept(ledger) == [1]


def test_a_base_that_is_too_deep_does_not_count() -> None:
    """`b` rests on the record of `a` that stands by itself; another writer stored `a` as deep as `b`."""
    ledger = ledger_of([row("b", "a", 1)], [row("a", "z", 1), row("z")], [row("a")])
    mark(ledger, "b")
    ledger.settle([pack(2)])  # the best record of `a` is now the deep one
    assert kept(ledger) == [0, 3]
    assert ledger.broken_count == 0


def test_a_base_that_no_pack_holds_is_counted() -> None:
    ledger = ledger_of([row("b", "a", 1)])
    mark(ledger, "b", "x")
    ledger.settle(())
    assert (ledger.broken_count, ledger.absent_count) == (1, 1)


def test_what_was_marked_before_its_pack_was_read_is_kept_all_the_same() -> None:
    """The pack of a save that ended beside the first look: its bases in condemned packs must not be lost."""
    ledger = ledger_of([row("a")])
    mark(ledger, "b")
    ledger.settle(())
    assert kept(ledger) == []
    columns = columns_of([row("b", "a", 1)], id_bytes=16)
    ledger.add_pack(pack(9), columns, pack_bytes=1000, created_ns=9, damage="")
    ledger.settle(())
    assert kept(ledger) == [0, 1]


def test_every_copy_of_a_live_chunk_is_needed_until_another_one_is_proven() -> None:
    ledger = ledger_of([row("a"), row("x")], [row("a"), row("y")])
    mark(ledger, "a")
    ledger.settle(())
    live = ledger.live_chunks()
    assert [ledger.needed_rows(number, live).tolist() for number in (0, 1)] == [[0], [2]]
    assert ledger.kept_by_pack().tolist() == [0, 1]


def test_pinned_bytes_are_told_by_the_snapshot_whose_differences_pin_them() -> None:
    ledger = ledger_of(
        [row("a", stored_bytes=800), row("b", "a", 1, 200), row("c", "b", 2, 40), row("d", stored_bytes=8)]
    )
    mark(ledger, "d", owner=3)
    mark(ledger, "c", owner=5)
    ledger.settle(())
    assert ledger.pinned_by() == {5: ledger.stored_of(0) + ledger.stored_of(1)}


@pytest.mark.parametrize("count", [1, 50_000])
def test_a_chunk_takes_less_than_100_bytes(count: int) -> None:
    ledger = Ledger(16)
    rows = [row(f"{number}") for number in range(count)]
    ledger.add_pack(pack(0), columns_of(rows, id_bytes=16), pack_bytes=1, created_ns=0, damage="")
    mark(ledger, "1")
    ledger.settle(())
    assert ledger.nbytes <= 100 * max(count, 200)


def test_parts_are_walked_once() -> None:
    ledger = ledger_of([row("p")])
    numbers = ledger.chunks(as_words(chunk("p") + chunk("q"), 16))
    assert ledger.walk(numbers).tolist() == [True, True]
    assert ledger.walk(numbers).tolist() == [False, False]


def test_what_a_rounded_copy_rests_on_second_is_no_tree_of_its_own() -> None:
    """Storing `d` anew would free nothing: `b` is kept for the copy of another tree."""
    ledger = ledger_of([row("a"), row("b"), row("c", "ab", 1), row("d", "b", 1)])
    mark(ledger, "a", "c", "d")
    ledger.settle(())
    assert kept(ledger) == [0, 1, 2, 3]
    assert list(ledger.pinned_trees()) == []


def test_a_rounded_copy_whose_masters_are_needed_stays_as_it_is_when_their_tree_is_stored_anew() -> None:
    ledger = ledger_of([row("a"), row("b", "a", 1), row("e"), row("c", "be", 2)])
    mark(ledger, "b", "e", "c")
    ledger.settle(())
    (tree,) = ledger.pinned_trees()
    assert (tree.reference, tree.rewritten) == (1, (1,))


def test_bytes_that_go_with_a_snapshot_count_both_bases() -> None:
    ledger = ledger_of([row("a"), row("b"), row("c", "ab", 1)])
    mark(ledger, "c")
    ledger.settle(())
    assert ledger.bytes_by_owner(1).tolist() == [int(ledger.by_pack().sum())]


def test_differences_whose_lowest_base_is_lost_make_no_tree() -> None:
    ledger = ledger_of([row("b", "a", 1), row("c", "b", 2)])
    mark(ledger, "c")
    ledger.settle(())
    assert ledger.broken_count == 1
    assert list(ledger.pinned_trees()) == []
