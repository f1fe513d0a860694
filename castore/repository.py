"""Create, open and close a repository: the pieces wired together, and nothing else.

A `Handle` owns what must be closed and what must be kept consistent between calls (the heads this handle has seen). The
operations on it are functions in checkpoint/ and maintenance/; people use `castore.Repository` (api.py).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType

from castore.backend.base import Backend
from castore.backend.local import LocalBackend
from castore.errors import (
    CastoreError,
    FormatError,
    NotFoundError,
    RepositoryAccessError,
    RepositoryExistsError,
    RepositoryNotFoundError,
    UsageError,
)
from castore.format.config import Config, decode_config, encode_config
from castore.format.layout import CACHE, CONFIG, LEASES, PACKS, RESERVE, SNAPSHOTS
from castore.hashing import Hasher, hasher_for
from castore.host_memory import BaseMemory, BufferPool, MakeSlab
from castore.ids import SnapshotId
from castore.index import Index, MemoryIndex, open_index
from castore.options import COMPRESSIONS, GC_RESERVE_BYTES, TEXT_FILE_BYTES_MAX, RepositoryOptions
from castore.snapshots import ManifestReader
from castore.store import ChunkStore

Clock = Callable[[], int]
"""Nanoseconds since 1970."""


@dataclass(frozen=True, slots=True)
class Head:
    """The head of a branch as this handle last saw it; None: the branch did not exist."""

    snapshot_id: SnapshotId | None


class Handle:
    """An open repository. Thread-safe. A forked child gets a fresh store on first use, since it must not share LMDB."""

    def __init__(
        self, backend: Backend, config: Config, *, clock: Clock = time.time_ns, base_memory_bytes: int | None = None
    ) -> None:
        """`base_memory_bytes` bounds the copies kept for differences; None: a share of the available memory."""
        self.base_memory_bytes = base_memory_bytes
        self.backend = backend
        self.config = config
        self.hasher: Hasher = hasher_for(config.options.hash)
        self.clock = clock
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._store: ChunkStore | None = None
        self._manifests: ManifestReader | None = None
        self._pool = BufferPool()
        self._pinned: BufferPool | None = None
        self._bases: BaseMemory | None = None
        self._heads: dict[str, Head] = {}

    @property
    def store(self) -> ChunkStore:
        """The chunk store, opened on first use: history needs none."""
        with self._unshared_lock():
            if self._store is None:
                self._store = ChunkStore(self.backend, _open_index(self.backend, self.config, self.hasher), self.hasher)
                self._manifests = ManifestReader(self._store)
            return self._store

    @property
    def manifests(self) -> ManifestReader:
        """The reader of manifests, which keeps decoded parts."""
        store = self.store
        with self._lock:
            if self._manifests is None:
                self._manifests = ManifestReader(store)
            return self._manifests

    @property
    def bases(self) -> BaseMemory:
        """Raw bytes kept in memory for the differences of the next save."""
        with self._unshared_lock():
            if self._bases is None:
                self._bases = BaseMemory(self._pool, self.hasher.digest)
            return self._bases

    @property
    def pool(self) -> BufferPool:
        """Slots for copies of chunks in host memory."""
        with self._unshared_lock():
            return self._pool

    def pinned_pool(self, make_slab: MakeSlab) -> BufferPool:
        """Slots in page-locked memory, for what comes from a device."""
        with self._unshared_lock():
            if self._pinned is None:
                self._pinned = BufferPool(make_slab)
            return self._pinned

    def seen_head(self, branch: str) -> Head | None:
        """The head that this handle last saved, loaded or was given; None when it has not looked."""
        with self._unshared_lock():
            return self._heads.get(branch)

    def note_head(
        self, branch: str, snapshot_id: SnapshotId | None, *, unless_noted_since: Head | EllipsisType | None = ...
    ) -> None:
        """Remember a head: the next save to that branch expects it.

        With `unless_noted_since`, the head seen before this one was read, what another thread noted meanwhile stays: a
        load beside a save must not take the handle back to the head before that save.
        """
        with self._unshared_lock():
            if unless_noted_since is ... or self._heads.get(branch) == unless_noted_since:
                self._heads[branch] = Head(snapshot_id)

    def close(self) -> None:
        """Close files and the index. The handle opens them again when it is used again."""
        with self._unshared_lock():
            if self._bases is not None:
                self._bases.keep_only(())  # its slots go back to the pool
            self._pool, self._pinned = BufferPool(), None
            if self._store is not None:
                self._store.close()
                self._store = self._manifests = self._bases = None

    def _unshared_lock(self) -> threading.Lock:
        """The lock, after a forked child has let go of what it must not share (its parent's lock included)."""
        if self._pid != os.getpid():
            self._lock = threading.Lock()
            self._store = self._manifests = self._bases = None
            self._pool = BufferPool()
            self._pinned = None
            self._pid = os.getpid()
        return self._lock


def create(path: str | Path, options: RepositoryOptions, *, clock: Clock = time.time_ns) -> Handle:
    """Create a repository in a directory that is absent or empty; its parents are made.

    Raises RepositoryExistsError, UsageError (options; a directory with other files in it) or RepositoryAccessError.
    """
    hasher_for(options.hash)
    if options.compression not in COMPRESSIONS:
        raise UsageError(f"unknown compression {options.compression!r}; expected one of {', '.join(COMPRESSIONS)}")
    if not options.lease_s > 0 or not options.orphan_grace_s > 0:
        raise UsageError(
            f"lease_s and orphan_grace_s must be above 0 s, found {options.lease_s} and {options.orphan_grace_s}"
        )
    root = Path(path)
    _check_empty(root)
    backend = LocalBackend(root)
    config = Config(os.urandom(16), options, clock(), {"read": frozenset(), "write": frozenset(), "gc": frozenset()})
    if not backend.put_if_absent(CONFIG, encode_config(config)):
        raise RepositoryExistsError(f"{root} already holds a repository; open it with castore.open({str(root)!r})")
    make_reserve(backend)
    return Handle(backend, config, clock=clock)


def make_reserve(backend: Backend) -> None:
    """Set a little space aside, where that is still to do: a collector spends it when the disk is full. Without space
    for it there is none.
    """
    if backend.stat(RESERVE) is None:
        with suppress(CastoreError):
            backend.put_if_absent(RESERVE, os.urandom(GC_RESERVE_BYTES))  # noise: no file system shrinks it


def open_repository(path: str | Path, *, clock: Clock = time.time_ns) -> Handle:
    """Open an existing repository.

    Raises RepositoryNotFoundError, RepositoryAccessError, UnsupportedFormatError or DamageError (of the config).
    """
    root = Path(path)
    backend = LocalBackend(root)
    where = f"{root}/{CONFIG}"
    try:
        data = backend.read(CONFIG, max_bytes=TEXT_FILE_BYTES_MAX)
    except NotFoundError as error:
        raise _not_found(root) from error
    config = decode_config(data, where=where)
    config.check_features("read", where=where)
    return Handle(backend, config, clock=clock)


def _not_found(root: Path) -> Exception:
    if root.is_file():
        return RepositoryNotFoundError(f"{root} is a file, not a repository; give the directory that holds `config`")
    if _looks_like_repository(root):
        return FormatError(
            f"{root} has packs or snapshots but no config file; restore it from a copy (`castore dump` shows the "
            "other files)"
        )
    return RepositoryNotFoundError(f"no repository at {root}; create one with `castore init {root}` or castore.init()")


def _looks_like_repository(root: Path) -> bool:
    return any((root / name.strip("/")).is_dir() for name in (PACKS, SNAPSHOTS))


def _check_empty(root: Path) -> None:
    """Refuse to mix a repository with other files: gc owns everything below its root."""
    try:
        found = sorted(entry.name for entry in root.iterdir()) if root.exists() else []
    except NotADirectoryError as error:
        raise UsageError(f"{root} is a file; a repository needs a directory") from error
    except PermissionError as error:
        raise RepositoryAccessError(f"{root}: cannot list: {error.strerror}; check owner and permissions") from error
    if CONFIG in found:
        raise RepositoryExistsError(f"{root} already holds a repository; open it with castore.open({str(root)!r})")
    own = {name.split("/")[0] for name in (CACHE, LEASES)}
    others = [name for name in found if not name.startswith(".") and name not in own]
    if others:
        raise UsageError(f"{root} is not empty (it holds {others[0]!r}); give a directory of its own to the repository")


def _open_index(backend: Backend, config: Config, hasher: Hasher) -> Index:
    """LMDB beside the repository, or in the user's cache, or in memory: whatever works there."""
    config_path = backend.local_path(CONFIG)
    if config_path is None:
        return MemoryIndex()
    return open_index(config_path.parent, repository_id=config.repository_id, id_bytes=hasher.digest_bytes)
