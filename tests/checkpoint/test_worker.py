"""Saves in a worker process: what differs from a thread. What must be the same is in test_background.py.

Every process is real. Where one must die at an exact moment, a sitecustomize module makes it kill itself there.
"""

from __future__ import annotations

import fcntl
import gc
import multiprocessing.spawn
import os
import signal
import subprocess
import sys
import termios
import threading
import time
import warnings
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import castore
import tests.tensors.quiet  # noqa: F401
from castore.api import Repository
from castore.backend import LocalBackend, MemoryBackend
from castore.checkpoint import worker
from castore.errors import ConflictError, RefExistsError, StorageError, UsageError, WorkerError
from castore.repository import Handle
from castore.tensors import flatten, glance
from tests.checkpoint.killing import until
from tests.checkpoint.repositories import create_on, held_leases
from tests.checkpoint.states import assert_same
from tests.suites.forked import in_child

WAIT_S = 60.0
State = dict[str, Any]


@pytest.fixture(autouse=True)
def _no_standing_back(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine would leave it nothing."""
    if "stands_back" not in request.node.name:
        monkeypatch.setattr(worker, "WORKER_NICENESS", 0)


def open_worker(path: Path) -> Repository:
    return castore.open(path / "store", create=True, worker_process=True)


def dense(step: int, *, items: int = 300_000) -> State:
    weights = np.random.default_rng(0).standard_normal(items, dtype=np.float32)
    return {"w": weights * np.float32(1 + 1e-5 * step), "step": step, "tail": weights[:300] + np.float32(step)}


def pid_of(repo: Repository) -> int:
    assert repo._worker is not None
    process = repo._worker._process
    assert process is not None
    return process._process.pid


def stop_and_save(repo: Repository, steps: tuple[int, ...]) -> list[castore.PendingSave]:
    """Stop the worker and save these steps; returns when the first of them waits in its socket, unread."""
    os.kill(pid_of(repo), signal.SIGSTOP)
    pending = [repo.save_async(dense(step), step=step) for step in steps]
    assert repo._worker is not None
    assert repo._worker._process is not None
    end = repo._worker._process.channel._end

    def unread_bytes() -> int:
        return int.from_bytes(fcntl.ioctl(end, termios.TIOCOUTQ, bytes(4)), sys.byteorder)

    until(lambda: unread_bytes() > 0)
    return pending


def is_alive(pid: int) -> bool:
    """Neither gone nor a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def in_worker(monkeypatch: pytest.MonkeyPatch, path: Path, code: str) -> None:
    """Run some code in the workers that are started from now on, before anything else."""
    place = path / "site"
    place.mkdir(exist_ok=True)
    (place / "sitecustomize.py").write_text(code)
    monkeypatch.syspath_prepend(str(place))


KILL_BEFORE = """
import os, signal
from castore.backend import LocalBackend
inner = LocalBackend.{operation}
def kill(self, name, *rest, **options):
    if name.startswith({prefix!r}):
        os.kill(os.getpid(), signal.SIGKILL)
    return inner(self, name, *rest, **options)
LocalBackend.{operation} = kill
"""


# ---- the same state, another process -----------------------------------------------------------------------------


def test_the_worker_is_another_process_without_torch_and_is_kept(tmp_path: Path) -> None:
    import torch

    with open_worker(tmp_path) as repo:
        assert repo._worker is None, "it is started by the first save"
        repo.save_async({"w": torch.randn(1000, 500)}, step=1).result(WAIT_S)
        pid = pid_of(repo)
        assert pid != os.getpid()
        assert "libtorch" in Path("/proc/self/maps").read_text()
        assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()
        repo.save_async({"w": torch.randn(1000, 500)}, step=2).result(WAIT_S)
        assert pid_of(repo) == pid


def test_saves_of_both_kinds_continue_each_other(tmp_path: Path) -> None:
    with open_worker(tmp_path) as repo:
        first = repo.save(dense(0), step=0)
        second = repo.save_async(dense(1), step=1).result(WAIT_S)
        assert [snapshot.id for snapshot in repo.log()] == [second.id, first.id]
        assert_same(repo.load("main"), dense(1))
        third = repo.save(dense(2), step=2)
        fourth, fifth = (repo.save_async(dense(step), step=step) for step in (3, 4))
        assert fourth.result(WAIT_S).parents == (third.id,)
        assert fifth.result(WAIT_S).parents == (fourth.result().id,)
        side = repo.save_async(dense(5), branch="side", step=5, parent=first).result(WAIT_S)
        assert side.parents == (first.id,)
        assert [leaf.path for leaf in side.leaves] == ["w", "step", "tail"]
        assert repo.verify(data=True).ok


@pytest.mark.parametrize(("base_memory_bytes", "from_disk"), [(0, True), (None, False)])
def test_the_second_difference_takes_its_bases_from_the_memory_of_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base_memory_bytes: int | None, from_disk: bool
) -> None:
    reads = tmp_path / "reads"
    code = f"""
from castore.store import ChunkStore
inner = ChunkStore.read_into
def read_into(*arguments, **options):
    with open({str(reads)!r}, "a") as file:
        file.write("one base\\n")
    return inner(*arguments, **options)
ChunkStore.read_into = read_into
"""
    in_worker(monkeypatch, tmp_path, code)
    store = tmp_path / "store"
    with castore.open(store, create=True, worker_process=True, base_memory_bytes=base_memory_bytes) as repo:
        for step in range(3):
            reads.write_text("")
            snapshot = repo.save_async(dense(step, items=3_000_000), step=step).result(WAIT_S)
        count, chunk_count = len(reads.read_text().splitlines()), snapshot.leaves[0].chunk_count
        assert chunk_count == 12
        # A quarter of the chunks, chosen by their ids, rests on the first save again, which memory does not hold.
        assert count >= chunk_count - 1 if from_disk else count <= chunk_count / 2


