"""Stage a state: copy its bytes to host memory, so that training may go on changing it while the copy is being saved.

Copies go into slots of a pool, which are reused by the next save: a large chunk into a slot of its own, small ones one
behind another. What lies plainly in host memory is copied by threads, tensors on a CUDA device into pinned memory on a
stream of their own, all together, and waited for once.

Where the first look has an outline of the state, that is all that training waits for: the state is taken apart from the
outline when the copy is saved. Else it is taken apart before the copy is waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

from castore.checkpoint.plan import grid
from castore.host_memory import SLOT_BYTES_MIN, BufferPool, HostCopy, copy_bytes
from castore.options import GRID_BYTES
from castore.tensors import (
    Array,
    ArrayPayload,
    BytesPayload,
    DeviceCopies,
    FlatState,
    Glance,
    HostCopies,
    Payload,
    Piece,
    flatten_outline,
    share_elements,
)


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
    """A copy of a state, which no longer refers to the live one."""

    flatten: Callable[[], FlatState]
    """Its entries, and payloads that read the copies. Call once."""
    held_bytes: int
    """Host memory that the copies take."""
    release: Callable[[], None]
    """Give the memory back to the pool; call once, when the save is over."""


def staged_bytes(seen: Glance) -> int:
    """Host memory that the copies of a state will take, whole slots: exactly for arrays of their own, about as much
    for views that share memory.
    """
    lengths: tuple[list[int], list[int]] = [], []
    for array in {(array.address, array.raw_bytes): array for array in seen.arrays.values()}.values():
        lengths[_is_copied_by_device(array)].append(array.raw_bytes)
    return GRID_BYTES * sum(map(_slot_count, lengths)) + seen.text_bytes


def stage(seen: Glance, take_apart: Callable[[], FlatState], pool: BufferPool, pinned: BufferPool) -> StagedState:
    """Copy every array of a state; returns when the last byte has arrived, and `seen` lets go of the arrays.

    Without an outline the state is what `take_apart` gives. Raises what that raises, and MemoryError.
    """
    copies = _Copies(pool, pinned)
    arrays = seen.arrays.values()
    try:
        copies.begin(arrays)
        if seen.has_outline and not share_elements(arrays):
            copies.add(arrays)
            flatten = partial(_flatten_later, seen.outline, copies)
            text_bytes = seen.text_bytes
        else:
            flat = copies.of(take_apart())
            flatten = partial(_as_it_is, flat)
            text_bytes = sum(payload.raw_bytes for payload in flat.payloads if isinstance(payload, BytesPayload))
        copies.wait()
        for array in arrays:
            array.let_go()
    except BaseException:
        copies.wait()  # nobody may take a slot that is still being written to
        copies.release()
        raise
    return StagedState(flatten, copies.held_bytes + text_bytes, copies.release)


def _flatten_later(outline: Any, copies: _Copies) -> FlatState:
    return copies.of(flatten_outline(outline))


def _as_it_is(flat: FlatState) -> FlatState:
    return flat


def _is_copied_by_device(array: Array) -> bool:
    return array.on_cuda and array.raw_bytes >= SLOT_BYTES_MIN


Chunks = tuple[memoryview, ...]


class _Copies:
    """The copies of one state, and the slots that they lie in."""

    def __init__(self, pool: BufferPool, pinned: BufferPool) -> None:
        self._slots = _Slots(pool)
        self._pinned_slots = _Slots(pinned)
        self._by_host, self._by_device = HostCopies(), DeviceCopies()
        self._plain: dict[tuple[int, int], Chunks] = {}
        """Address and length in host memory → the copy of it."""
        self._others: dict[tuple[object, ...], Chunks] = {}
        """Key of an array that does not lie plainly there → the copy of its logical bytes."""

    def begin(self, arrays: Iterable[Array]) -> None:
        """Have what lies plainly in host memory copied, each piece of it once."""
        plain, place = self._plain, self._slots.place
        pieces: list[Piece] = []
        for array in arrays:
            if array.is_plain_memory:
                memory = address, length = array.address, array.raw_bytes
                if memory not in plain:
                    plain[memory] = chunks = place(length)
                    if len(chunks) == 1:
                        pieces.append((chunks[0], address))
                    else:
                        pieces.extend(zip(chunks, count(address, GRID_BYTES), strict=False))
        self._by_host.start(pieces)

    def add(self, arrays: Iterable[Array]) -> None:
        """Copy the rest too."""
        for array in arrays:
            if not array.is_plain_memory:
                self._chunks_of(ArrayPayload(array))

    def of(self, flat: FlatState) -> FlatState:
        """The state with copies for payloads, which may not be there before `wait` has returned; what has no copy yet
        is copied now. Bytes of numbers and texts are its own.
        """
        return FlatState(flat.entries, tuple(map(self._copy_of, flat.payloads)))

    def _copy_of(self, payload: Payload | None) -> Payload | None:
        if payload is None or isinstance(payload, BytesPayload):
            return payload
        return StagedPayload(payload.raw_bytes, payload.item_bytes, payload.is_float, self._chunks_of(payload))

    def _chunks_of(self, payload: Payload) -> Chunks:
        if not isinstance(payload, ArrayPayload):
            return self._copy(payload)
        array = payload.array
        if array.is_plain_memory:
            begun = self._plain.get((array.address, array.raw_bytes))
            return self._copy(payload) if begun is None else begun
        chunks = self._others.get(array.key)
        if chunks is None:
            chunks = self._others[array.key] = self._copy(payload)
        return chunks

    def _copy(self, payload: Payload) -> Chunks:
        if isinstance(payload, ArrayPayload) and _is_copied_by_device(payload.array):
            chunks = self._pinned_slots.place(payload.raw_bytes)
            self._by_device.start(payload.array, chunks)
            return chunks
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
        self._shared = memoryview(b"")
        """The slot that small chunks share, and how much of it they have."""
        self._shared_bytes = GRID_BYTES

    def __len__(self) -> int:
        return len(self._taken)

    def place(self, leaf_bytes: int) -> tuple[memoryview, ...]:
        """Memory for each chunk of a leaf."""
        if leaf_bytes < SLOT_BYTES_MIN:
            return (self._share(leaf_bytes),) if leaf_bytes else ()
        if leaf_bytes <= GRID_BYTES:
            return (self._take(leaf_bytes),)
        return tuple(self._place(stop - start) for start, stop in grid(leaf_bytes))

    def _place(self, length: int) -> memoryview:
        return self._take(length) if length >= SLOT_BYTES_MIN else self._share(length)

    def _share(self, length: int) -> memoryview:
        start = self._shared_bytes
        end = start + length
        if end > GRID_BYTES:
            self._shared, start, end = self._take(GRID_BYTES), 0, length
        self._shared_bytes = end
        return self._shared[start:end]

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
