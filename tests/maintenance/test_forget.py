"""Forgetting drops snapshots from history and nothing from disk; refs win; a crash harms nobody."""

from __future__ import annotations

import json
from typing import Any

import pytest

import castore
from castore.api import Repository
from castore.backend import MemoryBackend
from castore.errors import DamageError, UnknownRefError, UsageError
from castore.format.layout import forgotten_name, snapshot_name
from castore.ids import SnapshotId
from castore.marks import read_forgotten
from castore.options import RepositoryOptions
from castore.roots import live_roots
from castore.snapshots import read_record
from tests.checkpoint.repositories import HookedBackend, at_call, create_on, held_leases, open_on
from tests.checkpoint.states import training_state
from tests.suites.collector import collect


@pytest.fixture
def repository() -> Repository:
    return create_on(MemoryBackend(), RepositoryOptions(compression="none"))


def line(repository: Repository, count: int, *, branch: str = "main", first: int = 0) -> list[SnapshotId]:
    """Snapshots of a branch, oldest first."""
    return [repository.save({"x": step}, step=step, branch=branch).id for step in range(first, first + count)]


def steps(repository: Repository, ref: str = "main") -> list[int | None]:
    return [snapshot.step for snapshot in repository.log(ref)]


def spoil(repository: Repository, name: str, at: int = -3) -> None:
    backend = repository.handle.backend
    data = bytearray(backend.read(name, max_bytes=1 << 20))
    data[at] ^= 255
    backend.delete(name)
    assert backend.put_if_absent(name, bytes(data))


# ---- by policy -------------------------------------------------------------------------------------------------


def test_history_goes_on_behind_what_was_forgotten_before_and_after_collection(repository: Repository) -> None:
    ids = line(repository, 9)
    repository.tag("best", at=ids[4])
    report = repository.forget(castore.Keep(last=2, every=6))
    assert report.forgotten == (ids[5], ids[3], ids[2], ids[1])
    for _ in range(2):
        assert steps(repository) == [8, 7, 6, 4, 0]
        assert repository.snapshot("main~3").id == ids[4]
        assert repository.snapshot("main~4").id == ids[0]
        assert repository.snapshot("main@0").id == ids[0]
        with pytest.raises(UnknownRefError, match="nearest steps: 4, 6"):
            repository.snapshot("main@5")
        with pytest.raises(UnknownRefError, match="expected 5 snapshots before"):
            repository.snapshot("main~5")
        assert repository.orphans() == []
        assert repository.verify(data=True).ok
        assert {snapshot.id for snapshot in repository.snapshots()} == {ids[0], ids[4], ids[6], ids[7], ids[8]}
        collect(repository)


def test_forgetting_twice_forgets_nothing_more(repository: Repository) -> None:
    line(repository, 6)
    keep = castore.Keep(last=2)
    assert len(repository.forget(keep).forgotten) == 4
    assert repository.forget(keep).forgotten == ()
    line(repository, 1, first=10)
    assert [choice.step for choice in repository.forget(keep).dropped] == [4]
    assert steps(repository) == [10, 5]


def test_a_dry_run_changes_nothing_and_says_the_same(repository: Repository) -> None:
    line(repository, 5)
    before = {info.name for info in repository.handle.backend.list("")}
    plan = repository.forget(castore.Keep(last=2), dry_run=True)
    assert plan.forgotten == ()
    assert {info.name for info in repository.handle.backend.list("")} == before
    done = repository.forget(castore.Keep(last=2))
    assert (plan.kept, plan.dropped) == (done.kept, done.dropped)
    assert [choice.step for choice in done.kept] == [4, 3]
    assert json.loads(json.dumps(plan.to_json()))["dropped"][0]["step"] == 2


def test_each_branch_is_looked_at_and_what_only_a_tag_reaches_too(repository: Repository) -> None:
    line(repository, 3)
    repository.branch("side", at="main")
    side = line(repository, 4, branch="side", first=10)
    repository.tag("end", at="side")
    repository.delete_branch("side")
    report = repository.forget(castore.Keep(last=1))
    assert steps(repository) == [2]
    assert steps(repository, "end") == [13, 2], "the head of main stays, wherever it is reached from"
    lines = {choice.step: choice.lines for choice in (*report.kept, *report.dropped)}
    assert (lines[12], lines[1]) == (("tag end",), ("main",))
    assert side[3] not in report.forgotten


def test_orphans_are_left_to_their_grace_period(repository: Repository) -> None:
    line(repository, 3)
    lost = line(repository, 2, branch="side", first=10)
    repository.delete_branch("side")
    repository.forget(castore.Keep(last=1))
    assert {snapshot.id for snapshot in repository.orphans()} == set(lost)


def test_a_save_may_continue_from_a_forgotten_snapshot(repository: Repository) -> None:
    first = repository.save(training_state(1), step=1)
    repository.save(training_state(2), step=2)
    repository.forget(ids=[first])
    forked = repository.save(training_state(3), branch="fork", parent=first, step=3)
    collect(repository)
    assert forked.parents == (first.id,)
    assert steps(repository, "fork") == [3]
    assert repository.verify(data=True).ok


