"""Stage a state: copy its bytes to host memory, so that training may go on changing it while the copy is being saved.

Copies go into slots of a pool, which are reused by the next save: a large chunk into a slot of its own, small ones one
behind another. Tensors on a CUDA device are copied into pinned memory on a stream of their own, all together, and
waited for once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from castore.checkpoint.plan import grid
from castore.host_memory import SLOT_BYTES_MIN, BufferPool, HostCopy, copy_bytes
from castore.options import GRID_BYTES
from castore.tensors import DeviceCopies, FlatState, Payload, is_on_cuda


@dataclass(frozen=True, slots=True)
class StagedPayload:
    """The bytes of one leaf in host memory, one view for each chunk of the grid."""

    raw_bytes: int
    item_bytes: int
    is_float: bool
    chunks: tuple[memoryview, ...]

    def read(self, start: int, stop: int) -> memoryview:
        """A range within one chunk, without a copy."""
        index = start // GRID_BYTES
        first = index * GRID_BYTES
        return self.chunks[index][start - first : stop - first] if self.chunks else memoryview(b"")


@dataclass(frozen=True, slots=True)
class StagedState:
    """A flat state whose payloads no longer refer to the live state."""

    flat: FlatState
    release: Callable[[], None]
    """Give the memory back to the pool; call once, when the save is over."""


def staged_bytes(flat: FlatState) -> int:
    """Host memory that the copies of a state will take: whole slots."""
    payloads = [payload for payload in flat.payloads if payload is not None]
    on_host = (payload.raw_bytes for payload in payloads if not _is_copied_by_device(payload))
    on_device = (payload.raw_bytes for payload in payloads if _is_copied_by_device(payload))
    return GRID_BYTES * (_slot_count(on_host) + _slot_count(on_device))


def stage(flat: FlatState, pool: BufferPool, pinned: BufferPool) -> StagedState:
    """Copy every payload. Returns when the last byte has arrived in host memory."""
    slots, pinned_slots = _Slots(pool), _Slots(pinned)
    staged: list[Payload | None] = []
    copies = DeviceCopies()

    def release() -> None:
        slots.release()
        pinned_slots.release()

    try:
        for payload in flat.payloads:
            if payload is None:
                staged.append(None)
                continue
            by_device = _is_copied_by_device(payload)
            place = (pinned_slots if by_device else slots).place
            chunks = tuple(place(stop - start) for start, stop in grid(payload.raw_bytes))
            if by_device:
                copies.start(payload, chunks)
            else:
                for (start, stop), chunk in zip(grid(payload.raw_bytes), chunks, strict=True):
                    copy_bytes(chunk, payload.read(start, stop))
            staged.append(StagedPayload(payload.raw_bytes, payload.item_bytes, payload.is_float, chunks))
    except BaseException:
        copies.wait()  # nobody may take a slot that a device still writes to
        release()
        raise
    copies.wait()
    return StagedState(FlatState(flat.entries, tuple(staged)), release)


def _is_copied_by_device(payload: Payload) -> bool:
    return is_on_cuda(payload) and payload.raw_bytes >= SLOT_BYTES_MIN


class _Slots:
    """The slots of one state."""

    def __init__(self, pool: BufferPool) -> None:
        self._pool = pool
        self._taken: list[HostCopy] = []
        self._room = memoryview(b"")
        """What is left of the slot that small chunks share."""

    def place(self, length: int) -> memoryview:
        """Memory for one chunk."""
        if length >= SLOT_BYTES_MIN:
            return self._take(length)
        if len(self._room) < length:
            self._room = self._take(GRID_BYTES)
        place, self._room = self._room[:length], self._room[length:]
        return place

    def release(self) -> None:
        """Nobody may look at the memory any more."""
        for copy in self._taken:
            self._pool.release(copy)

    def _take(self, length: int) -> memoryview:
        copy = self._pool.take(length)
        self._taken.append(copy)
        return copy.view


def _slot_count(lengths: Iterable[int]) -> int:
    """Slots that `_Slots` takes for leaves of these lengths."""
    count = room = 0
    for length in (stop - start for leaf_bytes in lengths for start, stop in grid(leaf_bytes)):
        if length >= SLOT_BYTES_MIN:
            count += 1
            continue
        if room < length:
            count, room = count + 1, GRID_BYTES
        room -= length
    return count
