"""Stage a state: copy its bytes to host memory, so that training may go on changing it while the copy is being saved.

Copies go into slots of the handle's pool, which are reused by the next save. Tensors on a CUDA device are copied into
pinned memory on a stream of their own, all together, and waited for once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from castore.checkpoint.plan import grid
from castore.host_memory import SLOT_BYTES_MIN, BufferPool, HostCopy, occupied_bytes
from castore.options import GRID_BYTES
from castore.tensors import DeviceCopies, FlatState, Payload, is_on_cuda


@dataclass(frozen=True, slots=True)
class StagedPayload:
    """The bytes of one leaf in host memory, one copy for each chunk of the grid."""

    raw_bytes: int
    item_bytes: int
    is_float: bool
    copies: tuple[HostCopy, ...]

    def read(self, start: int, stop: int) -> memoryview:
        """A range within one chunk, without a copy."""
        index = start // GRID_BYTES
        first = index * GRID_BYTES
        return self.copies[index].view[start - first : stop - first] if self.copies else memoryview(b"")


@dataclass(frozen=True, slots=True)
class StagedState:
    """A flat state whose payloads no longer refer to the live state."""

    flat: FlatState
    release: Callable[[], None]
    """Give the memory back to the pool; call once, when the save is over."""


def staged_bytes(flat: FlatState) -> int:
    """Host memory that the copies of a state will take."""
    lengths = (payload.raw_bytes for payload in flat.payloads if payload is not None)
    return sum(occupied_bytes(stop - start) for length in lengths for start, stop in grid(length))


def stage(flat: FlatState, pool: BufferPool, pinned: BufferPool) -> StagedState:
    """Copy every payload. Returns when the last byte has arrived in host memory."""
    taken: list[tuple[BufferPool, HostCopy]] = []
    staged: list[Payload | None] = []
    copies = DeviceCopies()

    def release() -> None:
        for owner, copy in taken:
            owner.release(copy)

    try:
        for payload in flat.payloads:
            if payload is None:
                staged.append(None)
                continue
            if is_on_cuda(payload) and payload.raw_bytes >= SLOT_BYTES_MIN:
                own = tuple(pinned.take(stop - start) for start, stop in grid(payload.raw_bytes))
                taken.extend((pinned, copy) for copy in own)
                copies.start(payload, [copy.view for copy in own])
            else:
                own = tuple(pool.copy(payload.read(start, stop)) for start, stop in grid(payload.raw_bytes))
                taken.extend((pool, copy) for copy in own)
            staged.append(StagedPayload(payload.raw_bytes, payload.item_bytes, payload.is_float, own))
    except BaseException:
        copies.wait()  # nobody may take a slot that a device still writes to
        release()
        raise
    copies.wait()
    return StagedState(FlatState(flat.entries, tuple(staged)), release)