def test_many_small_leaves_lie_in_shared_memory_too(tmp_path: Path) -> None:
    state = {str(number): np.full(number * 37 % 9000, number, np.uint16) for number in range(1500)}
    with open_worker(tmp_path) as repo:
        repo.save_async(state).result(WAIT_S)
        assert_same(repo.load("main"), state)


def test_progress_rises_to_all_of_it(tmp_path: Path) -> None:
    with open_worker(tmp_path) as repo:
        pending = repo.save_async(dense(0, items=5_000_000), step=0)
        seen = [pending.progress()]
        while not pending.done():
            seen.append(pending.progress())
            time.sleep(0.001)
        last = pending.progress()
        assert last.done_bytes == last.total_bytes >= 40_000_000
        done = [progress.done_bytes for progress in seen]
        assert done == sorted(done)


def test_the_moment_of_a_save_comes_from_the_clock_of_the_handle(tmp_path: Path) -> None:
    castore.init(tmp_path / "store").close()
    opened = castore.open(tmp_path / "store").handle
    handle = Handle(opened.backend, opened.config, clock=lambda: 1_000_000_000_123_456_789)
    with Repository(tmp_path / "store", handle, worker_process=True) as repo:
        assert repo.save_async(dense(0)).result(WAIT_S).created_at.year == 2001


def test_the_worker_stands_back_and_is_in_a_process_group_of_its_own(tmp_path: Path) -> None:
    with open_worker(tmp_path) as repo:
        repo.save_async(dense(0)).result(WAIT_S)
        pid = pid_of(repo)
        assert os.getpriority(os.PRIO_PROCESS, pid) == worker.WORKER_NICENESS
        assert os.getpgid(pid) == pid
        assert os.getsid(pid) == os.getsid(0), (
            "schedulers may weigh sessions against each other, whatever niceness says"
        )


# ---- errors ------------------------------------------------------------------------------------------------------


