"""What a process and its worker process say to each other, one message after another on a private pair of sockets.

    the process                                the worker
    Setup            ──▶
                     ◀──                       Ready
    Job              ──▶
                     ◀──                       HeadNoted, Progress, Warned   any number
                     ◀──                       Saved or Failed               ends the job

Messages are pickles: both ends run the same code as the same user, nobody else holds the sockets, and nothing of it
reaches a disk. Arrays do not pass here: they lie in shared memory, and a job names their places. Numbers and texts do.
"""

from __future__ import annotations

import pickle
import socket
import struct
import threading
import traceback
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from castore.checkpoint.request import SaveRequest
from castore.checkpoint.save import software
from castore.errors import WorkerError
from castore.format.config import Config
from castore.format.manifest import Entry
from castore.ids import SnapshotId
from castore.repository import Head
from castore.snapshots import Snapshot
from castore.tensors import BytesPayload

_LENGTH = struct.Struct("<Q")
SOFTWARE = software()
"""What runs here, as of the import: a castore that is installed over it later is another one."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What the worker opens."""

    root: str
    config: Config


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker has started."""

    software: str
    """What it runs."""


@dataclass(frozen=True, slots=True)
class PlacedPayload:
    """The staged payload of an array, by the place of each chunk in the shared region."""

    raw_bytes: int
    item_bytes: int
    is_float: bool
    offsets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Job:
    """One save."""

    entries: tuple[Entry, ...]
    payloads: tuple[PlacedPayload | BytesPayload | None, ...]
    request: SaveRequest
    head: Head | None
    """Of the branch, as the process last saw it."""
    now_ns: int
    base_memory_bytes: int | None


@dataclass(frozen=True, slots=True)
class HeadNoted:
    """What the save has seen or made the head of a branch."""

    branch: str
    snapshot_id: SnapshotId | None


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the save is."""

    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Warned:
    """A warning, to be given where somebody hears it."""

    warning: Warning


@dataclass(frozen=True, slots=True)
class Saved:
    """The snapshot is durable, and the branch names it."""

    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class Failed:
    """The save failed. The error is one of ours or of a stranger's, who may have made it so that it cannot travel."""

    data: bytes
    """A pickle of it; empty when it cannot be pickled."""
    text: str
    notes: tuple[str, ...]
    """Apart: not every pickle of an error has them, and they say whether the branch has moved."""
    traceback: str

    @property
    def error(self) -> BaseException:
        """The error, made anew; a WorkerError with its text where only the worker knows it."""
        error: object = None
        with suppress(Exception):
            error = pickle.loads(self.data)  # noqa: S301  from the process that we started
        if not isinstance(error, BaseException):
            error = WorkerError(f"the worker process raised what only it knows: {self.text}")
        if self.notes:
            error.__notes__ = list(self.notes)
        return error


def failed(error: BaseException) -> Failed:
    """Describe an error that is being handled. Nothing that the error does can make this fail."""
    data, notes = b"", tuple[str, ...]()
    with suppress(Exception):
        notes = tuple(map(str, error.__notes__))
    with suppress(Exception):
        data = pickle.dumps(error, protocol=5)
    return Failed(data, traceback.format_exception_only(error)[0].strip(), notes, traceback.format_exc())


class Channel:
    """One end. Any thread may send, one may receive."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._sending = threading.Lock()

    def send(self, message: object) -> None:
        """Raises OSError when the other end is gone."""
        data = pickle.dumps(message, protocol=5)  # without the lock: what is pickled may warn, which sends too
        with self._sending:
            self._end.sendall(_LENGTH.pack(len(data)))
            self._end.sendall(data)

    def receive(self) -> Any:
        """The next message; blocks.

        Raises EOFError or OSError when the other end is gone, WorkerError when the message cannot be read.
        """
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        data = self._read(length)
        try:
            return pickle.loads(data)  # noqa: S301  from the process that started us, or that we started
        except Exception as error:
            raise WorkerError(
                f"a message between the training and its worker process cannot be read: {error!r}; the state or the "
                "arguments hold what only one of them knows; open without worker_process"
            ) from error

    def _read(self, length: int) -> bytearray:
        data = bytearray(length)
        room = memoryview(data)
        while room:
            count = self._end.recv_into(room)
            if not count:
                raise EOFError("the other end is gone")
            room = room[count:]
        return data