def test_damage_on_the_way_is_reported_and_nothing_behind_it_is_dropped(repository: Repository) -> None:
    ids = line(repository, 6)
    spoil(repository, snapshot_name(ids[3]))
    report = repository.forget(castore.Keep(last=1))
    assert report.forgotten == (ids[4],)
    assert [snapshot_id for snapshot_id, _ in report.unreadable] == [ids[3]]


def test_neither_or_both_kinds_of_call_are_refused(repository: Repository) -> None:
    line(repository, 2)
    with pytest.raises(UsageError):
        repository.forget()
    with pytest.raises(UsageError):
        repository.forget(castore.Keep(last=1), ids=["main~1"])
    with pytest.raises(UsageError):
        repository.forget(ids=[])


def test_the_lease_is_held_while_markers_are_written_and_given_back(repository: Repository) -> None:
    line(repository, 3)
    held: list[int] = []
    hooked = HookedBackend(repository.handle.backend)
    hooked.hook = lambda operation, name: held.append(len(held_leases(hooked.inner))) if "forgotten/" in name else None
    open_on(hooked).forget(castore.Keep(last=1))
    assert held
    assert set(held[1:]) == {1}, "the first look at the marks is part of the plan under the lease, too"
    assert held_leases(hooked.inner) == []


# ---- by name ---------------------------------------------------------------------------------------------------


def test_snapshots_are_forgotten_by_any_ref(repository: Repository) -> None:
    ids = line(repository, 5)
    report = repository.forget(ids=["main~1", "main@1", ids[2][:8]])
    assert set(report.forgotten) == {ids[3], ids[1], ids[2]}
    assert steps(repository) == [4, 0]
    again = repository.forget(ids=[ids[1], ids[0]])
    assert again.forgotten == (ids[0],), "what is forgotten already is not told again"


def test_heads_and_tagged_snapshots_are_refused_by_name_and_nothing_is_forgotten(repository: Repository) -> None:
    ids = line(repository, 4)
    repository.tag("v1", at=ids[1])
    for protected in ("main", "v1"):
        with pytest.raises(UsageError, match="move or delete that first"):
            repository.forget(ids=[ids[0], protected])
    assert steps(repository) == [3, 2, 1, 0]


def test_an_orphan_can_be_forgotten(repository: Repository) -> None:
    line(repository, 1)
    (lost,) = line(repository, 1, branch="side", first=7)
    repository.delete_branch("side")
    repository.forget(ids=lost)
    assert repository.orphans() == []
    collect(repository)
    with pytest.raises(UnknownRefError):
        repository.snapshot(lost)


def test_what_nobody_knows_is_no_snapshot(repository: Repository) -> None:
    line(repository, 1)
    for unknown in ("typo", "ab" * 16):
        with pytest.raises(UnknownRefError):
            repository.forget(ids=[unknown])


# ---- what cannot be read ---------------------------------------------------------------------------------------


def test_a_damaged_snapshot_is_forgotten_with_the_parents_that_its_file_still_spells(repository: Repository) -> None:
    ids = line(repository, 4)
    spoil(repository, snapshot_name(ids[2]))
    repository.forget(ids=[ids[2]])
    mark = read_forgotten(repository.handle.backend, ids[2])
    assert mark is not None
    assert mark.parents == (ids[1],)
    assert "still spells" in mark.reason
    assert steps(repository) == [3, 1, 0]
    assert live_roots(repository.handle.backend, now_ns=1, grace_ns=1).damaged == {}
    assert repository.verify().ok
    collect(repository)
    assert steps(repository) == [3, 1, 0]
    assert repository.verify(data=True).ok


@pytest.mark.parametrize("how", ["cut", "parents", "gone"])
def test_its_ancestors_are_found_when_the_file_says_nothing(repository: Repository, how: str) -> None:
    ids = line(repository, 5)
    line(repository, 2, branch="side", first=20)
    repository.delete_branch("side")  # cut off as well, and newer, and not of this branch
    backend, name = repository.handle.backend, snapshot_name(ids[3])
    data = backend.read(name, max_bytes=1 << 20)
    backend.delete(name)
    if how == "cut":
        assert backend.put_if_absent(name, data[:20])
    elif how == "parents":
        assert backend.put_if_absent(name, data.replace(ids[2].encode(), b"f" * 32))
    repository.forget(ids=[ids[3]])
    mark = read_forgotten(backend, ids[3])
    assert mark is not None
    assert (mark.parents, mark.branch) == ((ids[2],), "main")
    assert "inferred" in mark.reason
    assert steps(repository) == [4, 2, 1, 0]


def test_an_end_that_a_tag_or_another_branch_names_is_found_too(repository: Repository) -> None:
    ids = line(repository, 5)
    repository.tag("best", at=ids[2])
    repository.branch("fork", at=ids[2])
    line(repository, 1, branch="fork", first=30)
    repository.handle.backend.delete(snapshot_name(ids[3]))
    repository.forget(ids=[ids[3]])
    assert steps(repository) == [4, 2, 1, 0]


