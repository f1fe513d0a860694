"""Host memory that is used again: nobody's copy is overwritten while it is in use, and budgets hold."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from weakref import WeakSet

import numpy as np
import pytest

from castore.hashing import hasher_for
from castore.host_memory import BaseMemory, BufferPool, HostCopy
from castore.ids import Buffer, ChunkId
from castore.options import BASE_BUDGET_SHARE, GRID_BYTES

HASHER = hasher_for("xxh3-128")
AMPLE = 1 << 40


def chunk(seed: int, length: int = GRID_BYTES) -> bytes:
    return bytes([seed % 251]) * length


def id_of(raw: bytes) -> ChunkId:
    return HASHER.chunk_id(raw)


def memory_of(budget_bytes: int = AMPLE) -> tuple[BaseMemory, BufferPool]:
    pool = BufferPool()
    memory = BaseMemory(pool, HASHER.digest)
    memory.set_budget(budget_bytes)
    return memory, pool


class Slabs:
    """Counts the slabs that a pool asks for."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def __call__(self, length: int) -> np.ndarray:
        self.lengths.append(length)
        return np.empty(length, np.uint8)


# ---- the pool ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 64 * 1024 - 1, 64 * 1024, GRID_BYTES - 1, GRID_BYTES])
def test_a_copy_is_equal_and_independent(length: int) -> None:
    pool = BufferPool()
    raw = bytearray(random.Random(0).randbytes(length))
    copy = pool.copy(raw)
    expected = bytes(raw)
    raw[:] = bytes(length)
    assert bytes(copy.view) == expected
    assert copy.held_bytes >= length
    pool.release(copy)


def test_slots_that_are_out_never_overlap() -> None:
    pool = BufferPool()
    copies = [pool.copy(chunk(seed)) for seed in range(100)]
    assert all(copy.view == chunk(seed) for seed, copy in enumerate(copies))


def test_released_slots_are_used_again() -> None:
    slabs = Slabs()
    pool = BufferPool(slabs)
    for _ in range(50):
        copies = [pool.copy(chunk(seed)) for seed in range(20)]
        for copy in copies:
            pool.release(copy)
    assert len(slabs.lengths) == 1


def test_small_copies_take_no_slot() -> None:
    slabs = Slabs()
    pool = BufferPool(slabs)
    copies = [pool.copy(bytes(1000)) for _ in range(1000)]
    assert sum(copy.held_bytes for copy in copies) == 1_000_000
    assert not slabs.lengths


def test_threads_never_get_the_same_slot() -> None:
    pool = BufferPool()

    def work(number: int) -> None:
        for step in range(60):
            own: list[tuple[bytes, HostCopy]] = []
            for item in range(3):
                raw = chunk(number * 7 + step * 3 + item, 80_000)
                own.append((raw, pool.copy(raw)))
            for raw, copy in own:
                assert copy.view == raw
                pool.release(copy)

    with ThreadPoolExecutor(8) as threads:
        for future in [threads.submit(work, number) for number in range(8)]:
            future.result()


# ---- bases -------------------------------------------------------------------------------------------------------


def test_what_was_put_can_be_had_until_it_is_dropped() -> None:
    memory, _ = memory_of()
    first, second = chunk(1), chunk(2, 500)
    for raw in (first, second):
        memory.put(id_of(raw), raw)
    assert memory.get(id_of(first)) == first
    assert memory.get(id_of(second)) == second
    assert memory.held_bytes == GRID_BYTES + 500
    memory.keep_only({id_of(second)})
    assert memory.get(id_of(first)) is None
    assert memory.held_bytes == 500
    memory.keep_only(())
    assert memory.held_bytes == 0


def test_a_copy_that_is_not_what_it_is_called_is_not_kept() -> None:
    """The state was changed by another thread: every difference from the copy would be wrong and prove itself."""
    memory, _ = memory_of()
    memory.put(id_of(chunk(1)), chunk(2))
    assert memory.get(id_of(chunk(1))) is None
    assert memory.held_bytes == 0


@pytest.mark.parametrize("budget_bytes", [-1, 0, GRID_BYTES - 1, GRID_BYTES, 3 * GRID_BYTES])
def test_copies_stay_within_the_budget(budget_bytes: int) -> None:
    memory, _ = memory_of(budget_bytes)
    for seed in range(10):
        memory.put(id_of(chunk(seed)), chunk(seed))
        assert memory.held_bytes <= max(0, budget_bytes)
    assert memory.held_bytes == max(0, budget_bytes) // GRID_BYTES * GRID_BYTES


def test_copies_of_many_threads_stay_within_the_budget() -> None:
    """Each looked before it copied: together they went over."""
    barrier = threading.Barrier(8)

    def digest(raw: Buffer) -> bytes:
        barrier.wait(timeout=30)  # all have looked, none has been counted
        return HASHER.digest(raw)

    memory = BaseMemory(BufferPool(), digest)
    memory.set_budget(2 * GRID_BYTES)
    with ThreadPoolExecutor(8) as threads:
        for future in [threads.submit(memory.put, id_of(chunk(seed)), chunk(seed)) for seed in range(8)]:
            future.result()
    assert memory.held_bytes == 2 * GRID_BYTES


