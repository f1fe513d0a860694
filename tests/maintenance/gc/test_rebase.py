"""Bases that only differences need go when that frees more than it costs; everything stays bit for bit the same."""

from __future__ import annotations

import numpy as np
import pytest

from castore.maintenance.gc.ledger import Tree
from castore.maintenance.gc.rebase import plan_rebase
from castore.store import pack_sizes
from tests.checkpoint.repositories import HookedBackend, at_call, copied, open_on
from tests.checkpoint.states import State
from tests.maintenance.gc.histories import check_whole, forget, gc, line


@pytest.fixture(autouse=True)
def references_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that each test knows what rests on what."""
    monkeypatch.setattr("castore.checkpoint.bases.REFERENCE_MOVES_EVERY", 2**32)


def dense(step: int) -> State:
    """One chunk of weights that every step changes a little."""
    start = np.random.default_rng(1).standard_normal(40_000)
    noise = np.random.default_rng(step).standard_normal(40_000) * 1e-5
    return {"weights": ((start + noise) * (1 + 1e-4 * step)).astype(np.float32), "step": step}


def test_the_bases_of_the_only_snapshot_that_is_left_go() -> None:
    repo, ids = line(5, dense)
    forget(repo, *ids[:4])
    planned = gc(repo, dry_run=True)
    before = sum(pack_sizes(repo.handle.backend).values())
    report = gc(repo)
    assert planned.rebased_bytes > 0
    assert report.rebased_bytes == pytest.approx(planned.rebased_bytes, rel=0.1)
    assert report.pinned_bytes == 0
    assert report.total_bytes < 0.5 * before
    assert report.freed_bytes == pytest.approx(before - report.total_bytes, abs=2000)  # snapshot files besides
    check_whole(repo, {ids[4]: dense(4)})
    again = gc(repo)
    assert (again.rebased_bytes, again.freed_bytes, again.copied_bytes) == (0, 0, 0)


def test_several_snapshots_share_a_new_base() -> None:
    repo, ids = line(5, dense)
    forget(repo, *ids[:3])
    report = gc(repo)
    assert report.rebased_bytes > 0
    assert report.pinned_bytes == 0
    check_whole(repo, {ids[3]: dense(3), ids[4]: dense(4)})
    codecs = {codec.name: codec.chunk_count for codec in repo.usage().codecs}
    assert codecs["ordered"] == 1


def test_where_it_would_cost_more_than_it_frees_bases_stay_and_are_told() -> None:
    repo, ids = line(9, dense)
    forget(repo, *ids[:2])
    report = gc(repo)
    assert report.rebased_bytes == 0
    assert report.pinned_bytes > 0
    assert set(report.pinned_by) <= set(ids[2:])
    check_whole(repo, {snapshot_id: dense(step) for step, snapshot_id in enumerate(ids) if step >= 2})


def test_a_base_in_the_middle_goes_and_differences_rest_on_the_root() -> None:
    repo, ids = line(3, dense)
    forget(repo, ids[1])
    report = gc(repo)
    check_whole(repo, {ids[0]: dense(0), ids[2]: dense(2)})
    assert report.rebased_bytes > 0
    assert report.pinned_bytes == 0


def test_interrupted_at_any_call_it_leaves_everything_whole_and_is_completed() -> None:
    repo, ids = line(4, dense)
    forget(repo, *ids[:3])
    backend = copied(repo.handle.backend)
    count = HookedBackend(copied(backend))
    gc(open_on(count))
    writing = [
        number
        for number, (operation, _) in enumerate(count.calls)
        if operation in ("put_if_absent", "create_stream", "delete", "compare_and_swap", "claim")
    ]
    assert len(writing) > 6
    for number in writing:
        own = copied(backend)
        with pytest.raises(KeyboardInterrupt):
            gc(open_on(HookedBackend(own, at_call(number, interrupt))))
        check_whole(open_on(own), {ids[3]: dense(3)})
        report = gc(open_on(own))
        assert report.pinned_bytes == 0
        check_whole(open_on(own), {ids[3]: dense(3)})
        assert gc(open_on(own)).freed_bytes == 0


def interrupt() -> None:
    raise KeyboardInterrupt


# ---- the plan ------------------------------------------------------------------------------------------------------


def tree(number: int, *, replaced: int, written: int) -> Tree:
    return Tree(number, (number,), replaced, written)


def test_trees_that_free_too_little_for_what_they_write_are_left() -> None:
    plan = plan_rebase(
        [tree(1, replaced=149, written=100), tree(2, replaced=150, written=100)], written_bytes_max=10**9
    )
    assert [chosen.reference for chosen in plan.trees] == [2]
    assert plan.freed_bytes == 50


def test_the_best_trees_come_first_while_what_they_write_fits() -> None:
    trees = [tree(1, replaced=160, written=100), tree(2, replaced=300, written=100), tree(3, replaced=90, written=30)]
    plan = plan_rebase(trees, written_bytes_max=130)
    assert [chosen.reference for chosen in plan.trees] == [2, 3]


def test_nothing_is_planned_without_space() -> None:
    assert plan_rebase([tree(1, replaced=300, written=100)], written_bytes_max=0).trees == ()


def mixed(step: int) -> State:
    """Weights of three chunks and their rounded copy of two, the first of which rests on two masters."""
    start = np.random.default_rng(1).standard_normal(600_000)
    noise = np.random.default_rng(step).standard_normal(600_000) * 1e-5
    weights = ((start + noise) * (1 + 1e-4 * step)).astype(np.float32)
    return {"weights": weights, "half": weights.astype(np.float16), "step": step}


def test_masters_that_were_dropped_and_their_copies_kept_do_not_make_a_collection_write_for_nothing() -> None:
    repo, ids = line(4, mixed)
    before = sum(pack_sizes(repo.handle.backend).values())
    repo.thin(["weights"], older_than=1)
    gc(repo)
    report = gc(repo)
    assert report.total_bytes <= before
    for step, snapshot_id in enumerate(ids):
        assert np.array_equal(repo.load(snapshot_id, paths=["half"])["half"], mixed(step)["half"])


def test_rounded_copies_do_not_keep_the_bases_of_their_masters() -> None:
    repo, ids = line(5, mixed)
    forget(repo, *ids[:4])
    report = gc(repo)
    assert report.rebased_bytes > 0
    assert report.pinned_bytes == 0
    check_whole(repo, {ids[4]: mixed(4)})
