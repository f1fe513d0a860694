"""The snapshot file: the immutable record of one training state.

    0   8  magic "CASTSNAP"
    8   2  format version
   10   1  hash algorithm number
   11   5  zero
   16   8  body length
   24      body: a msgpack map with exactly these keys
              state        str    state id (identity.py)
              parents      array  snapshot ids; the first is the one this save continued
              branch       str    the branch it was saved to
              step         int    or nil
              time_ns      int    when the save was asked for, ns since 1970
              metrics      map    str -> float or int
              metadata     map    str -> JSON value
              message      str
              raw_bytes    int    bytes of all leaves
              new_bytes    int    raw bytes of the chunks that no pack held before
              stored_bytes int    bytes this save added to packs
              leaves       int    entries that are no containers
              id_bytes     int    width of the ids below
              parts        bin    concatenated ids of the manifest's parts (manifest.py), in order
              software     str    what wrote it
              nonce        bin    8 random bytes: a snapshot that was collected never comes back under its old name
   end  n  H("castore.snapshot" 00 | body): the snapshot id, which is also the file's name

n is the digest width of the algorithm.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgpack

from castore.errors import ChecksumError, DamageError, FormatError, UnsupportedFormatError
from castore.hashing import Hasher, hasher_numbered
from castore.ids import Buffer, ChunkId, SnapshotId, StateId, is_hex
from castore.options import SNAPSHOT_BYTES_MAX

SNAPSHOT_VERSION = 1
SNAPSHOT_MAGIC = b"CASTSNAP"
_PREFIX = struct.Struct("<8sHB5sQ")
_TAG = b"castore.snapshot"

TIME_NS_MAX = 253_402_214_400 * 1_000_000_000
"""The last day of the year 9999: what datetime can show in any time zone."""

_FIELDS: dict[str, type | tuple[type, ...]] = {
    "state": str,
    "parents": list,
    "branch": str,
    "step": (int, type(None)),
    "time_ns": int,
    "metrics": dict,
    "metadata": dict,
    "message": str,
    "raw_bytes": int,
    "new_bytes": int,
    "stored_bytes": int,
    "leaves": int,
    "id_bytes": int,
    "parts": bytes,
    "software": str,
    "nonce": bytes,
}


@dataclass(frozen=True, slots=True)
class SnapshotRecord:
    """The body of a snapshot file. See the module docstring for the fields."""

    state_id: StateId
    parents: tuple[SnapshotId, ...]
    branch: str
    step: int | None
    time_ns: int
    metrics: Mapping[str, float]
    metadata: Mapping[str, Any]
    message: str
    raw_bytes: int
    new_bytes: int
    stored_bytes: int
    leaf_count: int
    part_ids: tuple[ChunkId, ...]
    software: str
    nonce: bytes


def encode_snapshot(record: SnapshotRecord, hasher: Hasher) -> tuple[SnapshotId, bytes]:
    """The id and the bytes of the file."""
    body: bytes = msgpack.packb(
        {
            "state": record.state_id,
            "parents": list(record.parents),
            "branch": record.branch,
            "step": record.step,
            "time_ns": record.time_ns,
            "metrics": dict(record.metrics),
            "metadata": dict(record.metadata),
            "message": record.message,
            "raw_bytes": record.raw_bytes,
            "new_bytes": record.new_bytes,
            "stored_bytes": record.stored_bytes,
            "leaves": record.leaf_count,
            "id_bytes": hasher.digest_bytes,
            "parts": b"".join(record.part_ids),
            "software": record.software,
            "nonce": record.nonce,
        },
        use_bin_type=True,
    )
    digest = hasher.tagged(_TAG, (body,))
    prefix = _PREFIX.pack(SNAPSHOT_MAGIC, SNAPSHOT_VERSION, hasher.number, bytes(5), len(body))
    return SnapshotId(digest.hex()), prefix + body + digest


def decode_snapshot(data: Buffer, *, where: str, expected_id: SnapshotId | None = None) -> SnapshotRecord:
    """The record, its digest compared with the body and, when given, with the file's name.

    Raises FormatError, ChecksumError or UnsupportedFormatError.
    """
    if len(data) < _PREFIX.size or len(data) > SNAPSHOT_BYTES_MAX:
        raise FormatError(f"{where}: expected {_PREFIX.size} to {SNAPSHOT_BYTES_MAX} bytes, found {len(data)}")
    view = memoryview(data)
    magic, version, algorithm, reserved, body_bytes = _PREFIX.unpack_from(view)
    if magic != SNAPSHOT_MAGIC:
        raise FormatError(f"{where}: expected magic {SNAPSHOT_MAGIC!r}, found {magic!r}: not a snapshot")
    if version != SNAPSHOT_VERSION:
        raise UnsupportedFormatError(
            f"{where}: snapshot version {version}; this castore reads version {SNAPSHOT_VERSION}"
        )
    if any(reserved):
        # The digest is over the body only: these are the only bytes that nothing else vouches for.
        raise FormatError(f"{where}: expected zeros at 11-15, found {reserved.hex()}; the snapshot changed")
    hasher = hasher_numbered(algorithm)
    end = _PREFIX.size + body_bytes
    if len(data) != end + hasher.digest_bytes:
        raise FormatError(
            f"{where}: expected {end + hasher.digest_bytes} bytes, found {len(data)}: cut short or padded"
        )
    body = view[_PREFIX.size : end]
    found_id = hasher.tagged(_TAG, (body,))
    if found_id != view[end:]:
        raise ChecksumError(
            f"{where}: expected digest {view[end:].hex()}, found {found_id.hex()}; the snapshot changed"
        )
    if expected_id is not None and found_id.hex() != expected_id:
        raise ChecksumError(f"{where}: expected snapshot {expected_id}, found {found_id.hex()}: the files were swapped")
    try:
        return _record(_unpack_body(body, where), hasher, where)
    except RecursionError as error:
        raise FormatError(f"{where}: nested deeper than any snapshot that castore writes") from error


def rebuild_snapshot(data: Buffer, hasher: Hasher, *, named: SnapshotId) -> tuple[SnapshotId, bytes] | None:
    """The id and the bytes of the snapshot in a damaged file, when its body is whole: the rest is known then.

    The body is proven by the name of the file (`named`), or by the digest behind it (a file under another's name).
    """
    view, n = memoryview(data), hasher.digest_bytes
    if not _PREFIX.size < len(view) <= SNAPSHOT_BYTES_MAX:
        return None
    declared = _PREFIX.unpack_from(view)[-1]
    for end in (_PREFIX.size + declared, len(view) - n, len(view)):
        if not _PREFIX.size < end <= len(view):
            continue
        body = view[_PREFIX.size : end]
        digest = hasher.tagged(_TAG, (body,))
        if digest.hex() != named and digest != view[end : end + n]:
            continue
        snapshot_id = SnapshotId(digest.hex())
        whole = _PREFIX.pack(SNAPSHOT_MAGIC, SNAPSHOT_VERSION, hasher.number, bytes(5), len(body)) + body + digest
        try:
            decode_snapshot(whole, where=named, expected_id=snapshot_id)
        except DamageError:
            continue
        return snapshot_id, whole
    return None


def _unpack_body(body: memoryview, where: str) -> dict[str, Any]:
    try:
        fields = msgpack.unpackb(body, raw=False, strict_map_key=True)
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise FormatError(f"{where}: the body is not msgpack: {error}") from error
    if not isinstance(fields, dict) or fields.keys() != _FIELDS.keys():
        raise FormatError(f"{where}: expected the fields {', '.join(_FIELDS)}; found {str(fields)[:80]}")
    for key, kind in _FIELDS.items():
        if not isinstance(fields[key], kind):
            raise FormatError(f"{where}: field {key!r} is a {type(fields[key]).__name__}")
    return fields


def _record(fields: dict[str, Any], hasher: Hasher, where: str) -> SnapshotRecord:
    n, parts = hasher.digest_bytes, fields["parts"]
    if fields["id_bytes"] != n or len(parts) % n:
        raise FormatError(f"{where}: expected part ids of {n} bytes, found {len(parts)} bytes of {fields['id_bytes']}")
    if not all(_is_digest(digest, n) for digest in (fields["state"], *fields["parents"])):
        raise FormatError(f"{where}: state or parents are not ids: {fields['state']!r:.80}, {fields['parents']!r:.80}")
    if not 0 <= fields["time_ns"] <= TIME_NS_MAX:
        raise FormatError(f"{where}: time_ns {fields['time_ns']} is no time before the year 10000")
    if not all(isinstance(key, str) and isinstance(value, int | float) for key, value in fields["metrics"].items()):
        raise FormatError(f"{where}: metrics are not numbers by name: {fields['metrics']!r:.80}")
    return SnapshotRecord(
        StateId(fields["state"]),
        tuple(SnapshotId(parent) for parent in fields["parents"]),
        fields["branch"],
        fields["step"],
        fields["time_ns"],
        fields["metrics"],
        fields["metadata"],
        fields["message"],
        fields["raw_bytes"],
        fields["new_bytes"],
        fields["stored_bytes"],
        fields["leaves"],
        tuple(ChunkId(parts[start : start + n]) for start in range(0, len(parts), n)),
        fields["software"],
        fields["nonce"],
    )


def _is_digest(text: Any, digest_bytes: int) -> bool:
    return isinstance(text, str) and len(text) == 2 * digest_bytes and is_hex(text)
