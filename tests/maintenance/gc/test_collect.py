"""One collection after another, undisturbed: what goes, what stays, what is told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from castore.backend import MemoryBackend
from castore.errors import DamageError, UnsupportedFormatError, UsageError
from castore.format.layout import LOST, branch_name, pack_name, snapshot_name
from castore.ids import SnapshotId
from castore.leases import writer_lease
from castore.losses import make_loss, write_loss
from castore.marks import Forgotten, Thinning, forget_snapshot, note_orphan, thin_snapshot, unthin_snapshot
from castore.options import RepositoryOptions
from castore.store import pack_sizes
from tests.checkpoint.repositories import condemn, create_on, files_of, open_on, packs_of
from tests.checkpoint.states import training_state
from tests.maintenance.gc.histories import check_whole, drifting, forget, fresh, gc, gc_files, line
from tests.suites.packs import rewrite

YOUNG = RepositoryOptions(orphan_grace_s=1e9)
OLD = RepositoryOptions(orphan_grace_s=1e-9)


def test_nothing_goes_where_everything_is_needed() -> None:
    repo, ids = line(3)
    before = files_of(repo.handle.backend)
    report = gc(repo)
    assert {name: data for name, data in files_of(repo.handle.backend).items() if name != "gc/reserve"} == before
    assert (report.freed_bytes, report.snapshots, report.packs_deleted, report.pending) == (0, {}, (), ())
    assert (report.snapshot_count, report.wasted_bytes, report.is_complete) == (3, 0, True)
    check_whole(repo, {snapshot_id: fresh(step) for step, snapshot_id in enumerate(ids)})


def test_what_was_forgotten_goes_and_the_space_with_it() -> None:
    repo, ids = line(4)
    forget(repo, *ids[:2])
    before = sum(pack_sizes(repo.handle.backend).values())
    report = gc(repo)
    after = sum(pack_sizes(repo.handle.backend).values())
    assert report.snapshots.keys() == set(ids[:2])
    assert "a test" in report.snapshots[ids[0]]
    assert len(report.packs_deleted) == 2
    assert 18_000 < before - after <= report.freed_bytes
    assert report.total_bytes == after
    assert gc_files(repo) == []
    check_whole(repo, {ids[2]: fresh(2), ids[3]: fresh(3)})
    assert [snapshot.id for snapshot in repo.log("main")] == [ids[3], ids[2]]


def test_what_a_repair_said_of_a_snapshot_goes_with_it() -> None:
    repo, ids = line(2)
    backend = repo.handle.backend
    write_loss(backend, make_loss(ids[0], ["noise"], (), time_ns=1))
    forget(repo, ids[0])
    gc(repo)
    assert not list(backend.list(LOST))


def test_what_a_repair_said_of_a_snapshot_goes_although_an_earlier_collection_ended_too_soon() -> None:
    """Cut off between the snapshot and its marks, it left this one for ever."""
    repo, ids = line(2)
    backend = repo.handle.backend
    for snapshot_id in ids:
        write_loss(backend, make_loss(snapshot_id, ["noise"], (), time_ns=1))
    forget(repo, ids[0])
    backend.delete(snapshot_name(ids[0]))
    gc(repo)
    assert [info.name for info in backend.list(LOST)] == [f"{LOST}{ids[1]}"]


def test_a_dry_run_changes_nothing_and_says_what_a_real_one_does() -> None:
    repo, ids = line(4)
    forget(repo, ids[0])
    before = files_of(repo.handle.backend)
    planned = gc(repo, dry_run=True)
    assert files_of(repo.handle.backend) == before
    done = gc(repo)
    assert planned.dry_run
    assert not done.dry_run
    assert (planned.snapshots, planned.packs_deleted) == (done.snapshots, done.packs_deleted)
    assert planned.total_bytes == done.total_bytes


def test_the_head_of_a_branch_and_a_tagged_snapshot_stay_even_when_forgotten() -> None:
    repo, ids = line(3)
    repo.tag("best", at=ids[0])
    forget(repo, *ids)
    assert gc(repo).snapshots.keys() == {ids[1]}
    check_whole(repo, {ids[0]: fresh(0), ids[2]: fresh(2)})


@pytest.mark.parametrize(("options", "stays"), [(YOUNG, True), (OLD, False)])
def test_an_orphan_stays_for_its_grace_period(options: RepositoryOptions, stays: bool) -> None:
    repo, ids = line(2, options=options)
    orphan = repo.save(fresh(7), branch="lost", parent="main").id
    repo.delete_branch("lost")
    report = gc(repo)
    assert (snapshot_name(orphan) in files_of(repo.handle.backend)) == stays
    assert [pending.kind for pending in report.pending] == (["grace"] if stays else [])
    if stays:
        assert report.pending[0].until_ns is not None
        assert report.is_complete
        repo.branch("found", at=orphan)
        check_whole(repo, {orphan: fresh(7)})
    check_whole(repo, {ids[1]: fresh(1)})


def test_the_grace_period_of_a_deleted_branch_starts_at_its_deletion() -> None:
    """However old its snapshots are."""
    repo, _ = line(1, options=RepositoryOptions(orphan_grace_s=100.0))
    orphan = repo.save(fresh(7), branch="lost", parent="main").id
    later_ns = repo.handle.clock() + 10**12
    repo.handle.clock = lambda: later_ns
    note_orphan(repo.handle.backend, orphan, now_ns=later_ns)
    repo.delete_branch("lost")
    assert gc(repo).snapshots == {}
    repo.handle.clock = lambda: later_ns + 101 * 10**9
    assert gc(repo).snapshots.keys() == {orphan}


@pytest.mark.parametrize("compression", ["auto", "none", "lz4"])
def test_what_is_live_in_a_wasteful_pack_is_copied_out_and_is_bit_for_bit_the_same(compression: Any) -> None:
    repo, ids = line(5, training_state, options=RepositoryOptions(compression=compression))
    forget(repo, *ids[:4])
    report = gc(repo, repack_below=1)
    assert report.packs_rewritten
    assert report.copied_bytes > 0
    assert report.wasted_bytes == 0
    check_whole(repo, {ids[4]: training_state(4)})
    again = gc(repo, repack_below=1)
    assert (again.packs_rewritten, again.freed_bytes) == ((), 0)


def test_a_copied_leaf_is_still_one_run() -> None:
    """So that it can be mapped: a run is copied as a run."""
    repo = create_on(MemoryBackend(), RepositoryOptions(compression="none"))
    leaf = np.arange(3 * 2**18, dtype=np.float32)
    kept = repo.save({"kept": leaf, "gone": np.ones(2**20, np.uint8)}, step=0).id
    second = repo.save({"kept": leaf}, step=1).id
    forget(repo, kept)
    assert gc(repo, repack_below=1).packs_rewritten
    assert repo.verify(data=True).ok
    (locations,) = repo.handle.store.find([next(iter(_chunk_ids(repo, second)))])
    assert locations[0].row.in_run
    check_whole(repo, {second: {"kept": leaf}})


def _chunk_ids(repo: Any, snapshot_id: SnapshotId) -> list[Any]:
    from castore.snapshots import read_record

    record = read_record(repo.handle.backend, snapshot_id)
    return [found for entry in repo.handle.manifests.entries(record) for found in entry.chunk_ids(16)]


def test_copying_is_limited_and_the_next_collection_goes_on() -> None:
    repo, ids = line(6, training_state)
    forget(repo, *ids[:5])
    whole = gc(repo, dry_run=True, repack_below=1)
    assert len(whole.packs_rewritten) > 1
    first = gc(repo, repack_below=1, repack_bytes_max=whole.copied_bytes // 2)
    assert [pending.kind for pending in first.pending] == ["limit"]
    assert first.wasted_bytes > 0
    assert len(first.packs_rewritten) < len(whole.packs_rewritten)
    assert gc(repo, repack_below=1).is_complete
    check_whole(repo, {ids[5]: training_state(5)})


def test_bases_stay_as_long_as_something_rests_on_them_and_are_told() -> None:
    repo, ids = line(4, drifting)
    forget(repo, *ids[:3])
    report = gc(repo, repack_below=1)
    check_whole(repo, {ids[3]: drifting(3)})
    assert report.pinned_bytes == sum(report.pinned_by.values()) > 0
    assert set(report.pinned_by) == {ids[3]}


def test_the_dropped_leaves_of_a_thinned_snapshot_go_and_the_others_stay() -> None:
    repo, ids = line(2, lambda step: {"keep": fresh(step)["noise"], "drop": fresh(step + 50)["noise"]})
    thin_snapshot(repo.handle.backend, Thinning(ids[0], ("drop",), 1))
    report = gc(repo, repack_below=1)
    assert report.freed_bytes > 8000
    loaded = open_on(repo.handle.backend).load(ids[0], paths=["keep"])
    assert loaded["keep"].tobytes() == fresh(0)["noise"].tobytes()
    unthin_snapshot(repo.handle.backend, ids[0])
    assert not repo.verify().ok


def test_a_hidden_storage_stays_while_one_kept_view_needs_it() -> None:
    torch = pytest.importorskip("torch")
    storage = torch.arange(4000, dtype=torch.float32)
    repo = create_on(MemoryBackend())
    state = {"a": storage[:3000], "b": storage[1000:], "gone": torch.ones(4000)}
    snapshot = repo.save(state).id
    thin_snapshot(repo.handle.backend, Thinning(snapshot, ("a", "gone"), 1))
    gc(repo, repack_below=1)
    assert torch.equal(open_on(repo.handle.backend).load(snapshot, paths=["b"])["b"], storage[1000:])


def test_tombstones_go_when_no_history_reaches_through_them_any_more() -> None:
    repo, ids = line(3)
    forget(repo, ids[1])
    gc(repo)
    assert f"forgotten/{ids[1]}" in files_of(repo.handle.backend)
    assert [snapshot.id for snapshot in repo.log("main")] == [ids[2], ids[0]]
    repo.branch("other", at=ids[0])
    repo.delete_branch("main")
    forget(repo, ids[2])
    gc(repo)
    gc(repo)
    assert not [name for name in files_of(repo.handle.backend) if name.startswith("forgotten/")]
    check_whole(repo, {ids[0]: fresh(0)})


# ---- damage --------------------------------------------------------------------------------------------------------


def cut(repo: Any, name: str) -> None:
    rewrite(repo.handle.backend, name, lambda data: data.__delitem__(slice(len(data) // 2, None)))


def test_an_unreadable_snapshot_ends_the_collection_by_name_until_it_is_forgotten() -> None:
    repo, ids = line(3)
    forget(repo, ids[0])
    cut(repo, snapshot_name(ids[1]))
    before = packs_of(repo)
    with pytest.raises(DamageError, match=ids[1]):
        gc(repo)
    with pytest.raises(DamageError, match=ids[1]):
        gc(repo, dry_run=True)
    assert packs_of(repo) == before
    forget_snapshot(repo.handle.backend, Forgotten(ids[1], (ids[0],), "main", 1, 0, 1, "cannot be read"))
    assert gc(repo).snapshots.keys() == {ids[0], ids[1]}
    check_whole(repo, {ids[2]: fresh(2)})


def test_an_unreadable_manifest_ends_the_collection_by_the_name_of_its_snapshot() -> None:
    repo, ids = line(2)
    forget(repo, ids[0])
    record_parts = _part_ids(repo, ids[1])
    (locations,) = repo.handle.store.find(record_parts[:1])
    row = locations[0].row
    rewrite(
        repo.handle.backend,
        pack_name(locations[0].pack_id),
        lambda data: data.__setitem__(row.offset, data[row.offset] ^ 1),
    )
    with pytest.raises(DamageError, match=ids[1]):
        gc(open_on(repo.handle.backend))
    assert snapshot_name(ids[0]) in files_of(repo.handle.backend)


def _part_ids(repo: Any, snapshot_id: SnapshotId) -> list[Any]:
    from castore.snapshots import read_record

    return list(read_record(repo.handle.backend, snapshot_id).part_ids)


@pytest.mark.parametrize("name", [branch_name("main"), "gc/00.condemned", "forgotten/" + "a" * 32])
def test_a_small_file_that_cannot_be_read_ends_the_collection(name: str) -> None:
    repo, ids = line(2)
    forget(repo, ids[0])
    repo.handle.backend.delete(name)
    repo.handle.backend.put_if_absent(name, b"torn")
    with pytest.raises(DamageError):
        gc(repo)
    assert snapshot_name(ids[0]) in files_of(repo.handle.backend)


def test_a_branch_that_names_a_missing_snapshot_ends_the_collection() -> None:
    repo, ids = line(2)
    repo.handle.backend.delete(snapshot_name(ids[1]))
    with pytest.raises(DamageError, match="main"):
        gc(repo)
    assert len(packs_of(repo)) == 2


def test_history_behind_a_missing_parent_is_kept() -> None:
    """It only looks as if nothing reached it."""
    repo, ids = line(4, options=OLD)
    repo.handle.backend.delete(snapshot_name(ids[2]))
    report = gc(repo)
    assert report.snapshots == {}
    assert ids[2][:12] in report.notes[0]
    check_whole(repo, {ids[0]: fresh(0), ids[1]: fresh(1), ids[3]: fresh(3)})
    forget(repo, ids[1])
    assert gc(repo).snapshots.keys() == {ids[1]}


def test_a_pack_with_a_damaged_table_is_left_alone() -> None:
    repo, ids = line(2)
    forget(repo, ids[0])
    victim = _pack_of(repo, ids[0])
    rewrite(repo.handle.backend, pack_name(victim), lambda data: data.__setitem__(-5, data[-5] ^ 1))
    report = gc(open_on(repo.handle.backend))
    assert report.packs_deleted == ()
    assert [pending.kind for pending in report.pending] == ["damage"]
    assert victim in packs_of(repo)


def _pack_of(repo: Any, snapshot_id: SnapshotId) -> Any:
    (locations,) = repo.handle.store.find(_part_ids(repo, snapshot_id)[:1])
    return locations[0].pack_id


# ---- other files ---------------------------------------------------------------------------------------------------


def test_a_repository_that_needs_a_newer_collector_is_left_alone() -> None:
    repo, ids = line(2)
    forget(repo, ids[0])
    handle = repo.handle
    handle.config = replace(handle.config, features={**handle.config.features, "gc": frozenset({"tiers"})})
    with pytest.raises(UnsupportedFormatError, match="tiers"):
        gc(repo)
    assert len(packs_of(repo)) == 2


@pytest.mark.parametrize("request_", [{"repack_below": 1.5}, {"repack_bytes_max": -1}, {"wait_s": -1.0}])
def test_numbers_that_make_no_sense_are_refused(request_: dict[str, Any]) -> None:
    repo, _ = line(1)
    with pytest.raises(UsageError):
        gc(repo, **request_)


def test_what_an_earlier_collection_condemned_is_completed() -> None:
    repo, ids = line(3)
    victim = _pack_of(repo, ids[1])  # live: it must be copied out of, condemned is condemned
    condemn(repo.handle.backend, [victim])
    report = gc(repo)
    assert victim not in packs_of(repo)
    assert report.packs_rewritten == (victim,)
    assert gc_files(repo) == []
    check_whole(repo, {snapshot_id: fresh(step) for step, snapshot_id in enumerate(ids)})


def test_packs_of_a_save_under_way_are_left_alone() -> None:
    """It would only write them again."""
    repo, _ = line(1)
    backend = repo.handle.backend
    with writer_lease(backend, purpose="save", now_ns=repo.handle.clock()):
        beside = open_on(backend)
        orphan = beside.save(fresh(5), branch="other").id
        beside.delete_branch("other")
        backend.delete(snapshot_name(orphan))  # its save has written packs and no snapshot yet
        report = gc(repo, wait_s=0.0)
        assert report.packs_deleted == ()
        assert [pending.kind for pending in report.pending] == ["writer"]
    assert len(gc(repo).packs_deleted) == 1
