"""Asynchronous saves: the state at the call, in order, every error heard once, and nothing lost but what is in flight.

A gate in the backend holds the writing thread wherever a test wants it; processes that are killed are real. What must
be the same with a worker process (test_worker.py) is tried with both.
"""

from __future__ import annotations

import gc
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import castore
import tests.tensors.quiet  # noqa: F401
from castore.api import Repository
from castore.backend import MemoryBackend
from castore.backend.base import Backend
from castore.checkpoint import worker
from castore.checkpoint.background import BackgroundSaver, PendingSave
from castore.checkpoint.plan import hash_state
from castore.checkpoint.request import SaveRequest
from castore.checkpoint.stage import StagedState
from castore.errors import (
    ConflictError,
    NoSpaceError,
    SlowSaveWarning,
    StaleSaveWarning,
    StorageError,
    UnsupportedLeafError,
    UsageError,
)
from castore.format.identity import state_id
from castore.options import GRID_BYTES
from castore.tensors import FlatState, flatten
from tests.checkpoint.killing import Report, fork, until
from tests.checkpoint.repositories import HookedBackend, create_on, held_leases, open_on
from tests.checkpoint.states import assert_same, training_state
from tests.suites.fault_backend import Fault, FaultBackend
from tests.suites.forked import in_child

State = dict[str, Any]
WAIT_S = 30.0


def dense(step: int, *, items: int = 300_000) -> State:
    """Every element moves at every step."""
    weights = np.random.default_rng(0).standard_normal(items, dtype=np.float32)
    return {"w": weights * np.float32(1 + 1e-5 * step), "step": step, "tail": weights[:300] + np.float32(step)}


def id_of_state(state: Any, repo: Repository) -> str:
    hasher = repo.handle.hasher
    return state_id(hasher, hash_state(flatten(state), hasher, progress=lambda _: None).entries)


class Gate:
    """Holds the writing thread before a backend call until it is opened."""

    def __init__(self, operation: str = "claim") -> None:
        self._operation = operation
        self._open = threading.Event()
        self.reached = threading.Event()
        self.passed = 0

    def __call__(self, operation: str, name: str) -> None:
        if operation == self._operation and threading.current_thread().name == "castore-save":
            self.reached.set()
            assert self._open.wait(WAIT_S), "nobody opened the gate"
            self.passed += 1

    def open(self) -> None:
        self._open.set()

    def close(self) -> None:
        self.reached.clear()
        self._open.clear()


@contextmanager
def gated(inner: Backend | None = None, *, operation: str = "claim") -> Iterator[tuple[Repository, Gate]]:
    """A repository whose background saves stop before their lease, or another call."""
    backend = HookedBackend(inner or create_on(MemoryBackend()).handle.backend)
    gate = Gate(operation)
    repo = open_on(backend)
    backend.hook = gate
    try:
        yield repo, gate
    finally:
        gate.open()
        with suppress(Exception):
            repo.wait()


