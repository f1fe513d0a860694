"""The local backend keeps the contract, across processes, forks, power cuts and broken disks."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from castore.backend import LocalBackend, syscalls
from castore.backend.base import TEMPORARY_PREFIX, Backend
from castore.errors import (
    CastoreError,
    FormatError,
    LeaseError,
    NoSpaceError,
    NotFoundError,
    RepositoryAccessError,
    StorageError,
)
from tests.suites.backend_suite import BackendSuite, names
from tests.suites.fault_backend import UNSYNCED, SimulatedCrash, Unsynced
from tests.suites.power_loss import PowerLossOs

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12: our children are tame

ANY_TIME = 1 << 62


@pytest.fixture
def backend(tmp_path: Path) -> LocalBackend:
    return LocalBackend(tmp_path / "new" / "store")


class TestLocalBackend(BackendSuite):
    @pytest.fixture
    def backend(self, tmp_path: Path) -> Backend:
        return LocalBackend(tmp_path / "new" / "store")


class TestWithoutHardLinks(BackendSuite):
    """FAT, some network and FUSE file systems: renameat2 takes the place of link."""

    @pytest.fixture
    def backend(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Backend:
        monkeypatch.setattr(os, "link", refuse)
        return LocalBackend(tmp_path)


class TestWithRenameAlone(BackendSuite):
    """The same without renameat2 (not Linux, or a file system without its flags): the lock file helps."""

    @pytest.fixture
    def backend(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Backend:
        monkeypatch.setattr(os, "link", refuse)
        monkeypatch.setattr(syscalls, "_renameat2", None)
        return LocalBackend(tmp_path)


def refuse(*_: object) -> None:
    raise PermissionError(errno.EPERM, "Operation not permitted")


# ---- power loss --------------------------------------------------------------------------------------------

Step = Callable[[Backend], object]
STEPS: tuple[tuple[Step, dict[str, bytes]], ...] = (
    (lambda b: b.put_if_absent("config", b"one"), {"config": b"one"}),
    (lambda b: write_stream(b, "packs/ab/x.pack"), {"packs/ab/x.pack": b"header payload"}),
    (lambda b: b.put_if_absent("packs/ab/y.pack", b""), {"packs/ab/y.pack": b""}),
    (lambda b: b.claim("leases/a", b"who").release(), {}),
    (lambda b: b.compare_and_swap("refs/main", expected=None, new=b"1"), {"refs/main": b"1"}),
    (lambda b: b.compare_and_swap("refs/main", expected=b"1", new=b"22"), {"refs/main": b"22"}),
    (lambda b: b.put_if_absent("config", b"two"), {}),
    (lambda b: b.delete("packs/ab/x.pack"), {"packs/ab/x.pack": b"gone"}),
    (lambda b: b.compare_and_swap("refs/main", expected=b"22", new=None), {"refs/main": b"gone"}),
    (lambda b: b.create_stream("packs/cd/z.pack").abort(), {}),
)


def write_stream(backend: Backend, name: str) -> None:
    sink = backend.create_stream(name)
    sink.write(b"header ", b"pay")
    sink.flush_hint()
    sink.write(b"load")
    sink.commit()


def history() -> list[dict[str, bytes]]:
    """The files after 0, 1, 2, … steps."""
    states: list[dict[str, bytes]] = [{}]
    for _, changes in STEPS:
        states.append({n: d for n, d in (states[-1] | changes).items() if d != b"gone"})
    return states


def run_until_crash(disk: PowerLossOs, steps_max: int = len(STEPS)) -> int:
    """How many steps returned."""
    done = 0
    with disk.installed():
        backend = LocalBackend(disk.base / "new" / "store")
        try:
            for step, _ in STEPS[:steps_max]:
                step(backend)
                done += 1
        except SimulatedCrash:
            pass
    return done


def visible(disk: PowerLossOs, unsynced: Unsynced) -> dict[str, bytes]:
    """What a backend would list after the crash; without leases, which may be in any state."""
    files = {name.removeprefix("new/store/"): data for name, data in disk.survivors(unsynced=unsynced).items()}
    return {n: d for n, d in files.items() if "/." not in f"/{n}" and not n.startswith("leases/")}


def broken_promises(directory: Path) -> list[str]:
    """Crash before every system call and look at what is left."""
    total_disk = PowerLossOs(make(directory / "whole"))
    assert run_until_crash(total_disk) == len(STEPS)
    states, broken = history(), []
    for at in range(len(total_disk.calls) + 1):
        disk = PowerLossOs(make(directory / str(at)), at=at)
        done = run_until_crash(disk)
        allowed = states[done : done + 2]
        broken += [
            f"{total_disk.calls[at : at + 1]} {unsynced}: after step {done}: {visible(disk, unsynced)}"
            for unsynced in UNSYNCED
            if visible(disk, unsynced) not in allowed
        ]
    return broken


def ignore(*_: object) -> None:
    pass


def make(directory: Path) -> Path:
    directory.mkdir(parents=True)
    return directory


def test_a_power_cut_at_any_system_call_keeps_what_was_promised(tmp_path: Path) -> None:
    assert broken_promises(tmp_path) == []


def test_the_model_notices_a_missing_sync_of_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syscalls, "sync_directory", ignore)
    assert any("lost" in promise for promise in broken_promises(tmp_path))


def test_the_model_notices_a_missing_sync_of_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PowerLossOs, "fsync", ignore)
    assert any("torn" in promise for promise in broken_promises(tmp_path))


@pytest.mark.parametrize("name", ["packs/ab/new.pack", "config"])
def test_what_a_killed_process_left_unsynced_is_synced_by_the_next(tmp_path: Path, name: str) -> None:
    """Directories that it made, a name that it took: who builds on them must not lose them."""
    at = 0
    while True:
        disk = PowerLossOs(make(tmp_path / str(at)), at=at)
        run_until_crash(disk, steps_max=2)
        if not disk.crashed:
            break
        disk.at, disk.crashed = (
            None,
            False,
        )  # the process is killed; the machine runs on, and then loses power
        with disk.installed():
            LocalBackend(disk.base / "new" / "store").put_if_absent(name, b"mine")
        assert name in visible(disk, "lost"), disk.calls
        assert visible(disk, "lost")[name] == visible(disk, "kept")[name]
        at += 1
    assert at > 20


# ---- errors of the operating system ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (errno.ENOSPC, NoSpaceError),
        (errno.EDQUOT, NoSpaceError),
        (errno.EROFS, RepositoryAccessError),
        (errno.EACCES, RepositoryAccessError),
        (errno.EIO, StorageError),
    ],
)
def test_an_error_of_any_system_call_is_typed_and_leaves_no_file(
    tmp_path: Path, code: int, expected: type[CastoreError]
) -> None:
    steps: tuple[Step, ...] = (
        lambda b: b.put_if_absent("packs/ab/x", b"one"),
        lambda b: write_stream(b, "packs/ab/x"),
        lambda b: b.compare_and_swap("packs/ab/x", expected=None, new=b"one"),
        lambda b: b.claim("packs/ab/x", b"one").release(),
    )
    for number, step in enumerate(steps):
        at = 0
        while True:
            disk = PowerLossOs(make(tmp_path / str(number) / str(at)), at=at, errno=code)
            backend = LocalBackend(disk.base / "store")
            error = error_of(step, backend, disk)
            if len(disk.calls) <= at:
                break
            if error is not None:  # a name that cannot be removed from beside the file is no error
                assert isinstance(error, expected)
                assert str(disk.base) in str(error)
                assert os.strerror(code) in str(error)
            if "unlink" not in disk.calls[at]:
                assert list(backend.temporaries(modified_before_ns=ANY_TIME)) == []
            if error and names(backend):  # it has its name, and what came after failed
                assert any(call.startswith(("link", "rename")) for call in disk.calls[:at])
            at += 1
        assert at >= 4


def error_of(step: Step, backend: Backend, disk: PowerLossOs) -> CastoreError | None:
    with disk.installed():
        try:
            step(backend)
        except CastoreError as error:
            return error
    return None


def test_the_error_number_is_kept(backend: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "writev", full_disk)
    with pytest.raises(OSError, match="No space left") as caught:
        backend.put_if_absent("x", b"abc")
    assert caught.value.errno == errno.ENOSPC


def test_a_failed_write_closes_the_stream(backend: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = backend.create_stream("packs/x")
    sink.write(b"abc")
    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", full_disk)
        with pytest.raises(NoSpaceError, match=r"packs/x: cannot write: No space left on device; free some space"):
            sink.write(b"def")
    with pytest.raises(StorageError, match="the stream is closed"):
        sink.commit()
    assert list(backend.temporaries(modified_before_ns=ANY_TIME)) == []
    assert names(backend) == []


def full_disk(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_short_writes_are_continued(backend: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.writev
    monkeypatch.setattr(os, "writev", lambda fd, views: whole(fd, [views[0][:3]]))
    sink = backend.create_stream("x")
    sink.write(b"0123456", b"", b"789", b"ab")
    sink.commit()
    assert backend.read("x", max_bytes=99) == b"0123456789ab"


def test_short_reads_are_continued(backend: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    backend.put_if_absent("x", bytes(range(100)))
    preadv, pread, read = os.preadv, os.pread, os.read
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:7]], at))
    monkeypatch.setattr(os, "pread", lambda fd, size, at: pread(fd, min(size, 7), at))
    monkeypatch.setattr(os, "read", lambda fd, size: read(fd, min(size, 7)))
    reader = backend.open_reader("x")
    assert reader.read(5, 90) == bytes(range(5, 95))
    assert backend.read("x", max_bytes=100) == bytes(range(100))
    reader.close()


@pytest.fixture
def unprivileged_directory() -> Iterator[Path]:
    """Owned by the user who runs the tests; root may write everywhere, so it becomes nobody for a while."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)
    finally:
        if is_root:
            os.seteuid(0)


