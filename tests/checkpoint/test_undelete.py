"""What was forgotten or thinned comes back while its bytes are there, whole, or not at all."""

from __future__ import annotations

import json

import pytest

import castore
from castore.api import Repository
from castore.backend import MemoryBackend
from castore.errors import DamageError, SnapshotGoneError, UnknownRefError, UsageError
from castore.format.layout import forgotten_name, snapshot_name, thin_name
from castore.ids import SnapshotId
from castore.leases import list_leases
from castore.marks import forgotten_ids, orphan_notes, thinned_ids
from castore.options import RepositoryOptions
from castore.roots import live_roots
from tests.checkpoint.repositories import (
    HookedBackend,
    at_call,
    condemn,
    copied,
    create_on,
    delete_packs,
    open_on,
    packs_of,
)
from tests.checkpoint.states import assert_same, training_state
from tests.suites.collector import collect


@pytest.fixture
def repository() -> Repository:
    return create_on(MemoryBackend(), RepositoryOptions(compression="none"))


def line(repository: Repository, count: int, *, branch: str = "main", first: int = 1) -> list[SnapshotId]:
    """Snapshots of a branch, oldest first."""
    return [repository.save(training_state(step), step=step, branch=branch).id for step in range(first, first + count)]


def steps(repository: Repository, ref: str = "main") -> list[int | None]:
    return [snapshot.step for snapshot in repository.log(ref)]


def test_forgotten_snapshots_are_listed_and_come_back(repository: Repository) -> None:
    ids = line(repository, 4)
    repository.forget(castore.Keep(last=1))
    listed = repository.forgotten()
    assert [(found.id, found.step, found.branch, found.is_there) for found in listed] == [
        (ids[2], 3, "main", True),
        (ids[1], 2, "main", True),
        (ids[0], 1, "main", True),
    ]
    assert listed[0].reason == "policy: last 1"
    assert json.loads(json.dumps(listed[0].to_json()))["is_there"] is True
    report = repository.undelete([ids[1][:10]])
    assert report.restored == ((ids[1], "forgotten"),)
    assert steps(repository) == [4, 2]
    assert set(repository.undelete().restored) == {(ids[0], "forgotten"), (ids[2], "forgotten")}
    assert steps(repository) == [4, 3, 2, 1]
    assert repository.forgotten() == []
    collect(repository)
    for step, snapshot_id in enumerate(ids, start=1):
        assert_same(repository.load(snapshot_id), training_state(step))


def test_what_gc_has_freed_cannot_come_back(repository: Repository) -> None:
    ids = line(repository, 3)
    repository.forget(ids=[ids[1]])
    collect(repository)
    assert [(found.step, found.is_there) for found in repository.forgotten()] == [(2, False)]
    for text in (ids[1], ids[1][:6]):
        with pytest.raises(SnapshotGoneError, match="cannot come back"):
            repository.undelete([text])
    assert repository.undelete().restored == ()


def test_a_snapshot_that_lost_chunks_stays_forgotten(repository: Repository) -> None:
    ids = line(repository, 1)
    packs = packs_of(repository)
    line(repository, 1, first=2)
    repository.forget(ids=ids)
    delete_packs(repository.handle.backend, packs)
    fresh = open_on(repository.handle.backend)
    with pytest.raises(SnapshotGoneError, match="gc has freed chunks"):
        fresh.undelete(ids)
    assert forgotten_ids(repository.handle.backend) == set(ids)
    assert fresh.undelete().lost[0][0] == ids[0]
    assert steps(fresh) == [2]
    with pytest.raises(DamageError):
        fresh.branch("rescue", at=ids[0])
    assert [ref.name for ref in fresh.branches()] == ["main"]
    assert forgotten_ids(repository.handle.backend) == set(ids)


def test_chunks_in_condemned_packs_are_copied_out_first(repository: Repository) -> None:
    ids = line(repository, 1)
    packs = packs_of(repository)
    line(repository, 1, first=2)
    repository.forget(ids=ids)
    condemn(repository.handle.backend, packs)
    repository.undelete(ids)
    delete_packs(repository.handle.backend, packs)
    fresh = open_on(repository.handle.backend)
    assert_same(fresh.load(ids[0]), training_state(1))


