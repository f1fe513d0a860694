"""Push and pull: what arrives is the same, is sent once, and is whole whatever interrupts it."""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
import pytest

import castore
from castore.api import Repository
from castore.backend import MemoryBackend
from castore.checkpoint.bases import candidates
from castore.closure import closure
from castore.errors import ConflictError, DamageError, NoSpaceError, SnapshotGoneError, UsageError
from castore.format.layout import snapshot_name
from castore.ids import ChunkId
from castore.index import MemoryIndex
from castore.marks import Thinning, forgotten_ids, thin_snapshot
from castore.options import COMPRESSIONS, HASH_NAMES, HashName
from castore.transfer import execute
from castore.transfer.execute import transfer
from castore.transfer.request import TransferRequest
from tests.checkpoint.damage import damage_leaf, flip_bit, rows_of
from tests.checkpoint.repositories import (
    Collector,
    HookedBackend,
    at_call,
    condemn,
    copied,
    files_of,
    held_leases,
    open_on,
    packs_of,
)
from tests.checkpoint.states import assert_same, training_state
from tests.suites.fault_backend import Fault, FaultBackend, SimulatedCrash
from tests.transfer.pairs import assert_holds_history, refs_of, repository, source_with_history, state_of


@pytest.fixture(scope="module")
def source() -> Repository:
    return source_with_history()


@pytest.fixture(scope="module")
def small() -> Repository:
    """Two saves of small states, for tests that push hundreds of times."""
    repo = repository()
    for step in range(2):
        repo.save(small_state(step), step=step)
    repo.tag("first", at="main~1")
    return repo


def small_state(step: int) -> dict[str, Any]:
    weights = np.random.default_rng(3).standard_normal(3000).astype(np.float32)
    return {"weights": weights * np.float32(1 + 1e-5 * step), "fixed": np.arange(700.0), "step": step}


def records(repo: Repository) -> dict[bytes, tuple[tuple[int, ...], int]]:
    """Chunk → codec chain and depth."""
    return {row.chunk_id: (row.chain, row.depth) for pack in packs_of(repo) for row in rows_of(repo, pack)}


# ---- what arrives ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("hash_name", HASH_NAMES)
def test_a_history_arrives_whole_in_a_repository_of_any_make(source, hash_name, compression) -> None:
    target = repository(hash_name=hash_name, compression=compression)
    report = source.push(target)
    assert_holds_history(target)
    assert report.heads == refs_of(target)
    assert len(report.sent) == 5
    if hash_name == "xxh3-128":
        assert refs_of(target) == refs_of(source)
        assert all(old == new for old, new in report.sent.items())
    else:
        assert {report.sent[refs_of(source)[name]] for name in refs_of(source)} == set(refs_of(target).values())


def test_pull_is_push_the_other_way_round_and_moves_the_head_that_the_next_save_continues(source) -> None:
    target = repository()
    target.pull(source)
    assert_holds_history(target)
    snapshot = target.save(state_of(9), step=9)
    assert snapshot.parents == (source.snapshot("main").id,)


def test_stored_bytes_and_differences_are_copied_as_they_are(source) -> None:
    target = repository()
    source.push(target)
    assert records(target) == records(source)
    assert any(depth for _, depth in records(target).values())


def test_a_difference_whose_base_stays_behind_is_encoded_by_itself(source) -> None:
    target = repository()
    source.push(target, ["main"], depth=1)
    assert_same(target.load("main"), state_of(3))
    needed = {chunk for chunk in records(target) if chunk not in records(source)}
    assert not needed
    assert target.verify(data=True).ok
    assert len(list(target.log("main"))) == 1


@pytest.mark.parametrize("options", [{}, {"reencode": True}])
def test_the_bases_of_a_snapshot_are_looked_up_together(source, options, monkeypatch) -> None:
    """Each was a look-up of its own, and one that the target lacks was looked up again and again."""
    asked: list[set[ChunkId]] = []

    def counted(wanted: Any, *arguments: Any) -> Any:
        asked.append(set(wanted))
        return closure(wanted, *arguments)

    monkeypatch.setattr("castore.transfer.target_chunks.closure", counted)
    target = repository()
    target.pull(source, ["main"], depth=1, **options)
    assert_same(target.load("main"), state_of(3))
    assert len(asked) <= 4
    assert sum(map(len, asked)) == len(set().union(*asked))


