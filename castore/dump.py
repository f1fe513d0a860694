"""Describe any one file of a repository, whole or damaged, for `castore dump`. Reads that file, nothing else.

The kind is told by the first bytes, then by the name, so a file may have been renamed or copied out. As much
as can be read is decoded; what is wrong stands in "problems". Ids are hex. The result is JSON as it is.

    pack        header, trailer, records (from the table, else from a scan) and gaps
    snapshot    every field of the record
    text files  config, branch, tag, lease, condemned set, marks, policy, the reasons of a quarantine: their fields
    reserve     named only
    lock        empty, and so is all that can be said
    scrub       what was verified when: named only
    index       the LMDB file and its guard are named only; `castore reindex` builds them again
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgpack

from castore.backend.base import RangeReader, os_errors
from castore.backend.local import LocalReader
from castore.backend.syscalls import open_to_read
from castore.codec.registry import chain_name
from castore.errors import CastoreError, DamageError, FormatError, UnsupportedFormatError, UsageError
from castore.format.config import decode_config
from castore.format.layout import (
    COLLECTOR_SUFFIX,
    CONDEMNED_SUFFIX,
    DRAIN_SUFFIX,
    POLICY,
    POLICY_APPLIED,
    POLICY_COLLECTED,
    RESERVE,
    decode_ref_name,
)
from castore.format.pack import (
    HEADER_BYTES,
    PACK_MAGIC,
    TRAILER_BYTES,
    PackHeader,
    Row,
    decode_trailer,
    table_bytes,
)
from castore.format.parity import PARITY_MAGIC
from castore.format.snapshot import SNAPSHOT_MAGIC, SnapshotRecord, decode_snapshot
from castore.format.textfile import decode_text_file
from castore.options import SNAPSHOT_BYTES_MAX, TEXT_FILE_BYTES_MAX
from castore.pack.reader import Gap, read_header, read_table, scan_records
from castore.parity.restore import lost_parity_cells, open_parity

ROWS_SHOWN = 1000
"""Records listed when the caller sets no limit; a pack may hold millions."""
_LMDB_MAGIC = struct.pack("=I", 0xBEEFC0DE)
_LMDB_MAGIC_AT = 16
_GUARD_MAGIC = b"CASTGARD"
_TEXT_FOLDERS = ("branches", "tags", "forgotten", "thin", "orphans", "lost", "damaged")
_TEXT_NAMES = ("config", "why", POLICY, POLICY_APPLIED, POLICY_COLLECTED)
_TEXT_SUFFIXES = (".lease", CONDEMNED_SUFFIX, DRAIN_SUFFIX, COLLECTOR_SUFFIX)
_SCRUB_MAGIC = b"CASTSCR"
_HEAD_SHOWN_BYTES = 64
_SNAPSHOT_BODY_AT = 24
_DEPTH_MAX = 50
"""Levels of nesting shown: deeper than any metadata, and safe for the interpreter's stack."""


def dump(path: str | os.PathLike[str], *, limit: int | None = ROWS_SHOWN) -> dict[str, Any]:
    """What the file is and what it holds; `limit` caps the records and gaps listed (None: all).

    Raises NotFoundError, RepositoryAccessError, StorageError or UsageError (a directory) when there is no
    file to read; never because of what is in it.
    """
    where = os.fspath(path)
    if Path(where).is_dir():
        raise UsageError(f"{where} is a directory; give one file of a repository, such as {where}/config")
    with os_errors(where, "open"):
        fd, status = open_to_read(where)
    reader = LocalReader(where, fd, status.st_size)
    try:
        return dump_reader(reader, where, limit=limit)
    finally:
        reader.close()


def dump_reader(reader: RangeReader, where: str, *, limit: int | None = ROWS_SHOWN) -> dict[str, Any]:
    """The same for an open file; `where` is its name."""
    described: dict[str, Any] = {"file": where, "bytes": reader.size_bytes, "kind": "unknown"}
    problems: list[str] = []
    try:
        head = reader.read(0, min(_HEAD_SHOWN_BYTES, reader.size_bytes))
        described |= _kind(head, where)(reader, where, problems, limit)
    except CastoreError as error:  # the disk refuses: show what is known without it
        problems.append(str(error))
    return described | {"problems": problems}


Describe = Callable[[RangeReader, str, list[str], "int | None"], dict[str, Any]]


