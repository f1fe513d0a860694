"""Which snapshots a policy keeps and which it drops: pure planning. forget.py reads history and carries the plan out.

Rules are united: a snapshot stays when any rule of any line keeps it. A line is the history of one branch, newest
first, across the gaps that earlier forgetting left; what only a tag reaches is a line of its own. A branch's head and
every tagged snapshot stay whatever the rules say. Hours, days and weeks are those of UTC; weeks begin on Monday.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from typing import Any, Literal

from castore.errors import FormatError, UsageError
from castore.ids import SnapshotId

Duration = str | float | timedelta
"""Text such as "7d" or "1d12h" (units w, d, h, m, s), seconds, or a timedelta."""
Best = tuple[str, Literal["min", "max"], int]
"""(metric, which end is best, how many)."""

_UNITS_S = {"w": 7 * 86400, "d": 86400, "h": 3600, "m": 60, "s": 1}
_DURATION = re.compile(r"(?:[0-9]+(?:\.[0-9]+)?[wdhms])+\Z")
_PIECE = re.compile(r"([0-9]+(?:\.[0-9]+)?)([wdhms])")
_HOUR_NS = 3600 * 10**9
_DAY_NS = 24 * _HOUR_NS
_EPOCH_WEEKDAY = 3
"""1 January 1970 was a Thursday, three days into its week."""


@dataclass(frozen=True, slots=True)
class Keep:
    """What to keep; at least one rule. A snapshot that any rule keeps stays.

    keep = castore.Keep(last=3, every=1000, within="7d", daily=7, best=("val_loss", "min", 2))

    Raises UsageError for a policy without a rule, and for a rule that can mean nothing.
    """

    last: int = 0
    """The newest so many of each branch."""
    every: int = 0
    """Every snapshot whose step is a multiple of it."""
    within: Duration | None = None
    """Those at most so much older than the newest of their branch: a run that pauses loses nothing."""
    hourly: int = 0
    """The newest snapshot of each of the latest so many hours that have one."""
    daily: int = 0
    weekly: int = 0
    best: Best | tuple[Best, ...] = ()
    """So many with the smallest or largest value of a metric, of each branch; of equal ones the newer. Snapshots
    without the metric, or whose value is NaN, are not among them."""
    branches: Sequence[str] = ()
    """Everything on the branches whose names match a pattern: "release/*"."""

    def __post_init__(self) -> None:
        best = self.best if not self.best or isinstance(self.best[0], tuple) else (self.best,)
        object.__setattr__(self, "best", tuple(tuple(rule) for rule in best))
        if isinstance(self.branches, str) or not all(isinstance(pattern, str) for pattern in self.branches):
            raise UsageError(f"keep branches: expected a sequence of patterns, found {self.branches!r}")
        object.__setattr__(self, "branches", tuple(self.branches))
        if self.within is not None:
            object.__setattr__(self, "within", duration_text(self.within))
        for name in ("last", "every", "hourly", "daily", "weekly"):
            count = getattr(self, name)
            if not isinstance(count, int) or isinstance(count, bool) or count < 0:
                raise UsageError(f"keep {name}: expected a count of 0 or more, found {count!r}")
        for rule in self.bests:
            _check_best(rule)
        if not self.to_json():
            raise UsageError("the policy keeps nothing but heads and tags; give at least one rule, such as last=3")

    @property
    def bests(self) -> tuple[Best, ...]:
        """The rules of `best`, be they one or several."""
        return self.best  # type: ignore[return-value]  # one rule was made a tuple of one in __post_init__

    def to_json(self) -> dict[str, Any]:
        """The rules that say something, as JSON."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["best"] = [list(rule) for rule in self.bests]
        values["branches"] = list(self.branches)
        return {name: value for name, value in values.items() if value}

    def text(self) -> str:
        """As in "last 3, every 1000, best val_loss:min:2"."""
        pieces: list[str] = []
        for name, value in self.to_json().items():
            if name == "best":
                pieces.extend(f"best {':'.join(map(str, rule))}" for rule in value)
            elif name == "branches":
                pieces.extend(f"branch {pattern}" for pattern in value)
            else:
                pieces.append(f"{name} {value}")
        return ", ".join(pieces)

    @staticmethod
    def from_json(values: Mapping[str, Any], *, where: str) -> Keep:
        """The policy behind `to_json`. Raises FormatError."""
        try:
            best = tuple((str(metric), end, count) for metric, end, count in values.get("best", ()))
            return Keep(**{**values, "best": best, "branches": tuple(values.get("branches", ()))})
        except (TypeError, ValueError) as error:  # a UsageError is a ValueError
            raise FormatError(f"{where}: {error}; set the policy again") from error


def _check_best(rule: object) -> None:
    match rule:
        case (str(), "min" | "max", int(count)) if count > 0 and not isinstance(count, bool):
            return
    raise UsageError(f'keep best: expected (metric, "min" or "max", how many), found {rule!r}')


def duration_ns(duration: Duration) -> int:
    """A duration in nanoseconds. Raises UsageError for what is none."""
    if isinstance(duration, timedelta):
        seconds = duration.total_seconds()
    elif isinstance(duration, str):
        if not _DURATION.match(duration):
            raise UsageError(f"expected a duration such as 7d, 12h or 1d12h (units w, d, h, m, s), found {duration!r}")
        seconds = sum(float(count) * _UNITS_S[unit] for count, unit in _PIECE.findall(duration))
    else:
        seconds = duration
    if isinstance(seconds, bool) or not 0 < seconds < math.inf:
        raise UsageError(f"expected a duration above 0, found {duration!r}")
    return round(seconds * 10**9)


