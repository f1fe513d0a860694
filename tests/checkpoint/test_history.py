"""Log, branches, tags, orphans: what people ask of a history."""

from __future__ import annotations

import datetime as dt
import pickle
from pathlib import Path

import numpy as np
import pytest

import castore
from castore.api import Repository
from castore.backend import MemoryBackend
from castore.errors import (
    AmbiguousRefError,
    DamageError,
    InvalidNameError,
    RefExistsError,
    UnknownRefError,
)
from castore.format.layout import branch_name, tag_name
from tests.checkpoint.repositories import HookedBackend, create_on, files_of, held_leases, open_on
from tests.checkpoint.states import assert_same, training_state


@pytest.fixture
def repo() -> Repository:
    return create_on(MemoryBackend())


def ids(snapshots: object) -> list[str]:
    return [snapshot.id for snapshot in snapshots]  # type: ignore[attr-defined]


# ---- log ---------------------------------------------------------------------------------------------------------


def test_the_log_is_newest_first_and_follows_first_parents(repo: Repository) -> None:
    saved = [repo.save({"n": number}, step=number).id for number in range(5)]
    side = repo.save({"n": "side"}, branch="side", parent="main~2").id
    assert ids(repo.log()) == ids(repo.log("main")) == saved[::-1]
    assert ids(repo.log("side")) == [side, *saved[2::-1]]
    assert ids(repo.log("main~3")) == saved[1::-1]
    assert ids(repo.log(saved[0])) == saved[:1]
    assert [snapshot.step for snapshot in repo.log()] == [4, 3, 2, 1, 0]
    with pytest.raises(UnknownRefError):
        list(repo.log("side~9"))


def test_the_log_is_lazy(repo: Repository) -> None:
    for number in range(20):
        repo.save({"n": number})
    counting = HookedBackend(repo.handle.backend)
    log = open_on(counting).log()
    next(log)
    assert sum(name.startswith("snapshots/") for _, name in counting.calls) == 1


def test_the_log_ends_where_a_parent_is_gone(repo: Repository) -> None:
    saved = [repo.save({"n": number}).id for number in range(4)]
    repo.handle.backend.delete(f"snapshots/{saved[1]}")
    assert ids(repo.log()) == [saved[3], saved[2]]
    with pytest.raises(UnknownRefError, match="found 1"):
        repo.snapshot("main~3")
    assert repo.verify().ok
    repo.save({"n": 4})


def test_an_empty_repository_says_so(repo: Repository) -> None:
    for call in (repo.log, repo.snapshot, repo.load):
        with pytest.raises(UnknownRefError, match="save something first"):
            list(call("main"))  # type: ignore[operator]
    assert list(repo.snapshots()) == repo.orphans() == repo.branches() == repo.tags() == []
    assert repo.verify(data=True).ok


def test_snapshots_lists_all_of_them(repo: Repository) -> None:
    saved = {repo.save({"n": number}, branch=f"b{number}").id for number in range(3)}
    repo.delete_branch("b1")
    assert set(ids(repo.snapshots())) == saved


def test_snapshots_are_values(repo: Repository) -> None:
    saved = repo.save(training_state(1), step=3)
    found = repo.snapshot()
    assert found == saved
    assert found.created_at.tzinfo is dt.UTC
    assert hash(found.id)
    assert len(found.leaves) == found.leaf_count
    assert {leaf.path for leaf in found.leaves} >= {"model/frozen", "optimizer/state/0/step", "epoch"}
    assert "_read_leaves" not in repr(found)
    with pytest.raises((AttributeError, TypeError)):
        found.id = "x"  # type: ignore[misc, assignment]


# ---- refs --------------------------------------------------------------------------------------------------------


def test_branches_and_tags_are_listed_by_name(repo: Repository) -> None:
    first = repo.save({}, branch="zeta")
    for name in ("beta", "Alpha", "alpha/2"):
        repo.branch(name, at="zeta")
        repo.tag(f"{name}.tag", at="zeta")
    assert [ref.name for ref in repo.branches()] == ["Alpha", "alpha/2", "beta", "zeta"]
    assert [ref.name for ref in repo.tags()] == ["Alpha.tag", "alpha/2.tag", "beta.tag"]
    assert {ref.snapshot_id for ref in (*repo.branches(), *repo.tags())} == {first.id}