def test_an_error_comes_back_as_itself_and_says_where_it_was_raised(tmp_path: Path) -> None:
    with open_worker(tmp_path) as repo:
        first = repo.save_async(dense(0), step=0, tags=("taken",)).result(WAIT_S)
        with pytest.raises(RefExistsError, match="taken") as caught:
            repo.save_async(dense(1), step=1, tags=("taken",)).result(WAIT_S)
        assert "in the worker process" in str(caught.value.__cause__)
        assert "save.py" in str(caught.value.__cause__)
        assert repo.save_async(dense(2), step=2).result(WAIT_S).parents == (first.id,)


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        ("castore.errors.NoSpaceError('full')", castore.errors.NoSpaceError),
        ("MemoryError('no memory')", MemoryError),
        ("KeyboardInterrupt('not here')", KeyboardInterrupt),
        ("type('Odd', (Exception,), {})('what no other process knows')", WorkerError),
    ],
)
def test_any_error_is_raised_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: str, expected: type[BaseException]
) -> None:
    code = f"""
import castore.errors
from castore.backend import LocalBackend
inner = LocalBackend.create_stream
def fail(self, name):
    LocalBackend.create_stream = inner
    error = {raised}
    error.add_note('a note')
    raise error
LocalBackend.create_stream = fail
"""
    with open_worker(tmp_path) as repo:
        with monkeypatch.context() as patch:
            in_worker(patch, tmp_path, code)
            until(repo.save_async(dense(0), step=0).done)
        with pytest.raises(expected) as caught:
            repo.wait()
        assert "a note" in caught.value.__notes__
        repo.wait()
        assert repo.save_async(dense(1), step=1).result(WAIT_S).parents == ()


def test_a_conflict_names_both_heads_and_both_snapshots_are_there(tmp_path: Path) -> None:
    with open_worker(tmp_path) as repo, castore.open(tmp_path / "store", worker_process=True) as other:
        first = repo.save_async(dense(0), step=0).result(WAIT_S)
        other.load("main")
        winner = other.save_async(dense(1), step=1).result(WAIT_S)
        with pytest.raises(ConflictError) as caught:
            repo.save_async(dense(2), step=2).result(WAIT_S)
        assert (caught.value.expected_id, caught.value.found_id) == (first.id, winner.id)
        assert_same(repo.load(caught.value.snapshot_id), dense(2))


@pytest.mark.parametrize("executable", ["/bin/false", "/no/such/python", ""])
def test_a_worker_that_cannot_be_started_is_a_typed_error_and_no_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executable: str
) -> None:
    with open_worker(tmp_path) as repo:
        with monkeypatch.context() as patch:
            patch.setattr(multiprocessing.spawn, "_python_exe", os.fsencode(executable))  # as set_executable does
            with pytest.raises(WorkerError, match="without worker_process"):
                repo.save_async(dense(0)).result(WAIT_S)
        assert repo.save_async(dense(0)).result(WAIT_S).parents == ()


def test_what_no_other_process_can_open_is_refused_at_opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Audited(LocalBackend):
        """The worker would use the plain one."""

    handle = create_on(MemoryBackend()).handle
    with pytest.raises(UsageError, match=r"MemoryBackend, which another process cannot open"):
        Repository("memory", handle, worker_process=True)
    local = castore.init(tmp_path / "audited").handle
    with pytest.raises(UsageError, match=r"Audited, which another process cannot open"):
        Repository("audited", Handle(Audited(tmp_path / "audited"), local.config), worker_process=True)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "frozen", True, raising=False)
        with pytest.raises(UsageError, match=r"frozen program"):
            open_worker(tmp_path)
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(UsageError, match=r"memfd_create"):
        open_worker(tmp_path)
    with pytest.raises(UsageError, match=r"memfd_create"):
        Repository("audited", local, worker_process=True)
    assert not (tmp_path / "store").exists()


def test_an_error_that_cannot_travel_still_says_that_the_branch_has_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
from castore.checkpoint import save
def create_tag(*arguments, **options):
    class Local(OSError):
        pass
    raise Local("no tag today")
save.create_tag = create_tag
"""
    in_worker(monkeypatch, tmp_path, code)
    with open_worker(tmp_path) as repo:
        with pytest.raises(WorkerError, match=r"Local: no tag today") as caught:
            repo.save_async(dense(0), step=0, tags=("t",)).result(WAIT_S)
        assert caught.value.__notes__ == [MOVED.format(repo.snapshot("main").id[:12])]


MOVED = "branch 'main' has moved to the new snapshot {}"

ODD = """
import warnings
class Odd(OSError):
    def __reduce__(self):
        warnings.warn("Odd is deprecated", {category}, stacklevel=1)
        return Odd, self.args
