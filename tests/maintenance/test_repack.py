"""Chunks written again in another encoding: the same values and manifests, and readers take the new records."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import castore
from castore.api import Repository
from castore.backend import MemoryBackend
from castore.codec.registry import CONSTANT, DERIVED, DIFFERENCES
from castore.errors import CastoreError, ChecksumError, ChunkMissingError, UnknownRefError, UsageError
from castore.format.layout import GC, SNAPSHOTS
from castore.format.pack import Row
from castore.ids import ChunkId
from castore.leases import list_leases
from castore.options import RepositoryOptions
from castore.repository import Handle
from castore.store import Locations, preference
from tests.checkpoint.damage import damage_leaf
from tests.checkpoint.repositories import (
    HookedBackend,
    condemn,
    create_on,
    delete_packs,
    files_of,
    open_on,
    packs_of,
)
from tests.checkpoint.test_deltas import check, chunks_of

State = dict[str, Any]


def state(step: int) -> State:
    rng = np.random.default_rng(0)
    weights = rng.standard_normal(20_000, np.float32)
    strides = np.tile(np.repeat([1e-6, 1e-4], 100), 100)  # rows learn at two rates
    weights += (np.random.default_rng(step).standard_normal(20_000) * strides * step).astype(np.float32)
    levels = np.round(rng.standard_normal(5000), 1).astype(np.float64) + step
    return {"w": weights, "half": weights.astype(np.float16), "levels": levels, "zeros": np.zeros(500), "step": step}


def history(saves: int = 4) -> tuple[Repository, list[castore.Snapshot]]:
    repo = create_on(MemoryBackend())
    return repo, [repo.save(state(step)) for step in range(saves)]


def read_rows(repo: Repository, ref: str) -> dict[str, list[Row]]:
    """Path → the records that a load reads."""
    found: dict[str, list[Row]] = {}
    for path in ("w", "half", "levels", "zeros"):
        ids = chunks_of(repo, ref, path)
        locations: dict[Any, Locations] = repo.handle.store.locate(set(ids))
        found[path] = [locations[chunk_id][0].row for chunk_id in ids]
    return found


def flat(rows: dict[str, list[Row]]) -> list[Row]:
    return [row for path in rows.values() for row in path]


def test_a_flattened_snapshot_rests_on_nothing_and_the_others_stay_as_they_are() -> None:
    repo, snapshots = history()
    manifests = files_of(repo.handle.backend, SNAPSHOTS)
    before = {ref: read_rows(repo, ref) for ref in ("main", "main~1")}
    chains = {row.chain for row in flat(before["main"])}
    assert (DERIVED,) in chains
    assert chains & DIFFERENCES
    report = repo.repack(["main"], flatten=True)
    fresh = open_on(repo.handle.backend)
    after = read_rows(fresh, "main")
    assert all(row.depth == 0 for row in flat(after))
    assert report.rewritten_count == sum(row.depth > 0 for row in flat(before["main"]))
    assert report.new_bytes > report.old_bytes
    assert read_rows(fresh, "main~1") == before["main~1"]
    assert files_of(repo.handle.backend, SNAPSHOTS) == manifests
    check(fresh, snapshots)
    assert fresh.verify(data=True).ok
    assert list_leases(repo.handle.backend) == []


def test_a_flattened_snapshot_outlives_the_packs_of_all_others() -> None:
    repo, _ = history(1)
    first = packs_of(repo)
    repo.save(state(1))
    between = packs_of(repo)
    last = repo.save(state(2))
    repo.repack([last.id], flatten=True)
    delete_packs(repo.handle.backend, between - first)
    check(open_on(repo.handle.backend), [last])


def test_an_archive_is_never_larger_and_the_same_again_changes_nothing() -> None:
    repo, snapshots = history()
    before = {snapshot.id: read_rows(repo, snapshot.id) for snapshot in snapshots}
    report = repo.repack(level="max")
    assert 0 < report.rewritten_count <= report.chunk_count
    assert report.new_bytes < report.old_bytes
    fresh = open_on(repo.handle.backend)
    for snapshot_id, old in before.items():
        for was, row in zip(flat(old), flat(read_rows(fresh, snapshot_id)), strict=True):
            assert preference(row) <= preference(was)
            assert row.chain == was.chain or not row.base_ids
    check(fresh, snapshots)
    assert fresh.verify(data=True).ok
    packs = packs_of(repo)
    again = fresh.repack(level="max")
    assert (again.rewritten_count, again.pack_bytes, packs_of(repo)) == (0, 0, packs)


def test_both_at_once_are_short_and_flat() -> None:
    repo, snapshots = history()
    usual, _ = history()
    usual.repack(["main"], flatten=True)
    repo.repack(["main"], flatten=True, level="max")
    rows, usual_rows = flat(read_rows(repo, "main")), flat(read_rows(usual, "main"))
    assert all(row.depth == 0 for row in rows)
    assert sum(row.stored_bytes for row in rows) < sum(row.stored_bytes for row in usual_rows)
    check(open_on(repo.handle.backend), snapshots)


def test_constants_and_rounded_copies_are_left_alone_by_an_archive() -> None:
    repo, _ = history()
    repo.repack(level="max")
    chains = {row.chain for row in flat(read_rows(open_on(repo.handle.backend), "main"))}
    assert chains >= {(CONSTANT,), (DERIVED,)}


def test_the_next_save_continues_from_what_was_repacked() -> None:
    repo, snapshots = history()
    repo.repack(flatten=True)
    snapshots += [repo.save(state(step)) for step in range(4, 7)]
    check(open_on(repo.handle.backend), snapshots)
    assert {row.depth for row in read_rows(repo, "main")["w"]} == {2}
    assert repo.verify(data=True).ok


def test_usage_counts_the_record_that_is_read_and_frees_the_other() -> None:
    repo, _ = history()
    before = repo.usage()
    report = repo.repack(level="max")
    after = open_on(repo.handle.backend).usage()
    assert after.leaf_bytes == before.leaf_bytes - report.old_bytes + report.new_bytes
    assert after.unreferenced_bytes == before.unreferenced_bytes + report.old_bytes


def test_a_dry_run_writes_nothing() -> None:
    repo, _ = history()
    files = files_of(repo.handle.backend)
    plan = repo.repack(["main"], flatten=True, dry_run=True)
    assert files_of(repo.handle.backend) == files
    assert (plan.dry_run, plan.rewritten_count) == (True, 0)
    done = repo.repack(["main"], flatten=True)
    assert (plan.chunk_count, plan.raw_bytes) == (done.chunk_count, done.raw_bytes)


def test_progress_reaches_the_end_and_never_goes_back() -> None:
    repo, _ = history(2)
    seen: list[tuple[int, int]] = []
    repo.repack(flatten=True, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({}, UsageError),
        ({"level": "usual"}, UsageError),
        ({"level": "best"}, UsageError),
        ({"refs": ["nothing"], "flatten": True}, UnknownRefError),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: dict[str, Any], error: type[CastoreError]) -> None:
    repo, _ = history(1)
    with pytest.raises(error):
        repo.repack(**arguments)


# ---- damage and collectors -----------------------------------------------------------------------------------------


def test_rot_is_never_laundered() -> None:
    repo, snapshots = history(3)
    damage_leaf(repo, "main", "w")
    packs = packs_of(repo)
    fresh = open_on(repo.handle.backend)
    for arguments in ({"level": "max"}, {"flatten": True}):
        with pytest.raises((ChecksumError, ChunkMissingError)):
            fresh.repack(["main"], **arguments)
    assert packs_of(repo) == packs
    check(open_on(repo.handle.backend), snapshots[:2])


def test_a_snapshot_that_lacks_a_pack_is_refused_before_anything_is_written() -> None:
    repo, _ = history(1)
    first = packs_of(repo)
    repo.save(state(1))
    delete_packs(repo.handle.backend, first)
    packs = packs_of(repo)
    with pytest.raises((ChunkMissingError, castore.DamageError), match="castore verify"):
        open_on(repo.handle.backend).repack(["main"], level="max")
    assert packs_of(repo) == packs


def test_bases_that_a_collector_takes_meanwhile_cost_the_new_records_their_bases() -> None:
    """The packs of the bases are condemned when the new packs are there, just before the check."""
    backend = MemoryBackend()
    repo = create_on(backend)
    repo.save(state(0))
    going = packs_of(repo)
    last = repo.save(state(1))
    before = packs_of(repo)
    looks = 0

    def collect(operation: str, name: str) -> None:
        nonlocal looks
        if (operation, name) == ("list", GC):
            looks += 1
            if looks == 1:
                condemn(backend, going)

    open_on(HookedBackend(backend, collect)).repack([last.id], level="max")
    assert looks > 1
    records: dict[ChunkId, list[Row]] = {}
    for pack_id in packs_of(repo) - before:
        for row in read_pack(repo, pack_id):
            records.setdefault(row.chunk_id, []).append(row)
    assert any(row.base_ids for rows in records.values() for row in rows)
    for rows in records.values():
        assert any(not row.base_ids for row in rows)


def read_pack(repo: Repository, pack_id: Any) -> list[Row]:
    from castore.maintenance.tables import open_rows

    return open_rows(repo.handle.backend, pack_id, repo.handle.hasher)[0]


def test_an_interrupted_repack_leaves_everything_as_it_was() -> None:
    repo, snapshots = history(3)
    files = files_of(repo.handle.backend)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repo.repack(flatten=True, progress=interrupt)
    assert files_of(repo.handle.backend) == files
    check(open_on(repo.handle.backend), snapshots)


def test_a_repository_without_compression_can_be_archived() -> None:
    from castore.options import RepositoryOptions

    repo = create_on(MemoryBackend(), RepositoryOptions(compression="none"))
    snapshot = repo.save(state(0))
    report = repo.repack(level="max")
    assert report.new_bytes < 0.9 * report.old_bytes
    check(open_on(repo.handle.backend), [snapshot])


def test_what_was_thinned_and_collected_is_not_missed() -> None:
    repo, snapshots = history()
    repo.thin(["levels"], older_than=1)
    repo.gc()
    with pytest.raises(castore.ThinnedError):
        repo.load(snapshots[0])

    report = repo.repack(flatten=True)

    assert report.rewritten_count
    assert all(not row.base_ids for row in read_rows(repo, snapshots[-1].id)["w"])
    for number, snapshot in enumerate(snapshots[:-1]):
        assert np.array_equal(repo.load(snapshot, paths=["w"])["w"], state(number)["w"])


def test_what_was_forgotten_is_not_written_again() -> None:
    repo, snapshots = history()
    before = repo.repack(flatten=True, dry_run=True).chunk_count
    repo.forget(ids=[snapshots[1]])

    assert 0 < repo.repack(flatten=True, dry_run=True).chunk_count < before


def test_what_a_repair_marked_as_lost_is_passed_over() -> None:
    repo, snapshots = history()
    damage_leaf(repo, snapshots[-1].id, "levels")
    repo = open_on(repo.handle.backend)
    assert repo.repair().losses == {snapshots[-1].id: ("levels",)}

    assert repo.repack(flatten=True).rewritten_count

    check(repo, snapshots[:-1])
    assert np.array_equal(repo.load(snapshots[-1], paths=["w"])["w"], state(3)["w"])


def test_what_a_collector_is_about_to_copy_out_is_no_damage() -> None:
    """A collector that waits, for this very repack perhaps, has condemned the packs that everything lies in."""
    repo, snapshots = history()
    condemn(repo.handle.backend, packs_of(repo))

    assert open_on(repo.handle.backend).repack(flatten=True).rewritten_count

    check(open_on(repo.handle.backend), snapshots)


def test_what_is_collected_meanwhile_is_passed_over() -> None:
    """Thinned after the look, and collected: its packs were condemned before the repack began, so nothing waits."""
    repo, snapshots = history()
    backend = repo.handle.backend
    times = 0

    def clock() -> int:
        nonlocal times
        times += 1
        if times == 2:  # the lease was the first to ask, the first new pack is the second
            going = packs_of(repo)
            delete_packs(backend, going)
            handle.store.forget(going)
        return 1

    handle = Handle(backend, repo.handle.config, clock=clock)
    assert Repository(backend.location, handle).repack([snapshots[-1].id], flatten=True).rewritten_count == 0
    assert times >= 2
    assert not packs_of(repo)


def test_a_long_repack_gives_signs_of_life_by_the_lease_length_of_the_repository() -> None:
    repo = create_on(MemoryBackend(), RepositoryOptions(lease_s=1e-6))
    for step in range(3):
        repo.save(state(step))
    seen: list[bytes] = []
    repo.repack(flatten=True, progress=lambda *_: seen.extend(lease.data for lease in list_leases(repo.handle.backend)))
    assert len(seen) > 1
    assert len(set(seen)) == len(seen)
