"""Repositories with something to collect, and the collector run in steps that a test chooses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from castore.api import Repository
from castore.backend import MemoryBackend
from castore.backend.base import Backend
from castore.ids import SnapshotId
from castore.maintenance.gc.collect import GcRequest, collect
from castore.maintenance.gc.report import GcReport
from castore.marks import Forgotten, forget_snapshot
from castore.options import RepositoryOptions
from castore.snapshots import read_record
from tests.checkpoint.repositories import create_on, open_on
from tests.checkpoint.states import State, assert_same


def drifting(step: int) -> State:
    """Dense training: every element changes a little, so that later saves are stored as differences."""
    weights = np.random.default_rng(1).standard_normal(3000).astype(np.float32)
    return {"weights": weights * np.float32(1 + 1e-5 * step), "step": step, "note": f"step {step}"}


def fresh(step: int) -> State:
    """Nothing that another step has."""
    return {"noise": np.random.default_rng(1000 + step).integers(0, 256, 9000, np.uint8), "step": step}


def line(
    count: int,
    state_of: Callable[[int], State] = fresh,
    *,
    options: RepositoryOptions | None = None,
    backend: Backend | None = None,
) -> tuple[Repository, list[SnapshotId]]:
    """A repository with so many snapshots on main, oldest first."""
    repo = create_on(backend or MemoryBackend(), options)
    return repo, [repo.save(state_of(step), step=step).id for step in range(count)]


def forget(repo: Repository, *snapshot_ids: SnapshotId) -> None:
    """Drop snapshots as `Repository.forget` does."""
    backend = repo.handle.backend
    for snapshot_id in snapshot_ids:
        record = read_record(backend, snapshot_id)
        mark = Forgotten(snapshot_id, record.parents, record.branch, record.step, record.time_ns, 1, "a test")
        forget_snapshot(backend, mark)


class Timepiece:
    """Monotonic seconds that pass only by sleeping; `while_asleep` is what others do meanwhile."""

    def __init__(self, while_asleep: Callable[[], object] = lambda: None) -> None:
        self.now_s = 0.0
        self._while_asleep = while_asleep

    def monotonic_s(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        self._while_asleep()


def gc(repo: Repository, time: Timepiece | None = None, **request: Any) -> GcReport:
    """One collection; waiting takes no time."""
    time = time or Timepiece()
    return collect(repo.handle, GcRequest(**request), monotonic_s=time.monotonic_s, sleep=time.sleep)


def check_whole(repo: Repository, expected: dict[SnapshotId, State]) -> None:
    """Every snapshot loads bit for bit through a new handle, and nothing is damaged."""
    found = open_on(getattr(repo.handle.backend, "inner", repo.handle.backend))
    for snapshot_id, state in expected.items():
        assert_same(found.load(snapshot_id), state)
    report = found.verify(data=True)
    assert report.ok, report.problems


def gc_files(repo: Repository) -> list[str]:
    """What a collection left in gc/."""
    return [info.name for info in repo.handle.backend.list("gc/") if info.name != "gc/reserve"]
