"""Promise 1: a crash at any moment leaves every earlier snapshot whole and the repository usable without repair.

At the level of backend calls (FaultBackend), of system calls (PowerLossOs), and with errors in place of crashes.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import castore
from castore.backend import LocalBackend, MemoryBackend
from castore.errors import NoSpaceError, StorageError
from castore.format.layout import POLICY
from castore.index import MemoryIndex
from tests.checkpoint.crashes import (
    NEXT,
    OPERATIONS,
    History,
    Operation,
    Seen,
    check_next_save,
    check_usable,
    make_history,
    refs_of,
    restarted,
    run,
)
from tests.checkpoint.repositories import files_of, held_leases, open_on
from tests.checkpoint.states import assert_same, training_state
from tests.suites.fault_backend import (
    MOMENTS,
    UNSYNCED,
    Call,
    Fault,
    FaultBackend,
    Moment,
    SimulatedCrash,
    Unsynced,
)
from tests.suites.power_loss import PowerLossOs

pytestmark = pytest.mark.filterwarnings("ignore::castore.errors.PolicyWarning")
"""Where every call fails once, the look at the policy after the save does, too."""


@pytest.fixture(scope="module")
def history() -> History:
    return make_history()


@pytest.fixture
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The index is not on this disk, and making hundreds of LMDB files takes longer than all else."""
    monkeypatch.setattr("castore.repository.open_index", lambda *_, **__: MemoryIndex())


def error_of(action: Callable[..., object], *arguments: Any) -> StorageError | None:
    """The error of an action, which is a typed one."""
    try:
        action(*arguments)
    except StorageError as error:
        return error
    return None


def calls_of(history: History, operation: Operation) -> list[Call]:
    faultless = FaultBackend(restarted(history))
    run(operation, faultless)
    return faultless.calls


# ---- backend calls -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_crash_at_any_backend_call_leaves_the_old_or_the_new(history: History, name: str, moment: Moment) -> None:
    operation = OPERATIONS[name]
    calls = calls_of(history, operation)
    seen, effects = Seen(), []
    for at in range(len(calls)):
        faulty = FaultBackend(restarted(history), Fault(at, moment))
        with pytest.raises(SimulatedCrash):
            run(operation, faulty)
        for unsynced in UNSYNCED:
            if seen.add(faulty.survivors(unsynced=unsynced), before=history.files):
                left = faulty.restore_in_memory(unsynced=unsynced)
                effects.append(check_usable(left, history, operation))
                check_next_save(open_on(left))
    assert len(calls) >= 2
    assert not effects[0]
    assert effects[-1] or moment == "before"


@pytest.mark.slow
@pytest.mark.parametrize("unsynced", UNSYNCED)
def test_a_crash_leaves_a_directory_that_opens_with_its_litter(
    history: History, unsynced: Unsynced, tmp_path: Path
) -> None:
    """The same in a real directory: temporary files, dead leases and no index are no hindrance."""
    operation = OPERATIONS["save"]
    seen = Seen()
    for at in range(len(calls_of(history, operation))):
        faulty = FaultBackend(restarted(history), Fault(at, "during"))
        with pytest.raises(SimulatedCrash):
            run(operation, faulty)
        if not seen.add(faulty.survivors(unsynced=unsynced), before=history.files):
            continue
        directory = tmp_path / str(at)
        check_usable(faulty.restore(directory, unsynced=unsynced), history, operation)
        with castore.open(directory) as repo:
            check_next_save(repo)


def test_a_second_crash_while_recovering_does_no_more_harm(history: History) -> None:
    """A job that dies in its first save, is restarted, and dies in it again, and again."""
    backend = restarted(history)
    operation = OPERATIONS["save to a new branch"]
    deaths = 0
    while "heads/young" not in refs_of(backend):
        faulty = FaultBackend(backend, Fault(deaths, "during"))
        with suppress(SimulatedCrash):
            run(operation, faulty)
        backend = faulty.restore_in_memory(unsynced=UNSYNCED[deaths % 3])
        deaths += 1
    assert deaths > 10
    repo = open_on(backend)
    assert repo.verify(data=True).ok
    for snapshot_id, state in history.states.items():
        assert_same(repo.load(snapshot_id), state)
    repo.save(NEXT, branch="young")
    assert_same(repo.load("young"), NEXT)


# ---- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "moment", "lasting"),
    [(errno.ENOSPC, "before", True), (errno.EIO, "before", False), (errno.EIO, "during", False)],
)
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_error_of_any_backend_call_is_typed_and_the_same_handle_goes_on(
    history: History, name: str, code: int, moment: Moment, lasting: bool
) -> None:
    operation = OPERATIONS[name]
    seen = Seen()
    for at in range(len(calls_of(history, operation))):
        backend = FaultBackend(restarted(history), Fault(at, moment, errno=code, lasting=lasting))
        repo = open_on(backend)
        error = error_of(operation.run, repo)
        call = backend.calls[at]
        if error is None:
            # Nobody needs the lease file any more; what cannot be read of the past only costs what it would have saved;
            # the policy is looked at when the save is durable.
            past = call.name.startswith(("packs/", "snapshots/"))
            assert (
                call.operation in ("release", "flush_hint")
                or call.name == POLICY
                or (past and not call.writes and call.operation != "list")
            )
        else:
            assert isinstance(error, NoSpaceError) == (code == errno.ENOSPC)
            assert error.errno == code
        backend.fault = None
        # The lock of the model is let go only by a release that works; that of a file, by closing it.
        assert held_leases(backend) == [] or lasting or call.operation in ("claim", "release")
        commits = [number for number, found in enumerate(backend.calls) if found.operation == "compare_and_swap"]
        if seen.add(files_of(backend), before=history.files):
            moved = check_usable(backend, history, operation)
            assert error is None or not moved or commits[0] <= at, f"{call} failed, and took effect"
        # The same handle, which a training loop that logs the error goes on with.
        check_next_save(repo)


