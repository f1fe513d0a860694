"""One LMDB environment for each cache directory and process, which is empty rather than wrong.

LMDB's own rules, and what keeps them here:

1. An environment must not be opened twice in a process (its locks are per process): a registry with counts.
2. It must not be used across fork: objects carry their pid, and a child starts with an empty registry.
3. The map must not change under a transaction: one lock per environment, held for a transaction (milliseconds).
4. A damaged file may kill the process: nothing is mapped before the guard vouches for every page (lmdb_guard.py).
   Before each transaction the file is looked at again: replaced by another process, removed or shortened files are
   opened anew. What remains is somebody who cuts the file within the microseconds of one transaction.
5. A writer that is stopped blocks all others for ever: so our own file lock, which is waited for only so long, is taken
   first. It also covers [transaction + guard], and the kernel frees it when a process dies; LMDB's lock is then
   recovered by LMDB (robust mutexes).
6. LMDB's lock file is mapped and sparse, so a full disk would kill the process: its blocks are allocated first. It is
   never opened while the environment is (closing any descriptor of it would drop LMDB's locks).
7. A new data file needs a new lock file (which carries the last transaction): both are replaced together.

Whatever is odd raises DamageError inside this file, and ends in an empty environment. What the caller sees is
StorageError: the cache directory cannot be used at all.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import lmdb

from castore.errors import DamageError, NoSpaceError, StorageError
from castore.index.lmdb_file import Meta, free_pages, read_meta
from castore.index.lmdb_guard import Guard, open_regular, read_guard, write_guard

T = TypeVar("T")
Databases = dict[bytes, lmdb._Database]  # noqa: SLF001  the only name that py-lmdb gives this type
Transaction = lmdb.Transaction[bytes]
Body = Callable[[Transaction, Databases], T]
"""Work inside one transaction. Run again after the map was resized or the file replaced, so it must not keep state."""

DATA_NAME = "index.lmdb"
LMDB_LOCK_NAME = DATA_NAME + "-lock"
GUARD_NAME = "index.guard"
LOCK_NAME = "index.lock"

MAP_BYTES_FIRST = 64 << 20
"""Address space only; doubled when it is full."""
LOCK_WAIT_S = 10.0
"""How long another process may hold our lock before the cache counts as unusable: a save holds it for milliseconds, a
rebuild for at most a second or two at a time."""
_POLL_S_FIRST, _POLL_S_MAX = 0.0002, 0.01
READERS_MAX = 126
_LMDB_LOCK_BYTES = 8192
"""LMDB's lock file: 192 bytes and 64 for each further reader."""
_RESIZES_MAX = 40
_ENGINE: dict[str, Any] = {"lib_version": 0} if int(lmdb.__version__.split(".")[0]) >= 3 else {}
"""py-lmdb 3 brings two engines; lmdb_file.py reads the format of 0.9."""

_log = logging.getLogger(__name__)


