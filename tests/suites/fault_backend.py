"""A backend that crashes or fails at any chosen call, and knows what a power cut would leave.

Wrap any backend, run once without a fault to learn the calls, then once per call:

    calls = FaultBackend(MemoryBackend()).calls after a save
    for index, call in enumerate(calls):
        faulty = FaultBackend(fresh(), Fault(index, "during"))
        with pytest.raises(SimulatedCrash):
            save(faulty)
        for unsynced in UNSYNCED:
            check(faulty.restore(tmp_path / unsynced, unsynced=unsynced))

A crash raises SimulatedCrash, a BaseException, and so does every later call: a dead process cleans nothing
up. What is on disk then follows the contract in castore/backend/base.py, not what the wrapped backend happens
to do: what a call made durable is there, what was under way is there or not, claims and open streams are in
any state. Whether the local backend itself keeps that contract is checked one level below, in power_loss.py.
"""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from castore.backend import LocalBackend, MemoryBackend
from castore.backend.base import (
    TEMPORARY_PREFIX,
    Backend,
    Claim,
    ClaimInfo,
    FileInfo,
    PackSink,
    RangeReader,
    byte_view,
    os_error,
)
from castore.errors import CastoreError

if TYPE_CHECKING:
    import builtins
    from collections.abc import Iterator
    from pathlib import Path

    from castore.ids import Buffer

Moment = Literal["before", "during", "after"]
"""Of the call's effect. During: the effect is there but not synced; of a stream write, half of the bytes."""
MOMENTS: tuple[Moment, ...] = ("before", "during", "after")

Unsynced = Literal["kept", "lost", "torn"]
"""What became of what was not synced.

kept: all of it is there, as after SIGKILL.
lost: none of it, as after a power cut.
torn: as after a power cut that came when some was written back: names are there, released claims too, and of
data that nobody synced half is zeros."""
UNSYNCED: tuple[Unsynced, ...] = ("kept", "lost", "torn")

CACHE_PREFIX = "cache/"
"""The index writes there without the backend, so nothing is known of it; a restored directory has none."""

WRITING_OPERATIONS = frozenset(
    {"put_if_absent", "create_stream", "write", "flush_hint", "commit", "abort"}
    | {"delete", "move", "compare_and_swap", "claim", "renew", "release"}
)


class SimulatedCrash(BaseException):
    """The process ends here. No Exception: nothing that handles errors may survive its own death."""