"""


@pytest.mark.parametrize("category", ["DeprecationWarning", "castore.CastoreWarning"])
def test_an_error_whose_pickling_warns_and_loses_its_notes_comes_back_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, category: str
) -> None:
    """A warning is told to the training too, so both may wait for one lock."""
    code = """
from castore.backend import LocalBackend
def fail(self, name):
    import odd
    error = odd.Odd("odd")
    error.add_note("a note")
    raise error
LocalBackend.create_stream = fail
"""
    in_worker(monkeypatch, tmp_path, code)
    (tmp_path / "site" / "odd.py").write_text("import castore\n" + ODD.format(category=category))
    with open_worker(tmp_path) as repo, warnings.catch_warnings(record=True):
        with pytest.raises(OSError, match="odd") as caught:
            repo.save_async(dense(0)).result(WAIT_S)
        assert type(caught.value).__name__ == "Odd"
        assert caught.value.__notes__ == ["a note"]


def test_a_warning_that_a_hook_makes_an_error_fails_the_call_and_neither_the_save_nor_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hook(*_: object, **__: object) -> None:
        class Local(Exception):  # noqa: N818
            """No pickle has it."""

        raise Local("refused")

    with open_worker(tmp_path) as repo:
        repo.save_async(dense(0), step=0).result(WAIT_S)
        pid = pid_of(repo)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            monkeypatch.setattr(warnings, "showwarning", hook)
            with pytest.raises(Exception, match="refused") as caught:
                repo.save_async(dense(0), step=1).result(WAIT_S)
        head = repo.snapshot("main")
        assert (head.step, caught.value.__notes__) == (1, [MOVED.format(head.id[:12])])
        assert repo.save_async(dense(2), step=2).result(WAIT_S).parents == (head.id,)
        assert pid_of(repo) == pid


def test_a_job_that_the_worker_cannot_read_is_a_typed_error_and_the_worker_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
from castore.checkpoint.worker_messages import PlacedPayload
inner = PlacedPayload.__setstate__
def refuse(*_):
    PlacedPayload.__setstate__ = inner
    raise EOFError("unknown here")
PlacedPayload.__setstate__ = refuse
"""
    in_worker(monkeypatch, tmp_path, code)
    with open_worker(tmp_path) as repo:
        with pytest.raises(WorkerError, match=r"cannot be read: EOFError\('unknown here'\)"):
            repo.save_async(dense(0)).result(WAIT_S)
        pid = pid_of(repo)
        assert repo.save_async(dense(1)).result(WAIT_S).parents == ()
        assert pid_of(repo) == pid


TEXTS = """
import enum, sys
import numpy as np
import castore

class Text(str):
    def __str__(self):
        return "another"

class Name(enum.StrEnum):
    BRANCH = "side"
    TAG = "best"

with castore.open(sys.argv[1], create=True, worker_process=True) as repo:
    first = repo.save_async({"w": np.zeros(5)}, branch=Name.BRANCH).result()
    snapshot = repo.save_async(
        {"w": np.ones(5)},
        message=Text("a message"), tags=[Name.TAG], parent=Text("side"), branch=Text("main"),
        metadata={Text("key"): [Text("value"), Name.TAG]}, metrics={Text("loss"): 1},
    ).result()
    assert snapshot.parents == (first.id,)
"""


def test_texts_of_classes_that_only_the_training_knows_are_plain_texts(tmp_path: Path) -> None:
    with start_script(tmp_path, TEXTS) as training:
        assert training.wait(WAIT_S) == 0
    with castore.open(tmp_path / "store") as repo:
        saved = repo.snapshot("best")
        assert (saved.branch, saved.message) == ("main", "a message")
        assert (saved.metadata, saved.metrics) == ({"key": ["value", "best"]}, {"loss": 1})
        assert repo.snapshot("side").branch == "side"


# ---- a worker that dies ------------------------------------------------------------------------------------------


def test_a_worker_that_is_killed_fails_the_save_it_was_writing_and_no_other(tmp_path: Path) -> None:
    with open_worker(tmp_path) as repo:
        first = repo.save_async(dense(0), step=0).result(WAIT_S)
        pid = pid_of(repo)
        lost, queued = stop_and_save(repo, (1, 2))
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerError, match=r"ended by SIGKILL .* step 1, which is lost; save again") as caught:
            lost.result(WAIT_S)
        assert caught.value.exit_status == -signal.SIGKILL
        assert queued.result(WAIT_S).parents == (first.id,)
        assert pid_of(repo) != pid
        assert_same(repo.load("main"), dense(2))
        assert repo.verify(data=True).ok