def _kind(head: bytes, where: str) -> Describe:
    """How to read a file that begins like this, or failing that, has this name."""
    name = Path(where).name
    if name == ".lock" and not head:
        return _named("lock", "nothing: it is locked while a branch or tag moves")
    if where.endswith(f"/{RESERVE}") or where == RESERVE:
        return _named("reserve", "noise: space that a collector needs when the disk is full")
    if head.startswith(_SCRUB_MAGIC):
        return _named("scrub memory", "when each pack was last read whole; it may be deleted")
    if head.startswith(PACK_MAGIC):
        return _pack
    if head.startswith(SNAPSHOT_MAGIC):
        return _snapshot
    if head.startswith(PARITY_MAGIC):
        return _parity
    if head.startswith(_GUARD_MAGIC) or head[_LMDB_MAGIC_AT : _LMDB_MAGIC_AT + 4] == _LMDB_MAGIC:
        return _index
    if head.startswith(b"{"):
        return _text
    if name.endswith(".pack"):
        return _pack
    if name.endswith(".parity"):
        return _parity
    if Path(where).parent.name == "snapshots":
        return _snapshot
    if name.startswith("index."):
        return _index
    if name in _TEXT_NAMES or name.endswith(_TEXT_SUFFIXES) or Path(where).parent.name in _TEXT_FOLDERS:
        return _text
    return _unknown


def _named(kind: str, holds: str) -> Describe:
    """A file of which there is no more to say."""

    def describe(reader: RangeReader, where: str, problems: list[str], limit: int | None) -> dict[str, Any]:
        del reader, where, problems, limit
        return {"kind": kind, "holds": holds}

    return describe


def _unknown(reader: RangeReader, where: str, problems: list[str], limit: int | None) -> dict[str, Any]:
    del limit
    head = reader.read(0, min(_HEAD_SHOWN_BYTES, reader.size_bytes))
    problems.append(f"{where}: neither its first bytes nor its name are those of a file of a repository")
    return {"kind": "unknown", "head": head.hex()}


def _index(reader: RangeReader, where: str, problems: list[str], limit: int | None) -> dict[str, Any]:
    del problems, limit
    if reader.read(0, min(len(_GUARD_MAGIC), reader.size_bytes)) == _GUARD_MAGIC:
        what = "digests of the pages of index.lmdb"
    elif Path(where).name.endswith("lock"):
        what = "a lock: its bytes mean nothing by themselves"
    else:
        what = "LMDB file: a cache of the packs' tables"
    return {"kind": "index", "holds": what, "advice": "it may be deleted; `castore reindex` builds it again"}


# ---- parity ------------------------------------------------------------------------------------------------


def _parity(reader: RangeReader, where: str, problems: list[str], limit: int | None) -> dict[str, Any]:
    del limit
    try:
        parity = open_parity(reader, None, where=where)
    except (DamageError, UnsupportedFormatError) as error:
        problems.append(str(error))
        return {"kind": "parity"}
    layout = parity.layout
    if reader.size_bytes != layout.file_bytes:
        problems.append(f"{where}: expected {layout.file_bytes} bytes, found {reader.size_bytes}")
    lost = lost_parity_cells(parity)
    if lost:
        problems.append(f"{where}: {lost} parity cells do not have their checksums")
    return {
        "kind": "parity",
        "pack": parity.header.pack_id,
        "pack_bytes": layout.pack_bytes,
        "pack_digest": parity.header.pack_digest.hex(),
        "data_stretches": layout.data_count,
        "parity_stretches": layout.parity_count,
        "stretch_bytes": layout.stretch_bytes,
        "cell_bytes": layout.cell_bytes,
        "columns": layout.column_count,
    }


# ---- packs -------------------------------------------------------------------------------------------------


def _pack(reader: RangeReader, where: str, problems: list[str], limit: int | None) -> dict[str, Any]:
    header = _header(reader, where, problems)
    rows: list[Row] | None = None
    trailer: dict[str, Any] = {"state": "unknown"}
    if header is not None:
        trailer, rows = _trailer_and_table(reader, where, header, problems)
    source, gaps = "table", list[Gap]()
    if rows is None:
        source = "scan"
        rows, gaps = _scan(reader, where, header)
    shown = rows if limit is None else rows[:limit]
    return {
        "kind": "pack",
        "header": {"state": "damaged"} if header is None else {"state": "ok"} | _header_fields(header),
        "trailer": trailer,
        "records_from": source,
        "record_count": len(rows),
        "records": [_row_fields(row) for row in shown],
        "records_left_out": len(rows) - len(shown),
        "gap_count": len(gaps),
        "gaps": [{"offset": gap.offset, "length": gap.length} for gap in gaps[:limit]],
    }


