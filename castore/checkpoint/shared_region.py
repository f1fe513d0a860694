"""Memory that two processes see: where a worker process finds the staged copies.

It is one memory file without a name, so that nothing is left behind however the processes end, and no limit of /dev/shm
applies. The file is as long as the machine's memory and sparse: a slab takes memory when it is made, which is where a
lack of it can still be told; a touch could only end the process. So one descriptor and one mapping serve every pool, a
place is an offset, and slots are reused while they are warm.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from castore.errors import UsageError, WorkerError
from castore.ids import Buffer
from castore.options import GRID_BYTES
from castore.tensors import pin


class SharedRegion:
    """One region. Thread-safe. A view keeps the mapping, not the file, alive after `close`."""

    def __init__(self, descriptor: int, memory: memoryview) -> None:
        """Takes the descriptor over."""
        self.descriptor = descriptor
        self._undo: list[Callable[[], object]] = []
        """What the maker of a region has to undo, last first."""
        self._finalizer = weakref.finalize(self, _let_go, descriptor, self._undo, os.getpid())
        self._memory = memory
        self._length = len(memory)
        self._start = _address(memory)
        self._lock = threading.Lock()
        self._taken = 0

    def make_slab(self, length: int) -> memoryview:
        """Memory that nobody has had yet. Raises MemoryError."""
        with self._lock:
            start = self._taken
            if start + length > self._length:
                raise MemoryError(f"the staged copies would take more than the machine's {self._length} bytes")
            _allocate(self.descriptor, start, length)
            self._taken += length
        return self.view(start, length)

    def make_pinned_slab(self, length: int) -> memoryview:
        """The same, page-locked, so that the copy engine of a device can write to it. Raises WorkerError."""
        slab = self.make_slab(length)
        try:
            self._undo.append(pin(_address(slab), length))
        except RuntimeError as error:
            raise WorkerError(f"memory for a worker process: {error}; open without worker_process") from error
        return slab

    def offset_of(self, view: memoryview) -> int:
        """Where a view lies. Raises UsageError when it lies elsewhere: in a region that has been closed."""
        offset = _address(view) - self._start
        if not 0 <= offset <= self._length - len(view):
            raise UsageError("the repository was closed by another thread while a save was being staged; save again")
        return offset

    def view(self, offset: int, length: int) -> memoryview:
        """The bytes at a place."""
        return self._memory[offset : offset + length]

    def close(self) -> None:
        """Let go of the file. The maker gives the memory back at once: forked children may map it for long."""
        self._finalizer()
        self._memory = memoryview(b"")
        self._length = 0


def _let_go(descriptor: int, undo: list[Callable[[], object]], owner_pid: int) -> None:
    os.close(descriptor)
    if os.getpid() == owner_pid:  # a forked child has no device, and the memory is its parent's
        for step in reversed(undo):
            with suppress(OSError):
                step()
    undo.clear()


def create_region() -> SharedRegion:
    """A region as long as the machine's memory. Raises WorkerError when limits of this process forbid it."""
    try:
        descriptor = os.memfd_create("castore-staged", os.MFD_CLOEXEC)
        try:
            descriptor = above_standard(descriptor)
            os.truncate(descriptor, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
            memory = _map(descriptor, writable=True)
        except BaseException:
            os.close(descriptor)
            raise
    except (OSError, OverflowError, ValueError) as error:  # the latter where an address has 32 bits
        raise WorkerError(
            f"no memory can be shared with a worker process: {error}; lift the limit (ulimit -v, -f, -n), or open the "
            "repository without worker_process"
        ) from error
    region = SharedRegion(descriptor, memoryview(memory))
    region._undo.append(partial(memory.madvise, mmap.MADV_REMOVE))
    return region


def attach_region(descriptor: int) -> SharedRegion:
    """The region of another process, to be read."""
    return SharedRegion(descriptor, memoryview(_map(descriptor, writable=False)))


def above_standard(descriptor: int) -> int:
    """The descriptor, or one in its place where it is 0, 1 or 2, as it may be in a daemon that has closed those."""
    if descriptor > _STANDARD_MAX:
        return descriptor
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _STANDARD_MAX + 1)
    os.close(descriptor)
    return moved


_STANDARD_MAX = 2


def _map(descriptor: int, *, writable: bool) -> mmap.mmap:
    protection = mmap.PROT_READ | mmap.PROT_WRITE if writable else mmap.PROT_READ
    return mmap.mmap(descriptor, os.fstat(descriptor).st_size, prot=protection)


def _allocate(descriptor: int, start: int, length: int) -> None:
    """Give a part of the file its memory. In steps: one that a signal interrupts begins again."""
    try:
        for at in range(start, start + length, GRID_BYTES):
            os.posix_fallocate(descriptor, at, min(GRID_BYTES, start + length - at))
    except OSError as error:
        raise MemoryError(f"no memory for the staged copies of a state: {error}") from error


def check_sharing() -> None:
    """Raise UsageError where this system cannot share memory in this way."""
    if getattr(sys, "frozen", False):
        raise UsageError(
            f"worker_process needs a Python interpreter, which {sys.executable} is not: it is a frozen program; open "
            "without it: threads save"
        )
    if not hasattr(os, "memfd_create"):
        raise UsageError("worker_process needs memfd_create, which this system lacks; open without it: threads save")


def _address(view: Buffer) -> int:
    import numpy as np  # is there long since when a state is staged, and the API must not import it

    address: int = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    return address
