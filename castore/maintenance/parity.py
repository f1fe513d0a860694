"""Parity of a repository: add it to packs, say what is protected, take it away, restore with it.

A parity file is made for a pack that stands, at any time, and is never needed to read it. It is garbage when its pack
has gone: whoever looks for such garbage lists `parity/` first and the packs after.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from castore.backend.base import Backend, RangeReader
from castore.errors import (
    CastoreError,
    DamageError,
    NotFoundError,
    RepositoryAccessError,
    RepositoryError,
    StorageError,
)
from castore.format.layout import PARITY, pack_name, parity_name, parse_parity_name
from castore.ids import PackId
from castore.pack.reader import read_table
from castore.parity.build import build_parity, plan_parity
from castore.parity.code import ErasureCode
from castore.parity.restore import find_losses, lost_parity_cells, open_parity
from castore.repository import Handle
from castore.store import check_stored, pack_sizes

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

OVERHEAD_PERCENT = 10
"""Restores a tenth of a pack in one piece, or up to ten lost cells at each place: bad sectors come in small numbers."""


@dataclass(frozen=True, slots=True)
class ParityReport:
    """What `add` did."""

    added: tuple[PackId, ...]
    added_bytes: int
    renewed: tuple[PackId, ...]
    """Those of `added` that had parity before, which was rotten."""
    kept_count: int
    """Packs that had parity before, which was left as it is."""
    refused: tuple[tuple[PackId, str], ...]
    """Packs that are damaged already, and why: their parity would keep the damage."""

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "added": list(self.added),
            "added_bytes": self.added_bytes,
            "renewed": list(self.renewed),
            "kept_count": self.kept_count,
            "refused": dict(self.refused),
        }


@dataclass(frozen=True, slots=True)
class PackParity:
    """The parity of one pack."""

    pack_id: PackId
    pack_bytes: int
    parity_bytes: int
    """0 without parity."""
    data_count: int
    parity_count: int
    lost_cells: int
    """Of pack and parity; 0 when they were not read."""
    worst_count: int
    """Most lost cells at one place: at most `parity_count` can be restored."""
    error: str
    """Why the parity file cannot be used; empty when it can."""

    @property
    def can_restore(self) -> bool:
        """Whether what is lost now can be restored."""
        return bool(self.parity_bytes) and not self.error and self.worst_count <= self.parity_count


@dataclass(frozen=True, slots=True)
class ParityStatus:
    """What is protected."""

    packs: tuple[PackParity, ...]
    orphans: tuple[PackId, ...]
    """Parity files without a pack: gc removes them."""
    with_data: bool

    @property
    def ok(self) -> bool:
        """Whether nothing is lost and every parity file can be used."""
        return not any(pack.lost_cells or pack.error for pack in self.packs)

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "ok": self.ok,
            "with_data": self.with_data,
            "packs": [
                {
                    "pack": pack.pack_id,
                    "pack_bytes": pack.pack_bytes,
                    "parity_bytes": pack.parity_bytes,
                    "data_count": pack.data_count,
                    "parity_count": pack.parity_count,
                    "lost_cells": pack.lost_cells,
                    "worst_count": pack.worst_count,
                    "can_restore": pack.can_restore,
                    "error": pack.error,
                }
                for pack in self.packs
            ],
            "orphans": list(self.orphans),
        }


def add_parity(
    handle: Handle,
    *,
    overhead_percent: int = OVERHEAD_PERCENT,
    data: bool = False,
    progress: Progress | None = None,
) -> ParityReport:
    """Make parity for every pack that has none, after its records were compared with their checksums; also where the
    parity cannot be used any more, or with `data`, which reads all of it, has rotten cells.

    Raises UsageError, MissingExtraError, NoSpaceError or StorageError; what was added before stays.
    """
    plan_parity(1, overhead_percent=overhead_percent)
    ErasureCode(1, 1)
    backend = handle.backend
    handle.config.check_features("write", where=backend.location)
    covered = parity_sizes(backend)
    sizes = pack_sizes(backend)
    rotten = {pack_id for pack_id in sizes.keys() & covered.keys() if _is_rotten(backend, pack_id, data=data)}
    if rotten:
        handle.config.check_features("gc", where=backend.location)  # it goes before the new one comes
    lacking = sorted((sizes.keys() - covered.keys()) | rotten)
    total, done = sum(sizes[pack_id] for pack_id in lacking), 0
    added: list[PackId] = []
    added_bytes = 0
    refused: list[tuple[PackId, str]] = []

    def advance(count_bytes: int) -> None:
        nonlocal done
        done = min(total, done + count_bytes)
        if progress is not None:
            progress(done, total)

    for pack_id in lacking:
        try:
            added_bytes += _add(handle, pack_id, overhead_percent, advance, renew=pack_id in rotten)
            added.append(pack_id)
        except NotFoundError:
            continue  # it was collected meanwhile
        except (DamageError, RepositoryAccessError) as error:
            refused.append((pack_id, str(error)))
    renewed = tuple(pack_id for pack_id in added if pack_id in rotten)
    return ParityReport(tuple(added), added_bytes, renewed, len(sizes) - len(lacking), tuple(refused))


def _is_rotten(backend: Backend, pack_id: PackId, *, data: bool) -> bool:
    """Whether a parity file restores less than it was made for; without `data` only whether it can be used at all."""
    name = parity_name(pack_id)
    try:
        reader = backend.open_reader(name)
        try:
            parity = open_parity(reader, pack_id, where=name)
            is_cut = reader.size_bytes != parity.layout.file_bytes
            return is_cut or (data and lost_parity_cells(parity) > 0)
        finally:
            reader.close()
    except (DamageError, StorageError):  # also where the disk refuses to read it, and where it is gone by now
        return True
    except RepositoryError:
        return False  # made by a newer castore, or not for us to read


def _add(handle: Handle, pack_id: PackId, overhead_percent: int, advance: Callable[[int], None], *, renew: bool) -> int:
    backend = handle.backend
    reader = backend.open_reader(pack_name(pack_id))
    try:
        _check_records(reader, pack_id, handle)
        layout = plan_parity(reader.size_bytes, overhead_percent=overhead_percent)
        sink = backend.create_stream(parity_name(pack_id))
        try:
            build_parity(reader, sink, layout, pack_id, progress=advance)
            if renew:  # its pack is whole, so nothing is lost should we end here
                backend.delete(parity_name(pack_id))
            with suppress(_Taken):
                _commit(backend, sink.commit, pack_id)
        finally:
            sink.abort()
    finally:
        reader.close()
    if backend.stat(pack_name(pack_id)) is None:
        backend.delete(parity_name(pack_id))
        raise NotFoundError(f"{pack_name(pack_id)} was collected")
    return layout.file_bytes


class _Taken(Exception):  # noqa: N818  no error: another process was faster
    pass


def _commit(backend: Backend, commit: Callable[[], None], pack_id: PackId) -> None:
    try:
        commit()
    except StorageError:
        if backend.stat(parity_name(pack_id)) is None:
            raise
        raise _Taken from None


def _check_records(reader: RangeReader, pack_id: PackId, handle: Handle) -> None:
    """Parity must not preserve rot. Raises DamageError."""
    name = pack_name(pack_id)
    for row in read_table(reader, where=name, expected_id=pack_id, hasher=handle.hasher):
        where = f"{name}, record of chunk {row.chunk_id.hex()} at {row.offset}"
        check_stored(row, memoryview(reader.read(row.offset, row.stored_bytes)), where=where)


def parity_status(handle: Handle, *, data: bool = False, progress: Progress | None = None) -> ParityStatus:
    """Which packs are protected; with `data=True` every cell is read and compared. Damage is reported, not raised."""
    covered = parity_sizes(handle.backend)
    sizes = pack_sizes(handle.backend)
    total, done = sum(sizes.values()), 0
    packs = []
    for pack_id, size_bytes in sorted(sizes.items()):
        packs.append(_status(handle, pack_id, size_bytes, covered.get(pack_id), data=data))
        done += size_bytes
        if progress is not None:
            progress(done, total)
    return ParityStatus(tuple(packs), tuple(sorted(covered.keys() - sizes.keys())), data)


def _status(handle: Handle, pack_id: PackId, pack_bytes: int, parity_bytes: int | None, *, data: bool) -> PackParity:
    if parity_bytes is None:  # an empty file is none either, but somebody relies on it
        return PackParity(pack_id, pack_bytes, 0, 0, 0, 0, 0, "")
    try:
        parity_reader = handle.backend.open_reader(parity_name(pack_id))
    except CastoreError as error:
        return PackParity(pack_id, pack_bytes, parity_bytes, 0, 0, 0, 0, str(error))
    try:
        parity = open_parity(parity_reader, pack_id, where=parity_name(pack_id))
        layout = parity.layout
        lost, worst = 0, 0
        if data:
            pack = _open_pack(handle.backend, pack_name(pack_id))
            losses = find_losses(pack, parity)
            lost, worst = len(losses.cells), losses.worst_count
            if pack is not None:
                pack.close()
        return PackParity(pack_id, pack_bytes, parity_bytes, layout.data_count, layout.parity_count, lost, worst, "")
    except CastoreError as error:
        return PackParity(pack_id, pack_bytes, parity_bytes, 0, 0, 0, 0, str(error))
    finally:
        parity_reader.close()


def remove_parity(handle: Handle) -> tuple[int, int]:
    """Delete all parity files; (files, bytes)."""
    handle.config.check_features("write", "gc", where=handle.backend.location)
    found = parity_sizes(handle.backend)
    removed = [size for pack_id, size in found.items() if handle.backend.delete(parity_name(pack_id))]
    return len(removed), sum(removed)


def parity_sizes(backend: Backend) -> dict[PackId, int]:
    """The parity files that are there, with their lengths."""
    found = ((parse_parity_name(info.name), info.size_bytes) for info in backend.list(PARITY))
    return {pack_id: size_bytes for pack_id, size_bytes in found if pack_id is not None}


def stale_parity(backend: Backend) -> dict[PackId, int]:
    """Parity files whose pack has gone, with their lengths: garbage."""
    covered = parity_sizes(backend)  # before the packs: see the head of this file
    sizes = pack_sizes(backend)
    return {pack_id: size_bytes for pack_id, size_bytes in covered.items() if pack_id not in sizes}


def _open_pack(backend: Backend, name: str) -> RangeReader | None:
    """What is left of the pack; None when it is not there or cannot be opened."""
    try:
        return backend.open_reader(name)
    except CastoreError:
        return None