def test_a_directory_without_permission_is_an_access_error(unprivileged_directory: Path) -> None:
    backend = LocalBackend(unprivileged_directory)
    backend.put_if_absent("packs/x", b"abc")
    packs = unprivileged_directory / "packs"
    packs.chmod(0o500)
    calls: tuple[Step, ...] = (
        lambda b: b.put_if_absent("packs/y", b""),
        lambda b: b.create_stream("packs/y"),
        lambda b: b.delete("packs/x"),
        lambda b: b.compare_and_swap("packs/x", expected=b"abc", new=b""),
        lambda b: b.claim("packs/y", b""),
    )
    for call in calls:
        with pytest.raises(RepositoryAccessError, match="Permission denied; check owner, permissions"):
            call(backend)
    assert backend.read("packs/x", max_bytes=3) == b"abc"
    packs.chmod(0)
    calls += (lambda b: b.read("packs/x", max_bytes=9), lambda b: b.list("packs/"))
    for call in calls:
        with pytest.raises(RepositoryAccessError, match="Permission denied"):
            call(backend)
    packs.chmod(0o700)
    assert names(backend) == ["packs/x"]


def test_a_file_cut_while_open_is_damage(backend: LocalBackend, tmp_path: Path) -> None:
    backend.put_if_absent("packs/x", b"0123456789")
    reader = backend.open_reader("packs/x")
    os.truncate(tmp_path / "new" / "store" / "packs" / "x", 4)
    for read in (lambda: reader.read(2, 8), lambda: reader.read_into(2, memoryview(bytearray(8)))):
        with pytest.raises(FormatError, match=r"packs/x: read at offset 2: expected 8 bytes, found 2"):
            read()
    reader.close()


