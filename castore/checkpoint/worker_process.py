"""The worker process: carries out the saves of another process, from copies in shared memory.

    main() with arguments SOCKET MEMORY PARENT NICENESS: two descriptors, the parent's process id, how far to stand back

Invariants:

1. It ends as soon as its parent has, mostly within milliseconds, and looks for it once more just before the branch
   moves. In that moment a save of a process that was killed may still be committed; the next one finds it, or its own
   save is refused with ConflictError.
2. It ends when its parent closes the socket, and by no signal that is meant for the whole job, which its parent has
   blocked: whether the training stops is the parent's to decide, and the parent waits for its saves.
3. It imports no torch, reads the shared memory and never writes to it.
4. It keeps nothing between saves but what a handle keeps: the index, decoded manifests and the bases of the next save.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
import time
import warnings
from contextlib import suppress
from dataclasses import replace
from types import EllipsisType
from typing import Any, TextIO

from castore.backend import LocalBackend
from castore.checkpoint.plan import grid
from castore.checkpoint.save import save_flat
from castore.checkpoint.shared_region import SharedRegion, attach_region
from castore.checkpoint.stage import StagedPayload
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
    failed,
)
from castore.errors import CastoreWarning, WorkerError
from castore.ids import SnapshotId
from castore.repository import Handle, Head
from castore.snapshots import Leaf
from castore.tensors import BytesPayload, FlatState, Payload

_PROGRESS_EVERY_S = 0.1
"""Each message wakes a thread of the training process."""


class Worker:
    """One worker: its handle is that of the parent but for the heads, which are the parent's own."""

    def __init__(self, channel: Channel, region: SharedRegion, parent_pid: int) -> None:
        self._channel = channel
        self._region = region
        self._parent_pid = parent_pid
        self._said_s = 0.0

    def run(self) -> None:
        """Carry out jobs until the parent closes the socket."""
        warnings.simplefilter("always", CastoreWarning)  # all others are ignored from the start
        warnings.showwarning = self._warn
        setup: Setup = self._channel.receive()
        handle = _WorkerHandle(setup, self._channel.send)
        self._channel.send(Ready(SOFTWARE))
        while True:
            try:
                job: Job = self._channel.receive()
            except (EOFError, OSError):
                break
            except WorkerError as error:
                outcome: Saved | Failed = failed(error)
            else:
                outcome = self._outcome(handle, job)
            self._channel.send(outcome)
        handle.close()

    def _outcome(self, handle: _WorkerHandle, job: Job) -> Saved | Failed:
        try:
            handle.begin(job)
            flat = FlatState(job.entries, tuple(map(self._staged, job.payloads)))
            snapshot = save_flat(handle, flat, job.request, progress=self._progress)
        except BaseException as error:  # noqa: BLE001  whatever it is, the caller must hear of it
            return failed(error)
        return Saved(replace(snapshot, _read_leaves=_no_leaves))

    def _staged(self, payload: PlacedPayload | BytesPayload | None) -> Payload | None:
        if not isinstance(payload, PlacedPayload):
            return payload
        lengths = (stop - start for start, stop in grid(payload.raw_bytes))
        chunks = tuple(map(self._region.view, payload.offsets, lengths))
        return StagedPayload(payload.raw_bytes, payload.item_bytes, payload.is_float, chunks)

    def _progress(self, done_bytes: int, total_bytes: int) -> None:
        if os.getppid() != self._parent_pid:  # the last call comes just before the branch moves
            os._exit(1)
        now_s = time.monotonic()
        if done_bytes >= total_bytes or now_s - self._said_s >= _PROGRESS_EVERY_S:
            self._said_s = now_s
            self._channel.send(Progress(done_bytes, total_bytes))

    def _warn(  # noqa: PLR0917  the signature of warnings.showwarning
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        del filename, lineno, file, line  # of the worker, where nobody looks
        if issubclass(category, CastoreWarning):
            self._channel.send(Warned(message if isinstance(message, Warning) else category(message)))


class _WorkerHandle(Handle):
    """A handle whose heads are those of the parent's, at the begin of a job and in what is told of it."""

    def __init__(self, setup: Setup, say: Any) -> None:
        super().__init__(LocalBackend(setup.root), setup.config, clock=lambda: self._now_ns)
        self._say = say
        self._now_ns = 0
        self._head: Head | None = None

    def begin(self, job: Job) -> None:
        self._now_ns = job.now_ns
        self._head = job.head
        self.base_memory_bytes = job.base_memory_bytes

    def seen_head(self, branch: str) -> Head | None:  # noqa: ARG002  a job has one branch
        return self._head

    def note_head(
        self,
        branch: str,
        snapshot_id: SnapshotId | None,
        *,
        unless_noted_since: Head | EllipsisType | None = ...,  # noqa: ARG002  nobody else notes any here
    ) -> None:
        self._say(HeadNoted(branch, snapshot_id))


def _no_leaves(snapshot_id: SnapshotId) -> tuple[Leaf, ...]:
    """In place of what a snapshot reads its leaves with, which cannot travel; the parent puts its own there."""
    raise AssertionError(snapshot_id)


def _stand_back(niceness: int) -> None:
    """Leave the cores to the training. Threads that are started later inherit it."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, niceness)


def _watch(parent_pid: int) -> None:
    """End this process as soon as its parent has, whatever the saving thread is waiting for.

    The socket does not tell: children that the parent forked hold the other end open.
    """
    with suppress(OSError, AttributeError):  # an old kernel, or a sandbox: then by looking now and then
        descriptor = os.pidfd_open(parent_pid)
        if os.getppid() == parent_pid:
            select.select([descriptor], [], [])
    while os.getppid() == parent_pid:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    """Run until the parent closes the socket or ends."""
    end, memory, parent_pid, niceness = map(int, sys.argv[1:5])
    _stand_back(niceness)
    threading.Thread(target=_watch, args=(parent_pid,), name="castore-watch", daemon=True).start()
    Worker(Channel(socket.socket(fileno=end)), attach_region(memory), parent_pid).run()
    os._exit(0)  # everything is closed; the interpreter would only take its time
