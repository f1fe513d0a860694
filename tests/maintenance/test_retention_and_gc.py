"""Forgetting, thinning and undelete with the real collector: bytes are freed, and what is kept is whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import castore
from castore.api import Repository
from castore.backend import MemoryBackend
from castore.errors import SnapshotGoneError, ThinnedError
from castore.format.layout import POLICY_COLLECTED
from castore.options import RepositoryOptions
from tests.checkpoint.repositories import HookedBackend, create_on, open_on
from tests.checkpoint.states import assert_same

DAY_NS = 24 * 3600 * 10**9


def state(step: int) -> dict:
    """Weights that drift, so that they are stored as differences, and moments that are noise."""
    drift = np.random.default_rng(0).standard_normal(40_000).astype(np.float32) * np.float32(1 + step * 1e-5)
    noise = np.random.default_rng(step + 100).standard_normal(40_000).astype(np.float32)
    return {"model": {"w": drift}, "optimizer": {"m": noise, "step": step}}


@pytest.fixture(params=["on disk", "in memory"])
def repository(request, tmp_path: Path):
    """On disk with differences, so that bases must stay; in memory without."""
    if request.param == "on disk":
        repository = castore.init(tmp_path / "repo", lease_s=5, orphan_grace_s=3600)
    else:
        repository = create_on(MemoryBackend(), RepositoryOptions(compression="none", lease_s=5, orphan_grace_s=3600))
    with repository:
        for step in range(8):
            repository.save(state(step), step=step)
        yield repository


def steps(repository: Repository) -> list[int | None]:
    return [snapshot.step for snapshot in repository.log()]


def pack_bytes(repository: Repository) -> int:
    return sum(info.size_bytes for info in repository.handle.backend.list("packs/"))


def test_forget_then_gc_frees_and_history_goes_on(repository: Repository) -> None:
    before = pack_bytes(repository)
    repository.forget(castore.Keep(last=2, every=4))
    assert pack_bytes(repository) == before
    repository.gc()
    assert pack_bytes(repository) < 0.75 * before
    assert steps(repository) == [7, 6, 4, 0]
    for snapshot in repository.log():
        assert snapshot.step is not None
        assert_same(repository.load(snapshot), state(snapshot.step))
    assert repository.verify(data=True).ok
    assert {(found.step, found.is_there) for found in repository.forgotten()} == {(s, False) for s in (1, 2, 3, 5)}
    with pytest.raises(SnapshotGoneError):
        repository.undelete([repository.forgotten()[0].id])
    repository.gc()
    assert {found.step for found in repository.forgotten()} == {3, 5}, "one tombstone stands for those behind it"
    assert steps(repository) == [7, 6, 4, 0]


def test_a_long_history_leaves_one_tombstone(repository: Repository) -> None:
    for step in range(8, 14):
        repository.save(state(step), step=step)
        repository.forget(castore.Keep(last=2))
        repository.gc()
    assert steps(repository) == [13, 12]
    assert len(list(repository.handle.backend.list("forgotten/"))) <= 2
    assert sum(found.is_there for found in repository.forgotten()) == 0


def test_thin_then_gc_frees_and_what_is_left_is_whole(repository: Repository) -> None:
    before = pack_bytes(repository)
    repository.thin(["optimizer/**"], older_than=2)
    repository.gc()
    assert pack_bytes(repository) < 0.65 * before
    fresh = open_on(repository.handle.backend)
    for snapshot in fresh.log():
        assert snapshot.step is not None
        if snapshot.dropped:
            with pytest.raises(ThinnedError):
                fresh.load(snapshot)
            assert_same(fresh.load(snapshot, paths=["model"]), {"model": state(snapshot.step)["model"]})
        else:
            assert_same(fresh.load(snapshot), state(snapshot.step))
    report = fresh.verify(data=True)
    assert report.ok, report.problems
    with pytest.raises(SnapshotGoneError):
        fresh.undelete(["main~5"])
    fresh.close()


def test_undelete_before_gc_keeps_everything(repository: Repository) -> None:
    repository.thin(["optimizer/**"], older_than=2)
    repository.forget(castore.Keep(last=4))
    repository.undelete()
    for snapshot in list(repository.log()):
        if snapshot.dropped:
            repository.undelete([snapshot])
    repository.gc()
    for snapshot in repository.log():
        assert snapshot.step is not None
        assert_same(repository.load(snapshot), state(snapshot.step))
    assert len(steps(repository)) == 8


def test_gc_auto_applies_the_policy_and_is_idle_when_there_is_nothing_to_do(repository: Repository) -> None:
    assert repository.gc(auto=True) is not None, "the first one looks"
    assert repository.gc(auto=True) is None
    repository.set_policy(castore.Keep(last=3), thin=["optimizer"], older_than=1)
    report = repository.gc(auto=True)
    assert report is not None
    assert len(report.snapshots) == 5
    assert steps(repository) == [7, 6, 5]
    assert [snapshot.dropped for snapshot in repository.log()] == [(), ("optimizer",), ("optimizer",)]
    assert repository.gc(auto=True) is None
    hooked = HookedBackend(repository.handle.backend)
    assert open_on(hooked).gc(auto=True) is None
    assert not [call for call in hooked.calls if call[1].startswith("packs/")], "no pack is looked at"
    repository.save(state(8), step=8)
    assert repository.gc(auto=True) is not None
    assert steps(repository) == [8, 7, 6]


def test_gc_auto_looks_once_a_day_for_what_crashes_left(repository: Repository) -> None:
    repository.gc(auto=True)
    start_ns = repository.handle.clock()
    repository.handle.clock = lambda: start_ns + DAY_NS - 10**9
    assert repository.gc(auto=True) is None
    repository.handle.clock = lambda: start_ns + DAY_NS
    assert repository.gc(auto=True) is not None
    assert repository.gc(auto=True) is None
    backend = repository.handle.backend
    data = backend.read(POLICY_COLLECTED, max_bytes=4096)
    backend.compare_and_swap(POLICY_COLLECTED, expected=data, new=b"rot")
    assert repository.gc(auto=True) is not None, "what cannot be read is written anew"
    assert repository.gc(auto=True) is None


def test_a_dry_run_of_gc_auto_changes_nothing(repository: Repository) -> None:
    repository.set_policy(castore.Keep(last=3))
    repository.forget(ids=["main~1"])
    report = repository.gc(True, auto=True)
    assert report is not None
    assert len(report.snapshots) == 1
    assert len(steps(repository)) == 7
    assert repository.handle.backend.stat(POLICY_COLLECTED) is None