def test_a_root_that_vanished_is_not_made_again(backend: LocalBackend, tmp_path: Path) -> None:
    """A disk unmounted during training: writing on would fill the one below, and nothing could be opened."""
    backend.put_if_absent("config", b"")
    (tmp_path / "new").rename(tmp_path / "elsewhere")
    for call in (
        lambda: backend.put_if_absent("packs/x", b""),
        lambda: backend.create_stream("packs/x"),
        lambda: backend.compare_and_swap("x", expected=None, new=b""),
        lambda: backend.claim("leases/x", b""),
    ):
        with pytest.raises(NotFoundError, match="was it removed or unmounted"):
            call()
    assert not (tmp_path / "new").exists()


# ---- strangers' files --------------------------------------------------------------------------------------


def test_links_and_special_files_are_neither_followed_nor_listed(backend: LocalBackend, tmp_path: Path) -> None:
    backend.put_if_absent("packs/x", b"abc")
    packs = tmp_path / "new" / "store" / "packs"
    (tmp_path / "secret").write_text("secret")
    (packs / "link").symlink_to(tmp_path / "secret")
    (packs / "away").symlink_to(tmp_path)
    os.mkfifo(packs / "fifo")
    for name in ("packs/link", "packs/fifo"):
        for call in (
            lambda name=name: backend.read(name, max_bytes=99),
            lambda name=name: backend.open_reader(name),
        ):
            with pytest.raises(StorageError, match=name):
                call()
        assert backend.stat(name) is None
        assert backend.put_if_absent(name, b"new") is False
        assert backend.compare_and_swap(name, expected=None, new=b"new") is False
    assert names(backend) == ["packs/x"]
    assert (tmp_path / "secret").read_text() == "secret"