def test_a_worker_that_is_killed_in_the_middle_of_writing_leaves_a_sound_repository(tmp_path: Path) -> None:
    with open_worker(tmp_path) as repo:
        first = repo.save_async({"w": np.zeros(5)}, step=0).result(WAIT_S)
        noise = {"w": np.random.default_rng(0).integers(0, 255, 60_000_000, np.uint8)}
        pending = repo.save_async(noise, step=1)
        until(lambda: pending.progress().done_bytes > 0)
        os.kill(pid_of(repo), signal.SIGKILL)
        with pytest.raises(WorkerError):
            pending.result(WAIT_S)
        assert repo.snapshot("main").id == first.id
        assert held_leases(repo.handle.backend) == []
        assert repo.save_async(noise, step=1).result(WAIT_S).parents == (first.id,)
        assert repo.verify(data=True).ok


@pytest.mark.parametrize(
    ("operation", "prefix"),
    [("claim", "leases/"), ("create_stream", "packs/"), ("put_if_absent", "snapshots/"), ("compare_and_swap", "refs/")],
)
def test_a_kill_at_each_stage_loses_only_that_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, prefix: str
) -> None:
    with open_worker(tmp_path) as repo:
        first = repo.save(dense(0), step=0)
        with monkeypatch.context() as patch:
            in_worker(patch, tmp_path, KILL_BEFORE.format(operation=operation, prefix=prefix))
            with pytest.raises(WorkerError) as caught:
                repo.save_async(dense(1), step=1).result(WAIT_S)
        assert not getattr(caught.value, "__notes__", ())
        assert repo.snapshot("main").id == first.id
        assert repo.save_async(dense(2), step=2).result(WAIT_S).parents == (first.id,)
        assert repo.verify(data=True).ok


def test_one_that_died_after_the_branch_had_moved_says_so_and_the_next_save_continues_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
import os, signal
from castore.checkpoint import save
inner = save.move_branch
def move(*arguments, **options):
    inner(*arguments, **options)
    os.kill(os.getpid(), signal.SIGKILL)
save.move_branch = move
"""
    with open_worker(tmp_path) as repo:
        repo.save(dense(0), step=0)
        with monkeypatch.context() as patch:
            in_worker(patch, tmp_path, code)
            with pytest.raises(WorkerError, match="step 1 had been committed") as caught:
                repo.save_async(dense(1), step=1).result(WAIT_S)
        assert "lost" not in str(caught.value)
        head = repo.snapshot("main")
        assert head.step == 1
        assert caught.value.__notes__ == [MOVED.format(head.id[:12])]
        assert repo.save_async(dense(2), step=2).result(WAIT_S).parents == (head.id,)


def test_a_clock_that_stands_still_does_not_make_a_lost_save_look_committed(tmp_path: Path) -> None:
    castore.init(tmp_path / "store").close()
    opened = castore.open(tmp_path / "store").handle
    handle = Handle(opened.backend, opened.config, clock=lambda: 10**18)
    with Repository(tmp_path / "store", handle, worker_process=True) as repo:
        first = repo.save_async(dense(0), step=0).result(WAIT_S)
        (pending,) = stop_and_save(repo, (1,))
        os.kill(pid_of(repo), signal.SIGKILL)
        with pytest.raises(WorkerError, match="is lost") as caught:
            pending.result(WAIT_S)
        assert not getattr(caught.value, "__notes__", ())
        assert repo.snapshot("main").id == first.id


def test_one_that_was_killed_while_it_had_nothing_to_do_is_replaced_unnoticed(tmp_path: Path) -> None:
    with open_worker(tmp_path) as repo:
        first = repo.save_async(dense(0), step=0).result(WAIT_S)
        pid = pid_of(repo)
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert repo.save_async(dense(1), step=1).result(WAIT_S).parents == (first.id,)
        assert not Path(f"/proc/{pid}").exists(), "a zombie"


def test_signals_for_the_whole_job_are_left_to_the_training(tmp_path: Path) -> None:
    with open_worker(tmp_path) as repo:
        repo.save_async(dense(0), step=0).result(WAIT_S)
        pid = pid_of(repo)
        pending = repo.save_async(dense(1), step=1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(pid, number)
        assert pending.result(WAIT_S).step == 1
        assert pid_of(repo) == pid


def test_signals_for_the_whole_job_do_not_end_it_while_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
import os, signal
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGXCPU):
    os.kill(os.getpid(), number)
"""
    in_worker(monkeypatch, tmp_path, code)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with open_worker(tmp_path) as repo:
        assert repo.save_async(dense(0), step=0).result(WAIT_S).step == 0
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == blocked


