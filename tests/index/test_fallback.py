"""A cache that stops working costs nothing that was known and no call."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import pytest

from castore.errors import NoSpaceError, StorageError
from castore.format.pack import Row
from castore.ids import ChunkId, PackId
from castore.index import FallbackIndex, Index, Location, MemoryIndex
from tests.suites.index_suite import IndexSuite, chunk, find_one, pack, table


class TestFallbackOverACache(IndexSuite):
    @pytest.fixture
    def index(self) -> Index:
        return FallbackIndex(MemoryIndex())


class TestFallbackWithoutCache(IndexSuite):
    @pytest.fixture
    def index(self) -> Index:
        return FallbackIndex(None)


class BrokenIndex:
    """A cache whose named methods fail, as on a full or failing disk."""

    def __init__(self, *broken: str) -> None:
        self.broken = set(broken)
        self.closed = False
        self._inner = MemoryIndex()

    def _check(self, method: str) -> None:
        if method in self.broken:
            raise NoSpaceError(f"{method}: the disk is full")

    def find(self, ids: Sequence[ChunkId]) -> list[tuple[Location, ...]]:
        self._check("find")
        return self._inner.find(ids)

    def packs(self) -> frozenset[PackId]:
        self._check("packs")
        return self._inner.packs()

    def add(self, tables: Mapping[PackId, Sequence[Row]]) -> None:
        self._check("add")
        self._inner.add(tables)

    def forget(self, packs: Collection[PackId]) -> None:
        self._check("forget")
        self._inner.forget(packs)

    def clear(self) -> None:
        self._check("clear")
        self._inner.clear()

    def close(self) -> None:
        self.closed = True


class TestFallbackOnAFullDisk(IndexSuite):
    @pytest.fixture
    def index(self) -> Index:
        return FallbackIndex(BrokenIndex("add"))


def test_what_cannot_be_added_is_remembered_and_the_rest_still_found() -> None:
    cache = BrokenIndex()
    index = FallbackIndex(cache)
    index.add({pack(1): table([1, 9])})
    assert index.reason is None
    cache.broken.add("add")
    index.add({pack(2): table([2, 9])})
    assert index.reason == "add: the disk is full"
    assert index.packs() == {pack(1), pack(2)}
    assert [hit.pack_id for hit in find_one(index, 9)] == [pack(1), pack(2)]
    index.forget([pack(1), pack(2)])
    assert index.packs() == frozenset()
    assert index.find([chunk(1), chunk(9)]) == [(), ()]


def test_a_disk_with_space_again_is_used_again() -> None:
    cache = BrokenIndex("add")
    index = FallbackIndex(cache)
    index.add({pack(1): table([1])})
    cache.broken.clear()
    index.add({pack(2): table([2]), pack(1): table([1])})
    assert cache.packs() == {pack(1), pack(2)}
    assert len(find_one(index, 1)) == 1


@pytest.mark.parametrize("method", ["find", "packs", "forget", "clear"])
def test_a_cache_that_cannot_be_read_is_given_up(method: str) -> None:
    cache = BrokenIndex()
    index = FallbackIndex(cache)
    index.add({pack(1): table([1])})
    cache.broken.add(method)
    arguments = {"find": ([chunk(1)],), "forget": ([pack(3)],)}.get(method, ())
    getattr(index, method)(*arguments)
    cache.broken.clear()
    assert index.packs() == frozenset(), "for good: otherwise it would come and go"
    assert find_one(index, 1) == ()
    index.add({pack(1): table([1])})
    assert [hit.pack_id for hit in find_one(index, 1)] == [pack(1)]
    assert not cache.closed, "another thread may be using it"
    index.close()
    assert cache.closed


def test_other_errors_are_not_hidden() -> None:
    class Wrong(BrokenIndex):
        def packs(self) -> frozenset[PackId]:
            raise ValueError("a mistake of ours")

    with pytest.raises(ValueError, match="mistake"):
        FallbackIndex(Wrong()).packs()
    assert issubclass(NoSpaceError, StorageError)
