"""The drain: wait until every writer that may rely on what was condemned has ended.

Those are the writers whose leases stood when the condemned file had become durable. Whoever came later has read it. A
writer of this host is alive as long as the operating system says so, also when it is stopped. One of another host is
dead when its lease file did not change for the lease length, on our own monotonic clock: nobody's wall clock matters.
Should such a writer only have slept, it finds out by its own check after publishing.

The leases to wait for are written down beside the condemned file, so that the next collection waits for the same ones
and not for those that came since: otherwise savers that follow each other closely would keep it waiting for ever.

Drain file (textfile.py): {"leases": [file name, …]}
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from contextlib import suppress

from castore.backend.base import Backend
from castore.errors import DamageError, NoSpaceError, NotFoundError
from castore.format.layout import drain_name
from castore.format.textfile import decode_text_file, encode_text_file, text_field
from castore.leases import LeaseInfo, list_leases
from castore.options import TEXT_FILE_BYTES_MAX

_PUTTING_BACK_S = 10.0
_POLL_FIRST_S, _POLL_LAST_S, _POLL_GROWTH = 0.01, 1.0, 1.5


class Watch:
    """Tells the living from the dead, and waits. Time comes in as arguments."""

    def __init__(
        self,
        *,
        lease_s: float,
        monotonic_s: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.lease_s = lease_s
        self.monotonic_s = monotonic_s
        self._sleep = sleep
        self._seen: dict[str, tuple[bytes, float]] = {}
        """Lease of another host → its bytes, and since when they have been the same."""

    def is_alive(self, lease: LeaseInfo) -> bool:
        """Whether its holder must be reckoned with."""
        if lease.is_local:
            return lease.held
        now_s = self.monotonic_s()
        data, since_s = self._seen.get(lease.name, (None, now_s))
        if data != lease.data:
            self._seen[lease.name] = lease.data, now_s
            return True
        return now_s - since_s < self.lease_s

    def outlives_waiting(self, look: Callable[[], LeaseInfo | None]) -> bool:
        """Whether a claim is still alive when all has been waited for that can tell: nothing for one of this host, the
        lease length for one of another.
        """
        poll_s, first = _POLL_FIRST_S, b""
        while (claim := look()) is not None and self.is_alive(claim):
            if claim.is_local or (first and claim.data != first):
                return True
            first = claim.data
            self._sleep(poll_s)
            poll_s = min(_POLL_LAST_S, poll_s * _POLL_GROWTH)
        return False

    def wait_for(
        self,
        backend: Backend,
        names: Collection[str],
        *,
        wait_s: float,
        notice: Callable[[list[LeaseInfo]], object] = lambda _: None,
    ) -> list[LeaseInfo]:
        """Wait until none of these leases is alive; returns those that are after `wait_s`. `notice` hears of waits."""
        deadline_s = self.monotonic_s() + wait_s
        poll_s = _POLL_FIRST_S
        while True:
            alive = [lease for lease in list_leases(backend) if lease.name in names and self.is_alive(lease)]
            if not alive or self.monotonic_s() >= deadline_s:
                return alive
            notice(alive)
            self._sleep(poll_s)
            poll_s = min(_POLL_LAST_S, poll_s * _POLL_GROWTH)

    def writers(self, backend: Backend) -> frozenset[str]:
        """The leases of now that may be alive, but for those that say nothing of their holder."""
        leases = [lease for lease in list_leases(backend) if self.is_alive(lease)]
        return frozenset(lease.name for lease in leases if lease.held or lease.boot)

    def outwait(
        self,
        backend: Backend,
        names: Collection[str],
        *,
        at_least_s: float = 0.0,
        notice: Callable[[list[LeaseInfo]], object] = lambda _: None,
    ) -> None:
        """Wait a little for these writers to end.

        For whoever finds something missing: a writer that was taken for dead and woke up publishes first, and puts
        back what was collected meanwhile right after that, before it reports anything. `at_least_s` is for one whose
        lease has been removed.
        """
        begun_s = self.monotonic_s()
        self.wait_for(backend, names, wait_s=min(self.lease_s, _PUTTING_BACK_S), notice=notice)
        left_s = at_least_s - (self.monotonic_s() - begun_s)
        if left_s > 0:
            self._sleep(left_s)


def older_leases(backend: Backend, condemned_name: str) -> frozenset[str]:
    """The leases that a condemned file must wait for; written down when that has not been done. Call it only when the
    condemned file is durable.
    """
    name = drain_name(condemned_name)
    with suppress(NotFoundError, DamageError):
        fields = decode_text_file(backend.read(name, max_bytes=TEXT_FILE_BYTES_MAX), name=name)
        return frozenset(map(str, text_field(fields, "leases", list, name=name)))
    names = frozenset(lease.name for lease in list_leases(backend))
    with suppress(NoSpaceError):  # the next collection then waits for those that it finds itself
        backend.put_if_absent(name, encode_text_file({"leases": sorted(names)}))
    return names