# ---- how it is started -------------------------------------------------------------------------------------------

SAVES = """
import sys
from pathlib import Path
{before}
import castore
import numpy as np

with castore.open(sys.argv[1], create=True, worker_process=True) as repo:
    repo.save_async({{"w": np.zeros(5)}}, step=1).result()
    flags = Path(f"/proc/{{repo._worker._process._process.pid}}/cmdline").read_bytes().split(b"\\0")
    {then}
"""


@pytest.mark.parametrize("closed", ["<&-", "<&- >&-", "<&- >&- 2>&-"])
def test_a_daemon_that_has_closed_its_standard_descriptors_can_save(tmp_path: Path, closed: str) -> None:
    """Theirs would be the numbers of the socket and of the memory, and its own input be put over them."""
    script = tmp_path / "train.py"
    script.write_text(SAVES.format(before="", then=""))
    command = f'exec "{sys.executable}" "{script}" "{tmp_path / "store"}" {closed}'
    source = str(Path(castore.__file__).parent.parent)
    subprocess.run(["sh", "-c", command], check=True, timeout=WAIT_S, env={**os.environ, "PYTHONPATH": source})
    assert castore.open(tmp_path / "store").snapshot("main").step == 1


def test_the_flags_of_the_interpreter_are_passed_on_but_for_those_that_would_hide_castore(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    source = str(Path(castore.__file__).parent.parent)
    script.write_text(
        SAVES.format(
            before=f"sys.path[:0] = [Path('/no/text'), {source!r}]",  # a Path, which Python passes over
            then="print(*(flag in flags for flag in (b'-O', b'-B', b'-s', b'-I')))",  # -O: no assert
        )
    )
    command = [sys.executable, "-I", "-O", "-B", str(script), str(tmp_path / "store")]
    done = subprocess.run(command, check=True, timeout=WAIT_S, stdout=subprocess.PIPE, text=True)
    assert done.stdout == "True True True False\n"


def test_a_castore_that_was_installed_meanwhile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
import importlib.metadata
importlib.metadata.version = lambda name: "99.0"
"""
    with open_worker(tmp_path) as repo:
        with monkeypatch.context() as patch:
            in_worker(patch, tmp_path, code)
            with pytest.raises(WorkerError, match=r"runs castore 99.0, which was installed meanwhile; start the train"):
                repo.save_async(dense(0)).result(WAIT_S)
        assert repo.save_async(dense(0)).result(WAIT_S).parents == ()


def test_a_want_of_descriptors_is_a_typed_error(tmp_path: Path) -> None:
    then = """
    import os, resource
    repo._worker._process._process.kill()
    repo._worker._process._process.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))), hard))
    pending = repo.save_async({"w": np.ones(5)}, step=2)
    try:
        pending.result()
    except castore.WorkerError as error:
        found = str(error)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "cannot be started" in found and "Too many open files" in found, found
    repo.save_async({"w": np.ones(5)}, step=3).result()
