"""The LMDB environments of this process: one for each directory, shared by all handles, none inherited."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from castore.errors import StorageError
from castore.index.lmdb_environment import Environment

_environments: dict[str, Environment] = {}
_lock = threading.Lock()
_inherited: list[Environment] = []
"""Of a parent process: never used and never collected, since both would touch the parent's locks."""


def acquire(
    directory: Path, *, repository_id: bytes, id_bytes: int, databases: dict[bytes, bool]
) -> Environment:
    """The environment of that directory in this process, opened; to be released. Raises StorageError."""
    key = os.path.realpath(directory)
    with _lock:
        found = _environments.get(key)
        if found is None:
            found = Environment(
                Path(key), repository_id=repository_id, id_bytes=id_bytes, databases=databases
            )
            _environments[key] = found
        if (found.repository_id, found.id_bytes) != (repository_id, id_bytes):
            raise StorageError(
                f"{directory}: this process already uses it for repository {found.repository_id.hex()}"
            )
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


def _start_child() -> None:
    """After fork: the parent's environments are not ours, nor is a lock that one of its threads held."""
    global _lock  # noqa: PLW0603  a lock cannot be reset
    _lock = threading.Lock()
    _inherited.extend(_environments.values())
    _environments.clear()


os.register_at_fork(after_in_child=_start_child)