class Environment:
    """The environment of one directory in this process. Thread-safe. Use acquire() and release()."""

    def __init__(self, directory: Path, *, repository_id: bytes, id_bytes: int, databases: dict[bytes, bool]) -> None:
        self.pid = os.getpid()
        self.users = 0
        self.directory = directory
        self.repository_id = repository_id
        self.id_bytes = id_bytes
        self._dupsort = databases
        self._data = directory / DATA_NAME
        self._lock = threading.Lock()
        self._opened: _Opened | None = None

    def read(self, body: Body[T]) -> T:
        """Run `body` in a read transaction. Raises StorageError."""
        with self._lock, _as_storage_errors(self._data):
            try:
                return self._run(body, write=False)
            except DamageError as reason:
                self._close(reason)
            self._open_shared()
            return self._run(body, write=False)

    def write(self, body: Body[T]) -> T:
        """Run `body` in a write transaction; it is durable on return. Raises StorageError."""
        with self._lock, _as_storage_errors(self._data), self._file_lock(fcntl.LOCK_EX):
            try:
                if self._opened is None:
                    self._open_or_create()
                return self._run_guarded(body)
            except DamageError as reason:
                self._close(reason)
            self._open_or_create()
            return self._run_guarded(body)

    def open(self) -> None:
        """Verify and map the file, or put an empty one in its place. Raises StorageError."""
        with self._lock, _as_storage_errors(self._data):
            if self._opened is None:
                self._open_shared()

    def empty(self) -> None:
        """Replace the file by an empty one. Raises StorageError."""
        with self._lock, _as_storage_errors(self._data), self._file_lock(fcntl.LOCK_EX):
            self._close(None)
            self._create()

    def close(self) -> None:
        """Unmap the file."""
        with self._lock:
            self._close(None)

    # ---- transactions ------------------------------------------------------------------------------------------

    def _run(self, body: Body[T], *, write: bool) -> T:
        opened = self._current()
        for _ in range(_RESIZES_MAX):
            try:
                with _typed_lmdb_errors(), opened.environment.begin(write=write) as transaction:
                    return body(transaction, opened.databases)
            except _MapResized:
                self._resize(opened, 0)
            except _MapFull:
                opened.environment.reader_check()
                self._resize(opened, 2 * opened.environment.info()["map_size"])
        raise StorageError(f"{self._data}: LMDB's map could not be made large enough")

    def _run_guarded(self, body: Body[T]) -> T:
        """A write transaction and its guard, under the file lock."""
        opened = self._current()
        before = read_meta(opened.fd)
        if opened.guard.transaction != before.transaction:  # another process wrote
            guard = self._read_guard()
            if (guard.transaction, len(guard.digests)) != (before.transaction, before.page_count):
                raise DamageError(f"guard of transaction {guard.transaction}, found {before.transaction}")
            opened.guard = guard
        free_before = free_pages(opened.fd, before)
        try:
            return self._run(body, write=True)
        finally:  # also when an interrupt came between the commit and here
            self._follow(opened, before, free_before)

    def _follow(self, opened: _Opened, before: Meta, free_before: set[int]) -> None:
        after = read_meta(opened.fd)
        if after.transaction != before.transaction:
            _fill_up(opened.fd, after)
            opened.guard.update(opened.fd, after, free_before=free_before, free_after=free_pages(opened.fd, after))
            write_guard(self.directory / GUARD_NAME, opened.guard)

    def _current(self) -> _Opened:
        """What is open, if it is still the file that lies there, in full length. Raises DamageError."""
        opened = self._opened
        if opened is None:
            raise DamageError("not open")
        try:
            found = os.stat(self._data, follow_symlinks=False)
        except FileNotFoundError as error:
            raise DamageError("the file was removed") from error
        if (found.st_dev, found.st_ino) != opened.identity:
            raise DamageError("another process replaced the file")
        if found.st_size < read_meta(opened.fd).used_bytes:
            raise DamageError(f"the file was cut to {found.st_size} bytes")
        return opened

    def _resize(self, opened: _Opened, map_bytes: int) -> None:
        """Grow the map, or (0) take over the size that another process gave it."""
        with _typed_lmdb_errors():
            opened.environment.set_mapsize(map_bytes)
            opened.databases = self._open_databases(opened.environment)

    # ---- opening -----------------------------------------------------------------------------------------------

    def _open_shared(self) -> None:
        """Open a sound file beside others that do the same; replace an odd one alone."""
        try:
            with self._file_lock(fcntl.LOCK_SH):
                self._open_verified()
                return
        except DamageError:
            pass
        with self._file_lock(fcntl.LOCK_EX):
            self._open_or_create()

    def _open_or_create(self) -> None:
        """Under the exclusive lock."""
        try:
            self._open_verified()
        except DamageError as reason:
            _log.info("%s: replaced by an empty index: %s", self._data, reason)
            self._create()

    def _open_verified(self) -> None:
        try:
            fd = open_regular(self._data, os.O_RDWR)
        except FileNotFoundError as error:
            raise DamageError("the file is missing") from error
        try:
            meta = read_meta(fd)
            if os.fstat(fd).st_size < meta.used_bytes:
                raise DamageError(f"expected {meta.used_bytes} bytes, found {os.fstat(fd).st_size}")
            guard = self._read_guard()
            guard.check(fd, meta)
            self._opened = self._open_lmdb(fd, guard)
        except BaseException:
            os.close(fd)
            raise

    def _create(self) -> None:
        for name in (DATA_NAME, LMDB_LOCK_NAME, GUARD_NAME):
            _clear_away(self.directory / name)
        fd = open_regular(self._data, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            guard = Guard(self.repository_id, self.id_bytes, page_bytes=0)
            opened = self._open_lmdb(fd, guard)
            meta = read_meta(fd)
            guard.page_bytes = meta.page_bytes
            _fill_up(fd, meta)
            guard.update(fd, meta, free_before=set(), free_after=free_pages(fd, meta))
            write_guard(self.directory / GUARD_NAME, guard)
        except DamageError as error:
            os.close(fd)
            raise StorageError(f"{self._data}: a fresh LMDB file cannot be used: {error}") from error
        except BaseException:
            os.close(fd)
            raise
        self._opened = opened

    def _open_lmdb(self, fd: int, guard: Guard) -> _Opened:
        """Map the file that `fd` reads."""
        _allocate_lock_file(self.directory / LMDB_LOCK_NAME)
        with _typed_lmdb_errors():
            environment = lmdb.open(
                str(self._data),
                subdir=False,
                map_size=MAP_BYTES_FIRST,
                mode=0o666,
                max_readers=READERS_MAX,
                max_dbs=len(self._dupsort),
                readahead=False,
                **_ENGINE,
            )
            try:
                environment.reader_check()
                databases = self._open_databases(environment)
            except BaseException:
                environment.close()
                raise
        status = os.fstat(fd)
        return _Opened(environment, databases, fd, (status.st_dev, status.st_ino), guard)

    def _open_databases(self, environment: lmdb.Environment) -> Databases:
        new = environment.stat()["entries"] == 0
        with environment.begin(write=new) as transaction:
            return {
                name: environment.open_db(name, txn=transaction, dupsort=dupsort, create=new)
                for name, dupsort in self._dupsort.items()
            }

    def _read_guard(self) -> Guard:
        return read_guard(self.directory / GUARD_NAME, repository_id=self.repository_id, id_bytes=self.id_bytes)

    def _close(self, reason: Exception | None) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            if reason is not None:
                _log.info("%s: opened anew: %s", self._data, reason)
            opened.environment.close()
            os.close(opened.fd)

    @contextlib.contextmanager
    def _file_lock(self, operation: int) -> Iterator[None]:
        """Hold our lock file, shared or exclusive. Raises StorageError when others hold it for LOCK_WAIT_S."""
        self.directory.mkdir(parents=True, exist_ok=True)
        fd = _take_lock(self.directory / LOCK_NAME, operation)
        _held_locks.add(fd)
        try:
            yield
        finally:
            _held_locks.discard(fd)
            os.close(fd)


class _Opened:
    """An environment that is mapped, and what was true of its file."""

    __slots__ = ("databases", "environment", "fd", "guard", "identity")

    def __init__(
        self, environment: lmdb.Environment, databases: Databases, fd: int, identity: tuple[int, int], guard: Guard
    ) -> None:
        self.environment = environment
        self.databases = databases
        self.fd = fd
        self.identity = identity
        self.guard = guard


# ---- the registry --------------------------------------------------------------------------------------------------

_registry: dict[str, Environment] = {}
_registry_lock = threading.Lock()
_held_locks: set[int] = set()
_inherited: list[Environment] = []
"""Environments of a parent process: never used and never collected, since both would touch the parent's locks."""


def acquire(directory: Path, *, repository_id: bytes, id_bytes: int, databases: dict[bytes, bool]) -> Environment:
    """The environment of that directory in this process, opened. Raises StorageError."""
    key = os.path.realpath(directory)
    with _registry_lock:
        found = _registry.get(key)
        if found is None:
            found = Environment(Path(key), repository_id=repository_id, id_bytes=id_bytes, databases=databases)
            _registry[key] = found
        if (found.repository_id, found.id_bytes) != (repository_id, id_bytes):
            raise StorageError(f"{directory}: this process uses the directory for repository {found.repository_id.hex()}")
        found.users += 1
    try:
        found.open()
    except BaseException:
        release(found)
        raise
    return found


def release(environment: Environment) -> None:
    """Give an environment back; the last user of this process closes it."""
    with _registry_lock:
        if environment.pid != os.getpid():
            return
        environment.users -= 1
        if environment.users == 0:
            del _registry[str(environment.directory)]
            environment.close()


def _start_child() -> None:
    """After fork: the parent's environments, locks and lock descriptors are not ours."""
    global _registry_lock  # noqa: PLW0603  another thread of the parent may have held it
    _registry_lock = threading.Lock()
    _inherited.extend(_registry.values())
    _registry.clear()
    for fd in _held_locks:
        with contextlib.suppress(OSError):
            os.close(fd)  # a copy of the descriptor would keep the lock when the parent dies
    _held_locks.clear()


os.register_at_fork(after_in_child=_start_child)


# ---- files ---------------------------------------------------------------------------------------------------------


def _take_lock(path: Path, operation: int) -> int:
    """A descriptor that holds the lock. Polls, since a blocking flock could wait for a stopped process for ever."""
    deadline, pause_s = time.monotonic() + LOCK_WAIT_S, _POLL_S_FIRST
    while True:
        try:
            fd = open_regular(path, os.O_RDWR | os.O_CREAT)
        except DamageError:
            _clear_away(path)
            continue
        try:
            fcntl.flock(fd, operation | fcntl.LOCK_NB)
            if _is_at(fd, path):
                return fd
        except BlockingIOError:
            pass
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        if time.monotonic() > deadline:
            raise StorageError(f"{path}: another process has held the lock for {LOCK_WAIT_S:g} s; is it stopped?")
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _POLL_S_MAX)


