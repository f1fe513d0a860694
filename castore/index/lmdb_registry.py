"""The LMDB environments of this process: one for each directory, shared by all handles, none inherited."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from castore.errors import StorageError
from castore.index.lmdb_environment import Environment

_environments: dict[str, Environment] = {}
_lock = threading.Lock()
_suspended: list[Environment] = []
"""Closed and locked while this process forks."""
_inherited: list[Environment] = []
"""Of a parent process: never used, and never collected, which could close what the parent uses."""


def acquire(directory: Path, *, repository_id: bytes, id_bytes: int, databases: dict[bytes, bool]) -> Environment:
    """The environment of that directory in this process, opened; to be released. Raises StorageError."""
    key = os.path.realpath(directory)
    with _lock:
        found = _environments.get(key)
        if found is None:
            found = Environment(Path(key), repository_id=repository_id, id_bytes=id_bytes, databases=databases)
            _environments[key] = found
        if (found.repository_id, found.id_bytes) != (repository_id, id_bytes):
            raise StorageError(f"{directory}: this process already uses it for repository {found.repository_id.hex()}")
        found.users += 1
    try:
        found.open()
    except BaseException:
        release(found)
        raise
    return found


def release(environment: Environment) -> None:
    """Give an environment back; the last user in this process closes it."""
    if environment.pid != os.getpid():
        return
    with _lock:
        environment.users -= 1
        if environment.users == 0:
            del _environments[str(environment.directory)]
            environment.close()


# ---- fork ----------------------------------------------------------------------------------------------------


def _before_fork() -> None:
    """Close all: LMDB's maps, descriptors and locks must not get into a child.

    Where a thread is busy for too long, the child inherits what it uses; py-lmdb then refuses to open the same
    file in the child, which goes on in memory.
    """
    _lock.acquire()
    _suspended.extend(environment for environment in _environments.values() if environment.suspend())


def _after_fork_in_parent() -> None:
    while _suspended:
        _suspended.pop().resume()
    _lock.release()


def _after_fork_in_child() -> None:
    """The parent's environments are not ours: handles notice by the pid, and open their own."""
    _suspended.clear()
    _inherited.extend(_environments.values())
    _environments.clear()
    _lock.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
