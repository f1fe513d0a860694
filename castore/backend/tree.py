"""A directory tree in which files appear whole and stay: the durable steps that the local backend is made of.

What a crash can leave at each point of a write:

    open  .tmp-0f3a…            an empty temporary file         listed by temporaries(), never by list()
    write, fsync                a whole temporary file          the same
    link NAME                   NAME, whole; not yet durable    after power loss there or not, but never half
    unlink .tmp-0f3a…
    fsync of the directory      NAME, durable                   the write returns only now

A directory that another process made, and did not live to sync, looks like any other. So the first write of
this object in a directory syncs all directories above it too, once, up to the mount point.

System calls on strings, not pathlib: which calls are made, and in which order, is what makes a file durable.
"""

from __future__ import annotations

import errno
import os
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TypeVar

from castore.backend import syscalls
from castore.backend.base import TEMPORARY_PREFIX
from castore.errors import LeaseError, NotFoundError, StorageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from castore.ids import Buffer, RandomBytes

LOCK_FILE = ".lock"
"""In the root, empty, never removed (a lock on a removed file excludes nobody)."""
LOCK_POLL_S = 0.002

_T = TypeVar("_T")


class Tree:
    """Paths are absolute strings below `root`. Everything raises OSError, or the castore errors named."""

    def __init__(self, root: str, *, random_bytes: RandomBytes, lock_timeout_s: float) -> None:
        self.root = root
        self.root_seen = False
        """Set by whoever found the root; from then on it is not made again."""
        self._random_bytes = random_bytes
        self._lock_timeout_s = lock_timeout_s
        self._settled: set[str] = set()
        """Directories known to be durable with everything above them."""

    @contextmanager
    def temporary(self, directory: str, data: Buffer) -> Iterator[str]:
        """A new file with the bytes, synced; gone at the end of the block unless it was renamed."""
        fd, path = self.open_temporary(directory)
        try:
            try:
                syscalls.write_all(fd, [data])
                os.fsync(fd)
            finally:
                os.close(fd)
            yield path
        finally:
            with suppress(OSError):
                os.unlink(path)

    def open_temporary(self, directory: str) -> tuple[int, str]:
        """Descriptor and path of a new file, which is the caller's to remove."""
        path = self._temporary_path(directory)
        return self._creating(lambda: os.open(path, syscalls.CREATE_FLAGS, 0o666), directory), path

    def open_lockable_temporary(self, directory: str) -> tuple[syscalls.LockedFile, str]:
        """The same, to be locked."""
        path = self._temporary_path(directory)
        return self._creating(lambda: syscalls.LockedFile(path, syscalls.CREATE_FLAGS), directory), path

    def place(self, temporary: str, path: str) -> bool:
        """Give the temporary file its name, atomically; False when that is taken: it stays temporary.

        Raises LeaseError when somebody has removed it: a collector takes what a writer left that seems to be dead.
        """
        try:
            with still_there(temporary, path):
                return syscalls.move_if_absent(temporary, path)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
        # A file system that has only rename: writers of castore exclude each other by the lock.
        with self.exclusive():
            if os.path.lexists(path):
                return False
            os.rename(temporary, path)
            return True

    def move(self, source: str, target: str) -> bool:
        """Give a file another name, durable before the old one goes; False when the new one is taken."""
        directory = os.path.dirname(target)
        if not os.path.isdir(directory):
            self._make_directory(directory)
        try:
            os.link(source, target)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in syscalls.NO_LINKS:
                raise
            if not self.place(source, target):  # one rename
                return False
            self.settle(directory)
        else:
            self.settle(directory)
            os.unlink(source)
        syscalls.sync_directory(os.path.dirname(source))
        return True

    def settle(self, directory: str) -> None:
        """Make the names in a directory durable, and the directory itself where that is not known yet."""
        syscalls.sync_directory(directory)
        settled = []
        while directory not in self._settled and len(directory) > len(self.root):
            settled.append(directory)
            directory = os.path.dirname(directory)
            syscalls.sync_directory(directory)
        while directory not in self._settled:
            settled.append(directory)
            if os.path.ismount(directory):
                break
            directory = os.path.dirname(directory)
            # Above the root nothing is ours, it may even be unreadable: whoever made it had to see to it.
            with suppress(OSError):
                syscalls.sync_directory(directory)
        self._settled.update(settled)
        self.root_seen = True

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the lock file against all threads and processes. StorageError when another has it too long."""
        path = f"{self.root}/{LOCK_FILE}"
        locked = self._creating(lambda: syscalls.LockedFile(path, syscalls.LOCK_FLAGS), self.root)
        try:
            # Polled: flock has no time-out, and a stopped holder would hang everybody without a word.
            deadline_s = time.monotonic() + self._lock_timeout_s
            while not locked.try_lock():
                if time.monotonic() > deadline_s:
                    raise StorageError(
                        f"{path}: another process has held the lock for {self._lock_timeout_s:g} s; "
                        "find it with `lslocks` or `fuser` and end or continue it"
                    )
                time.sleep(LOCK_POLL_S)
            yield
        finally:
            locked.close()

    def _temporary_path(self, directory: str) -> str:
        return f"{directory}/{TEMPORARY_PREFIX}{self._random_bytes(8).hex()}"

    def _creating(self, create: Callable[[], _T], directory: str) -> _T:
        """Create a file, and its directory only when that is missing: it hardly ever is."""
        try:
            return create()
        except FileNotFoundError:
            self._make_directory(directory)
            return create()

    def _make_directory(self, path: str) -> None:
        """Make a directory and what is missing above it, each durable in its parent."""
        if path == self.root and self.root_seen and not os.path.isdir(path):
            # Writing on would fill the disk below a mount point with packs that belong to no repository.
            raise NotFoundError(f"{path}: the directory was there before and is gone; was it removed or unmounted?")
        try:
            os.mkdir(path)
        except FileExistsError:
            return
        except FileNotFoundError:
            self._make_directory(os.path.dirname(path))
            with suppress(FileExistsError):
                os.mkdir(path)
        self._settled.discard(path)
        syscalls.sync_directory(os.path.dirname(path))


@contextmanager
def still_there(temporary: str, path: str) -> Iterator[None]:
    """For giving a temporary file its name. Raises LeaseError when somebody has removed it meanwhile."""
    try:
        yield
    except FileNotFoundError as error:
        if os.path.lexists(temporary):
            raise
        raise LeaseError(
            f"{path}: what was being written is gone; this process must have stood still for longer than its lease, so "
            "that a collector took it for dead; nothing of it was committed: do it again"
        ) from error
