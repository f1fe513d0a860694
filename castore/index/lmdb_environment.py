"""One LMDB environment for each cache directory and process, which is empty rather than wrong.

LMDB's own rules, and what keeps them here:

1. An environment must not be opened twice in a process (its locks are per process): a registry with counts.
2. It must not be carried across fork: it is closed before and opened again on the next use. Objects carry
   their pid, and a child starts with an empty registry.
3. The map must not change under a transaction: one lock per environment, held for a transaction
   (milliseconds).
4. A damaged file may kill the process: nothing is mapped before the guard vouches for every page
   (lmdb_guard.py). Before each transaction the file is looked at again: replaced by another process, removed
   or shortened files are opened anew. What remains is somebody who cuts the file within the microseconds of
   one transaction.
5. A writer that is stopped blocks all others for ever: so our own file lock, which is waited for only so
   long, is taken first. It also covers [transaction + guard], and the kernel frees it when a process dies;
   LMDB's lock is then recovered by LMDB (robust mutexes).
6. LMDB's lock file is mapped and sparse, so a full disk would kill the process: its blocks are allocated
   first. It is never opened while the environment is (closing any descriptor of it would drop LMDB's locks).
7. Nothing is synced. The guard tells every torn state after a power cut from a whole one, which is all that LMDB
   syncs for, and a cut costs a rebuild if it comes within seconds of a save (writeback is started at once). A
   sync costs each save 2 to 10 ms, and while LMDB waits for its meta page, a kill would part file and guard.
8. A new data file needs a new lock file (which carries the last transaction): both are replaced together.

Whatever is odd raises DamageError inside this file, and ends in an empty environment. What the caller sees is
StorageError: the cache directory cannot be used at all.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import lmdb

from castore.backend.syscalls import LockedFile, start_writeback
from castore.errors import DamageError, NoSpaceError, StorageError
from castore.index.cache_files import clear_away, open_regular, take_lock
from castore.index.lmdb_file import FreeLists, Meta, read_free_lists, read_meta
from castore.index.lmdb_guard import Guard, read_guard, write_guard

T = TypeVar("T")
Databases: TypeAlias = "dict[bytes, lmdb._Database]"
Transaction: TypeAlias = "lmdb.Transaction[bytes]"
Body = Callable[[Transaction, Databases], T]
"""Work inside one transaction. Keeps no state: it runs again when the map grew or the file was replaced."""

_Identity = tuple[int, int]
"""Device and inode of a file."""

DATA_NAME = "index.lmdb"
LMDB_LOCK_NAME = DATA_NAME + "-lock"
GUARD_NAME = "index.guard"
LOCK_NAME = "index.lock"

MAP_BYTES_FIRST = 64 << 20
"""Address space only; doubled when it is full."""
READERS_MAX = 126
SUSPEND_WAIT_S = 2.0
"""How long a fork waits for a transaction of another thread."""
_LMDB_LOCK_BYTES = 8192
"""LMDB's lock file: 192 bytes and 64 for each further reader."""
_RESIZES_MAX = 40
_ATTEMPTS_MAX = 20
"""Times that other processes may replace the file before one look-up is given up."""
_ENGINE: dict[str, Any] = {"lib_version": 0} if int(lmdb.__version__.split(".")[0]) >= 3 else {}
"""py-lmdb 3 brings two engines; lmdb_file.py reads the format of 0.9."""

_log = logging.getLogger(__name__)


