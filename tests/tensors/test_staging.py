"""Copies in host memory: by the compiled threads, and by numpy where there are none."""

from __future__ import annotations

import os
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from castore.tensors import staging
from castore.tensors.staging import HostCopies, Piece

MIB = 1 << 20
COMPILED = staging._memory is not None


@pytest.fixture(params=["compiled", "numpy"])
def copies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> HostCopies:
    if request.param == "numpy":
        monkeypatch.setattr(staging, "_memory", None)
    elif not COMPILED:
        pytest.skip("installed without a compiler")
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
    staging._memory.finish(copying)
    staging._memory.finish(copying)  # a second time does nothing
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
        staging._memory.finish(copying)
        os._exit(0 if target.all() else 1)
    staging._memory.finish(copying)
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
    assert not target.any()
