"""Save in a worker process, which shares no interpreter lock with the training and may stand back as far as is wanted.

    save_async:  stage, flatten (into shared memory) ─▶ queue          as with the thread (background.py)
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
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.spawn import get_executable

from castore.checkpoint.request import SaveRequest
from castore.checkpoint.shared_region import SharedRegion, above_standard, create_region
from castore.checkpoint.stage import StagedPayload, StagedState, stage
from castore.checkpoint.worker_messages import (
    SOFTWARE,
    Channel,
    Failed,
    HeadNoted,
    Job,
    PlacedPayload,
    Progress,
    Ready,
    Saved,
    Setup,
    Warned,
)
from castore.errors import CastoreError, WorkerError, note_moved
from castore.host_memory import BufferPool
from castore.ids import SnapshotId
from castore.options import WORKER_NICENESS
from castore.refs import read_branch, ref_text
from castore.repository import Handle
from castore.snapshots import Snapshot, read_record
from castore.tensors import BytesPayload, FlatState, Glance

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

    def stage(self, seen: Glance, take_apart: Callable[[], FlatState]) -> StagedState:
        """Copy a state into shared memory (stage.py), pinned where it comes from a device. One at a time: `close` waits
        for it, so that no device writes to memory that is no longer locked.

        Raises WorkerError, MemoryError, or what `take_apart` raises.
        """
        with self._staging:
            if self._pools is None:
                self._region = create_region()
                self._pools = BufferPool(self._region.make_slab), BufferPool(self._region.make_pinned_slab)
            return stage(seen, take_apart, *self._pools)

    def save(self, staged: StagedState, request: SaveRequest, progress: Callable[[int, int], None]) -> Snapshot:
        """Carry out one save; blocks until it is durable. Its leaves cannot be read.

        Raises what `save_flat` raises, or WorkerError.
        """
        with self._saving:
            job = self._job(staged, request)
            process = self._running()
            before = self._head(request.branch)
            try:
                outcome, refused = self._converse(process.channel, job, progress)
            except (EOFError, OSError) as error:
                self._process = None
                raise self._lost(process.end(), job, before) from error
            except BaseException:
                self._process = None
                process.kill()  # it must not read what is about to be overwritten
                raise
        if isinstance(outcome, Failed):
            raise outcome.error from _WorkerTraceback(outcome.traceback)
        if refused is not None:
            note_moved(refused, outcome.snapshot.branch, outcome.snapshot.id)
            raise refused
        return outcome.snapshot

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
        flat = staged.flatten()
        payloads: list[PlacedPayload | BytesPayload | None] = []
        for payload in flat.payloads:
            if payload is None or isinstance(payload, BytesPayload):
                payloads.append(payload)
                continue
            assert isinstance(payload, StagedPayload)
            offsets = tuple(map(region.offset_of, payload.chunks))
            payloads.append(PlacedPayload(payload.raw_bytes, payload.item_bytes, payload.is_float, offsets))
        if request.parent is not None:
            request = replace(request, parent=ref_text(request.parent))  # a Snapshot reads its leaves through us
        return Job(
            flat.entries,
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

    def _converse(
        self, channel: Channel, job: Job, progress: Callable[[int, int], None]
    ) -> tuple[Saved | Failed, BaseException | None]:
        """The outcome, and the first warning that is an error here: the worker did not wait for what we make of it."""
        refused: BaseException | None = None
        channel.send(job)
        while True:
            match channel.receive():
                case HeadNoted(branch, snapshot_id):
                    self._handle.note_head(branch, snapshot_id)
                case Progress(done_bytes, total_bytes):
                    progress(done_bytes, total_bytes)
                case Warned(warning):
                    error = _raised_by(warning)
                    refused = error if refused is None else refused
                case (Saved() | Failed()) as outcome:
                    return outcome, refused
                case other:
                    raise AssertionError(other)

    def _head(self, branch: str) -> SnapshotId | None:
        """Where a branch is now; None also when that cannot be read, which the save will find itself."""
        with suppress(CastoreError):
            return read_branch(self._handle.backend, branch)
        return None

    def _lost(self, exit_status: int, job: Job, before: SnapshotId | None) -> WorkerError:
        """What to say of a worker that died. It may have moved the branch just before, from where it was `before`."""
        request, moved = job.request, None
        with suppress(CastoreError):
            head = read_branch(self._handle.backend, request.branch)
            # The moment of the call, in nanoseconds, tells this save from those of others; a clock may be coarse.
            if head not in {None, before} and read_record(self._handle.backend, head).time_ns == job.now_ns:
                moved = head
        how = f"branch {request.branch!r}: the worker process {_ended_by(exit_status)}"
        want = "If it was killed for want of memory, bound base_memory_bytes and Repository.limit_async(staged_bytes=…)"
        if moved is None:
            return WorkerError(
                f"{how} while it wrote the save of step {request.step}, which is lost; save again: the next save_async "
                f"starts another worker. {want}",
                exit_status=exit_status,
            )
        error = WorkerError(
            f"{how} when the save of step {request.step} had been committed; the next save_async starts another "
            f"worker. {want}",
            exit_status=exit_status,
        )
        self._handle.note_head(request.branch, moved)
        note_moved(error, request.branch, moved)
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
    executable = os.fsdecode(get_executable() or b"")  # sys.executable, or what multiprocessing was told
    if not executable:
        raise WorkerError(
            "the Python interpreter is not known; name it (multiprocessing.set_executable), or open without "
            "worker_process"
        )
    try:
        ours, its = _socket_pair()
        with its:
            try:
                process = _spawn(executable, its.fileno(), memory)
            except BaseException:
                ours.close()
                raise
    except OSError as error:
        raise WorkerError(f"the worker process cannot be started: {error}; open without worker_process") from error
    worker = _Process(process, ours)
    try:
        ours.settimeout(_START_S)
        worker.channel.send(setup)
        ready: Ready = worker.channel.receive()
        ours.settimeout(None)
    except (EOFError, OSError) as error:
        if isinstance(error, TimeoutError):
            process.kill()
        raise WorkerError(
            f"the worker process {_ended_by(worker.end())} while it started ({executable}); what it says stands in "
            "the error output; open without worker_process if it cannot run here",
            exit_status=process.returncode,
        ) from error
    if ready.software != SOFTWARE:
        worker.end()
        raise WorkerError(
            f"{SOFTWARE} runs here, and the worker process runs {ready.software}, which was installed meanwhile; "
            "start the training again, or open without worker_process"
        )
    return worker


def _socket_pair() -> tuple[socket.socket, socket.socket]:
    one, other = socket.socketpair()
    return socket.socket(fileno=above_standard(one.detach())), socket.socket(fileno=above_standard(other.detach()))


def _spawn(executable: str, end: int, memory: int) -> subprocess.Popen[bytes]:
    """Start the program with the descriptors of its end of the sockets and of the shared memory."""
    # Those of this interpreter, but -E and -I (which is -E, -P and -s) would hide our path. -P: what lies in the
    # working directory is not imported, unless our path says so.
    given = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    flags = ["-s" if flag == "-I" else flag for flag in given if flag != "-E"]
    hidden = "PYTHON" if sys.flags.ignore_environment else "PYTHONPATH"
    environment = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
    entries: Sequence[object] = sys.path
    path = os.pathsep.join(entry for entry in entries if isinstance(entry, str))  # Python passes over a Path too
    arguments = [str(end), str(memory), str(os.getpid()), str(WORKER_NICENESS)]
    # A signal that is meant for the whole job must not end it, not even before it can say so: what is blocked here is
    # blocked there from the first moment on. What must end or stop it cannot be blocked, nor can a fault of its own.
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        return subprocess.Popen(
            [executable, *flags, "-P", "-W", "ignore", "-c", _PROGRAM, *arguments],
            env={**environment, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(end, memory),
            # Ctrl-C in a terminal is for the training. Not a session of its own: where the kernel groups processes by
            # session (sched_autogroup), niceness would count for nothing between the two.
            process_group=0,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)


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


def _raised_by(warning: Warning) -> BaseException | None:
    """Give a warning here; what the filters make of it."""
    try:
        warnings.warn(warning, stacklevel=1)
    except BaseException as error:  # noqa: BLE001  warnings are errors here, or somebody's hook failed
        return error
    return None


def _ended_by(exit_status: int) -> str:
    if exit_status < 0:
        with suppress(ValueError):
            return f"was ended by {signal.Signals(-exit_status).name}"
    return f"ended with status {exit_status}"
