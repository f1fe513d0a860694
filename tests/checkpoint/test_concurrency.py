"""Promise 9: any number of handles, threads and processes; a lost race loses nothing."""

from __future__ import annotations

import concurrent.futures
import pickle
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import castore
from castore.api import Repository
from castore.backend import LocalBackend, MemoryBackend
from castore.errors import ConflictError, RefExistsError, UnknownRefError
from castore.host_memory import SLOT_BYTES_MIN, BaseMemory
from castore.ids import ChunkId
from castore.leases import list_leases
from tests.checkpoint.killing import Report, fork, forked, until
from tests.checkpoint.repositories import HookedBackend, at_call, create_on, held_leases, open_on, packs_of
from tests.checkpoint.states import State, assert_same, training_state


@pytest.fixture
def repo(tmp_path: Path) -> Repository:
    return castore.init(tmp_path / "store")


def together(*actions: Callable[[], Any]) -> list[Any]:
    """Run every action in a thread of its own; their results, or the first error."""
    barrier = threading.Barrier(len(actions))

    def begin(action: Callable[[], Any]) -> Any:
        barrier.wait()
        return action()

    with concurrent.futures.ThreadPoolExecutor(len(actions)) as pool:
        return [future.result() for future in [pool.submit(begin, action) for action in actions]]


# ---- threads -----------------------------------------------------------------------------------------------------


def test_threads_save_to_different_branches_through_one_handle(repo: Repository) -> None:
    def save_some(number: int) -> list[str]:
        branch = f"run-{number}"
        return [repo.save(training_state(10 * number + step), branch=branch, step=step).id for step in range(4)]

    saved = together(*(lambda number=number: save_some(number) for number in range(4)))
    for number, ids in enumerate(saved):
        assert [snapshot.id for snapshot in repo.log(f"run-{number}")] == ids[::-1]
        for step, snapshot_id in enumerate(ids):
            assert_same(repo.load(snapshot_id), training_state(10 * number + step))
    assert held_leases(repo.handle.backend) == []
    assert repo.verify(data=True).ok


def test_threads_that_save_to_one_branch_race_and_lose_nothing(repo: Repository) -> None:
    repo.save(training_state(0), step=0)

    def save(number: int) -> str:
        try:
            return repo.save(training_state(number), step=number).id
        except ConflictError as error:
            return error.snapshot_id

    ids = together(*(lambda number=number: save(number) for number in range(1, 6)))
    on_branch = {snapshot.id for snapshot in repo.log("main")}
    assert len(on_branch) >= 2
    assert {snapshot.id for snapshot in repo.orphans()} == set(ids) - on_branch
    for number, snapshot_id in enumerate(ids, 1):
        assert_same(repo.load(snapshot_id), training_state(number))


def test_readers_read_while_writers_save(repo: Repository) -> None:
    repo.save(training_state(0), step=0)
    done = threading.Event()

    def write() -> None:
        try:
            for step in range(1, 12):
                repo.save(training_state(step), step=step)
        finally:
            done.set()

    def read(handle: Repository) -> int:
        count = 0
        while not done.is_set() or not count:
            snapshot = handle.snapshot("main")
            assert_same(handle.load(snapshot.id), training_state(snapshot.step or 0))
            list(handle.log("main"))
            handle.diff("main", snapshot.id, values=False)
            count += 1
        return count

    other = castore.open(repo.path)
    _, own, others = together(write, lambda: read(repo), lambda: read(other))
    assert own
    assert others
    other.close()


def test_a_load_in_another_thread_does_not_take_the_handle_back_to_an_older_head() -> None:
    """An evaluation thread looked the branch up just before a save: the save after that was refused as a conflict."""
    backend = HookedBackend(create_on(MemoryBackend()).handle.backend)
    repo = open_on(backend)
    repo.save({"step": 0})
    begun = len(backend.calls)
    repo.load("main")
    reads = sum(operation == "read" for operation, _ in backend.calls[begun:])
    assert reads > 2
    for number in range(reads):
        backend.hook = at_call(number, lambda: repo.save({"step": "meanwhile"}), operation="read")
        repo.load("main")
        backend.hook = lambda operation, name: None
        repo.save({"step": number})
    assert len(list(repo.log("main"))) == 1 + 2 * reads


