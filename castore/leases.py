"""Leases and the condemned set: how writers and the collector stay out of each other's way.

Everything that adds a root (save, branch, tag) holds a writer lease from before its first look-up until it has
reported. The lease is a claim of the backend: on one host the operating system holds it, so it ends with the process,
however that ends, and never before.

Condemnation is irrevocable: nobody deduplicates into a condemned pack or takes differences from it, and nobody makes a
condemned snapshot a root again. A condemned file goes when everything that it names has gone, but for the snapshots
and packs that turned out to be needed.

Lease file (textfile.py):       {"boot": str, "host": str, "pid": int, "purpose": str, "started_ns": int}; while the
                                holder works also "beat": int, which counts up
Condemned file (textfile.py):   {"condemned_ns": int, "packs": [pack id, …], "snapshots": [snapshot id, …]}
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from castore.backend.base import Backend, Claim
from castore.errors import CastoreError, DamageError, FormatError, NotFoundError, SnapshotGoneError
from castore.format.layout import GC, LEASES, is_condemned_name, new_condemned_name, new_lease_name
from castore.format.textfile import decode_text_file, encode_text_file, text_field
from castore.ids import PackId, RandomBytes, SnapshotId
from castore.options import TEXT_FILE_BYTES_MAX, RepositoryOptions

LEASE_S = RepositoryOptions().lease_s
BEATS_PER_LEASE = 4
"""Signs of life in a lease length: three may be late before anybody takes the holder for dead."""


@dataclass(frozen=True, slots=True)
class LeaseInfo:
    """One lease file, as an observer sees it."""

    name: str
    held: bool
    """Whether a process of this host holds it now, be it stopped or running."""
    purpose: str
    host: str
    pid: int
    started_ns: int
    boot: str = ""
    """Of the holder: with our own, the operating system answers for `held`."""
    data: bytes = b""
    """The whole file: while it changes, a holder on another host is alive."""

    @property
    def may_be_alive(self) -> bool:
        """Whether it is held, or of another host, where only waiting can tell."""
        return self.held or not self.is_local

    @property
    def is_local(self) -> bool:
        """Whether the holder runs, or ran, under this very kernel, so that `held` is the truth."""
        return self.held or (self.boot == boot_id() and bool(self.boot))


@dataclass(frozen=True, slots=True)
class Condemned:
    """One condemned file."""

    name: str
    packs: frozenset[PackId]
    snapshots: frozenset[SnapshotId]
    condemned_ns: int


class HeldClaim:
    """A lease or claim that is held, and its sign of life for other hosts, whose kernels know nothing of our locks."""

    def __init__(
        self, claim: Claim, *, purpose: str, now_ns: int, lease_s: float, monotonic_s: Callable[[], float]
    ) -> None:
        self._claim = claim
        self._purpose = purpose
        self._now_ns = now_ns
        self._every_s = lease_s / BEATS_PER_LEASE
        self._monotonic_s = monotonic_s
        self._last_s = monotonic_s()
        self._count = 0

    @property
    def name(self) -> str:
        """Its file."""
        return self._claim.name

    def beat(self) -> None:
        """Say that we live, when it is time to. Cheap: call it at every step of long work. From any thread."""
        now_s = self._monotonic_s()
        if now_s - self._last_s < self._every_s:
            return
        self._last_s = now_s
        self._count += 1
        # Taken for dead, a writer heals itself by its check after publishing, and a collector deletes only what it has
        # condemned itself: no reason to fail here.
        with suppress(CastoreError):
            self._claim.renew(claim_text(self._purpose, self._now_ns, beat=self._count))


@contextmanager
def writer_lease(
    backend: Backend,
    *,
    purpose: str,
    now_ns: int,
    lease_s: float = LEASE_S,
    monotonic_s: Callable[[], float] = time.monotonic,
) -> Iterator[HeldClaim]:
    """Hold a writer lease for the block. Raises LeaseError or StorageError when it cannot be taken."""
    claim = backend.claim(new_lease_name(), claim_text(purpose, now_ns))
    try:
        yield HeldClaim(claim, purpose=purpose, now_ns=now_ns, lease_s=lease_s, monotonic_s=monotonic_s)
    finally:
        # An error here is none of the caller's: the lock is let go whether or not the file could be removed, so that
        # it looks like that of a dead process, which gc removes.
        with suppress(CastoreError):
            claim.release()


def claim_text(purpose: str, now_ns: int, *, beat: int = 0) -> bytes:
    """What a claim of this process says; `beat` counts its signs of life."""
    fields = {
        "purpose": purpose,
        "host": socket.gethostname(),
        "boot": boot_id(),
        "pid": os.getpid(),
        "started_ns": now_ns,
    }
    return encode_text_file(fields | ({"beat": beat} if beat else {}))


def list_leases(backend: Backend) -> list[LeaseInfo]:
    """Every lease; one whose text is damaged is listed by what the operating system knows of it."""
    return list_claims(backend, LEASES)


def list_claims(backend: Backend, prefix: str) -> list[LeaseInfo]:
    """The same for claims of any kind."""
    leases = []
    for claim in backend.claims(prefix):
        try:
            fields = decode_text_file(claim.data, name=claim.name)
            kinds = {"purpose": str, "host": str, "pid": int, "started_ns": int, "boot": str}
            values = {key: text_field(fields, key, kind, name=claim.name) for key, kind in kinds.items()}
        except DamageError:
            values = {"purpose": "unknown", "host": "unknown", "pid": 0, "started_ns": 0}
        info = LeaseInfo(name=claim.name, held=claim.held, data=claim.data, **values)
        leases.append(info)
    return leases


# ---- the condemned set ---------------------------------------------------------------------------------------------


def condemn(
    backend: Backend,
    *,
    packs: Collection[PackId],
    snapshots: Collection[SnapshotId],
    now_ns: int,
    random_bytes: RandomBytes = os.urandom,
) -> Condemned:
    """Condemn packs and snapshots, durably and for good. Raises NoSpaceError or StorageError: nothing is condemned."""
    name = new_condemned_name(random_bytes)
    fields = {"condemned_ns": now_ns, "packs": sorted(packs), "snapshots": sorted(snapshots)}
    if not backend.put_if_absent(name, encode_text_file(fields)):
        raise FormatError(f"{name} is there already; its name repeats, so this machine's randomness is broken")
    return Condemned(name, frozenset(packs), frozenset(snapshots), now_ns)


def read_condemned(backend: Backend) -> list[Condemned]:
    """Every condemned file. Raises DamageError when one cannot be read: to guess would be to lose data."""
    found = (_read_condemned(backend, info.name) for info in backend.list(GC) if is_condemned_name(info.name))
    return [condemned for condemned in found if condemned is not None]


def condemned_packs(backend: Backend) -> frozenset[PackId]:
    """Packs that a collector has condemned: nobody may deduplicate into them or rely on them. Raises DamageError."""
    return frozenset[PackId]().union(*(condemned.packs for condemned in read_condemned(backend)))


def condemned_snapshots(backend: Backend) -> frozenset[SnapshotId]:
    """Snapshots that a collector is about to remove, unless it finds that they are needed. Raises DamageError."""
    return frozenset[SnapshotId]().union(*(condemned.snapshots for condemned in read_condemned(backend)))


def is_condemned(backend: Backend, snapshot_id: SnapshotId) -> bool:
    """Whether a collector is about to remove the snapshot. Raises DamageError."""
    return snapshot_id in condemned_snapshots(backend)


def check_not_condemned(backend: Backend, snapshot_id: SnapshotId) -> None:
    """Raise SnapshotGoneError when a collector is about to remove the snapshot: it must not become a root again.

    Whoever makes it one looks before, so that a crash leaves no ref to what is going, and again after, for a collector
    that condemned it in between.
    """
    if is_condemned(backend, snapshot_id):
        raise SnapshotGoneError(
            f"snapshot {snapshot_id[:12]} is being collected: no branch or tag reached it, or it was forgotten; it "
            "cannot be brought back any more"
        )


def _read_condemned(backend: Backend, name: str) -> Condemned | None:
    try:
        fields = decode_text_file(backend.read(name, max_bytes=TEXT_FILE_BYTES_MAX), name=name)
    except NotFoundError:
        return None  # the collection ended meanwhile: its packs are gone, which the pack listing shows
    packs = text_field(fields, "packs", list, name=name)
    snapshots = text_field({"snapshots": [], **fields}, "snapshots", list, name=name)
    if not all(isinstance(found, str) for found in (*packs, *snapshots)):
        raise FormatError(f"{name}: expected pack and snapshot ids, found {packs!r:.80}, {snapshots!r:.80}")
    condemned_ns = text_field(fields, "condemned_ns", int, name=name)
    return Condemned(name, frozenset(map(PackId, packs)), frozenset(map(SnapshotId, snapshots)), condemned_ns)


@cache
def boot_id() -> str:
    """Tells a process of before a restart from one of now; empty where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
