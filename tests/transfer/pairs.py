"""A source with a small history, and targets of every make."""

from __future__ import annotations

from typing import Any

import numpy as np

from castore.api import Repository
from castore.backend import MemoryBackend
from castore.backend.base import Backend
from castore.ids import SnapshotId
from castore.options import Compression, HashName, RepositoryOptions
from tests.checkpoint import crashes
from tests.checkpoint.repositories import create_on
from tests.checkpoint.states import assert_same, training_state

STEPS = 4


def state_of(step: int) -> dict[str, Any]:
    """A training state with an alias, views of one memory, and a leaf of two chunks that drifts."""
    weights = np.random.default_rng(7).standard_normal(300_000).astype(np.float32) * np.float32(1 + 1e-5 * step)
    return {
        **training_state(step),
        "weights": weights,
        "tied": weights,
        "window": weights[100:5000],
        "odd": weights[::7],
    }


def repository(
    backend: Backend | None = None, *, hash_name: HashName = "xxh3-128", compression: Compression = "auto"
) -> Repository:
    return create_on(backend or MemoryBackend(), RepositoryOptions(hash=hash_name, compression=compression))


def source_with_history(**options: Any) -> Repository:
    """main: steps 0 to 3 (tag `best` at 1); fork: step 20, from step 0."""
    repo = repository(**options)
    for step in range(STEPS):
        repo.save(state_of(step), step=step, metrics={"loss": 1 / (step + 1)}, message=f"at {step}")
    repo.tag("best", at="main@1")
    repo.save(state_of(20), step=20, branch="fork", parent="main@0")
    return repo


def refs_of(repo: Repository) -> dict[str, SnapshotId]:
    return crashes.refs_of(repo.handle.backend)


def assert_holds_history(repo: Repository) -> None:
    """Every snapshot of `source_with_history` is there, bit for bit, and nothing is damaged."""
    assert [snapshot.step for snapshot in repo.log("main")] == [3, 2, 1, 0]
    assert [snapshot.step for snapshot in repo.log("fork")] == [20, 0]
    assert repo.snapshot("best").step == 1
    for snapshot in {*repo.log("main"), *repo.log("fork")}:
        assert snapshot.step is not None
        assert_same(repo.load(snapshot), state_of(snapshot.step))
    report = repo.verify(data=True)
    assert report.ok, report.problems
