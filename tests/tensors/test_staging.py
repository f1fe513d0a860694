"""Copies in host memory: by the compiled threads, and by numpy where there are none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from castore.tensors import staging
from castore.tensors.staging import HostCopies, Piece

MIB = 1 << 20
COMPILED = staging._memory is not None


@pytest.fixture(params=["team", "helpers", "numpy"])
def copies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> HostCopies:
    if request.param == "numpy":
        monkeypatch.setattr(staging, "_memory", None)
    elif not COMPILED:
        pytest.skip("installed without a compiler")
    elif request.param == "helpers":
        monkeypatch.setattr(staging, "_team", lambda: (0, 0))
    elif staging._team() == (0, 0):
        pytest.skip("torch has no OpenMP team here")
    return HostCopies()


def address_of(array: np.ndarray) -> int:
    address: int = array.ctypes.data
    return address


@pytest.mark.parametrize("seed", range(4))
def test_every_byte_arrives_and_no_other_changes(copies: HostCopies, seed: int) -> None:
    """Lengths around a line of the cache and around what is copied past it, at any alignment."""
    random = np.random.default_rng(seed)
    source = random.integers(0, 256, 3 * MIB, np.uint8)
    target = np.full(4 * MIB, 77, np.uint8)
    expected = target.copy()
    pieces: list[Piece] = []
    at = 0
    while at < len(target) - MIB:
        length = int(random.choice([0, 1, 63, 64, 65, 16383, 16384, 16385, 16447, 100_000, random.integers(300_000)]))
        start = int(random.integers(0, len(source) - length))
        at += int(random.integers(1, 130))
        pieces.append((target.data[at : at + length], address_of(source) + start))
        expected[at : at + length] = source[start : start + length]
        at += length
    copies.start(pieces)
    copies.wait()
    copies.wait()
    assert np.array_equal(target, expected)


def test_several_are_waited_for_together(copies: HostCopies) -> None:
    source = np.random.default_rng(0).integers(0, 256, 8 * MIB, np.uint8)
    targets = [np.zeros_like(source) for _ in range(3)]
    for target in targets:
        copies.start([(target.data[at : at + MIB], address_of(source) + at) for at in range(0, len(source), MIB)])
    copies.wait()
    assert all(np.array_equal(target, source) for target in targets)


def test_other_threads_run_meanwhile(copies: HostCopies) -> None:
    source, target = np.ones(64 * MIB, np.uint8), np.zeros(64 * MIB, np.uint8)
    pieces: list[Piece] = [(target.data[at : at + MIB], address_of(source) + at) for at in range(0, len(source), MIB)]
    threads = [threading.Thread(target=run, args=(pieces,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert np.array_equal(target, source)


def run(pieces: list[Piece]) -> None:
    copies = HostCopies()
    copies.start(pieces)
    copies.wait()


@pytest.mark.skipif(not COMPILED, reason="installed without a compiler")
@given(helpers=st.integers(0, 64), count=st.integers(0, 20))
def test_any_number_of_helpers(helpers: int, count: int) -> None:
    source = np.random.default_rng(count).integers(0, 256, 32 * 1024, np.uint8)
    targets = [np.zeros_like(source) for _ in range(count)]
    copying = staging._memory.start(tuple((target.data, address_of(source)) for target in targets), helpers)
    staging._memory.finish(copying, 0, 0)
    staging._memory.finish(copying, 0, 0)  # a second time does nothing
    assert all(np.array_equal(target, source) for target in targets)


@pytest.mark.skipif(not COMPILED, reason="installed without a compiler")
def test_what_is_dropped_unfinished_is_not_written_to_any_more() -> None:
    source, target = np.ones(64 * MIB, np.uint8), np.zeros(64 * MIB, np.uint8)
    pieces = tuple((target.data[at : at + MIB], address_of(source) + at) for at in range(0, len(source), MIB))
    staging._memory.start(pieces, 1)
    target[:] = 7
    time.sleep(0.02)
    assert np.all(target == 7)


@pytest.mark.skipif(not COMPILED, reason="installed without a compiler")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_finishes_without_its_parents_threads() -> None:
    source, target = np.ones(64 * MIB, np.uint8), np.zeros(64 * MIB, np.uint8)
    pieces = tuple((target.data[at : at + MIB], address_of(source) + at) for at in range(0, len(source), MIB))
    copying = staging._memory.start(pieces, 2)
    child = os.fork()
    if child == 0:
        staging._memory.finish(copying, 0, 0)
        os._exit(0 if target.all() else 1)
    staging._memory.finish(copying, 0, 0)
    assert os.waitpid(child, 0)[1] == 0
    assert target.all()


@pytest.mark.skipif(not COMPILED, reason="installed without a compiler")
def test_what_is_wrong_is_said_before_anything_is_copied() -> None:
    source, target = np.ones(MIB, np.uint8), np.zeros(MIB, np.uint8)
    good = (target.data, address_of(source))
    read_only = memoryview(bytes(MIB))
    with pytest.raises(BufferError):
        staging._memory.start((good, (read_only, address_of(source))), 1)
    with pytest.raises(TypeError):
        staging._memory.start((good, (target.data, "here")), 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        staging._memory.start((good, 5), 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        staging._memory.start([good], 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="helpers"):
        staging._memory.start((good,), 65)
    with pytest.raises(ValueError, match="helpers"):
        staging._memory.start((good,), -1)
    copying = staging._memory.start((good,), 0)
    with pytest.raises(ValueError, match="team"):
        staging._memory.finish(copying, 1, 0)
    with pytest.raises(TypeError):
        staging._memory.finish(copying)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="PyCapsule"):
        staging._memory.finish("copying", 0, 0)  # type: ignore[arg-type]
    assert not target.any()


# ---- the team that torch computes with ---------------------------------------------------------------------


@pytest.fixture
def team() -> tuple[int, int]:
    found = staging._team()
    if not COMPILED or found == (0, 0):
        pytest.skip("torch has no OpenMP team here")
    return found


def test_torch_has_a_team_where_it_says_so() -> None:
    """On this system and with the torch of this project: else the whole way would be passed by in silence."""
    if sys.platform == "linux" and torch.get_num_threads() > 1 and "OpenMP" in torch.__config__.parallel_info():
        assert staging._team()[1] == torch.get_num_threads()


def test_the_team_takes_part(team: tuple[int, int]) -> None:
    """Alone it copies too, whatever its size, and torch computes with it as before."""
    source = np.random.default_rng(0).integers(0, 256, 64 * MIB, np.uint8)
    for threads in (1, team[1], 5):
        target = np.zeros_like(source)
        pieces = tuple((target.data[at : at + MIB], address_of(source) + at) for at in range(0, len(source), MIB))
        staging._memory.finish(staging._memory.start(pieces, 0), team[0], threads)
        assert np.array_equal(target, source)
        assert torch.ones(1 << 20).sum().item() == 1 << 20
    assert torch.get_num_threads() == team[1]


def test_the_library_is_found_among_what_is_mapped_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "7f1f8e000000-7f1f8e037000 r-xp 00000000 fe:00 2205536    "
    monkeypatch.setattr(staging, "_MAPS", tmp_path / "maps")
    for path in ("/opt/a b/torch/lib/libgomp.so.1", "/lib/libgomp-a34b3233.so.1.0.0", "/x/libiomp5.so", "/x/libomp.so"):
        (tmp_path / "maps").write_text(
            f"{line}/usr/lib/libc.so.6\n{line}{path}\n{line}{path}\n7f1f8e6ff000-7f1f8e7ff000 rw-p 00000000 00:00 0 \n"
            f"{line}[heap]\n{line}/x/libopenmpi.so\n{line}/x/libgomp.so/other.so\n"
        )
        assert staging._OPENMP.findall(staging._MAPS.read_text()) == [path, path]


def test_one_thread_is_no_team(team: tuple[int, int]) -> None:
    torch.set_num_threads(1)
    try:
        assert staging._team() == (0, 0)
    finally:
        torch.set_num_threads(team[1])


def test_where_two_openmp_libraries_are_loaded_neither_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = "7f00-7f01 r-xp 0 08:01 5 /usr/lib/libgomp.so.1\n7f02-7f03 r-xp 0 08:01 6 /opt/a b/lib/libiomp5.so\n"
    file = tmp_path / "maps"
    monkeypatch.setattr(staging, "_MAPS", file)
    for text in ("", maps, "7f00-7f01 r-xp 0 08:01 5 /nowhere/libgomp.so.1\n"):
        file.write_text(text)
        assert staging._gomp_parallel.__wrapped__() == 0
    monkeypatch.setattr(staging, "_MAPS", tmp_path / "absent")
    assert staging._gomp_parallel.__wrapped__() == 0


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_does_without_the_team(team: tuple[int, int]) -> None:
    """OpenMP would wait for threads that only the parent has, for ever."""
    source, target = np.ones(8 * MIB, np.uint8), np.zeros(8 * MIB, np.uint8)
    pieces = tuple((target.data[at : at + MIB], address_of(source) + at) for at in range(0, len(source), MIB))
    copying = staging._memory.start(pieces, 0)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        run(list(pieces))
        complete = target.all() and staging._team() == (0, 0)
        target[:] = 0
        staging._memory.finish(copying, *team)  # begun before the fork
        os._exit(0 if complete and target.all() else 1)
    staging._memory.finish(copying, *team)
    assert os.waitpid(child, 0)[1] == 0
    assert target.all()


_SAVING_CHILD = """
import os, sys, torch, castore
torch.set_num_threads(2)
torch.randn(4_000_000).add(1).sum()  # makes the team
assert "castore.tensors.staging" not in sys.modules
if os.fork() == 0:
    import signal
    signal.alarm(60)
    repo = castore.init(sys.argv[1])
    repo.save_async({"w": torch.empty(3_000_000)}, step=1).result()
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_a_child_that_was_forked_before_castore_looked_saves_too(team: tuple[int, int], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _SAVING_CHILD, str(tmp_path / "repo")], check=False, timeout=100
    )
    assert done.returncode == 0


def test_where_the_kernel_does_not_say_the_team_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fork_flag = {"4194304": False, "4194368": True}
    monkeypatch.setattr(staging, "_STAT", tmp_path / "stat")
    assert staging._was_forked.__wrapped__(1)
    for flags, forked in fork_flag.items():
        (tmp_path / "stat").write_text(f"77 (a) R 0 b) S 1 77 77 0 -1 {flags} 100 0\n")
        assert staging._was_forked.__wrapped__(1) == forked
    (tmp_path / "stat").write_text("nothing")
    assert staging._was_forked.__wrapped__(1)