class WorkerGate:
    """Holds the worker process of a repository, before its next save."""

    def __init__(self, repo: Repository) -> None:
        self._repo = repo
        self.reached = threading.Event()
        self.reached.set()
        repo.save_async({"start": "the worker"}, branch="warm-up").result(WAIT_S)
        self.close()

    def open(self) -> None:
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        self._signal(signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        process = self._repo._worker._process if self._repo._worker is not None else None
        if process is not None and process.is_alive:
            os.kill(process._process.pid, number)


MakeRepository = Callable[[], Repository]
MakeGated = Callable[[], AbstractContextManager[tuple[Repository, Any]]]


@pytest.fixture(params=["thread", "process"])
def worker_process(request: Any, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(worker, "WORKER_NICENESS", 0)  # a busy machine would leave it nothing
    return bool(request.param == "process")


@pytest.fixture
def fresh(worker_process: bool, tmp_path: Path) -> Iterator[MakeRepository]:
    """Makes empty repositories."""
    opened: list[Repository] = []

    def make() -> Repository:
        if worker_process:
            opened.append(castore.open(tmp_path / f"{len(opened)}", create=True, worker_process=True))
        else:
            opened.append(create_on(MemoryBackend()))
        return opened[-1]

    yield make
    for repo in opened:
        with suppress(Exception):
            repo.close()


@pytest.fixture
def held(worker_process: bool, fresh: MakeRepository) -> MakeGated:
    """Makes repositories whose background saves wait until the gate is opened."""

    @contextmanager
    def make() -> Iterator[tuple[Repository, WorkerGate]]:
        repo = fresh()
        gate = WorkerGate(repo)
        try:
            yield repo, gate
        finally:
            gate.open()

    return make if worker_process else gated


def failing(
    error: Exception, *, operation: str = "create_stream", times: int = 1, after: threading.Event | None = None
) -> tuple[Repository, HookedBackend]:
    """A repository of which some backend calls fail, each not before `after` is set."""
    left = times

    def hook(found: str, name: str) -> None:
        nonlocal left
        if found == operation and left > 0 and threading.current_thread().name == "castore-save":
            left -= 1
            if after is not None:
                assert after.wait(WAIT_S)
            raise error

    backend = HookedBackend(create_on(MemoryBackend()).handle.backend)
    repo = open_on(backend)
    repo.save(dense(0), step=0)
    backend.hook = hook
    return repo, backend


# ---- the state at the call ---------------------------------------------------------------------------------------


def live_state() -> State:
    import torch

    torch.manual_seed(0)
    weights = torch.randn(400, 900)
    array = np.random.default_rng(0).standard_normal((600, 700))
    return {
        "plain": weights,
        "transposed": torch.randn(300, 500).t(),
        "strided": torch.randn(1000, 400)[::3, 1::2],
        "expanded": torch.randn(1, 700).expand(500, 700),
        "half": torch.randn(600_000).bfloat16(),
        "conj": torch.randn(300, 200, dtype=torch.complex64).conj(),
        "small": torch.randn(5),
        "scalar": torch.tensor(1.5),
        "view": weights[10:20],
        "tied": weights,
        "parameter": torch.nn.Parameter(torch.randn(300, 300)),
        "array": array,
        "fortran": np.asfortranarray(array),
        "reversed": array[::-2, ::3],
        "big-endian": np.arange(100_000, dtype=">f4"),
        "bytes": bytearray(b"abc" * 1000),
        "list": [1, 2.5, "text", None, {"deep": np.arange(1000)}],
        "note": "text " * 1000,
    }


def spoil(value: Any) -> None:
    """Change everything that can be changed in place."""
    import torch

    if isinstance(value, torch.Tensor):
        with torch.no_grad():
            if value.numel() and value.untyped_storage().nbytes():
                target = value.resolve_conj() if not value.is_conj() else torch.conj(value)
                torch.as_strided(target, (target.untyped_storage().nbytes() // target.element_size(),), (1,), 0).fill_(
                    7
                )
    elif isinstance(value, np.ndarray):
        value[...] = 7
    elif isinstance(value, bytearray):
        value[:] = b"!" * len(value)
    elif isinstance(value, dict):
        for item in value.values():
            spoil(item)
        value["new"] = 1
    elif isinstance(value, list):
        for item in value:
            spoil(item)
        value.append("more")


def test_what_changes_after_the_call_never_reaches_disk(held: MakeGated) -> None:
    with held() as (repo, gate):
        state = live_state()
        before = id_of_state(state, repo)
        metadata, metrics, tags = {"deep": [1, 2]}, {"loss": 1.0}, ["first"]
        pending = repo.save_async(state, step=1, metadata=metadata, metrics=metrics, tags=tags)
        assert gate.reached.wait(WAIT_S)
        spoil(state)
        metadata["deep"].append(3)
        metrics["loss"] = 2.0
        tags.append("second")
        assert id_of_state(state, repo) != before
        gate.open()
        snapshot = pending.result(WAIT_S)
        assert snapshot.state_id == before
        assert id_of_state(repo.load("main"), repo) == before
        assert (snapshot.metadata, snapshot.metrics) == ({"deep": [1, 2]}, {"loss": 1.0})
        assert [tag.name for tag in repo.tags()] == ["first"]


def test_staged_and_direct_saves_are_the_same(fresh: MakeRepository) -> None:
    repo = fresh()
    states = [live_state(), {}, {"empty": np.zeros((0, 3))}, [1, 2], 3.5, dense(3), training_state(4)]
    for number, state in enumerate(states):
        direct = repo.save(state, branch=f"direct-{number}")
        staged = repo.save_async(state, branch=f"staged-{number}").result(WAIT_S)
        assert staged.state_id == direct.state_id
        assert staged.new_bytes == 0
        assert staged.raw_bytes == direct.raw_bytes
        assert len(staged.leaves) == len(direct.leaves)


def test_nothing_of_the_live_state_is_kept_alive(held: MakeGated) -> None:
    import weakref

    import torch

    with held() as (repo, gate):
        state = {"torch": torch.randn(1000, 500), "numpy": np.random.default_rng(0).standard_normal(300_000)}
        alive = [weakref.ref(value) for value in state.values()]
        pending = repo.save_async(state, step=1)
        assert gate.reached.wait(WAIT_S)
        del state
        gc.collect()
        assert [reference() for reference in alive] == [None, None]
        gate.open()
        pending.result(WAIT_S)


def test_buffers_are_used_again_and_no_state_gets_into_another(fresh: MakeRepository) -> None:
    """More saves than slots, sizes that change, two branches in turns, through one pool that the bases share."""
    repo = fresh()
    repo.limit_async(in_flight=3)
    sizes = random.Random(0)
    expected: list[tuple[PendingSave, str]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowSaveWarning)
        state = dense(0)
        for step in range(60):
            state["w"] += np.float32(1e-4)
            items = sizes.choice([0, 10, 40_000, 300_000, 900_000])
            state["extra"] = np.full(items, step, np.float32)
            wanted = id_of_state(state, repo)
            expected.append((repo.save_async(state, branch=f"b{step % 2}", step=step), wanted))
            state["extra"][...] = -1
    for pending, wanted in expected:
        snapshot = pending.result(WAIT_S)
        assert snapshot.state_id == wanted
        assert id_of_state(repo.load(snapshot.id), repo) == wanted
    assert repo.verify(data=True).ok
    assert [snapshot.step for snapshot in repo.log("b0")] == list(range(58, -1, -2))


def test_memory_is_given_back_after_success_and_failure() -> None:
    repo, _ = failing(StorageError("broken"), times=3)
    slabs: list[int] = []

    def make_slab(length: int) -> Any:
        slabs.append(length)
        return np.empty(length, np.uint8)

    repo.handle.pool._make_slab = make_slab
    for step in range(1, 30):
        pending = repo.save_async(dense(step), step=step)
        with suppress(StorageError):
            pending.result(WAIT_S)
    assert len(slabs) <= 1


def test_a_state_that_cannot_be_saved_is_refused_at_the_call(fresh: MakeRepository) -> None:
    repo = fresh()
    with pytest.raises(UnsupportedLeafError):
        repo.save_async({"what": object()})
    with pytest.raises(UsageError):
        repo.save_async({}, step=1.5)  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        repo.save_async({}, branch="..")
    assert repo.save_async({"fine": 1}).result(WAIT_S).parents == ()


# ---- the handle of a save ----------------------------------------------------------------------------------------


def test_done_is_said_only_of_what_is_durable() -> None:
    """At every write of a save: not done before the branch has moved."""
    backend = HookedBackend(create_on(MemoryBackend()).handle.backend)
    repo = open_on(backend)
    said: list[tuple[str, bool]] = []
    pending: list[PendingSave] = []
    staged = threading.Event()

    def hook(operation: str, name: str) -> None:
        if threading.current_thread().name == "castore-save":
            assert staged.wait(WAIT_S)
            said.append((operation, pending[0].done()))

    backend.hook = hook
    pending.append(repo.save_async(dense(1)))
    assert "running" in repr(pending[0])
    staged.set()
    snapshot = pending[0].result(WAIT_S)
    assert pending[0].done()
    assert "durable" in repr(pending[0])
    assert said
    assert not any(done for _, done in said)
    assert open_on(backend.inner).snapshot("main").id == snapshot.id
    assert pending[0].result() is snapshot


def test_result_waits_as_long_as_it_was_told(held: MakeGated) -> None:
    with held() as (repo, gate):
        pending = repo.save_async(dense(1))
        begun = time.monotonic()
        with pytest.raises(TimeoutError, match=r"not durable after 0\.05 s"):
            pending.result(0.05)
        with pytest.raises(TimeoutError):
            pending.result(0)
        assert 0.04 < time.monotonic() - begun < 5
        assert not pending.done()
        gate.open()
        assert pending.result(WAIT_S).step is None


def test_progress_rises_to_all_of_it() -> None:
    with gated(operation="create_stream") as (repo, gate):
        pending = repo.save_async(dense(1))
        assert gate.reached.wait(WAIT_S)
        total = pending.progress().total_bytes
        assert 0 < pending.progress().done_bytes <= total
        assert not pending.done()
        gate.open()
        pending.result(WAIT_S)
        assert pending.progress().done_bytes == pending.progress().total_bytes == total


def test_a_result_may_be_asked_for_from_many_threads(held: MakeGated) -> None:
    with held() as (repo, gate):
        pending = repo.save_async(dense(1))
        with ThreadPoolExecutor(8) as threads:
            futures = [threads.submit(pending.result, WAIT_S) for _ in range(8)]
            gate.open()
            assert len({future.result().id for future in futures}) == 1


# ---- order -------------------------------------------------------------------------------------------------------


def test_saves_are_committed_in_the_order_of_the_calls(fresh: MakeRepository) -> None:
    repo = fresh()
    repo.limit_async(in_flight=50)
    pending = [repo.save_async(dense(step, items=5_000), branch=f"b{step % 3}", step=step) for step in range(30)]
    times = [save.result(WAIT_S).created_at for save in pending]
    assert times == sorted(times)
    for number in range(3):
        assert [snapshot.step for snapshot in repo.log(f"b{number}")] == list(range(27 + number, -1, -3))


def test_a_synchronous_save_comes_after_what_was_asked_for_before(held: MakeGated) -> None:
    with held() as (repo, gate):
        first = repo.save_async(dense(1), step=1)
        threading.Timer(0.1, gate.open).start()
        second = repo.save(dense(2), step=2)
        assert first.done()
        assert second.parents == (first.result(0).id,)


def test_wait_and_close_wait(held: MakeGated) -> None:
    for end in (Repository.wait, Repository.close):
        with held() as (repo, gate):
            pending = repo.save_async(dense(1), step=1)
            threading.Timer(0.1, gate.open).start()
            end(repo)
            assert pending.done()
            assert repo.save_async(dense(2), step=2).result(WAIT_S).parents == (pending.result(0).id,)


def test_a_load_beside_a_save_sees_the_state_before_or_after() -> None:
    with gated(operation="compare_and_swap") as (repo, gate):
        gate.open()
        repo.save_async(dense(1), step=1).result(WAIT_S)
        gate.close()
        pending = repo.save_async(dense(2), step=2)
        assert gate.reached.wait(WAIT_S)
        assert_same(repo.load("main"), dense(1))
        gate.open()
        pending.result(WAIT_S)
        assert_same(repo.load("main"), dense(2))
        assert repo.save(dense(3)).parents == (pending.result(0).id,)


def test_an_idle_handle_keeps_no_thread(tmp_path: Path, worker_process: bool) -> None:
    with castore.open(tmp_path / "store", create=True, worker_process=worker_process) as repo:
        for step in range(3):
            repo.save_async(dense(step, items=100), step=step).result(WAIT_S)
            until(lambda: not any(thread.name == "castore-save" for thread in threading.enumerate()))


def test_a_repository_that_nobody_holds_on_to_still_finishes(tmp_path: Path, worker_process: bool) -> None:
    pending = castore.open(tmp_path / "store", create=True, worker_process=worker_process).save_async(dense(1), step=1)
    gc.collect()
    assert pending.result(WAIT_S).step == 1
    with castore.open(tmp_path / "store") as repo:
        assert_same(repo.load("main"), dense(1))


# ---- errors ------------------------------------------------------------------------------------------------------


def no_wait(repo: Repository) -> None:
    repo.save_async(dense(7), step=7)


HEARD_BY: dict[str, Callable[[Repository], object]] = {
    "save": lambda repo: repo.save(dense(7), step=7),
    "save_async": no_wait,
    "wait": Repository.wait,
    "close": Repository.close,
}


@pytest.mark.parametrize("heard_by", HEARD_BY)
@pytest.mark.parametrize("operation", ["claim", "create_stream", "put_if_absent", "compare_and_swap"])
def test_an_error_nobody_asked_for_is_raised_once(heard_by: str, operation: str) -> None:
    repo, _ = failing(StorageError("the disk is gone"), operation=operation)
    head = repo.snapshot("main").id
    pending = repo.save_async(dense(1), step=1)
    until(pending.done)
    assert repo.snapshot("main").id == head
    with pytest.raises(StorageError, match="the disk is gone") as caught:
        HEARD_BY[heard_by](repo)
    assert any("step 1 " in note for note in caught.value.__notes__)
    assert "failed" in repr(pending)
    repo.wait()
    following = repo.save(dense(2), step=2)
    assert following.parents == (head,)
    repo.close()
    assert held_leases(repo.handle.backend) == []


def test_an_error_that_was_asked_for_is_not_raised_again() -> None:
    repo, _ = failing(NoSpaceError("full"))
    head = repo.snapshot("main").id
    pending = repo.save_async(dense(1), step=1)
    with pytest.raises(NoSpaceError, match="full"):
        pending.result(WAIT_S)
    assert repo.save_async(dense(2), step=2).result(WAIT_S).parents == (head,)
    repo.wait()
    repo.close()
    with pytest.raises(NoSpaceError):
        pending.result()


def test_a_save_that_failed_leaves_the_branch_and_the_next_continues_from_there() -> None:
    """Queued behind one that fails: it is not dragged along."""
    queued = threading.Event()
    repo, _ = failing(StorageError("once"), after=queued)
    head = repo.snapshot("main").id
    first, second = (repo.save_async(dense(step), step=step) for step in (1, 2))
    queued.set()
    assert second.result(WAIT_S).parents == (head,)
    with pytest.raises(StorageError):
        first.result(WAIT_S)
    assert_same(repo.load("main"), dense(2))
    assert repo.orphans() == []
    repo.close()


def test_an_error_that_nobody_can_ask_for_any_more_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """The repository and the pending save are dropped; frames of the traceback hold both until the next collection."""

    def save_and_drop() -> None:
        repo, _ = failing(StorageError("the disk is gone"), times=2)
        until(repo.save_async(dense(1), step=1).done)
        until(lambda: not any(thread.name == "castore-save" for thread in threading.enumerate()))
        gc.collect()
        assert caplog.records == [], "the repository can still be asked"

    gc.collect()
    caplog.clear()  # what tests before this one left
    save_and_drop()
    gc.collect()
    (record,) = caplog.records
    assert "nobody asked for its result" in record.getMessage()
    assert record.exc_info is not None
    assert "the disk is gone" in str(record.exc_info[1])


def test_an_error_that_was_raised_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    gc.collect()
    caplog.clear()
    repo, _ = failing(StorageError("the disk is gone"))
    pending = repo.save_async(dense(1), step=1)
    with pytest.raises(StorageError):
        pending.result(WAIT_S)
    repo.close()
    del pending, repo, _
    gc.collect()
    assert caplog.records == []


def test_of_several_errors_none_is_forgotten() -> None:
    """The first is raised; the others were dropped with it."""
    go = threading.Event()

    def carry(staged: Any, request: Any, progress: Any) -> Any:
        go.wait(WAIT_S)
        raise StorageError("the disk is gone")

    saver = BackgroundSaver(carry)
    for step in (1, 2):
        saver.submit(
            saver.reserve(0, step), StagedState(lambda: FlatState((), ()), 0, lambda: None), SaveRequest(step=step)
        )
    go.set()
    saver.wait()
    with pytest.raises(StorageError) as caught:
        saver.raise_failure()
    notes = " ".join(caught.value.__notes__)
    assert "step 1 " in notes
    assert "step 2:" in notes
    saver.raise_failure()


def test_errors_that_are_no_ordinary_ones_are_heard_too() -> None:
    for error in (MemoryError("no memory"), KeyboardInterrupt("not here"), RecursionError("deep")):
        repo, _ = failing(error)  # type: ignore[arg-type]
        pending = repo.save_async(dense(1), step=1)
        with pytest.raises(type(error)):
            pending.result(WAIT_S)
        repo.save_async(dense(2), step=2).result(WAIT_S)
        repo.close()


def test_a_thread_that_cannot_be_started_is_an_error_and_not_a_hang(
    monkeypatch: pytest.MonkeyPatch, fresh: MakeRepository
) -> None:
    """A container that allows no more threads."""
    repo = fresh()

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="can't start"):
        patch.setattr(threading.Thread, "start", refuse)
        repo.save_async(dense(1), step=1)
    ended = threading.Event()
    waiter = threading.Thread(target=lambda: (repo.wait(), ended.set()), daemon=True)
    waiter.start()
    assert ended.wait(5), "wait() hangs"
    assert repo.save_async(dense(2), step=2).result(WAIT_S).step == 2
    assert [snapshot.step for snapshot in repo.log("main")] == [2]


def test_a_conflict_in_the_background_is_heard_and_nothing_is_lost(held: MakeGated) -> None:
    with held() as (repo, gate):
        gate.open()
        first = repo.save_async(dense(1), step=1).result(WAIT_S)
        gate.close()
        pending = repo.save_async(dense(2), step=2)
        with open_on(repo.handle.backend) as other:
            winner = other.save(dense(3), step=3)
        gate.open()
        with pytest.raises(ConflictError) as caught:
            pending.result(WAIT_S)
        error = caught.value
        assert (error.expected_id, error.found_id) == (first.id, winner.id)
        assert_same(repo.load(error.snapshot_id), dense(2))
        with pytest.raises(ConflictError):
            repo.save_async(dense(4), step=4).result(WAIT_S)
        assert repo.save_async(dense(5), step=5, parent="main").result(WAIT_S).parents == (winner.id,)
        repo.close()


def test_two_handles_on_one_branch_lose_nothing() -> None:
    backend = create_on(MemoryBackend()).handle.backend
    open_on(backend).save(dense(0), step=0)
    handles = [open_on(backend), open_on(backend)]
    kept: list[str] = []
    for step in range(1, 11):
        pending = [
            handle.save_async(dense(step, items=5000), step=step, parent="main" if step % 2 else None)
            for handle in handles
        ]
        for save in pending:
            try:
                kept.append(save.result(WAIT_S).id)
            except ConflictError as error:
                kept.append(error.snapshot_id)
    assert len(set(kept)) == 20
    fresh = open_on(backend)
    assert {snapshot.id for snapshot in fresh.snapshots()} >= set(kept)
    on_branch = {snapshot.id for snapshot in fresh.log("main")}
    assert on_branch | {snapshot.id for snapshot in fresh.orphans()} >= set(kept)
    for snapshot in fresh.snapshots():
        assert id_of_state(fresh.load(snapshot.id), fresh) == snapshot.state_id


# ---- failures in the writing thread ------------------------------------------------------------------------------


def fault_calls() -> int:
    faulty = FaultBackend(prepared())
    open_on(faulty).save_async(training_state(3), step=3, tags=("t",)).result(WAIT_S)
    return len(faulty.calls)


def prepared() -> MemoryBackend:
    backend = MemoryBackend()
    repo = create_on(backend)
    for step in (1, 2):
        repo.save(training_state(step), step=step)
    return backend


@pytest.mark.filterwarnings("ignore::castore.errors.PolicyWarning")  # the look at the policy may fail, too
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_disk_error_at_any_call_is_heard_once_and_the_next_save_works(moment: Any) -> None:
    import errno

    committed = 0
    for number in range(fault_calls()):
        faulty = FaultBackend(prepared(), Fault(number, moment, errno.EIO))
        repo = open_on(faulty)
        head = open_on(faulty.inner).snapshot("main").id
        pending = repo.save_async(training_state(3), step=3, tags=("t",))
        try:
            head = pending.result(WAIT_S).id
        except StorageError as error:
            moved = open_on(faulty.inner).snapshot("main").id
            assert (moved != head) == any("has moved" in note for note in getattr(error, "__notes__", ()))
            head = moved
        committed += open_on(faulty.inner).snapshot("main").step == 3
        faulty.fault = None
        following = repo.save_async(training_state(4), step=4)
        assert following.result(WAIT_S).parents == (head,)
        fresh = open_on(faulty.inner)
        assert [snapshot.step for snapshot in fresh.log("main")] in ([4, 3, 2, 1], [4, 2, 1])
        for snapshot in fresh.snapshots():
            assert_same(fresh.load(snapshot.id), training_state(snapshot.step or 0))
        repo.close()
    assert committed


def test_a_crash_at_any_call_leaves_the_history(tmp_path: Path) -> None:
    for number in range(fault_calls()):
        faulty = FaultBackend(prepared(), Fault(number))
        pending = open_on(faulty).save_async(training_state(3), step=3, tags=("t",))
        until(pending.done)
        fresh = open_on(faulty.restore_in_memory(unsynced=("kept", "lost", "torn")[number % 3]))  # type: ignore[arg-type]
        steps = [snapshot.step for snapshot in fresh.log("main")]
        assert steps in ([3, 2, 1], [2, 1])
        for snapshot in fresh.snapshots():
            assert_same(fresh.load(snapshot.id), training_state(snapshot.step or 0))
        following = fresh.save_async(training_state(4), step=4).result(WAIT_S)
        assert fresh.snapshot(following.parents[0]).step == steps[0]


# ---- back-pressure -----------------------------------------------------------------------------------------------


def open_when_waiting(repo: Repository, gate: Any) -> threading.Thread:
    """A thread that opens the gate as soon as a call waits, and not before; were none to wait, it would fail."""

    def run() -> None:
        until(lambda: repo._saver is not None and repo._saver._warned)
        gate.open()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_over_the_limit_the_call_waits_and_says_so_once(held: MakeGated) -> None:
    with held() as (repo, gate):
        repo.limit_async(in_flight=2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pending = [repo.save_async(dense(step), step=step) for step in (1, 2)]
        assert gate.reached.wait(WAIT_S)
        opener = open_when_waiting(repo, gate)
        with pytest.warns(SlowSaveWarning, match=r"save_async waits: 2 saves .*limit_async") as caught:
            pending.append(repo.save_async(dense(3), step=3))
        opener.join()
        assert pending[0].done()
        assert len(caught) == 1
        assert caught[0].filename == __file__, "it names the line that saved"
        repo.wait()
        gate.close()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            threading.Timer(0.1, gate.open).start()
            pending += [repo.save_async(dense(step), step=step) for step in (4, 5, 6, 7)]
        assert [save.result(WAIT_S).step for save in pending] == [1, 2, 3, 4, 5, 6, 7]


def test_bytes_are_limited_too_and_a_save_that_is_too_large_goes_alone(held: MakeGated) -> None:
    state = dense(0)
    with held() as (repo, gate), warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowSaveWarning)
        repo.limit_async(in_flight=10, staged_bytes=5 * GRID_BYTES)  # two slots each
        pending = [repo.save_async(state, step=step) for step in (1, 2)]
        opener = open_when_waiting(repo, gate)
        pending.append(repo.save_async(state, step=3))
        opener.join()
        repo.limit_async(in_flight=10, staged_bytes=0)
        for step in (4, 5):
            pending.append(repo.save_async(state, step=step))
            assert all(save.done() for save in pending[:-1])
        assert [save.result(WAIT_S).step for save in pending] == [1, 2, 3, 4, 5]


def test_what_is_staged_counts_as_what_it_occupies() -> None:
    """A leaf that takes a whole slot of 1 MiB counted as its own 70 kB: ten saves took fifteen times the budget."""
    state = {str(number): np.full(70_000, number, np.uint8) for number in range(20)}
    with gated() as (repo, gate), warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowSaveWarning)
        repo.limit_async(in_flight=100, staged_bytes=30 * GRID_BYTES)
        threading.Timer(0.3, gate.open).start()
        for step in range(4):
            repo.save_async({**state, "step": step}, step=None)
        repo.wait()
        slots = len(repo.handle.pool._free)
        assert slots * GRID_BYTES <= 64 * GRID_BYTES


def test_raising_the_limit_lets_a_waiting_call_go_on() -> None:
    with gated() as (repo, gate), warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowSaveWarning)
        repo.limit_async(in_flight=1)
        repo.save_async(dense(1), step=1)
        threading.Timer(0.1, lambda: repo.limit_async(in_flight=2)).start()
        repo.save_async(dense(2), step=2)
        assert not gate.passed


