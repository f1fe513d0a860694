"""Values that are no arrays ↔ bytes, encode and decode side by side.

    kind          bytes
    NONE          none
    BOOL          00 or 01
    INT           two's complement, little-endian, as short as possible, at least 1 byte
    FLOAT         IEEE 754 double, little-endian: sign of zero and NaN payload kept
    COMPLEX       real and imaginary part, like two FLOATs
    STR           UTF-8; a lone surrogate as the 3 bytes that UTF-8 would give its code point
    BYTES         themselves; hint "bytearray" restores the type
    INT_LIST      int64, little-endian: a list (INT_TUPLE: tuple) of at least 32 plain ints that all fit
    FLOAT_LIST    doubles: the same for plain floats (FLOAT_TUPLE)
    TORCH_DTYPE   name without "torch."
    TORCH_DEVICE  "cuda:0"
    TORCH_SIZE    int64, little-endian
    NUMPY_SCALAR  its memory; the entry's dtype is numpy's code
    PICKLE        a pickle, only when asked for; attrs["type"] names the class

Decoding accepts only what encoding writes, so that equal values have equal bytes and the other way round.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from castore.errors import FormatError, PickleRefusedError, UnknownClassError, UnsupportedLeafError
from castore.format.manifest import Entry, Kind
from castore.ids import Buffer
from castore.tensors.dtypes import numpy_dtype, numpy_element
from castore.tensors.lazy import loaded_torch, require_torch
from castore.tensors.payloads import BytesPayload

PACKED_ITEMS_MIN = 32
"""From this length on a list of plain numbers is one leaf: python's random state is a tuple of 625 ints, and
an entry of its own for each would cost more than the numbers. A constant of the format: it decides the paths
of leaves."""
PICKLE_PROTOCOL = 4
"""Written by every Python that castore supports; 5 adds only out-of-band buffers."""

_NUMBER_BYTES = 8
_X87_MANTISSA_BITS = 63


@dataclass(frozen=True, slots=True)
class Encoded:
    """A value as an entry without a path, and its bytes."""

    kind: Kind
    data: bytes
    dtype: str = ""
    attrs: dict[str, Any] = field(default_factory=dict)
    hints: dict[str, Any] = field(default_factory=dict)
    item_bytes: int = 1
    is_float: bool = False

    def entry(self, path: str) -> Entry:
        """The entry under that path."""
        return Entry(path, self.kind, self.dtype, (), self.attrs, self.hints, len(self.data))

    def payload(self) -> BytesPayload:
        """Its bytes."""
        return BytesPayload(self.data, item_bytes=self.item_bytes, is_float=self.is_float)


# ---- encode ------------------------------------------------------------------------------------------------


def encode_value(value: Any, path: str) -> Encoded | None:
    """The bytes of a value; None when it is no value of these kinds (then it is a container, an array or
    unsupported).
    """
    encode = _ENCODERS.get(type(value))
    if encode is not None:
        return encode(value)
    if isinstance(value, np.generic):
        return _encode_numpy_scalar(value, path)
    return _encode_torch_value(value)


def _encode_int(value: int) -> Encoded:
    # ~v has the bit length of -v - 1: -128 fits one byte.
    bits = (value if value >= 0 else ~value).bit_length() + 1
    return Encoded(Kind.INT, value.to_bytes(-(-bits // 8), "little", signed=True))


def _encode_sequence(value: list[Any] | tuple[Any, ...]) -> Encoded | None:
    """A long list or tuple of plain numbers as one leaf; None for any other, which is a container."""
    if len(value) < PACKED_ITEMS_MIN:
        return None
    kind = type(value[0])
    if (kind is not int and kind is not float) or any(type(item) is not kind for item in value):
        return None
    as_list = type(value) is list
    if kind is float:
        data = struct.pack(f"<{len(value)}d", *value)
        return Encoded(Kind.FLOAT_LIST if as_list else Kind.FLOAT_TUPLE, data, item_bytes=_NUMBER_BYTES, is_float=True)
    try:
        data = struct.pack(f"<{len(value)}q", *value)
    except struct.error:
        return None
    return Encoded(Kind.INT_LIST if as_list else Kind.INT_TUPLE, data, item_bytes=_NUMBER_BYTES)


def _encode_numpy_scalar(value: np.generic, path: str) -> Encoded:
    if isinstance(value, np.str_):
        # Through the text: numpy's own buffer of a str scalar has no trailing zeros left to tell apart.
        data = str(value).encode("utf-32-le", "surrogatepass")
        return Encoded(Kind.NUMPY_SCALAR, data, f"<U{len(data) // 4}", item_bytes=4)
    if isinstance(value, np.bytes_):
        data = bytes(value)
        return Encoded(Kind.NUMPY_SCALAR, data, f"|S{len(data)}")
    element = numpy_element(value.dtype, path)
    attrs = {} if element.descr is None else {"descr": element.descr}
    raw = bytearray(value.tobytes())
    if value.dtype.char in "gG" and np.finfo(np.longdouble).nmant == _X87_MANTISSA_BITS:
        # 10 bytes of number and 6 of whatever the memory held: equal scalars must have equal bytes.
        for start in range(0, len(raw), 16):
            raw[start + 10 : start + 16] = bytes(6)
    return Encoded(Kind.NUMPY_SCALAR, bytes(raw), element.name, attrs, {}, element.plane_bytes, element.is_float)


def _encode_torch_value(value: Any) -> Encoded | None:
    torch = loaded_torch()
    if torch is None:
        return None
    if isinstance(value, torch.Size):
        return Encoded(Kind.TORCH_SIZE, struct.pack(f"<{len(value)}q", *value), item_bytes=_NUMBER_BYTES)
    if isinstance(value, torch.dtype):
        return Encoded(Kind.TORCH_DTYPE, str(value).removeprefix("torch.").encode())
    if isinstance(value, torch.device):
        return Encoded(Kind.TORCH_DEVICE, str(value).encode())
    return None


def encode_pickle(value: Any, path: str) -> Encoded:
    """A pickle of the value. Raises UnsupportedLeafError when it cannot be pickled either."""
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    try:
        data = pickle.dumps(value, protocol=PICKLE_PROTOCOL)
    except Exception as error:  # user code runs here and may raise anything
        raise UnsupportedLeafError(path, name, f"and it does not pickle: {error}") from error
    return Encoded(Kind.PICKLE, data, attrs={"type": name})


def opaque_value(value: Any) -> Encoded:
    """A stand-in for a value that is only compared by its place, never by its bytes."""
    return Encoded(Kind.PICKLE, b"", attrs={"type": f"{type(value).__module__}.{type(value).__qualname__}"})


_ENCODERS: dict[type, Callable[[Any], Encoded | None]] = {
    type(None): lambda _: Encoded(Kind.NONE, b""),
    bool: lambda value: Encoded(Kind.BOOL, b"\1" if value else b"\0"),
    int: _encode_int,
    float: lambda value: Encoded(Kind.FLOAT, struct.pack("<d", value), item_bytes=8, is_float=True),
    complex: lambda value: Encoded(
        Kind.COMPLEX, struct.pack("<2d", value.real, value.imag), item_bytes=8, is_float=True
    ),
    str: lambda value: Encoded(Kind.STR, value.encode("utf-8", "surrogatepass")),
    bytes: lambda value: Encoded(Kind.BYTES, value),
    bytearray: lambda value: Encoded(Kind.BYTES, bytes(value), hints={"bytearray": True}),
    list: _encode_sequence,
    tuple: _encode_sequence,
}


# ---- decode ------------------------------------------------------------------------------------------------


def decode_value(entry: Entry, raw: Buffer, *, allow_pickle: bool) -> Any:
    """The value of an entry of these kinds from its bytes.

    Raises FormatError for bytes that encoding cannot have written, PickleRefusedError for a pickle without
    `allow_pickle`, UnknownClassError when a pickle's class cannot be imported, MissingExtraError without
    torch.
    """
    where = f"leaf {entry.path!r}"
    if entry.kind is Kind.PICKLE and not allow_pickle:
        raise PickleRefusedError(
            f"{where}: a pickle of {entry.attrs.get('type')}, which can run any code when it is read; give "
            "allow_pickle=True if you trust whoever saved it"
        )
    decode = _DECODERS.get(entry.kind)
    if decode is None:
        raise FormatError(f"{where}: {entry.kind.name} is no value that is decoded from bytes alone")
    data = bytes(raw)
    if len(data) != entry.raw_bytes:
        raise FormatError(f"{where}: expected {entry.raw_bytes} bytes, found {len(data)}")
    try:
        return decode(data, entry)
    except (ValueError, struct.error, OverflowError) as error:
        raise FormatError(f"{where}: not the bytes of {entry.kind.name}: {error}") from error


def _decode_none(data: bytes, _: Entry) -> None:
    if data:
        raise ValueError(f"expected no bytes, found {len(data)}")


def _decode_bool(data: bytes, _: Entry) -> bool:
    if data not in {b"\0", b"\1"}:
        raise ValueError(f"expected 00 or 01, found {data[:8].hex()}")
    return data == b"\1"


def _decode_int(data: bytes, _: Entry) -> int:
    value = int.from_bytes(data, "little", signed=True)
    if _encode_int(value).data != data:
        raise ValueError(f"{len(data)} bytes are not its shortest form")
    return value


def _decode_bytes(data: bytes, entry: Entry) -> bytes | bytearray:
    return bytearray(data) if entry.hints.get("bytearray") else data


def _decode_numbers(data: bytes, entry: Entry) -> list[Any] | tuple[Any, ...]:
    code = "d" if entry.kind in {Kind.FLOAT_LIST, Kind.FLOAT_TUPLE} else "q"
    values = struct.unpack(f"<{len(data) // _NUMBER_BYTES}{code}", data)
    return list(values) if entry.kind in {Kind.INT_LIST, Kind.FLOAT_LIST} else values


def _decode_dtype(data: bytes, entry: Entry) -> Any:
    torch = require_torch(f"leaf {entry.path!r}")
    name = data.decode()
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or str(dtype) != f"torch.{name}":
        raise ValueError(f"torch {torch.__version__} has no dtype {name[:80]!r}")
    return dtype


def _decode_device(data: bytes, entry: Entry) -> Any:
    torch = require_torch(f"leaf {entry.path!r}")
    name = data.decode()
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    if str(device) != name:
        raise ValueError(f"{name[:80]!r} is not how torch writes a device")
    return device


def _decode_size(data: bytes, entry: Entry) -> Any:
    torch = require_torch(f"leaf {entry.path!r}")
    return torch.Size(struct.unpack(f"<{len(data) // _NUMBER_BYTES}q", data))


def _decode_numpy_scalar(data: bytes, entry: Entry) -> Any:
    dtype = numpy_dtype(entry, f"leaf {entry.path!r}")
    if dtype.itemsize != len(data):
        raise ValueError(f"{entry.dtype}: expected {dtype.itemsize} bytes, found {len(data)}")
    if dtype.kind == "U":
        return np.str_(data.decode("utf-32-le", "surrogatepass"))
    if dtype.kind == "S":
        return np.bytes_(data)
    if dtype.kind == "V" and dtype.names is None:
        return np.void(data)
    # Over a bytearray, because a record scalar is a view that its owner may write to.
    return np.frombuffer(bytearray(data), dtype)[0] if data else np.zeros((), dtype)[()]


def _decode_pickle(data: bytes, entry: Entry) -> Any:
    where = f"leaf {entry.path!r}: the pickle of {entry.attrs.get('type')}"
    try:
        return pickle.loads(data)  # noqa: S301  only with allow_pickle
    except (ImportError, AttributeError) as error:
        raise UnknownClassError(f"{where} needs a class that is not here: {error}") from error
    except Exception as error:
        raise FormatError(f"{where} does not load: {error!r}") from error


_DECODERS: dict[Kind, Callable[[bytes, Entry], Any]] = {
    Kind.NONE: _decode_none,
    Kind.BOOL: _decode_bool,
    Kind.INT: _decode_int,
    Kind.FLOAT: lambda data, _: struct.unpack("<d", data)[0],
    Kind.COMPLEX: lambda data, _: complex(*struct.unpack("<2d", data)),
    Kind.STR: lambda data, _: data.decode("utf-8", "surrogatepass"),
    Kind.BYTES: _decode_bytes,
    Kind.INT_LIST: _decode_numbers,
    Kind.INT_TUPLE: _decode_numbers,
    Kind.FLOAT_LIST: _decode_numbers,
    Kind.FLOAT_TUPLE: _decode_numbers,
    Kind.TORCH_DTYPE: _decode_dtype,
    Kind.TORCH_DEVICE: _decode_device,
    Kind.TORCH_SIZE: _decode_size,
    Kind.NUMPY_SCALAR: _decode_numpy_scalar,
    Kind.PICKLE: _decode_pickle,
}

VALUE_KINDS = frozenset(_DECODERS)
"""Kinds that `decode_value` makes from bytes."""
