"""The contract of a backend, and what all backends share: rules for names, translation of OS errors.

A backend holds named byte strings and knows nothing of chunks or snapshots. What the layers above rely on:

1. A name either holds all of its bytes or does not exist. Nobody ever sees half of a file.
2. When a writing method returns, its effect survives power loss: the bytes, the name, and the directories
   above it. Claims are the exception: they mean something only while their process lives.
3. A file never changes under its name, except by compare_and_swap, which replaces all of it.
4. Nothing is left visible by a call that raises, but for one case: where the last sync fails, the file may be
   there and may be gone after power loss; the error is raised, so nobody was told that it is durable.
5. Every method may be called from any thread; a PackSink belongs to one thread at a time.

Names are `/`-separated and relative. No component is empty or begins with a dot (that keeps `..` out, and dot
names for the backend's own use), so no name escapes the root.
"""

from __future__ import annotations

import errno
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from castore.errors import (
    CastoreError,
    FormatError,
    NoSpaceError,
    NotFoundError,
    RepositoryAccessError,
    StorageError,
    UsageError,
)

if TYPE_CHECKING:
    import builtins
    from collections.abc import Iterator
    from pathlib import Path

    from castore.ids import Buffer

TEMPORARY_PREFIX = ".tmp-"
"""Begins the last component of a file that is still being written, or that a crash left behind."""
COMPONENT_BYTES_MAX = 255
"""What ext4, xfs, btrfs, apfs and tmpfs allow."""


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One file of a listing."""

    name: str
    size_bytes: int
    modified_ns: int
    """Of the backend's clock, since the epoch."""


@dataclass(frozen=True, slots=True)
class ClaimInfo:
    """One claim file: what it says, and whether a living process stands behind it."""

    name: str
    data: bytes
    held: bool


class PackSink(Protocol):
    """A file being written from front to back, invisible until commit."""

    def write(self, *buffers: Buffer) -> None:
        """Append the buffers in order, without copying them. A write that raises has aborted the sink."""

    def flush_hint(self) -> None:
        """Start writing back what was appended, without waiting: the sync in commit finds little to do."""

    def commit(self) -> None:
        """Make the file durable and visible. StorageError when the name is taken. Aborted if this raises."""

    def abort(self) -> None:
        """Leave nothing behind. Does nothing after commit or abort, so it may stand in a `finally`."""


