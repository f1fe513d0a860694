"""Find what a pack has lost, by the checksums of its cells, and restore it from the parity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from castore.backend.base import RangeReader
from castore.errors import CastoreError, ChecksumError, FormatError, ParityExceededError
from castore.format.parity import (
    HEADER_BYTES,
    ParityHeader,
    ParityLayout,
    decode_parity_header,
    decode_sums,
)
from castore.hashing import checksum
from castore.ids import PackId
from castore.options import MIB
from castore.parity.build import read_cell
from castore.parity.code import ErasureCode

_DIGEST_BYTES = 4 * MIB


@dataclass(frozen=True, slots=True)
class ParityFile:
    """An open parity file, its header and table read from whichever copy is whole."""

    reader: RangeReader
    header: ParityHeader
    sums: Sequence[int]

    @property
    def layout(self) -> ParityLayout:
        """How the pack is cut."""
        return self.header.layout


@dataclass(frozen=True, slots=True)
class Losses:
    """The cells that are lost: (stretch, column); stretches from k on are parity."""

    cells: frozenset[tuple[int, int]]
    worst_count: int
    """Most in one column: at most m can be restored."""


def open_parity(reader: RangeReader, pack_id: PackId | None, *, where: str) -> ParityFile:
    """Read header and table. Raises DamageError when neither copy is whole, or it is the parity of another pack than
    the one given.
    """
    header = _header(reader, where)
    if pack_id is not None and header.pack_id != pack_id:
        raise ChecksumError(f"{where}: expected the parity of pack {pack_id}, found {header.pack_id}: swapped files")
    table_bytes = header.layout.table_bytes
    failure: CastoreError | None = None
    for offset in (HEADER_BYTES, header.layout.file_bytes - HEADER_BYTES - table_bytes):
        try:
            return ParityFile(reader, header, decode_sums(reader.read(offset, table_bytes), header, where=where))
        except CastoreError as error:
            failure = failure or error
    assert failure is not None
    raise failure


def _header(reader: RangeReader, where: str) -> ParityHeader:
    failure: CastoreError | None = None
    for offset in (0, reader.size_bytes - HEADER_BYTES):
        try:
            if offset < 0:
                raise FormatError(f"{where}: expected a header of {HEADER_BYTES} bytes, found {reader.size_bytes}")
            return decode_parity_header(reader.read(offset, HEADER_BYTES), where=where)
        except CastoreError as error:
            failure = failure or error
    assert failure is not None
    raise failure


def find_losses(pack: RangeReader | None, parity: ParityFile) -> Losses:
    """Compare every cell of pack and parity with its checksum; a pack that is None, or cut short, lost what is not
    there.
    """
    layout = parity.layout
    lost: set[tuple[int, int]] = set()
    worst = 0
    for column in range(layout.column_count):
        before = len(lost)
        for stretch in range(layout.stretch_count):
            if _sound_cell(pack, parity, stretch, column) is None:
                lost.add((stretch, column))
        worst = max(worst, len(lost) - before)
    return Losses(frozenset(lost), worst)


def lost_parity_cells(parity: ParityFile) -> int:
    """How many cells of the parity itself do not have their checksums."""
    layout = parity.layout
    return sum(
        _sound_cell(None, parity, stretch, column) is None
        for stretch in range(layout.data_count, layout.stretch_count)
        for column in range(layout.column_count)
    )


def _sound_cell(pack: RangeReader | None, parity: ParityFile, stretch: int, column: int) -> bytes | None:
    """A cell that has its checksum, else None."""
    layout = parity.layout
    try:
        if stretch >= layout.data_count:
            offset = layout.parity_offset(stretch - layout.data_count, column)
            cell = parity.reader.read(offset, layout.column_bytes(column))
        elif pack is not None:
            cell = read_cell(pack, layout, stretch, column)
        elif stretch * layout.stretch_bytes + column * layout.cell_bytes >= layout.pack_bytes:
            cell = bytes(layout.column_bytes(column))  # what was filled up is never lost
        else:
            return None
    except CastoreError:
        return None
    return cell if checksum(cell) == parity.sums[layout.cell_index(stretch, column)] else None


class RestoredPack:
    """A pack as it was: its own bytes where they are sound, restored ones elsewhere. A RangeReader.

    Holds restored cells in memory, nothing else. Closing it closes the pack.
    """

    def __init__(self, pack: RangeReader | None, layout: ParityLayout, cells: dict[tuple[int, int], bytes]) -> None:
        self._pack = pack
        self._layout = layout
        self._cells = cells

    @property
    def size_bytes(self) -> int:
        """Of the whole pack."""
        return self._layout.pack_bytes

    def read_into(self, offset: int, target: memoryview) -> None:
        """See RangeReader.read_into."""
        end = offset + len(target)
        if end > self.size_bytes or offset < 0:
            raise FormatError(f"restored pack: read at {offset}: expected {len(target)} bytes of {self.size_bytes}")
        at = offset
        while at < end:
            stretch, inside = divmod(at, self._layout.stretch_bytes)
            column, skip = divmod(inside, self._layout.cell_bytes)
            take = min(end - at, self._layout.column_bytes(column) - skip)
            part = target[at - offset : at - offset + take]
            cell = self._cells.get((stretch, column))
            if cell is not None:
                part[:] = cell[skip : skip + take]
            else:
                assert self._pack is not None
                self._pack.read_into(at, part)
            at += take

    def read(self, offset: int, size_bytes: int) -> bytes:
        """See RangeReader.read."""
        if offset + size_bytes > self.size_bytes:
            raise FormatError(f"restored pack: read at {offset}: expected {size_bytes} bytes of {self.size_bytes}")
        out = bytearray(size_bytes)
        self.read_into(offset, memoryview(out))
        return bytes(out)

    def close(self) -> None:
        """See RangeReader.close."""
        if self._pack is not None:
            self._pack.close()


def restore_pack(pack: RangeReader | None, parity: ParityFile, losses: Losses, *, where: str) -> RestoredPack:
    """The pack as it was when its parity was made, proven by the digest of all of it.

    Raises ParityExceededError when a column has lost more than m cells.
    """
    layout = parity.layout
    if losses.worst_count > layout.parity_count:
        raise ParityExceededError(
            f"{where}: {losses.worst_count} of {layout.stretch_count} stretches are lost at one place, pack and parity "
            f"together; its parity restores {layout.parity_count}"
        )
    code = ErasureCode(layout.data_count, layout.parity_count)
    cells: dict[tuple[int, int], bytes] = {}
    for column in sorted({column for stretch, column in losses.cells if stretch < layout.data_count}):
        column_cells = [
            None if (stretch, column) in losses.cells else _sound_cell(pack, parity, stretch, column)
            for stretch in range(layout.stretch_count)
        ]
        if sum(cell is None for cell in column_cells) > layout.parity_count:
            raise ParityExceededError(f"{where}: more was lost while it was being restored; run it again")
        cells.update(((stretch, column), bytes(restored)) for stretch, restored in code.restore(column_cells).items())
    restored_pack = RestoredPack(pack, layout, cells)
    found = _digest(restored_pack)
    if found != parity.header.pack_digest:
        raise ChecksumError(
            f"{where}: expected the restored pack to have digest {parity.header.pack_digest.hex()}, found {found.hex()}"
        )
    return restored_pack


def _digest(pack: RestoredPack) -> bytes:
    digest = xxhash.xxh3_128()
    for start in range(0, pack.size_bytes, _DIGEST_BYTES):
        digest.update(pack.read(start, min(_DIGEST_BYTES, pack.size_bytes - start)))
    return digest.digest()
