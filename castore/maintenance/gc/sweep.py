"""Sweep: copy out of condemned packs what is needed, let the index forget them, delete them.

    debts     for each condemned pack, the records that must be durable in a new pack before it may go
    no debt   deleted first: that needs no space
    debts     copied out, the smallest first

A record need not be copied when another one of its chunk is relied on (so that its base stays as well), lies in a pack
that stays, is no deeper, and was read and hashed just now: the good one of two copies is never deleted for the sake of
a rotten one. What cannot be read keeps its packs: they stay condemned until the chunk is healed or quarantined.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

from castore.backend.base import RangeReader
from castore.errors import DamageError, NoSpaceError, NotFoundError
from castore.format.layout import pack_name
from castore.format.pack import Row
from castore.ids import PackId
from castore.maintenance.gc.copying import Copier, Unit, units
from castore.maintenance.gc.ledger import Ledger, PackFile
from castore.maintenance.tables import read_rows
from castore.options import PACK_BYTES_MAX
from castore.repository import Handle

_OPEN_PACKS_MAX = 4


@dataclass(slots=True)
class Swept:
    """What became of the condemned packs."""

    deleted: list[PackFile] = field(default_factory=list)
    """Without copying out of them."""
    rewritten: list[PackFile] = field(default_factory=list)
    copied_bytes: int = 0
    damaged: dict[PackId, str] = field(default_factory=dict)
    """Kept, because a record in them is needed and cannot be read → which and why."""
    unspaced: dict[PackId, str] = field(default_factory=dict)
    """Kept, because there was no space for copies."""


class Sweeper:
    """Removes condemned packs. The ledger was settled with all condemned packs as going."""

    def __init__(
        self,
        handle: Handle,
        ledger: Ledger,
        *,
        going: Collection[PackId],
        drained: Collection[PackId],
        advance: Callable[[int], object] = lambda _: None,
    ) -> None:
        """`going` are all condemned packs, `drained` those of them that no older writer can rely on any more. `advance`
        gets bytes of packs that are done.
        """
        self.swept = Swept()
        self._handle = handle
        self._ledger = ledger
        self._going = frozenset(going)
        known = sorted(pack_id for pack_id in drained if pack_id in ledger.numbers)
        packs = [ledger.packs[ledger.numbers[pack_id]] for pack_id in known]
        # Records may be in it that its damaged table does not show: it is for repair, which puts it aside.
        self.swept.damaged.update(
            (pack.pack_id, f"its table is damaged ({pack.damage}): run `castore repair`")
            for pack in packs
            if pack.damage
        )
        self._packs = [pack for pack in packs if not pack.damage]
        self._advance = advance
        self._copier = Copier(handle)
        self._debts: dict[PackId, set[int]] = {pack.pack_id: set() for pack in self._packs}
        self._sound: dict[int, str] = {}
        """Record → why it cannot be read; empty when it can."""
        self._required: set[tuple[int, int]] = set()
        self._appended: set[int] = set()
        self._sealed: set[int] = set()
        self._bad: dict[int, str] = {}
        self._opened: dict[PackId, tuple[RangeReader, list[Row]]] = {}
        """Least recently used first."""

    def run(self) -> Swept:
        """Sweep. Raises StorageError or RepositoryAccessError; what was deleted by then was not needed."""
        try:
            self._find_debts()
            self._delete([pack for pack in self._packs if not self._debts[pack.pack_id]], self.swept.deleted)
            self._copy_out([pack for pack in self._packs if self._debts.get(pack.pack_id)])
        finally:
            self._copier.abort()
            for pack_id in list(self._opened):
                self._close(pack_id)
        for pack in self._packs:
            bad = [self._bad[row] for row in self._debts.get(pack.pack_id, ()) if row in self._bad]
            if bad:
                self.swept.damaged[pack.pack_id] = bad[0]
        return self.swept

    # ---- debts -----------------------------------------------------------------------------------------------------

    def _find_debts(self) -> None:
        ledger, live = self._ledger, self._ledger.live_chunks()
        for pack in self._packs:
            for row in ledger.needed_rows(ledger.numbers[pack.pack_id], live).tolist():
                self._require(ledger.chunk_of(row), depth_max=ledger.depth_of(row) if ledger.is_kept(row) else None)

    def _require(self, chunk: int, *, depth_max: int | None) -> None:
        """See to it that some record of the chunk, no deeper than that, stays or is copied, and its base too."""
        bound = 255 if depth_max is None else depth_max
        if (chunk, bound) in self._required:
            return
        self._required.add((chunk, bound))
        ledger = self._ledger
        rows = [row for row in ledger.rows_of(chunk) if ledger.depth_of(row) <= bound]
        # What is relied on comes first, and of that what stays: most often there is one record, and this is no choice.
        rows.sort(key=lambda row: (not ledger.is_kept(row), ledger.pack_of(row).pack_id in self._going))
        chosen = rows[0] if len(rows) == 1 else next((row for row in rows if not self._why_unsound(row)), None)
        holders = [pack_id for row in rows if (pack_id := ledger.pack_of(row).pack_id) in self._debts]
        if chosen is None:
            for pack_id in holders:
                self._debts[pack_id].update(rows)
            self._bad.update((row, self._sound[row]) for row in rows)
            return
        if ledger.pack_of(chosen).pack_id in self._going:
            for pack_id in holders:
                self._debts[pack_id].add(chosen)
        if not ledger.is_kept(chosen):
            ledger.keep(chosen)
            for base in ledger.bases_of(chosen):
                self._require(base, depth_max=ledger.depth_of(chosen) - 1)

    def _why_unsound(self, row: int) -> str:
        if row not in self._sound:
            self._advance(0)  # a sign of life
            pack = self._ledger.pack_of(row)
            self._sound[row] = ""
            try:
                reader, table = self._open(pack)
                self._copier.verified(reader, table[row - pack.first_row], where=pack_name(pack.pack_id))
            except (DamageError, NotFoundError) as error:
                self._sound[row] = str(error)
        return self._sound[row]

    # ---- copying ---------------------------------------------------------------------------------------------------

    def _copy_out(self, packs: Iterable[PackFile]) -> None:
        queue = deque(sorted(packs, key=self._debt_bytes))
        batch: list[PackFile] = []
        batch_bytes = PACK_BYTES_MAX
        while queue:
            batch.append(queue.popleft())
            try:
                self._copy_pack(batch[-1])
                if self._copier.pack_bytes >= batch_bytes or not queue:
                    self._seal()
                    batch = []
            except NoSpaceError as error:
                self._copier.abort()
                self._appended.clear()
                queue.extendleft(reversed(batch))
                if batch_bytes == 0:
                    self.swept.unspaced.update((pack.pack_id, str(error)) for pack in queue)
                    return
                batch, batch_bytes = [], 0  # each pack by itself: needs the least space, and frees more than it needs

    def _debt_bytes(self, pack: PackFile) -> int:
        return sum(self._ledger.stored_of(row) for row in self._debts[pack.pack_id])

    def _copy_pack(self, pack: PackFile) -> None:
        own = range(pack.first_row, pack.first_row + pack.row_count)
        owed = (row for row in self._debts[pack.pack_id] if row in own and not self._is_done(row))
        wanted = {row - pack.first_row for row in owed}
        if wanted:
            reader, table = self._open(pack)
            for unit in units(table, wanted):
                self._copy_unit(pack, reader, unit)

    def _is_done(self, row: int) -> bool:
        return row in self._appended or row in self._sealed or row in self._bad

    def _copy_unit(self, pack: PackFile, reader: RangeReader, unit: Unit) -> None:
        row = pack.first_row + unit.place
        self._advance(0)
        try:
            self._copier.copy(reader, unit, where=pack_name(pack.pack_id))
        except DamageError as error:
            if unit.is_run:
                for place, single in enumerate(unit.rows, unit.place):
                    self._copy_unit(pack, reader, Unit(place, (single,)))
            else:
                self._bad[row] = str(error)
        else:
            self._appended.update(range(row, row + len(unit.rows)))

    def _seal(self) -> None:
        """Make the copies durable, then delete every pack whose debts are paid."""
        sealed = self._copier.seal()
        if sealed is not None:
            self.swept.copied_bytes += sealed.pack_bytes
        self._sealed |= self._appended
        self._appended.clear()
        paid = [pack for pack in self._packs if self._debts.get(pack.pack_id) and self._is_paid(pack)]
        self._delete(paid, self.swept.rewritten)

    def _is_paid(self, pack: PackFile) -> bool:
        return self._debts[pack.pack_id] <= self._sealed

    def _delete(self, packs: Sequence[PackFile], done: list[PackFile]) -> None:
        """The index forgets first: a saver that still finds a chunk there compares it with the listing of packs."""
        if packs:
            self._handle.store.forget([pack.pack_id for pack in packs])
        for pack in packs:
            self._close(pack.pack_id)  # an open file would keep its space
            self._handle.backend.delete(pack_name(pack.pack_id))
            del self._debts[pack.pack_id]
            done.append(pack)
            self._advance(pack.pack_bytes)

    def _open(self, pack: PackFile) -> tuple[RangeReader, list[Row]]:
        """A pack with its rows in the order of the ledger; the last few stay open."""
        found = self._opened.pop(pack.pack_id, None)
        if found is None:
            reader = self._handle.backend.open_reader(pack_name(pack.pack_id))
            found = reader, read_rows(reader, pack.pack_id, self._handle.hasher)[0]
        self._opened[pack.pack_id] = found
        if len(self._opened) > _OPEN_PACKS_MAX:
            self._close(next(iter(self._opened)))
        return found

    def _close(self, pack_id: PackId) -> None:
        if pack_id in self._opened:
            self._opened.pop(pack_id)[0].close()
