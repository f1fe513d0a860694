"""Memory that two processes see: places, limits, and its end."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from castore.checkpoint import shared_region
from castore.checkpoint.shared_region import attach_region, create_region
from castore.errors import UsageError, WorkerError
from castore.host_memory import BufferPool
from castore.options import GRID_BYTES
from castore.tensors import pin
from tests.suites.forked import running_child


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


def held_bytes(descriptor: int) -> int:
    return os.fstat(descriptor).st_blocks * 512


def test_a_slab_has_its_memory_before_it_is_touched_and_gives_it_back() -> None:
    gc.collect()
    before = mappings()
    region = create_region()
    assert held_bytes(region.descriptor) == 0
    region.make_slab(3 * GRID_BYTES + 4096)
    region.make_slab(GRID_BYTES)
    assert held_bytes(region.descriptor) == 4 * GRID_BYTES + 4096
    with pytest.raises(MemoryError):
        region.make_slab(os.fstat(region.descriptor).st_size)
    descriptor = region.descriptor
    region.close()
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(descriptor)
    assert mappings() == before


def test_a_want_of_memory_is_told_when_a_slab_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a touch it would end the process by SIGBUS."""

    def refuse(*_: int) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    region = create_region()
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", refuse)
        with pytest.raises(MemoryError, match=r"staged copies of a state: .*Cannot allocate memory"):
            region.make_slab(GRID_BYTES)
    assert region.offset_of(region.make_slab(GRID_BYTES)) == 0
    region.close()


def test_the_memory_is_given_back_while_a_forked_child_lives() -> None:
    region = create_region()
    region.make_slab(8 * GRID_BYTES)[:] = bytes(8 * GRID_BYTES)
    descriptor = os.dup(region.descriptor)
    inherited = region

    def child(say: Callable[[bytes], None]) -> None:
        inherited.close()  # which is not for a child to give back
        say(b"closed")
        time.sleep(60)

    with running_child(child) as (_, reader):
        assert os.read(reader, 6) == b"closed"
        assert held_bytes(descriptor) == 8 * GRID_BYTES
        region.close()
        assert held_bytes(descriptor) == 0
    os.close(descriptor)


def test_pages_are_unlocked_before_they_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the driver, which the next test asks itself where there is one."""
    region = create_region()
    descriptor = os.dup(region.descriptor)
    unlocked: list[tuple[int, int]] = []

    def pin(address: int, length: int) -> Callable[[], None]:
        assert address % mmap.PAGESIZE == 0
        return lambda: unlocked.append((length, held_bytes(descriptor)))

    monkeypatch.setattr(shared_region, "pin", pin)
    region.make_pinned_slab(2 * GRID_BYTES)
    region.make_pinned_slab(GRID_BYTES)
    region.close()
    assert unlocked == [(GRID_BYTES, 3 * GRID_BYTES), (2 * GRID_BYTES, 3 * GRID_BYTES)]
    assert held_bytes(descriptor) == 0
    os.close(descriptor)


def test_pages_that_the_driver_locks_are_unlocked_and_locked_again() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    region = create_region()
    slab = region.make_pinned_slab(4 * GRID_BYTES)
    host = torch.frombuffer(slab, dtype=torch.uint8)
    assert host.is_pinned()
    host.copy_(torch.full((len(slab),), 7, dtype=torch.uint8, device="cuda"), non_blocking=True)
    torch.cuda.synchronize()
    assert bytes(slab[:5]) == bytes([7] * 5)
    address = host.data_ptr()
    region.close()
    pin(address, 4 * GRID_BYTES)()  # what is locked already would be refused


def test_a_driver_that_refuses_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    class Refusing:
        def cudaHostRegister(self, *_: int) -> int:  # noqa: N802  the driver's name
            return 2

    monkeypatch.setattr(torch.cuda, "cudart", Refusing)
    region = create_region()
    with pytest.raises(WorkerError, match=r"does not lock \d+ bytes .*returns 2\); open without worker_process"):
        region.make_pinned_slab(GRID_BYTES)
    region.close()


def test_dropping_it_closes_it() -> None:
    region = create_region()
    descriptor = region.descriptor
    del region
    gc.collect()
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(descriptor)


LIMITED = """
import os, resource, sys
from castore.checkpoint.shared_region import create_region
from castore.errors import WorkerError

before = os.listdir("/proc/self/fd")
limit = getattr(resource, sys.argv[1])
resource.setrlimit(limit, (int(sys.argv[2]), resource.getrlimit(limit)[1]))
try:
    create_region()
except WorkerError as error:
    print(error)
resource.setrlimit(limit, (resource.getrlimit(limit)[1],) * 2)
assert os.listdir("/proc/self/fd") == before
"""


@pytest.mark.parametrize(
    ("limit", "value", "reason"),
    [
        ("RLIMIT_AS", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "Cannot allocate memory"),
        ("RLIMIT_FSIZE", 1 << 20, "File too large"),
        ("RLIMIT_NOFILE", 3, "Too many open files"),
    ],
)
def test_a_limit_of_the_process_is_a_typed_error_and_leaves_no_descriptor(limit: str, value: int, reason: str) -> None:
    command = [sys.executable, "-c", LIMITED, limit, str(value)]
    done = subprocess.run(
        command,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert re.search(rf"{reason}; lift the limit .* without worker_process", done.stdout), done.stdout