def test_names_that_no_backend_made_are_not_listed(backend: LocalBackend, tmp_path: Path) -> None:
    backend.put_if_absent("packs/x", b"abc")
    store = tmp_path / "new" / "store"
    (store / ".lock").touch()
    (store / "packs" / ".nfs0001").touch()
    (store / "packs" / os.fsdecode(b"\xff")).touch()
    assert names(backend) == ["packs/x"]


def test_temporary_files_are_listed_by_age_and_deleted(backend: LocalBackend) -> None:
    backend.put_if_absent("config", b"")
    sink = backend.create_stream("packs/ab/x")
    sink.write(b"half")
    [info] = backend.temporaries(modified_before_ns=ANY_TIME)
    assert info.name.startswith(f"packs/ab/{TEMPORARY_PREFIX}")
    assert info.size_bytes == 4
    assert list(backend.temporaries(modified_before_ns=info.modified_ns)) == []
    assert names(backend) == ["config"]
    assert backend.delete(info.name) is True
    assert backend.delete(info.name) is False
    with pytest.raises(LeaseError, match="do it again"):  # "No such file" said nothing in a storm
        sink.commit()
    assert names(backend) == ["config"]


def test_an_abandoned_stream_cleans_up(backend: LocalBackend) -> None:
    sink = backend.create_stream("x")
    sink.write(b"abc")
    del sink
    assert list(backend.temporaries(modified_before_ns=ANY_TIME)) == []


def test_a_listing_tolerates_files_that_vanish(backend: LocalBackend) -> None:
    for number in range(50):
        backend.put_if_absent(f"stay/{number:02}", b"")
    stop = threading.Event()

    def come_and_go() -> None:
        while not stop.is_set():
            backend.claim("go/a/x", b"").release()
            backend.claim("stay/x", b"").release()

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for _ in range(100):
            assert len([name for name in names(backend, "stay/") if name != "stay/x"]) == 50
            assert all(claim.held for claim in backend.claims("go/"))
            assert list(backend.temporaries(modified_before_ns=0)) == []
    finally:
        stop.set()
        thread.join()


# ---- the handle --------------------------------------------------------------------------------------------


def test_constructing_and_reading_touch_nothing(tmp_path: Path) -> None:
    backend = LocalBackend(tmp_path / "store")
    assert names(backend) == []
    assert backend.stat("config") is None
    assert backend.delete("config") is False
    assert backend.claims("leases/") == []
    assert backend.free_bytes() is None
    with pytest.raises(NotFoundError):
        backend.read("config", max_bytes=1)
    assert list(tmp_path.iterdir()) == []


def test_a_relative_root_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    backend = LocalBackend("store")
    monkeypatch.chdir("/")
    backend.put_if_absent("config", b"abc")
    assert (tmp_path / "store" / "config").read_bytes() == b"abc"
    assert backend.location == str(tmp_path / "store")
    assert backend.local_path("config") == tmp_path / "store" / "config"
    assert (backend.free_bytes() or 0) > 0


def test_a_pickled_backend_is_a_handle_to_the_same_directory(backend: LocalBackend) -> None:
    backend.put_if_absent("config", b"abc")
    copy = pickle.loads(pickle.dumps(backend))
    assert copy.put_if_absent("config", b"def") is False
    assert copy.read("config", max_bytes=3) == b"abc"