def test_bases_are_read_from_manifests_only_where_something_may_rest_on_them(source, monkeypatch) -> None:
    calls: list[object] = []
    monkeypatch.setattr("castore.transfer.execute.candidates", lambda *a, **k: calls.append(a) or candidates(*a, **k))
    repository().pull(source)
    repository(compression="lz4").pull(source, reencode=True)
    assert not calls
    repository().pull(source, reencode=True)
    assert calls


def test_a_base_that_many_chunks_rest_on_travels_though_no_snapshot_needs_it() -> None:
    """Steps 1 and later are differences from step 0, or from step 1; without them each would be stored in full."""
    source = source_with_history()
    plain, wide = repository(), repository()
    one = source.push(plain, ["main"], depth=1)
    two = source.push(wide, ["main"], depth=2)
    assert two.stored_bytes < 2 * one.stored_bytes
    assert wide.verify(data=True).ok
    for step in (3, 2):
        assert_same(wide.load(f"main@{step}"), state_of(step))


def test_runs_arrive_as_runs_so_that_they_can_be_mapped(source) -> None:
    target = repository(compression="none")
    source.push(target)
    rows = [row for pack in packs_of(target) for row in rows_of(target, pack)]
    assert any(row.in_run for row in rows)
    again = repository(compression="none")
    target.push(again)
    assert sorted((row.chunk_id, row.in_run) for pack in packs_of(again) for row in rows_of(again, pack)) == sorted(
        (row.chunk_id, row.in_run) for row in rows
    )
    assert_holds_history(again)


def test_reencoding_takes_differences_as_a_save_does(source) -> None:
    flat, again = repository(compression="lz4"), repository()
    source.push(flat)
    assert not any(depth for _, depth in records(flat).values())
    flat.push(again)
    assert any(depth for _, depth in records(again).values())
    assert_holds_history(again)
    forced = repository()
    assert source.push(forced, reencode=True).sent_chunk_count == len(records(forced))
    assert_holds_history(forced)


def test_a_second_push_sends_nothing_and_a_third_only_what_is_new() -> None:
    source, target = source_with_history(), repository()
    source.push(target)
    before = files_of(target.handle.backend)
    report = source.push(target)
    assert (report.sent_chunk_count, report.sent, report.plan.missing) == (0, {}, ())
    assert {move.action for move in report.plan.moves} == {"same"}
    assert files_of(target.handle.backend) == before
    source.save(state_of(4), step=4)
    report = source.push(target)
    assert len(report.sent) == 1
    assert report.sent_raw_bytes < 2_000_000
    assert_same(target.load("main"), state_of(4))
    assert target.verify(data=True).ok


def test_two_histories_that_share_chunks_share_them_at_the_target() -> None:
    source, target = source_with_history(), repository()
    target.save(state_of(2), branch="own")
    report = source.push(target, ["main@2:copy"], depth=1)
    assert report.sent_raw_bytes < 20_000  # parts of the manifest, if anything
    assert_same(target.load("copy"), state_of(2))


def test_a_push_into_itself_is_refused(source, tmp_path) -> None:
    with pytest.raises(UsageError, match="same repository"):
        source.push(source)
    castore.init(tmp_path / "store")
    with castore.open(tmp_path / "store") as repo, pytest.raises(UsageError, match="same repository"):
        repo.push(tmp_path / "store")


def test_a_dry_run_writes_nothing_and_tells_the_exact_bytes(source) -> None:
    target = repository()
    before = files_of(target.handle.backend)
    planned = source.push(target, dry_run=True)
    assert planned.is_dry_run
    assert planned.sent == {}
    assert files_of(target.handle.backend) == before
    done = source.push(target)
    assert planned.plan.chunk_count == done.sent_chunk_count
    assert planned.plan.raw_bytes == done.sent_raw_bytes
    assert planned.plan.is_exact


def test_progress_ends_at_its_total(source) -> None:
    seen: list[tuple[int, int]] = []
    source.push(repository(), progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] > 1_000_000


# ---- interruptions -------------------------------------------------------------------------------------------------


def interrupted(small: Repository, number: int, fault: Fault | None, pack_bytes_max: int) -> tuple[FaultBackend, bool]:
    """A push that dies at a call of the target; whether it came to its end."""
    backend = MemoryBackend()
    repository(backend, hash_name="blake3" if number % 2 else "xxh3-128")
    faulty = FaultBackend(backend, fault)
    try:
        transfer(small.handle, open_on(faulty).handle, TransferRequest(), purpose="push", pack_bytes_max=pack_bytes_max)
    except (SimulatedCrash, NoSpaceError):
        return faulty, False
    return faulty, True