class Environment:
    """The environment of one directory in this process. Thread-safe. Made by lmdb_registry.acquire."""

    def __init__(self, directory: Path, *, repository_id: bytes, id_bytes: int, databases: dict[bytes, bool]) -> None:
        self.pid = os.getpid()
        self.users = 0
        self.directory = directory
        self.repository_id = repository_id
        self.id_bytes = id_bytes
        self._dupsort = databases
        self._data = directory / DATA_NAME
        self._lmdb_lock = directory / LMDB_LOCK_NAME
        self._lock = threading.Lock()
        self._opened: _Opened | None = None
        self._verified: tuple[_Identity, Guard] | None = None
        """What was open before a fork: as trustworthy as it would be if it were open still."""

    def read(self, body: Body[T]) -> T:
        """Run `body` in a read transaction. Raises StorageError."""
        remedies = iter((self._open_shared, self._replace))
        with self._lock, _as_storage_errors(self._data):
            for _ in range(_ATTEMPTS_MAX):
                try:
                    return self._run_settled(body)
                except _StaleError as reason:
                    self._close(reason)
                    self._open_shared()
                except DamageError as reason:
                    self._close(reason)
                    next(remedies, self._replace)()
            return self._run_settled(body)

    def write(self, body: Body[T]) -> T:
        """Run `body` in a write transaction. Raises StorageError."""
        with self._lock, _as_storage_errors(self._data), self._file_lock():
            for remedy in (self._open_or_create, self._create):
                try:
                    return self._run_guarded(body)
                except DamageError as reason:
                    self._close(reason)
                remedy()
            return self._run_guarded(body)

    def open(self) -> None:
        """Verify and map the file, or put an empty one in its place. Raises StorageError."""
        with self._lock, _as_storage_errors(self._data):
            if self._opened is None:
                self._open_shared()

    def empty(self) -> None:
        """Replace the file by an empty one. Raises StorageError."""
        with self._lock, _as_storage_errors(self._data):
            self._close(None)
            self._replace()

    def close(self) -> None:
        """Unmap the file."""
        with self._lock:
            self._close(None)

    def suspend(self) -> bool:
        """Unmap the file and keep everybody out until resume(). False: another thread is busy for too long."""
        acquired = self._lock.acquire(timeout=SUSPEND_WAIT_S)
        if acquired and self._opened is not None:
            self._verified = (self._opened.data, self._opened.guard)
            self._close(None)
        return acquired

    def resume(self) -> None:
        """Let everybody in again."""
        self._lock.release()

    # ---- transactions --------------------------------------------------------------------------------------

    def _run(self, body: Body[T], *, write: bool) -> T:
        opened = self._current()
        for _ in range(_RESIZES_MAX):
            try:
                with _typed_lmdb_errors(self._data), opened.environment.begin(write=write) as transaction:
                    if write and transaction.id() != opened.guard.transaction + 1:
                        raise DamageError(f"LMDB begins transaction {transaction.id()}: its lock file is another's")
                    # Handles last for the transaction: to keep them, LMDB would need a writer's lock at open.
                    return body(transaction, self._databases(opened.environment, transaction, create=False))
            except _MapResized:
                with _typed_lmdb_errors(self._data):
                    opened.environment.set_mapsize(0)  # another process grew it: take that size
            except _MapFull:
                with _typed_lmdb_errors(self._data):
                    opened.environment.reader_check()  # readers that died may pin what could be used again
                    opened.environment.set_mapsize(2 * opened.environment.info()["map_size"])
        raise StorageError(f"{self._data}: LMDB's map could not be made large enough")

    def _run_settled(self, body: Body[T]) -> T:
        """A read transaction. Readers take no file lock, unless a writer is just about to fill up its file."""
        try:
            return self._run(body, write=False)
        except _UnsettledError:
            with self._file_lock(shared=True):
                return self._run(body, write=False)

    def _run_guarded(self, body: Body[T]) -> T:
        """A write transaction and its guard, under the file lock."""
        opened = self._current()
        before = read_meta(opened.fd)
        if opened.guard.transaction != before.transaction:  # another process wrote
            guard = self._read_guard()
            if (guard.transaction, len(guard.digests)) != (before.transaction, before.page_count):
                raise DamageError(f"guard of transaction {guard.transaction}, found {before.transaction}")
            opened.guard, opened.free = guard, None
        if opened.free is None:
            opened.free = read_free_lists(opened.fd, before)
        try:
            return self._run(body, write=True)
        finally:  # also when an interrupt came between the commit and here
            self._follow(opened, before, opened.free)

    def _follow(self, opened: _Opened, before: Meta, free_before: FreeLists) -> None:
        after = read_meta(opened.fd)
        if after.transaction != before.transaction:
            _fill_up(opened.fd, after)
            opened.free = read_free_lists(opened.fd, after)
            opened.guard.update(opened.fd, after, before=free_before, after=opened.free)
            write_guard(self.directory / GUARD_NAME, opened.guard)
            start_writeback(opened.fd, 0, 0)

    def _current(self) -> _Opened:
        """What is open, if its files still lie there, in full length. Raises DamageError."""
        opened = self._opened
        if opened is None:
            raise _StaleError("not open")
        try:
            data, lock = self._data.stat(follow_symlinks=False), self._lmdb_lock.stat(follow_symlinks=False)
        except FileNotFoundError as error:
            raise _StaleError(f"{error.filename} was removed") from error
        if (_identity(data), _identity(lock)) != (opened.data, opened.lock):
            raise _StaleError("another process replaced the files")
        if data.st_size < read_meta(opened.fd).used_bytes:
            raise _UnsettledError(f"the file was cut to {data.st_size} bytes")
        return opened

    # ---- opening -------------------------------------------------------------------------------------------

    def _open_shared(self) -> None:
        """Open a sound file beside others that do the same; replace an odd one alone."""
        try:
            with self._file_lock(shared=True):
                self._open_verified()
                return
        except DamageError:
            pass
        with self._file_lock():
            self._open_or_create()

    def _replace(self) -> None:
        with self._file_lock():
            self._create()

    def _open_or_create(self) -> None:
        """Under the exclusive lock."""
        try:
            self._open_verified()
        except DamageError as reason:
            _log.info("%s: replaced by an empty index: %s", self._data, reason)
            self._create()

    def _open_verified(self) -> None:
        """Under the lock, at least shared. Raises DamageError unless every page is as the guard says."""
        try:
            fd = open_regular(self._data, os.O_RDWR)
        except FileNotFoundError as error:
            raise DamageError("the file is missing") from error
        try:
            meta = read_meta(fd)
            if os.fstat(fd).st_size < meta.used_bytes:
                raise DamageError(f"expected {meta.used_bytes} bytes, found {os.fstat(fd).st_size}")
            guard, verified = self._read_guard(), self._verified
            if verified != (_identity(os.fstat(fd)), guard):
                guard.check(fd, meta)
            self._verified = None
            self._opened = self._open_lmdb(fd, guard, create=False)
        except BaseException:
            os.close(fd)
            raise

    def _create(self) -> None:
        """Under the exclusive lock, with nothing open."""
        for name in (DATA_NAME, LMDB_LOCK_NAME, GUARD_NAME):
            clear_away(self.directory / name)
        guard = Guard(self.repository_id, self.id_bytes)
        fd = open_regular(self._data, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            self._opened = self._open_lmdb(fd, guard, create=True)
        except BaseException:
            os.close(fd)
            raise
        try:
            meta = read_meta(fd)
            _fill_up(fd, meta)
            guard.update(fd, meta, before={}, after=read_free_lists(fd, meta))
            write_guard(self.directory / GUARD_NAME, guard)
            start_writeback(fd, 0, 0)
        except BaseException as reason:
            self._close(reason)
            raise

    def _open_lmdb(self, fd: int, guard: Guard, *, create: bool) -> _Opened:
        """Map the file that `fd` reads, and create its databases or expect them there."""
        _allocate_lock_file(self._lmdb_lock)
        with _typed_lmdb_errors(self._data):
            environment = lmdb.open(
                os.fsencode(self._data),
                subdir=False,
                map_size=MAP_BYTES_FIRST,
                mode=0o666,
                max_readers=READERS_MAX,
                max_dbs=len(self._dupsort),
                max_spare_txns=0,
                sync=False,
                readahead=False,
                **_ENGINE,
            )
            try:
                environment.reader_check()
                with environment.begin(write=create) as transaction:
                    self._databases(environment, transaction, create=create)
                    # LMDB takes the number from its lock file, which no guard covers.
                    if not create and transaction.id() != guard.transaction:
                        raise DamageError(f"{LMDB_LOCK_NAME}: transaction {transaction.id()} is not the file's")
                lock = _identity(self._lmdb_lock.stat())
            except BaseException:
                environment.close()
                raise
        return _Opened(environment, fd, _identity(os.fstat(fd)), lock, guard)

    def _databases(self, environment: lmdb.Environment, transaction: Transaction, *, create: bool) -> Databases:
        return {
            name: environment.open_db(name, txn=transaction, dupsort=dupsort, create=create)
            for name, dupsort in self._dupsort.items()
        }

    def _read_guard(self) -> Guard:
        return read_guard(self.directory / GUARD_NAME, repository_id=self.repository_id, id_bytes=self.id_bytes)

    def _close(self, reason: BaseException | None) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            if reason is not None:
                _log.info("%s: opened anew: %s", self._data, reason)
            opened.environment.close()
            os.close(opened.fd)

    def _file_lock(self, *, shared: bool = False) -> contextlib.closing[LockedFile]:
        return contextlib.closing(take_lock(self.directory / LOCK_NAME, shared=shared))


@dataclass(slots=True)
class _Opened:
    """An environment that is mapped, and what is true of its file."""

    environment: lmdb.Environment
    fd: int
    """For pread: what is read this way cannot kill."""
    data: _Identity
    lock: _Identity
    """LMDB's lock file: processes with different ones would not see one another."""
    guard: Guard
    free: FreeLists | None = None
    """The free lists of the guard's transaction, once they are known."""


# ---- files -------------------------------------------------------------------------------------------------


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


def _identity(status: os.stat_result) -> _Identity:
    return status.st_dev, status.st_ino


def _fill_up(fd: int, meta: Meta) -> None:
    """Make the file as long as its meta says: LMDB leaves out last pages that were freed unwritten."""
    if os.fstat(fd).st_size < meta.used_bytes:
        os.ftruncate(fd, meta.used_bytes)


# ---- errors ------------------------------------------------------------------------------------------------


class _StaleError(DamageError):
    """What is open is not what lies there. Says nothing against that."""


class _UnsettledError(DamageError):
    """The file is shorter than it should be: cut, or a writer has not filled it up yet (_fill_up)."""


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
def _typed_lmdb_errors(path: Path) -> Iterator[None]:
    """Errors of py-lmdb by what is to be done: LMDB's own codes say that the file is odd, errno not."""
    try:
        yield
    except lmdb.MapResizedError as error:
        raise _MapResized from error
    except lmdb.MapFullError as error:
        raise _MapFull from error
    except lmdb.DiskError as error:
        raise NoSpaceError(f"{path}: the disk is full: {error}") from error
    except lmdb.Error as error:
        if type(error) is lmdb.Error or isinstance(error, _MACHINE_ERRORS):
            raise StorageError(f"{path}: {error}") from error
        raise DamageError(str(error)) from error


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
