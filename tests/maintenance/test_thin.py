"""Thinning drops leaves from kept snapshots; everybody says so, before gc took the bytes as after."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

import castore
from castore.api import Repository
from castore.backend import MemoryBackend
from castore.errors import DamageError, PathNotFoundError, ThinnedError, UsageError
from castore.format.layout import thin_name
from castore.ids import SnapshotId
from castore.marks import read_thinning
from castore.options import RepositoryOptions
from tests.checkpoint.repositories import HookedBackend, at_call, create_on, open_on
from tests.checkpoint.states import assert_same, training_state
from tests.suites.collector import collect


def state(seed: int) -> dict:
    weights = np.random.default_rng(seed).standard_normal(600)
    moments = np.random.default_rng(seed + 1000).standard_normal(600)
    return {"model": {"w": weights, "tied": weights}, "optimizer": {"m": moments, "step": seed}, "epoch": seed}


@pytest.fixture
def repository() -> Repository:
    return create_on(MemoryBackend(), RepositoryOptions(compression="none"))


def line(repository: Repository, count: int, *, branch: str = "main", first: int = 0) -> list[SnapshotId]:
    return [repository.save(state(step), step=step, branch=branch).id for step in range(first, first + count)]


def thinned_steps(repository: Repository, ref: str = "main") -> list[int | None]:
    return [snapshot.step for snapshot in repository.log(ref) if snapshot.dropped]


# ---- which ones ------------------------------------------------------------------------------------------------


def test_the_newest_few_stay_whole_and_the_rest_lose_what_matches(repository: Repository) -> None:
    line(repository, 6)
    report = repository.thin(["optimizer/**"], older_than=2)
    assert [choice.step for choice in report.thinned] == [3, 2, 1, 0]
    assert thinned_steps(repository) == [3, 2, 1, 0]
    assert {choice.leaf_count for choice in report.thinned} == {2}
    assert report.thinned[0].raw_bytes == 4800 + 1
    assert repository.thin(["optimizer/**"], older_than=2).thinned == (), "nothing is done twice"


def test_age_counts_kept_snapshots_or_is_a_duration(repository: Repository) -> None:
    line(repository, 6)
    repository.forget(ids=["main@4", "main@3"])
    assert [c.step for c in repository.thin(["optimizer"], older_than=2, dry_run=True).thinned] == [1, 0]
    assert repository.thin(["optimizer"], older_than="1h", dry_run=True).thinned == ()
    times = {snapshot.step: snapshot.created_at for snapshot in repository.log()}
    half = (times[5] - times[1]) / 2
    thinned = repository.thin(["optimizer"], older_than=half, dry_run=True).thinned
    assert [choice.step for choice in thinned] == [step for step in (2, 1, 0) if times[5] - times[step] > half]
    assert thinned_steps(repository) == []


def test_heads_and_tagged_snapshots_stay_whole_unless_they_are_named(repository: Repository) -> None:
    ids = line(repository, 5)
    repository.tag("best", at=ids[1])
    repository.branch("side", at=ids[2])
    repository.thin(["optimizer/**"], older_than=1)
    assert thinned_steps(repository) == [3, 0]
    repository.thin(["optimizer/**"], ids=["best"])
    assert thinned_steps(repository) == [3, 1, 0]


def test_on_several_branches_a_snapshot_is_as_old_as_where_it_is_youngest(repository: Repository) -> None:
    line(repository, 3)
    repository.branch("side", at="main")
    line(repository, 5, first=10)
    line(repository, 1, branch="side", first=20)
    repository.thin(["optimizer/**"], older_than=3)
    assert thinned_steps(repository) == [11, 10, 0]


def test_globs_add_up(repository: Repository) -> None:
    ids = line(repository, 2)
    repository.thin(["optimizer/m"], ids=[ids[0]])
    report = repository.thin(["epoch", "optimizer/m"], ids=[ids[0]])
    assert [(choice.dropped, choice.leaf_count) for choice in report.thinned] == [(("optimizer/m", "epoch"), 1)]
    assert repository.read(ids[0], "optimizer/step") == 0
    with pytest.raises(ThinnedError):
        repository.read(ids[0], "epoch")


def test_what_can_mean_nothing_is_refused(repository: Repository) -> None:
    line(repository, 3)
    for arguments in (
        {"older_than": 0},
        {"older_than": -1},
        {"older_than": "old"},
        {"older_than": True},
        {},
        {"older_than": 1, "ids": ["main~1"]},
        {"ids": []},
    ):
        with pytest.raises(UsageError):
            repository.thin(["optimizer"], **arguments)
    for globs in ([], "optimizer", [""], [3]):
        with pytest.raises(UsageError):
            repository.thin(globs, older_than=1)
    with pytest.raises(PathNotFoundError, match="optimiser"):
        repository.thin(["optimiser/**"], older_than=1)
    assert thinned_steps(repository) == []


def test_a_snapshot_of_which_nothing_would_be_left_stays_whole(repository: Repository) -> None:
    line(repository, 3)
    report = repository.thin(["**"], older_than=1)
    assert report.thinned == ()
    assert {why for _, why in report.skipped} == {"nothing would be left of it: forget it instead"}


# ---- what readers see ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("collected", [False, True])
def test_a_thinned_snapshot_says_so_everywhere_and_the_rest_can_be_read(
    repository: Repository, collected: bool
) -> None:
    ids = line(repository, 3)
    before = repository.snapshot(ids[0])
    repository.thin(["optimizer/**"], older_than=1)
    if collected:
        stored_bytes = repository.usage().pack_bytes
        collect(repository)
        assert repository.usage().pack_bytes < stored_bytes - 2 * 4800
        repository = open_on(repository.handle.backend)
    thinned = repository.snapshot(ids[0])
    assert (thinned.id, thinned.state_id) == (before.id, before.state_id)
    assert thinned.dropped == ("optimizer/**",)
    assert before.dropped == ()
    leaves = {leaf.path: leaf for leaf in thinned.leaves}
    assert {path for path, leaf in leaves.items() if leaf.dropped} == {"optimizer/m", "optimizer/step"}
    assert {path: leaf.digest for path, leaf in leaves.items()} == {leaf.path: leaf.digest for leaf in before.leaves}, (
        "every digest stays provable"
    )
    with pytest.raises(ThinnedError) as caught:
        repository.load(ids[0])
    assert set(caught.value.dropped) == {"optimizer/m", "optimizer/step"}
    assert set(caught.value.left) == {"model", "epoch"}
    assert "model" in str(caught.value)
    assert pickle.loads(pickle.dumps(caught.value)).left == caught.value.left
    for paths in (["optimizer/m"], ["**"], ["model/**", "optimizer/step"], ["*/step"]):
        with pytest.raises(ThinnedError):
            repository.load(ids[0], paths=paths)
    for into, strict in ((state(9), True), (state(9), False)):
        with pytest.raises(ThinnedError):
            repository.load(ids[0], into=into, strict=strict)
        assert_same(into, state(9))
    left = repository.load(ids[0], paths=caught.value.left)
    assert_same(left, {name: state(0)[name] for name in ("model", "epoch")})
    assert left["model"]["w"] is left["model"]["tied"]
    assert repository.read(ids[0], "model/w", rows=slice(3, 5)).tolist() == state(0)["model"]["w"][3:5].tolist()
    with pytest.raises(ThinnedError):
        repository.read(ids[0], "optimizer/m", rows=slice(3, 5))
    with pytest.raises(ThinnedError):
        repository.read(ids[0], "optimizer/step")
    assert_same(repository.load("main"), state(2))


@pytest.mark.parametrize("collected", [False, True])
def test_diff_compares_digests_of_dropped_leaves_and_values_of_the_others(
    repository: Repository, collected: bool
) -> None:
    ids = line(repository, 3)
    repository.thin(["optimizer/**"], older_than=1)
    if collected:
        collect(repository)
    leaves = {leaf.path: leaf for leaf in repository.diff(ids[0], ids[2]).leaves}
    assert {leaf.status for leaf in leaves.values()} == {"changed"}
    assert leaves["model/w"].max_abs is not None
    assert not leaves["model/w"].dropped
    for path in ("optimizer/m", "optimizer/step"):
        assert (leaves[path].dropped, leaves[path].max_abs) == (True, None)
    assert repository.diff(ids[0], ids[0]).identical


@pytest.mark.parametrize("collected", [False, True])
def test_verify_calls_dropped_leaves_no_damage_and_the_rest_is_still_checked(
    repository: Repository, collected: bool
) -> None:
    ids = line(repository, 3)
    repository.thin(["optimizer/**"], older_than=1)
    if collected:
        collect(repository)
    report = repository.verify(data=True)
    assert report.ok, report.problems
    backend = repository.handle.backend
    for name in [info.name for info in backend.list("packs/")]:
        backend.delete(name)
    damaged = open_on(backend).verify().damaged_snapshots
    assert set(damaged) == set(ids)


def test_lost_chunks_name_only_leaves_that_are_kept(repository: Repository) -> None:
    (thin_id,) = line(repository, 1)
    moments = state(0)["optimizer"]["m"]
    whole_id = repository.save({"optimizer": {"m": moments}}, step=1).id
    repository.save({"other": 1}, step=2)
    repository.thin(["optimizer/**"], ids=[thin_id])
    collect(repository)
    backend = repository.handle.backend
    digest = repository.handle.hasher.chunk_id(moments.tobytes())
    (hits,) = repository.handle.store.find([digest])
    name = f"packs/{hits[0].pack_id[:2]}/{hits[0].pack_id}.pack"
    data = bytearray(backend.read(name, max_bytes=1 << 24))
    data[hits[0].row.offset] ^= 1
    backend.delete(name)
    backend.put_if_absent(name, bytes(data))
    report = open_on(backend).verify(data=True)
    assert report.damaged_snapshots == {whole_id: ("optimizer/m",)}


def test_usage_counts_what_is_kept_and_shows_what_gc_frees(repository: Repository) -> None:
    line(repository, 3)
    whole = repository.usage()
    assert whole.unreferenced_bytes == 0
    repository.thin(["optimizer/**"], older_than=1)
    thinned = repository.usage()
    assert thinned.unreferenced_bytes == 2 * 4800
    assert thinned.leaf_bytes == whole.leaf_bytes - 2 * 4800
    repository.forget(castore.Keep(last=1))
    forgotten = repository.usage()
    assert len(forgotten.snapshots) == 1
    assert forgotten.forgotten_count == 2
    assert forgotten.unreferenced_bytes > 4 * 4800


def test_tied_and_shared_memory_stays_as_long_as_a_kept_leaf_needs_it(repository: Repository) -> None:
    flat = np.arange(1000, dtype=np.float64)
    tied = np.arange(500, dtype=np.float64) + 0.5
    shown = {"model": {"a": flat[:600], "tied": tied}, "ema": {"a": flat[300:], "tied": tied}}
    snapshot = repository.save(shown)
    repository.save({"next": 1})
    repository.thin(["model/**"], ids=[snapshot])
    collect(repository)
    left = repository.load(snapshot, paths=["ema"])
    assert_same(left, {"ema": shown["ema"]})
    assert repository.verify(data=True).ok
    with pytest.raises(ThinnedError):
        repository.load(snapshot, paths=["model/tied"])


def test_a_leaf_with_an_id_list_stays_provable(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (
        "castore.format.manifest",
        "castore.checkpoint.plan",
        "castore.manifests",
        "castore.maintenance.parts",
    ):
        monkeypatch.setattr(f"{module}.PART_CHUNKS_MAX", 2)
    big = np.random.default_rng(0).integers(0, 256, 5 << 20, np.uint8)
    snapshot = repository.save({"big": big, "small": np.arange(999)})
    repository.save({"next": 1})
    digest = {leaf.path: leaf.digest for leaf in snapshot.leaves}
    repository.thin(["big"], ids=[snapshot])
    assert repository.verify(data=True).ok
    collect(repository)
    fresh = open_on(repository.handle.backend)
    assert fresh.usage().pack_bytes < 1 << 20
    assert fresh.verify(data=True).ok
    assert {leaf.path: leaf.digest for leaf in fresh.snapshot(snapshot).leaves} == digest


# ---- beside others ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["auto", "none"])
def test_a_save_that_continues_from_a_thinned_parent_is_whole(compression) -> None:
    repository = create_on(MemoryBackend(), RepositoryOptions(compression=compression))
    first = repository.save(training_state(1), step=1)
    repository.save(training_state(2), step=2)
    repository.thin(["optimizer/**", "model/drifting"], ids=[first])
    for collected in (False, True):
        forked = repository.save(training_state(3), branch="fork", parent=first, step=3)
        again = repository.save(training_state(1), branch="again", parent=first, step=4)
        if not collected:
            collect(repository)
        fresh = open_on(repository.handle.backend)
        assert_same(fresh.load(forked), training_state(3))
        assert_same(fresh.load(again), training_state(1))
        assert fresh.verify(data=True).ok
        repository.delete_branch("fork")
        repository.delete_branch("again")


def test_a_ref_put_on_a_snapshot_while_it_is_thinned_keeps_it_whole() -> None:
    number = 0
    while True:
        inner = MemoryBackend()
        ids = line(create_on(inner), 3)
        done: list[int] = []
        hooked = HookedBackend(inner)

        def act(inner=inner, ids=ids, done=done, hooked=hooked) -> None:
            open_on(inner).tag("kept", at=ids[1])
            done.append(sum("refs/tags" in name for _, name in hooked.calls[:-1]))

        hooked.hook = at_call(number, act)
        open_on(hooked).thin(["optimizer/**"], older_than=1)
        if not done:
            break
        # A tag made after the second look at the tags names a snapshot that was thinned before: nothing is wrong then.
        assert (read_thinning(inner, ids[1]) is None) == (done[0] < 2), number
        number += 1
    assert number > 10


def test_thinning_at_any_moment_of_a_load_gives_the_state_or_says_why() -> None:
    number, refused = 0, 0
    while True:
        inner = MemoryBackend()
        repository = create_on(inner, RepositoryOptions(compression="none"))
        ids = line(repository, 3)
        done: list[int] = []

        def act(inner=inner, done=done) -> None:
            other = open_on(inner)
            other.thin(["optimizer/**"], older_than=1)
            collect(other)
            done.append(1)

        hooked = HookedBackend(inner, at_call(number, act))
        try:
            assert_same(open_on(hooked).load(ids[0]), state(0))
        except ThinnedError:
            refused += 1
        except DamageError as error:
            raise AssertionError(f"call {number} of the load") from error
        if not done:
            break
        number += 1
    assert number > 5
    assert refused > 2


def test_a_damaged_overlay_is_damage_and_thinning_again_mends_it(repository: Repository) -> None:
    ids = line(repository, 3)
    repository.thin(["optimizer/**"], older_than=1)
    collect(repository)
    backend = repository.handle.backend
    data = backend.read(thin_name(ids[0]), max_bytes=4096)
    backend.compare_and_swap(thin_name(ids[0]), expected=data, new=data[:-4])
    with pytest.raises(DamageError, match="thin/"):
        repository.load(ids[0], paths=["model/**"])
    assert "mark" in {problem.kind for problem in repository.verify().problems}
    repository.thin(["optimizer/**"], ids=[ids[0]])
    assert_same(repository.load(ids[0], paths=["model/**"])["model"], state(0)["model"])
    assert repository.verify(data=True).ok