@pytest.mark.parametrize("moment", ["before", "during", "after"])
@pytest.mark.parametrize("hash_number", [0, 1])
def test_a_push_that_dies_at_any_call_leaves_the_target_whole_and_is_simply_run_again(
    small, moment, hash_number, monkeypatch
) -> None:
    monkeypatch.setattr("castore.repository.open_index", lambda *_, **__: MemoryIndex())
    call = 0
    while True:
        faulty, is_done = interrupted(small, hash_number, Fault(call, moment), pack_bytes_max=8000)
        left = open_on(faulty.restore_in_memory(unsynced="torn" if moment == "during" else "lost"))
        report = left.verify(data=True)
        assert report.ok, (call, report.problems)
        small.push(left)
        for step in range(2):
            assert_same(left.load(f"main@{step}"), small_state(step))
        assert left.snapshot("first").step == 0
        assert left.verify(data=True).ok
        if is_done:
            break
        call += 1
    assert call > 20


def test_what_arrived_before_an_interruption_is_not_sent_again(small) -> None:
    whole = repository()
    all_chunks = small.push(whole).sent_chunk_count
    commits = 0
    resent = []
    for call in range(1000):
        faulty, is_done = interrupted(small, 0, Fault(call, "after"), pack_bytes_max=1000)
        if is_done:
            break
        if faulty.calls[call].operation != "commit":
            continue
        commits += 1
        left = open_on(faulty.restore_in_memory(unsynced="lost"))
        arrived = len(records(left))
        resent.append(small.push(left).sent_chunk_count)
        assert resent[-1] == all_chunks - arrived
    assert commits >= 3
    assert resent == sorted(resent, reverse=True)


def test_a_full_disk_is_a_typed_error_and_leaves_no_ref(small) -> None:
    faulty, is_done = interrupted(small, 0, Fault(12, "before", errno.ENOSPC), pack_bytes_max=8000)
    assert not is_done
    left = open_on(faulty.inner)
    assert refs_of(left) == {}
    assert not held_leases(faulty.inner)
    assert left.verify(data=True).ok


# ---- damage ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hash_name", HASH_NAMES)
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_rot_at_the_source_is_refused_by_name_and_moves_no_ref(hash_name, compression) -> None:
    source = open_on(copied(source_with_history().handle.backend))
    damage_leaf(source, "main@1", "rng/1")
    source = open_on(source.handle.backend)
    target = repository(hash_name=hash_name, compression=compression)
    with pytest.raises(DamageError, match=rf"snapshot {source.snapshot('main@1').id[:12]}.*leaf 'rng/1'"):
        source.push(target)
    assert refs_of(target) == {}
    assert target.verify(data=True).ok
    assert {snapshot.step for snapshot in target.snapshots()} <= {0}
    source.push(target, ["main"], depth=2)
    assert_same(target.load("main"), state_of(3))


def test_a_damaged_snapshot_file_of_the_source_is_named(tmp_path) -> None:
    source = open_on(copied(source_with_history().handle.backend))
    damaged = source.snapshot("main@1").id
    flip_bit(source.handle.backend, snapshot_name(damaged), 60)
    with pytest.raises(DamageError, match=rf"{damaged}.*--depth"):
        source.push(repository())


def test_a_whole_copy_elsewhere_in_the_source_is_sent_in_place_of_a_rotten_one(source) -> None:
    spoiled = open_on(copied(source.handle.backend))
    damage_leaf(spoiled, "main", "model/moving")
    spoiled = open_on(spoiled.handle.backend)
    second = spoiled.save({"again": state_of(3)["model"]["moving"]}, branch="copy")
    assert second.new_bytes == 0  # it relied on the rotten record, unread
    with pytest.raises(DamageError):
        spoiled.push(repository(), ["main"])
    healed = spoiled.save({"again": state_of(3)["model"]["moving"]}, branch="copy")  # known to be rotten by now
    assert healed.new_bytes > 0
    target = repository()
    spoiled.push(target)
    assert_same(target.load("main"), state_of(3))


