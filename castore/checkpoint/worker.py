"""Save in a worker process, which shares no interpreter lock with the training and may stand back as far as is wanted.

    save_async:  flatten ─ stage (into shared memory) ─▶ queue          as with the thread (background.py)
    the saver:                              queue ─▶ Job ─▶ the worker: hash, encode, write, commit
                                            ◀─ heads, progress, warnings, the snapshot or the error

The thread of background.py stays, with all that it promises: order, limits, errors, the end of the interpreter. It
only waits here for what the worker says.

Invariants:

1. A slot is given back when the worker has answered or is dead, never before.
2. The worker is a fresh interpreter, started by the first save and kept until `close`; a fork of a process with threads
   and a device could not be right. It ends with this process, however that ends.
3. A forked child has nothing of it: neither its memory nor its socket is touched there.
4. One that died fails the save that it was writing; the next save starts another.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from castore.checkpoint.request import SaveRequest
from castore.checkpoint.shared_region import SharedRegion, create_region
from castore.checkpoint.stage import StagedPayload, StagedState
from castore.checkpoint.worker_messages import (
    Answer,
    Channel,
    Failed,
    HeadNoted,
    Job,
    PlacedPayload,
    Progress,
    Saved,
    Setup,
    Warned,
)
from castore.errors import CastoreError, WorkerError
from castore.host_memory import BufferPool
from castore.options import WORKER_NICENESS
from castore.refs import read_branch, ref_text
from castore.repository import Handle
from castore.snapshots import Snapshot, read_record

_START_S = 120.0
"""A worker that has not answered by then is something else: it starts in less than a second."""
_END_S = 10.0
_PROGRAM = "from castore.checkpoint.worker_process import main; main()"
"""Not `-m`: what is defined in a module that runs as `__main__` cannot be unpickled here."""


class SaveWorker:
    """The worker process of one handle, and the memory that it shares. Thread-safe; made anew in a forked child."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle
        self._saving = threading.Lock()
        self._staging = threading.Lock()
        self._region: SharedRegion | None = None
        self._pools: tuple[BufferPool, BufferPool] | None = None
        self._process: _Process | None = None

    def pools(self) -> tuple[BufferPool, BufferPool]:
        """Slots in shared memory: for copies from host memory, and pinned ones for those from a device."""
        with self._staging:
            if self._pools is None:
                self._region = create_region()
                self._pools = BufferPool(self._region.make_slab), BufferPool(self._region.make_pinned_slab)
            return self._pools

    def save(self, staged: StagedState, request: SaveRequest, progress: Callable[[int, int], None]) -> Snapshot:
        """Carry out one save; blocks until it is durable. Its leaves cannot be read.

        Raises what `save_flat` raises, or WorkerError.
        """
        with self._saving:
            job = self._job(staged, request)
            process = self._running()
            try:
                outcome = self._converse(process.channel, job, progress)
            except (EOFError, OSError) as error:
                self._process = None
                raise self._lost(process.end(), job) from error
            except BaseException:
                self._process = None
                process.kill()  # it must not read what is about to be overwritten
                raise
        if isinstance(outcome, Failed):
            raise outcome.error from _WorkerTraceback(outcome.traceback)
        return outcome.snapshot

    @property
    def pid(self) -> int | None:
        """Of the process; None when none runs."""
        process = self._process
        return process.pid if process is not None and process.is_alive else None

    def close(self) -> None:
        """End the worker, and let go of the memory. The next save makes them again."""
        with self._saving, self._staging:
            process, self._process = self._process, None
            if process is not None:
                process.end()
            region, self._region, self._pools = self._region, None, None
            if region is not None:
                region.close()

    def _job(self, staged: StagedState, request: SaveRequest) -> Job:
        region, handle = self._region, self._handle
        if region is None:
            raise WorkerError("the repository was closed by another thread while a save was waiting; save again")
        payloads: list[PlacedPayload | None] = []
        for payload in staged.flat.payloads:
            if payload is None:
                payloads.append(None)
                continue
            assert isinstance(payload, StagedPayload)
            offsets = tuple(map(region.offset_of, payload.chunks))
            payloads.append(PlacedPayload(payload.raw_bytes, payload.item_bytes, payload.is_float, offsets))
        if request.parent is not None:
            request = replace(request, parent=ref_text(request.parent))  # a Snapshot reads its leaves through us
        return Job(
            tuple(staged.flat.entries),
            tuple(payloads),
            request,
            handle.seen_head(request.branch),
            handle.clock(),
            handle.base_memory_bytes,
        )

    def _running(self) -> _Process:
        if self._process is not None and not self._process.is_alive:  # killed while it had nothing to do
            self._process.end()
            self._process = None
        if self._process is None:
            assert self._region is not None
            self._process = _start(self._region.descriptor, Setup(self._handle.backend.location, self._handle.config))
        return self._process

    def _converse(self, channel: Channel, job: Job, progress: Callable[[int, int], None]) -> Saved | Failed:
        channel.send(job)
        while True:
            match channel.receive():
                case HeadNoted(branch, snapshot_id):
                    self._handle.note_head(branch, snapshot_id)
                case Progress(done_bytes, total_bytes):
                    progress(done_bytes, total_bytes)
                case Warned(warning):
                    channel.send(Answer(_raised_by(warning)))
                case (Saved() | Failed()) as outcome:
                    return outcome
                case other:
                    raise AssertionError(other)

    def _lost(self, exit_status: int, job: Job) -> WorkerError:
        """What to say of a worker that died. It may have moved the branch just before."""
        request, how = job.request, _ended_by(exit_status)
        error = WorkerError(
            f"branch {request.branch!r}: the worker process {how} while it wrote the save of step {request.step}, "
            "which is lost; save again: the next save_async starts another worker. If it was killed for want of "
            "memory, bound base_memory_bytes and Repository.limit_async(staged_bytes=…)",
            exit_status=exit_status,
        )
        with suppress(CastoreError):
            head = read_branch(self._handle.backend, request.branch)
            # The moment of the call, in nanoseconds, tells this save from those of everybody else.
            if head is not None and read_record(self._handle.backend, head).time_ns == job.now_ns:
                self._handle.note_head(request.branch, head)
                error.add_note(f"branch {request.branch!r} has moved to the new snapshot {head[:12]}")
        return error