def duration_text(duration: Duration) -> str:
    """A duration as its text, so that a policy reads as it was given."""
    duration_ns(duration)
    if isinstance(duration, timedelta):
        return f"{duration.total_seconds():g}s"
    return duration if isinstance(duration, str) else f"{duration:g}s"


# ---- the plan --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Candidate:
    """What the rules look at of one snapshot."""

    snapshot_id: SnapshotId
    step: int | None
    time_ns: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Line:
    """The snapshots of one branch or of what only a tag reaches, newest first."""

    name: str
    snapshots: tuple[Candidate, ...]
    is_branch: bool = True


@dataclass(frozen=True, slots=True)
class Choice:
    """What becomes of one snapshot, and why."""

    snapshot_id: SnapshotId
    lines: tuple[str, ...]
    """The branches that it is on; or the tag, as "tag v1", when it is on none."""
    step: int | None
    created_at: datetime
    reasons: tuple[str, ...]
    """What keeps it: "last 3", "head of main", "tag best", …; of a dropped one what drops it."""

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "id": self.snapshot_id,
            "lines": list(self.lines),
            "step": self.step,
            "created_at": self.created_at.isoformat(),
            "reasons": list(self.reasons),
        }


@dataclass(frozen=True, slots=True)
class RetentionPlan:
    """Every snapshot of the lines is in one of the two, in the order of the lines."""

    kept: tuple[Choice, ...]
    dropped: tuple[Choice, ...]


def plan_retention(keep: Keep, lines: Sequence[Line], *, tags: Mapping[SnapshotId, Sequence[str]]) -> RetentionPlan:
    """Judge the snapshots of all lines."""
    reasons: dict[SnapshotId, dict[str, None]] = {}
    for line in lines:
        if line.snapshots and line.is_branch:
            reasons.setdefault(line.snapshots[0].snapshot_id, {})[f"head of {line.name}"] = None
        for snapshot_id, reason in _kept_by_rules(keep, line):
            reasons.setdefault(snapshot_id, {})[reason] = None
    for snapshot_id, names in tags.items():
        reasons.setdefault(snapshot_id, {}).update(dict.fromkeys(f"tag {name}" for name in names))
    on: dict[SnapshotId, list[str]] = {}
    for line in lines:
        for found in line.snapshots:
            on.setdefault(found.snapshot_id, []).append(line.name)
    kept: list[Choice] = []
    dropped: list[Choice] = []
    judged: set[SnapshotId] = set()
    for found in (found for line in lines for found in line.snapshots):
        if found.snapshot_id in judged:
            continue
        judged.add(found.snapshot_id)
        why = tuple(reasons.get(found.snapshot_id, ()))
        (kept if why else dropped).append(_choice(found, on[found.snapshot_id], why or ("no rule keeps it",)))
    return RetentionPlan(tuple(kept), tuple(dropped))


def _choice(found: Candidate, lines: Iterable[str], reasons: tuple[str, ...]) -> Choice:
    created_at = datetime.fromtimestamp(found.time_ns / 1e9, UTC)
    return Choice(found.snapshot_id, tuple(lines), found.step, created_at, reasons)


def _kept_by_rules(keep: Keep, line: Line) -> Iterable[tuple[SnapshotId, str]]:
    """(snapshot, reason) for all that the rules keep of one line."""
    found = line.snapshots
    kept: list[tuple[Iterable[Candidate], str]] = [
        (found[: keep.last], f"last {keep.last}"),
        (_multiples(found, keep.every), f"every {keep.every} steps"),
        (_within(found, keep.within), f"within {keep.within}"),
        (_newest_of_each(found, keep.hourly, lambda time_ns: time_ns // _HOUR_NS), f"hourly {keep.hourly}"),
        (_newest_of_each(found, keep.daily, lambda time_ns: time_ns // _DAY_NS), f"daily {keep.daily}"),
        (_newest_of_each(found, keep.weekly, _week), f"weekly {keep.weekly}"),
    ]
    kept.extend((_best(found, rule), f"best {rule[2]} by {rule[1]} {rule[0]}") for rule in keep.bests)
    if line.is_branch and any(fnmatchcase(line.name, pattern) for pattern in keep.branches):
        kept.append((found, f"branch {line.name}"))
    return [(candidate.snapshot_id, reason) for candidates, reason in kept for candidate in candidates]


def _multiples(found: Sequence[Candidate], every: int) -> list[Candidate]:
    return [one for one in found if every and one.step is not None and one.step % every == 0]


def _within(found: Sequence[Candidate], within: Duration | None) -> list[Candidate]:
    if within is None or not found:
        return []
    oldest_ns = max(one.time_ns for one in found) - duration_ns(within)
    return [one for one in found if one.time_ns >= oldest_ns]


def _newest_of_each(found: Sequence[Candidate], count: int, period_of: Callable[[int], Hashable]) -> list[Candidate]:
    """The newest snapshot of each of the latest `count` periods that have one."""
    newest: dict[Hashable, Candidate] = {}
    for one in sorted(
        found, key=lambda one: one.time_ns, reverse=True
    ):  # stable: of equal times the nearer to the head
        newest.setdefault(period_of(one.time_ns), one)
    return list(newest.values())[:count]


def _week(time_ns: int) -> int:
    return (time_ns // _DAY_NS + _EPOCH_WEEKDAY) // 7


def _best(found: Sequence[Candidate], rule: Best) -> list[Candidate]:
    metric, end, count = rule
    measured = [one for one in found if not math.isnan(one.metrics.get(metric, math.nan))]
    sign = 1 if end == "min" else -1
    # Stable, and the line is newest first: of equal values the newer comes first.
    return sorted(measured, key=lambda one: sign * one.metrics[metric])[:count]
