"""Repair: what can be read is never lost, what is damaged is moved and never deleted, what is lost is said."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import castore
from castore.api import Repository
from castore.backend import MemoryBackend
from castore.errors import CastoreError, ChecksumError, DamageError, LeaseError, LostLeavesError, NoSpaceError
from castore.format.layout import new_collector_name, pack_name, snapshot_name
from castore.format.textfile import decode_text_file
from castore.ids import ChunkId
from castore.leases import claim_text
from castore.losses import make_loss, read_loss, write_loss
from castore.maintenance.repair.execute import repair
from castore.maintenance.repair.sources import MappedSource, ReadRaw
from castore.options import RepositoryOptions
from tests.checkpoint.damage import damage_leaf, flip_bit, places_of, replace_file, rows_of
from tests.checkpoint.repositories import HookedBackend, copied, create_on, files_of, open_on, packs_of
from tests.checkpoint.states import State, assert_same, training_state
from tests.suites.fault_backend import MOMENTS, Fault, FaultBackend, SimulatedCrash

FROZEN = "model/frozen"


@pytest.fixture
def repo() -> Repository:
    """Two saves of a run that share frozen weights; the second is stored as differences."""
    repo = create_on(MemoryBackend())
    repo.save(training_state(1), step=1)
    repo.save(training_state(2), step=2)
    return repo


def backend_of(repo: Repository) -> MemoryBackend:
    backend = repo.handle.backend
    assert isinstance(backend, MemoryBackend)
    return backend


def reopened(repo: Repository) -> Repository:
    return open_on(repo.handle.backend)


def without(state: State, *path: str) -> State:
    """The state without one leaf."""
    first, *rest = path
    inner = without(state[first], *rest) if rest else None
    return {key: inner if key == first and rest else value for key, value in state.items() if rest or key != first}


# ---- what is lost --------------------------------------------------------------------------------------------------


def test_a_whole_repository_needs_no_repair(repo: Repository) -> None:
    before = files_of(repo.handle.backend)
    report = repo.repair()
    assert report.plan.is_empty
    assert report.acted
    assert not report.losses
    assert files_of(repo.handle.backend) == before


def test_a_lost_leaf_is_named_and_the_rest_loads(repo: Repository) -> None:
    damage_leaf(repo, "main", FROZEN)
    report = repo.repair()
    ids = {snapshot.id for snapshot in repo.log()}
    assert report.losses == dict.fromkeys(ids, (FROZEN,))
    with pytest.raises(LostLeavesError, match=r"model/frozen.*paths=") as caught:
        reopened(repo).load()
    assert caught.value.lost == (FROZEN,)
    found = reopened(repo).load(paths=caught.value.left)
    assert_same(found["optimizer"]["state"][0], training_state(2)["optimizer"]["state"][0])
    assert sorted(found["model"]) == ["drifting", "head", "moving"]
    verified = reopened(repo).verify(data=True)
    assert verified.ok
    assert verified.lost_snapshots == dict.fromkeys(ids, (FROZEN,))


def test_what_thinning_dropped_is_not_offered_as_left(repo: Repository) -> None:
    """It was, and loading what the error offered was refused."""
    damage_leaf(repo, "main~1", FROZEN)
    repo.repair()
    repo.thin(["model/moving"], ids=["main~1"])
    with pytest.raises(LostLeavesError) as caught:
        reopened(repo).load("main~1", paths=[FROZEN])
    assert "model/moving" not in caught.value.left
    assert sorted(reopened(repo).load("main~1", paths=caught.value.left)["model"]) == ["drifting", "head"]


def test_nothing_is_deleted_and_the_reason_is_written_down(repo: Repository) -> None:
    pack_id, _ = places_of(repo, "main", FROZEN)[0]
    damage_leaf(repo, "main", FROZEN)
    damaged = files_of(repo.handle.backend)[pack_name(pack_id)]
    report = repo.repair()
    files = files_of(repo.handle.backend)
    assert files[report.quarantine + pack_name(pack_id)] == damaged
    assert b"checksum" in files[report.quarantine + "why"]
    assert pack_name(pack_id) not in files


def test_of_marks_and_refs_too_it_is_written_down_why_they_moved(repo: Repository) -> None:
    """The reasons stood there of packs and snapshots only."""
    _, before = (snapshot.id for snapshot in repo.log())
    repo.forget(ids=[before])
    replace_file(repo.handle.backend, f"forgotten/{before}", b"torn mark")
    reopened(repo).repair()
    replace_file(repo.handle.backend, "refs/branches/main", b"torn ref")
    reopened(repo).repair(fix_refs=True)
    moved = {name.split("/", 2)[2]: data for name, data in files_of(repo.handle.backend, "quarantine/").items()}
    assert moved[f"forgotten/{before}"] == b"torn mark"
    assert moved["refs/branches/main"] == b"torn ref"
    files = files_of(repo.handle.backend)
    told = [name for name in files if name.endswith("/why")]
    why = [reason for name in told for reason in decode_text_file(files[name], name=name)["files"].items()]
    assert {name for name, _ in why} == {f"forgotten/{before}", "refs/branches/main"}
    assert all("JSON line" in reason for _, reason in why)


def test_the_reasons_of_hundreds_of_files_are_all_written_down(repo: Repository) -> None:
    """They ended at the five hundredth."""
    names = [f"thin/{number:032x}" for number in range(520)]
    for name in names:
        repo.handle.backend.put_if_absent(name, b"torn")
    report = repo.repair()
    files = files_of(repo.handle.backend, f"{report.quarantine}why")
    told = {told for name, data in files.items() for told in decode_text_file(data, name=name)["files"]}
    assert told == set(names)
    assert len(files) == 6


def test_a_dry_run_says_the_same_and_changes_nothing(repo: Repository) -> None:
    damage_leaf(repo, "main", FROZEN)
    reopened(repo).verify(data=True)
    before = files_of(repo.handle.backend)
    plan = repo.repair(dry_run=True).plan
    assert files_of(repo.handle.backend) == before
    assert [loss.leaves for loss in plan.losses] == [(FROZEN,), (FROZEN,)]
    assert [len(salvage.dropped) for salvage in plan.salvages] == [1]
    assert set(plan.to_json()["losses"]) == {snapshot.id for snapshot in repo.log()}


def test_a_lost_manifest_part_leaves_what_other_parts_name(repo: Repository) -> None:
    state = {"group": {f"leaf {number}": np.full(100, number) for number in range(600)}}
    saved = repo.save(state, branch="wide")
    from castore.snapshots import read_record

    parts = read_record(repo.handle.backend, saved.id).part_ids
    assert len(parts) > 1
    found = {row.chunk_id: (pack_id, row) for pack_id in packs_of(repo) for row in rows_of(repo, pack_id)}
    pack_id, row = found[parts[1]]
    flip_bit(repo.handle.backend, pack_name(pack_id), row.offset + 3)
    repo.repair()
    fresh = reopened(repo)
    with pytest.raises(LostLeavesError, match="1 parts of its manifest") as caught:
        fresh.load("wide")
    left = caught.value.left
    assert 0 < len(left) < 600
    loaded = fresh.load("wide", paths=left)["group"]
    assert {name: value.tobytes() for name, value in loaded.items()} == {
        name: state["group"][name].tobytes() for name in (path.split("/")[1] for path in left)
    }
    assert fresh.read("wide", left[0]).tobytes() == state["group"][left[0].split("/")[1]].tobytes()
    with pytest.raises(LostLeavesError):  # a pattern might have matched what is lost
        fresh.load("wide", paths=["group/**"])
    assert fresh.verify(data=True).ok


# ---- healing -------------------------------------------------------------------------------------------------------


def test_a_later_save_of_the_same_content_heals_in_any_process(repo: Repository) -> None:
    """A record that one process found rotten was relied on by the next."""
    damage_leaf(repo, "main", FROZEN)
    with pytest.raises(DamageError):
        reopened(repo).load()
    saved = reopened(repo).save(training_state(2), step=3)
    assert_same(reopened(repo).load(saved.id), training_state(2))
    assert_same(reopened(repo).load("main~1"), training_state(2))


def test_verify_marks_damage_for_the_saves_to_come(repo: Repository) -> None:
    damage_leaf(repo, "main", FROZEN)
    assert not reopened(repo).verify(data=True).ok
    saved = reopened(repo).save(training_state(2), step=3)
    assert_same(reopened(repo).load(saved.id), training_state(2))
    repo.repair()
    assert not [name for name in files_of(repo.handle.backend) if name.startswith("damaged/")]


def test_a_save_after_a_repair_heals_and_the_next_repair_takes_the_marks_away(repo: Repository) -> None:
    damage_leaf(repo, "main", FROZEN)
    repo.repair()
    first = repo.snapshot("main~1").id
    assert read_loss(repo.handle.backend, first) is not None
    reopened(repo).save(training_state(2), step=3)
    assert_same(reopened(repo).load(first), training_state(1))
    report = reopened(repo).repair()
    assert set(report.plan.healed) == {snapshot.id for snapshot in list(repo.log())[1:]}
    assert read_loss(repo.handle.backend, first) is None


@pytest.mark.parametrize("hash_name", ["xxh3-128", "blake3"])
def test_another_repository_heals(repo: Repository, hash_name: str) -> None:
    other = create_on(MemoryBackend(), RepositoryOptions(hash=hash_name))  # type: ignore[arg-type]
    other.save({"weights": training_state(1)["model"]["frozen"]})
    damage_leaf(repo, "main", FROZEN)
    report = repo.repair(sources=[other])
    assert report.healed_count == 1
    assert not report.losses
    fresh = reopened(repo)
    assert fresh.verify(data=True).ok
    assert_same(fresh.load(), training_state(2))


def test_the_state_of_a_checkpoint_file_heals_manifests_too(repo: Repository) -> None:
    for pack_id in packs_of(repo):
        data = files_of(repo.handle.backend)[pack_name(pack_id)]
        replace_file(repo.handle.backend, pack_name(pack_id), data[: len(data) // 3])
    report = repo.repair(sources=[training_state(1), training_state(2)])
    assert report.healed_count > 0
    fresh = reopened(repo)
    assert fresh.verify(data=True).ok
    assert not report.losses
    for step in (1, 2):
        assert_same(fresh.load(f"main@{step}"), training_state(step))


class OtherBytes(MappedSource):
    """A source that is looked through once, and changes after."""

    def __init__(self, chunks: Mapping[ChunkId, ReadRaw], changed: bytes | None = None) -> None:
        super().__init__("a source", chunks)
        self.look_count = 0
        self._changed = changed

    def find(
        self, wanted: Collection[ChunkId], *, beat: Callable[[], None] = lambda: None
    ) -> Mapping[ChunkId, ReadRaw]:
        self.look_count += 1
        found = super().find(wanted, beat=beat)
        changed = self._changed
        return found if changed is None else {chunk_id: lambda: changed for chunk_id in found}


def test_a_source_is_looked_through_once_and_hashed_before_it_is_written(repo: Repository) -> None:
    """It was asked again for every chunk that the plan had from it, and blamed the memory of this machine."""
    ((_, row),) = places_of(repo, "main", FROZEN)
    chunks = {row.chunk_id: partial(repo.handle.store.get, row.chunk_id)}
    raw = bytes(chunks[row.chunk_id]())
    damage_leaf(repo, "main", FROZEN)
    reopened(repo).verify(data=True)
    before = files_of(repo.handle.backend)
    with pytest.raises(ChecksumError, match=r"a source: expected chunk .* it changed"):
        repair(reopened(repo).handle, [OtherBytes(chunks, b"else")])
    assert files_of(repo.handle.backend) == before
    source = OtherBytes({row.chunk_id: lambda: raw})
    assert repair(reopened(repo).handle, [source], dry_run=True).plan.heals
    assert source.look_count == 1
    source.look_count = 0
    assert repair(reopened(repo).handle, [source]).healed_count == 1
    assert source.look_count == 1
    assert_same(reopened(repo).load(), training_state(2))


def test_a_base_that_is_healed_brings_back_what_rests_on_it(repo: Repository) -> None:
    path = "model/drifting"
    ((_, row),) = places_of(repo, "main", path)
    assert row.base_ids
    damage_leaf(repo, "main~1", path)
    assert {len(loss.leaves) for loss in repo.repair().plan.losses} == {1}
    report = reopened(repo).repair(sources=[{"x": training_state(1)["model"]["drifting"]}])
    assert not report.losses
    assert_same(reopened(repo).load(), training_state(2))


# ---- packs and files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["auto", "none"])
@pytest.mark.parametrize("cut", ["header", "table", "trailer"])
def test_records_survive_whatever_happens_to_header_table_and_trailer(compression: str, cut: str) -> None:
    repo = create_on(MemoryBackend(), RepositoryOptions(compression=compression))  # type: ignore[arg-type]
    state = training_state(1, moving_bytes=200_000) | {"long": np.arange(400_000, dtype=np.int32)}
    repo.save(state)
    (pack_id,) = packs_of(repo)
    rows = rows_of(repo, pack_id)
    data = bytearray(files_of(repo.handle.backend)[pack_name(pack_id)])
    at = {"header": slice(0, 64), "table": slice(-264, -64), "trailer": slice(-64, None)}[cut]
    data[at] = b"\xaa" * len(data[at])
    replace_file(repo.handle.backend, pack_name(pack_id), bytes(data))
    report = repo.repair()
    (salvage,) = report.plan.salvages
    assert len(salvage.verified) == len(rows)
    assert_same(reopened(repo).load(), state)
    (new_id,) = packs_of(reopened(repo))
    assert [row.in_run for row in rows_of(repo, new_id)] == [row.in_run for row in rows]


def test_exchanged_snapshot_files_get_their_names_back(repo: Repository) -> None:
    backend = repo.handle.backend
    one, other = (snapshot_name(snapshot.id) for snapshot in repo.log())
    files = files_of(backend)
    replace_file(backend, one, files[other])
    replace_file(backend, other, files[one])
    assert len(repo.repair().plan.restores) == 2
    fresh = reopened(repo)
    assert fresh.verify(data=True).ok
    assert_same(fresh.load(), training_state(2))


def test_refs_that_point_at_nothing_are_reported_with_an_offer(repo: Repository) -> None:
    backend = repo.handle.backend
    head, before = (snapshot.id for snapshot in repo.log())
    replace_file(backend, snapshot_name(head), b"rubbish")
    report = reopened(repo).repair()
    (offer,) = report.plan.refs
    assert (offer.name, offer.offered) == ("main", before)
    assert not report.moved_refs
    assert reopened(repo).repair(fix_refs=True).moved_refs == {"refs/branches/main": before}
    assert_same(reopened(repo).load(), training_state(1))
    assert reopened(repo).verify(data=True).ok


def test_the_handle_that_moved_a_branch_goes_on_from_there(repo: Repository) -> None:
    """Its next save was refused: the branch was not where it had saved it."""
    head, before = (snapshot.id for snapshot in repo.log())
    replace_file(repo.handle.backend, snapshot_name(head), b"rubbish")
    repo.repair(fix_refs=True)
    assert repo.save(training_state(3), step=3).parents == (before,)


def test_a_record_whose_base_was_collected_after_a_heal_is_a_note(repo: Repository) -> None:
    """It was a problem, although nothing that anybody needs is missing."""
    path = "model/drifting"
    ((_, row),) = places_of(repo, "main", path)
    ((_, base),) = places_of(repo, "main~1", path)
    assert row.base_ids == (base.chunk_id,)
    other = create_on(MemoryBackend())
    other.save(training_state(2), branch="again")
    for name, data in files_of(other.handle.backend, "packs/").items():
        repo.handle.backend.put_if_absent(name, data)  # the chunk by itself, in another pack
    damage_leaf(repo, "main~1", path)
    repo.repair()
    report = reopened(repo).verify(data=True)
    assert report.ok
    assert any("have lost their base" in note for note in report.notes)


# ---- beside others, and cut off ------------------------------------------------------------------------------------


def test_no_collector_works_beside_a_repair(repo: Repository) -> None:
    with_claim = repo.handle.backend.claim(new_collector_name(), claim_text("gc", 1))
    with pytest.raises(LeaseError, match="another collector is at work"):
        repo.repair()
    with_claim.release()
    repo.repair()


def test_a_long_repair_gives_signs_of_life_to_other_hosts() -> None:
    """A collector of another host took it for dead, and may delete the new copies of what repair then moves away."""
    hooked = HookedBackend(MemoryBackend())
    repo = create_on(hooked, RepositoryOptions(lease_s=1e-6))
    repo.save(training_state(1), step=1)
    damage_leaf(repo, "main", FROZEN)

    def signs() -> tuple[bytes, ...]:
        return tuple(claim.data for prefix in ("gc/", "leases/") for claim in hooked.inner.claims(prefix))

    examined: list[tuple[bytes, ...]] = []
    seen: dict[str, tuple[bytes, ...]] = {}
    hooked.hook = lambda operation, name: seen.update({f"{operation} {name.rpartition('/')[2]}": signs()})
    report = repo.repair(progress=lambda *_: examined.append(signs()))
    assert len(examined) > 5
    for claim in zip(*examined, strict=True):
        assert len(set(claim)) == len(examined)
    (pack_id,) = report.new_packs
    copying, copied = seen[f"create_stream {pack_id}.pack"], seen["put_if_absent why"]
    assert len(copied) == 2
    assert not set(copying) & set(copied)


def test_gc_goes_on_after_a_repair(repo: Repository) -> None:
    state = {"group": {f"leaf {number}": np.full(100, number) for number in range(600)}}
    saved = repo.save(state, branch="wide")
    from castore.snapshots import read_record

    part_id = read_record(repo.handle.backend, saved.id).part_ids[-1]
    found = {row.chunk_id: (pack_id, row) for pack_id in packs_of(repo) for row in rows_of(repo, pack_id)}
    pack_id, row = found[part_id]
    flip_bit(repo.handle.backend, pack_name(pack_id), row.offset + 3)
    with pytest.raises(DamageError, match="castore repair"):
        reopened(repo).gc()
    repo.repair()
    left = _left(reopened(repo), "wide")
    reopened(repo).gc(repack_below=1.0)
    assert reopened(repo).verify(data=True).ok
    assert _left(reopened(repo), "wide") == left
    assert_same(reopened(repo).load("main"), training_state(2))


def _left(repo: Repository, ref: str) -> dict[str, bytes]:
    with pytest.raises(LostLeavesError) as caught:
        repo.load(ref)
    loaded = repo.load(ref, paths=caught.value.left)["group"]
    return {name: value.tobytes() for name, value in loaded.items()}


def test_a_save_that_relied_on_a_pack_that_repair_moved_writes_again(repo: Repository) -> None:
    """The saver looked before, and publishes after the pack has gone to quarantine."""
    damage_leaf(repo, "main", "model/head")
    hooked = HookedBackend(backend_of(repo))
    done = threading.Event()

    def hook(operation: str, name: str) -> None:
        if operation == "put_if_absent" and name.startswith("snapshots/") and not done.is_set():
            done.set()
            open_on(backend_of(repo)).repair()

    saver = open_on(hooked)
    hooked.hook = hook
    saved = saver.save(training_state(2) | {"more": 1}, branch="beside")
    assert done.is_set()
    assert_same(reopened(repo).load(saved.id), training_state(2) | {"more": 1})
    assert not [loss for loss in reopened(repo).repair().losses if loss == saved.id]


def test_a_repair_cut_off_anywhere_loses_nothing_and_is_run_again(repo: Repository) -> None:
    damage_leaf(repo, "main", FROZEN)
    replace_file(repo.handle.backend, snapshot_name(repo.snapshot("main~1").id), b"rubbish")
    whole = copied(repo.handle.backend)
    calls = FaultBackend(copied(whole))
    repair(open_on(calls).handle)
    writing = [index for index, call in enumerate(calls.calls) if call.writes]
    assert len(writing) > 10
    for number, index in enumerate(writing):
        faulty = FaultBackend(copied(whole), Fault(index, MOMENTS[number % 3]))
        with pytest.raises(SimulatedCrash):
            repair(open_on(faulty).handle)
        survivor = faulty.restore_in_memory(unsynced="kept" if number % 2 else "lost")
        repair(open_on(survivor).handle)
        fresh = open_on(survivor)
        assert fresh.verify(data=True).ok, calls.calls[index]
        head = fresh.snapshot("main").id
        assert fresh.verify().lost_snapshots == {head: (FROZEN,)}
        assert_same(fresh.load(paths=["model/moving"])["model"]["moving"], training_state(2)["model"]["moving"])


def test_a_repair_that_does_not_fit_writes_nothing(repo: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    damage_leaf(repo, "main", FROZEN)
    reopened(repo).verify(data=True)
    before = files_of(repo.handle.backend)
    monkeypatch.setattr(repo.handle.backend, "free_bytes", lambda: 10, raising=False)
    with pytest.raises(NoSpaceError, match="repair copies"):
        repo.repair()
    assert files_of(repo.handle.backend) == before


# ---- marks ---------------------------------------------------------------------------------------------------------


def test_a_mark_of_what_is_lost_is_read_as_it_was_written() -> None:
    backend = MemoryBackend()
    snapshot_id = castore.snapshots.SnapshotId("ab" * 16)  # type: ignore[attr-defined]
    loss = make_loss(snapshot_id, {"a/b", "c"}, [], time_ns=5)
    write_loss(backend, loss)
    assert read_loss(backend, snapshot_id) == loss
    assert loss.covers(["c"])
    assert not loss.covers(["d"])
    assert not loss.covers([])
    many = make_loss(snapshot_id, [f"leaf {number:0200}" for number in range(5000)], [], time_ns=5)
    write_loss(backend, many)
    found = read_loss(backend, snapshot_id)
    assert found is not None
    assert found.leaf_count == 5000 > len(found.leaves)


def test_a_damaged_mark_is_a_problem_until_repair_writes_it_again(repo: Repository) -> None:
    damage_leaf(repo, "main", FROZEN)
    repo.repair()
    name = f"lost/{repo.snapshot('main').id}"
    replace_file(repo.handle.backend, name, b"rubbish")
    assert "mark" in {problem.kind for problem in reopened(repo).verify().problems}
    reopened(repo).repair()
    assert reopened(repo).verify(data=True).ok


def test_on_disk_the_quarantine_is_a_folder(tmp_path: Path) -> None:
    with castore.init(tmp_path / "store") as repo:
        repo.save(training_state(1))
        pack = next((tmp_path / "store/packs").glob("*/*.pack"))
        pack.write_bytes(pack.read_bytes()[:-100])
        report = repo.repair()
        assert (tmp_path / "store" / report.quarantine / "packs" / pack.parent.name / pack.name).is_file()
        assert_same(repo.load(), training_state(1))
        with pytest.raises(CastoreError):
            repo.load("nothing")
