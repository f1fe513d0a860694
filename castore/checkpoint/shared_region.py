"""Memory that two processes see: where a worker process finds the staged copies.

It is one memory file without a name, so that nothing is left behind however the processes end, and no limit of /dev/shm
applies. The file is as long as the machine's memory and sparse: a page takes memory from the first touch on. So one
descriptor and one mapping serve every pool, a place is an offset, and slots are reused while they are warm.
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from collections.abc import Callable

from castore.errors import UsageError, WorkerError
from castore.ids import Buffer
from castore.tensors import pin


class SharedRegion:
    """One region. Thread-safe. A view keeps the mapping, not the file, alive after `close`."""

    def __init__(self, descriptor: int, memory: memoryview) -> None:
        """Takes the descriptor over."""
        self.descriptor = descriptor
        self._unpin: list[Callable[[], None]] = []
        self._finalizer = weakref.finalize(self, _let_go, descriptor, self._unpin, os.getpid())
        self._memory = memory
        self._length = len(memory)
        self._start = _address(memory)
        self._lock = threading.Lock()
        self._taken = 0

    def make_slab(self, length: int) -> memoryview:
        """Memory that nobody has had yet."""
        with self._lock:
            start = self._taken
            if start + length > self._length:
                raise MemoryError(f"the staged copies would take more than the machine's {self._length} bytes")
            self._taken += length
        return self.view(start, length)

    def make_pinned_slab(self, length: int) -> memoryview:
        """The same, page-locked, so that the copy engine of a device can write to it. Raises WorkerError."""
        slab = self.make_slab(length)
        try:
            self._unpin.append(pin(_address(slab), length))
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
        """Let go of the file; its memory is free when the last view in any process is."""
        self._finalizer()
        self._memory = memoryview(b"")
        self._length = 0


def _let_go(descriptor: int, unpin: list[Callable[[], None]], owner_pid: int) -> None:
    os.close(descriptor)
    if os.getpid() == owner_pid:  # a forked child has no device
        for undo in unpin:
            undo()


def create_region() -> SharedRegion:
    """A region as long as the machine's memory. Raises WorkerError when limits of this process forbid it."""
    try:
        descriptor = os.memfd_create("castore-staged", os.MFD_CLOEXEC)
        try:
            os.truncate(descriptor, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
            memory = _map(descriptor, writable=True)
        except BaseException:
            os.close(descriptor)
            raise
    except OSError as error:
        raise WorkerError(
            f"no memory can be shared with a worker process: {error}; lift the limit (ulimit -v, -f, -n), or open the "
            "repository without worker_process"
        ) from error
    return SharedRegion(descriptor, memory)


def attach_region(descriptor: int) -> SharedRegion:
    """The region of another process, to be read."""
    return SharedRegion(descriptor, _map(descriptor, writable=False))


def _map(descriptor: int, *, writable: bool) -> memoryview:
    protection = mmap.PROT_READ | mmap.PROT_WRITE if writable else mmap.PROT_READ
    return memoryview(mmap.mmap(descriptor, os.fstat(descriptor).st_size, prot=protection))


def check_sharing() -> None:
    """Raise UsageError where this system cannot share memory in this way."""
    if not hasattr(os, "memfd_create"):
        raise UsageError("worker_process needs memfd_create, which this system lacks; open without it: threads save")


def _address(view: Buffer) -> int:
    import numpy as np  # is there long since when a state is staged, and the API must not import it

    address: int = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    return address
