"""Thin snapshots: keep them and drop leaves by path, such as optimizer state from all but the newest.

    lease → read history → choose by age → look at each manifest → one overlay for each (durable) → read the refs again

Nothing is rewritten: snapshot, id, refs and manifest stay, and undelete takes an overlay away again while the bytes are
there. Branch heads and tagged snapshots stay whole. Age counts snapshots: older than 20 is what lies behind the newest
20 of its branch, forgotten ones not counted. Or it is a duration before the newest of the branch. On several branches,
a snapshot is as old as on the one where it is youngest.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from castore.errors import DamageError, PathNotFoundError, UsageError
from castore.format.manifest import Entry, Kind
from castore.ids import SnapshotId
from castore.leases import writer_lease
from castore.maintenance.lines import read_history
from castore.maintenance.retention import Duration, Line, duration_ns
from castore.marks import Thinning, read_thinning, thin_snapshot, unthin_snapshot
from castore.progress import Meter
from castore.refs import list_branches, list_tags, resolve
from castore.repository import Handle
from castore.snapshots import Snapshot, read_record

Age = int | Duration
"""A count of snapshots, or a duration as text or timedelta."""
Progress = Callable[[int, int], None]
"""Called with (snapshots done, snapshots in all)."""


@dataclass(frozen=True, slots=True)
class ThinChoice:
    """One snapshot that was thinned, or would be."""

    snapshot_id: SnapshotId
    branch: str
    step: int | None
    dropped: tuple[str, ...]
    """All globs of its overlay, those of earlier thinning included."""
    leaf_count: int
    """Leaves that the new globs drop."""
    raw_bytes: int
    """Their bytes; what gc can free of them depends on what shares their chunks."""

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "id": self.snapshot_id,
            "branch": self.branch,
            "step": self.step,
            "dropped": list(self.dropped),
            "leaf_count": self.leaf_count,
            "raw_bytes": self.raw_bytes,
        }


@dataclass(frozen=True, slots=True)
class ThinReport:
    """What was thinned, or would be."""

    thinned: tuple[ThinChoice, ...]
    skipped: tuple[tuple[SnapshotId, str], ...]
    """Snapshots of that age that stay as they are: (id, why)."""
    dry_run: bool

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "dry_run": self.dry_run,
            "thinned": [choice.to_json() for choice in self.thinned],
            "skipped": dict(self.skipped),
        }


def check_globs(globs: Any) -> tuple[str, ...]:
    """Globs of leaf paths, each once. Raises UsageError for none, or for a bare text."""
    if isinstance(globs, str):
        raise UsageError(f"thin: expected a sequence of globs, found the text {globs!r}; write [{globs!r}]")
    if not globs or not all(isinstance(glob, str) and glob for glob in globs):
        raise UsageError(f"thin: expected at least one glob of leaf paths, such as 'optimizer/**', found {globs!r}")
    return tuple(dict.fromkeys(globs))


def check_age(older_than: Age) -> Age:
    """Raises UsageError unless it is a count of at least 1 or a duration."""
    if isinstance(older_than, int) and not isinstance(older_than, bool):
        if older_than < 1:
            raise UsageError(f"thin: expected older_than of 1 snapshot or more, found {older_than}: heads stay whole")
    else:
        duration_ns(older_than)
    return older_than


def thin_old(
    handle: Handle,
    globs: Sequence[str],
    *,
    older_than: Age,
    must_match: bool = True,
    leave_out: Collection[SnapshotId] = (),
    dry_run: bool = False,
    progress: Progress | None = None,
) -> ThinReport:
    """Thin every snapshot of a line that is old enough. See `Repository.thin`.

    `must_match` makes globs that match no leaf of any of them a PathNotFoundError: a typo would go unseen. `leave_out`
    is what a dry run would forget before.
    """
    globs = check_globs(globs)
    check_age(older_than)

    def choose() -> tuple[Sequence[SnapshotId], Mapping[SnapshotId, str]]:
        history = read_history(handle.backend)
        named = {**_texts("tag", history.tags), **_texts("head of", history.heads)}
        lines = [_without(line, leave_out) for line in history.lines]
        old = [found for found in _older(lines, older_than) if found not in named]
        return old, named

    return _thin(handle, globs, choose, must_match=must_match, dry_run=dry_run, progress=progress)


def thin_named(
    handle: Handle, globs: Sequence[str], refs: Sequence[str | Snapshot], *, dry_run: bool = False
) -> ThinReport:
    """Thin the snapshots that refs mean, heads and tagged ones too: they were named. See `Repository.thin`."""
    globs = check_globs(globs)
    if isinstance(refs, str | Snapshot):
        refs = [refs]
    if not refs:
        raise UsageError("ids: expected at least one snapshot to thin")

    def choose() -> tuple[Sequence[SnapshotId], Mapping[SnapshotId, str]]:
        return list(dict.fromkeys(resolve(handle.backend, ref) for ref in refs)), {}

    return _thin(handle, globs, choose, must_match=True, dry_run=dry_run, progress=None)


def _texts(kind: str, named: Mapping[SnapshotId, Sequence[str]]) -> dict[SnapshotId, str]:
    return {snapshot_id: f"{kind} {names[0]}" for snapshot_id, names in named.items()}


def _without(line: Line, leave_out: Collection[SnapshotId]) -> Line:
    return replace(line, snapshots=tuple(found for found in line.snapshots if found.snapshot_id not in leave_out))


def _older(lines: Sequence[Line], older_than: Age) -> list[SnapshotId]:
    """Snapshots that are old enough on every line that they are on, in the order of the lines."""
    old = [_old_of(line, older_than) for line in lines]
    young = {
        found.snapshot_id
        for line, aged in zip(lines, old, strict=True)
        for found in line.snapshots
        if found.snapshot_id not in aged
    }
    return [found for found in dict.fromkeys(found for aged in old for found in aged) if found not in young]


def _old_of(line: Line, older_than: Age) -> dict[SnapshotId, None]:
    found = line.snapshots
    if isinstance(older_than, int):
        return dict.fromkeys(one.snapshot_id for one in found[older_than:])
    before_ns = max((one.time_ns for one in found), default=0) - duration_ns(older_than)
    return dict.fromkeys(one.snapshot_id for one in found if one.time_ns < before_ns)


def _thin(
    handle: Handle,
    globs: tuple[str, ...],
    choose: Callable[[], tuple[Sequence[SnapshotId], Mapping[SnapshotId, str]]],
    *,
    must_match: bool,
    dry_run: bool,
    progress: Progress | None,
) -> ThinReport:
    def planned(beat: Callable[[], None] | None = None) -> tuple[ThinReport, Mapping[SnapshotId, str]]:
        chosen, named = choose()
        meter = Meter(progress, len(chosen), beat=beat)
        return _planned(handle, chosen, globs, must_match=must_match, mend=not named, meter=meter), named

    if dry_run:
        return planned()[0]
    handle.config.check_features("write", where=handle.backend.location)
    now_ns, lease_s = handle.clock(), handle.config.options.lease_s
    with writer_lease(handle.backend, purpose="thin", now_ns=now_ns, lease_s=lease_s) as lease:
        report, named = planned(lease.beat)
        before = {choice.snapshot_id: _overlay(handle, choice.snapshot_id, mend=not named) for choice in report.thinned}
        for choice in report.thinned:
            lease.beat()
            thin_snapshot(handle.backend, Thinning(choice.snapshot_id, choice.dropped, now_ns))
        return _yielded(handle, replace(report, dry_run=False), before, named)


def _planned(
    handle: Handle,
    chosen: Sequence[SnapshotId],
    globs: tuple[str, ...],
    *,
    must_match: bool,
    mend: bool,
    meter: Meter,
) -> ThinReport:
    thinned: list[ThinChoice] = []
    skipped: dict[SnapshotId, str] = {}
    matched = False
    for snapshot_id in chosen:
        overlay = _overlay(handle, snapshot_id, mend=mend)
        earlier = overlay.dropped if overlay is not None else ()
        if set(globs) <= set(earlier):
            matched = True  # it was thinned like this before, because they matched
        else:
            choice, why = _choice(handle, snapshot_id, globs, earlier)
            matched = matched or choice is not None or "left" in why
            if choice is not None:
                thinned.append(choice)
            else:
                skipped[snapshot_id] = why
        meter.advance()
    if must_match and chosen and not matched:
        raise PathNotFoundError(
            f"thin: none of the {len(chosen)} snapshots has a leaf that matches {', '.join(globs)}; `castore show` "
            "lists the paths"
        )
    return ThinReport(tuple(thinned), tuple(skipped.items()), dry_run=True)


def _overlay(handle: Handle, snapshot_id: SnapshotId, *, mend: bool) -> Thinning | None:
    """The overlay so far. A damaged one is only written anew for a snapshot that was named, by globs that say all."""
    try:
        return read_thinning(handle.backend, snapshot_id)
    except DamageError:
        if mend:
            return None
        raise


def _choice(
    handle: Handle, snapshot_id: SnapshotId, globs: tuple[str, ...], earlier: tuple[str, ...]
) -> tuple[ThinChoice | None, str]:
    """What becomes of one snapshot, or why nothing does."""
    record = read_record(handle.backend, snapshot_id)
    before, after = Thinning(snapshot_id, earlier, 0), Thinning(snapshot_id, (*earlier, *_fresh(globs, earlier)), 0)
    leaves = [entry for entry in handle.manifests.entries(record) if _is_leaf(entry)]
    left = [entry for entry in leaves if not before.drops(entry.path)]
    dropped = [entry for entry in left if after.drops(entry.path)]
    if not dropped:
        return None, "none of its leaves matches"
    if len(dropped) == len(left):
        return None, "nothing would be left of it: forget it instead"
    raw_bytes = sum(entry.raw_bytes for entry in dropped)
    choice = ThinChoice(snapshot_id, record.branch, record.step, after.dropped, len(dropped), raw_bytes)
    return choice, ""


def _fresh(globs: tuple[str, ...], earlier: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(glob for glob in globs if glob not in earlier)


def _is_leaf(entry: Entry) -> bool:
    return not entry.is_container and entry.kind is not Kind.STORAGE


def _yielded(
    handle: Handle,
    report: ThinReport,
    before: Mapping[SnapshotId, Thinning | None],
    named: Mapping[SnapshotId, str],
) -> ThinReport:
    """Make whole again what a branch or tag was put on meanwhile."""
    if not named:
        return report  # the snapshots were named themselves
    now = {ref.snapshot_id: f"tag {ref.name}" for ref in list_tags(handle.backend)}
    now |= {ref.snapshot_id: f"head of {ref.name}" for ref in list_branches(handle.backend)}
    won = {choice.snapshot_id: now[choice.snapshot_id] for choice in report.thinned if choice.snapshot_id in now}
    for snapshot_id in won:
        earlier = before[snapshot_id]
        if earlier is None:
            unthin_snapshot(handle.backend, snapshot_id)
        else:
            thin_snapshot(handle.backend, earlier)
    return replace(
        report,
        thinned=tuple(choice for choice in report.thinned if choice.snapshot_id not in won),
        skipped=(*report.skipped, *((snapshot_id, f"{why}, made meanwhile") for snapshot_id, why in won.items())),
    )
