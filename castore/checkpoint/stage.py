"""Stage a state: copy its bytes to host memory, so that training may go on changing it while the copy is being saved.

Copies go into slots of a pool, which are reused by the next save: a large chunk into a slot of its own, small ones one
behind another. What lies plainly in host memory is copied by threads while the state is still being taken apart.
Tensors on a CUDA device are copied into pinned memory on a stream of their own, all together, and waited for once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count

from castore.checkpoint.plan import grid
from castore.host_memory import SLOT_BYTES_MIN, BufferPool, HostCopy, copy_bytes
from castore.options import GRID_BYTES
from castore.tensors import Array, ArrayPayload, DeviceCopies, FlatState, Glance, HostCopies, Payload, Piece


@dataclass(slots=True)
class StagedPayload:
    """The bytes of one leaf in host memory, one view for each chunk of the grid. Not frozen, for what that costs."""

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
    held_bytes: int
    """Host memory that the copies take."""
    release: Callable[[], None]
    """Give the memory back to the pool; call once, when the save is over."""


def staged_bytes(seen: Glance) -> int:
    """Host memory that the copies of a state will take, whole slots: exactly for arrays of their own, about as much
    for views that share memory.
    """
    lengths: tuple[list[int], list[int]] = [seen.text_bytes], []
    for array in {array.key: array for array in seen.arrays.values()}.values():
        lengths[_is_copied_by_device(array)].append(array.raw_bytes)
    return GRID_BYTES * sum(map(_slot_count, lengths))


def stage(seen: Glance, take_apart: Callable[[], FlatState], pool: BufferPool, pinned: BufferPool) -> StagedState:
    """Copy every payload of the state that `take_apart` gives; what has been seen and lies plainly in host memory is
    being copied while it does. Returns when the last byte has arrived. Raises what `take_apart` raises, and
    MemoryError.
    """
    copies = _Copies(pool, pinned)
    try:
        copies.begin(seen.arrays.values())
        flat = take_apart()
        staged = tuple(None if payload is None else copies.of(payload) for payload in flat.payloads)
        copies.wait()
    except BaseException:
        copies.wait()  # nobody may take a slot that is still being written to
        copies.release()
        raise
    return StagedState(FlatState(flat.entries, staged), copies.held_bytes, copies.release)


def _is_copied_by_device(array: Array) -> bool:
    return array.on_cuda and array.raw_bytes >= SLOT_BYTES_MIN


Chunks = tuple[memoryview, ...]


class _Copies:
    """The copies of one state, and the slots that they lie in."""

    def __init__(self, pool: BufferPool, pinned: BufferPool) -> None:
        self._slots = _Slots(pool)
        self._pinned_slots = _Slots(pinned)
        self._by_host, self._by_device = HostCopies(), DeviceCopies()
        self._begun: dict[tuple[int, int], Chunks] = {}
        """Address and length in host memory → the copy of it."""

    def begin(self, arrays: Iterable[Array]) -> None:
        """Start to copy what lies plainly in host memory, each piece of it once."""
        pieces: list[Piece] = []
        for array in arrays:
            memory = array.address, array.raw_bytes
            if array.is_plain_memory and memory not in self._begun:
                self._begun[memory] = chunks = self._slots.place(array.raw_bytes)
                pieces.extend(zip(chunks, count(array.address, GRID_BYTES), strict=False))
        self._by_host.start(pieces)

    def of(self, payload: Payload) -> StagedPayload:
        """The copy of one payload; it may be still under way."""
        return StagedPayload(payload.raw_bytes, payload.item_bytes, payload.is_float, self._chunks_of(payload))

    def _chunks_of(self, payload: Payload) -> Chunks:
        if isinstance(payload, ArrayPayload):
            array = payload.array
            if _is_copied_by_device(array):
                chunks = self._pinned_slots.place(array.raw_bytes)
                self._by_device.start(array, chunks)
                return chunks
            begun = self._begun.get((array.address, array.raw_bytes)) if array.is_plain_memory else None
            if begun is not None:
                return begun
        chunks = self._slots.place(payload.raw_bytes)
        for (start, stop), chunk in zip(grid(payload.raw_bytes), chunks, strict=True):
            copy_bytes(chunk, payload.read(start, stop))
        return chunks

    def wait(self) -> None:
        """Until every byte has arrived."""
        self._by_host.wait()
        self._by_device.wait()

    @property
    def held_bytes(self) -> int:
        """Host memory that they take."""
        return GRID_BYTES * (len(self._slots) + len(self._pinned_slots))

    def release(self) -> None:
        """Nobody may look at them any more."""
        self._slots.release()
        self._pinned_slots.release()


class _Slots:
    """The slots of one state."""

    def __init__(self, pool: BufferPool) -> None:
        self._pool = pool
        self._taken: list[HostCopy] = []
        self._room = memoryview(b"")
        """What is left of the slot that small chunks share."""

    def __len__(self) -> int:
        return len(self._taken)

    def place(self, leaf_bytes: int) -> tuple[memoryview, ...]:
        """Memory for each chunk of a leaf."""
        if leaf_bytes < SLOT_BYTES_MIN:
            return (self._share(leaf_bytes),) if leaf_bytes else ()
        return tuple(self._place(stop - start) for start, stop in grid(leaf_bytes))

    def _place(self, length: int) -> memoryview:
        return self._take(length) if length >= SLOT_BYTES_MIN else self._share(length)

    def _share(self, length: int) -> memoryview:
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
    slots = room = 0
    for leaf_bytes in lengths:
        whole, rest = divmod(leaf_bytes, GRID_BYTES)
        slots += whole
        if rest >= SLOT_BYTES_MIN:
            slots += 1
        elif room < rest:
            slots, room = slots + 1, GRID_BYTES - rest
        else:
            room -= rest
    return slots