"""
    with start_script(tmp_path, SAVES.format(before="", then="").rstrip() + "\n" + then) as training:
        assert training.wait(WAIT_S) == 0
    assert castore.open(tmp_path / "store").snapshot("main").step == 3


# ---- the life of the worker --------------------------------------------------------------------------------------


def open_descriptors() -> set[str]:
    gc.collect()  # Python 3.13 leaves the views of a save in a cycle
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            found.add(f"{entry.name} {entry.readlink()}")
    return {line for line in found if "castore-staged" in line or "socket:" in line}


def shared_mappings() -> int:
    """Of this process, those of other tests included whose errors hold on to them."""
    gc.collect()
    return Path("/proc/self/maps").read_text().count("castore-staged")


def test_close_leaves_no_process_no_memory_and_no_descriptor(tmp_path: Path) -> None:
    mappings = shared_mappings()
    before = open_descriptors()
    repo = open_worker(tmp_path)
    for step in range(2):
        repo.save_async(dense(step), step=step).result(WAIT_S)
        pid = pid_of(repo)
        assert any("castore-staged" in line for line in open_descriptors())
        repo.close()
        assert not Path(f"/proc/{pid}").exists()
        until(lambda: open_descriptors() == before)  # the saving thread may not have come to its end
        assert shared_mappings() == mappings
    assert [snapshot.step for snapshot in castore.open(tmp_path / "store").log()] == [1, 0]


def test_a_repository_that_is_dropped_ends_its_worker(tmp_path: Path) -> None:
    mappings = shared_mappings()
    repo = open_worker(tmp_path)
    repo.save_async(dense(0)).result(WAIT_S)
    until(lambda: not any(thread.name == "castore-save" for thread in threading.enumerate()))
    pid = pid_of(repo)
    del repo
    assert shared_mappings() == mappings
    assert not Path(f"/proc/{pid}").exists()


def test_a_forked_child_uses_a_worker_of_its_own_and_leaves_its_parents_alone(tmp_path: Path) -> None:
    with open_worker(tmp_path) as repo:
        first = repo.save_async(dense(0), step=0).result(WAIT_S)
        pid = pid_of(repo)
        os.kill(pid, signal.SIGSTOP)
        pending = repo.save_async(dense(1), step=1)

        def child() -> tuple[int, bool]:
            repo.wait()
            done = pending.done()
            repo.save_async(dense(10), branch="child", step=10).result(WAIT_S)
            own = pid_of(repo)
            repo.close()
            return own, done

        def silent_child() -> None:
            repo.close()

        own, done = in_child(child, timeout_s=WAIT_S)
        in_child(silent_child, timeout_s=WAIT_S)
        assert (own != pid, done) == (True, False)
        os.kill(pid, signal.SIGCONT)
        assert pending.result(WAIT_S).parents == (first.id,)
        assert pid_of(repo) == pid
        assert_same(repo.load("child"), dense(10))


def test_a_child_that_is_forked_under_any_lock_does_not_hang(tmp_path: Path) -> None:
    with open_worker(tmp_path) as repo:
        repo.save_async(dense(0), step=0).result(WAIT_S)
        save_worker: Any = repo._worker
        for name, lock in {"saving": save_worker._saving, "staging": save_worker._staging}.items():
            with lock:
                in_child(lambda name=name: repo.save_async(dense(1), branch=name).result(WAIT_S).step, timeout_s=WAIT_S)


SCRIPT = """
import os, sys, time
import numpy as np
import castore

repo = castore.open(sys.argv[1], create=True, worker_process=True)
repo.save_async({"w": np.zeros(5)}, step=0).result()
if os.fork() == 0:  # as a data loader would: it holds all that its parent holds
    time.sleep(60)
    os._exit(0)
noise = np.random.default_rng(0).integers(0, 255, 150_000_000, np.uint8)
pending = repo.save_async({"w": noise}, step=1)
while not pending.progress().done_bytes:
    time.sleep(0.001)