def test_a_thinned_snapshot_is_made_whole_while_its_bytes_are_there(repository: Repository) -> None:
    ids = line(repository, 3)
    repository.thin(["optimizer/**"], older_than=1)
    assert repository.undelete([ids[0]]).restored == ((ids[0], "thinned"),)
    assert_same(repository.load(ids[0]), training_state(1))
    assert repository.snapshot(ids[0]).dropped == ()
    collect(repository)
    with pytest.raises(SnapshotGoneError):
        repository.undelete([ids[1]])
    assert thinned_ids(repository.handle.backend) == {ids[1]}
    assert_same(repository.load(ids[0]), training_state(1))
    assert repository.verify(data=True).ok


def test_a_snapshot_that_is_forgotten_and_thinned_goes_one_step_back_at_a_time(repository: Repository) -> None:
    ids = line(repository, 3)
    repository.thin(["optimizer/**"], ids=[ids[0]])
    collect(repository)
    repository.forget(ids=[ids[0]])
    assert repository.undelete([ids[0]]).restored == ((ids[0], "forgotten"),)
    assert_same(repository.load(ids[0], paths=["model"])["model"], training_state(1)["model"])
    with pytest.raises(SnapshotGoneError):
        repository.undelete([ids[0]])


def test_a_ref_on_a_forgotten_snapshot_brings_it_back(repository: Repository) -> None:
    ids = line(repository, 3)
    repository.forget(castore.Keep(last=1))
    repository.branch("rescue", at=ids[1])
    repository.tag("first", at=ids[0])
    assert forgotten_ids(repository.handle.backend) == set()
    assert steps(repository, "rescue") == [2, 1]


def test_what_no_ref_reaches_is_an_orphan_again_whose_grace_starts_now(repository: Repository) -> None:
    line(repository, 1)
    (lost,) = line(repository, 1, branch="side", first=7)
    repository.delete_branch("side")
    repository.forget(ids=[lost])
    repository.handle.clock = lambda: 1 << 61
    repository.undelete([lost])
    assert orphan_notes(repository.handle.backend)[lost] == 1 << 61
    assert lost in live_roots(repository.handle.backend, now_ns=(1 << 61) + 5, grace_ns=10).orphans
    assert lost in live_roots(repository.handle.backend, now_ns=(1 << 61) + 50, grace_ns=10).dead


def test_taking_a_ref_away_starts_a_grace_period_however_old_the_snapshot_is(repository: Repository) -> None:
    line(repository, 1)
    backend = repository.handle.backend
    ids = {name: line(repository, 1, branch=name, first=5)[0] for name in ("deleted", "moved", "tagged")}
    repository.tag("t", at=ids["tagged"])
    repository.handle.clock = lambda: 1 << 61
    repository.delete_branch("deleted")
    repository.branch("moved", at="main", move=True)
    repository.delete_branch("tagged")
    repository.delete_tag("t")
    assert orphan_notes(backend) == dict.fromkeys(ids.values(), 1 << 61)
    assert set(ids.values()) <= live_roots(backend, now_ns=(1 << 61) + 10, grace_ns=10).live.keys()


def test_what_is_neither_forgotten_nor_thinned_is_refused(repository: Repository) -> None:
    line(repository, 2)
    with pytest.raises(UsageError, match="neither forgotten nor thinned"):
        repository.undelete(["main"])
    with pytest.raises(UsageError):
        repository.undelete([])
    with pytest.raises(UnknownRefError):
        repository.undelete(["typo"])
    assert repository.undelete().restored == ()


@pytest.mark.parametrize("name_of", [forgotten_name, thin_name])
def test_a_damaged_mark_is_taken_away_when_everything_is_there(repository: Repository, name_of) -> None:
    ids = line(repository, 2)
    if name_of is forgotten_name:
        repository.forget(ids=[ids[0]])
    else:
        repository.thin(["optimizer"], ids=[ids[0]])
    backend, name = repository.handle.backend, name_of(ids[0])
    backend.compare_and_swap(name, expected=backend.read(name, max_bytes=4096), new=b"rot")
    repository.undelete([ids[0]])
    assert_same(repository.load(ids[0]), training_state(1))
    assert repository.verify().ok


# ---- beside a collector, and through crashes -------------------------------------------------------------------


class PowerError(Exception):
    pass