def test_a_delta_base_is_not_overwritten_while_another_save_takes_differences_from_it(
    repo: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread's save dropped the base from memory and wrote its own chunks there: the difference was taken from
    those, agreed with itself when it was proved, and what was reported durable could never be loaded.
    """
    # Large enough for a slot of the pool, which is used again: smaller copies have memory of their own.
    weights = np.random.default_rng(0).standard_normal(SLOT_BYTES_MIN // 4).astype(np.float32)

    def drifted(step: int) -> State:
        return {"weights": weights * np.float32(1 + 1e-5 * step)}

    repo.handle.base_memory_bytes = 1 << 30
    for step in range(3):
        repo.save(drifted(step), step=step)
    take = BaseMemory.get
    nested: list[str] = []

    def get(memory: BaseMemory, chunk_id: ChunkId) -> memoryview | None:
        found = take(memory, chunk_id)
        if found is not None and not nested:
            nested.append("begun")
            nested.extend(repo.save(drifted(50 + step), branch="other", step=step).id for step in range(3))
        return found

    monkeypatch.setattr(BaseMemory, "get", get)
    snapshot = repo.save(drifted(3), step=3)
    assert len(nested) == 4, "no base was in memory"
    assert snapshot.stored_bytes < snapshot.raw_bytes / 2, "no difference was taken"
    assert_same(repo.load("main"), drifted(3))
    assert_same(repo.load("other"), drifted(52))


def test_saves_of_several_threads_that_drift_alike_are_right(repo: Repository) -> None:
    weights = np.random.default_rng(0).standard_normal((3, SLOT_BYTES_MIN // 4)).astype(np.float32)

    def state_of(run: int, step: int) -> State:
        return {"weights": [row * np.float32(1 + 1e-5 * (10 * run + step)) for row in weights]}

    def train(run: int) -> list[str]:
        return [repo.save(state_of(run, step), branch=f"run-{run}", step=step).id for step in range(6)]

    for run, ids in enumerate(together(*(lambda run=run: train(run) for run in range(3)))):
        for step, snapshot_id in enumerate(ids):
            assert_same(repo.load(snapshot_id), state_of(run, step))


# ---- processes ---------------------------------------------------------------------------------------------------


def test_of_two_processes_on_one_branch_one_wins_and_the_loser_loses_nothing(repo: Repository) -> None:
    first = repo.save(training_state(0), step=0)

    def save_twice(report: Report) -> None:
        with castore.open(repo.path) as own:
            own.load("main")
            report("loaded")
            until(lambda: len(list(repo.snapshots())) == 2)
            with pytest.raises(ConflictError, match=r"castore branch NAME .*parent='main'") as caught:
                own.save(training_state(2), step=2)
            error = caught.value
            assert error.snapshot_id[:12] in str(error)
            report(f"{error.branch} {error.snapshot_id} {error.expected_id} {error.found_id}")
            # To try again in the same way is refused again; the head that is there must be asked for.
            with pytest.raises(ConflictError):
                own.save(training_state(2), step=2)
            report(own.save(training_state(2), step=2, parent="main").id)

    with forked(save_twice) as child:
        assert child.next_line() == "loaded"
        winner = repo.save(training_state(1), step=1)
        branch, loser, expected, found = child.next_line().split()
        assert (branch, expected, found) == ("main", first.id, winner.id)
        retried = child.next_line()
        child.wait()

    assert [snapshot.id for snapshot in repo.log("main")] == [retried, winner.id, first.id]
    assert loser in {snapshot.id for snapshot in repo.orphans()}
    assert_same(repo.load(loser), training_state(2))
    assert repo.snapshot(loser).parents == (first.id,)
    repo.branch("adopted", at=loser)
    assert loser not in {snapshot.id for snapshot in repo.orphans()}
    with pytest.raises(ConflictError) as caught:
        repo.save(training_state(3))
    assert caught.value.found_id == retried


@pytest.mark.slow
def test_many_processes_save_the_same_content_at_once(repo: Repository, tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    def save(number: int, report: Report) -> None:
        with castore.open(repo.path) as own:
            report("ready")
            until(gate.exists)
            for step in range(3):
                report(own.save(training_state(step), branch=f"run-{number}", step=step).id)

    children = [fork(lambda report, number=number: save(number, report)) for number in range(5)]
    for child in children:
        child.next_line()
    gate.touch()
    ids = [child.wait()[1:] for child in children]
    state_ids = {tuple(repo.snapshot(snapshot_id).state_id for snapshot_id in each) for each in ids}
    assert len(state_ids) == 1
    for each in ids:
        for step, snapshot_id in enumerate(each):
            assert_same(repo.load(snapshot_id), training_state(step))
    assert repo.verify(data=True).ok
    assert list_leases(repo.handle.backend) == []
    # Whoever comes later finds all of it.
    again = repo.save(training_state(2), branch="late")
    assert again.new_bytes == 0


@pytest.mark.slow
def test_processes_that_retry_with_the_parent_lose_no_save_of_each_other(repo: Repository, tmp_path: Path) -> None:
    """Every save that returned is in the history of the branch, exactly once."""
    gate = tmp_path / "gate"

    def save(number: int, report: Report) -> None:
        with castore.open(repo.path) as own:
            report("ready")
            until(gate.exists)
            for step in range(5):
                for _ in range(1000):
                    try:
                        snapshot = own.save({"run": number, "step": step}, parent="main", step=step)
                    except ConflictError:
                        continue
                    report(snapshot.id)
                    break

    repo.save({})
    children = [fork(lambda report, number=number: save(number, report)) for number in range(4)]
    for child in children:
        child.next_line()
    gate.touch()
    returned = [snapshot_id for child in children for snapshot_id in child.wait()[1:]]
    assert len(returned) == 20
    history = [snapshot.id for snapshot in repo.log("main")]
    assert sorted(history[:-1]) == sorted(returned)


def test_a_branch_that_moves_while_a_parent_is_looked_up_is_not_dropped_from_history() -> None:
    """The parent was resolved before the head was read: a save between the two was silently replaced."""
    backend = MemoryBackend()
    repo = create_on(backend)
    first = repo.save({"step": 0})
    calls = HookedBackend(backend)
    open_on(calls).save({"step": 1}, parent="main")
    winners: list[str] = []

    def win() -> None:
        with open_on(backend) as other:
            other.load("main")
            winners.append(other.save({"step": "theirs"}).id)

    for number, _ in enumerate(calls.calls):
        repo.branch("main", at=first.id, move=True)
        winners.clear()
        mine = open_on(HookedBackend(backend, at_call(number, win)))
        try:
            snapshot = mine.save({"step": "mine"}, parent="main")
        except ConflictError:
            assert [found.id for found in repo.log("main")] == [*winners, first.id]
        else:
            assert set(winners) | {snapshot.id, first.id} == {found.id for found in repo.log("main")}


# ---- fork, pickle, many handles ----------------------------------------------------------------------------------


def test_a_handle_works_on_in_the_child_and_in_the_parent_after_fork(repo: Repository) -> None:
    repo.save(training_state(0), step=0)
    repo.load("main")

    def go_on(report: Report) -> None:
        assert_same(repo.load("main"), training_state(0))
        report(repo.save(training_state(1), branch="child", step=1).id)
        repo.close()

    with forked(go_on) as child:
        own = repo.save(training_state(2), step=2)
        (snapshot_id,) = child.wait()
    assert_same(repo.load(snapshot_id), training_state(1))
    assert_same(repo.load("main"), training_state(2))
    assert repo.save(training_state(3), step=3).parents == (own.id,)
    assert repo.verify(data=True).ok


def test_a_child_forked_beside_a_background_save_saves_by_itself(repo: Repository) -> None:
    """The saver's thread is the parent's: the child must neither wait for it nor hear of its errors."""
    repo.save(training_state(0))

    def save(report: Report) -> None:
        report(repo.save(training_state(1), branch="child").id)
        report(repo.save_async(training_state(2), branch="child").result(30).id)

    for _ in range(5):
        pending = repo.save_async(training_state(3))
        with forked(save) as child:
            ids = child.wait()
        pending.result(30)
        assert_same(repo.load(ids[1]), training_state(2))
        repo.delete_branch("child")
    assert_same(repo.load("main"), training_state(3))


def test_a_fork_in_the_middle_of_a_save_keeps_the_lease_with_the_parent(repo: Repository) -> None:
    """A data loader forks its workers whenever it likes; one that outlives the run must not look like a saver."""
    events: list[str] = []

    def fork_a_worker(done: int, total: int) -> None:
        if events:
            return
        events.append("forked")
        child = fork(work)
        children.append(child)
        child.next_line()

    def work(report: Report) -> None:
        held = held_leases(repo.handle.backend)
        with castore.open(repo.path) as own:
            own.save(training_state(5), branch="worker")
        report(f"saved {len(held)}")
        until(stop.exists)

    children: list[Any] = []
    stop = repo.path.parent / "stop"
    snapshot = repo.save(training_state(1), progress=fork_a_worker)
    assert held_leases(repo.handle.backend) == []
    assert children[0].lines == ["saved 1"], "the parent's lease was not seen as held"
    stop.touch()
    children[0].wait()
    assert_same(repo.load(snapshot.id), training_state(1))
    assert_same(repo.load("worker"), training_state(5))


def test_a_stopped_saver_still_holds_its_lease_and_a_dead_one_does_not(repo: Repository) -> None:
    def save(report: Report) -> None:
        def pause(done: int, total: int) -> None:
            report("in the middle")
            threading.Event().wait()

        repo.save(training_state(1), progress=pause)

    with forked(save) as child:
        child.next_line()
        (lease,) = list_leases(repo.handle.backend)
        assert (lease.held, lease.pid, lease.purpose) == (True, child.pid, "save")
        child.kill()
    (lease,) = list_leases(repo.handle.backend)
    assert not lease.held


def test_a_repository_pickles_as_its_path(repo: Repository) -> None:
    repo.save(training_state(1))
    copy = pickle.loads(pickle.dumps(repo))
    assert copy.path == repo.path
    assert_same(copy.load("main"), training_state(1))
    copy.close()
    assert repr(repo) == f"castore.open({str(repo.path)!r})"


def test_a_pickled_repository_survives_a_change_of_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with castore.open("store", create=True) as repo:
        repo.save(training_state(1))
        data = pickle.dumps(repo)
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        repo.save(training_state(2))
        assert_same(pickle.loads(data).load("main"), training_state(2))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_many_handles_are_open_at_once(repo: Repository) -> None:
    handles = [castore.open(repo.path) for _ in range(30)]
    for number, handle in enumerate(handles):
        handle.save(training_state(number % 3), branch=f"run-{number}")
    for number, handle in enumerate(handles):
        assert_same(handle.load(f"run-{29 - number}"), training_state((29 - number) % 3))
    for handle in handles[::2]:
        handle.close()
    for handle in handles:  # closed ones open again
        assert_same(handle.load("run-0"), training_state(0))
        handle.close()
    assert open_files_below(repo.path) == []


def open_files_below(directory: Path) -> list[Path]:
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # that of the listing
            found.append(link.readlink())
    return [path for path in found if path.is_relative_to(directory)]


def test_a_second_handle_finds_what_the_first_one_stored(repo: Repository) -> None:
    other = castore.open(repo.path)
    other.save(training_state(9), branch="other")
    first = repo.save(training_state(1))
    second = other.save(training_state(1), branch="other")
    assert second.new_bytes == 0
    assert second.state_id == first.state_id
    other.close()


def test_a_missing_index_is_no_hindrance_while_others_use_it(repo: Repository) -> None:
    """Somebody cleans the cache directory under a running job."""
    import shutil

    repo.save(training_state(1))
    shutil.rmtree(repo.path / "cache")
    with castore.open(repo.path) as other:
        assert_same(other.load("main"), training_state(1))
        other.save(training_state(2))
    snapshot = repo.save(training_state(3), parent="main")
    assert_same(repo.load(snapshot.id), training_state(3))
    repo.close()
    assert_same(repo.load("main~1"), training_state(2))
    assert repo.verify(data=True).ok


# ---- refs --------------------------------------------------------------------------------------------------------


def test_of_two_that_make_one_name_one_is_told(repo: Repository) -> None:
    repo.save(training_state(1))

    def make(action: Callable[[], object]) -> bool:
        try:
            action()
        except (RefExistsError, ConflictError):
            return False
        return True

    for attempt in range(5):
        made = together(*(lambda: make(lambda: repo.tag(f"t{attempt}")) for _ in range(3)))  # noqa: B023
        assert sum(made) == 1
        made = together(*(lambda: make(lambda: repo.branch(f"b{attempt}")) for _ in range(3)))  # noqa: B023
        assert sum(made) == 1


def test_a_branch_that_moves_while_it_is_deleted_is_deleted() -> None:
    """The removal lost the race and said that there is no such branch, naming it among those that there are."""
    backend = MemoryBackend()
    repo = create_on(backend)
    repo.save({"step": 0})

    def move() -> None:
        with open_on(backend) as other:
            other.save({"step": 1}, parent="main")

    open_on(HookedBackend(backend, at_call(0, move, operation="compare_and_swap"))).delete_branch("main")
    assert repo.branches() == []
    with pytest.raises(UnknownRefError):
        repo.delete_branch("main")


def test_a_deleted_branch_can_be_made_again_by_the_next_save(repo: Repository) -> None:
    first = repo.save(training_state(1))
    repo.delete_branch("main")
    assert [snapshot.id for snapshot in repo.orphans()] == [first.id]
    again = repo.save(training_state(2))
    assert again.parents == ()
    assert packs_of(repo)


def test_a_branch_deleted_by_another_handle_is_a_conflict(repo: Repository) -> None:
    first = repo.save(training_state(1))
    with castore.open(repo.path) as other:
        other.delete_branch("main")
    with pytest.raises(ConflictError) as caught:
        repo.save(training_state(2))
    assert (caught.value.expected_id, caught.value.found_id) == (first.id, None)
    assert "no branch" in str(caught.value)
    repo.branch("main", at=caught.value.snapshot_id)
    assert_same(repo.load("main"), training_state(2))
    assert repo.save(training_state(3)).parents == (caught.value.snapshot_id,)


def test_a_repository_on_a_directory_that_moves_is_lost_and_found(tmp_path: Path) -> None:
    """An unmounted disk must not be filled below its mount point."""
    repo = castore.init(tmp_path / "store")
    repo.save(training_state(1))
    (tmp_path / "store").rename(tmp_path / "moved")
    with pytest.raises(castore.CastoreError):
        repo.save(training_state(2))
    assert not (tmp_path / "store").exists() or not list((tmp_path / "store").rglob("*.pack"))
    assert isinstance(repo.handle.backend, LocalBackend)
    with castore.open(tmp_path / "moved") as moved:
        assert_same(moved.load("main"), training_state(1))