print(repo._worker._process._process.pid, flush=True)
time.sleep(60)
"""


def start_script(tmp_path: Path, text: str) -> subprocess.Popen[str]:
    script = tmp_path / "train.py"
    script.write_text(text)
    return subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "store")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(castore.__file__).parent.parent)},
        process_group=0,
    )


def test_a_worker_does_not_outlive_a_training_that_is_killed(tmp_path: Path) -> None:
    """Not even where forked children of the training hold the socket open: nothing is committed under the next one."""
    with start_script(tmp_path, SCRIPT) as training:
        try:
            assert training.stdout is not None
            pid = int(training.stdout.readline())
            training.kill()
            training.wait()
            until(lambda: not is_alive(pid), timeout_s=10)
        finally:
            os.killpg(training.pid, signal.SIGKILL)  # its child
    with castore.open(tmp_path / "store") as repo:
        assert repo.snapshot("main").step == 0
        until(lambda: not held_leases(repo.handle.backend), timeout_s=10)
        assert repo.verify(data=True).ok
        assert repo.save_async({"w": np.ones(5)}, step=2).result(WAIT_S).step == 2


INTERRUPTED = """
import os, signal, sys
import numpy as np
import castore

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
repo = castore.open(sys.argv[1], create=True, worker_process=True)
repo.save_async({"w": np.zeros(5)}, step=0).result()
pending = repo.save_async({"w": np.random.default_rng(0).standard_normal(3_000_000)}, step=1)
print("saving", flush=True)
signal.pause()
"""


def test_ctrl_c_ends_the_training_and_no_save(tmp_path: Path) -> None:
    """As a terminal does it: the signal goes to the whole group in the foreground."""
    with start_script(tmp_path, INTERRUPTED) as training:
        assert training.stdout is not None
        assert training.stdout.readline() == "saving\n"
        os.killpg(training.pid, signal.SIGINT)
        assert training.wait(WAIT_S) in {-signal.SIGINT, 1}
    with castore.open(tmp_path / "store") as repo:
        assert [snapshot.step for snapshot in repo.log()] == [1, 0]
        assert repo.verify(data=True).ok


INTERRUPTED_CLOSE = """
import os, signal, sys, threading
import numpy as np
import castore

signal.signal(signal.SIGINT, signal.default_int_handler)
repo = castore.open(sys.argv[1], create=True, worker_process=True)
repo.save_async({"w": np.zeros(5)}, step=0).result()
pid = repo._worker._process._process.pid
os.kill(pid, signal.SIGSTOP)
pending = [repo.save_async({"w": np.full(5, step)}, step=step) for step in (1, 2)]
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    with repo:
        pass
except KeyboardInterrupt:
    assert not pending[0].done()
    os.kill(pid, signal.SIGCONT)
    print("interrupted", flush=True)
"""


def test_ctrl_c_while_close_waits_loses_no_save(tmp_path: Path) -> None:
    with start_script(tmp_path, INTERRUPTED_CLOSE) as training:
        assert training.stdout is not None
        assert training.stdout.readline() == "interrupted\n"
        assert training.wait(WAIT_S) == 0
    with castore.open(tmp_path / "store") as repo:
        assert [snapshot.step for snapshot in repo.log()] == [2, 1, 0]


def test_close_waits_for_what_is_being_staged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device must not write to memory that is no longer locked."""
    handle = castore.init(tmp_path / "store").handle
    begun, go_on = threading.Event(), threading.Event()
    inner = worker.stage

    def slow(*arguments: Any) -> Any:
        begun.set()
        assert go_on.wait(WAIT_S)
        return inner(*arguments)

    monkeypatch.setattr(worker, "stage", slow)
    save_worker = worker.SaveWorker(handle)
    stager = threading.Thread(target=save_worker.stage, args=(glance(dense(0)), partial(flatten, dense(0))))
    closer = threading.Thread(target=save_worker.close)
    stager.start()
    assert begun.wait(WAIT_S)
    region = save_worker._region
    assert region is not None
    closer.start()
    closer.join(0.2)
    assert closer.is_alive()
    assert os.fstat(region.descriptor).st_size > 0, "it is still there"
    go_on.set()
    closer.join(WAIT_S)
    stager.join()
    assert save_worker._region is None


def test_a_save_beside_close_of_another_thread_is_refused_or_right(tmp_path: Path) -> None:
    """Copies in memory that was given up must never be read from the new memory."""
    repo = open_worker(tmp_path)
    stop = threading.Event()

    def close() -> None:
        while not stop.is_set():
            with suppress(UsageError, WorkerError, StorageError):
                repo.close()

    closer = threading.Thread(target=close)
    closer.start()
    try:
        saved: list[int] = []
        for step in range(8):
            with suppress(UsageError, WorkerError):
                saved.append(repo.save_async(dense(step, items=30_000), step=step).result(WAIT_S).step or 0)
    finally:
        stop.set()
        closer.join()
        repo.close()
    with castore.open(tmp_path / "store") as fresh:
        assert saved
        for snapshot in fresh.log():
            assert_same(fresh.load(snapshot), dense(snapshot.step or 0, items=30_000))
