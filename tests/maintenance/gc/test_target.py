"""A size is reached by giving up what the stored policy does not keep, the oldest first, and no more than it takes."""

from __future__ import annotations

import pytest

import castore
from castore.errors import UsageError
from castore.ids import SnapshotId
from castore.maintenance.gc.target import plan_target
from castore.store import pack_sizes
from tests.maintenance.gc.histories import check_whole, fresh, line


def names(count: int) -> list[tuple[SnapshotId, int]]:
    return [(SnapshotId(f"{number}"), 100) for number in range(count)]


@pytest.mark.parametrize(
    ("target", "dropped", "excess"), [(1000, 0, 0), (350, 0, 0), (349, 1, 0), (150, 2, 0), (49, 3, 1), (0, 3, 50)]
)
def test_the_plan_drops_the_oldest_as_few_as_needed(target: int, dropped: int, excess: int) -> None:
    plan = plan_target(names(3), fixed_bytes=50, target_bytes=target)
    assert plan.dropped == tuple(snapshot_id for snapshot_id, _ in names(dropped))
    assert (plan.expected_bytes, plan.excess_bytes) == (350 - 100 * dropped, excess)


def test_a_size_is_reached_by_the_oldest_that_the_policy_lets_go() -> None:
    repo, ids = line(8)
    repo.set_policy(castore.Keep(last=3))
    total = sum(pack_sizes(repo.handle.backend).values())
    planned = repo.gc(True, target_bytes=total * 4 // 5)
    assert set(planned.snapshots) == set(ids[:2])
    assert sum(pack_sizes(repo.handle.backend).values()) == total
    report = repo.gc(target_bytes=total * 4 // 5)
    assert set(report.snapshots) == set(ids[:2])
    assert total // 2 < report.total_bytes <= total * 4 // 5
    assert report.pending == ()
    check_whole(repo, {snapshot_id: fresh(step) for step, snapshot_id in enumerate(ids) if step >= 2})


def test_a_size_that_is_there_already_costs_no_snapshot() -> None:
    repo, ids = line(3)
    repo.set_policy(castore.Keep(last=1))
    report = repo.gc(target_bytes=10**9)
    assert report.snapshots == {}
    check_whole(repo, {snapshot_id: fresh(step) for step, snapshot_id in enumerate(ids)})


def test_what_is_impossible_is_told_after_everything_possible_was_done() -> None:
    repo, ids = line(4)
    repo.set_policy(castore.Keep(last=2))
    report = repo.gc(target_bytes=5)
    assert set(report.snapshots) == set(ids[:2])
    (pending,) = report.pending
    assert pending.kind == "target"
    assert pending.bytes == report.total_bytes - 5
    assert "policy" in pending.message
    check_whole(repo, {ids[2]: fresh(2), ids[3]: fresh(3)})


def test_without_a_policy_nothing_is_given_up() -> None:
    repo, ids = line(2)
    report = repo.gc(target_bytes=5)
    assert report.snapshots == {}
    assert "no policy" in report.pending[0].message
    check_whole(repo, {ids[0]: fresh(0), ids[1]: fresh(1)})
    with pytest.raises(UsageError):
        repo.gc(target_bytes=-1)


def test_thinning_by_the_policy_alone_may_reach_a_size() -> None:
    """It was only tried when snapshots could be forgotten too."""
    repo, _ = line(4, lambda step: {"keep": fresh(step)["noise"], "drop": fresh(step + 50)["noise"]})
    repo.set_policy(thin=["drop"], older_than=1)
    total = sum(pack_sizes(repo.handle.backend).values())
    report = repo.gc(target_bytes=total * 3 // 4)
    assert report.total_bytes <= total * 3 // 4
    assert report.pending == ()
    assert len(list(repo.log("main"))) == 4


@pytest.mark.parametrize("wrong", [{"target_bytes": -1}, {"repack_below": 2.0}, {"target_bytes": 5, "wait_s": -1.0}])
@pytest.mark.parametrize("auto", [False, True])
def test_a_request_that_is_refused_has_forgotten_nothing(wrong: dict[str, float], auto: bool) -> None:
    repo, ids = line(4)
    repo.set_policy(castore.Keep(last=1))
    with pytest.raises(UsageError):
        repo.gc(auto=auto, **wrong)
    assert [snapshot.id for snapshot in repo.log("main")] == ids[::-1]


def test_an_automatic_collection_comes_down_to_a_size_although_it_has_looked_today() -> None:
    repo, _ = line(6)
    repo.gc(auto=True)
    assert repo.gc(auto=True) is None
    repo.set_policy(castore.Keep(last=6))
    total = sum(pack_sizes(repo.handle.backend).values())
    assert repo.gc(auto=True, target_bytes=total) is None
    report = repo.gc(auto=True, target_bytes=total // 2)
    assert report is not None
    assert report.pending[-1].kind == "target"


def test_an_automatic_collection_that_was_cut_short_goes_on_at_once() -> None:
    repo, ids = line(6, lambda step: {"a": fresh(step)["noise"], "b": fresh(step + 50)["noise"]})
    repo.thin(["b"], ids=ids[:4])
    report = repo.gc(auto=True, repack_below=1, repack_bytes_max=12_000)
    assert report is not None
    assert report.is_cut_short
    again = repo.gc(auto=True, repack_below=1, repack_bytes_max=10**9)
    assert again is not None
    assert again.freed_bytes > 0
