"""Element types: the name that the manifest gives them, their size, and what a codec wants to know about
them.

    torch   the name without "torch.":  float32  bfloat16  float8_e4m3fn  bool  int4
    numpy   dtype.str, byte order included:  <f4  >f4  |b1  <U12  <M8[ns]
            structured types keep that code and are described by attrs["descr"]:
            [item bytes, aligned, [[name, title or nil, format, shape, offset], …]]
            where format is a code, or such a list again

numpy's own `dtype.descr` is not used: it cannot express titles with padding, overlapping fields or their
order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from castore.errors import FormatError, UnsupportedLeafError
from castore.format.manifest import Entry
from castore.tensors.lazy import require_torch

QUANTIZED_STORAGE = {
    "quint8": "uint8",
    "qint8": "int8",
    "qint32": "int32",
    "quint4x2": "uint8",
    "quint2x4": "uint8",
}
"""torch's quantized types and the plain type whose bytes they hold; the last two pack 2 and 4 elements in a
byte.
"""
ELEMENTS_PER_BYTE = {"quint4x2": 2, "quint2x4": 4}

_PLANE_BYTES_MAX = 8
_NUMPY_ORDERS = "<>|="


@dataclass(frozen=True, slots=True)
class Element:
    """The element type of an array leaf."""

    name: str
    """As the manifest writes it."""
    item_bytes: int
    plane_bytes: int
    """Size of the numbers inside, for byte planes: half an item for complex, 4 for text, 1 for records."""
    is_float: bool
    """Whether these numbers are binary floating point in little-endian order."""
    descr: Any = None
    """Description of a structured numpy type, msgpack-able; None for all others."""


def is_numpy_name(name: str) -> bool:
    """Whether the manifest's dtype is a numpy code rather than a torch name."""
    return name[:1] in _NUMPY_ORDERS and name != ""


# ---- torch -------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def torch_element(dtype: Any) -> Element:
    """The element type of a torch dtype, quantized ones included."""
    name = str(dtype).removeprefix("torch.")
    item_bytes = int(dtype.itemsize)
    plane_bytes = item_bytes // 2 if dtype.is_complex else item_bytes
    return Element(
        name,
        item_bytes,
        min(plane_bytes, _PLANE_BYTES_MAX),
        bool(dtype.is_floating_point or dtype.is_complex),
    )


def torch_dtype(name: str, where: str) -> Any:
    """The plain torch dtype of that manifest name. Raises FormatError: unknown, quantized, or not its first
    name.
    """
    torch = require_torch(where)
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or str(dtype) != f"torch.{name}" or name in QUANTIZED_STORAGE:
        raise FormatError(f"{where}: torch {torch.__version__} has no dtype {name!r}; a newer torch may have it")
    return dtype


# ---- numpy -------------------------------------------------------------------------------------------------


def numpy_element(dtype: np.dtype[Any], path: str) -> Element:
    """The element type of a numpy dtype. Raises UnsupportedLeafError for objects and for types of other
    packages.
    """
    if dtype.hasobject:
        raise UnsupportedLeafError(
            path, f"ndarray of {dtype}", "its elements are Python objects: use a list, or a numeric dtype"
        )
    if dtype.itemsize == 0 and dtype.kind in "SU":
        raise UnsupportedLeafError(
            path, f"ndarray of {dtype.str}", "numpy makes no new arrays of empty text: use a wider type"
        )
    structured = dtype.names is not None
    descr = _describe(dtype) if structured else None
    if _dtype_from(descr if structured else dtype.str) != dtype:
        raise UnsupportedLeafError(
            path, f"ndarray of {dtype}", "numpy cannot name this type by itself: view it as bytes"
        )
    kind, item_bytes = dtype.kind, dtype.itemsize
    native = dtype.str[0] != ">"
    plane_bytes = {"c": item_bytes // 2, "U": 4, "S": 1, "V": 1}.get(kind, item_bytes)
    is_float = kind in "fc" and native and plane_bytes <= _PLANE_BYTES_MAX
    return Element(dtype.str, item_bytes, max(1, min(plane_bytes, _PLANE_BYTES_MAX)), is_float, descr)


def numpy_dtype(entry: Entry, where: str) -> np.dtype[Any]:
    """The numpy dtype of an entry. Raises FormatError for anything that numpy_element cannot have written."""
    descr = entry.attrs.get("descr")
    try:
        dtype = _dtype_from(entry.dtype if descr is None else descr)
    except (TypeError, ValueError, KeyError, IndexError, RecursionError, OverflowError, SyntaxError) as error:
        raise FormatError(f"{where}: {entry.dtype!r} is no numpy dtype: {error}") from error
    if dtype.hasobject or dtype.str != entry.dtype or dtype.subdtype is not None:
        raise FormatError(f"{where}: {entry.dtype!r} is no numpy dtype that castore writes")
    return dtype


def _describe(dtype: np.dtype[Any]) -> Any:
    if dtype.names is None:
        return dtype.str
    assert dtype.fields is not None
    fields = []
    for name in dtype.names:
        field, offset, *title = dtype.fields[name]
        base, shape = field.subdtype or (field, ())
        fields.append([name, title[0] if title else None, _describe(base), list(shape), offset])
    return [dtype.itemsize, dtype.isalignedstruct, fields]


def _dtype_from(descr: Any) -> np.dtype[Any]:
    if isinstance(descr, str):
        dtype: np.dtype[Any] = np.dtype(descr)
        if dtype.names is not None:
            raise ValueError("a structured type needs a description")
        return dtype
    item_bytes, aligned, fields = descr
    names, titles, formats, offsets = [], [], [], []
    for name, title, base, shape, offset in fields:
        names.append(name)
        titles.append(title)
        formats.append((_dtype_from(base), tuple(shape)) if shape else _dtype_from(base))
        offsets.append(offset)
    layout: dict[str, Any] = {"names": names, "formats": formats, "offsets": offsets, "itemsize": item_bytes}
    if any(title is not None for title in titles):
        layout["titles"] = titles
    made: np.dtype[Any] = np.dtype(layout, align=bool(aligned))  # type: ignore[call-overload]  # stubs lack this form
    return made


def element_bytes(entry: Entry, where: str) -> int:
    """Size of one element of an array entry. Raises FormatError when its dtype is unknown."""
    if is_numpy_name(entry.dtype):
        return numpy_dtype(entry, where).itemsize
    return int(torch_dtype(entry.dtype, where).itemsize)


def checked_raw_bytes(entry: Entry, item_bytes: int, where: str) -> int:
    """The entry's length, which must agree with its shape before memory is taken. Raises FormatError."""
    expected = math.prod(entry.shape) * item_bytes
    if entry.raw_bytes != expected:
        what = f"shape {list(entry.shape)} of {entry.dtype}"
        raise FormatError(f"{where}: {what}: expected {expected} bytes, found {entry.raw_bytes}")
    return expected
