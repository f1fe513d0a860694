"""Leases and the condemned set: how writers and the collector stay out of each other's way.

Everything that adds a root (save, branch, tag) holds a writer lease from before its first look-up until it has
reported. The lease is a claim of the backend: on one host the operating system holds it, so it ends with the process,
however that ends, and never before. Condemned packs are never deduplicated into; condemnation is irrevocable.

Lease file (textfile.py):       {"boot": str, "host": str, "pid": int, "purpose": str, "started_ns": int}
Condemned file (textfile.py):   {"condemned_ns": int, "packs": [pack id, …]}
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from castore.backend.base import Backend
from castore.errors import CastoreError, DamageError, FormatError, NotFoundError
from castore.format.layout import GC, LEASES, new_lease_name
from castore.format.textfile import decode_text_file, encode_text_file, text_field
from castore.ids import PackId
from castore.options import TEXT_FILE_BYTES_MAX


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


@contextmanager
def writer_lease(backend: Backend, *, purpose: str, now_ns: int) -> Iterator[None]:
    """Hold a writer lease for the block. Raises LeaseError or StorageError when it cannot be taken."""
    fields = {
        "purpose": purpose,
        "host": socket.gethostname(),
        "boot": _boot_id(),
        "pid": os.getpid(),
        "started_ns": now_ns,
    }
    claim = backend.claim(new_lease_name(), encode_text_file(fields))
    try:
        yield
    finally:
        # An error here is none of the caller's: the lock is let go whether or not the file could be removed, so that
        # it looks like that of a dead process, which gc removes.
        with suppress(CastoreError):
            claim.release()


def list_leases(backend: Backend) -> list[LeaseInfo]:
    """Every lease; one whose text is damaged is listed by what the operating system knows of it."""
    leases = []
    for claim in backend.claims(LEASES):
        try:
            fields = decode_text_file(claim.data, name=claim.name)
            kinds = {"purpose": str, "host": str, "pid": int, "started_ns": int}
            values = [text_field(fields, key, kind, name=claim.name) for key, kind in kinds.items()]
            info = LeaseInfo(claim.name, claim.held, *values)
        except DamageError:
            info = LeaseInfo(claim.name, claim.held, "unknown", "unknown", 0, 0)
        leases.append(info)
    return leases


def condemned_packs(backend: Backend) -> frozenset[PackId]:
    """Packs that a collector has condemned: nobody may deduplicate into them or rely on them.

    Raises DamageError when a condemned file cannot be read: to guess would be to lose data.
    """
    packs: set[PackId] = set()
    for info in backend.list(GC):
        if not info.name.endswith(".condemned"):
            continue
        try:
            fields = decode_text_file(backend.read(info.name, max_bytes=TEXT_FILE_BYTES_MAX), name=info.name)
        except NotFoundError:
            continue  # the collection ended meanwhile: its packs are gone, which the pack listing shows
        names = text_field(fields, "packs", list, name=info.name)
        if not all(isinstance(name, str) for name in names):
            raise FormatError(f"{info.name}: expected pack ids, found {names!r:.80}")
        packs.update(PackId(name) for name in names)
    return frozenset(packs)


@cache
def _boot_id() -> str:
    """Tells a process of before a restart from one of now; empty where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
