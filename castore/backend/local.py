"""The backend in a directory of a local file system.

Names become paths here, and errors of the operating system become castore's; how a file comes to stay is in
castore/backend/tree.py.
"""

from __future__ import annotations

import mmap
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from castore.backend import syscalls
from castore.backend.base import (
    TEMPORARY_PREFIX,
    ClaimInfo,
    FileInfo,
    byte_view,
    check_name,
    check_prefix,
    is_name,
    os_error,
    os_errors,
    too_large,
    truncated,
)
from castore.backend.tree import Tree, still_there
from castore.errors import LeaseError, StorageError

if TYPE_CHECKING:
    import builtins
    from collections.abc import Iterator

    from castore.ids import Buffer, RandomBytes

LOCK_TIMEOUT_S = 60.0
"""The lock is held for a few fsyncs; who holds it for a minute is stopped or dead on a network mount."""
CLAIM_BYTES_MAX = 1024 * 1024
PAGE_BYTES = 4096


class LocalBackend:
    """See castore.backend.base.Backend for the contract.

    Constructing touches nothing; directories, the root included, are made by the first write. May be pickled:
    the copy is a handle to the same directory.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        random_bytes: RandomBytes = os.urandom,
        lock_timeout_s: float = LOCK_TIMEOUT_S,
    ) -> None:
        # Absolute: a later chdir must not move the repository.
        self._root = os.path.abspath(root)
        self._tree = Tree(self._root, random_bytes=random_bytes, lock_timeout_s=lock_timeout_s)

    @property
    def location(self) -> str:
        return self._root

    def put_if_absent(self, name: str, data: Buffer) -> bool:
        path = self._path(name)
        directory = os.path.dirname(path)
        with os_errors(path, "write"):
            placed = False
            if not os.path.lexists(path):  # saves the writing; the answer that counts is the tree's
                with self._tree.temporary(directory, data) as temporary:
                    placed = self._tree.place(temporary, path)
            self._tree.settle(directory)  # also when it is taken: who put it may not have come to this line
            return placed

    def create_stream(self, name: str) -> LocalSink:
        path = self._path(name)
        with os_errors(path, "create"):
            return LocalSink(self._tree, path, *self._tree.open_temporary(os.path.dirname(path)))

    def read(self, name: str, *, max_bytes: int) -> bytes:
        path = self._path(name)
        with os_errors(path, "read"):
            fd, status = syscalls.open_to_read(path)
            try:
                if status.st_size > max_bytes:
                    raise too_large(path, expected=max_bytes, found=status.st_size)
                self._tree.root_seen = True
                return syscalls.read_some(fd, status.st_size)
            finally:
                os.close(fd)

    def open_reader(self, name: str) -> LocalReader:
        path = self._path(name)
        with os_errors(path, "open"):
            fd, status = syscalls.open_to_read(path)
        return LocalReader(path, fd, status.st_size)

    def list(self, prefix: str) -> Iterator[FileInfo]:
        check_prefix(prefix)
        return iter(sorted((info for info in self._walk(prefix) if not _is_temporary(info.name)), key=_name_of))

    def temporaries(self, *, modified_before_ns: int) -> Iterator[FileInfo]:
        found = (info for info in self._walk("") if _is_temporary(info.name) and info.modified_ns < modified_before_ns)
        return iter(sorted(found, key=_name_of))

    def stat(self, name: str) -> FileInfo | None:
        path = self._path(name)
        with os_errors(path, "stat"):
            try:
                status = os.lstat(path)
            except (FileNotFoundError, NotADirectoryError):
                return None
        return _info(name, status) if stat.S_ISREG(status.st_mode) else None

    def delete(self, name: str) -> bool:
        check_name(name, temporary_allowed=True)
        path = f"{self._root}/{name}"
        with os_errors(path, "delete"):
            try:
                os.unlink(path)
            except (FileNotFoundError, NotADirectoryError):
                return False
            syscalls.sync_directory(os.path.dirname(path))
            return True

    def move(self, name: str, new_name: str) -> bool:
        source, target = self._path(name), self._path(new_name)
        with os_errors(source, f"move to {target}"):
            if not os.path.lexists(source):
                return False
            if not self._tree.move(source, target):
                raise StorageError(f"{source}: cannot move to {target}: the name is taken")
            return True

    def compare_and_swap(self, name: str, *, expected: bytes | None, new: bytes | None) -> bool:
        path = self._path(name)
        directory = os.path.dirname(path)
        with os_errors(path, "replace"), self._tree.exclusive():
            if not _holds(path, expected):
                return False
            if new is not None:
                with self._tree.temporary(directory, new) as temporary, still_there(temporary, path):
                    os.rename(temporary, path)
                self._tree.settle(directory)
            elif expected is not None:
                os.unlink(path)
                syscalls.sync_directory(directory)
            return True

    def claim(self, name: str, data: bytes) -> LocalClaim:
        path = self._path(name)
        with os_errors(path, "claim"):
            # Locked before it is visible: nobody takes it for a dead one. Not synced: it dies with us.
            locked, temporary = self._tree.open_lockable_temporary(os.path.dirname(path))
            placed = False
            try:
                if locked.try_lock():
                    syscalls.write_all(locked.fd, [data])
                    placed = self._tree.place(temporary, path)
            finally:
                if not placed:
                    _discard(locked, temporary)
        if not placed:
            raise LeaseError(f"{path}: already claimed")
        return LocalClaim(name, path, locked)

    def claims(self, prefix: str) -> builtins.list[ClaimInfo]:
        found = (_claim_info(info.name, f"{self._root}/{info.name}") for info in self.list(prefix))
        return [claim for claim in found if claim is not None]

    def free_bytes(self) -> int | None:
        try:
            status = os.statvfs(self._root)
        except OSError:
            return None
        return status.f_bavail * status.f_frsize

    def local_path(self, name: str) -> Path | None:
        return Path(self._path(name))

    def _path(self, name: str) -> str:
        check_name(name)
        return f"{self._root}/{name}"

    def _walk(self, prefix: str) -> Iterator[FileInfo]:
        """Every regular file whose name starts with the prefix, temporary ones too, in no order. No links."""
        base, _, _ = prefix.rpartition("/")
        pending = [base]
        while pending:
            directory = pending.pop()
            path = f"{self._root}/{directory}" if directory else self._root
            with os_errors(path, "list"):
                try:
                    entries = os.scandir(path)
                except FileNotFoundError:
                    continue  # it went while we looked, or was never there
                with entries:
                    for entry in entries:
                        name = f"{directory}/{entry.name}" if directory else entry.name
                        if entry.is_dir(follow_symlinks=False):
                            if name.startswith(prefix) or prefix.startswith(f"{name}/"):
                                pending.append(name)
                        elif name.startswith(prefix) and entry.is_file(follow_symlinks=False) and is_name(name):
                            with suppress(FileNotFoundError):
                                yield _info(name, entry.stat(follow_symlinks=False))


class LocalSink:
    """See castore.backend.base.PackSink. Belongs to the process that made it: no child may use it."""

    def __init__(self, tree: Tree, path: str, fd: int, temporary: str) -> None:
        self._tree = tree
        self._path = path
        self._fd = fd
        self._temporary = temporary
        self._pid = os.getpid()
        self._written_bytes = 0
        self._hinted_bytes = 0

    def write(self, *buffers: Buffer) -> None:
        self._check_open()
        try:
            self._written_bytes += syscalls.write_all(self._fd, buffers)
        except BaseException as error:
            self.abort()
            if isinstance(error, OSError):
                raise os_error(error, self._path, "write") from error
            raise

    def flush_hint(self) -> None:
        self._check_open()
        end = self._written_bytes // PAGE_BYTES * PAGE_BYTES  # half a page would be written twice
        if end > self._hinted_bytes:
            syscalls.start_writeback(self._fd, self._hinted_bytes, end - self._hinted_bytes)
            self._hinted_bytes = end

    def commit(self) -> None:
        self._check_open()
        try:
            with os_errors(self._path, "commit"):
                os.fsync(self._fd)
                if not self._tree.place(self._temporary, self._path):
                    raise StorageError(f"{self._path}: cannot commit: the name is taken")
                self._tree.settle(os.path.dirname(self._path))
        finally:
            self.abort()  # closes; the temporary name is gone when all went well

    def abort(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)
            if self._pid == os.getpid():
                with suppress(OSError):
                    os.unlink(self._temporary)

    def __del__(self) -> None:
        self.abort()

    def _check_open(self) -> None:
        if self._fd < 0:
            raise StorageError(f"{self._path}: cannot write: the stream is closed")


class LocalReader:
    """See castore.backend.base.MappableReader and ReadAheadReader."""

    def __init__(self, where: str, fd: int, size_bytes: int) -> None:
        self._where = where
        self._fd = fd
        self.size_bytes = size_bytes

    def read_into(self, offset: int, target: memoryview) -> None:
        expected = target.nbytes
        self._check_range(offset, expected)
        try:
            found = syscalls.read_into(self._fd, offset, byte_view(target))
        except OSError as error:
            raise os_error(error, self._where, f"read at offset {offset}") from error
        if found < expected:
            raise truncated(self._where, offset=offset, expected=expected, found=found)

    def read(self, offset: int, size_bytes: int) -> bytes:
        self._check_range(offset, size_bytes)
        try:
            data = os.pread(self._fd, size_bytes, offset)
        except OSError as error:
            raise os_error(error, self._where, f"read at offset {offset}") from error
        if len(data) == size_bytes:
            return data
        target = bytearray(size_bytes)  # rare: a signal, or more than 2 GiB at once
        self.read_into(offset, memoryview(target))
        return bytes(target)

    def will_need(self, offset: int, size_bytes: int) -> None:
        if self._fd >= 0:
            syscalls.start_readahead(self._fd, offset, size_bytes)

    def map_range(self, offset: int, size_bytes: int) -> memoryview:
        assert size_bytes > 0
        self._check_range(offset, size_bytes)
        end = offset + size_bytes
        try:
            # Asked again: the file may have been cut short since it was opened.
            found = os.fstat(self._fd).st_size
            if found < end:
                raise truncated(self._where, offset=offset, expected=size_bytes, found=max(0, found - offset))
            start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
            return memoryview(syscalls.map_private(self._fd, start, end - start))[offset - start :]
        except OSError as error:
            raise os_error(error, self._where, f"map {size_bytes} bytes at offset {offset}") from error

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __del__(self) -> None:
        self.close()

    def _check_range(self, offset: int, size_bytes: int) -> None:
        """Before anything is allocated, and before a damaged offset overflows the system call."""
        assert offset >= 0
        if self._fd < 0:
            raise StorageError(f"{self._where}: cannot read: the reader is closed")
        if offset + size_bytes > self.size_bytes:
            found = max(0, self.size_bytes - offset)
            raise truncated(self._where, offset=offset, expected=size_bytes, found=found)


class LocalClaim:
    """See castore.backend.base.Claim."""

    def __init__(self, name: str, path: str, locked: syscalls.LockedFile) -> None:
        self._name = name
        self._path = path
        self._locked = locked

    @property
    def name(self) -> str:
        return self._name

    def renew(self, data: bytes) -> None:
        if self._locked.is_open:
            with os_errors(self._path, "renew"):
                os.pwrite(self._locked.fd, data, 0)
                os.ftruncate(self._locked.fd, len(data))

    def release(self) -> None:
        if not self._locked.is_open:
            return
        try:
            # Removed first: a file that is there and unlocked would look like that of a dead process.
            with os_errors(self._path, "release"), suppress(FileNotFoundError):
                os.unlink(self._path)
        finally:
            self._locked.close()

    def __del__(self) -> None:
        with suppress(Exception):
            self.release()


def _discard(locked: syscalls.LockedFile, temporary: str) -> None:
    try:
        with suppress(OSError):
            os.unlink(temporary)
    finally:
        locked.close()


def _holds(path: str, expected: bytes | None) -> bool:
    """Whether the file's content is `expected`."""
    if expected is None:
        return not os.path.lexists(path)
    try:
        fd, status = syscalls.open_to_read(path)
    except FileNotFoundError:
        return False
    try:
        return status.st_size == len(expected) and syscalls.read_some(fd, status.st_size) == expected
    finally:
        os.close(fd)


def _claim_info(name: str, path: str) -> ClaimInfo | None:
    """What a claim file says and whether it is held; None when it went while we looked."""
    with os_errors(path, "read the claim"):
        try:
            fd, _ = syscalls.open_to_read(path)
        except FileNotFoundError:
            return None
        try:
            data = syscalls.read_some(fd, CLAIM_BYTES_MAX)
            held = syscalls.is_locked(fd)
            if not held and not os.fstat(fd).st_nlink:
                return None  # released between our open and our look at the lock
            return ClaimInfo(name, data, held)
        finally:
            os.close(fd)


def _info(name: str, status: os.stat_result) -> FileInfo:
    return FileInfo(name, status.st_size, status.st_mtime_ns)


def _is_temporary(name: str) -> bool:
    return name.rpartition("/")[2].startswith(TEMPORARY_PREFIX)


def _name_of(info: FileInfo) -> str:
    return info.name
