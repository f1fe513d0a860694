"""Copies of chunks in host memory that is used again and again, and the copies kept as delta bases.

Fresh memory costs a page fault every 4 KiB, which is slower than the copy itself. Slots of one chunk are cut from slabs
that are large enough for huge pages (numpy asks for them) and are kept until the pool is dropped.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

from castore.available_memory import available_bytes
from castore.ids import Buffer, ChunkId
from castore.options import BASE_BUDGET_SHARE, GRID_BYTES

_SLAB_SLOTS = 32
SLOT_BYTES_MIN = GRID_BYTES // 2
"""Below this a slot would waste more memory than it holds."""


@dataclass(slots=True)
class HostCopy:
    """A copy of one chunk. Not to be changed; making a frozen one takes three times as long."""

    view: memoryview
    slot: memoryview | None
    """The whole slot, to be given back; None when the copy has memory of its own."""

    @property
    def held_bytes(self) -> int:
        """Memory that the copy occupies."""
        return len(self.view) if self.slot is None else GRID_BYTES


MakeSlab = Callable[[int], Any]
"""Length in bytes → a writable buffer of bytes: an array of uint8, or a memoryview."""


def copy_bytes(target: memoryview, raw: Buffer) -> None:
    """Fill memory with as many bytes. numpy lets other threads run meanwhile, assigning to a memoryview does not."""
    import numpy as np  # costs 80 ms of start-up, which commands without tensors need not pay

    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(raw, np.uint8))


class BufferPool:
    """Slots of one chunk. Thread-safe."""

    def __init__(self, make_slab: MakeSlab | None = None) -> None:
        self._make_slab = make_slab or _plain_slab
        self._lock = threading.Lock()
        self._free: list[memoryview] = []

    def copy(self, raw: Buffer) -> HostCopy:
        """Copy at most one chunk. `release` the copy after use."""
        if len(raw) < SLOT_BYTES_MIN:
            return HostCopy(memoryview(bytes(raw)), None)
        copy = self.take(len(raw))
        copy_bytes(copy.view, raw)
        return copy

    def take(self, length: int) -> HostCopy:
        """A slot for at most one chunk, to be filled by the caller."""
        with self._lock:
            if not self._free:
                slab = memoryview(self._make_slab(_SLAB_SLOTS * GRID_BYTES))
                self._free = [slab[at * GRID_BYTES : (at + 1) * GRID_BYTES] for at in range(_SLAB_SLOTS)]
            slot = self._free.pop()
        return HostCopy(slot[:length], slot)

    def release(self, copy: HostCopy) -> None:
        """Give the memory of a copy back; nobody may look at it afterwards."""
        if copy.slot is not None:
            with self._lock:
                self._free.append(copy.slot)


def _plain_slab(length: int) -> Any:
    import numpy as np  # costs 80 ms of start-up, which commands without tensors need not pay

    return np.empty(length, np.uint8)


class BaseMemory:
    """Raw bytes of chunks that the next save will take differences from, within a budget. Thread-safe.

    The budget is BASE_BUDGET_SHARE of the memory that is available when a save begins, for all repositories of the
    process together; what does not fit is read from the repository when it is needed. Saves of several threads share
    it, so each pins what it takes differences from: the memory of a copy that another save drops is overwritten by the
    next one.
    """

    def __init__(self, pool: BufferPool, digest: Callable[[Buffer], bytes]) -> None:
        self._pool = pool
        self._digest = digest
        self._lock = threading.Lock()
        self._copies: dict[ChunkId, HostCopy] = {}
        self._pins: Counter[ChunkId] = Counter()
        self._held_bytes = 0
        self._budget_bytes = 0
        with _all_lock:
            _all.add(self)

    @property
    def held_bytes(self) -> int:
        """Memory that the copies occupy."""
        return self._held_bytes

    def set_budget(self, budget_bytes: int | None = None) -> None:
        """Fix the budget for the next copies, and drop what exceeds it and is not pinned.

        Without one, it is a share of what is available now beside the copies of the whole process, less those of its
        other repositories.
        """
        if budget_bytes is None:
            with _all_lock:
                others_bytes = sum(memory._held_bytes for memory in _all if memory is not self)
            budget_bytes = int(BASE_BUDGET_SHARE * (available_bytes() + self._held_bytes + others_bytes)) - others_bytes
        with self._lock:
            self._budget_bytes = budget_bytes
            for chunk_id in list(self._copies):
                if self._held_bytes <= budget_bytes:
                    break
                if chunk_id not in self._pins:
                    self._drop(chunk_id)

    def get(self, chunk_id: ChunkId) -> memoryview | None:
        """The raw bytes, valid as long as the chunk is pinned; None when they are not here."""
        with self._lock:
            copy = self._copies.get(chunk_id)
            return copy.view if copy is not None else None

    def put(self, chunk_id: ChunkId, raw: Buffer) -> None:
        """Keep a copy, unless it is here already or the budget is spent.

        The copy is hashed: were the state changed by another thread after it was encoded, every difference from the
        copy would be wrong, and would agree with itself when it is proved.
        """
        with self._lock:
            if not self._is_wanted(chunk_id):
                return
        copy = self._pool.copy(raw)
        right = self._digest(copy.view) == chunk_id
        with self._lock:
            if right and self._is_wanted(chunk_id):  # other threads have kept theirs meanwhile
                self._copies[chunk_id] = copy
                self._held_bytes += copy.held_bytes
                return
        self._pool.release(copy)

    def give_up(self, chunk_id: ChunkId) -> None:
        """Drop a copy that nobody will need but the one save that pinned it, which is done with it: the next copy gets
        its memory.
        """
        with self._lock:
            if chunk_id in self._copies and self._pins[chunk_id] <= 1:
                self._drop(chunk_id)

    def _is_wanted(self, chunk_id: ChunkId) -> bool:
        """Under the lock."""
        return chunk_id not in self._copies and self._held_bytes + GRID_BYTES <= self._budget_bytes

    def pin(self, ids: Collection[ChunkId]) -> None:
        """Keep these chunks, whether they are here already or not, until they are unpinned as often."""
        with self._lock:
            self._pins.update(ids)

    def unpin(self, ids: Collection[ChunkId]) -> None:
        """Undo one `pin` of the same ids."""
        with self._lock:
            self._pins.subtract(ids)
            self._pins = +self._pins

    def keep_only(self, ids: Collection[ChunkId]) -> None:
        """Drop every other copy that is not pinned."""
        with self._lock:
            for chunk_id in self._copies.keys() - set(ids) - self._pins.keys():
                self._drop(chunk_id)

    def _drop(self, chunk_id: ChunkId) -> None:
        """Under the lock."""
        copy = self._copies.pop(chunk_id)
        self._held_bytes -= copy.held_bytes
        self._pool.release(copy)


_all: WeakSet[BaseMemory] = WeakSet()
"""Of this process: they share one budget."""
_all_lock = threading.Lock()
