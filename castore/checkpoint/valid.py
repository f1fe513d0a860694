"""The newest snapshot that loads whole, whatever is damaged: what a run resumes from.

    head ──▶ first parents ──▶ where history breaks off: the other snapshots that were saved to the branch, newest first

A candidate counts when all of it was read and every chunk id recomputed. What is passed over is told loudly: a warning
and a log record each, and in the result.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from castore.checkpoint.load import LoadRequest, Progress, load, prove
from castore.errors import (
    CastoreError,
    DamageError,
    NoValidSnapshotError,
    SkippedSnapshotWarning,
    StorageError,
    ThinnedError,
    UnknownRefError,
    UnsupportedFormatError,
)
from castore.ids import SnapshotId
from castore.marks import forgotten_ids
from castore.refs import ref_text, resolve
from castore.repository import Handle
from castore.snapshots import Snapshot, ancestry, list_snapshot_ids, read_record

log = logging.getLogger("castore")

_PASSED_OVER = (DamageError, StorageError, UnknownRefError, UnsupportedFormatError, ThinnedError)
"""What is wrong with the stored snapshot; everything else is wrong with the call, and raised."""


@dataclass(frozen=True, slots=True)
class ValidState:
    """A state that was loaded, and where it came from."""

    state: Any
    snapshot: Snapshot
    skipped: tuple[tuple[str, str], ...]
    """(snapshot id, or file of the ref, why it could not be loaded) of all that were tried before; empty when the ref's
    own snapshot is whole."""


def load_valid(
    handle: Handle, ref: str | Snapshot, request: LoadRequest, *, into: Any, progress: Progress | None
) -> tuple[Any, SnapshotId, tuple[tuple[str, str], ...]]:
    """Load the newest snapshot that is whole. See `Repository.load_latest_valid`."""
    skipped: list[tuple[str, str]] = []
    for snapshot_id in _candidates(handle, ref, skipped):
        try:
            if into is not None:  # live memory is touched only by what has proved to be whole
                prove(handle, snapshot_id, request.paths)
            state = load(handle, snapshot_id, request, into=into, progress=progress)
        except _PASSED_OVER as error:
            _skip(skipped, snapshot_id, error)
            continue
        for name, why in skipped:
            message = f"{name[:40]} cannot be loaded, an older snapshot was: {why}"
            warnings.warn(message, SkippedSnapshotWarning, stacklevel=3)  # the caller of Repository.load_latest_valid
        return state, snapshot_id, tuple(skipped)
    reasons = "; ".join(f"{name[:12]}: {why}" for name, why in skipped[:3])
    more = f"; and {len(skipped) - 3} more" if len(skipped) > 3 else ""
    raise NoValidSnapshotError(
        f"{ref_text(ref)!r}: no snapshot can be loaded whole ({reasons}{more}); run `castore verify --data` "
        "to see what is left",
        skipped=skipped,
    )


def _candidates(handle: Handle, ref: str | Snapshot, skipped: list[tuple[str, str]]) -> Iterator[SnapshotId]:
    """The snapshots to try, each once. Raises what is wrong with the ref, unless it is damage."""
    text = ref_text(ref)
    seen: set[SnapshotId] = set()
    branches = {text.removeprefix("heads/")}
    try:
        start: SnapshotId | None = resolve(handle.backend, ref)
    except DamageError as error:
        start = None
        _skip(skipped, text, error)
    try:
        for snapshot_id, record in ancestry(handle.backend, start) if start is not None else ():
            seen.add(snapshot_id)
            branches.add(record.branch)
            yield snapshot_id
    except _PASSED_OVER as error:
        _skip(skipped, f"an ancestor of {text}" if seen else text, error)
    for snapshot_id in _saved_to(handle, branches):
        if snapshot_id not in seen:
            seen.add(snapshot_id)
            yield snapshot_id


def _saved_to(handle: Handle, branches: set[str]) -> list[SnapshotId]:
    """Every readable snapshot that was saved to one of the branches, the newest first."""
    found: list[tuple[int, SnapshotId]] = []
    forgotten = forgotten_ids(handle.backend)
    for snapshot_id in list_snapshot_ids(handle.backend):
        if snapshot_id in forgotten:
            continue
        try:
            record = read_record(handle.backend, snapshot_id)
        except CastoreError:
            continue
        if record.branch in branches:
            found.append((record.time_ns, snapshot_id))
    return [snapshot_id for _, snapshot_id in sorted(found, reverse=True)]


def _skip(skipped: list[tuple[str, str]], name: str, error: CastoreError) -> None:
    skipped.append((name, str(error)))
    log.warning("%s cannot be loaded, an older snapshot is tried: %s", name[:40], error)
