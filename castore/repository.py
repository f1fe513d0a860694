"""An open repository: the pieces wired together, and nothing else.

A `Handle` owns what must be closed and what must be kept consistent between calls (the heads this handle has seen). The
operations on it are functions in checkpoint/ and maintenance/; people use `castore.Repository` (api.py).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType

from castore.backend.base import Backend
from castore.errors import CastoreError
from castore.format.config import Config
from castore.format.layout import CONFIG, RESERVE
from castore.format.manifest import Entry
from castore.hashing import Hasher, hasher_for
from castore.host_memory import BaseMemory, BufferPool, MakeSlab
from castore.ids import SnapshotId
from castore.index import Index, MemoryIndex, open_index
from castore.manifests import ManifestReader
from castore.opening import create_at, open_at
from castore.options import GC_RESERVE_BYTES, RepositoryOptions
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
        self._written: tuple[SnapshotId, Sequence[Entry]] | None = None

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

    def written_entries(self, snapshot_id: SnapshotId) -> Sequence[Entry] | None:
        """The entries of the snapshot that this handle wrote last; None of any other."""
        with self._unshared_lock():
            return self._written[1] if self._written is not None and self._written[0] == snapshot_id else None

    def note_written(self, snapshot_id: SnapshotId, entries: Sequence[Entry]) -> None:
        """Remember what a save wrote: the next one, which continues it, need not read it."""
        with self._unshared_lock():
            self._written = (snapshot_id, entries)

    def close(self) -> None:
        """Close files and the index. The handle opens them again when it is used again."""
        with self._unshared_lock():
            if self._bases is not None:
                self._bases.keep_only(())  # its slots go back to the pool
            self._pool, self._pinned = BufferPool(), None
            if self._store is not None:
                self._store.close()
                self._store = self._manifests = self._bases = None
            self._written = None

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
    """Create a repository (opening.py says what it raises) and open it."""
    backend, config = create_at(path, options, now_ns=clock())
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
    """Open an existing repository (opening.py says what it raises)."""
    return Handle(*open_at(path), clock=clock)


def _open_index(backend: Backend, config: Config, hasher: Hasher) -> Index:
    """LMDB beside the repository, or in the user's cache, or in memory: whatever works there."""
    config_path = backend.local_path(CONFIG)
    if config_path is None:
        return MemoryIndex()
    return open_index(config_path.parent, repository_id=config.repository_id, id_bytes=hasher.digest_bytes)
