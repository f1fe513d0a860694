"""Read many chunks into their places: ordered by pack and offset, several threads, each verified before it counts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Protocol

from castore.checkpoint.read_ahead import ReadAhead
from castore.errors import CastoreError
from castore.ids import ChunkId
from castore.options import GRID_BYTES
from castore.store import ChunkStore, Locations
from castore.threads import worker_count

_BATCH_BYTES, _BATCH_JOBS_MAX = 4 * GRID_BYTES, 64
"""What one thread takes at a time: neighbours in a pack, little enough that the threads finish together. Handing over
costs as much as a small chunk, so those go together."""


class Destination(Protocol):
    """Where the bytes of a leaf go."""

    @property
    def direct(self) -> bool:
        """Whether `memory()` may be filled before verification (nobody else can see it yet)."""
        ...

    def memory(self) -> memoryview:
        """All of the leaf's bytes, writable."""
        ...

    def write(self, start: int, data: memoryview) -> None:
        """Copy verified bytes to their place."""
        ...


@dataclass(frozen=True, slots=True)
class FetchJob:
    """One chunk, or a part of one, to be put into place."""

    path: str
    chunk_id: ChunkId
    chunk_bytes: int
    locations: Locations
    destination: Destination
    start: int
    """Offset in the destination."""
    skip: int = 0
    """Bytes of the chunk to leave out at its beginning."""
    take: int | None = None
    """Bytes of the chunk to use after those; None: the rest."""


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.buffer = bytearray(GRID_BYTES)


_scratch = _Scratch()


def fetch_all(
    store: ChunkStore,
    jobs: Sequence[FetchJob],
    *,
    verify: bool,
    touched: Callable[[str], None],
    progress: Callable[[int], None],
) -> None:
    """Carry out the jobs; `touched` gets a path before its destination is first written to.

    Raises the first error, with the leaf's path in front; jobs not yet begun are dropped.
    """
    ordered = sorted(jobs, key=_place)
    batches = list(_batches(ordered))
    read_ahead = ReadAhead(store, [job.locations for job in ordered])
    failed = threading.Event()

    def run(batch: range) -> None:
        read_ahead.reach(batch.start)
        for job in ordered[batch.start : batch.stop]:
            if failed.is_set():
                return
            try:
                _fetch(store, job, verify=verify, touched=touched)
                progress(job.chunk_bytes)
            except BaseException as error:
                failed.set()
                if isinstance(error, CastoreError):
                    error.args = (f"leaf {job.path!r}: {error}", *error.args[1:])
                raise

    if len(batches) <= 1 or worker_count() == 1:
        for batch in batches:
            run(batch)
        return
    with ThreadPoolExecutor(worker_count(), thread_name_prefix="castore-read") as pool:
        try:
            futures = [pool.submit(run, batch) for batch in batches]
            wait(futures)  # sleeping once: a wake-up for each takes the interpreter from those that decode
        except BaseException:  # Ctrl-C
            failed.set()
            raise
        for future in futures:
            future.result()


def _batches(jobs: Sequence[FetchJob]) -> Iterator[range]:
    start, batch_bytes = 0, 0
    for index, job in enumerate(jobs):
        batch_bytes += job.chunk_bytes
        if batch_bytes >= _BATCH_BYTES or index + 1 - start == _BATCH_JOBS_MAX:
            yield range(start, index + 1)
            start, batch_bytes = index + 1, 0
    if start < len(jobs):
        yield range(start, len(jobs))


def _place(job: FetchJob) -> tuple[str, int]:
    first = job.locations[0]
    return first.pack_id, first.row.offset


def _fetch(store: ChunkStore, job: FetchJob, *, verify: bool, touched: Callable[[str], None]) -> None:
    whole = job.skip == 0 and job.take is None
    if job.destination.direct and whole:
        touched(job.path)
        target = job.destination.memory()[job.start : job.start + job.chunk_bytes]
        store.read_into(job.chunk_id, job.locations, target, verify=verify)
        return
    scratch = memoryview(_scratch.buffer)[: job.chunk_bytes]
    store.read_into(job.chunk_id, job.locations, scratch, verify=verify)
    stop = None if job.take is None else job.skip + job.take
    touched(job.path)
    job.destination.write(job.start, scratch[job.skip : stop])
