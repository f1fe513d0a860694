"""Through its parity a damaged repository reads as it was."""

from __future__ import annotations

import numpy as np
import pytest

from castore.api import Repository
from castore.backend import MemoryBackend
from castore.errors import DamageError
from castore.format.layout import pack_name
from castore.maintenance.parity import add_parity
from castore.maintenance.restoring import restoring_handle
from tests.checkpoint.damage import replace_file
from tests.checkpoint.repositories import create_on, files_of, open_on, packs_of
from tests.checkpoint.states import assert_same, training_state

pytest.importorskip("pyeclib")


def state_of(step: int) -> dict[str, object]:
    weights = np.random.default_rng(0).standard_normal(60_000).astype(np.float32) * np.float32(1 + 1e-5 * step)
    return {"weights": weights, **training_state(step)}


@pytest.fixture
def repo() -> Repository:
    """Three saves, the later ones differences from the first."""
    repository = create_on(MemoryBackend())
    for step in range(3):
        repository.save(state_of(step), step=step)
    return repository


def spoil(repo: Repository, share: float) -> Repository:
    """Noise in the middle of every pack; another handle, as another process would have it."""
    for pack_id in packs_of(repo):
        data = files_of(repo.handle.backend)[pack_name(pack_id)]
        length = int(len(data) * share)
        start = len(data) // 3
        replace_file(repo.handle.backend, pack_name(pack_id), data[:start] + bytes(length) + data[start + length :])
    return open_on(repo.handle.backend)


def test_everything_loads_through_the_parity_while_the_packs_stay_as_they_are(repo) -> None:
    add_parity(repo.handle, overhead_percent=20)
    damaged = spoil(repo, 0.1)
    with pytest.raises(DamageError):
        damaged.load("main@0")
    before = files_of(damaged.handle.backend)
    through = Repository("parity", restoring_handle(damaged.handle))
    for step in range(3):
        assert_same(through.load(f"main@{step}"), state_of(step))
    assert files_of(damaged.handle.backend) == before
    target = create_on(MemoryBackend())
    through.push(target)  # the way out of a dying disk
    assert target.verify(data=True).ok
    assert_same(target.load("main"), state_of(2))


def test_a_pack_that_is_gone_comes_back_from_as_much_parity(repo) -> None:
    add_parity(repo.handle, overhead_percent=100)
    for pack_id in packs_of(repo):
        repo.handle.backend.delete(pack_name(pack_id))
    through = Repository("parity", restoring_handle(open_on(repo.handle.backend).handle))
    assert_same(through.load("main"), state_of(2))


def test_beyond_its_limit_a_pack_is_read_as_it_is(repo) -> None:
    add_parity(repo.handle, overhead_percent=10)
    damaged = spoil(repo, 0.6)
    before = files_of(damaged.handle.backend)
    through = Repository("parity", restoring_handle(damaged.handle))
    with pytest.raises(DamageError):
        through.load("main@0")
    assert files_of(damaged.handle.backend) == before, "a view that is only read has marked damage"


def test_without_parity_it_is_the_repository_itself(repo) -> None:
    through = Repository("parity", restoring_handle(repo.handle))
    assert_same(through.load("main"), state_of(2))


def test_repair_takes_what_is_lost_from_the_parity(repo) -> None:
    add_parity(repo.handle, overhead_percent=20)
    damaged = spoil(repo, 0.1)
    assert damaged.repair(dry_run=True).plan.heals
    report = damaged.repair()
    assert report.healed_count
    assert not report.losses
    fresh = open_on(damaged.handle.backend)
    assert fresh.verify(data=True).ok
    for step in range(3):
        assert_same(fresh.load(f"main@{step}"), state_of(step))