@pytest.fixture
def no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repositories that other tests left open hold memory of this process too."""
    monkeypatch.setattr("castore.host_memory._all", WeakSet())


@pytest.mark.usefixtures("no_others")
def test_by_default_the_budget_is_a_share_of_what_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("castore.host_memory.available_bytes", lambda: 16 * GRID_BYTES)
    memory, _ = memory_of()
    memory.set_budget(None)
    for seed in range(20):
        memory.put(id_of(chunk(seed)), chunk(seed))
    assert memory.held_bytes == BASE_BUDGET_SHARE * 16 * GRID_BYTES
    # What the copies take is no longer available; that must not make the budget smaller from save to save.
    monkeypatch.setattr("castore.host_memory.available_bytes", lambda: 12 * GRID_BYTES)
    memory.set_budget(None)
    memory.keep_only(())
    for seed in range(20):
        memory.put(id_of(chunk(seed)), chunk(seed))
    assert memory.held_bytes == BASE_BUDGET_SHARE * 16 * GRID_BYTES


def test_pinned_chunks_stay_and_keep_their_bytes() -> None:
    memory, pool = memory_of()
    raw = chunk(1)
    memory.pin({id_of(raw)})  # before it is here
    memory.pin({id_of(raw)})
    memory.put(id_of(raw), raw)
    view = memory.get(id_of(raw))
    assert view is not None
    for _ in range(2):
        memory.keep_only(())
        for seed in range(40):
            pool.copy(chunk(seed + 2))
        assert view == raw
        memory.unpin({id_of(raw)})
    memory.keep_only(())
    assert memory.get(id_of(raw)) is None


def test_only_what_one_save_has_pinned_is_given_up() -> None:
    memory, _ = memory_of()
    mine, shared = chunk(1), chunk(2)
    for raw in (mine, shared):
        memory.put(id_of(raw), raw)
        memory.pin({id_of(raw)})
    memory.pin({id_of(shared)})
    for raw in (mine, shared, chunk(3)):
        memory.give_up(id_of(raw))
    assert memory.get(id_of(mine)) is None
    assert memory.get(id_of(shared)) == shared
    assert memory.held_bytes == GRID_BYTES


def test_unpinning_what_was_not_pinned_leaves_no_debt() -> None:
    memory, _ = memory_of()
    raw = chunk(1)
    memory.unpin({id_of(raw)})
    memory.pin({id_of(raw)})
    memory.put(id_of(raw), raw)
    memory.keep_only(())
    assert memory.get(id_of(raw)) == raw


def test_saves_of_many_threads_share_the_memory_and_never_see_foreign_bytes() -> None:
    """Every thread pins, reads, puts and drops, as concurrent saves do."""
    memory, _ = memory_of(8 * GRID_BYTES)

    def work(number: int) -> None:
        moments = random.Random(number)
        for _ in range(80):
            raws = {id_of(raw): raw for raw in (chunk(moments.randrange(12), 100_000) for _ in range(3))}
            memory.pin(raws.keys())
            for chunk_id, raw in raws.items():
                view = memory.get(chunk_id)
                if view is None:
                    memory.put(chunk_id, raw)
                    view = memory.get(chunk_id)
                if view is not None:
                    assert view == raw
                    assert view == raw, "the bytes changed while the chunk was pinned"
            memory.unpin(raws.keys())
            memory.keep_only(raws.keys())

    with ThreadPoolExecutor(6) as threads:
        for future in [threads.submit(work, number) for number in range(6)]:
            future.result()
    memory.keep_only(())
    assert memory.held_bytes == 0


@pytest.mark.usefixtures("no_others")
def test_repositories_of_one_process_share_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight of them, opened together, would have taken twice the memory that there is."""
    monkeypatch.setattr("castore.host_memory.available_bytes", lambda: 16 * GRID_BYTES)
    memories = [memory_of()[0] for _ in range(8)]
    for number, memory in enumerate(memories):
        memory.set_budget(None)
        for seed in range(20):
            memory.put(id_of(chunk(seed)), chunk(seed))
        monkeypatch.setattr("castore.host_memory.available_bytes", lambda: 12 * GRID_BYTES)
        assert memory.held_bytes == (4 * GRID_BYTES if number == 0 else 0)


def test_a_smaller_budget_drops_what_is_not_pinned() -> None:
    memory, _ = memory_of(8 * GRID_BYTES)
    for seed in range(6):
        memory.put(id_of(chunk(seed)), chunk(seed))
    memory.pin([id_of(chunk(3))])
    memory.set_budget(2 * GRID_BYTES)
    assert memory.held_bytes == 2 * GRID_BYTES
    memory.set_budget(0)
    assert memory.held_bytes == GRID_BYTES
    assert memory.get(id_of(chunk(3))) == chunk(3)