@pytest.mark.parametrize("limits", [{"in_flight": 0}, {"in_flight": -1}, {"staged_bytes": -1}])
def test_limits_that_make_no_sense_are_refused(limits: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        create_on(MemoryBackend()).limit_async(**limits)


def test_threads_that_save_at_once_stay_within_the_limit(held: MakeGated) -> None:
    """Each found room before the other was counted."""
    with held() as (repo, gate), warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowSaveWarning)
        repo.limit_async(in_flight=2)
        most = 0
        stop = threading.Event()

        def watch() -> None:
            nonlocal most
            while not stop.is_set():
                most = max(most, len(repo._background()._in_flight))
                time.sleep(0.001)

        watcher = threading.Thread(target=watch)
        watcher.start()
        with ThreadPoolExecutor(8) as threads:
            futures = [
                threads.submit(repo.save_async, dense(number), branch=f"b{number}", step=number) for number in range(8)
            ]
            threading.Timer(0.5, gate.open).start()
            for future in futures:
                future.result().result(WAIT_S)
        stop.set()
        watcher.join()
        assert most <= 2


# ---- the stale state ---------------------------------------------------------------------------------------------

shown = pytest.mark.filterwarnings("always::castore.errors.StaleSaveWarning")


@shown
def test_a_step_that_moved_without_its_tensors_is_named(fresh: MakeRepository) -> None:
    repo = fresh()
    first = repo.save(dense(1), step=1)
    with pytest.warns(
        StaleSaveWarning, match=rf"step 2: all 2 tensors .* step 1 \(snapshot {first.id[:12]}\)"
    ) as caught:
        repo.save({**dense(1), "step": 2}, step=2)
    assert caught[0].filename == __file__, "it names the line that saved"
    with pytest.warns(StaleSaveWarning, match="step 3"):
        repo.save_async(dense(1), step=3).result(WAIT_S)