def _header(reader: RangeReader, where: str, problems: list[str]) -> PackHeader | None:
    try:
        return read_header(reader, where=where)
    except CastoreError as error:
        problems.append(f"header: {error}")
        return None


def _trailer_and_table(
    reader: RangeReader, where: str, header: PackHeader, problems: list[str]
) -> tuple[dict[str, Any], list[Row] | None]:
    """What the trailer says, and the rows of the table when both can be trusted."""
    id_bytes = header.hasher.digest_bytes
    try:
        if reader.size_bytes < HEADER_BYTES + TRAILER_BYTES:
            raise FormatError(
                f"{where}: expected at least {HEADER_BYTES + TRAILER_BYTES} bytes, found {reader.size_bytes}"
            )
        tail = reader.read(reader.size_bytes - TRAILER_BYTES, TRAILER_BYTES)
        trailer = decode_trailer(tail, pack_bytes=reader.size_bytes, id_bytes=id_bytes, where=where)
    except CastoreError as error:
        problems.append(f"trailer: {error}")
        return {"state": "damaged"}, None
    fields = {
        "state": "ok",
        "pack": trailer.pack_id,
        "table_offset": trailer.table_offset,
        "table_bytes": table_bytes(trailer, id_bytes=id_bytes),
        "row_count": trailer.row_count,
        "table_checksum": f"{trailer.table_checksum:016x}",
        "table": "ok",
    }
    try:
        rows = read_table(reader, where=where, expected_id=header.pack_id, hasher=header.hasher)
    except CastoreError as error:
        problems.append(f"table: {error}")
        return fields | {"table": "damaged"}, None
    return fields, rows


def _scan(reader: RangeReader, where: str, header: PackHeader | None) -> tuple[list[Row], list[Gap]]:
    """Records and gaps; without a header the id width that finds more is the right one."""
    widths = [header.hasher.digest_bytes] if header else [16, 32]
    best: tuple[list[Row], list[Gap]] = [], []
    for width in widths:
        rows, gaps = list[Row](), list[Gap]()
        try:
            for found in scan_records(reader, where=where, id_bytes=width):
                if isinstance(found, Row):
                    rows.append(found)
                else:
                    gaps.append(found)
        except CastoreError:
            gaps.append(Gap(rows[-1].offset if rows else HEADER_BYTES, 0))
        if len(rows) > len(best[0]) or not best[1]:
            best = rows, gaps
    return best


def _header_fields(header: PackHeader) -> dict[str, Any]:
    return {
        "pack": header.pack_id,
        "repository": header.repository_id.hex(),
        "hash": header.hasher.name,
        "created_ns": header.created_ns,
    }


def _row_fields(row: Row) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "chunk": row.chunk_id.hex(),
        "kind": row.kind.name.lower(),
        "codec": chain_name(row.chain),
        "offset": row.offset,
        "stored_bytes": row.stored_bytes,
        "raw_bytes": row.raw_bytes,
        "checksum": f"{row.checksum:016x}",
        "in_run": row.in_run,
    }
    if row.base_ids:
        fields |= {"bases": [base_id.hex() for base_id in row.base_ids], "depth": row.depth}
    return fields


# ---- snapshots ---------------------------------------------------------------------------------------------


