"""What the dead leave behind: temporary files, leases, claims, and marks that say nothing any more."""

from __future__ import annotations

from collections.abc import Iterable

from castore.backend.base import Backend
from castore.errors import CastoreError
from castore.format.layout import DRAIN_SUFFIX, GC, LEASES, drain_name, parity_name
from castore.leases import list_leases, read_condemned
from castore.maintenance.gc.report import Pending
from castore.maintenance.gc.writers import Watch
from castore.maintenance.parity import stale_parity
from castore.marks import replace_forgotten
from castore.refs import delete_ref_file
from castore.roots import Roots

_EVER_NS = (1 << 63) - 1


def remove_dead_leases(backend: Backend, watch: Watch) -> int:
    """Remove the leases of writers that are known to be dead; returns their number."""
    dead = [lease for lease in list_leases(backend) if not watch.is_alive(lease)]
    return sum(backend.delete(lease.name) for lease in dead)


def remove_temporaries(backend: Backend, *, claim_name: str, lease_s: float) -> tuple[int, Pending | None]:
    """Remove temporary files that nobody can be writing: older than every lease, and than the lease length, because a
    lease is itself a temporary file for a moment. Returns the bytes, and what is too young.

    Ages are taken from the storage's own clock: that of our claim, which is a file made a moment ago.
    """
    claim = backend.stat(claim_name)
    if claim is None:  # the backend keeps its claims elsewhere: no age can be told
        return 0, None
    leases = [info.modified_ns for info in backend.list(LEASES)]
    before_ns = min([claim.modified_ns - int(lease_s * 1e9), *leases])
    found = list(backend.temporaries(modified_before_ns=_EVER_NS))
    old = [info for info in found if info.modified_ns < before_ns]
    removed_bytes = sum(info.size_bytes for info in old if backend.delete(info.name))
    young = [info for info in found if info.modified_ns >= before_ns]
    if not young:
        return removed_bytes, None
    message = f"{len(young)} temporary files may still be being written"
    until_ns = max(info.modified_ns for info in young) + int(lease_s * 1e9)
    return removed_bytes, Pending("temporary", message, sum(info.size_bytes for info in young), until_ns)


def remove_stale_drains(backend: Backend) -> None:
    """Remove drain files whose condemned file has gone."""
    wanted = {drain_name(condemned.name) for condemned in read_condemned(backend)}
    for info in list(backend.list(GC)):
        if info.name.endswith(DRAIN_SUFFIX) and info.name not in wanted:
            backend.delete(info.name)


def remove_stale_parity(backend: Backend) -> int:
    """Remove parity of packs that have gone; returns its bytes. Not to be called while chunks are missing: the parity
    of a pack that the disk lost may bring it back.
    """
    stale = stale_parity(backend)
    return sum(size for pack_id, size in stale.items() if backend.delete(parity_name(pack_id)))


def remove_stale_marks(backend: Backend, roots: Roots) -> int:
    """Draw rows of tombstones together, then remove the marks that say nothing any more; returns their number.

    In this order, and nothing is removed when somebody changed one meanwhile: history must not end in between.
    """
    contracted = [replace_forgotten(backend, new, expected=old) for old, new in roots.contracted.values()]
    return remove_marks(backend, roots.stale_marks) if all(contracted) else 0


def remove_marks(backend: Backend, names: Iterable[str]) -> int:
    """Remove marks by compare-and-swap, as they are written; returns how many were there."""
    removed = 0
    for name in names:
        try:
            removed += delete_ref_file(backend, name)
        except CastoreError:  # it says nothing any more; the next collection tries again
            continue
    return removed
