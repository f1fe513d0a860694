"""What is looked up and fetched before it is read: in which order, how far ahead, and that it is only a hint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import castore
from castore.api import Repository
from castore.backend import MemoryBackend
from castore.backend.local import LocalReader
from castore.checkpoint import fetch
from castore.checkpoint.read_ahead import WINDOW_CHUNKS, ReadAhead, spans
from castore.format.pack import RecordKind, Row
from castore.ids import ChunkId, PackId
from castore.index import Location, MemoryIndex
from tests.checkpoint.damage import places_of
from tests.checkpoint.repositories import create_on, delete_packs, open_on, packs_of
from tests.checkpoint.states import assert_same

A, B = PackId("aa" * 16), PackId("bb" * 16)


def location(pack_id: PackId, offset: int, stored_bytes: int) -> Location:
    return Location(pack_id, Row(ChunkId(bytes(16)), offset, stored_bytes, stored_bytes, 0, (), RecordKind.LEAF))


def drift(seed: int, count: int, *, leaf: int = 0) -> np.ndarray[Any, Any]:
    """Floats that differ a little from seed to seed, so that they are stored as differences."""
    start = np.random.default_rng(1000 + leaf).standard_normal(count).astype(np.float32)
    return start + np.random.default_rng(seed).standard_normal(count).astype(np.float32) * np.float32(1e-6 * seed)


def test_neighbours_are_asked_for_together() -> None:
    found = [location(A, 1_000_000, 500), location(B, 64, 10), location(A, 100, 200), location(A, 364, 36)]
    assert list(spans(found)) == [(A, 100, 400), (A, 1_000_000, 1_000_500), (B, 64, 74)]
    assert list(spans([location(A, 0, 900), location(A, 100, 50)])) == [(A, 0, 900)]
    assert list(spans([])) == []


def test_windows_are_prepared_once_and_one_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[int] = []

    class Store:
        def note_bases(self, window: Any) -> list[Location]:
            prepared.append(len(window))
            return []

    count = 5 * WINDOW_CHUNKS + 7
    ahead = ReadAhead(Store(), [()] * count)  # type: ignore[arg-type]
    ahead.reach(0)
    assert prepared == [2 * WINDOW_CHUNKS]
    for index in range(WINDOW_CHUNKS):
        ahead.reach(index)
    assert prepared == [2 * WINDOW_CHUNKS]
    ahead.reach(WINDOW_CHUNKS)
    assert prepared == [2 * WINDOW_CHUNKS, WINDOW_CHUNKS]
    for index in range(count):
        ahead.reach(index)
    assert sum(prepared) == count


@pytest.fixture
def history(tmp_path: Path) -> Repository:
    """Three saves of which the last rests on the second, and that on the first."""
    repo = castore.init(tmp_path / "store")
    for seed in (1, 2, 3):
        repo.save({"a": drift(seed, 600_000), "b": drift(seed, 300_000, leaf=1)})
    assert [row.depth for _, row in places_of(repo, "main", "a")] == [2, 2, 2]
    return repo


def test_chunks_are_read_in_the_order_of_packs_and_offsets(
    history: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one thread, so that there is one order; the bases under a chunk are read before it."""
    reads: list[tuple[str, int]] = []
    plain = LocalReader.read_into

    def read_into(self: LocalReader, offset: int, target: memoryview) -> None:
        reads.append((Path(self._where).stem, offset))
        plain(self, offset, target)

    monkeypatch.setattr(fetch, "worker_count", lambda: 1)
    monkeypatch.setattr(LocalReader, "read_into", read_into)
    fresh = castore.open(history.path)
    fresh.load()
    tops = [(pack_id, row.offset) for name in "ab" for pack_id, row in places_of(history, "main", name)]
    assert [read for read in reads if read in tops] == sorted(tops)
    assert len(reads) == 1 + 3 * len(tops), "one part of the manifest, and each chunk with the two below it"
    reads.clear()
    fresh.load(paths=["b"])
    chosen = [(pack_id, row.offset) for pack_id, row in places_of(history, "main", "b")]
    assert [read for read in reads if read in tops] == sorted(chosen)
    assert len(reads) == 3 * len(chosen), "nothing of the other leaf, and the manifest is known"


def test_everything_that_is_read_was_asked_for_before(history: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int, int]] = []
    missed: list[tuple[str, int]] = []
    plain = LocalReader.read_into

    def will_need(self: LocalReader, offset: int, size_bytes: int) -> None:
        asked.append((self._where, offset, offset + size_bytes))

    def read_into(self: LocalReader, offset: int, target: memoryview) -> None:
        if not any(where == self._where and start <= offset < stop for where, start, stop in asked):
            missed.append((self._where, offset))
        plain(self, offset, target)

    fresh = castore.open(history.path)
    assert fresh.snapshot().leaves, "the manifest is read before the tensors are known"
    monkeypatch.setattr(LocalReader, "will_need", will_need)
    monkeypatch.setattr(LocalReader, "read_into", read_into)
    fresh.load()
    assert asked
    assert not missed


def test_bases_are_looked_up_together(monkeypatch: pytest.MonkeyPatch) -> None:
    repo = create_on(MemoryBackend())
    for seed in (1, 2, 3):
        repo.save({f"leaf {number}": drift(seed, 5000, leaf=number) for number in range(40)})
    lookups: list[int] = []
    plain = MemoryIndex.find

    def find(self: MemoryIndex, ids: Any) -> Any:
        lookups.append(len(ids))
        return plain(self, ids)

    fresh = open_on(repo.handle.backend)
    assert fresh.snapshot().leaves
    monkeypatch.setattr(MemoryIndex, "find", find)
    fresh.load()
    assert lookups == [40, 40, 40], "the chunks, their bases, and the bases of those"


def test_a_base_that_moved_is_looked_up_again(history: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    """A collector may copy a base out and delete its pack after it was looked up, before it is read."""
    expected = history.load()
    first = packs_of(history)
    other = castore.init(history.path.parent / "other")
    for seed in (1, 2, 3):
        other.save({"n": seed, "a": drift(seed, 600_000), "b": drift(seed, 300_000, leaf=1)})
    fresh = castore.open(history.path)
    plain = ReadAhead.reach

    def reach(self: ReadAhead, index: int) -> None:
        plain(self, index)
        if packs_of(history) == first:
            for path in (other.path / "packs").rglob("*.pack"):
                target = history.path / "packs" / path.parent.name / path.name
                target.parent.mkdir(exist_ok=True)
                os.link(path, target)
            delete_packs(history.handle.backend, first)

    fresh.snapshot().leaves  # noqa: B018  # the manifest goes with the packs
    monkeypatch.setattr(fetch, "worker_count", lambda: 1)
    monkeypatch.setattr(ReadAhead, "reach", reach)
    assert_same(fresh.load(), expected)


def test_a_hint_that_fails_is_no_error(history: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no such call here")

    expected = history.load()
    monkeypatch.setattr(os, "posix_fadvise", refuse)
    assert_same(castore.open(history.path).load(), expected)
