"""Packs → the ledger: the tables of all packs, or of those that came since."""

from __future__ import annotations

from collections.abc import Iterable

from castore.backend.base import RangeReader
from castore.errors import DamageError, NotFoundError
from castore.format.layout import pack_name
from castore.format.pack_columns import columns_of, decode_columns
from castore.ids import PackId
from castore.maintenance.gc.ledger import Ledger
from castore.maintenance.tables import scan_rows
from castore.pack.reader import read_raw_table
from castore.repository import Handle
from castore.store import pack_sizes


def list_new_packs(handle: Handle, ledger: Ledger) -> list[PackId]:
    """Packs that stand and are not in the ledger."""
    return sorted(pack_sizes(handle.backend).keys() - ledger.numbers.keys())


def add_packs(handle: Handle, ledger: Ledger, pack_ids: Iterable[PackId]) -> None:
    """Read the tables of packs. One with a damaged table is added as far as its records can be found, to be left alone.

    Raises StorageError or RepositoryAccessError: what cannot be read now must not be taken for empty.
    """
    for pack_id in pack_ids:
        try:
            reader = handle.backend.open_reader(pack_name(pack_id))
        except NotFoundError:
            continue
        try:
            _add(handle, ledger, pack_id, reader)
        finally:
            reader.close()


def _add(handle: Handle, ledger: Ledger, pack_id: PackId, reader: RangeReader) -> None:
    hasher, name = handle.hasher, pack_name(pack_id)
    id_bytes = hasher.digest_bytes
    try:
        table = read_raw_table(reader, where=name, expected_id=pack_id, hasher=hasher)
        columns = decode_columns(table.data, table.trailer, id_bytes=id_bytes, where=name)
        created_ns, damage = table.header.created_ns, ""
    except DamageError as error:
        columns = columns_of(scan_rows(reader, pack_id, hasher), id_bytes=id_bytes)
        created_ns, damage = 0, str(error)
    ledger.add_pack(pack_id, columns, pack_bytes=reader.size_bytes, created_ns=created_ns, damage=damage)
