"""Copies of arrays into staging memory: asked for together, waited for once.

From host memory the threads that torch computes with copy, in `wait`, or threads of our own, beside the caller; past
the caches (_memory.c). From a device its copy engine does, on streams of their own, while the current stream goes on
with other work; it begins when what was queued before is done, so that it sees the state at the call.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from castore.tensors.arrays import Array, words_on_device
from castore.tensors.lazy import loaded_torch, require_torch
from castore.tensors.strided import memory_array
from castore.threads import worker_count

if TYPE_CHECKING:
    import numpy.typing as npt


def _compiled() -> ModuleType | None:
    if os.environ.get("CASTORE_KERNEL") == "numpy":
        return None
    try:
        from castore.tensors import _memory
    except ImportError:  # installed without a compiler
        return None
    return _memory


_memory = _compiled()


def pinned_slab(length: int) -> npt.NDArray[np.uint8]:
    """Page-locked host memory, which the copy engine of a device can write to by itself."""
    torch = require_torch("CUDA tensors")
    slab: npt.NDArray[np.uint8] = torch.empty(length, dtype=torch.uint8, pin_memory=True).numpy()
    return slab


_PORTABLE = 1
"""cudaHostRegisterPortable: pinned for every device of the process."""


def pin(address: int, length: int) -> Callable[[], None]:
    """Lock the pages of host memory that others made; returns what undoes it, for while the memory is still there.

    Raises RuntimeError when the driver refuses.
    """
    runtime = require_torch("CUDA tensors").cuda.cudart()
    status = int(runtime.cudaHostRegister(address, length, _PORTABLE))
    if status != 0:
        raise RuntimeError(f"the driver does not lock {length} bytes of it (cudaHostRegister returns {status})")
    return lambda: runtime.cudaHostUnregister(address) and None


def _team() -> tuple[int, int]:
    """The threads that torch computes with, for _memory.finish: address of GOMP_parallel, and how many. Zeros where
    torch has none, and in a process that was forked: OpenMP would wait for the threads of its parent, for ever.
    """
    torch = loaded_torch()
    threads = torch.get_num_threads() if torch is not None and not _was_forked(os.getpid()) else 1
    address = _gomp_parallel() if threads > 1 else 0
    return (address, threads) if address else (0, 0)


_STAT = Path("/proc/self/stat")
_FLAGS_FIELD = 9
_FORKED_WITHOUT_EXEC = 0x40
"""PF_FORKNOEXEC of Linux's sched.h."""


@cache
def _was_forked(pid: int) -> bool:
    """Whether this process, of that id, is a forked copy of another rather than a program of its own. The kernel is
    asked, for the fork may be older than the import of this module. True where it does not say.
    """
    del pid  # a child inherits what the cache holds of its parent
    try:
        fields = _STAT.read_text().rpartition(")")[2].split()  # the name before may hold anything
        return bool(int(fields[_FLAGS_FIELD - 3]) & _FORKED_WITHOUT_EXEC)
    except (OSError, ValueError, IndexError):
        return True


_MAPS = Path("/proc/self/maps")
_OPENMP = re.compile(r"(/.*/lib(?:gomp|iomp|omp)[^/\n]*\.so[^/\n]*)$", re.MULTILINE)


@cache
def _gomp_parallel() -> int:
    """Its address in the OpenMP library that is loaded; 0 where there is none, or several: whose threads torch computes
    with is not known then.
    """
    try:
        libraries = set(_OPENMP.findall(_MAPS.read_text(errors="replace")))
        if len(libraries) != 1:
            return 0
        library = ctypes.CDLL(libraries.pop(), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):  # another system, or another kind of library
        return 0


Piece = tuple[memoryview, int]
"""Memory to fill, and the address of as many bytes in host memory."""


class HostCopies:
    """Copies from host memory that are under way. Whoever starts them keeps the sources alive. Not thread-safe."""

    def __init__(self) -> None:
        self._finish: list[Callable[[], None]] = []

    def start(self, pieces: Sequence[Piece]) -> None:
        """Have all of them filled by the time that `wait` returns; where no compiler was at hand, do it now."""
        if _memory is not None:
            team = _team()
            helpers = 0 if any(team) else max(1, worker_count() - 1)
            self._finish.append(partial(_memory.finish, _memory.start(tuple(pieces), helpers), *team))
            return
        for target, address in pieces:
            source = memory_array(address, (len(target),), (1,), "|u1", owner=None)
            np.copyto(np.frombuffer(target, np.uint8), source)

    def wait(self) -> None:
        """Until every byte has arrived."""
        while self._finish:
            self._finish.pop()()


class DeviceCopies:
    """Copies that are under way. Not thread-safe."""

    def __init__(self) -> None:
        self._streams: dict[Any, Any] = {}
        self._sources: list[Any] = []
        """Contiguous copies on the device, which must live until the streams are done."""

    def start(self, array: Array, slots: Sequence[memoryview]) -> None:
        """Begin to copy the logical bytes of an array on a CUDA device into pinned slots, which they fill in order."""
        torch = require_torch("CUDA tensors")
        value = array.value
        stream = self._stream(torch, value.device)
        with torch.cuda.stream(stream), torch.no_grad():
            if array.is_lazy:
                words = value.detach().resolve_conj().resolve_neg()
                words = torch.view_as_real(words) if words.is_complex() else words
            else:
                words = words_on_device(array)
            source = words.contiguous().reshape(-1).view(torch.uint8)
            at = 0
            for slot in slots:
                torch.frombuffer(slot, dtype=torch.uint8).copy_(source[at : at + len(slot)], non_blocking=True)
                at += len(slot)
            self._sources.append(source)

    def wait(self) -> None:
        """Until every byte has arrived."""
        for stream in self._streams.values():
            stream.synchronize()
        self._sources.clear()

    def _stream(self, torch: Any, device: Any) -> Any:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        return stream