class Call(NamedTuple):
    """One numbered call: its number is its place in FaultBackend.calls."""

    operation: str
    name: str

    @property
    def writes(self) -> bool:
        """Whether the call can change anything."""
        return self.operation in WRITING_OPERATIONS


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens at which call."""

    at: int
    moment: Moment = "before"
    errno: int | None = None
    """ENOSPC, EIO, …: raised as the error that the contract promises for it. None: a crash."""
    lasting: bool = False
    """The same error at every later writing call, like a disk that stays full."""


@dataclass(slots=True)
class _Call:
    """A call under way: what it changes, and whether the fault strikes when only half is done."""

    during: bool
    effects: dict[str, bytes | None] = field(default_factory=dict)
    """New content by name, None where the file was deleted."""


class FaultBackend:
    """See castore.backend.base.Backend for the contract, which holds until the fault strikes."""

    def __init__(self, inner: Backend, fault: Fault | None = None) -> None:
        self.inner = inner
        self.fault = fault
        self.calls: builtins.list[Call] = []
        self.crashed = False
        self._lock = threading.Lock()
        self._durable: dict[str, bytes] = {
            info.name: inner.read(info.name, max_bytes=info.size_bytes)
            for info in inner.list("")
            if not info.name.startswith(CACHE_PREFIX)
        }
        self._visible: dict[str, bytes | None] = {}
        """Effects that are there but not synced; None: deleted, but the deletion is not synced."""
        self._claims: dict[str, bytes] = {}
        self._released: dict[str, bytes] = {}
        self._sinks: builtins.list[FaultSink] = []

    # ---- after the crash -----------------------------------------------------------------------------------

    def survivors(self, *, unsynced: Unsynced) -> dict[str, bytes]:
        """Every file that is left, temporary ones included."""
        files = dict(self._durable)
        if unsynced == "lost":
            return files
        _apply(files, self._visible)
        claims = self._claims if unsynced == "kept" else self._released | self._claims
        open_sinks = {sink.temporary_name: bytes(sink.written) for sink in self._sinks}
        for name, data in (claims | open_sinks).items():
            files[name] = data if unsynced == "kept" else torn(data)
        return files

    def restore(self, directory: Path, *, unsynced: Unsynced) -> LocalBackend:
        """What the next process finds, in a new directory; nobody holds its claims."""
        for name, data in self.survivors(unsynced=unsynced).items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return LocalBackend(directory)

    def restore_in_memory(self, *, unsynced: Unsynced) -> MemoryBackend:
        """The same for code that needs no directory; temporary files are left out."""
        backend = MemoryBackend()
        for name, data in self.survivors(unsynced=unsynced).items():
            if TEMPORARY_PREFIX not in name:
                backend.put_if_absent(name, data)
        return backend

    # ---- the contract --------------------------------------------------------------------------------------

    @property
    def location(self) -> str:
        return self.inner.location

    def put_if_absent(self, name: str, data: Buffer) -> bool:
        content = bytes(byte_view(data))
        with self._call("put_if_absent", name) as call:
            stored = self.inner.put_if_absent(name, content)
            if stored:
                call.effects[name] = content
        return stored

    def create_stream(self, name: str) -> PackSink:
        with self._call("create_stream", name):
            sink = FaultSink(self, name, self.inner.create_stream(name), len(self.calls))
            self._sinks.append(sink)
        return sink

    def read(self, name: str, *, max_bytes: int) -> bytes:
        with self._call("read", name):
            return self.inner.read(name, max_bytes=max_bytes)

    def open_reader(self, name: str) -> RangeReader:
        with self._call("open_reader", name):
            return FaultReader(self, name, self.inner.open_reader(name))

    def list(self, prefix: str) -> Iterator[FileInfo]:
        with self._call("list", prefix):
            return self.inner.list(prefix)

    def temporaries(self, *, modified_before_ns: int) -> Iterator[FileInfo]:
        with self._call("temporaries", ""):
            return self.inner.temporaries(modified_before_ns=modified_before_ns)

    def stat(self, name: str) -> FileInfo | None:
        with self._call("stat", name):
            return self.inner.stat(name)

    def delete(self, name: str) -> bool:
        with self._call("delete", name) as call:
            deleted = self.inner.delete(name)
            if deleted:
                call.effects[name] = None
        return deleted

    def move(self, name: str, new_name: str) -> bool:
        with self._call("move", name) as call:
            size_bytes = found.size_bytes if (found := self.inner.stat(name)) else 0
            content = self.inner.read(name, max_bytes=size_bytes) if found else b""
            moved = self.inner.move(name, new_name)
            if moved:
                call.effects |= {new_name: content, name: None}
        return moved

    def compare_and_swap(self, name: str, *, expected: bytes | None, new: bytes | None) -> bool:
        with self._call("compare_and_swap", name) as call:
            swapped = self.inner.compare_and_swap(name, expected=expected, new=new)
            if swapped:
                call.effects[name] = new
        return swapped

    def claim(self, name: str, data: bytes) -> Claim:
        with self._call("claim", name):
            claim = FaultClaim(self, self.inner.claim(name, data), data)
            self._claims[name] = data
        return claim

    def claims(self, prefix: str) -> builtins.list[ClaimInfo]:
        with self._call("claims", prefix):
            return self.inner.claims(prefix)

    def free_bytes(self) -> int | None:
        return self.inner.free_bytes()

    def local_path(self, name: str) -> Path | None:
        return self.inner.local_path(name)

    @contextmanager
    def _call(self, operation: str, name: str) -> Iterator[_Call]:
        fault = self._next_fault(Call(operation, name))
        if fault and fault.moment == "before":
            self._strike(fault, operation, name)
        call = _Call(during=fault is not None and fault.moment == "during")
        try:
            yield call
        except CastoreError:  # the answer of a call that has no effect, like that there is no such file
            if fault:
                self._strike(fault, operation, name)
            raise
        with self._lock:
            if call.during or self.crashed:  # crashed: on another thread, while this one was on its way
                self._visible.update(call.effects)
            else:
                _apply(self._durable, call.effects)
                for changed in call.effects:
                    self._visible.pop(changed, None)
        if fault:
            self._strike(fault, operation, name)
        self._check_alive()

    def _next_fault(self, call: Call) -> Fault | None:
        with self._lock:
            self._check_alive()
            index = len(self.calls)
            self.calls.append(call)
        fault = self.fault
        if fault and (index == fault.at or (fault.lasting and index > fault.at and call.writes)):
            return fault
        return None

    def _strike(self, fault: Fault, operation: str, name: str) -> None:
        if fault.errno is None:
            self.crashed = True
            raise SimulatedCrash(f"{fault.moment} call {fault.at}: {operation} {name}")
        error = OSError(fault.errno, os.strerror(fault.errno))
        raise os_error(error, f"{self.location}/{name}", operation) from error

    def _check_alive(self) -> None:
        if self.crashed:
            raise SimulatedCrash("the process is dead already")


class FaultSink:
    """See castore.backend.base.PackSink."""

    def __init__(self, backend: FaultBackend, name: str, inner: PackSink, number: int) -> None:
        self._backend = backend
        self._name = name
        self._inner = inner
        self.temporary_name = f"{name.rpartition('/')[0]}/{TEMPORARY_PREFIX}{number:016x}".removeprefix("/")
        self.written = bytearray()

    def write(self, *buffers: Buffer) -> None:
        content = b"".join(byte_view(buffer) for buffer in buffers)
        with self._closing_on_error(), self._backend._call("write", self._name) as call:
            content = content[: len(content) // 2] if call.during else content
            self._inner.write(content)
            self.written += content

    def flush_hint(self) -> None:
        with self._backend._call("flush_hint", self._name):
            self._inner.flush_hint()

    def commit(self) -> None:
        with self._closing_on_error(), self._backend._call("commit", self._name) as call:
            self._inner.commit()
            call.effects[self._name] = bytes(self.written)
            self._close()

    def abort(self) -> None:
        if self in self._backend._sinks:
            with self._backend._call("abort", self._name):
                self._close()

    @contextmanager
    def _closing_on_error(self) -> Iterator[None]:
        """The contract: a write or commit that raises has aborted the sink. A crash has aborted nothing."""
        try:
            yield
        except CastoreError:
            self._close()
            raise

    def _close(self) -> None:
        self._inner.abort()
        if self in self._backend._sinks:
            self._backend._sinks.remove(self)


class FaultReader:
    """See castore.backend.base.RangeReader."""

    def __init__(self, backend: FaultBackend, name: str, inner: RangeReader) -> None:
        self._backend = backend
        self._name = name
        self._inner = inner

    @property
    def size_bytes(self) -> int:
        return self._inner.size_bytes

    def read_into(self, offset: int, target: memoryview) -> None:
        with self._backend._call("read_into", self._name):
            self._inner.read_into(offset, target)

    def read(self, offset: int, size_bytes: int) -> bytes:
        with self._backend._call("read_range", self._name):
            return self._inner.read(offset, size_bytes)

    def close(self) -> None:
        self._inner.close()


class FaultClaim:
    """See castore.backend.base.Claim."""

    def __init__(self, backend: FaultBackend, inner: Claim, data: bytes) -> None:
        self._backend = backend
        self._inner = inner
        self._data = data

    @property
    def name(self) -> str:
        return self._inner.name

    def renew(self, data: bytes) -> None:
        with self._backend._call("renew", self.name):
            self._inner.renew(data)
            self._backend._claims[self.name] = data

    def release(self) -> None:
        if self.name in self._backend._claims:
            with self._backend._call("release", self.name):
                self._inner.release()
                self._backend._released[self.name] = self._backend._claims.pop(self.name)


def torn(data: bytes) -> bytes:
    """The same length, of which only the first half was written back."""
    half = len(data) // 2
    return data[:half] + bytes(len(data) - half)


def _apply(files: dict[str, bytes], effects: dict[str, bytes | None]) -> None:
    for name, data in effects.items():
        if data is None:
            files.pop(name, None)
        else:
            files[name] = data
