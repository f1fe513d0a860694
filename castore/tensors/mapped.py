"""Arrays over memory that holds the logical bytes of a leaf already, such as a mapped file: nothing is copied.

Each has a storage of its own that is exactly as long as the leaf, so that saving or pickling one does not drag in what
lies beside it. The memory stays while any of them lives.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from castore.format.manifest import Entry
from castore.tensors.dtypes import checked_raw_bytes, is_numpy_name, numpy_dtype, torch_dtype
from castore.tensors.lazy import require_torch
from castore.tensors.targets import ARRAY_KINDS, is_numpy_array

_ALIGN_BYTES_MAX = 16
"""Of torch: an address divisible by the width of an element, and by 16 for complex128, the widest."""


def can_adopt(entry: Entry, *, device: Any = None) -> bool:
    """Whether the value of an entry can be made over its logical bytes: an array in row-major order, in host memory
    and with bytes in packs.
    """
    if entry.kind not in ARRAY_KINDS or entry.chunks is None or entry.hints.get("stride") is not None:
        return False
    return device is None or is_numpy_name(entry.dtype) or str(device).partition(":")[0] == "cpu"


def adopt(entry: Entry, memory: memoryview) -> Any | None:
    """The tensor or ndarray over `memory`, which is writable and holds all bytes of the leaf and no others.

    None when the address does not suit the element type. Raises FormatError when the entry makes no sense.
    """
    where = f"leaf {entry.path!r}"
    if is_numpy_array(entry, where):
        array_dtype = numpy_dtype(entry, where)
        checked_raw_bytes(entry, array_dtype.itemsize, where)
        array: np.ndarray[Any, Any] = np.ndarray(entry.shape, array_dtype, buffer=memory)
        return array if array.flags.aligned else None
    dtype = torch_dtype(entry.dtype, where)
    checked_raw_bytes(entry, dtype.itemsize, where)
    tensor = require_torch(where).frombuffer(memory, dtype=dtype)
    return None if tensor.data_ptr() % min(dtype.itemsize, _ALIGN_BYTES_MAX) else tensor.view(entry.shape)
