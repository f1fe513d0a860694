"""Compare two leaves as numbers, chunk by chunk, in float64. See diff.py for the formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from castore.format.identity import content_kind
from castore.format.manifest import Entry, Kind

if TYPE_CHECKING:
    from castore.checkpoint.diff import LeafDiff

Floats = npt.NDArray[np.float64]

_TORCH_TO_NUMPY = {
    "float64": "<f8",
    "float32": "<f4",
    "float16": "<f2",
    "int8": "<i1",
    "int16": "<i2",
    "int32": "<i4",
    "int64": "<i8",
    "uint8": "<u1",
    "uint16": "<u2",
    "uint32": "<u4",
    "uint64": "<u8",
    "bool": "<u1",
    # A complex number is compared as its two parts.
    "complex128": "<f8",
    "complex64": "<f4",
    "complex32": "<f2",
}


class ChunkSource(Protocol):
    """One leaf's bytes by grid position."""

    entry: Entry

    def chunk(self, index: int) -> bytes | bytearray:
        """Raw bytes of one chunk."""
        ...


@dataclass(slots=True)
class _Sums:
    max_abs: float = 0.0
    difference: float = 0.0
    a: float = 0.0
    b: float = 0.0
    product: float = 0.0
    nonfinite_count: int = 0

    def add(self, a: Floats, b: Floats) -> None:
        finite = np.isfinite(a) & np.isfinite(b)
        if not finite.all():
            self.nonfinite_count += int(finite.size - finite.sum())
            a, b = a[finite], b[finite]
        if a.size == 0:
            return
        difference = b - a
        self.max_abs = max(self.max_abs, float(np.abs(difference).max()))
        self.difference += float(difference @ difference)
        self.a += float(a @ a)
        self.b += float(b @ b)
        self.product += float(a @ b)


def compare_values(leaf: LeafDiff, a: ChunkSource, b: ChunkSource) -> LeafDiff:
    """The leaf with its numbers filled in; unchanged where the bytes are no numbers or the element types differ in
    width.
    """
    decode_a, decode_b = _decoder(a.entry), _decoder(b.entry)
    if decode_a is None or decode_b is None or a.entry.raw_bytes != b.entry.raw_bytes or a.entry.raw_bytes == 0:
        return leaf
    sums = _Sums()
    for index in range(max(1, leaf.chunk_count)):
        with np.errstate(over="ignore", invalid="ignore"):
            sums.add(decode_a(a.chunk(index)), decode_b(b.chunk(index)))
    norm_a, norm_b = math.sqrt(sums.a), math.sqrt(sums.b)
    distance = math.sqrt(sums.difference)
    return replace(
        leaf,
        max_abs=sums.max_abs,
        relative_l2=distance / norm_a if norm_a else (0.0 if distance == 0 else math.inf),
        cosine=min(1.0, sums.product / (norm_a * norm_b)) if norm_a and norm_b else None,
        nonfinite_count=sums.nonfinite_count,
    )


Decoder = Callable[[bytes | bytearray], Floats]


def _decoder(entry: Entry) -> Decoder | None:
    """Raw bytes → float64, or None for what is no number."""
    if entry.kind is Kind.FLOAT:
        return _plain("<f8")
    if entry.kind is Kind.INT:
        return _integer
    if entry.kind in (Kind.INT_LIST, Kind.INT_TUPLE):
        return _plain("<i8")
    if entry.kind in (Kind.FLOAT_LIST, Kind.FLOAT_TUPLE):
        return _plain("<f8")
    kind = content_kind(entry)
    if kind is Kind.TENSOR:
        if entry.dtype == "bfloat16":
            return _bfloat16
        code = _TORCH_TO_NUMPY.get(entry.dtype)
        return _plain(code) if code else None
    if kind in (Kind.NDARRAY, Kind.NUMPY_SCALAR):
        return _numpy_decoder(entry.dtype)
    return None


def _numpy_decoder(code: str) -> Decoder | None:
    try:
        dtype = np.dtype(code)
    except TypeError:
        return None
    if dtype.kind == "c":
        return _plain(f"{dtype.byteorder}f{dtype.itemsize // 2}")
    if dtype.kind == "b":
        return _plain("<u1")
    return _plain(code) if dtype.kind in "iuf" and dtype.itemsize <= 8 else None


def _plain(code: str) -> Decoder:
    return lambda raw: np.frombuffer(raw, code).astype(np.float64)


def _integer(raw: bytes | bytearray) -> Floats:
    value = int.from_bytes(raw, "little", signed=True)
    try:
        return np.array([float(value)])
    except OverflowError:  # beyond any float: counted as not finite
        return np.array([math.inf if value > 0 else -math.inf])


def _bfloat16(raw: bytes | bytearray) -> Floats:
    """A bfloat16 is the upper half of a float32."""
    return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
