"""The look of a collection: which snapshots are live, which records they need, and in which packs those lie."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from castore.errors import DamageError
from castore.format.layout import snapshot_name
from castore.format.snapshot import SnapshotRecord
from castore.ids import PackId, SnapshotId
from castore.leases import condemned_packs, list_leases
from castore.maintenance.gc.ledger import Ledger, PackFile
from castore.maintenance.gc.mark import Marker
from castore.maintenance.gc.packs import add_packs, list_new_packs
from castore.maintenance.gc.plan import PackState
from castore.maintenance.gc.writers import Watch
from castore.marks import forgotten_ids
from castore.repository import Handle
from castore.roots import Roots, live_roots
from castore.snapshots import read_record

_WAKING_S = 1.0
"""For a writer whose lease is gone, from the move of its branch to its own check."""

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, how much of it is done, how much it is in all)."""


class Survey:
    """What is there and what is needed. Belongs to one thread."""

    def __init__(self, handle: Handle, watch: Watch, *, progress: Progress, last: Sequence[SnapshotId] = ()) -> None:
        """Look; snapshots in `last` are marked after all others, in that order. Raises DamageError when it cannot be
        known what is needed, StorageError or RepositoryAccessError.
        """
        self.ledger = Ledger(handle.hasher.digest_bytes)
        self.notes: list[str] = []
        self._handle = handle
        self._watch = watch
        self._progress = progress
        self._last = last
        self._marker = Marker(handle, self.ledger)
        # In this order: a pack of a save that ended in between is then seen with its snapshot, and one of a save that
        # is under way with its lease.
        packs = list_new_packs(handle, self.ledger)
        leases = list_leases(handle.backend)
        self._busy_since_ns = min((lease.started_ns for lease in leases if lease.may_be_alive), default=None)
        self._add_packs(packs)
        self.roots, self.dead = self._look_at_roots()
        self._condemned = condemned_packs(handle.backend)
        self.settle(self._condemned)

    def look_again(self) -> None:
        """See all roots again, and after them the packs that came since. What was needed before stays so: it only costs
        that a snapshot forgotten in between goes with the next collection.
        """
        self.roots, self.dead = self._look_at_roots()
        self._add_packs(list_new_packs(self._handle, self.ledger))

    def add_new_packs(self) -> None:
        """Take packs into account that this collection has written."""
        self._add_packs(list_new_packs(self._handle, self.ledger))
        self.settle(self._condemned)

    def settle(self, going: Iterable[PackId]) -> None:
        """Decide which records are relied on when these packs are going."""
        self.ledger.settle(going)

    @property
    def snapshots(self) -> list[SnapshotId]:
        """Those that were marked, in the order in which `Ledger.pinned_by` counts them."""
        return self._marker.snapshots

    def pack_states(self) -> list[PackState]:
        """Every pack that is not condemned yet."""
        live, kept = self.ledger.by_pack().tolist(), self.ledger.kept_by_pack().tolist()
        return [
            PackState(pack.pack_id, pack.pack_bytes, live_bytes, pack.row_count - kept_count, self._untouchable(pack))
            for pack, live_bytes, kept_count in zip(self.ledger.packs, live, kept, strict=True)
            if pack.pack_id not in self._condemned
        ]

    def _untouchable(self, pack: PackFile) -> str:
        if pack.damage:
            return f"its table is damaged ({pack.damage}); run `castore repair`"
        if self._busy_since_ns is not None and pack.created_ns >= self._busy_since_ns:
            return "a save that is under way may have written it"
        return ""

    def _add_packs(self, pack_ids: list[PackId]) -> None:
        def counted() -> Iterable[PackId]:
            for done, pack_id in enumerate(pack_ids):
                self._progress("reading packs", done, len(pack_ids))
                yield pack_id

        add_packs(self._handle, self.ledger, counted())

    def _look_at_roots(self) -> tuple[Roots, Mapping[SnapshotId, str]]:
        """The roots, marked, and the snapshots that may go."""
        roots = self._live_roots()
        if _missing_heads(roots):
            # A writer that was taken for dead moved its branch to a snapshot that was collected, and moves it on.
            self._watch.outwait(
                self._handle.backend,
                self._watch.writers(self._handle.backend),
                at_least_s=_WAKING_S,
                notice=lambda leases: self._progress("waiting for writers", 0, len(leases)),
            )
            roots = self._live_roots()
        _check(roots)
        live, dead = dict(roots.live), dict(roots.dead)
        if roots.missing:
            spared = self._spare_unreached(roots)
            live |= spared
            dead = {found: why for found, why in dead.items() if found not in spared}
        live |= {found: live.pop(found) for found in self._last if found in live}
        done = 0

        def step() -> None:
            nonlocal done
            done += 1
            self._progress("reading manifests", done, len(live))

        self._marker.add(live, roots.thinnings, step=step)
        return roots, dead

    def _live_roots(self) -> Roots:
        backend, options = self._handle.backend, self._handle.config.options
        return live_roots(backend, now_ns=self._handle.clock(), grace_ns=int(options.orphan_grace_s * 1e9))

    def _spare_unreached(self, roots: Roots) -> dict[SnapshotId, SnapshotRecord]:
        """A snapshot is missing in the middle of history: what lies behind it may only look unreached, so nothing goes
        but what was forgotten by name.
        """
        missing = ", ".join(f"{found[:12]} (named by {what})" for found, what in sorted(roots.missing.items())[:3])
        self.notes.append(
            f"history is missing {missing}: snapshots that nothing reaches are kept, they may belong behind it; forget "
            "them by id, or `castore forget` the missing one"
        )
        unreached = roots.dead.keys() - forgotten_ids(self._handle.backend)
        return {found: read_record(self._handle.backend, found) for found in sorted(unreached)}


def _check(roots: Roots) -> None:
    """Fail closed. Raises DamageError."""
    for snapshot_id, why in roots.damaged.items():
        raise DamageError(
            f"{snapshot_name(snapshot_id)} cannot be read, so that nobody knows what it needs, and nothing is freed: "
            f"{why}; restore it from a copy, run `castore repair`, or give it up with "
            f"`castore forget {snapshot_id[:12]}`"
        )
    for snapshot_id, what in _missing_heads(roots).items():
        raise DamageError(
            f"{what} names snapshot {snapshot_id}, which is not there, so nothing is freed: restore it from a "
            "copy, move or delete the ref, or let `castore repair --fix-refs` show where to"
        )


def _missing_heads(roots: Roots) -> dict[SnapshotId, str]:
    return {snapshot_id: what for snapshot_id, what in roots.missing.items() if snapshot_id in roots.heads}
