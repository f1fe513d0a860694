"""Tensors that are made of other tensors: sparse and quantized ones, taken apart for saving and put together
again.

    SPARSE      attrs  layout ("sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc"), shape
                       coalesced (COO only)
                children   COO ~indices ~values · CSR, BSR ~crow ~col ~values · CSC, BSC ~ccol ~row ~values
    QUANTIZED   attrs  dtype ("quint8", …), qscheme, shape
                       scale (8 bytes, a little-endian double) and zero_point, or axis
                children   ~int_repr, and per channel ~scales ~zero_points

`~int_repr` holds the integers behind the tensor, in its own memory layout; for the types that pack several
elements in a byte it is the flat packed bytes. What a stranger wrote is checked before torch may index with
it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from castore.errors import FormatError, UnsupportedLeafError
from castore.format.manifest import Entry, Kind
from castore.tensors.dtypes import ELEMENTS_PER_BYTE, QUANTIZED_STORAGE
from castore.tensors.lazy import require_torch

_COMPRESSED_CHILDREN = {
    "sparse_csr": ("~crow", "~col"),
    "sparse_bsr": ("~crow", "~col"),
    "sparse_csc": ("~ccol", "~row"),
    "sparse_bsc": ("~ccol", "~row"),
}
_READERS = {
    "~crow": "crow_indices",
    "~col": "col_indices",
    "~ccol": "ccol_indices",
    "~row": "row_indices",
    "~values": "values",
}


@dataclass(frozen=True, slots=True)
class Composite:
    """A tensor taken apart."""

    kind: Kind
    attrs: dict[str, Any]
    children: dict[str, Any]
    """Path component → tensor; they share the memory of the whole."""


def take_apart(tensor: Any, path: str) -> Composite:
    """The parts of a sparse or quantized tensor. Raises UnsupportedLeafError for any other layout."""
    if tensor.is_quantized:
        return _take_apart_quantized(tensor, path)
    layout = str(tensor.layout).removeprefix("torch.")
    tensor = tensor.detach()
    attrs: dict[str, Any] = {"layout": layout, "shape": [int(size) for size in tensor.shape]}
    if layout == "sparse_coo":
        attrs["coalesced"] = bool(tensor.is_coalesced())
        return Composite(Kind.SPARSE, attrs, {"~indices": tensor._indices(), "~values": tensor._values()})
    if layout in _COMPRESSED_CHILDREN:
        names = (*_COMPRESSED_CHILDREN[layout], "~values")
        return Composite(Kind.SPARSE, attrs, {name: getattr(tensor, _READERS[name])() for name in names})
    raise UnsupportedLeafError(path, f"tensor of layout {tensor.layout}", "convert it with .to_dense()")


def _take_apart_quantized(tensor: Any, path: str) -> Composite:
    torch = require_torch("a tensor")
    tensor = tensor.detach()
    dtype = str(tensor.dtype).removeprefix("torch.")
    qscheme = str(tensor.qscheme()).removeprefix("torch.")
    attrs: dict[str, Any] = {
        "dtype": dtype,
        "qscheme": qscheme,
        "shape": [int(size) for size in tensor.shape],
    }
    children = {"~int_repr": _integers_of(tensor, dtype)}
    if tensor.qscheme() == torch.per_tensor_affine:
        attrs["scale"] = struct.pack("<d", tensor.q_scale())
        attrs["zero_point"] = int(tensor.q_zero_point())
    elif tensor.qscheme() in (torch.per_channel_affine, torch.per_channel_affine_float_qparams):
        attrs["axis"] = int(tensor.q_per_channel_axis())
        children["~scales"] = tensor.q_per_channel_scales()
        children["~zero_points"] = tensor.q_per_channel_zero_points()
    else:
        raise UnsupportedLeafError(path, f"tensor quantized by {qscheme}", "save .int_repr() and its parameters")
    return Composite(Kind.QUANTIZED, attrs, children)


def _integers_of(tensor: Any, dtype: str) -> Any:
    """The integers of a quantized tensor, sharing its memory."""
    torch = require_torch("a tensor")
    empty = torch.empty(0, dtype=getattr(torch, QUANTIZED_STORAGE[dtype]), device=tensor.device)
    storage = tensor.untyped_storage()
    if dtype in ELEMENTS_PER_BYTE:
        return empty.set_(storage, 0, (_packed_bytes(tensor.shape, dtype),), (1,))
    return empty.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def _packed_bytes(shape: Any, dtype: str) -> int:
    count = math.prod(int(size) for size in shape)
    return -(-count // ELEMENTS_PER_BYTE[dtype])


# ---- back --------------------------------------------------------------------------------------------------


def child_names(entry: Entry) -> tuple[str, ...]:
    """The children that a composite must have. Raises FormatError when its attributes make no sense."""
    where = f"leaf {entry.path!r}"
    attrs = entry.attrs
    if entry.kind is Kind.QUANTIZED:
        return ("~int_repr",) if "scale" in attrs else ("~int_repr", "~scales", "~zero_points")
    if attrs.get("layout") == "sparse_coo":
        return "~indices", "~values"
    names = _COMPRESSED_CHILDREN.get(str(attrs.get("layout")))
    if names is None:
        raise FormatError(f"{where}: no sparse layout is called {attrs.get('layout')!r}")
    return (*names, "~values")


def put_together(entry: Entry, children: Mapping[str, Any]) -> Any:
    """The tensor of a SPARSE or QUANTIZED entry over the memory of its children. Raises FormatError."""
    where = f"leaf {entry.path!r}"
    torch = require_torch(where)
    if any(not isinstance(child, torch.Tensor) for child in children.values()):
        raise FormatError(f"{where}: a part of a {entry.kind.name} is no tensor")
    try:
        shape = tuple(_count(size, where) for size in entry.attrs["shape"])
        if entry.kind is Kind.QUANTIZED:
            return _quantized(entry, shape, children, where)
        return _sparse(entry, shape, children)
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError, AttributeError, struct.error) as error:
        reason = str(error).partition("\n")[0]
        raise FormatError(f"{where}: its parts make no {entry.kind.name.lower()} tensor: {reason}") from error


def _count(size: object, where: str) -> int:
    if type(size) is not int or size < 0:
        raise FormatError(f"{where}: expected a size, found {size!r}")
    return size


def _sparse(entry: Entry, shape: tuple[int, ...], children: Mapping[str, Any]) -> Any:
    torch = require_torch("a tensor")
    layout, values = entry.attrs["layout"], children["~values"]
    if layout == "sparse_coo":
        # The check is what keeps an index beyond the shape from being used as an address.
        tensor = torch.sparse_coo_tensor(children["~indices"], values, shape, check_invariants=True)
        coalesced = bool(entry.attrs["coalesced"])
        if coalesced and not _is_sorted(children["~indices"]):
            raise ValueError("it claims to be coalesced and its indices are not sorted and distinct")
        return tensor._coalesced_(coalesced)
    rows, columns = (children[name] for name in _COMPRESSED_CHILDREN[layout])
    return torch.sparse_compressed_tensor(
        rows, columns, values, shape, layout=getattr(torch, layout), check_invariants=True
    )


def _is_sorted(indices: Any) -> bool:
    """Whether columns of indices ascend strictly, which is what torch means by coalesced."""
    torch = require_torch("a tensor")
    ascending = torch.zeros(max(0, indices.shape[1] - 1), dtype=torch.bool, device=indices.device)
    undecided = torch.ones_like(ascending)
    for row in indices:
        left, right = row[:-1], row[1:]
        ascending |= undecided & (left < right)
        undecided &= left == right
    return bool(ascending.all())


def _quantized(entry: Entry, shape: tuple[int, ...], children: Mapping[str, Any], where: str) -> Any:
    torch = require_torch(where)
    attrs, integers = entry.attrs, children["~int_repr"]
    dtype = attrs["dtype"]
    if dtype not in QUANTIZED_STORAGE or integers.dtype != getattr(torch, QUANTIZED_STORAGE[dtype]):
        raise FormatError(f"{where}: {integers.dtype} does not hold {dtype!r}")
    expected = (_packed_bytes(shape, dtype),) if dtype in ELEMENTS_PER_BYTE else shape
    if tuple(integers.shape) != expected:
        raise FormatError(
            f"{where}: shape {list(shape)}: expected integers {list(expected)}, found {list(integers.shape)}"
        )
    tensor = _empty_quantized(attrs, shape, children, integers.device)
    if dtype in ELEMENTS_PER_BYTE:
        packed = torch.empty(0, dtype=torch.uint8, device=integers.device)
        packed.set_(tensor.untyped_storage(), 0, expected, (1,)).copy_(integers)
        return tensor
    return tensor.set_(integers.untyped_storage(), integers.storage_offset(), shape, integers.stride())


def _empty_quantized(attrs: Mapping[str, Any], shape: tuple[int, ...], children: Mapping[str, Any], device: Any) -> Any:
    torch = require_torch("a tensor")
    dtype = getattr(torch, attrs["dtype"])
    # Filled through its storage at once; an empty one of the right kind is all that is needed of it.
    if attrs["qscheme"] == "per_tensor_affine":
        (scale,) = struct.unpack("<d", attrs["scale"])
        return torch._empty_affine_quantized(
            shape, scale=scale, zero_point=attrs["zero_point"], dtype=dtype, device=device
        )
    axis, scales, zero_points = attrs["axis"], children["~scales"], children["~zero_points"]
    # torch does not check these and would index with them.
    if not 0 <= axis < len(shape) or scales.shape != (shape[axis],) or zero_points.shape != (shape[axis],):
        raise ValueError(f"axis {axis} of shape {list(shape)} with {list(scales.shape)} scales")
    made = torch._empty_per_channel_affine_quantized(
        shape, scales=scales, zero_points=zero_points, axis=axis, dtype=dtype, device=device
    )
    if str(made.qscheme()) != f"torch.{attrs['qscheme']}":
        raise ValueError(f"qscheme {attrs['qscheme']!r} with {scales.dtype} scales and {zero_points.dtype} zero points")
    return made


def same_form(live: Entry, saved: Entry) -> bool:
    """Whether a tensor like the first can take the content of one like the second by `copy_`, as far as
    attributes say.
    """
    if live.kind is not saved.kind or live.attrs.get("dtype") in ELEMENTS_PER_BYTE:
        # torch has no copy between tensors that pack several elements in a byte.
        return False
    keys = ("layout", "shape") if live.kind is Kind.SPARSE else ("dtype", "qscheme", "shape", "axis")
    return all(live.attrs.get(key) == saved.attrs.get(key) for key in keys)


def copy_composite(live: Any, loaded: Any) -> None:
    """Give a live sparse or quantized tensor the content of another of the same form."""
    torch = require_torch("a tensor")
    with torch.no_grad():
        live.copy_(loaded)