def _is_at(fd: int, path: Path) -> bool:
    """Whether the path still leads to the open file: somebody may delete the cache directory at any time."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        return False


def _clear_away(path: Path) -> None:
    """Make room for a file. What is no file is moved aside: it is not ours to delete."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        if not path.is_dir():
            raise
        path.rename(path.with_name(f"{path.name}.{os.urandom(4).hex()}.foreign"))


def _allocate_lock_file(path: Path) -> None:
    """Give LMDB's lock file its blocks, before a store into the map finds the disk full."""
    fd = open_regular(path, os.O_RDWR | os.O_CREAT)
    try:
        if 0 < os.fstat(fd).st_size < _LMDB_LOCK_BYTES:
            raise DamageError(f"{path.name}: expected {_LMDB_LOCK_BYTES} bytes, found {os.fstat(fd).st_size}")
        if sys.platform == "linux":
            os.posix_fallocate(fd, 0, _LMDB_LOCK_BYTES)
    finally:
        os.close(fd)


def _fill_up(fd: int, meta: Meta) -> None:
    """Make the file as long as its meta says: LMDB leaves out last pages that were freed before they were written."""
    if os.fstat(fd).st_size < meta.used_bytes:
        os.ftruncate(fd, meta.used_bytes)


# ---- errors --------------------------------------------------------------------------------------------------------


