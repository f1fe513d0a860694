"""The plan of retention is pure: rules are united, heads and tags always stay, every snapshot is judged once."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import castore
from castore.errors import FormatError, UsageError
from castore.ids import SnapshotId
from castore.maintenance.retention import Candidate, Keep, Line, RetentionPlan, duration_ns, plan_retention

SECOND, HOUR, DAY = 10**9, 3600 * 10**9, 86400 * 10**9
MONDAY = 4 * DAY
"""5 January 1970."""


def snap(number: int, *, step: int | None = None, time_ns: int | None = None, **metrics: float) -> Candidate:
    return Candidate(SnapshotId(f"{number:032x}"), step, number * SECOND if time_ns is None else time_ns, metrics)


def main(*snapshots: Candidate, name: str = "main") -> Line:
    """A branch, given oldest first."""
    return Line(name, tuple(reversed(snapshots)))


def numbers(plan: RetentionPlan) -> list[int]:
    """Which are kept, oldest first."""
    return sorted(int(choice.snapshot_id, 16) for choice in plan.kept)


def kept(keep: Keep, *lines: Line, tags: dict[int, tuple[str, ...]] | None = None) -> list[int]:
    named = {SnapshotId(f"{number:032x}"): names for number, names in (tags or {}).items()}
    return numbers(plan_retention(keep, lines, tags=named))


TEN = main(*(snap(number, step=number * 100) for number in range(10)))


# ---- rules -----------------------------------------------------------------------------------------------------


def test_keep_last_keeps_the_newest() -> None:
    assert kept(Keep(last=3), TEN) == [7, 8, 9]
    assert kept(Keep(last=99), TEN) == list(range(10))


def test_keep_every_keeps_multiples_and_knows_nothing_of_snapshots_without_a_step() -> None:
    assert kept(Keep(every=300), TEN) == [0, 3, 6, 9]
    assert kept(Keep(every=1), main(snap(1), snap(2, step=5), snap(3))) == [2, 3]


def test_keep_within_counts_back_from_the_newest_of_the_branch() -> None:
    line = main(snap(1, time_ns=0), snap(2, time_ns=DAY), snap(3, time_ns=3 * DAY), snap(4, time_ns=4 * DAY))
    assert kept(Keep(within="1d"), line) == [3, 4]
    assert kept(Keep(within=timedelta(days=3)), line) == [2, 3, 4]
    assert kept(Keep(within=3 * 86400.0), line) == [2, 3, 4]


def test_hours_days_and_weeks_are_those_of_utc_and_keep_their_newest() -> None:
    times = {1: 0, 2: HOUR - 1, 3: HOUR, 4: 5 * HOUR, 5: DAY - 1, 6: DAY, 7: 3 * DAY, 8: MONDAY - 1, 9: MONDAY}
    line = main(*(snap(number, time_ns=time_ns) for number, time_ns in times.items()))
    assert kept(Keep(daily=2), line) == [8, 9]
    assert kept(Keep(daily=9), line) == [5, 6, 8, 9]
    assert kept(Keep(weekly=2), line) == [8, 9]
    assert kept(Keep(hourly=99), line) == [2, 3, 4, 5, 6, 7, 8, 9]
    assert datetime.fromtimestamp(MONDAY / 1e9, UTC).strftime("%A %H:%M") == "Monday 00:00"


def test_days_without_a_snapshot_do_not_count() -> None:
    line = main(snap(1, time_ns=0), snap(2, time_ns=100 * DAY), snap(3, time_ns=100 * DAY + 1))
    assert kept(Keep(daily=2), line) == [1, 3]


def test_keep_best_takes_the_smallest_or_the_largest_and_of_equal_ones_the_newer() -> None:
    line = main(snap(1, loss=3, acc=1), snap(2, loss=1, acc=5), snap(3, loss=1, acc=7), snap(4, loss=2), snap(5))
    assert kept(Keep(best=("loss", "min", 1)), line) == [3, 5]
    assert kept(Keep(best=("loss", "min", 2)), line) == [2, 3, 5]
    assert kept(Keep(best=("loss", "max", 1)), line) == [1, 5]
    assert kept(Keep(best=(("loss", "max", 1), ("acc", "max", 1))), line) == [1, 3, 5]


def test_nan_is_never_best_and_infinity_is_a_number() -> None:
    line = main(snap(1, loss=math.nan), snap(2, loss=math.inf), snap(3, loss=-math.inf), snap(4, loss=5), snap(5))
    assert kept(Keep(best=("loss", "min", 9)), line) == [2, 3, 4, 5]
    assert kept(Keep(best=("loss", "min", 1)), line) == [3, 5]
    assert kept(Keep(best=("loss", "max", 1)), line) == [2, 5]
    assert kept(Keep(best=("typo", "max", 1)), line) == [5]


def test_keep_branches_keeps_all_on_those_that_match() -> None:
    release = main(snap(1), snap(2), name="release/1")
    other = main(snap(1), snap(3), snap(4), name="other")
    assert kept(Keep(branches=("release/*",)), release, other) == [1, 2, 4]


def test_rules_look_at_each_branch_and_any_branch_may_keep_what_they_share() -> None:
    shared = [snap(number) for number in range(5)]
    long = main(*shared, *(snap(number) for number in range(10, 20)))
    short = main(*shared, snap(30), name="short")
    assert kept(Keep(last=3), long, short) == [3, 4, 17, 18, 19, 30]


def test_heads_and_tagged_snapshots_stay_whatever_the_rules_say() -> None:
    assert kept(Keep(every=1_000_000), main(snap(1, step=1), snap(2, step=2), snap(3, step=3)), tags={1: ("v1",)}) == [
        1,
        3,
    ]


def test_what_only_a_tag_reaches_has_no_head_and_is_judged_by_the_rules() -> None:
    line = Line("tag v1", (snap(3), snap(2), snap(1)), is_branch=False)
    assert kept(Keep(last=2), line, tags={3: ("v1",)}) == [2, 3]
    assert kept(Keep(every=7), line, tags={3: ("v1",)}) == [3]


def test_each_snapshot_says_why() -> None:
    line = main(snap(1, step=100, loss=1), snap(2, step=150), snap(3, step=200))
    plan = plan_retention(
        Keep(last=1, every=100, best=("loss", "min", 1)), [line], tags={SnapshotId(f"{1:032x}"): ("a", "b")}
    )
    assert {choice.step: choice.reasons for choice in plan.kept} == {
        200: ("head of main", "last 1", "every 100 steps"),
        100: ("every 100 steps", "best 1 by min loss", "tag a", "tag b"),
    }
    assert [(choice.step, choice.reasons, choice.lines) for choice in plan.dropped] == [
        (150, ("no rule keeps it",), ("main",))
    ]


# ---- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"last": 0},
        {"last": -1},
        {"last": True},
        {"last": 1.5},
        {"every": "10"},
        {"within": "soon"},
        {"within": ""},
        {"within": 0},
        {"within": "-7d"},
        {"within": math.inf},
        {"within": math.nan},
        {"best": ("loss", "min")},
        {"best": ("loss", "lowest", 1)},
        {"best": ("loss", "min", 0)},
        {"best": (("loss", "min", 1), ("acc",))},
        {"branches": "main"},
    ],
)
def test_a_policy_that_is_empty_or_can_mean_nothing_is_refused(rules: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        castore.Keep(**rules)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("7d", 7 * 86400), ("12h", 43200), ("1d12h", 129600), ("90s", 90), ("2w", 14 * 86400), ("1.5m", 90)],
)
def test_durations_read_as_people_write_them(text: str, seconds: int) -> None:
    assert duration_ns(text) == seconds * SECOND


def test_a_policy_survives_the_way_through_json() -> None:
    keep = Keep(last=3, every=10, within=timedelta(days=2), best=("loss", "min", 2), branches=["a*"], weekly=4)
    again = Keep.from_json(keep.to_json(), where="policy")
    assert again == keep
    assert again.within == "172800s"
    for broken in ({}, {"unknown": 1}, {"last": "x"}, {"best": [["a"]]}, {"best": 3}):
        with pytest.raises(FormatError, match="policy"):
            Keep.from_json(broken, where="policy")


# ---- any history -----------------------------------------------------------------------------------------------

RULES = st.fixed_dictionaries(
    {},
    optional={
        "last": st.integers(1, 4),
        "every": st.integers(1, 7),
        "within": st.sampled_from(["1s", "10s", "1d"]),
        "hourly": st.integers(1, 3),
        "daily": st.integers(1, 3),
        "weekly": st.integers(1, 3),
        "best": st.tuples(st.sampled_from(["loss", "acc"]), st.sampled_from(["min", "max"]), st.integers(1, 3)),
        "branches": st.lists(st.sampled_from(["a", "b*", "*"]), min_size=1, max_size=2).map(tuple),
    },
).filter(bool)
METRICS = st.dictionaries(st.sampled_from(["loss", "acc"]), st.floats(allow_nan=True) | st.integers(-9, 9))


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[Line], dict[SnapshotId, tuple[str, ...]]]:
    """Branches that share beginnings, with clocks that may go back, and some tags."""
    pool = [
        Candidate(
            SnapshotId(f"{number:032x}"),
            draw(st.none() | st.integers(-20, 20)),
            draw(st.integers(0, 20 * DAY)),
            draw(METRICS),
        )
        for number in range(draw(st.integers(0, 12)))
    ]
    lines = []
    for name in draw(st.lists(st.sampled_from(["a", "b1", "b2", "c"]), unique=True)):
        chosen = draw(st.lists(st.sampled_from(pool), unique_by=lambda one: one.snapshot_id)) if pool else []
        lines.append(Line(name, tuple(chosen), is_branch=name != "c"))
    tagged = draw(st.lists(st.sampled_from(pool), unique_by=lambda one: one.snapshot_id, max_size=3)) if pool else []
    return lines, {one.snapshot_id: ("t",) for one in tagged}


@given(RULES, histories())
def test_every_snapshot_is_kept_or_dropped_and_heads_and_tags_are_kept(rules, history) -> None:
    lines, tags = history
    plan = plan_retention(Keep(**rules), lines, tags=tags)
    kept_ids = [choice.snapshot_id for choice in plan.kept]
    dropped_ids = [choice.snapshot_id for choice in plan.dropped]
    everything = {found.snapshot_id for line in lines for found in line.snapshots}
    assert set(kept_ids) | set(dropped_ids) == everything
    assert len(kept_ids) + len(dropped_ids) == len(everything), "each once"
    for line in lines:
        if line.is_branch and line.snapshots:
            assert line.snapshots[0].snapshot_id in kept_ids
    assert everything & tags.keys() <= set(kept_ids)
    assert all(choice.reasons for choice in (*plan.kept, *plan.dropped))


@given(RULES, RULES, histories())
def test_rules_together_keep_exactly_what_each_of_them_keeps(first, second, history) -> None:
    lines, tags = history
    both = {**second, **first}
    keeps = [set(kept_by(Keep(**{name: value}), lines, tags)) for name, value in both.items()]
    assert set(kept_by(Keep(**both), lines, tags)) == set().union(*keeps)


@given(RULES, histories())
def test_what_is_kept_once_is_kept_again_by_the_same_rules(rules, history) -> None:
    """Forgetting twice forgets nothing more: but for days and hours, whose newest may change nothing either."""
    lines, tags = history
    keep = Keep(**rules)
    once = set(kept_by(keep, lines, tags))
    left = [
        Line(line.name, tuple(one for one in line.snapshots if one.snapshot_id in once), line.is_branch)
        for line in lines
    ]
    assert set(kept_by(keep, left, tags)) == {one.snapshot_id for line in left for one in line.snapshots}


def kept_by(keep: Keep, lines: list[Line], tags: dict[SnapshotId, tuple[str, ...]]) -> list[SnapshotId]:
    return [choice.snapshot_id for choice in plan_retention(keep, lines, tags=tags).kept]


def test_rules_read_as_they_are_written() -> None:
    keep = Keep(last=3, every=10, best=(("a:b", "min", 1), ("c", "max", 2)), branches=("x*",))
    assert keep.text() == "last 3, every 10, best a:b:min:1, best c:max:2, branch x*"
