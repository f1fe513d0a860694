"""What is measured and how: time, peak memory, bytes on disk, bytes read, a cold page cache.

Peak memory is the kernel's own high-water mark (VmHWM), reset before each call through /proc/self/clear_refs;
where that is missing, a thread samples the resident size. It counts what a contestant keeps between calls as
well, because the base is taken before the contestant opens its store.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Self

import psutil
import torch

from bench.states import State, tensors

SAMPLE_S = 0.002
WAKE_S = 0.05
MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs"})


def timed(call: Callable[[], object]) -> float:
    """Seconds that `call` takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


@dataclass
class PeakMemory:
    """As a context manager: the highest resident size while it was open."""

    peak_bytes: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)
    _sampler: threading.Thread | None = None

    def __enter__(self) -> Self:
        if not _reset_high_water():
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._sampler is None:
            self.peak_bytes = _status_bytes("VmHWM")
        else:
            self._stop.set()
            self._sampler.join()

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            self.peak_bytes = max(self.peak_bytes, resident_bytes())


def resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def settle() -> None:
    """Return freed memory to the system and finish earlier writes, so that nobody pays for another."""
    gc.collect()
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    os.sync()


def warm_memory(size_bytes: int) -> None:
    """Touch so much memory and free it again, so that what follows finds it at once.

    A virtual machine gives free memory back to its host and gets it again page by page, at 0.2 GB/s where it
    was measured: several times what writing to the disk costs, paid by whoever needs memory after a pause.
    """
    pages = torch.empty(size_bytes, dtype=torch.uint8)
    pages[:: mmap.PAGESIZE] = 1


def wake() -> None:
    """Keep the cores busy for a moment, as the training step before a save does.

    An idle virtual processor needs milliseconds to come up to speed: a copy of 119 MB that follows a wait takes 10 ms,
    one that follows work 6. What is measured would depend on how long the measurement before had waited for the disk.
    """
    matrix = torch.rand(512, 512)
    until_s = time.perf_counter() + WAKE_S
    while time.perf_counter() < until_s:
        matrix @ matrix


def directory_bytes(directory: Path) -> int:
    """Bytes of all files under a directory, caches and indexes included."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def forget_pages(directory: Path) -> None:
    """Drop the files of a directory from the page cache, so that the next read comes from the disk."""
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # dirty pages stay
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def disk_read_bytes() -> int | None:
    """Bytes that this process has had read from the disk so far; None where the system does not say."""
    return _io_counter("read_bytes")


def disk_written_bytes() -> int | None:
    """Bytes that this process has had written to the disk so far; None where the system does not say."""
    return _io_counter("write_bytes")


@contextmanager
def fresh_directory(scratch: Path) -> Iterator[Path]:
    """A new directory under `scratch`, removed afterwards."""
    directory = scratch / uuid.uuid4().hex
    directory.mkdir(parents=True)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def file_system(path: Path) -> str:
    """Type of the file system that holds `path`, such as ext4."""
    real = path.resolve()
    mounts = [p for p in psutil.disk_partitions(all=True) if real.is_relative_to(p.mountpoint)]
    return max(mounts, key=lambda p: len(p.mountpoint)).fstype if mounts else "unknown"


def save_seconds(save: Callable[[], object], wait: Callable[[], object]) -> tuple[float, float]:
    """Seconds until `save` has returned, and until `wait` has; the cores were busy before, as by a training step."""
    wake()
    began_s = time.perf_counter()
    save()
    called_s = time.perf_counter()
    wait()
    return called_s - began_s, time.perf_counter() - began_s


def floor_seconds(states: Sequence[State], directory: Path) -> tuple[float, float]:
    """The least that an asynchronous save can wait, and the least that storing a copy can take: a plain copy of all
    tensors into warm buffers, and these in one file with one fsync. Each state is saved in turn, as contestants save
    them; means over the later ones, the first having made the buffers.
    """
    buffers: list[torch.Tensor] = []
    copies_s, writes_s = [], []

    def copy() -> None:
        for buffer, source in zip(buffers, sources, strict=True):
            buffer.copy_(source)

    def write() -> None:
        with (directory / "raw").open("wb", buffering=0) as file:
            for buffer in buffers:
                raw: Any = buffer.reshape(-1).view(torch.uint8).numpy()
                file.write(memoryview(raw))
            os.fsync(file.fileno())

    for state in states if len(states) > 1 else [*states, *states]:
        sources = tensors(state)
        if [source.shape for source in sources] != [buffer.shape for buffer in buffers]:
            buffers = [source.detach().clone(memory_format=torch.contiguous_format) for source in sources]
            continue
        copy_s, durable_s = save_seconds(copy, write)
        copies_s.append(copy_s)
        writes_s.append(durable_s - copy_s)
    return fmean(copies_s), fmean(writes_s)


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"/proc/self/status has no {name}")


def _io_counter(name: str) -> int | None:
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)