def test_the_umask_decides_who_may_read(backend: LocalBackend, tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        backend.put_if_absent("packs/x", b"")
        write_stream(backend, "packs/y")
    finally:
        os.umask(old)
    packs = tmp_path / "new" / "store" / "packs"
    assert stat.S_IMODE(packs.stat().st_mode) == 0o750
    assert {stat.S_IMODE((packs / name).stat().st_mode) for name in "xy"} == {0o640}


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="only Linux tells")
def test_no_descriptor_is_left_open(backend: LocalBackend) -> None:
    def open_count() -> int:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    before = open_count()
    write_stream(backend, "packs/x")
    backend.open_reader("packs/x").close()
    backend.open_reader("packs/x")  # dropped
    backend.claim("leases/a", b"")  # dropped: released
    backend.create_stream("packs/y")  # dropped: aborted
    backend.compare_and_swap("refs/x", expected=None, new=b"")
    assert backend.claims("leases/") == []
    assert open_count() == before


# ---- processes ---------------------------------------------------------------------------------------------


class Child:
    """A forked process that runs an action, says so, and then waits to be killed."""

    def __init__(self, action: Callable[[], object]) -> None:
        read_end, write_end = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.write(write_end, str(action()).encode())
                signal.pause()
                status = 0
            finally:
                os._exit(status)
        os.close(write_end)
        with os.fdopen(read_end, "rb") as pipe:
            self.said = os.read(pipe.fileno(), 100).decode()  # not to the end: its own children have it too
        assert self.said, "the child failed"

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@pytest.fixture
def children() -> Iterator[list[Child]]:
    started: list[Child] = []
    yield started
    for child in started:
        child.kill()


def held(backend: LocalBackend) -> list[bool]:
    return [claim.held for claim in backend.claims("leases/")]


kept_claims: list[object] = []  # of a child, until it is killed


def test_a_claim_dies_with_its_process(backend: LocalBackend) -> None:
    child = Child(lambda: kept_claims.append(backend.claim("leases/a", b"who")))
    assert held(backend) == [True]
    os.kill(child.pid, signal.SIGSTOP)
    assert held(backend) == [True]
    child.kill()
    assert [(claim.data, claim.held) for claim in backend.claims("leases/")] == [(b"who", False)]
    assert backend.delete("leases/a") is True


def test_a_forked_child_neither_keeps_nor_releases_a_claim(backend: LocalBackend, children: list[Child]) -> None:
    """A data-loader worker outlives the training process that was killed: gc must not wait for the worker."""
    claim = backend.claim("leases/a", b"who")
    children.append(Child(claim.release))
    assert held(backend) == [True]
    claim.release()
    assert held(backend) == []

    def claim_and_fork() -> int:
        kept_claims.append(backend.claim("leases/b", b"who"))
        return Child(lambda: "worker").pid

    parent = Child(claim_and_fork)
    try:
        assert held(backend) == [True]
        parent.kill()
        assert held(backend) == [False]
    finally:
        os.kill(int(parent.said), signal.SIGKILL)


def test_a_child_forked_during_a_swap_does_not_keep_the_lock(tmp_path: Path, children: list[Child]) -> None:
    backend = LocalBackend(tmp_path, lock_timeout_s=5)
    with backend._tree.exclusive():
        children.append(Child(lambda: "worker"))
        assert syscalls._locked_files
    assert not syscalls._locked_files
    assert backend.compare_and_swap("refs/main", expected=None, new=b"1") is True


def test_forks_beside_claims_on_other_threads_leave_nothing_locked(
    backend: LocalBackend, children: list[Child]
) -> None:
    stop = threading.Event()

    def claim_again_and_again() -> None:
        while not stop.is_set():
            backend.claim("leases/a", b"").release()

    thread = threading.Thread(target=claim_again_and_again)
    thread.start()
    try:
        children += [Child(lambda: len(syscalls._locked_files)) for _ in range(20)]
    finally:
        stop.set()
        thread.join()
    assert {child.said for child in children} == {"0"}
    assert held(backend) == []