class _WorkerTraceback(Exception):  # noqa: N818  it is the cause of an error, shown above it
    """Where an error was raised in the worker process."""

    def __str__(self) -> str:
        return f"in the worker process\n\n{self.args[0]}"


class _Process:
    """A running worker. It is ended when the last reference is dropped, and at the exit of the interpreter."""

    def __init__(self, process: subprocess.Popen[bytes], end: socket.socket) -> None:
        self.channel = Channel(end)
        self._process = process
        self._finalizer = weakref.finalize(self, _end, process, end, os.getpid())

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def end(self) -> int:
        """Let it end, which it does at once when it has nothing to do; returns its exit status."""
        self._finalizer()
        return self._process.returncode

    def kill(self) -> None:
        """End it where it stands."""
        self._process.kill()
        self._finalizer()


def _start(memory: int, setup: Setup) -> _Process:
    """Raises WorkerError."""
    if not sys.executable:
        raise WorkerError("sys.executable: the Python interpreter is not known; open without worker_process")
    ours, its = socket.socketpair()
    arguments = [str(its.fileno()), str(memory), str(os.getpid()), str(WORKER_NICENESS)]
    try:
        with its:
            process = subprocess.Popen(
                # -P: what lies in the working directory is not imported, unless our own path says so
                [sys.executable, "-P", "-W", "ignore", "-c", _PROGRAM, *arguments],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(its.fileno(), memory),
                # Ctrl-C in a terminal is for the training. Not a session of its own: where the kernel groups processes
                # by session (sched_autogroup), niceness would count for nothing between the two.
                process_group=0,
            )
    except OSError as error:
        ours.close()
        raise WorkerError(f"the worker process cannot be started: {error}; open without worker_process") from error
    worker = _Process(process, ours)
    try:
        ours.settimeout(_START_S)
        worker.channel.send(setup)
        worker.channel.receive()
        ours.settimeout(None)
    except (EOFError, OSError) as error:
        if isinstance(error, TimeoutError):
            process.kill()
        raise WorkerError(
            f"the worker process {_ended_by(worker.end())} while it started ({sys.executable}); what it says stands in "
            "the error output; open without worker_process if it cannot run here",
            exit_status=process.returncode,
        ) from error
    return worker


def _end(process: subprocess.Popen[bytes], end: socket.socket, owner_pid: int) -> None:
    if os.getpid() != owner_pid:
        end.close()  # without shutdown, which would cut our parent off
        process.returncode = 0  # nobody's child here: else Popen warns that it still runs
        return
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)  # forked children may hold the socket too, so that closing it says nothing
    end.close()
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _raised_by(warning: Warning) -> Exception | None:
    """Give a warning here; what the filters make of it."""
    try:
        warnings.warn(warning, stacklevel=1)
    except Exception as error:  # noqa: BLE001  warnings are errors here, or somebody's hook failed
        return error
    return None


def _ended_by(exit_status: int) -> str:
    if exit_status < 0:
        with suppress(ValueError):
            return f"was ended by {signal.Signals(-exit_status).name}"
    return f"ended with status {exit_status}"
