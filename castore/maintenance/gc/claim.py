"""The collector's claim, and the space that it needs on a full disk.

Collectors exclude each other: each publishes a claim of its own first and looks for others after, so that of two that
begin at once at least one sees the other. A collector that slept past its claim does no harm all the same: it deletes
only what its own condemned file names, which nobody may use any more, and names are never used again.

On a full disk even a claim and a condemned file of a few hundred bytes cannot be written. So a small file of noise is
kept in the repository, which a collector removes when it meets a full disk, and makes again when there is space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TypeVar

from castore.backend.base import Backend
from castore.errors import CastoreError, LeaseError, NoSpaceError, NotFoundError
from castore.format.layout import COLLECTOR_SUFFIX, GC, RESERVE, new_collector_name
from castore.leases import HeldClaim, LeaseInfo, claim_text, list_claims
from castore.maintenance.gc.writers import Watch

Result = TypeVar("Result")
_PURPOSE = "gc"


@contextmanager
def collector_claim(backend: Backend, watch: Watch, *, now_ns: int) -> Iterator[HeldClaim]:
    """Hold the claim for the block. Raises LeaseError, which names the other collector; or that says, where the block
    does not find a file, that another one took this claim for that of the dead and did the work.
    """
    claim = with_reserve(backend, lambda: backend.claim(new_collector_name(), claim_text(_PURPOSE, now_ns)))
    try:
        for other in _others(backend, claim.name):
            if watch.outlives_waiting(partial(_find, backend, other.name)):
                raise LeaseError(
                    f"another collector is at work on {backend.location}: process {other.pid} on {other.host} "
                    f"({other.name}); wait for it or end it: what it leaves, the next gc completes"
                )
            backend.delete(other.name)
        yield HeldClaim(claim, purpose=_PURPOSE, now_ns=now_ns, lease_s=watch.lease_s, monotonic_s=watch.monotonic_s)
    except NotFoundError as error:
        if _find(backend, claim.name) is not None:
            raise
        raise LeaseError(
            f"{backend.location}: this collector gave no sign of life for so long that another one took it for dead "
            f"and has done its work ({error}); nothing is lost, and there may be nothing left to do: run it again"
        ) from error
    finally:
        with suppress(CastoreError):  # it ends with this process in any case, and the next collector removes the file
            claim.release()


def with_reserve(backend: Backend, write: Callable[[], Result]) -> Result:
    """Write something small; on a full disk, in the space of the reserve. Raises NoSpaceError when that is gone too."""
    try:
        return write()
    except NoSpaceError:
        if not backend.delete(RESERVE):
            raise
    return write()


def _others(backend: Backend, own_name: str) -> list[LeaseInfo]:
    claims = list_claims(backend, GC)
    return [claim for claim in claims if claim.name.endswith(COLLECTOR_SUFFIX) and claim.name != own_name]


def _find(backend: Backend, name: str) -> LeaseInfo | None:
    return next((claim for claim in list_claims(backend, name)), None)