def test_a_branch_is_made_moved_and_removed(repo: Repository) -> None:
    saved = [repo.save({"n": number}).id for number in range(3)]
    ref = repo.branch("fork", at="main~1")
    assert (ref.name, ref.snapshot_id) == ("fork", saved[1])
    with pytest.raises(RefExistsError, match="move=True"):
        repo.branch("fork")
    assert repo.branch("fork", at=saved[0], move=True).snapshot_id == saved[0]
    assert repo.branch("new", move=True).snapshot_id == saved[2]
    repo.delete_branch("fork")
    with pytest.raises(UnknownRefError, match="main, new"):
        repo.delete_branch("fork")
    assert ids(repo.log("main")) == saved[::-1]


def test_a_save_continues_a_branch_that_this_handle_moved(repo: Repository) -> None:
    saved = [repo.save({"n": number}).id for number in range(3)]
    repo.branch("main", at="main~2", move=True)
    again = repo.save({"n": "again"})
    assert again.parents == (saved[0],)
    assert ids(repo.orphans()) == [saved[2], saved[1]]


def test_a_tag_never_moves(repo: Repository) -> None:
    first = repo.save({"n": 1})
    repo.tag("v1")
    repo.save({"n": 2})
    for name in ("v1", "main"):
        with pytest.raises(RefExistsError):
            repo.tag(name)
    assert repo.snapshot("v1").id == first.id
    with pytest.raises(RefExistsError):
        repo.branch("v1")
    repo.delete_tag("v1")
    with pytest.raises(UnknownRefError, match="none"):
        repo.delete_tag("v1")
    with pytest.raises(UnknownRefError):
        repo.delete_tag("main")
    repo.tag("v1")


@pytest.mark.parametrize("name", ["", "a..b", "a b", "x@1", "refs~1", "tags/x", "\udcff"])
def test_bad_names_are_refused_by_every_call(repo: Repository, name: str) -> None:
    repo.save({})
    before = files_of(repo.handle.backend)
    for call in (repo.branch, repo.tag, repo.delete_branch, repo.delete_tag):
        with pytest.raises(InvalidNameError):
            call(name)
    assert files_of(repo.handle.backend) == before


@pytest.mark.parametrize("name", ["..", "../../etc/passwd", "con/../x", "a\0b", "heads/../x", "~", "@{1}", "x" * 5000])
def test_no_ref_that_is_read_escapes_or_crashes(repo: Repository, name: str) -> None:
    repo.save({})
    for call in (repo.snapshot, repo.load):
        with pytest.raises((UnknownRefError, InvalidNameError)):
            call(name)


def test_a_name_that_is_both_must_be_told_apart(repo: Repository) -> None:
    """Two that raced for one name."""
    first, second = repo.save({"n": 1}), repo.save({"n": 2})
    repo.tag("both", at=first.id)
    backend = repo.handle.backend
    text = backend.read(tag_name("both"), max_bytes=1 << 20)
    backend.put_if_absent(branch_name("both"), text)
    assert repo.load("both") == {"n": 1}, "they agree"
    repo.branch("both", at=second.id, move=True)
    with pytest.raises(AmbiguousRefError, match="heads/both or tags/both"):
        repo.load("both")
    assert repo.load("heads/both") == {"n": 2}
    assert repo.load("tags/both") == {"n": 1}


def test_an_id_needs_four_digits_and_only_one_match(repo: Repository) -> None:
    saved = ids(repo.save({"n": number}, branch=f"b{number}") for number in range(3))
    for snapshot_id in saved:
        assert repo.snapshot(snapshot_id[:8]).id == snapshot_id
    with pytest.raises(UnknownRefError, match="at least 4"):
        repo.snapshot(saved[0][:3])
    twin = saved[0][:6] + "0" * 26
    repo.handle.backend.put_if_absent(f"snapshots/{twin}", b"")
    with pytest.raises(AmbiguousRefError) as caught:
        repo.snapshot(saved[0][:6])
    assert len(caught.value.near) == 2