def test_when_the_guess_has_several_ends_all_of_them_are_kept(repository: Repository) -> None:
    ids = line(repository, 3)
    repository.branch("main", at=ids[1], move=True)
    more = line(repository, 3, first=10)
    repository.handle.backend.delete(snapshot_name(more[1]))
    repository.forget(ids=[more[1]])
    mark = read_forgotten(repository.handle.backend, more[1])
    assert mark is not None
    assert mark.parents == (more[0], ids[2])
    assert steps(repository) == [12, 10, 1, 0]


def test_a_first_snapshot_that_is_damaged_gets_no_parents(repository: Repository) -> None:
    ids = line(repository, 3)
    spoil(repository, snapshot_name(ids[0]))
    repository.forget(ids=[ids[0]])
    mark = read_forgotten(repository.handle.backend, ids[0])
    assert mark is not None
    assert mark.parents == ()
    assert steps(repository) == [2, 1]


def test_a_damaged_marker_is_written_again_by_forgetting_again(repository: Repository) -> None:
    ids = line(repository, 4)
    repository.forget(ids=[ids[1], ids[2]])
    collect(repository)
    spoil(repository, forgotten_name(ids[2]), at=5)
    with pytest.raises(DamageError):
        steps(repository)
    report = repository.verify()
    assert [problem.kind for problem in report.problems] == ["mark"]
    repository.forget(ids=[ids[2]])
    assert steps(repository) == [3, 0]
    assert repository.verify().ok


# ---- beside others ---------------------------------------------------------------------------------------------


def put_tag(repository: Repository, target: SnapshotId) -> Any:
    return repository.tag("kept", at=target)


def put_branch(repository: Repository, target: SnapshotId) -> Any:
    return repository.branch("kept", at=target)


@pytest.mark.parametrize("put", [put_tag, put_branch])
def test_a_ref_put_on_a_dropped_snapshot_wins_at_any_moment(put) -> None:
    """Before each call of the forgetting, another handle puts a ref on what is to be forgotten."""
    number, finished = 0, False
    while not finished:
        inner = MemoryBackend()
        ids = line(create_on(inner), 3)
        done: list[int] = []

        def act(inner=inner, ids=ids, done=done) -> None:
            put(open_on(inner), ids[1])
            done.append(1)

        hooked = HookedBackend(inner, at_call(number, act))
        report = open_on(hooked).forget(castore.Keep(last=1))
        finished = not done
        if finished:
            break
        repository = open_on(inner)
        assert read_forgotten(inner, ids[1]) is None, number
        assert ids[1] in live_roots(inner, now_ns=1, grace_ns=1).live
        assert repository.load("kept") == {"x": 1}
        repository.save({"x": 9}, branch="later", parent="kept")
        assert steps(repository, "later") == [None, 1]
        assert ids[0] in report.forgotten
        number += 1
    assert number > 10


def test_forgetting_at_any_moment_of_making_a_ref_lets_the_ref_win() -> None:
    number = 0
    while True:
        inner = MemoryBackend()
        ids = line(create_on(inner), 3)
        done: list[int] = []

        def act(inner=inner, done=done) -> None:
            open_on(inner).forget(castore.Keep(last=1))
            done.append(1)

        hooked = HookedBackend(inner, at_call(number, act))
        open_on(hooked).tag("kept", at=ids[1])
        if not done:
            break
        assert read_forgotten(inner, ids[1]) is None, number
        assert open_on(inner).load("kept") == {"x": 1}
        number += 1
    assert number > 8


def test_a_branch_that_moves_on_meanwhile_loses_nothing() -> None:
    inner = MemoryBackend()
    ids = line(create_on(inner), 4)
    hooked = HookedBackend(inner, at_call(6, lambda: line(open_on(inner), 2, first=10)))
    open_on(hooked).forget(castore.Keep(last=1))
    repository = open_on(inner)
    assert steps(repository)[:2] == [11, 10]
    assert ids[3] in {snapshot.id for snapshot in repository.log()}, "the head that was seen stays"


def test_a_crash_at_any_moment_leaves_each_snapshot_forgotten_or_not() -> None:
    class PowerError(Exception):
        pass

    def die() -> None:
        raise PowerError

    number = 0
    while True:
        inner = MemoryBackend()
        ids = line(create_on(inner), 6)
        hooked = HookedBackend(inner, at_call(number, die))
        try:
            open_on(hooked).forget(castore.Keep(last=2))
        except PowerError:
            pass
        else:
            break
        repository = open_on(inner)
        assert steps(repository)[:2] == [5, 4]
        assert repository.verify(data=True).ok
        for snapshot_id in ids:
            read_record(inner, snapshot_id)
        assert repository.forget(castore.Keep(last=2)).unreadable == ()
        assert steps(repository) == [5, 4]
        number += 1
    assert number > 10
