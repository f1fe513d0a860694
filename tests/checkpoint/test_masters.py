"""16-bit copies of float32 leaves: found by content, stored as a rule, and always the bits that were saved."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import castore
from castore.api import Repository
from castore.backend import MemoryBackend
from castore.checkpoint.masters import find_masters
from castore.checkpoint.plan import hash_state
from castore.codec.registry import DERIVED, DIFFERENCES
from castore.codec.rounding import Rule
from castore.errors import ChecksumError, ChunkMissingError
from castore.format.layout import snapshot_name
from castore.format.pack import Row
from castore.options import DELTA_DEPTH_MAX, GRID_BYTES, RepositoryOptions
from castore.tensors import flatten
from tests.checkpoint.damage import damage_leaf, places_of
from tests.checkpoint.repositories import condemn, copied, create_on, delete_packs, open_on
from tests.checkpoint.test_deltas import check, leaf_rows

GRID_ITEMS = GRID_BYTES // 4
State = dict[str, Any]


def weights(step: int, items: int = 2 * GRID_ITEMS + 777) -> torch.Tensor:
    drawn = np.random.default_rng(0).standard_normal(items, np.float32) * np.float32(1 + 1e-5 * step)
    return torch.from_numpy(drawn)


def mixed(step: int, **others: Any) -> State:
    """Masters that drift, and their copies under names that say nothing."""
    master = weights(step)
    return {"a": master, "b": master.bfloat16(), "c": master.half(), "step": step, **others}


def rows_of(repo: Repository, ref: str, path: str) -> list[Row]:
    return [row for _, row in places_of(repo, ref, path)]


def test_a_copy_costs_one_byte_a_chunk_and_comes_back() -> None:
    repo = create_on(MemoryBackend())
    snapshot = repo.save(mixed(0))
    masters = [row.chunk_id for row in rows_of(repo, "main", "a")]
    for path in "bc":
        rows = rows_of(repo, "main", path)
        assert [(row.chain, row.stored_bytes, row.depth) for row in rows] == [((DERIVED,), 1, 1)] * 2
        assert [row.base_ids for row in rows] == [tuple(masters[:2]), tuple(masters[2:])]
    check(repo, [snapshot])
    assert repo.verify(data=True).ok


def test_copies_follow_their_masters_through_a_history_within_the_bound() -> None:
    repo = create_on(MemoryBackend())
    snapshots = [repo.save(mixed(step)) for step in range(6)]
    check(repo, snapshots)
    check(open_on(copied(repo.handle.backend)), snapshots)
    rows = leaf_rows(repo)
    copies = [row for row in rows if row.chain == (DERIVED,)]
    assert {row.depth for row in copies} == {1, 2, 3}
    assert max(row.depth for row in rows) == DELTA_DEPTH_MAX + 1
    assert all(row.depth <= DELTA_DEPTH_MAX for row in rows if row.chain in DIFFERENCES)
    assert repo.verify(data=True).ok


def test_a_background_save_derives_too() -> None:
    repo = create_on(MemoryBackend())
    snapshots = [repo.save_async(mixed(step)).result(60) for step in range(3)]
    check(repo, snapshots)
    assert sum(row.chain == (DERIVED,) for row in leaf_rows(repo)) == 12


@pytest.mark.parametrize("items", [129, GRID_ITEMS // 2, GRID_ITEMS, GRID_ITEMS + 1, 2 * GRID_ITEMS])
def test_every_length_finds_its_masters(items: int) -> None:
    repo = create_on(MemoryBackend())
    master = weights(0, items)
    snapshot = repo.save({"m": master, "copy": master.bfloat16()})
    check(repo, [snapshot])
    (row,) = rows_of(repo, "main", "copy")
    assert (row.chain, len(row.base_ids)) == ((DERIVED,), 1 if items <= GRID_ITEMS else 2)


def test_truncation_is_found_as_well() -> None:
    master = np.random.default_rng(3).standard_normal(5000, np.float32)
    cut = torch.from_numpy((master.view(np.uint32) >> 16).astype(np.uint16)).view(torch.bfloat16)
    repo = create_on(MemoryBackend())
    check(repo, [repo.save({"m": master, "copy": cut})])
    assert rows_of(repo, "main", "copy")[0].chain == (DERIVED,)


def test_every_bit_pattern_comes_back_whether_it_is_derived_or_not() -> None:
    words = np.random.default_rng(5).integers(0, 2**32, 300_000, np.uint32)
    master = torch.from_numpy(words.view(np.float32))
    for flush in (False, True):
        torch.set_flush_denormal(flush)
        try:
            repo = create_on(MemoryBackend())
            check(repo, [repo.save({"m": master, "b": master.bfloat16(), "h": master.half()})])
        finally:
            torch.set_flush_denormal(False)


def test_only_the_chunks_that_differ_are_stored_by_themselves() -> None:
    master = weights(0, 6 * GRID_ITEMS)
    copy = master.bfloat16()
    copy[3 * GRID_ITEMS] += 1
    repo = create_on(MemoryBackend())
    check(repo, [repo.save({"m": master, "copy": copy})])
    assert [row.chain == (DERIVED,) for row in rows_of(repo, "main", "copy")] == [True, False, True]


def test_a_copy_made_before_the_step_is_a_difference_as_ever() -> None:
    repo = create_on(MemoryBackend())
    snapshots = [repo.save({"m": weights(step + 100), "copy": weights(step).bfloat16()}) for step in range(4)]
    check(repo, snapshots)
    assert not any(row.chain == (DERIVED,) for row in leaf_rows(repo))
    assert any(row.chain in DIFFERENCES and row.raw_bytes for row in rows_of(repo, "main", "copy"))


def test_what_was_derived_may_be_the_base_of_a_difference_and_the_other_way_round() -> None:
    """The copy lags behind its master in every other save."""
    repo = create_on(MemoryBackend())
    snapshots = [repo.save({"m": weights(step), "copy": weights(step - step % 2 * 5).bfloat16()}) for step in range(8)]
    check(repo, snapshots)
    check(open_on(copied(repo.handle.backend)), snapshots)
    assert repo.verify(data=True).ok


def test_of_several_leaves_that_agree_in_the_sample_the_one_that_proves_is_taken() -> None:
    master = weights(0, 4000)
    other = master.clone()
    other[999] += 1  # between the windows of the sample
    repo = create_on(MemoryBackend())
    check(repo, [repo.save({"a": other, "b": master, "copy": master.bfloat16()})])
    (copy,), (base,) = rows_of(repo, "main", "copy"), rows_of(repo, "main", "b")
    assert copy.base_ids == (base.chunk_id,)


def test_a_master_that_is_there_already_serves() -> None:
    repo = create_on(MemoryBackend())
    repo.save({"m": weights(0)})
    check(repo, [repo.save({"m": weights(0), "copy": weights(0).half()})])
    assert all(row.chain == (DERIVED,) for row in rows_of(repo, "main", "copy"))


def test_names_and_shapes_do_not_matter_but_lengths_do() -> None:
    master = weights(0, 4096)
    flat = flatten({"x": master.reshape(64, 64), "y": master.bfloat16(), "z": master[:4000].bfloat16().clone()})
    hashed = hash_state(flat, create_on(MemoryBackend()).handle.hasher, progress=lambda _: None)
    found = find_masters(hashed.leaves)
    by_path = {entry.path: entry for entry in hashed.entries}
    assert by_path["y"].chunks in found
    assert by_path["z"].chunks not in found
    (only,) = found.values()
    assert [master.rule for master in only] == [Rule.BFLOAT16_NEAREST]


@pytest.mark.parametrize("compression", ["lz4", "none"])
def test_nothing_rests_on_anything_with_other_settings(compression: Any) -> None:
    repo = create_on(MemoryBackend(), RepositoryOptions(compression=compression))
    check(repo, [repo.save(mixed(0))])
    assert all(row.depth == 0 for row in leaf_rows(repo))


# ---- damage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [0, 1, 2])
def test_a_rotten_master_is_named_by_load_and_verify(chunk: int) -> None:
    repo = create_on(MemoryBackend())
    snapshot = repo.save(mixed(0))
    master = rows_of(repo, "main", "a")[chunk].chunk_id.hex()
    damage_leaf(repo, "main", "a", chunk=chunk)
    fresh = open_on(repo.handle.backend)
    with pytest.raises(ChecksumError, match=f"leaf 'b': .*its master {master} cannot be read"):
        fresh.load("main", paths=["b"])
    report = fresh.verify(data=True)
    assert report.damaged_snapshots == {snapshot.id: ("a", "b", "c")}
    (problem,) = report.problems
    assert master in problem.message


def test_a_master_that_is_gone_is_named() -> None:
    repo = create_on(MemoryBackend())
    repo.save({"m": weights(0)})
    gone = {pack_id for pack_id, _ in places_of(repo, "main", "m")}
    snapshot = repo.save({"m": weights(0), "copy": weights(0).half()})
    delete_packs(repo.handle.backend, gone)
    fresh = open_on(repo.handle.backend)
    with pytest.raises((ChunkMissingError, castore.DamageError), match="master"):
        fresh.load(snapshot.id, paths=["copy"])
    assert snapshot.id in fresh.verify().damaged_snapshots


def test_masters_in_condemned_packs_pull_their_copies_with_them() -> None:
    """The copy's own pack stands; what it rests on is going, so it counts as absent and is written again."""
    repo = create_on(MemoryBackend())
    repo.save({"m": weights(0)})
    going = {pack_id for pack_id, _ in places_of(repo, "main", "m")}
    repo.save({"m": weights(0), "copy": weights(0).half()})
    condemn(repo.handle.backend, going)
    snapshot = repo.save({"copy": weights(0).half()}, branch="other")
    delete_packs(repo.handle.backend, going)
    check(open_on(repo.handle.backend), [snapshot])


def test_masters_that_only_copies_need_are_pinned() -> None:
    repo = create_on(MemoryBackend())
    both = repo.save({"m": weights(0), "copy": weights(0).half()})
    pinned_bytes = sum(row.stored_bytes for row in rows_of(repo, "main", "m"))
    kept = repo.save({"copy": weights(0).half()}, branch="other")
    assert repo.usage().pinned_bytes == 0
    repo.handle.backend.delete(snapshot_name(both.id))
    usage = repo.usage()
    assert usage.pinned_bytes == pinned_bytes
    assert usage.snapshots[0].exclusive_bytes > pinned_bytes
    check(repo, [kept])
