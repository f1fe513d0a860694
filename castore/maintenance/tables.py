"""The rows of a pack for whole-repository work: from its table, or where that is damaged from a scan."""

from __future__ import annotations

from contextlib import suppress

from castore.backend.base import Backend, RangeReader
from castore.errors import CastoreError, NotFoundError
from castore.format.layout import pack_name
from castore.format.pack import Row
from castore.hashing import Hasher
from castore.ids import PackId
from castore.pack.reader import read_table, scan_records


def read_rows(reader: RangeReader, pack_id: PackId, hasher: Hasher) -> tuple[list[Row], str]:
    """The rows, and why they had to be looked for: empty when the table is whole. Never raises for damage."""
    name = pack_name(pack_id)
    try:
        return read_table(reader, where=name, expected_id=pack_id, hasher=hasher), ""
    except CastoreError as error:
        return scan_rows(reader, pack_id, hasher), str(error)


def scan_rows(reader: RangeReader, pack_id: PackId, hasher: Hasher) -> list[Row]:
    """What the records say of themselves; less where the file cannot be read to its end."""
    rows: list[Row] = []
    with suppress(CastoreError):
        found = scan_records(reader, where=pack_name(pack_id), id_bytes=hasher.digest_bytes)
        rows.extend(record for record in found if isinstance(record, Row))
    return rows


def open_rows(backend: Backend, pack_id: PackId, hasher: Hasher) -> tuple[list[Row], str]:
    """The same for a pack that is not open; no rows when it has gone or cannot be opened."""
    try:
        reader = backend.open_reader(pack_name(pack_id))
    except NotFoundError:
        return [], ""
    except CastoreError as error:
        return [], str(error)
    try:
        return read_rows(reader, pack_id, hasher)
    finally:
        reader.close()