def test_a_child_leaves_its_parents_stream_alone(backend: LocalBackend) -> None:
    sink = backend.create_stream("packs/x")
    sink.write(b"abc")
    Child(sink.abort).kill()
    sink.commit()
    assert backend.read("packs/x", max_bytes=9) == b"abc"


def test_no_swap_is_lost_between_processes(backend: LocalBackend) -> None:
    backend.put_if_absent("counter", b"0")

    def count() -> str:
        for _ in range(20):
            while True:
                old = backend.read("counter", max_bytes=99)
                if backend.compare_and_swap("counter", expected=old, new=b"%d" % (int(old) + 1)):
                    break
        return "done"

    def fork() -> int:
        pid = os.fork()
        if pid == 0:
            try:
                count()
            finally:
                os._exit(0)
        return pid

    for pid in [fork() for _ in range(4)]:
        os.waitpid(pid, 0)
    assert backend.read("counter", max_bytes=99) == b"80"


def test_a_lock_that_is_held_too_long_is_an_error(tmp_path: Path, children: list[Child]) -> None:
    backend = LocalBackend(tmp_path, lock_timeout_s=0.05)
    lock = backend._tree.exclusive()
    children.append(Child(lock.__enter__))
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"\.lock: another process has held the lock for 0.05 s"):
        backend.compare_and_swap("refs/main", expected=None, new=b"1")
    assert time.monotonic() - started < 5


def test_a_power_cut_during_a_move_leaves_the_file_under_one_name_or_both(tmp_path: Path) -> None:
    at = 0
    while True:
        disk = PowerLossOs(make(tmp_path / str(at)))
        with disk.installed():
            backend = LocalBackend(disk.base / "store")
            backend.put_if_absent("packs/ab/x.pack", b"content")
            disk.at = len(disk.calls) + at
            with suppress(SimulatedCrash):
                backend.move("packs/ab/x.pack", "quarantine/1/packs/ab/x.pack")
        for unsynced in UNSYNCED:
            found = [data for name, data in disk.survivors(unsynced=unsynced).items() if name.endswith("x.pack")]
            assert set(found) == {b"content"}, (at, unsynced)
        if not disk.crashed:
            assert len(found) == 1
            break
        at += 1
    assert at > 5


# ---- mapping -----------------------------------------------------------------------------------------------------


def test_a_range_is_mapped_from_any_offset(backend: LocalBackend) -> None:
    data = bytes(range(256)) * 64
    backend.put_if_absent("packs/a", data)
    reader = backend.open_reader("packs/a")
    for offset, size_bytes in ((0, len(data)), (1, 1), (4095, 2), (4096, 4096), (5000, len(data) - 5000)):
        assert reader.map_range(offset, size_bytes) == data[offset : offset + size_bytes]


def test_a_mapping_is_private_and_outlives_reader_and_file(backend: LocalBackend) -> None:
    backend.put_if_absent("packs/a", b"x" * 9000)
    reader = backend.open_reader("packs/a")
    one, other = reader.map_range(10, 8000), reader.map_range(10, 8000)
    one[:4] = b"1234"
    assert other[:4] == b"xxxx"
    assert reader.read(10, 4) == b"xxxx"
    reader.close()
    backend.delete("packs/a")
    assert (one[:5], other[-1:]) == (b"1234x", b"x")


def test_a_range_beyond_the_end_is_never_mapped(backend: LocalBackend) -> None:
    """Touching it would end the process. Also when the file was longer when it was opened."""
    backend.put_if_absent("packs/a", b"x" * 9000)
    reader = backend.open_reader("packs/a")
    for offset, size_bytes in ((0, 9001), (9000, 1), (1 << 62, 1)):
        with pytest.raises(FormatError, match="truncated"):
            reader.map_range(offset, size_bytes)
    os.truncate(f"{backend.location}/packs/a", 5000)
    assert reader.map_range(0, 5000) == b"x" * 5000
    with pytest.raises(FormatError, match="expected 2000 bytes, found 1000"):
        reader.map_range(4000, 2000)
    reader.close()
    with pytest.raises(StorageError, match="closed"):
        reader.map_range(0, 1)