def test_rot_at_the_target_is_found_by_check_and_sent_again(source) -> None:
    target = repository()
    source.push(target)
    damage_leaf(target, "main@0", "~storage/0")
    damage_leaf(target, "main", "model/moving")
    flip_bit(target.handle.backend, snapshot_name(target.snapshot("main@2").id), 70)
    assert not target.verify(data=True).ok
    rotten = open_on(target.handle.backend)
    assert source.push(rotten).sent_chunk_count == 0
    assert source.push(rotten, check=True).sent_chunk_count >= 2
    healed = open_on(target.handle.backend)
    for snapshot in healed.log("main"):
        assert_same(healed.load(snapshot), state_of(snapshot.step or 0))


def test_nothing_new_rests_on_a_rotten_base_of_the_target() -> None:
    source, target = source_with_history(), repository()
    source.push(target)
    source.save(state_of(5), step=5)
    damage_leaf(target, "main@0", "~storage/0")
    fresh = open_on(target.handle.backend)
    source.push(fresh)
    assert_same(open_on(target.handle.backend).load("main"), state_of(5))


# ---- beside a collector -------------------------------------------------------------------------------------------


def forgetful(small: Repository, hash_name: HashName) -> MemoryBackend:
    """A target that holds all chunks of the source, and no snapshot: a collector may take them."""
    backend = MemoryBackend()
    repo = repository(backend, hash_name=hash_name)
    small.push(repo)
    for name in files_of(backend):
        if not name.startswith(("packs/", "config")):
            backend.delete(name)
    return backend


@pytest.mark.parametrize("pause", [0, 1, 2, 5])
@pytest.mark.parametrize("hash_name", HASH_NAMES)
def test_chunks_that_a_collector_takes_at_any_moment_of_a_push_are_sent_again(small, hash_name, pause) -> None:
    """The collector takes the push for dead: it condemns at one call, and deletes some calls later what no visible
    snapshot needs.
    """
    base = forgetful(small, hash_name)
    counted = HookedBackend(copied(base))
    assert small.push(open_on(counted)).sent_chunk_count == 0
    healed = 0
    for call in range(len(counted.calls)):
        beside = HookedBackend(copied(base))
        collector = _Collector(beside.inner)
        begin, end = at_call(call, collector.begin), at_call(call + pause, collector.end)
        beside.hook = lambda operation, name, hooks=(begin, end): [hook(operation, name) for hook in hooks]
        healed += bool(small.push(open_on(beside)).sent_chunk_count)
        collector.end()
        left = open_on(beside.inner)
        for step in range(2):
            assert_same(left.load(f"main@{step}"), small_state(step))
        assert left.verify(data=True).ok, counted.calls[call]
    assert healed > 3


class _Collector(Collector):
    """Stops where a snapshot is visible by the time that it ends: it would save what that needs."""

    def end(self) -> None:
        if not files_of(self._backend, "snapshots/"):
            super().end()


def test_nobody_relies_on_a_pack_that_is_condemned_already(small) -> None:
    target = repository()
    chunks = small.push(target).sent_chunk_count
    backend = target.handle.backend
    condemn(backend, packs_of(target))
    report = small.push(open_on(backend))
    assert report.sent_chunk_count == chunks
    condemned = [name for name in files_of(backend) if name.startswith("gc/")]
    assert condemned


def test_a_branch_that_moves_meanwhile_is_a_conflict_and_the_snapshots_are_there(small) -> None:
    backend = MemoryBackend()
    repository(backend)
    hooked = HookedBackend(backend)
    hooked.hook = at_call(0, lambda: open_on(backend).save({"x": 1}), operation="create_stream")
    with pytest.raises(ConflictError) as caught:
        small.push(open_on(hooked), ["main"])
    assert caught.value.snapshot_id == small.snapshot("main").id
    left = open_on(backend)
    assert left.load("main") == {"x": 1}
    assert_same(left.load(caught.value.snapshot_id), small_state(1))


def test_a_snapshot_that_vanishes_at_the_source_is_gone_and_not_damage(small) -> None:
    backend = copied(small.handle.backend)
    doomed = snapshot_name(open_on(backend).snapshot("main").id)
    hooked = HookedBackend(backend)
    reads = [call for call in _calls(hooked, lambda: open_on(hooked).push(repository())) if call == ("read", doomed)]
    hooked.hook = _at_named_call(("read", doomed), len(reads) - 1, lambda: backend.delete(doomed))
    with pytest.raises(SnapshotGoneError):
        open_on(hooked).push(repository())


def _calls(hooked: HookedBackend, action: Any) -> list[tuple[str, str]]:
    action()
    seen, hooked.calls = hooked.calls, []
    return seen


