"""What a save looked at is let go of when it is over, not when Python next collects cycles."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any
from unittest import mock

import numpy as np
import pytest

from castore.api import Repository
from castore.backend import MemoryBackend
from castore.codec.chooser import Encoded, encode_chunk
from castore.errors import CastoreError, StorageError
from tests.checkpoint.repositories import HookedBackend, create_on, open_on
from tests.checkpoint.states import State

torch = pytest.importorskip("torch")


def state_of(step: int) -> State:
    """Encoded against the save before, some of it as the rounding of the rest, one tensor tied."""
    weights = torch.randn(700, 900, generator=torch.Generator().manual_seed(0)) * (1 + 1e-5 * step)
    small = {str(number): torch.full((3000,), float(step)) for number in range(20)}
    return {"w": weights, "copy": weights.bfloat16(), "tied": weights, "array": np.full(200_000, step), "small": small}


@pytest.fixture(autouse=True)
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def save(repo: Repository, state: State) -> None:
    repo.save(state, step=7)


def save_async(repo: Repository, state: State) -> None:
    repo.save_async(state, step=7).result(60)
    repo.wait()


def save_and_fail_to_encode(repo: Repository, state: State) -> None:
    """In a thread: an error inline would come first, and hold no future."""

    def fail(*arguments: Any, **options: Any) -> Encoded:
        if threading.current_thread().name.startswith("castore-encode"):
            raise StorageError("no such thing")
        return encode_chunk(*arguments, **options)

    with mock.patch("castore.chunk_writer.encode_chunk", fail), suppress(CastoreError):
        repo.save(state, step=7)


def save_and_fail(repo: Repository, state: State) -> None:
    backend = repo.handle.backend
    assert isinstance(backend, HookedBackend)

    def fail(operation: str, name: str) -> None:
        if operation == "put_if_absent":
            raise StorageError(f"{name}: the disk is gone")

    backend.hook = fail
    with suppress(CastoreError):
        repo.save(state, step=7)
    backend.hook = lambda operation, name: None


def load_into(repo: Repository, state: State) -> None:
    repo.load("main", into=state)


@pytest.mark.parametrize("use", [save, save_async, save_and_fail, save_and_fail_to_encode, load_into])
def test_a_state_is_let_go_of_at_once(use: Callable[[Repository, State], None]) -> None:
    repo = open_on(HookedBackend(create_on(MemoryBackend()).handle.backend))
    for step in range(3):
        repo.save(state_of(step), step=step)
    state = state_of(3)
    alive = [weakref.ref(value) for value in (state["w"], state["copy"], state["array"], state["small"]["5"])]
    use(repo, state)
    del state
    assert [reference() for reference in alive] == [None] * len(alive)
    repo.close()
