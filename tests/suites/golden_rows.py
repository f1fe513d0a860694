"""What a state holds, as rows of plain data: path → [kind, dtype, shape, bytes, sha256]. Nothing of castore is used.

Golden repositories were recorded with the rows of the states that went into them; what is loaded from them is made into
rows by the same walk, and what an independent reader finds in the files is compared with them too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
import sys
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np

Row = list[Any]


@dataclasses.dataclass
class Point:
    """A class that golden repositories name: it keeps its place, its name and its fields."""

    x: int
    y: str


def rows_of(state: object) -> dict[str, Row]:
    """The rows of every value, in depth-first order."""
    return dict(_walk(state, ""))


def row(kind: str, data: bytes, dtype: str = "", shape: tuple[int, ...] = ()) -> Row:
    """One value that has bytes."""
    return [kind, dtype, list(shape), len(data), hashlib.sha256(data).hexdigest()]


def _walk(value: Any, path: str) -> Iterator[tuple[str, Row]]:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        yield from _walk_tensor(torch, value.detach(), path)
    elif isinstance(value, np.ndarray):
        yield path, row("NDARRAY", value.tobytes(), value.dtype.str, value.shape)
    elif (children := _children(torch, value)) is not None:
        kind, items = children
        yield path, _container(kind, items)
        for key, item in items.items():
            yield from _walk(item, f"{path}/{key}" if path else key)
    else:
        yield path, _scalar(torch, value)


def _container(kind: str, items: dict[str, Any]) -> Row:
    return [kind, "", [len(items)], 0, ""]


def _walk_tensor(torch: Any, value: Any, path: str) -> Iterator[tuple[str, Row]]:
    if value.is_quantized:
        parts = {"~int_repr": value.int_repr()}
        if value.qscheme() == torch.per_channel_affine:
            parts |= {"~scales": value.q_per_channel_scales(), "~zero_points": value.q_per_channel_zero_points()}
        kind = "QUANTIZED"
    elif value.layout == torch.sparse_coo:
        kind, parts = "SPARSE", {"~indices": value._indices(), "~values": value._values()}
    elif value.layout == torch.sparse_csr:
        kind = "SPARSE"
        parts = {"~crow": value.crow_indices(), "~col": value.col_indices(), "~values": value.values()}
    else:
        plain = value.resolve_conj().resolve_neg().contiguous().reshape(-1)
        data = bytes(plain.view(torch.uint8).numpy()) if plain.numel() else b""
        yield path, row("TENSOR", data, str(value.dtype).removeprefix("torch."), tuple(value.shape))
        return
    yield path, _container(kind, parts)
    for name, part in parts.items():
        yield from _walk_tensor(torch, part, f"{path}/{name}")


def _children(torch: Any, value: Any) -> tuple[str, dict[str, Any]] | None:
    if torch is not None and isinstance(value, torch.Size):
        return None
    if isinstance(value, dict):
        kind = "ORDERED_DICT" if isinstance(value, OrderedDict) else "DICT"
        return kind, {_component(key): item for key, item in value.items()}
    if isinstance(value, list | tuple):
        if fields := getattr(value, "_fields", None):
            return "NAMEDTUPLE", dict(zip(fields, value, strict=True))
        if _packed(value) is None:
            return "LIST" if isinstance(value, list) else "TUPLE", {str(at): item for at, item in enumerate(value)}
    if dataclasses.is_dataclass(value):
        return "DATACLASS", {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return None


def _component(key: Any) -> str:
    if isinstance(key, tuple):
        return "~t:" + ",".join(_component(item) for item in key)
    if isinstance(key, bool) or key is None:
        return {True: "~b:true", False: "~b:false", None: "~n"}[key]
    if isinstance(key, float):
        return "~f:" + key.hex()
    if isinstance(key, bytes):
        return "~y:" + key.hex()
    if isinstance(key, str) and (not key or key.startswith("~") or key.lstrip("-").isdigit()):
        return "~s:" + key.replace("/", "%2F")
    return str(key).replace("%", "%25").replace("/", "%2F").replace("*", "%2A")


def _packed(value: list[Any] | tuple[Any, ...]) -> tuple[str, bytes] | None:
    if len(value) < 32:
        return None
    name = type(value).__name__.upper()
    if all(type(item) is int and -(2**63) <= item < 2**63 for item in value):
        return "INT_" + name, struct.pack(f"<{len(value)}q", *value)
    if all(type(item) is float for item in value):
        return "FLOAT_" + name, struct.pack(f"<{len(value)}d", *value)
    return None


def _scalar(torch: Any, value: Any) -> Row:
    if torch is not None and isinstance(value, torch.Size):
        return row("TORCH_SIZE", struct.pack(f"<{len(value)}q", *value))
    if torch is not None and isinstance(value, torch.dtype):
        return row("TORCH_DTYPE", str(value).removeprefix("torch.").encode())
    if torch is not None and isinstance(value, torch.device):
        return row("TORCH_DEVICE", str(value).encode())
    if isinstance(value, np.generic):
        return row("NUMPY_SCALAR", value.tobytes(), value.dtype.str)
    if value is None:
        return row("NONE", b"")
    if isinstance(value, bool):
        return row("BOOL", bytes([value]))
    if isinstance(value, int):
        length = max(1, (value if value >= 0 else ~value).bit_length() // 8 + 1)
        return row("INT", value.to_bytes(length, "little", signed=True))
    if isinstance(value, float):
        return row("FLOAT", struct.pack("<d", value))
    if isinstance(value, complex):
        return row("COMPLEX", struct.pack("<dd", value.real, value.imag))
    if isinstance(value, str):
        return row("STR", value.encode("utf-8", "surrogatepass"))
    if isinstance(value, bytes | bytearray):
        return row("BYTES", bytes(value))
    if isinstance(value, list | tuple) and (packed := _packed(value)):
        return row(*packed)
    raise TypeError(f"no row for a {type(value).__name__}")
