"""The .safetensors format, read and written here: a length, a JSON header, tensors one after the other.

    0   8  header length, little-endian
    8   n  header: {"__metadata__": {text: text}, name: {"dtype": text, "shape": [..], "data_offsets": [..]}}
    8+n    data, row-major, little-endian; the two offsets, start and stop, count from here

A reader must expect anything of a foreign file: every length is compared with the file's before it is used.
Source: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from castore.errors import FormatError

HEADER_BYTES_MAX = 100_000_000
"""The limit of the reference implementation."""
_LENGTH_BYTES = 8
_ALIGN_BYTES = 8

DTYPES: Mapping[str, tuple[str, int]] = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "I16": ("int16", 2),
    "U16": ("uint16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I32": ("int32", 4),
    "U32": ("uint32", 4),
    "F32": ("float32", 4),
    "C64": ("complex64", 8),
    "F64": ("float64", 8),
    "I64": ("int64", 8),
    "U64": ("uint64", 8),
}
"""Code → torch's name, bytes of one element, in the order of the reference implementation, which is the order in which
data is written, last first. Types of less than a byte (F4, F6) are not read."""
CODES = {name: code for code, (name, _) in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """One tensor of a file."""

    name: str
    code: str
    shape: tuple[int, ...]
    start: int
    """In bytes from the beginning of the data."""
    stop: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a file holds and where."""

    tensors: tuple[TensorPlace, ...]
    metadata: Mapping[str, str]
    data_offset: int
    """Where the data begins in the file."""


def header_length(prefix: bytes, *, file_bytes: int, where: str) -> int:
    """The length of the JSON from the first 8 bytes. Raises FormatError."""
    length = int.from_bytes(prefix, "little")
    if len(prefix) < _LENGTH_BYTES or length > min(HEADER_BYTES_MAX, file_bytes - _LENGTH_BYTES):
        raise FormatError(
            f"{where}: not a .safetensors file, or cut short: "
            f"a header of {length} bytes does not fit into a file of {file_bytes}"
        )
    return length


def decode_header(text: bytes, *, file_bytes: int, where: str) -> Header:
    """The header from its JSON. Raises FormatError unless it describes exactly the bytes that follow."""
    try:
        fields = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: not a .safetensors file: the header is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise FormatError(f"{where}: not a .safetensors file: the header is a {type(fields).__name__}")
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"{where}: __metadata__: expected texts by name, found {str(metadata)[:80]}")
    data_offset = _LENGTH_BYTES + len(text)
    places = sorted(
        (_place(name, value, where) for name, value in fields.items()),
        key=lambda place: (place.start, place.stop),
    )
    end = 0
    for place in places:
        if place.start != end:
            raise FormatError(f"{where}: tensor {place.name!r}: expected its data at {end}, found {place.start}")
        end = place.stop
    if data_offset + end != file_bytes:
        raise FormatError(
            f"{where}: expected {data_offset + end} bytes, found {file_bytes}; it was cut short or has a tail"
        )
    return Header(tuple(places), metadata, data_offset)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name appears twice")
    return fields


def _place(name: str, value: Any, where: str) -> TensorPlace:
    where = f"{where}: tensor {name!r}"
    try:
        code, shape, (start, stop) = value["dtype"], value["shape"], value["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise FormatError(f"{where}: expected dtype, shape and two data_offsets, found {str(value)[:80]}") from error
    if not isinstance(shape, list) or not all(_is_count(number) for number in (*shape, start, stop)):
        raise FormatError(
            f"{where}: expected whole numbers, found shape {str(shape)[:80]} at {start!r:.20}..{stop!r:.20}"
        )
    if not isinstance(code, str) or code not in DTYPES:
        raise FormatError(f"{where}: dtype {str(code)[:20]!r} is unknown to this castore; it reads {', '.join(DTYPES)}")
    expected = math.prod(shape) * DTYPES[code][1]
    if stop - start != expected:
        raise FormatError(f"{where}: {code} {shape}: expected {expected} bytes, found {stop - start}")
    return TensorPlace(name, code, tuple(shape), start, stop)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def encode_header(
    tensors: Iterable[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str]
) -> tuple[bytes, list[TensorPlace]]:
    """The bytes before the data, and the places in the order in which the data must be written.

    `tensors` are (name, code, shape). Wide elements come first, then by name, as the reference implementation
    writes them: then every tensor is aligned to its element.
    """
    places: list[TensorPlace] = []
    end = 0
    rank = {code: index for index, code in enumerate(DTYPES)}
    for name, code, shape in sorted(tensors, key=lambda tensor: (-rank[tensor[1]], tensor[0])):
        start, end = end, end + math.prod(shape) * DTYPES[code][1]
        places.append(TensorPlace(name, code, tuple(shape), start, end))
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for place in places:
        fields[place.name] = {
            "dtype": place.code,
            "shape": place.shape,
            "data_offsets": [place.start, place.stop],
        }
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGN_BYTES)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text, places
