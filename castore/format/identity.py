"""Digests that name content: of a leaf and of a whole state. They never depend on encoding, packing or sharding.

    leaf digest  = H("castore.leaf" 00 | raw_bytes as u64 | chunk id | chunk id | …)
                   chunk ids on the fixed grid of the logical row-major bytes, for inline leaves too; no ids for 0 bytes
    state id     = H("castore.state" 00 | row | row | …)
                   rows sorted by path (code points), one per entry except STORAGE
    row          = msgpack [path, kind, dtype, shape, attrs sorted by key (a map, be it empty), raw_bytes, leaf digest]

An alias has the row of its target under its own path; a view has the row of the TENSOR or
NDARRAY that it is, with its own digest and of its attrs only `descr`; containers have
raw_bytes 0 and an empty digest. Hints (strides, requires_grad, device) and the order of dict keys are no part of
identity.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgpack

from castore.errors import FormatError
from castore.format.manifest import Entry, Kind
from castore.hashing import Hasher
from castore.ids import Buffer, StateId

_LEAF_TAG = b"castore.leaf"
_STATE_TAG = b"castore.state"
_BYTE_ORDERS = ("<", ">", "|")


def leaf_digest(hasher: Hasher, raw_bytes: int, chunks: Buffer) -> bytes:
    """Digest of a leaf from its concatenated chunk ids."""
    return hasher.tagged(_LEAF_TAG, (raw_bytes.to_bytes(8, "little"), chunks))


def entry_digest(hasher: Hasher, entry: Entry) -> bytes:
    """Leaf digest of an entry that has bytes, or of a view; empty for a container."""
    if entry.is_container:
        return b""
    if entry.digest is not None:
        return entry.digest
    chunks = entry.chunks
    if chunks is None:
        chunks = hasher.digest(entry.inline) if entry.inline else b""
    return leaf_digest(hasher, entry.raw_bytes, chunks)


def content_kind(entry: Entry) -> Kind:
    """What a value is does not depend on whose memory it shares; numpy's type codes begin with a byte order."""
    if entry.kind is not Kind.VIEW:
        return entry.kind
    return Kind.NDARRAY if entry.dtype[:1] in _BYTE_ORDERS else Kind.TENSOR


def state_id(hasher: Hasher, entries: Sequence[Entry]) -> StateId:
    """The root over all entries, id lists already resolved into `chunks`."""
    by_path = {entry.path: entry for entry in entries}
    rows = (_row(hasher, path, by_path[path], by_path) for path in sorted(by_path))
    return StateId(hasher.tagged(_STATE_TAG, _present(rows)).hex())


def _present(rows: Iterable[bytes | None]) -> Iterable[bytes]:
    return (row for row in rows if row is not None)


def _row(hasher: Hasher, path: str, entry: Entry, by_path: Mapping[str, Entry]) -> bytes | None:
    if entry.kind is Kind.STORAGE:
        return None
    attrs = dict(entry.attrs)
    if entry.kind is Kind.ALIAS:
        target = by_path.get(str(attrs.get("target")))
        if target is None or target.kind is Kind.ALIAS:
            raise FormatError(f"leaf {path!r}: alias of {attrs.get('target')!r}, which is no leaf of this manifest")
        return _row_as(hasher, path, target)
    return _row_as(hasher, path, entry)


def _row_as(hasher: Hasher, path: str, entry: Entry) -> bytes:
    kind, attrs = content_kind(entry), dict(sorted(entry.attrs.items()))
    if entry.kind is Kind.VIEW:
        attrs = {"descr": attrs["descr"]} if "descr" in attrs else {}
    digest = entry_digest(hasher, entry)
    row = [path, int(kind), entry.dtype, list(entry.shape), attrs, entry.raw_bytes, digest]
    try:
        packed: bytes = msgpack.packb(row, use_bin_type=True)
    except (ValueError, TypeError, OverflowError) as error:
        raise FormatError(f"leaf {path!r}: attributes that castore cannot have written: {error}") from error
    return packed
