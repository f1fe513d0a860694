"""A collector beside savers, root-adders and other collectors, interleaved by hand at every call that they make.

The invariant: what was reported as committed is whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pytest

from castore.api import Repository
from castore.backend import MemoryBackend
from castore.errors import CastoreError, DamageError, LeaseError, SnapshotGoneError
from castore.format.layout import new_collector_name, snapshot_name
from castore.ids import SnapshotId
from castore.leases import claim_text, condemned_packs, writer_lease
from castore.maintenance.gc.report import GcReport
from castore.maintenance.repair.plan import RepairPlan
from castore.marks import forgotten_ids
from castore.options import RepositoryOptions
from castore.refs import move_branch
from tests.checkpoint.repositories import HookedBackend, at_call, copied, files_of, open_on, packs_of
from tests.checkpoint.states import State, assert_same
from tests.maintenance.gc.histories import Timepiece, check_whole, drifting, forget, fresh, gc, gc_files, line

SHORT = RepositoryOptions(orphan_grace_s=1e-9, lease_s=1.0)


def doomed() -> tuple[MemoryBackend, list[SnapshotId]]:
    """Three snapshots of a branch, of which the first two were forgotten; and an orphan whose grace is over."""
    repo, ids = line(3, drifting, options=SHORT)
    ids.append(repo.save(drifting(9), branch="lost", parent="main").id)
    repo.delete_branch("lost")
    forget(repo, *ids[:2])
    backend = repo.handle.backend
    assert isinstance(backend, MemoryBackend)
    backend.delete(f"orphans/{ids[3]}")
    return backend, ids


def count_calls(backend: MemoryBackend, operation: Callable[[Repository], Any]) -> int:
    hooked = HookedBackend(copied(backend))
    operation(open_on(hooked))
    return len(hooked.calls)


def collect_rewriting(repo: Repository) -> GcReport:
    return gc(repo, repack_below=1)


# ---- savers beside a collector -------------------------------------------------------------------------------------

SAVES: dict[str, tuple[Callable[[int], State], int]] = {
    "what is forgotten": (drifting, 0),
    "what an orphan holds": (drifting, 9),
    "the head again": (drifting, 2),
    "something new": (drifting, 5),
}


@pytest.mark.parametrize("kind", SAVES)
def test_a_collection_in_the_middle_of_a_save_loses_nothing_of_it(kind: str) -> None:
    """The save is suspended at each of its calls; the collector meets a lease, waits in vain, and leaves the rest."""
    backend, ids = doomed()
    state_of, step = SAVES[kind]
    calls = count_calls(backend, lambda repo: repo.save(state_of(step), step=step))
    for number in range(calls):
        own = copied(backend)
        hook = at_call(number, lambda own=own: gc(open_on(own), repack_below=1, wait_s=2.0))
        saved = open_on(HookedBackend(own, hook)).save(state_of(step), step=step)
        check_whole(open_on(own), {saved.id: state_of(step), ids[2]: drifting(2)})
        gc(open_on(own), repack_below=1)
        check_whole(open_on(own), {saved.id: state_of(step), ids[2]: drifting(2)})
        assert gc_files(open_on(own)) == []


@pytest.mark.parametrize("kind", SAVES)
def test_a_save_in_the_middle_of_a_collection_is_whole(kind: str) -> None:
    backend, ids = doomed()
    state_of, step = SAVES[kind]
    for number in range(count_calls(backend, collect_rewriting)):
        own = copied(backend)
        saved: list[SnapshotId] = []
        hook = at_call(
            number, lambda own=own, saved=saved: saved.append(open_on(own).save(state_of(step), step=step).id)
        )
        collect_rewriting(open_on(HookedBackend(own, hook)))
        check_whole(open_on(own), {saved[0]: state_of(step), ids[2]: drifting(2)})


def test_a_save_that_is_taken_for_dead_and_wakes_up_publishes_anew() -> None:
    """Its lease looks dead, as that of a suspended host does: the collector does not wait, and removes even its
    snapshot, an orphan past its grace.
    """
    backend, ids = doomed()
    replaced = 0
    calls = count_calls(backend, lambda repo: repo.save(drifting(9), step=9, tags=("t",)))
    for number in range(calls):
        own = copied(backend)

        def collect(own: MemoryBackend = own) -> None:
            with forgetting_leases(own):
                gc(open_on(own), repack_below=1)

        saved = open_on(HookedBackend(own, at_call(number, collect))).save(drifting(9), step=9, tags=("t",))
        repo = open_on(own)
        check_whole(repo, {saved.id: drifting(9), ids[2]: drifting(2)})
        assert repo.snapshot("main").id == repo.snapshot("t").id == saved.id
        replaced += len([name for name in files_of(own) if name.startswith("snapshots/")]) != 2
    assert calls > 10


@contextmanager
def forgetting_leases(backend: MemoryBackend) -> Iterator[None]:
    """Nobody sees that leases are held, nor when they were taken."""
    leases = files_of(backend, "leases/")
    for name in leases:
        backend._files.pop(name)
    yield
    for name, data in leases.items():
        backend.put_if_absent(name, data)


def test_a_save_does_not_continue_from_a_condemned_snapshot() -> None:
    backend, ids = doomed()
    repo = open_on(backend)
    with pending_collection(backend), pytest.raises(SnapshotGoneError, match="being collected"):
        repo.save(fresh(1), branch="new", parent=ids[3])
    assert [ref.name for ref in repo.branches()] == ["main"]


# ---- root-adders beside a collector --------------------------------------------------------------------------------

ADDERS: dict[str, Callable[[Repository, SnapshotId], object]] = {
    "branch": lambda repo, target: repo.branch("kept", at=target),
    "move": lambda repo, target: repo.branch("main", at=target, move=True),
    "tag": lambda repo, target: repo.tag("kept", at=target),
}


@pytest.mark.parametrize("adder", ADDERS)
@pytest.mark.parametrize("victim", [0, 3])
def test_a_root_made_in_the_middle_of_a_collection_is_whole_or_refused(adder: str, victim: int) -> None:
    backend, ids = doomed()
    made = refused = 0
    for number in range(count_calls(backend, collect_rewriting)):
        own = copied(backend)
        failures: list[CastoreError] = []
        hook = at_call(number, lambda own=own, failures=failures: attempt(adder, own, ids[victim], failures))
        collect_rewriting(open_on(HookedBackend(own, hook)))
        made += not failures
        refused += bool(failures)
        check_refs(own)
    assert made
    assert refused


@pytest.mark.parametrize("adder", ADDERS)
@pytest.mark.parametrize("victim", [0, 3])
def test_a_collection_in_the_middle_of_making_a_root_leaves_it_whole_or_refused(adder: str, victim: int) -> None:
    backend, ids = doomed()
    made = 0
    for number in range(count_calls(backend, lambda repo: ADDERS[adder](repo, ids[victim]))):
        own = copied(backend)
        failures: list[CastoreError] = []
        hook = at_call(number, lambda own=own: gc(open_on(own), repack_below=1, wait_s=2.0))
        attempt(adder, HookedBackend(own, hook), ids[victim], failures)
        made += not failures
        check_refs(own)
        gc(open_on(own), repack_below=1)
        check_refs(own)
    assert made


def attempt(adder: str, backend: Any, target: SnapshotId, failures: list[CastoreError]) -> None:
    try:
        ADDERS[adder](open_on(backend), target)
    except CastoreError as error:
        failures.append(error)


def check_refs(backend: MemoryBackend) -> None:
    """Whatever a ref names loads, and nothing is damaged."""
    repo = open_on(backend)
    for ref in (*repo.branches(), *repo.tags()):
        repo.load(ref.snapshot_id)
    report = repo.verify(data=True)
    assert report.ok, report.problems


def test_a_condemned_snapshot_becomes_no_root_any_more() -> None:
    backend, ids = doomed()
    with pending_collection(backend):
        for adder in ADDERS:
            failures: list[CastoreError] = []
            attempt(adder, backend, ids[3], failures)
            assert isinstance(failures[0], SnapshotGoneError)
    assert [(ref.name, ref.snapshot_id) for ref in open_on(backend).branches()] == [("main", ids[2])]
    assert open_on(backend).tags() == []


@contextmanager
def pending_collection(backend: MemoryBackend) -> Iterator[GcReport]:
    """A collection has condemned, and waits for a writer that will not end."""
    with writer_lease(backend, purpose="save", now_ns=1 << 62):
        yield gc(open_on(backend), wait_s=0.0)


@pytest.mark.parametrize("heals", [True, False])
@pytest.mark.parametrize("leased", [True, False])
def test_a_branch_that_a_waking_writer_left_on_a_collected_snapshot_is_given_the_time_to_move_on(
    heals: bool, leased: bool
) -> None:
    """It moved its branch, and has not come to its own check yet; a collector may have removed its lease. Should it
    never come there, the collection fails closed.
    """
    backend, ids = doomed()
    gone = SnapshotId("ab" * 16)
    assert move_branch(backend, "main", expected_id=ids[2], new_id=gone, now_ns=5)
    with ExitStack() as stack:
        if leased:
            stack.enter_context(writer_lease(backend, purpose="save", now_ns=1 << 62))

        def heal() -> None:
            move_branch(backend, "main", expected_id=gone, new_id=ids[2], now_ns=6)
            stack.close()

        time = Timepiece(while_asleep=heal if heals else lambda: None)
        if heals:
            assert gc(open_on(backend), time).snapshots.keys() == {ids[0], ids[1], ids[3]}
        else:
            with pytest.raises(DamageError, match="which is not there"):
                gc(open_on(backend), time)
            assert 0 < time.now_s < 60
    assert_same(open_on(backend).load(ids[2]), drifting(2))
    assert open_on(backend).verify(data=True).ok is heals


# ---- the drain -----------------------------------------------------------------------------------------------------


def test_what_a_writer_holds_up_is_told_and_left_to_the_next_collection() -> None:
    backend, ids = doomed()
    before = packs_of(open_on(backend))
    with pending_collection(backend) as report:
        (pending,) = [pending for pending in report.pending if pending.kind == "writer"]
        assert pending.pid
        assert str(pending.pid) in pending.message
        assert pending.bytes > 0
        assert packs_of(open_on(backend)) == before
        assert condemned_packs(backend)
        assert snapshot_name(ids[0]) in files_of(backend)
    done = gc(open_on(backend))
    assert done.snapshots.keys() == {ids[0], ids[1], ids[3]}
    assert done.is_complete
    assert gc_files(open_on(backend)) == []


def test_the_next_collection_waits_for_the_same_writers_and_not_for_later_ones() -> None:
    """Savers that follow each other closely must not hold it up for ever."""
    backend, ids = doomed()
    with ExitStack() as older, ExitStack() as younger:
        older.enter_context(writer_lease(backend, purpose="save", now_ns=1 << 62))
        gc(open_on(backend), wait_s=0.0)
        younger.enter_context(writer_lease(backend, purpose="save", now_ns=1 << 62))
        older.close()
        assert gc(open_on(backend), wait_s=0.0).snapshots.keys() == {ids[0], ids[1], ids[3]}


def test_a_collection_waits_for_a_writer_that_ends_meanwhile() -> None:
    backend, ids = doomed()
    with ExitStack() as stack:
        stack.enter_context(writer_lease(backend, purpose="save", now_ns=1 << 62))
        time = Timepiece(while_asleep=stack.close)
        assert gc(open_on(backend), time, wait_s=60.0).snapshots.keys() == {ids[0], ids[1], ids[3]}
    assert 0 < time.now_s < 60


def test_a_snapshot_that_becomes_a_root_while_the_collection_waits_stays_with_all_of_its_chunks() -> None:
    """Its adder was there before the condemnation, so its ref is seen by the second look."""
    backend, ids = doomed()
    made: list[object] = []

    def add() -> None:
        if not made and condemned_packs(backend):
            made.append(move_by_hand(backend, ids[3]))
            stack.close()

    with ExitStack() as stack:
        stack.enter_context(writer_lease(backend, purpose="branch", now_ns=1 << 62))
        report = gc(open_on(backend), Timepiece(while_asleep=add), repack_below=1, wait_s=60.0)
    assert made
    assert ids[3] not in report.snapshots
    check_whole(open_on(backend), {ids[3]: drifting(9), ids[2]: drifting(2)})


def move_by_hand(backend: MemoryBackend, target: SnapshotId) -> bool:
    from castore.refs import move_branch

    return move_branch(backend, "kept", expected_id=None, new_id=target, now_ns=1)


# ---- collectors ----------------------------------------------------------------------------------------------------


def test_two_collectors_exclude_each_other_and_the_second_hears_of_the_first() -> None:
    backend, _ = doomed()
    claim = backend.claim(new_collector_name(), claim_text("gc", 1))
    with pytest.raises(LeaseError, match=r"process [0-9]+ on"):
        gc(open_on(backend))
    claim.release()
    assert gc(open_on(backend)).snapshots


def test_a_long_collection_gives_signs_of_life_to_collectors_of_other_hosts() -> None:
    backend, _ = doomed()
    repo = open_on(backend)
    options = replace(repo.options, lease_s=1e-6)
    repo.handle.config = replace(repo.handle.config, options=options)
    seen: list[bytes] = []

    def look(*_: object) -> None:
        seen.extend(claim.data for claim in backend.claims("gc/") if claim.name.endswith(".collector"))

    repo.gc(progress=look)
    assert len(seen) > 5
    assert len(set(seen)) == len(seen)


def test_the_claim_of_a_dead_collector_is_removed() -> None:
    backend, _ = doomed()
    backend.put_if_absent(new_collector_name(), claim_text("gc", 1))
    assert gc(open_on(backend)).snapshots
    assert gc_files(open_on(backend)) == []


def test_a_collector_that_sleeps_while_another_does_all_of_its_work_does_no_harm() -> None:
    """Suspended before each of its calls, taken for dead, with saves between; then it wakes up and goes on."""
    backend, ids = doomed()
    ended: set[str] = set()
    for number in range(count_calls(backend, collect_rewriting)):
        own = copied(backend)
        saved: list[SnapshotId] = []

        def others(own: MemoryBackend = own, saved: list[SnapshotId] = saved) -> None:
            claims = files_of(own, "gc/")
            held = [name for name in claims if name.endswith(".collector")]
            for name in held:
                own._held.discard(name)  # it looks dead
            saved.append(open_on(own).save(drifting(9), step=9).id)
            gc(open_on(own), repack_below=1)
            saved.append(open_on(own).save(drifting(0), step=10).id)

        try:
            collect_rewriting(open_on(HookedBackend(own, at_call(number, others))))
            ended.add("well")
        except LeaseError as error:
            assert "took it for dead" in str(error)  # what it was reading has been collected
            ended.add("told")
        check_whole(open_on(own), {saved[0]: drifting(9), saved[1]: drifting(0), ids[2]: drifting(2)})
        gc(open_on(own), repack_below=1)
        check_whole(open_on(own), {saved[0]: drifting(9), saved[1]: drifting(0), ids[2]: drifting(2)})
    assert ended == {"well", "told"}


def test_a_collection_in_the_middle_of_a_dry_run_of_repair_is_no_loss() -> None:
    backend, _ = doomed()

    def plan(repo: Repository) -> RepairPlan:
        return repo.repair(dry_run=True).plan

    for number in range(0, count_calls(backend, plan), 5):
        own = copied(backend)
        hook = at_call(number, lambda own=own: collect_rewriting(open_on(own)))
        found = plan(open_on(HookedBackend(own, hook)))
        assert found.is_empty, number
        assert not found.losses


# ---- readers -------------------------------------------------------------------------------------------------------


def test_a_load_in_the_middle_of_a_collection_is_whole() -> None:
    backend, ids = doomed()
    for number in range(count_calls(backend, collect_rewriting)):
        own = copied(backend)
        hook = at_call(number, lambda own=own: assert_same(open_on(own).load(ids[2]), drifting(2)))
        collect_rewriting(open_on(HookedBackend(own, hook)))


def test_a_collection_in_the_middle_of_a_load_is_not_noticed_or_says_that_the_snapshot_is_gone() -> None:
    backend, ids = doomed()
    gone = 0
    for victim, step in ((2, 2), (0, 0)):
        for number in range(count_calls(backend, lambda repo, victim=victim: repo.load(ids[victim]))):
            own = copied(backend)
            hook = at_call(number, lambda own=own: collect_rewriting(open_on(own)))
            repo = open_on(HookedBackend(own, hook))
            try:
                assert_same(repo.load(ids[victim]), drifting(step))
            except (SnapshotGoneError, LookupError):
                gone += 1
                assert victim == 0
    assert gone
    assert forgotten_ids(backend)