@pytest.mark.parametrize("kind", ["forgotten", "thinned"])
def test_a_collector_that_comes_to_its_end_at_any_moment_leaves_it_whole_or_marked(kind) -> None:
    """The packs are condemned before; before each call of the undelete they are deleted, as if its lease were over."""
    number, came_back, refused = 0, 0, 0
    start = MemoryBackend()
    origin = create_on(start, RepositoryOptions(compression="none"))
    ids = line(origin, 1)
    packs = packs_of(origin)
    line(origin, 1, first=2)
    if kind == "forgotten":
        origin.forget(ids=ids)
    else:
        origin.thin(["optimizer/**", "model/moving"], ids=ids)
    while True:
        inner = copied(start)
        keep = open_on(inner)
        if kind == "thinned":
            collect_but(keep, packs)
        condemn(inner, packs)
        done: list[int] = []

        def end(inner=inner, done=done) -> None:
            delete_packs(inner, packs)
            done.append(1)

        hooked = HookedBackend(inner, at_call(number, end))
        try:
            open_on(hooked).undelete(ids)
        except SnapshotGoneError:
            refused += 1
            marked = forgotten_ids(inner) if kind == "forgotten" else thinned_ids(inner)
            assert marked == set(ids), number
        else:
            came_back += 1
            if done:
                assert_same(open_on(inner).load(ids[0]), training_state(1))
        assert not [lease for lease in list_leases(inner) if lease.held]
        if not done:
            break
        number += 1
    assert came_back > 1
    assert refused > 1


def collect_but(repository: Repository, packs) -> None:
    """As collect, but the given packs are still there: condemned, and not yet deleted."""
    backend = repository.handle.backend
    kept = {name: backend.read(name, max_bytes=1 << 24) for name in (info.name for info in backend.list("packs/"))}
    collect(repository)
    for name, data in kept.items():
        if any(pack_id in name for pack_id in packs):
            backend.put_if_absent(name, data)


@pytest.mark.parametrize("kind", ["forgotten", "thinned"])
def test_a_crash_at_any_moment_leaves_it_marked_or_whole(kind) -> None:
    def die() -> None:
        raise PowerError

    number = 0
    while True:
        inner = MemoryBackend()
        repository = create_on(inner, RepositoryOptions(compression="none"))
        ids = line(repository, 2)
        if kind == "forgotten":
            repository.forget(ids=[ids[0]])
        else:
            repository.thin(["optimizer/**"], ids=[ids[0]])
        condemn(inner, packs_of(repository))
        try:
            open_on(HookedBackend(inner, at_call(number, die))).undelete([ids[0]])
        except PowerError:
            pass
        else:
            break
        fresh = open_on(inner)
        assert fresh.verify(data=True).ok
        if ids[0] not in forgotten_ids(inner) | thinned_ids(inner):
            assert_same(fresh.load(ids[0]), training_state(1))
        number += 1
    assert number > 10


def test_the_file_that_goes_between_the_checks_is_noticed() -> None:
    inner = MemoryBackend()
    ids = line(create_on(inner), 2)
    open_on(inner).forget(ids=[ids[0]])
    hooked = HookedBackend(inner)

    def hook(operation: str, name: str) -> None:
        if operation == "compare_and_swap" and name == forgotten_name(ids[0]):
            inner.delete(snapshot_name(ids[0]))

    hooked.hook = hook
    with pytest.raises(SnapshotGoneError):
        open_on(hooked).undelete([ids[0]])
    assert forgotten_ids(inner) == {ids[0]}
    assert steps(open_on(inner)) == [2]


def test_what_another_process_brings_back_first_is_neither_an_error_nor_made_whole(repository: Repository) -> None:
    ids = line(repository, 3)
    repository.thin(["model/**"], ids=[ids[0]])
    repository.forget(ids=ids[:2])
    backend = repository.handle.backend
    done = False

    def race(operation: str, name: str) -> None:
        nonlocal done
        if not done and (operation, name) == ("read", snapshot_name(min(ids[:2]))):
            done = True
            open_on(backend).undelete()

    report = open_on(HookedBackend(backend, race)).undelete()
    assert done
    assert report.lost == ()
    assert not forgotten_ids(backend)
    assert thinned_ids(backend) == {ids[0]}