def test_a_branch_named_like_an_id_wins(repo: Repository) -> None:
    first = repo.save({"n": 1})
    second = repo.save({"n": 2})
    repo.branch(first.id[:8], at=second.id)
    assert repo.snapshot(first.id[:8]).id == second.id
    assert repo.snapshot(first.id).id == first.id


def test_a_damaged_ref_is_named_and_can_be_mended(repo: Repository) -> None:
    saved = repo.save({"n": 1})
    repo.branch("fine")
    backend = repo.handle.backend
    backend.delete(branch_name("main"))
    backend.put_if_absent(branch_name("main"), b"torn")
    fresh = open_on(backend)
    for call in (fresh.branches, fresh.orphans, lambda: fresh.load("main"), lambda: fresh.save({"n": 2})):
        with pytest.raises(DamageError, match="main"):
            call()
    with pytest.raises(DamageError):
        fresh.branch("main", at=saved.id)
    assert fresh.load("fine") == {"n": 1}
    fresh.branch("main", at=saved.id, move=True)
    assert fresh.save({"n": 2}).parents == (saved.id,)
    backend.delete(branch_name("fine"))
    backend.put_if_absent(branch_name("fine"), b"torn")
    fresh.delete_branch("fine")
    assert [ref.name for ref in fresh.branches()] == ["main"]


def test_refs_that_were_swapped_are_noticed(repo: Repository) -> None:
    repo.save({"n": 1})
    repo.save({"n": 2}, branch="other")
    backend = repo.handle.backend
    text = backend.read(branch_name("other"), max_bytes=1 << 20)
    backend.delete(branch_name("main"))
    backend.put_if_absent(branch_name("main"), text)
    with pytest.raises(DamageError, match="swapped"):
        open_on(backend).load("main")


# ---- orphans -----------------------------------------------------------------------------------------------------


def test_orphans_are_what_no_ref_reaches_newest_first(repo: Repository) -> None:
    kept = repo.save(training_state(0), step=0)
    lost = [
        repo.save(training_state(number), branch="lost", parent="main" if number == 1 else None).id for number in (1, 2)
    ]
    tagged = repo.save(training_state(3), branch="lost", tags=("keep",)).id
    assert repo.orphans() == []
    repo.delete_branch("lost")
    assert repo.orphans() == [], "the tag reaches them all"
    repo.delete_tag("keep")
    assert ids(repo.orphans()) == [tagged, *lost[::-1]]
    assert_same(repo.load(lost[0]), training_state(1))
    repo.branch("found", at=lost[1])
    assert ids(repo.orphans()) == [tagged]
    assert ids(repo.log("found")) == [*lost[::-1], kept.id]


def test_a_ref_to_a_snapshot_that_is_gone_is_refused(repo: Repository) -> None:
    saved = repo.save({"n": 1})
    repo.handle.backend.delete(f"snapshots/{saved.id}")
    for call in (repo.branch, repo.tag):
        with pytest.raises(UnknownRefError):
            call("x", at=saved.id)
        with pytest.raises(UnknownRefError):
            call("x", at="main")
    assert [ref.name for ref in repo.branches()] == ["main"]
    assert held_leases(repo.handle.backend) == []


def test_a_leaf_table_needs_no_tensor_and_survives_close(tmp_path: Path) -> None:
    with castore.init(tmp_path / "store") as repo:
        snapshot = repo.save({"a": np.arange(1000.0), "b": np.arange(1000.0), "c": np.arange(1000.0) + 1})
    leaves = {leaf.path: leaf for leaf in snapshot.leaves}
    assert leaves["a"].digest == leaves["b"].digest != leaves["c"].digest
    assert (leaves["a"].kind, leaves["a"].dtype, leaves["a"].shape) == ("ndarray", "<f8", (1000,))
    repo.close()


def test_errors_pickle_with_their_facts(repo: Repository) -> None:
    """They cross process pools."""
    repo.save({"n": 1})
    with pytest.raises(UnknownRefError) as caught:
        repo.load("mian")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (type(copy), str(copy), copy.near) == (UnknownRefError, str(caught.value), caught.value.near)
    assert "main" in copy.near
