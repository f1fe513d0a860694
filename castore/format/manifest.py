"""The manifest: one entry per value of a state, in depth-first order, cut into parts that later snapshots share.

An entry is a msgpack array of 9 fields:

    0  path       str    escaped path (paths.py); "" is the root
    1  kind       int    what the value is (Kind)
    2  dtype      str    element type of array kinds: torch's name ("bfloat16") or numpy's code ("<f4"); else ""
    3  shape      array  of array kinds; [child count] of containers; else []
    4  attrs      map    what else belongs to the content, by kind; nil when empty
    5  hints      map    what is restored but is no content (strides, requires_grad, device); nil when empty
    6  raw_bytes  int    length of the value's bytes
    7  data       bin    raw_bytes <= 256: the bytes themselves ("inline")
                  array  [bin]: the chunk ids, concatenated, of the fixed grid
                  array  [bin, nil]: the ids of id lists, each a chunk holding up to 1024 concatenated chunk ids
                  nil    containers, aliases and views, which have no bytes of their own
    8  digest     bin    views only: the leaf digest of the view's own bytes; else nil

A part is a msgpack array [1, [entry, …]]: 1 is the part version. Parts are stored as chunks, so a part that did not
change is not written again. The cut depends only on the entries: a part ends after an entry when it holds
PART_ENTRIES_MAX entries or PART_CHUNKS_MAX chunk ids, or when it holds at least PART_ENTRIES_MIN entries and
xxh3-64(path) is divisible by 64; so an entry put in the middle moves no boundary far away.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import msgpack
import xxhash

from castore.errors import FormatError
from castore.ids import Buffer, ChunkId
from castore.options import (
    GRID_BYTES,
    INLINE_BYTES_MAX,
    PART_BYTES_MAX,
    PART_CHUNKS_MAX,
    PART_ENTRIES_MAX,
    PART_ENTRIES_MIN,
)

PART_VERSION = 1
_BOUNDARY_MODULUS = 64
_ENTRY_FIELDS = 9
_SHAPE_DIMS_MAX = 64
_LENGTH_MAX = 1 << 63
"""Lengths and sizes of dimensions fit a signed 64-bit integer, as those of torch and numpy do."""


class Kind(IntEnum):
    """What a value is. Permanent: the numbers are on disk. 0 is never written; gaps separate families."""

    # containers: no bytes of their own, children follow depth first
    DICT = 1
    ORDERED_DICT = 2
    LIST = 3
    TUPLE = 4
    NAMEDTUPLE = 5
    DATACLASS = 6
    SPARSE = 7
    QUANTIZED = 8
    # values of Python
    NONE = 16
    BOOL = 17
    INT = 18
    FLOAT = 19
    COMPLEX = 20
    STR = 21
    BYTES = 22
    INT_LIST = 23
    INT_TUPLE = 24
    FLOAT_LIST = 25
    FLOAT_TUPLE = 26
    # values of torch and numpy
    TORCH_DTYPE = 32
    TORCH_DEVICE = 33
    TORCH_SIZE = 34
    NUMPY_SCALAR = 35
    # arrays
    TENSOR = 48
    NDARRAY = 49
    STORAGE = 50
    # references to other entries
    ALIAS = 56
    VIEW = 57
    # opaque
    PICKLE = 62


CONTAINER_KINDS = frozenset(
    {Kind.DICT, Kind.ORDERED_DICT, Kind.LIST, Kind.TUPLE, Kind.NAMEDTUPLE, Kind.DATACLASS, Kind.SPARSE, Kind.QUANTIZED}
)
"""SPARSE and QUANTIZED are tensors made of child leaves (`~indices`, `~values`, …)."""
REFERENCE_KINDS = frozenset({Kind.ALIAS, Kind.VIEW})


@dataclass(frozen=True, slots=True)
class Entry:
    """One value of a state. See the module docstring for the fields."""

    path: str
    kind: Kind
    dtype: str = ""
    shape: tuple[int, ...] = ()
    attrs: Mapping[str, Any] = field(default_factory=dict)
    hints: Mapping[str, Any] = field(default_factory=dict)
    raw_bytes: int = 0
    inline: bytes | None = None
    chunks: bytes | None = None
    """Concatenated chunk ids on the grid."""
    id_lists: bytes | None = None
    """Concatenated ids of id lists, in place of `chunks`, until they are resolved."""
    digest: bytes | None = None

    @property
    def is_container(self) -> bool:
        """Whether children follow."""
        return self.kind in CONTAINER_KINDS

    @property
    def has_bytes(self) -> bool:
        """Whether the entry carries bytes of its own, inline or in chunks."""
        return self.kind not in CONTAINER_KINDS and self.kind not in REFERENCE_KINDS

    def with_bytes(self, *, inline: bytes | None = None, chunks: bytes | None = None) -> Entry:
        """The entry with its bytes, or the ids of its chunks. A third of the time of dataclasses.replace."""
        start = (self.path, self.kind, self.dtype, self.shape, self.attrs, self.hints, self.raw_bytes)
        return Entry(*start, inline=inline, chunks=chunks, digest=self.digest)

    def chunk_ids(self, id_bytes: int) -> list[ChunkId]:
        """The chunk ids in grid order; empty for inline leaves."""
        packed = self.chunks or b""
        return [ChunkId(packed[start : start + id_bytes]) for start in range(0, len(packed), id_bytes)]


def chunk_count(raw_bytes: int) -> int:
    """How many chunks the grid cuts `raw_bytes` into; 0 for a leaf that lives inline."""
    return 0 if raw_bytes <= INLINE_BYTES_MAX else -(-raw_bytes // GRID_BYTES)


def chunk_bytes(raw_bytes: int, index: int) -> int:
    """Length of chunk `index` of a leaf of `raw_bytes`."""
    return min(GRID_BYTES, raw_bytes - index * GRID_BYTES)


def cut_parts(entries: Iterable[Entry], *, id_bytes: int) -> Iterator[list[Entry]]:
    """Cut entries into parts by the rule in the module docstring."""
    part: list[Entry] = []
    ids = 0
    for entry in entries:
        part.append(entry)
        ids += len(entry.chunks or entry.id_lists or b"") // id_bytes
        full = len(part) >= PART_ENTRIES_MAX or ids >= PART_CHUNKS_MAX
        if full or (len(part) >= PART_ENTRIES_MIN and _is_boundary(entry.path)):
            yield part
            part, ids = [], 0
    if part:
        yield part


def _is_boundary(path: str) -> bool:
    return xxhash.xxh3_64_intdigest(path.encode()) % _BOUNDARY_MODULUS == 0


def encode_part(entries: Sequence[Entry]) -> bytes:
    """The bytes of one part: equal entries give equal bytes."""
    encoded: bytes = msgpack.packb([PART_VERSION, [_pack_entry(entry) for entry in entries]], use_bin_type=True)
    return encoded


def _pack_entry(entry: Entry) -> list[Any]:
    data: Any = entry.inline
    if entry.chunks is not None:
        data = [entry.chunks]
    elif entry.id_lists is not None:
        data = [entry.id_lists, None]
    attrs = dict(sorted(entry.attrs.items())) or None
    hints = dict(sorted(entry.hints.items())) or None
    return [
        entry.path,
        int(entry.kind),
        entry.dtype,
        list(entry.shape),
        attrs,
        hints,
        entry.raw_bytes,
        data,
        entry.digest,
    ]


def decode_part(data: Buffer, *, id_bytes: int, where: str) -> list[Entry]:
    """The entries of one part, each checked: lengths, counts and id widths agree. Raises FormatError."""
    if len(data) > PART_BYTES_MAX:
        raise FormatError(f"{where}: expected a part of at most {PART_BYTES_MAX} bytes, found {len(data)}")
    try:
        unpacked = msgpack.unpackb(data, raw=False, use_list=True, strict_map_key=True)
        version, packed_entries = unpacked
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise FormatError(f"{where}: not a manifest part: {error}") from error
    if version != PART_VERSION or not isinstance(packed_entries, list):
        raise FormatError(
            f"{where}: expected part version {PART_VERSION}, found {version!r}; a newer castore may read it"
        )
    try:
        return [_unpack_entry(packed, id_bytes, where) for packed in packed_entries]
    except RecursionError as error:
        raise FormatError(f"{where}: nested deeper than any manifest part that castore writes") from error


def part_references(data: Buffer, *, id_bytes: int, where: str) -> tuple[bytes, bytes]:
    """The chunk ids and the ids of id lists that a part names, each kind concatenated: all that gc needs of it, at a
    tenth of the cost of its entries. What looks odd is left to decode_part. Raises FormatError.
    """
    chunks: list[bytes] = []
    id_lists: list[bytes] = []
    try:
        version, packed_entries = msgpack.unpackb(data, raw=False, use_list=True, strict_map_key=True)
        odd = version != PART_VERSION or len(data) > PART_BYTES_MAX
        for _, _, _, _, _, _, _, ids, _ in packed_entries:
            if type(ids) is list:
                odd = odd or type(ids[0]) is not bytes or len(ids[0]) % id_bytes != 0
                odd = odd or len(ids) > 2 or (len(ids) == 2 and ids[1] is not None)
                (chunks if len(ids) == 1 else id_lists).append(ids[0])
    except (ValueError, TypeError, LookupError, msgpack.UnpackException, RecursionError):
        odd = True
    if not odd:
        return b"".join(chunks), b"".join(id_lists)
    entries = decode_part(data, id_bytes=id_bytes, where=where)
    return b"".join(entry.chunks or b"" for entry in entries), b"".join(entry.id_lists or b"" for entry in entries)


def _unpack_entry(packed: Any, id_bytes: int, where: str) -> Entry:
    if not isinstance(packed, list) or len(packed) != _ENTRY_FIELDS or not isinstance(packed[0], str):
        raise FormatError(f"{where}: expected an entry of {_ENTRY_FIELDS} fields, found {str(packed)[:80]}")
    path, kind_number, dtype, shape, attrs, hints, raw_bytes, data, digest = packed
    where = f"{where}, leaf {path!r}"
    try:
        kind = Kind(kind_number)
    except ValueError as error:
        raise FormatError(f"{where}: kind {str(kind_number)[:80]} is unknown to this castore") from error
    entry = Entry(
        path,
        kind,
        _checked(dtype, str, where),
        _checked_shape(shape, where),
        _checked_map(attrs, where) if attrs is not None else {},
        _checked_map(hints, where) if hints is not None else {},
        _checked_count(raw_bytes, where),
        inline=data if isinstance(data, bytes) else None,
        chunks=data[0] if isinstance(data, list) and len(data) == 1 and isinstance(data[0], bytes) else None,
        id_lists=data[0] if isinstance(data, list) and len(data) == 2 and _is_id_lists(*data) else None,
        digest=_checked(digest, bytes, where) if digest is not None else None,
    )
    _check_lengths(entry, data, id_bytes, where)
    return entry


def _check_lengths(entry: Entry, data: Any, id_bytes: int, where: str) -> None:
    """Every length that a reader would allocate by is derived twice and compared."""
    if (entry.digest is not None) != (entry.kind is Kind.VIEW) or (entry.digest and len(entry.digest) != id_bytes):
        raise FormatError(
            f"{where}: {entry.kind.name} with a digest of {entry.digest!r:.80}: views have one, nothing else"
        )
    if not entry.has_bytes:
        if data is not None or (entry.raw_bytes and entry.is_container):
            raise FormatError(f"{where}: {entry.kind.name} carries data and must not")
        return
    count = chunk_count(entry.raw_bytes)
    if count == 0:
        found = None if entry.inline is None else len(entry.inline)
        expected = entry.raw_bytes
    elif entry.id_lists is not None:
        found = len(entry.id_lists)
        expected = -(-count // PART_CHUNKS_MAX) * id_bytes
    else:
        found = None if entry.chunks is None else len(entry.chunks)
        expected = count * id_bytes
    if found != expected:
        raise FormatError(
            f"{where}: {entry.raw_bytes} raw bytes: expected {expected} bytes of data or ids, found {found}"
        )


def _is_id_lists(ids: Any, mark: Any) -> bool:
    return isinstance(ids, bytes) and mark is None


def _checked(value: Any, kind: type, where: str) -> Any:
    if not isinstance(value, kind):
        raise FormatError(f"{where}: expected {kind.__name__}, found {type(value).__name__}")
    return value


def _checked_map(value: Any, where: str) -> dict[str, Any]:
    """Attrs and hints are sorted by key when they are written, and attrs again for the state id."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise FormatError(f"{where}: expected a map with text keys, found {str(value)[:80]}")
    return value


def _checked_count(value: Any, where: str) -> int:
    if type(value) is not int or not 0 <= value < _LENGTH_MAX:
        raise FormatError(f"{where}: expected a length, found {str(value)[:80]}")
    return value


def _checked_shape(value: Any, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > _SHAPE_DIMS_MAX:
        raise FormatError(f"{where}: expected a shape, found {str(value)[:80]}")
    return tuple(_checked_count(size, where) for size in value)


def encode_id_list(ids: bytes) -> bytes:
    """An id list is nothing but concatenated chunk ids; named so that readers and writers say what they mean."""
    return ids


def decode_id_list(data: bytes, *, expected_count: int, id_bytes: int, where: str) -> bytes:
    """The concatenated ids, their count checked. Raises FormatError."""
    if len(data) != expected_count * id_bytes:
        raise FormatError(f"{where}: expected {expected_count} chunk ids, found {len(data)} bytes")
    return data