class _MapResized(Exception):  # noqa: N818  a signal to _run
    pass


class _MapFull(Exception):  # noqa: N818  a signal to _run
    pass


_MACHINE_ERRORS = (
    lmdb.MemoryError,
    lmdb.LockError,
    lmdb.ReadersFullError,
    lmdb.TlsFullError,
    lmdb.ReadonlyError,
)
"""The file is not to blame: a fresh one would not help."""


@contextlib.contextmanager
def _typed_lmdb_errors() -> Iterator[None]:
    """Errors of py-lmdb as what is to be done about them; MDB's own codes mean that the file is odd, errno not."""
    try:
        yield
    except lmdb.MapResizedError as error:
        raise _MapResized from error
    except lmdb.MapFullError as error:
        raise _MapFull from error
    except lmdb.DiskError as error:
        raise NoSpaceError(f"the disk is full: {error}") from error
    except lmdb.Error as error:
        if type(error) is lmdb.Error or isinstance(error, _MACHINE_ERRORS):
            raise StorageError(f"LMDB: {error}") from error
        raise DamageError(f"LMDB: {error}") from error


@contextlib.contextmanager
def _as_storage_errors(path: Path) -> Iterator[None]:
    """What is left at the end is the caller's to handle, as one type."""
    try:
        yield
    except StorageError:
        raise
    except DamageError as error:
        raise StorageError(f"{path}: odd again after it was replaced: {error}") from error
    except OSError as error:
        kind = NoSpaceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else StorageError
        raise kind(f"{path}: {error.strerror or error}") from error
