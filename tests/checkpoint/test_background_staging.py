"""A background save that dies or fails while its state is still being copied: nothing of it reaches the disk."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

import castore
from castore.backend import MemoryBackend
from castore.checkpoint import stage
from castore.host_memory import copy_bytes
from castore.options import GRID_BYTES
from castore.tensors import HostCopies, Piece
from tests.checkpoint.killing import Report, fork
from tests.checkpoint.repositories import create_on, files_of, held_leases, open_on
from tests.checkpoint.states import State, assert_same

WAIT_S = 60


def state_of(step: int) -> State:
    """Sixteen chunks, so that copying can be stopped in the middle of a leaf and between leaves; the first eight lie
    plainly in memory, the others do not.
    """
    rng = np.random.default_rng(step)
    plain = {name: rng.integers(0, 256, 3 * GRID_BYTES + 100, np.uint8) for name in ("first", "second")}
    return {**plain, **{f"every second of the {name}": np.repeat(array, 2)[::2] for name, array in plain.items()}}


def copying(stop: Any, *, at: int) -> Any:
    """A patch under which the copy number `at` of a state does `stop` first."""
    seen = 0

    def count() -> None:
        nonlocal seen
        seen += 1
        if seen == at + 1:
            stop()

    def counted(target: memoryview, raw: Any) -> None:
        count()
        copy_bytes(target, raw)

    class Counted(HostCopies):
        def start(self, pieces: Sequence[Piece]) -> None:
            for piece in pieces:
                count()
                super().start([piece])

    return mock.patch.multiple(stage, copy_bytes=counted, HostCopies=Counted)


@pytest.mark.parametrize("at", [0, 2, 4, 7, 8, 13])
def test_a_kill_while_the_state_is_staged_costs_that_save_and_nothing_else(tmp_path: Path, at: int) -> None:
    path = tmp_path / "store"
    with castore.init(path) as repo:
        first = repo.save(state_of(0), step=0)
        before = files_of(repo.handle.backend)

    def save(report: Report) -> None:
        def stop() -> None:
            report("there")
            time.sleep(WAIT_S)

        with copying(stop, at=at), castore.open(path) as own:
            own.save_async(state_of(1), step=1)

    child = fork(save)
    assert child.next_line() == "there"
    child.kill()
    with castore.open(path) as repo:
        assert files_of(repo.handle.backend) == before
        assert held_leases(repo.handle.backend) == []
        assert repo.save_async(state_of(1), step=1).result(WAIT_S).parents == (first.id,)
        assert_same(repo.load("main"), state_of(1))
        assert_same(repo.load(first.id), state_of(0))
        assert repo.verify(data=True).ok


@pytest.mark.parametrize("at", [0, 2, 4, 7, 8, 13])
def test_an_error_while_the_state_is_staged_is_raised_by_the_call_and_the_next_save_works(at: int) -> None:
    repo = create_on(MemoryBackend())
    first = repo.save_async(state_of(0), step=0).result(WAIT_S)
    before = files_of(repo.handle.backend)

    def fail() -> None:
        raise MemoryError("no memory for a copy")

    for _ in range(5):  # more often than saves may be in flight: none of them counts as one
        with copying(fail, at=at), pytest.raises(MemoryError):
            repo.save_async(state_of(1), step=1)
    assert files_of(repo.handle.backend) == before
    second = repo.save_async(state_of(2), step=2).result(WAIT_S)
    assert second.parents == (first.id,)
    assert_same(open_on(repo.handle.backend).load("main"), state_of(2))
    repo.close()