def _at_named_call(wanted: tuple[str, str], number: int, action: Any) -> Any:
    seen = [0]

    def hook(operation: str, name: str) -> None:
        if (operation, name) == wanted:
            if seen[0] == number:
                action()
            seen[0] += 1

    return hook


# ---- marks ------------------------------------------------------------------------------------------------------


def test_a_thinned_snapshot_arrives_with_its_overlay_and_what_it_keeps(source) -> None:
    thinned = open_on(copied(source.handle.backend))
    snapshot_id = thinned.snapshot("main@1").id
    thin_snapshot(thinned.handle.backend, Thinning(snapshot_id, ("model/moving", "optimizer/**"), 5))
    whole, target = repository(), repository()
    thinned.push(whole, ["main@1:m"], depth=1)
    (found,) = [info.name for info in whole.handle.backend.list("thin/")]
    assert found.endswith(snapshot_id)
    dropped = source.handle.manifests.entries
    from castore.snapshots import read_record

    (entry,) = [e for e in dropped(read_record(source.handle.backend, snapshot_id)) if e.path == "model/moving"]
    assert not set(entry.chunk_ids(16)) & records(whole).keys()
    assert_same(whole.load("m", paths=["model/head"])["model"]["head"], state_of(1)["model"]["head"])
    source.push(target)
    thinned.push(target)  # what is whole at the target stays whole
    assert not list(target.handle.backend.list("thin/"))
    assert_same(target.load("main@1"), state_of(1))


def test_thinned_snapshots_are_left_out_where_the_hash_changes_and_parents_step_over_them(source) -> None:
    thinned = open_on(copied(source.handle.backend))
    snapshot_id = thinned.snapshot("main@2").id
    thin_snapshot(thinned.handle.backend, Thinning(snapshot_id, ("model/**",), 5))
    target = repository(hash_name="blake3")
    report = thinned.push(target, ["main"])
    assert report.plan.left_out == (snapshot_id,)
    assert [snapshot.step for snapshot in target.log("main")] == [3, 1, 0]
    with pytest.raises(UsageError, match="thinned"):
        thinned.push(target, ["main@2:x"])


def test_a_cut_history_ends_in_a_tombstone_and_a_later_push_fills_it(source) -> None:
    target = repository()
    source.push(target, ["main"], depth=2)
    assert forgotten_ids(target.handle.backend) == {source.snapshot("main@1").id}
    assert [snapshot.step for snapshot in target.log("main")] == [3, 2]
    source.push(target)
    assert forgotten_ids(target.handle.backend) == frozenset()
    assert_holds_history(target)


def test_what_the_target_forgot_is_not_sent_again_unless_a_ref_names_it(source) -> None:
    from castore.marks import Forgotten, forget_snapshot

    target = repository()
    source.push(target)
    backend = target.handle.backend
    old = source.snapshot("main@1")
    forget_snapshot(backend, Forgotten(old.id, old.parents, "main", 1, 0, 0, "policy"))
    backend.delete(snapshot_name(old.id))
    target.delete_tag("best")
    report = source.push(target, ["main", "fork"])
    assert report.sent == {}
    assert [snapshot.step for snapshot in target.log("main")] == [3, 2, 0]
    report = source.push(target)
    assert list(report.sent) == [old.id]
    assert forgotten_ids(backend) == frozenset()
    assert_holds_history(target)


def test_what_the_source_forgot_is_not_sent_and_history_goes_on_behind_it(source) -> None:
    from castore.marks import Forgotten, forget_snapshot

    thin = open_on(copied(source.handle.backend))
    thin.delete_tag("best")
    old = source.snapshot("main@1")
    forget_snapshot(thin.handle.backend, Forgotten(old.id, old.parents, "main", 1, 0, 0, "policy"))
    for hash_name in HASH_NAMES:
        target = repository(hash_name=hash_name)
        thin.push(target, ["main"])
        assert [snapshot.step for snapshot in target.log("main")] == [3, 2, 0]
        assert len(list(target.snapshots())) == 3


def test_small_snapshots_share_packs(monkeypatch) -> None:
    source, target = repository(), repository()
    for step in range(6):
        source.save(training_state(step), step=step)
    monkeypatch.setattr(execute, "_PENDING_SNAPSHOTS_MAX", 4)
    source.push(target)
    assert len(packs_of(source)) == 6
    assert len(packs_of(target)) == 2