@shown
@pytest.mark.parametrize(
    ("state", "step"),
    [
        (dense(1), 1),  # the same step
        (dense(1), None),  # no step
        (dense(2), 2),  # all moved
        ({**dense(1), "tail": dense(2)["tail"]}, 2),  # one moved
        ({**dense(1), "new": np.arange(1000.0)}, 2),  # one came
        ({"w": dense(1)["w"]}, 2),  # one went
        ({"w": dense(1)["w"], "tail": dense(1)["tail"].astype("f8")}, 2),
        ({"text": "no tensors"}, 2),
        ({}, 2),
    ],
)
def test_otherwise_nothing_is_said(state: State, step: int | None) -> None:
    repo = create_on(MemoryBackend())
    repo.save(dense(1), step=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        repo.save(state, step=step)
        repo.save_async({"text": "no tensors"}, branch="other", step=1).result(WAIT_S)
        repo.save_async({"text": "no tensors"}, branch="other", step=2).result(WAIT_S)


@shown
def test_a_stale_save_that_is_made_an_error_has_been_saved_all_the_same(fresh: MakeRepository) -> None:
    """Whoever turns warnings into errors would otherwise lose the save over a remark."""
    repo = fresh()
    repo.save(dense(1), step=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", StaleSaveWarning)
        for step in (2, 3):
            with pytest.raises(StaleSaveWarning) as caught:
                _ = repo.save(dense(1), step=2) if step == 2 else repo.save_async(dense(1), step=3).result(WAIT_S)
            head = repo.snapshot("main")
            assert head.step == step
            assert caught.value.__notes__ == [f"branch 'main' has moved to the new snapshot {head.id[:12]}"]


@shown
def test_torch_states_are_compared_bit_for_bit() -> None:
    import torch

    repo = create_on(MemoryBackend())
    state = {"w": torch.zeros(1000), "momentum": torch.ones(1000)}
    repo.save(state, step=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state["w"][5] = -0.0
        repo.save(state, step=2)
    with pytest.warns(StaleSaveWarning):
        repo.save(state, step=3)


# ---- pickle and fork ---------------------------------------------------------------------------------------------


def test_a_repository_pickles_whether_its_saver_is_idle_or_busy(tmp_path: Path, worker_process: bool) -> None:
    with castore.open(tmp_path / "store", create=True, worker_process=worker_process) as repo:
        repo.save_async(dense(0), step=0).result(WAIT_S)
        idle = pickle.loads(pickle.dumps(repo))
        assert_same(idle.load("main"), dense(0))
        pending = repo.save_async(dense(1), step=1)
        busy = pickle.loads(pickle.dumps(repo))
        busy.wait()  # has no saves of its own
        pending.result(WAIT_S)
        assert_same(busy.load("main"), dense(1))
        assert busy.save_async(dense(2), step=2).result(WAIT_S).step == 2
        busy.close()
        idle.close()


@pytest.mark.parametrize("moment", ["claim", "create_stream", "put_if_absent", "compare_and_swap"])
def test_a_fork_with_saves_in_flight_hangs_nobody(tmp_path: Path, moment: str) -> None:
    path = tmp_path / "store"
    castore.init(path).close()
    inner = castore.open(path)
    with gated(inner.handle.backend, operation=moment) as (repo, gate):
        gate.open()
        repo.save_async(dense(0), step=0).result(WAIT_S)
        gate.close()
        pending = [repo.save_async(dense(step), step=step) for step in (1, 2)]
        assert gate.reached.wait(WAIT_S)

        def child() -> tuple[str, bool]:
            gate.open()
            repo.wait()
            done = pending[0].done()
            repo.save(dense(10), branch="child", step=10)
            snapshot = repo.save_async(dense(11), branch="child", step=11).result(WAIT_S)
            repo.close()
            threading._shutdown()  # type: ignore[attr-defined]
            return snapshot.id, done

        snapshot_id, done = in_child(child, timeout_s=WAIT_S)
        assert not done
        gate.open()
        assert [save.result(WAIT_S).step for save in pending] == [1, 2]
    with castore.open(path) as fresh:
        assert [snapshot.step for snapshot in fresh.log("main")] == [2, 1, 0]
        assert_same(fresh.load("main"), dense(2))
        assert_same(fresh.load(snapshot_id), dense(11))
        assert fresh.verify(data=True).ok


def test_a_child_that_is_forked_under_any_lock_does_not_hang(tmp_path: Path) -> None:
    """Threads of the parent hold the saver's, the pool's and the handle's lock when a data loader forks."""
    repo = castore.init(tmp_path / "store")
    for step in range(2):
        repo.save_async(dense(step), step=step).result(WAIT_S)
    saver, handle = repo._background(), repo.handle
    until(lambda: saver._thread is None)
    locks: list[Any] = [saver._changed, handle._lock, handle.pool._lock, handle.bases._lock, repo._saver_lock]

    def child() -> None:
        repo.save_async(dense(5), branch="child", step=5).result(WAIT_S)
        repo.wait()
        repo.close()
        threading._shutdown()  # type: ignore[attr-defined]

    for lock in locks:
        held, ended = threading.Event(), threading.Event()

        def hold(lock: Any = lock, held: threading.Event = held, ended: threading.Event = ended) -> None:
            with lock:
                held.set()
                ended.wait(WAIT_S)

        holder = threading.Thread(target=hold)
        holder.start()
        assert held.wait(WAIT_S)
        try:
            in_child(child, timeout_s=8)
        finally:
            ended.set()
            holder.join()
        repo.delete_branch("child")
    repo.close()


def test_a_child_hears_nothing_of_its_parents_failures() -> None:
    repo, _ = failing(StorageError("the disk is gone"))
    until(repo.save_async(dense(1), step=1).done)

    def child() -> int:
        repo.wait()
        return repo.save_async(dense(2), branch="child", step=2).result(WAIT_S).step or 0

    assert in_child(child) == 2
    with pytest.raises(StorageError):
        repo.close()


# ---- the end of the process --------------------------------------------------------------------------------------

PROGRAM = """
import sys, threading, warnings
import numpy as np
import castore
from castore.errors import StorageError

def state(step):
    weights = np.random.default_rng(0).standard_normal(300_000, dtype=np.float32)
    return {{"w": weights * np.float32(1 + 1e-5 * step), "step": step}}

repo = castore.open({path!r}, create=True, worker_process={worker_process})
{body}
"""


def run_program(path: Path, body: str, *options: str, worker_process: bool = False) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(path=str(path), body=body, worker_process=worker_process)
    root = Path(castore.__file__).parent.parent
    return subprocess.run(
        [sys.executable, *options, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": str(root)},
    )


ENDINGS = {
    "the end": "",
    "sys.exit": "sys.exit(3)",
    "an error": "raise ValueError('of the program')",
    "a thread": "threading.Thread(target=lambda: repo.save_async(state(4), step=4)).start()",
    "closed": "repo.close()",
    "dropped": "del repo",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_interpreter_waits_for_durability(tmp_path: Path, ending: str, worker_process: bool) -> None:
    saves = "repo.limit_async(in_flight=10)\nfor step in range(4): repo.save_async(state(step), step=step)\n"
    done = run_program(tmp_path / "store", saves + ENDINGS[ending], "-W", "error", worker_process=worker_process)
    code = {"sys.exit": 3, "an error": 1}.get(ending, 0)
    assert done.returncode == code, done.stderr
    assert ("of the program" in done.stderr) if ending == "an error" else not done.stderr, done.stderr
    with castore.open(tmp_path / "store") as repo:
        steps = [snapshot.step for snapshot in repo.log("main")]
        assert steps == ([4, 3, 2, 1, 0] if ending == "a thread" else [3, 2, 1, 0])
        assert repo.verify(data=True).ok


FAILS = """
import threading
called = threading.Event()
def refuse(name):
    called.wait()  # else a later call would raise what nobody has asked for
    raise StorageError("the disk is gone")
good = castore.open({good!r}, create=True)
repo.handle.backend.create_stream = refuse
for number, store in enumerate({order}):
    store.save_async(state(number), step=number)
called.set()
"""


@pytest.mark.parametrize("options", [(), ("-W", "error"), ("-W", "ignore")])
def test_a_failure_that_is_found_at_exit_is_told_and_stops_no_other_save(tmp_path: Path, options: tuple[str]) -> None:
    """With warnings as errors, the telling itself ended the waiting for everybody else."""
    for order in ("(good, repo, good, repo)", "(repo, good, repo, good)"):
        good = tmp_path / f"good {order}"
        body = FAILS.format(good=str(good), order=order)
        done = run_program(tmp_path / f"bad {order}", body, *options)
        assert "the disk is gone" in done.stderr
        with castore.open(good) as repo:
            assert [snapshot.step for snapshot in repo.log("main")] in ([2, 0], [3, 1]), done.stderr


# ---- SIGKILL -----------------------------------------------------------------------------------------------------

KILLS = 40


def kill_state(step: int) -> State:
    return {**dense(step), "noise": np.random.default_rng(step).bytes(200_000)}


def save_async_for_ever(path: Path, report: Report) -> None:
    """Reports every call, and every save that it knows to be durable."""
    with castore.open(path) as repo, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step = (repo.snapshot("main").step or 0) + 1 if repo.branches() else 1
        report("ready")
        queue: list[tuple[int, PendingSave]] = []
        while True:
            pending = repo.save_async(kill_state(step), step=step)
            report(f"called {step}")
            queue.append((step, pending))
            while queue and queue[0][1].done():
                done, pending = queue.pop(0)
                report(f"durable {done} {pending.result().id}")
            step += 1


@pytest.mark.slow
def test_a_killed_process_loses_at_most_what_was_in_flight(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with castore.init(path) as repo:
        repo.save_async(kill_state(0), step=0).result(WAIT_S)  # imports, so that no child has to
    moments = random.Random(0)
    in_flight_max = 2
    lost: list[int] = []
    for kill in range(KILLS):
        child = fork(lambda report: save_async_for_ever(path, report))
        assert child.next_line() == "ready"
        time.sleep(moments.uniform(0, 0.25))
        lines = [line.split() for line in child.kill()[1:]]
        called = [int(words[1]) for words in lines if words[0] == "called"]
        durable = {int(words[1]): words[2] for words in lines if words[0] == "durable"}
        with castore.open(path) as repo:
            assert held_leases(repo.handle.backend) == []
            head = repo.snapshot("main")
            # The last call may have been cut off before its report, and durable saves before theirs.
            assert (head.step or 0) >= max(called, default=0) - in_flight_max
            assert (head.step or 0) <= max(called, default=head.step or 0) + 1
            lost.append(max(0, max(called, default=0) - (head.step or 0)))
            for step, snapshot_id in durable.items():
                assert repo.snapshot(f"main@{step}").id == snapshot_id
            if kill % 4 == 0:
                assert_same(repo.load("main"), kill_state(head.step or 0))
    assert any(lost)
    with castore.open(path) as repo:
        steps = [snapshot.step for snapshot in repo.log("main")]
        assert steps == list(range(len(steps) - 1, -1, -1)), "a save in the middle is missing"
        report = repo.verify(data=True)
        assert report.ok, report.problems


@pytest.mark.parametrize("operation", ["claim", "create_stream", "put_if_absent", "compare_and_swap"])
def test_a_kill_at_each_stage_loses_only_that_save(tmp_path: Path, operation: str) -> None:
    """While waiting for its lease, writing, publishing, and moving the branch."""
    path = tmp_path / "store"
    with castore.init(path) as repo:
        first = repo.save(dense(0), step=0)

    def save(report: Report) -> None:
        def stop(found: str, name: str) -> None:
            if found == operation and threading.current_thread().name == "castore-save":
                report("there")
                time.sleep(WAIT_S)

        own = castore.open(path)
        hooked = open_on(HookedBackend(own.handle.backend, stop))
        hooked.save_async(dense(1), step=1)
        time.sleep(WAIT_S)

    child = fork(save)
    assert child.next_line() == "there"
    child.kill()
    with castore.open(path) as repo:
        assert repo.snapshot("main").id == first.id
        assert_same(repo.load("main"), dense(0))
        assert repo.save_async(dense(1), step=1).result(WAIT_S).parents == (first.id,)
        assert repo.verify(data=True).ok