def _snapshot(reader: RangeReader, where: str, problems: list[str], limit: int | None) -> dict[str, Any]:
    data = reader.read(0, min(reader.size_bytes, SNAPSHOT_BYTES_MAX + 1))
    name = Path(where).name
    try:
        record = decode_snapshot(data, where=where)
    except CastoreError as error:
        problems.append(str(error))
        return {"kind": "snapshot", "fields": _unverified_body(data, problems)}
    found_id = data[-(len(record.state_id) // 2) :].hex()  # both are digests of the same hash
    if name != found_id:
        problems.append(f"{where}: the file holds snapshot {found_id}; in a repository that must be its name")
    return {"kind": "snapshot", "snapshot": found_id, "fields": _snapshot_fields(record, limit)}


def _snapshot_fields(record: SnapshotRecord, limit: int | None) -> dict[str, Any]:
    return {
        "state": record.state_id,
        "parents": list(record.parents),
        "branch": record.branch,
        "step": record.step,
        "time_ns": record.time_ns,
        "metrics": _plain(record.metrics),
        "metadata": _plain(record.metadata),
        "message": record.message,
        "raw_bytes": record.raw_bytes,
        "new_bytes": record.new_bytes,
        "stored_bytes": record.stored_bytes,
        "leaves": record.leaf_count,
        "part_count": len(record.part_ids),
        "parts": [part_id.hex() for part_id in record.part_ids[:limit]],
        "software": record.software,
        "nonce": record.nonce.hex(),
    }


def _unverified_body(data: bytes, problems: list[str]) -> Any:
    """The fields of a damaged snapshot as far as they can be made out. Nothing vouches for them."""
    unpacker = msgpack.Unpacker(
        raw=False, unicode_errors="replace", strict_map_key=False, max_buffer_size=len(data) + 1
    )
    unpacker.feed(data[_SNAPSHOT_BODY_AT:])
    fields: dict[str, Any] = {}
    try:
        for _ in range(unpacker.read_map_header()):
            key = str(_plain(unpacker.unpack()))
            fields[key] = _plain(unpacker.unpack())
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException, RecursionError):
        problems.append("the body ends or breaks off after the fields shown")
    if fields:
        problems.append("the fields shown are not verified: any of them may be wrong")
    return fields


# ---- text files --------------------------------------------------------------------------------------------


def _text(reader: RangeReader, where: str, problems: list[str], limit: int | None) -> dict[str, Any]:
    del limit
    data = reader.read(0, min(reader.size_bytes, TEXT_FILE_BYTES_MAX + 1))
    try:
        fields: Any = decode_text_file(data, name=where)
    except CastoreError as error:
        problems.append(str(error))
        fields = _unverified_line(data)
        if fields is not None:
            problems.append("the fields shown are not verified: any of them may be wrong")
    kind = _text_kind(fields if isinstance(fields, Mapping) else {}, where)
    described: dict[str, Any] = {"kind": kind}
    if fields is None:
        described["text"] = data[:1024].decode("utf-8", "replace")
    else:
        described["fields"] = _plain(fields)
    if not problems:
        _check_text(kind, data, fields, where, problems)
    return described


def _unverified_line(data: bytes) -> Any:
    try:
        return json.loads(data.partition(b"\n")[0])
    except (ValueError, RecursionError):
        return None


def _text_kind(fields: Mapping[str, Any], where: str) -> str:
    for kind, keys in (
        ("config", {"format", "hash"}),
        ("ref", {"name", "snapshot"}),
        ("lease", {"pid", "host"}),
        ("condemned", {"condemned_ns", "packs"}),
        ("forgotten", {"forgotten_ns", "parents"}),
        ("thinned", {"thinned_ns", "dropped"}),
        ("orphan", {"since_ns"}),
        ("policy", {"keep", "thin", "every_saves"}),
        ("policy note", {"applied_ns"}),
        ("policy note", {"collected_ns"}),
        ("drain", {"leases"}),
        ("loss", {"snapshot", "leaves", "parts"}),
        ("damage mark", {"pack", "offsets"}),
        ("quarantine", {"files", "time_ns"}),
    ):
        if keys <= fields.keys():
            return kind
    name, parent = Path(where).name, Path(where).parent.name
    if parent in ("branches", "tags"):
        return "ref"
    return {".lease": "lease", ".condemned": "condemned"}.get(
        Path(where).suffix, "config" if name == "config" else "text"
    )


def _check_text(kind: str, data: bytes, fields: Mapping[str, Any], where: str, problems: list[str]) -> None:
    """What the fields must say besides being whole."""
    if kind == "config":
        try:
            decode_config(data, where=where)
        except CastoreError as error:
            problems.append(str(error))
    if kind == "ref" and Path(where).parent.name in ("branches", "tags"):
        try:
            expected = decode_ref_name(Path(where).name)
        except CastoreError as error:
            problems.append(str(error))
            return
        if fields["name"] != expected:
            problems.append(f"{where}: expected ref {expected!r}, found {fields['name']!r}: the files were swapped")


def _plain(value: Any, depth: int = 0) -> Any:
    """JSON for whatever msgpack or json gave: bytes as hex, what JSON cannot hold as text."""
    if depth > _DEPTH_MAX:
        return "…"
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Mapping):
        return {str(_plain(key, depth + 1)): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_plain(item, depth + 1) for item in value]
    return str(value)