@pytest.mark.usefixtures("no_cache")
def test_a_full_disk_leaves_no_half_written_pack(history: History, tmp_path: Path) -> None:
    struck = 0
    for at in range(len(calls_of(history, OPERATIONS["save"]))):
        directory = tmp_path / str(at)
        FaultBackend(restarted(history)).restore(directory, unsynced="kept")
        before = sorted(path.name for path in directory.rglob("*.pack"))
        backend = FaultBackend(LocalBackend(directory), Fault(at, errno=errno.ENOSPC))
        repo = open_on(backend)
        error = error_of(OPERATIONS["save"].run, repo)
        if backend.calls[at].operation in ("create_stream", "write", "commit"):
            struck += 1
            assert isinstance(error, NoSpaceError)
            assert sorted(path.name for path in directory.rglob("*.pack")) == before
        assert list(backend.temporaries(modified_before_ns=2**63)) == []
        repo.close()
    assert struck > 3


# ---- system calls ------------------------------------------------------------------------------------------------

FIRST, SECOND = training_state(1, frozen_bytes=2000, moving_bytes=1000), training_state(2, frozen_bytes=2000)


def survivors(disk: PowerLossOs, unsynced: Unsynced, below: str) -> MemoryBackend:
    """What the next process finds, temporary files left out."""
    backend = MemoryBackend()
    for path, data in disk.survivors(unsynced=unsynced).items():
        name = path.removeprefix(below)
        if "/." not in f"/{name}":
            backend.put_if_absent(name, data)
    return backend


@pytest.mark.slow
@pytest.mark.usefixtures("no_cache")
def test_a_power_cut_at_any_system_call_of_a_save_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    at, heads, seen = 0, [], Seen()
    while True:
        base = tmp_path / str(at)
        base.mkdir()
        disk = PowerLossOs(base)
        with disk.installed():
            repo = castore.init(base / "store")
            first = repo.save(FIRST, step=1)
            before = set(disk.survivors(unsynced="kept").values())
            disk.at = len(disk.calls) + at
            try:
                second = repo.save(SECOND, step=2)
            except SimulatedCrash:
                second = None
            # Still on this disk: the objects of a dead process must not clean up on the real one.
            del repo
        if not disk.crashed:
            break
        for unsynced in UNSYNCED:
            files = survivors(disk, unsynced, "store/")
            if not seen.add(files_of(files), before=before):
                continue
            left = open_on(files)
            assert_same(left.load(first.id), FIRST)
            head = left.snapshot("main")
            heads.append(head.id == first.id)
            if head.id != first.id:
                assert head.parents == (first.id,)
            for snapshot in left.snapshots():
                assert_same(left.load(snapshot.id), FIRST if snapshot.id == first.id else SECOND)
            check_next_save(left)
        at += 1
    assert second is not None
    assert at > 25
    assert heads[0]
    assert not heads[-1]


@pytest.mark.slow
@pytest.mark.usefixtures("no_cache")
def test_a_power_cut_at_any_system_call_of_the_first_save_leaves_a_place_to_begin_in(tmp_path: Path) -> None:
    """Also in the middle of `init`: `castore.open(create=True)` is how a restarted job begins."""
    at, seen = 0, Seen()
    while True:
        base = tmp_path / f"{at}-crashed"
        base.mkdir()
        disk = PowerLossOs(base, at=at)
        with disk.installed():
            try:
                snapshot = castore.save(FIRST, base / "store", step=1)
            except SimulatedCrash:
                snapshot = None
        for unsynced in UNSYNCED:
            files = disk.survivors(unsynced=unsynced)
            if not seen.add(files, before=()):
                continue
            directory = tmp_path / f"{at}-{unsynced}"
            directory.mkdir()
            for path, data in files.items():
                (directory / path).parent.mkdir(parents=True, exist_ok=True)
                (directory / path).write_bytes(data)
            with castore.open(directory / "store", create=True) as repo:
                if snapshot is not None:
                    assert_same(repo.load(snapshot.id), FIRST)
                repo.save(SECOND, step=2)
                assert_same(repo.load("main"), SECOND)
                assert repo.verify(data=True).ok
        if not disk.crashed:
            break
        at += 1
    assert at > 30


@pytest.mark.slow
@pytest.mark.usefixtures("no_cache")
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_an_error_of_any_system_call_of_a_save_is_typed_and_the_same_handle_goes_on(tmp_path: Path, code: int) -> None:
    at, failures = 0, 0
    while True:
        base = tmp_path / str(at)
        base.mkdir()
        disk = PowerLossOs(base, errno=code)
        with disk.installed():
            repo = castore.init(base / "store")
            first = repo.save(FIRST, step=1)
            disk.at = len(disk.calls) + at
            error = error_of(repo.save, SECOND)
            if error is not None:
                failures += 1
                assert isinstance(error, NoSpaceError) == (code == errno.ENOSPC)
            done = len(disk.calls) <= disk.at
            disk.at = None
            assert_same(repo.load(first.id), FIRST)
            repo.save(NEXT, step=3)
            assert_same(repo.load("main"), NEXT)
            assert held_leases(repo.handle.backend) == []
            repo.close()
        if done:
            break
        at += 1
    assert failures > 15
