"""Memory that two processes see: places, limits, and its end."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

from castore.checkpoint import shared_region
from castore.checkpoint.shared_region import attach_region, create_region
from castore.errors import UsageError, WorkerError
from castore.host_memory import BufferPool
from castore.options import GRID_BYTES


def test_what_is_written_here_is_read_there_at_the_same_place() -> None:
    region = create_region()
    other = attach_region(os.dup(region.descriptor))
    pool = BufferPool(region.make_slab)
    copies = [pool.copy(bytes([number]) * (GRID_BYTES - number)) for number in range(40)]
    for number, copy in enumerate(copies):
        seen = other.view(region.offset_of(copy.view), len(copy.view))
        assert bytes(seen) == bytes([number]) * (GRID_BYTES - number)
        assert seen.readonly, "a worker that could write would break invariants of the training"
    assert region.offset_of(copies[0].view[5:]) == region.offset_of(copies[0].view) + 5
    other.close()
    region.close()


def test_a_place_in_memory_that_was_given_up_is_refused() -> None:
    region, following = create_region(), create_region()
    view = region.make_slab(GRID_BYTES)
    region.close()
    for wrong in (region, following):
        with pytest.raises(UsageError, match="closed by another thread"):
            wrong.offset_of(view)
    with pytest.raises(UsageError):
        following.offset_of(memoryview(bytearray(10)))
    following.close()


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("castore-staged")


def test_it_takes_only_the_memory_that_is_touched_and_gives_it_back() -> None:
    gc.collect()
    before = mappings()
    region = create_region()
    region.make_slab(1 << 30)[:GRID_BYTES:4096] = bytes(GRID_BYTES // 4096)
    assert os.fstat(region.descriptor).st_blocks * 512 <= 4 * GRID_BYTES
    with pytest.raises(MemoryError):
        region.make_slab(os.fstat(region.descriptor).st_size)
    descriptor = region.descriptor
    region.close()
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(descriptor)
    assert mappings() == before


def test_dropping_it_closes_it() -> None:
    region = create_region()
    descriptor = region.descriptor
    del region
    gc.collect()
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(descriptor)


def test_a_limit_of_the_process_is_a_typed_error_and_leaves_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))

    def refuse(descriptor: int, *, writable: bool) -> memoryview:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(shared_region, "_map", refuse)
    with pytest.raises(WorkerError, match=r"Cannot allocate memory; lift the limit .* without worker_process"):
        create_region()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
