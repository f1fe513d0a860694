"""Which refs move where, and what is refused before anything is sent."""

from __future__ import annotations

import pytest

from castore.api import Repository
from castore.errors import (
    AmbiguousRefError,
    DivergedError,
    InvalidNameError,
    RefExistsError,
    UnknownRefError,
    UsageError,
)
from castore.format.layout import snapshot_name
from castore.options import HASH_NAMES
from tests.checkpoint.repositories import copied, files_of, open_on
from tests.checkpoint.states import assert_same, training_state
from tests.transfer.pairs import refs_of, repository


@pytest.fixture
def source() -> Repository:
    """main: steps 0, 1, 2; tag `kept` at 1."""
    repo = repository()
    for step in range(3):
        repo.save(training_state(step), step=step)
    repo.tag("kept", at="main~1")
    return repo


def untouched(target: Repository, before: dict[str, bytes]) -> bool:
    return files_of(target.handle.backend) == before


def test_refs_get_other_names_and_expressions_need_one(source) -> None:
    target = repository()
    report = source.push(target, ["main:backup/main", "kept", "main@0:tags/zero", "heads/main:heads/again"])
    ids = {step: source.snapshot(f"main@{step}").id for step in range(3)}
    expected = {
        "heads/backup/main": ids[2],
        "heads/again": ids[2],
        "tags/kept": ids[1],
        "tags/zero": ids[0],
    }
    assert refs_of(target) == expected
    assert report.heads == expected
    with pytest.raises(UsageError, match="needs a name at the target"):
        source.push(target, ["main~1"])
    with pytest.raises(InvalidNameError):
        source.push(target, ["main:no good"])
    with pytest.raises(UnknownRefError):
        source.push(target, ["nothing"])
    with pytest.raises(UsageError, match="twice"):
        source.push(target, ["main:x", "kept:x"])
    with pytest.raises(UsageError, match="sequence of refs"):
        source.push(target, "main")
    with pytest.raises(UsageError, match="at least 1"):
        source.push(target, depth=0)
    assert refs_of(target) == expected


def test_a_name_that_is_branch_and_tag_must_say_which(source) -> None:
    backend = source.handle.backend
    data = backend.read("refs/tags/kept", max_bytes=1000)
    assert backend.put_if_absent("refs/branches/kept", data)
    with pytest.raises(AmbiguousRefError):
        source.push(repository(), ["kept"])
    target = repository()
    source.push(target, ["tags/kept"])
    assert list(refs_of(target)) == ["tags/kept"]


@pytest.mark.parametrize("hash_name", HASH_NAMES)
def test_a_branch_moves_forward_and_never_away_from_what_only_the_target_has(source, hash_name) -> None:
    target = repository(hash_name=hash_name)
    source.push(target, ["main@1:main"])
    assert source.push(target, ["main"]).plan.moves[0].action == "forward"
    theirs = target.save({"theirs": 1})
    source.save(training_state(3), step=3)
    before = files_of(target.handle.backend)
    with pytest.raises(DivergedError) as caught:
        source.push(target, ["main"])
    assert caught.value.found_id == theirs.id
    assert untouched(target, before)
    with pytest.raises(DivergedError):
        source.push(target, ["main"], dry_run=True)
    report = source.push(target, ["main"], force=True)
    assert report.plan.moves[0].action == "force"
    assert_same(target.load("main"), training_state(3))
    assert target.load(theirs.id) == {"theirs": 1}  # an orphan now


@pytest.mark.parametrize("hash_name", HASH_NAMES)
def test_a_branch_is_not_moved_back_by_an_older_copy(source, hash_name) -> None:
    older = open_on(copied(source.handle.backend))
    older.branch("main", at="main~1", move=True)
    target = repository(hash_name=hash_name)
    source.push(target)
    with pytest.raises(DivergedError):
        older.push(target)


@pytest.mark.parametrize("hash_name", HASH_NAMES)
def test_tags_never_move_not_even_by_force(source, hash_name) -> None:
    target = repository(hash_name=hash_name)
    source.push(target)
    before = files_of(target.handle.backend)
    source.delete_tag("kept")
    source.tag("kept", at="main")
    for force in (False, True):
        with pytest.raises(RefExistsError, match="tags never move"):
            source.push(target, force=force)
    assert untouched(target, before)


def test_a_branch_cannot_take_the_name_of_a_tag_nor_a_tag_that_of_a_branch(source) -> None:
    target = repository()
    source.push(target, ["main"])
    for text in ("kept:tags/main", "main:main2", "kept:tags/main2"):
        if text == "main:main2":
            source.push(target, [text])
            continue
        with pytest.raises(RefExistsError, match="already a branch"):
            source.push(target, [text])


def test_history_ends_where_a_parent_is_gone_and_the_plan_says_so(source) -> None:
    gone = source.snapshot("main~1").id
    source.delete_tag("kept")
    source.handle.backend.delete(snapshot_name(gone))
    target = repository()
    report = source.push(target)
    assert report.plan.gaps == (gone,)
    assert [snapshot.step for snapshot in target.log()] == [2]
    assert target.verify(data=True).ok


def test_depth_counts_snapshots_of_each_ref(source) -> None:
    for depth in (1, 2, 3, 9):
        target = repository()
        source.push(target, ["main"], depth=depth)
        assert len(list(target.snapshots())) == min(depth, 3)


def test_a_ref_of_a_snapshot_that_is_gone_is_unknown(source) -> None:
    source.handle.backend.delete(snapshot_name(source.snapshot("main").id))
    with pytest.raises(UnknownRefError, match="gone"):
        source.push(repository(), ["main"])


def test_a_plan_under_another_hash_is_an_upper_bound(source) -> None:
    target = repository(hash_name="blake3")
    planned = source.push(target, dry_run=True).plan
    assert not planned.is_exact
    report = source.push(target)
    leaves = report.sent_chunk_count - len(report.sent)  # parts of manifests come on top
    assert planned.chunk_count >= leaves > 0
