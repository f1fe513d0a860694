"""What the local backend asks of the operating system, in whole steps; knows neither names nor repositories.

Everything raises plain OSError. Linux calls that Python lacks (renameat2, sync_file_range) are taken from the
C library where it has them.

Locks and fork: a forked child inherits every open file, and an flock lives until the last copy of its file
is closed. A data-loader worker forked during a save would so keep the lease of a parent that died. Therefore
every locked file is a LockedFile, and children close them all before they run anything else. Invariant: a
descriptor is in `_locked_files` if and only if it is open, as seen by any fork (opening, closing and forking
exclude each other through `_fork_lock`).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from castore.backend.base import byte_view

if TYPE_CHECKING:
    from collections.abc import Sequence

    from castore.ids import Buffer

READ_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
"""Nonblocking: opening a fifo in a stranger's repository must not hang. Regular files ignore it."""
CREATE_FLAGS = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
LOCK_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW

_BUFFERS_MAX = 1024
"""IOV_MAX of Linux and macOS: more buffers in one writev are refused."""
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""How file systems say that they have no hard links (FAT, some network and FUSE file systems)."""
_NO_DIRECTORY_SYNC = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_SYNC_FILE_RANGE_WRITE = 2

_libc = ctypes.CDLL(None, use_errno=True)
_renameat2 = getattr(_libc, "renameat2", None)
_sync_file_range = getattr(_libc, "sync_file_range", None)
if _renameat2 is not None:
    _renameat2.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
if _sync_file_range is not None:
    _sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


def open_to_read(path: str) -> tuple[int, os.stat_result]:
    """A descriptor of a regular file, and its status. FileNotFoundError also for a directory."""
    try:
        fd = os.open(path, READ_FLAGS)
    except NotADirectoryError:
        raise FileNotFoundError(errno.ENOENT, "No such file") from None
    try:
        return fd, _regular(os.fstat(fd))
    except BaseException:
        os.close(fd)
        raise


def write_all(fd: int, buffers: Sequence[Buffer]) -> int:
    """Append all buffers, whatever the system takes at a time; returns the bytes written."""
    views = [view for view in map(byte_view, buffers) if len(view)]
    total, first = 0, 0
    while first < len(views):
        written = os.writev(fd, views[first : first + _BUFFERS_MAX])
        if written <= 0:
            raise OSError(errno.EIO, "the system wrote nothing")
        total += written
        while first < len(views) and written >= len(views[first]):
            written -= len(views[first])
            first += 1
        if written:
            views[first] = views[first][written:]
    return total


def read_some(fd: int, bytes_max: int) -> bytes:
    """The file from the descriptor's position to its end, at most that much."""
    parts = []
    while bytes_max > 0 and (part := os.read(fd, bytes_max)):
        parts.append(part)
        bytes_max -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def read_into(fd: int, offset: int, target: memoryview) -> int:
    """Fill the target from the offset; returns the bytes read, fewer only at the end of the file."""
    done = 0
    while done < len(target) and (count := os.preadv(fd, [target[done:]], offset + done)):
        done += count
    return done


def map_private(fd: int, offset: int, size_bytes: int) -> mmap.mmap:
    """Map part of a file copy-on-write; unmapped when the last view of it is gone. Needs no open file after that."""
    if sys.version_info >= (3, 13):
        # Without a copy of the descriptor, of which a state in a thousand packs would use up all.
        return mmap.mmap(fd, size_bytes, access=mmap.ACCESS_COPY, offset=offset, trackfd=False)
    return mmap.mmap(fd, size_bytes, access=mmap.ACCESS_COPY, offset=offset)


def sync_directory(path: str) -> None:
    """Make the names in a directory durable.

    File systems that cannot sync a directory (some FUSE and SMB mounts) say so with EINVAL or ENOTSUP; there
    is nothing else to ask of them, so that is no error.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_SYNC:
            raise
    finally:
        os.close(fd)


def move_if_absent(source: str, target: str) -> bool:
    """Give a file another name in the same file system, atomically, unless that name is taken (False).

    OSError with EOPNOTSUPP where the file system can do this in no way.
    """
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        return _rename_if_absent(source, target)
    with suppress(OSError):  # the target is there; the second name is litter at worst
        os.unlink(source)
    return True


def start_writeback(fd: int, offset: int, size_bytes: int) -> None:
    """Let the kernel begin writing dirty pages of the range. Only a hint: errors show at the next fsync."""
    if _sync_file_range is not None:
        _sync_file_range(fd, offset, size_bytes, _SYNC_FILE_RANGE_WRITE)


def start_readahead(fd: int, offset: int, size_bytes: int) -> None:
    """Let the kernel begin reading the range into its cache. Only a hint: errors show when it is read."""
    if hasattr(os, "posix_fadvise"):  # macOS lacks it
        with suppress(OSError):
            os.posix_fadvise(fd, offset, size_bytes, os.POSIX_FADV_WILLNEED)


class LockedFile:
    """A descriptor that carries an flock, or is about to, and that forked children close."""

    __slots__ = ("fd",)

    def __init__(self, path: str, flags: int) -> None:
        with _fork_lock:
            self.fd = -1
            self.fd = os.open(path, flags, 0o666)
            _locked_files.add(self)

    @property
    def is_open(self) -> bool:
        """False after close, and in every child forked since."""
        return self.fd >= 0

    def try_lock(self) -> bool:
        """Take the lock for this descriptor alone, unless somebody has it."""
        return _try_flock(self.fd, fcntl.LOCK_EX)

    def close(self) -> None:
        """Unlock and close. A child closes without unlocking: the lock is its parent's."""
        with _fork_lock:
            if self.is_open:
                fd, self.fd = self.fd, -1
                _locked_files.discard(self)
                try:
                    # Explicitly: a child forked by other code, without our hook, may have the file open.
                    with suppress(OSError):
                        fcntl.flock(fd, fcntl.LOCK_UN)
                finally:
                    os.close(fd)


def is_locked(fd: int) -> bool:
    """Whether somebody else's descriptor, in this process or another, holds the file's exclusive lock."""
    # Shared: two processes that look at the same time must not take each other for the holder.
    if not _try_flock(fd, fcntl.LOCK_SH):
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False


def _regular(status: os.stat_result) -> os.stat_result:
    if stat.S_ISDIR(status.st_mode):
        raise FileNotFoundError(errno.ENOENT, "No such file, but a directory")
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "Not a regular file")
    return status


def _try_flock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _rename_if_absent(source: str, target: str) -> bool:
    """The Linux way, for file systems without hard links."""
    if _renameat2 is None:
        raise OSError(errno.EOPNOTSUPP, "neither hard links nor renameat2")
    arguments = (_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE)
    if _renameat2(*arguments) == 0:
        return True
    code = ctypes.get_errno()
    if code == errno.EEXIST:
        return False
    if code in (errno.EINVAL, errno.ENOSYS):
        raise OSError(errno.EOPNOTSUPP, "neither hard links nor renameat2")
    raise OSError(code, os.strerror(code))


# Reentrant: a claim that is collected as garbage closes its file, on any thread and at any line.
_fork_lock = threading.RLock()
_locked_files: set[LockedFile] = set()


def _close_in_child() -> None:
    while _locked_files:
        locked = _locked_files.pop()
        fd, locked.fd = locked.fd, -1
        with suppress(OSError):
            os.close(fd)
    _fork_lock.release()


os.register_at_fork(before=_fork_lock.acquire, after_in_parent=_fork_lock.release, after_in_child=_close_in_child)
