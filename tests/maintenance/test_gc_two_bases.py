"""A rounded copy rests on two chunks of its master: a collection keeps both, and copies both out."""

from __future__ import annotations

from typing import Any

import numpy as np

from castore.backend import MemoryBackend
from castore.codec.registry import DERIVED
from castore.format.layout import snapshot_name
from castore.options import GRID_BYTES
from tests.checkpoint.repositories import create_on, open_on, packs_of
from tests.checkpoint.test_deltas import check, leaf_rows


def weights() -> Any:
    return np.random.default_rng(0).standard_normal(GRID_BYTES // 2, np.float32)


def test_both_masters_of_a_copy_survive_when_only_the_copy_is_needed() -> None:
    repo = create_on(MemoryBackend())
    repo.save({"m": weights(), "rest": np.random.default_rng(1).bytes(3 * GRID_BYTES)}, branch="old")
    repo.save({"m": weights(), "copy": weights().astype(np.float16)}, branch="old")
    kept = repo.save({"copy": weights().astype(np.float16)}, branch="main")
    (copy,) = [row for row in leaf_rows(repo) if row.chain == (DERIVED,)]
    assert len(copy.base_ids) == 2
    repo.delete_branch("old")
    for orphan in repo.orphans():
        repo.handle.backend.delete(snapshot_name(orphan.id))
    before = packs_of(repo)
    repo.gc(repack_below=0.99)
    assert packs_of(repo) != before
    fresh = open_on(repo.handle.backend)
    check(fresh, [kept])
    assert {row.chunk_id for row in leaf_rows(fresh)} == {copy.chunk_id, *copy.base_ids}
    assert fresh.verify(data=True).ok


def test_a_collection_drops_what_a_repack_replaced() -> None:
    repo = create_on(MemoryBackend())
    states = [{"w": weights() * np.float32(1 + 1e-5 * step)} for step in range(3)]
    snapshots = [repo.save(state) for state in states]
    repo.repack(flatten=True)
    assert any(row.depth for row in leaf_rows(repo))
    repo.gc(repack_below=0.99)
    fresh = open_on(repo.handle.backend)
    assert {row.depth for row in leaf_rows(fresh)} == {0}
    check(fresh, snapshots)
