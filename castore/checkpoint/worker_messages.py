"""What a process and its worker process say to each other, one message after another on a private pair of sockets.

    the process                                the worker
    Setup            ──▶
                     ◀──                       Ready
    Job              ──▶
                     ◀──                       HeadNoted, Progress   any number
                     ◀──                       Warned                any number, each answered:
    Answer           ──▶
                     ◀──                       Saved or Failed       ends the job

Messages are pickles: both ends run the same code as the same user, nobody else holds the sockets, and nothing of it
reaches a disk. The bytes of a state do not pass here: they lie in shared memory, and a job names their places.
"""

from __future__ import annotations

import pickle
import socket
import struct
from dataclasses import dataclass
from typing import Any

from castore.checkpoint.request import SaveRequest
from castore.format.config import Config
from castore.format.manifest import Entry
from castore.ids import SnapshotId
from castore.repository import Head
from castore.snapshots import Snapshot

_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Setup:
    """What the worker opens."""

    root: str
    config: Config


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker has started."""


@dataclass(frozen=True, slots=True)
class PlacedPayload:
    """A staged payload, by the place of each chunk in the shared region."""

    raw_bytes: int
    item_bytes: int
    is_float: bool
    offsets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Job:
    """One save."""

    entries: tuple[Entry, ...]
    payloads: tuple[PlacedPayload | None, ...]
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
    """A warning, to be given where somebody hears it; the worker waits for the answer."""

    warning: Warning


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a warning."""

    error: Exception | None
    """Raise it: warnings are errors there."""


@dataclass(frozen=True, slots=True)
class Saved:
    """The snapshot is durable, and the branch names it."""

    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class Failed:
    """The save failed."""

    error: BaseException
    traceback: str


class Channel:
    """One end. Belongs to one thread at a time."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def send(self, message: object) -> None:
        """Raises OSError when the other end is gone."""
        data = pickle.dumps(message, protocol=5)
        self._end.sendall(_LENGTH.pack(len(data)) + data)

    def receive(self) -> Any:
        """The next message; blocks. Raises EOFError or OSError when the other end is gone."""
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        return pickle.loads(self._read(length))  # noqa: S301  from the process that started us, or that we started

    def _read(self, length: int) -> bytearray:
        data = bytearray(length)
        room = memoryview(data)
        while room:
            count = self._end.recv_into(room)
            if not count:
                raise EOFError("the other end is gone")
            room = room[count:]
        return data
