"""Copies of device tensors into pinned host memory: started together on streams of their own, waited for once.

The copy engine reads the device while the current stream goes on with other work; it begins when what was queued before
is done, so that it sees the state at the call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from castore.tensors.arrays import words_on_device
from castore.tensors.lazy import require_torch
from castore.tensors.payloads import ArrayPayload, Payload

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


def is_on_cuda(payload: Payload) -> bool:
    """Whether the leaf's bytes lie on a CUDA device."""
    return isinstance(payload, ArrayPayload) and payload.array.device.startswith("cuda")


def pinned_slab(length: int) -> npt.NDArray[np.uint8]:
    """Page-locked host memory, which the copy engine of a device can write to by itself."""
    torch = require_torch("CUDA tensors")
    slab: npt.NDArray[np.uint8] = torch.empty(length, dtype=torch.uint8, pin_memory=True).numpy()
    return slab


_PORTABLE = 1
"""cudaHostRegisterPortable: pinned for every device of the process."""


def pin(address: int, length: int) -> Callable[[], None]:
    """Lock the pages of host memory that others made; returns what undoes it, for while the memory is still there.

    Raises RuntimeError when the driver refuses.
    """
    runtime = require_torch("CUDA tensors").cuda.cudart()
    status = int(runtime.cudaHostRegister(address, length, _PORTABLE))
    if status != 0:
        raise RuntimeError(f"the driver does not lock {length} bytes of it (cudaHostRegister returns {status})")
    return lambda: runtime.cudaHostUnregister(address) and None


class DeviceCopies:
    """Copies that are under way. Not thread-safe."""

    def __init__(self) -> None:
        self._streams: dict[Any, Any] = {}
        self._sources: list[Any] = []
        """Contiguous copies on the device, which must live until the streams are done."""

    def start(self, payload: Payload, slots: Sequence[memoryview]) -> None:
        """Begin to copy the logical bytes of a CUDA leaf into pinned slots, which they fill in order."""
        assert isinstance(payload, ArrayPayload)
        torch = require_torch("CUDA tensors")
        value = payload.array.value
        stream = self._stream(torch, value.device)
        with torch.cuda.stream(stream), torch.no_grad():
            if payload.array.is_lazy:
                words = value.detach().resolve_conj().resolve_neg()
                words = torch.view_as_real(words) if words.is_complex() else words
            else:
                words = words_on_device(payload.array)
            source = words.contiguous().reshape(-1).view(torch.uint8)
            at = 0
            for slot in slots:
                torch.frombuffer(slot, dtype=torch.uint8).copy_(source[at : at + len(slot)], non_blocking=True)
                at += len(slot)
            self._sources.append(source)

    def wait(self) -> None:
        """Until every byte has arrived."""
        for stream in self._streams.values():
            stream.synchronize()
        self._sources.clear()

    def _stream(self, torch: Any, device: Any) -> Any:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        return stream
