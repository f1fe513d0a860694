"""Push beside the real collector: what one brings the other does not take, and what was forgotten can come again."""

from __future__ import annotations

import pytest

from castore.backend import MemoryBackend
from castore.errors import CastoreError, LeaseError
from castore.leases import condemn
from castore.maintenance.forget import forget_named
from castore.maintenance.gc.collect import GcRequest, collect
from castore.options import HASH_NAMES
from tests.checkpoint.crashes import refs_of
from tests.checkpoint.repositories import HookedBackend, at_call, copied, open_on
from tests.checkpoint.states import assert_same
from tests.transfer.pairs import assert_holds_history, repository, source_with_history, state_of
from tests.transfer.test_execute import small_state


@pytest.fixture(scope="module")
def small():
    repo = repository()
    for step in range(3):
        repo.save(small_state(step), step=step)
    return repo


@pytest.mark.parametrize("hash_name", HASH_NAMES)
def test_what_was_pushed_survives_a_collection_and_a_cut_history_does_not_stop_it(hash_name) -> None:
    source, target = source_with_history(), repository(hash_name=hash_name)
    source.push(target, ["main"], depth=2)
    report = collect(target.handle, GcRequest())
    assert not report.snapshots
    assert not [note for note in report.notes if "missing" in note]
    source.push(target)
    assert not collect(target.handle, GcRequest()).snapshots
    assert [snapshot.step for snapshot in target.log("main")][:2] == [3, 2]
    assert target.verify(data=True).ok
    if hash_name == "xxh3-128":
        assert_holds_history(target)


def test_what_was_forgotten_and_collected_comes_again_when_a_ref_names_it(small) -> None:
    target = repository()
    small.push(target)
    old = small.snapshot("main~1").id
    forget_named(target.handle, [old])
    assert old in collect(target.handle, GcRequest()).snapshots
    assert small.push(target).sent == {}
    assert list(small.push(target, ["main~1:again"]).sent) == [old]
    assert_same(target.load("again"), small_state(1))
    assert not collect(target.handle, GcRequest()).snapshots
    assert target.verify(data=True).ok


def test_a_snapshot_that_is_being_collected_is_not_brought_back_until_that_has_ended(small) -> None:
    target = repository()
    small.push(target)
    backend = target.handle.backend
    file = condemn(backend, packs=(), snapshots=(small.snapshot("main~2").id,), now_ns=1)
    with pytest.raises(LeaseError, match="push again"):
        small.push(open_on(backend))
    backend.delete(file.name)
    small.push(open_on(backend))


@pytest.mark.parametrize("hash_name", HASH_NAMES)
def test_a_collection_at_any_call_of_a_push_takes_nothing_that_is_needed(small, hash_name) -> None:
    """The target holds the chunks in packs that nothing names: garbage, until the push is there."""
    base = MemoryBackend()
    repository(base, hash_name=hash_name)
    small.push(open_on(base))
    for info in list(base.list("")):
        if not info.name.startswith(("packs/", "config")):
            base.delete(info.name)
    counted = HookedBackend(copied(base))
    small.push(open_on(counted))
    for call in range(len(counted.calls)):
        beside = HookedBackend(copied(base))
        beside.hook = at_call(call, lambda inner=beside.inner: collect(open_on(inner).handle, GcRequest(wait_s=0.0)))
        try:
            small.push(open_on(beside))
        except CastoreError as error:
            assert isinstance(error, LeaseError), (counted.calls[call], error)
            collect(open_on(beside.inner).handle, GcRequest(wait_s=0.0))
            small.push(open_on(beside.inner))
        left = open_on(beside.inner)
        for _ in range(2):
            for step in range(3):
                assert_same(left.load(f"main@{step}"), small_state(step))
            assert left.verify(data=True).ok, counted.calls[call]
            collect(left.handle, GcRequest(wait_s=0.0))


@pytest.mark.parametrize("ref", ["main:again", "main:tags/again"])
def test_a_push_that_a_collection_overtakes_at_its_ref_takes_the_ref_back(small, ref) -> None:
    """It was refused, and its ref stayed on a snapshot that then went: no collection was possible any more."""
    target = repository()
    small.push(target, ["main:main"])
    before = refs_of(target.handle.backend)
    going = [small.snapshot("main").id]
    beside = HookedBackend(target.handle.backend)
    condemned = at_call(
        0, lambda: condemn(beside.inner, packs=(), snapshots=going, now_ns=1), operation="compare_and_swap"
    )
    beside.hook = condemned
    with pytest.raises(LeaseError, match="push again"):
        small.push(open_on(beside), [ref])
    assert refs_of(target.handle.backend) == before


def test_parity_goes_with_its_pack(small) -> None:
    pytest.importorskip("pyeclib")
    from castore.maintenance.parity import add_parity, parity_sizes

    target = repository()
    small.push(target)
    doomed = target.save(state_of(5), branch="doomed")
    add_parity(target.handle)
    before = parity_sizes(target.handle.backend)
    target.delete_branch("doomed")
    forget_named(target.handle, [doomed.id])
    report = collect(target.handle, GcRequest())
    assert report.packs_deleted
    after = parity_sizes(target.handle.backend)
    assert after.keys() == before.keys() - set(report.packs_deleted) - set(report.packs_rewritten)