class RangeReader(Protocol):
    """An open file, read in ranges. All but close may be called from several threads at once."""

    @property
    def size_bytes(self) -> int:
        """Taken when the file was opened; files never change."""

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill all of `target` from `offset`. FormatError when the file ends before."""

    def read(self, offset: int, size_bytes: int) -> bytes:
        """The range as fresh bytes. FormatError as above, before anything is allocated."""

    def close(self) -> None:
        """Let go of the file, after the last read. Does nothing the second time."""


@runtime_checkable
class MappableReader(RangeReader, Protocol):
    """A reader that can also map its file into memory. Readers that cannot are read from instead."""

    def map_range(self, offset: int, size_bytes: int) -> memoryview:
        """The range, at least one byte, as writable memory of the caller's own.

        Pages come from the file when they are first touched; a write copies its page and never reaches the file. The
        memory stays as it is while any view of it lives, whatever becomes of this reader and of the file's name.
        FormatError when the file ends before the range does: a touch beyond the end would kill the process.
        """


@runtime_checkable
class ReadAheadReader(RangeReader, Protocol):
    """A reader that can have bytes fetched before they are read."""

    def will_need(self, offset: int, size_bytes: int) -> None:
        """The range will be read soon. Does not wait, and says nothing of errors: only a hint."""


class Claim(Protocol):
    """An exclusive claim, alive until release or until the process ends, whatever ends it."""

    @property
    def name(self) -> str:
        """The claim file."""

    def renew(self, data: bytes) -> None:
        """Change what the file says, for those who cannot ask the OS whether the claim is held: a sign of life. Neither
        durable nor atomic; a reader may see some of the old bytes. Does nothing after release, nor in a forked child.
        """

    def release(self) -> None:
        """Remove the file, then let go. Does nothing the second time, nor in a forked child."""


class Backend(Protocol):
    """Named byte strings; the invariants are numbered at the top of castore/backend/base.py.

    All methods raise NotFoundError (where absence is not an answer), RepositoryAccessError (permission,
    read-only), NoSpaceError (disk or quota full) or StorageError (anything else), each naming the file.
    """

    @property
    def location(self) -> str:
        """Where this is, for messages."""

    def put_if_absent(self, name: str, data: Buffer) -> bool:
        """Store the bytes durably under a free name; False when it is taken (by a file then durable too)."""

    def create_stream(self, name: str) -> PackSink:
        """Begin a file that is too large to hold in memory."""

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """The whole file. FormatError when it is larger than `max_bytes`, before anything is allocated."""

    def open_reader(self, name: str) -> RangeReader:
        """Open the file for ranged reads. It stays readable until closed, even when deleted meanwhile."""

    def list(self, prefix: str) -> Iterator[FileInfo]:
        """Every file whose name starts with `prefix`, all levels, sorted by name; never a temporary one.

        A file that comes or goes during the call may or may not be listed; any other file is.
        """

    def temporaries(self, *, modified_before_ns: int) -> Iterator[FileInfo]:
        """What crashed writers left, last written before the given time. `delete` takes these names."""

    def stat(self, name: str) -> FileInfo | None:
        """Size and time of one file, None when it is absent."""

    def delete(self, name: str) -> bool:
        """Remove the file durably; False when it is absent."""

    def move(self, name: str, new_name: str) -> bool:
        """Give the file another name, durably and without reading it; False when it is absent.

        StorageError when the new name is taken. A crash leaves it under one of the names or both, never neither.
        """

    def compare_and_swap(self, name: str, *, expected: bytes | None, new: bytes | None) -> bool:
        """Replace the content if it is `expected`, atomically and durably; None stands for absent.

        Exact among callers of compare_and_swap: names that move are never written with another method.
        """

    def claim(self, name: str, data: bytes) -> Claim:
        """Make a claim file that the OS holds for this process. LeaseError when the name is taken."""

    def claims(self, prefix: str) -> builtins.list[ClaimInfo]:
        """Every claim file under the prefix, sorted by name; `held` also for claims of this process."""

    def free_bytes(self) -> int | None:
        """What may still be written, None when unknown."""

    def local_path(self, name: str) -> Path | None:
        """The file in the local file system, None when it is not a local file."""


def check_name(name: str, *, temporary_allowed: bool = False) -> None:
    """Raise UsageError unless the name is one that a backend stores."""
    problem = _problem_with(name, temporary_allowed=temporary_allowed)
    if problem:
        raise UsageError(f"{name[:300]!r} is no name for a file of a repository: {problem}")


def is_name(name: str) -> bool:
    """Whether a backend could have stored that name (a listing passes over strangers' files)."""
    return not _problem_with(name, temporary_allowed=True)


def check_prefix(prefix: str) -> None:
    """Raise UsageError unless some name could start with the prefix."""
    directory = prefix.rpartition("/")[0]
    if directory:
        check_name(directory)
    elif prefix.startswith(("/", ".")):
        raise UsageError(f"{prefix[:300]!r} is no prefix of names: it begins with '/' or '.'")


def os_error(error: OSError, where: str, action: str) -> CastoreError:
    """The castore error that says what the caller can do about an error of the operating system."""
    if isinstance(error, CastoreError):
        return error
    reason = error.strerror or str(error) or type(error).__name__
    message = f"{where}: cannot {action}: {reason}"
    failure: StorageError
    if error.errno == errno.ENOENT:
        failure = NotFoundError(message)
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return RepositoryAccessError(f"{message}; check owner, permissions, and whether it is mounted read-only")
    elif error.errno in (errno.ENOSPC, errno.EDQUOT):
        failure = NoSpaceError(f"{message}; free some space and try again, nothing stored before is lost")
    else:
        failure = StorageError(message)
    failure.errno = error.errno
    return failure


@contextmanager
def os_errors(where: str, action: str) -> Iterator[None]:
    """Translate what the operating system raises inside the block."""
    try:
        yield
    except CastoreError:
        raise
    except OSError as error:
        raise os_error(error, where, action) from error


def truncated(where: str, *, offset: int, expected: int, found: int) -> FormatError:
    """The error for a file that ends before the bytes that it must hold."""
    return FormatError(
        f"{where}: read at offset {offset}: expected {expected} bytes, found {found}; the file is truncated, "
        "run `castore verify`"
    )


def too_large(where: str, *, expected: int, found: int) -> FormatError:
    """The error for a file that is larger than its kind may be."""
    return FormatError(f"{where}: expected at most {expected} bytes, found {found}; the file is damaged or foreign")


def byte_view(data: Buffer) -> memoryview:
    """The buffer as flat bytes, without a copy. The buffer is C-contiguous."""
    view = memoryview(data)
    return view.cast("B") if view.nbytes else memoryview(b"")


def _problem_with(name: str, *, temporary_allowed: bool) -> str:
    """Why the name is refused, empty when it is not."""
    directory, _, last = name.rpartition("/")
    if temporary_allowed and last.startswith(TEMPORARY_PREFIX):
        last = last.removeprefix(TEMPORARY_PREFIX)
    for component in [*(directory.split("/") if directory or name.startswith("/") else ()), last]:
        if not component:
            return "a component is empty"
        if component.startswith("."):
            return "a component begins with '.'"
        if "\0" in component:
            return "it contains a zero byte"
        try:
            if len(component.encode()) > COMPONENT_BYTES_MAX:
                return f"a component has more than {COMPONENT_BYTES_MAX} bytes"
        except UnicodeEncodeError:
            return "it is not valid Unicode"
    return ""
