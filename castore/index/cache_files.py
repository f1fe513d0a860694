"""Files of a cache directory, where anything may lie: opened without following, blocking or trusting."""

from __future__ import annotations

import fcntl
import os
import stat
import time
from contextlib import suppress
from pathlib import Path

from castore.backend.syscalls import LOCK_FLAGS, LockedFile
from castore.errors import DamageError, StorageError

LOCK_WAIT_S = 10.0
"""How long another process may hold a lock before the cache counts as unusable. A save holds it for
milliseconds, a rebuild for a second or two at a time."""
_POLL_S_FIRST, _POLL_S_MAX = 0.0002, 0.01
_SAFE_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


def open_regular(path: Path, flags: int) -> int:
    """A descriptor of a regular file. Raises OSError, or DamageError when something else lies there."""
    try:
        fd = os.open(path, flags | _SAFE_FLAGS, 0o666)
    except OSError as error:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise DamageError(f"{path.name} is not a regular file") from error
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise DamageError(f"{path.name} is not a regular file")
    return fd


def clear_away(path: Path) -> None:
    """Make room for a file. A directory is moved aside: it is not ours to delete."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        if not path.is_dir():
            raise
        path.rename(path.with_name(f"{path.name}.{os.urandom(4).hex()}.foreign"))


def take_lock(path: Path, *, shared: bool) -> LockedFile:
    """A file that holds the lock until it is closed. Raises StorageError after LOCK_WAIT_S.

    Polls: a blocking flock could wait for a stopped process for ever. Makes the directory.
    """
    operation = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB
    deadline, pause_s = time.monotonic() + LOCK_WAIT_S, _POLL_S_FIRST
    while True:
        locked = _open_lock(path)
        try:
            fcntl.flock(locked.fd, operation)
            if _is_at(locked.fd, path):
                return locked
        except BlockingIOError:
            pass
        except BaseException:
            locked.close()
            raise
        locked.close()
        if time.monotonic() > deadline:
            raise StorageError(f"{path}: another process has held it for {LOCK_WAIT_S:g} s; is it stopped?")
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _POLL_S_MAX)


def _open_lock(path: Path) -> LockedFile:
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(path.lstat().st_mode):
            clear_away(path)
    return LockedFile(str(path), LOCK_FLAGS)


def _is_at(fd: int, path: Path) -> bool:
    """Whether the path still leads to the open file: somebody may delete the cache at any time."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False
