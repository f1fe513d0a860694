"""load_latest_valid: the newest snapshot that loads whole, and what was passed over, said loudly."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from castore.api import Repository
from castore.backend import MemoryBackend
from castore.errors import (
    NoValidSnapshotError,
    SkippedSnapshotWarning,
    StateMismatchError,
    UnknownRefError,
)
from castore.format.layout import branch_name, snapshot_name
from tests.checkpoint.damage import damage_leaf, replace_file
from tests.checkpoint.repositories import create_on, open_on
from tests.checkpoint.states import assert_same, training_state


@pytest.fixture
def repo() -> Repository:
    repo = create_on(MemoryBackend())
    for step in (1, 2, 3):
        repo.save(training_state(step), step=step)
    return repo


def rot(repo: Repository, ref: str) -> str:
    """Damage what only this snapshot has; its id."""
    snapshot_id = repo.snapshot(ref).id
    damage_leaf(repo, ref, "model/moving")
    return snapshot_id


def test_a_whole_head_is_loaded_without_a_word(repo: Repository) -> None:
    found = repo.load_latest_valid()
    assert_same(found.state, training_state(3))
    assert (found.snapshot.step, found.skipped) == (3, ())


def test_damaged_snapshots_are_passed_over_loudly(repo: Repository, caplog: pytest.LogCaptureFixture) -> None:
    ids = [rot(repo, "main"), rot(repo, "main~1")]
    fresh = open_on(repo.handle.backend)
    with caplog.at_level(logging.WARNING, logger="castore"), pytest.warns(SkippedSnapshotWarning) as caught:
        found = fresh.load_latest_valid("main")
    assert_same(found.state, training_state(1))
    assert found.snapshot.step == 1
    assert [name for name, _ in found.skipped] == ids
    assert all("model/moving" in why for _, why in found.skipped)
    assert len(caught) == len(caplog.records) == 2
    assert all(warning.filename == __file__ for warning in caught)


def test_history_goes_on_from_what_was_loaded(repo: Repository) -> None:
    rot(repo, "main")
    fresh = open_on(repo.handle.backend)
    with pytest.warns(SkippedSnapshotWarning):
        found = fresh.load_latest_valid()
    saved = fresh.save(training_state(4), step=4, parent=found.snapshot)
    assert saved.parents == (found.snapshot.id,)
    assert fresh.load_latest_valid().snapshot.id == saved.id


@pytest.mark.parametrize("damage", [b"rubbish", None])
def test_a_head_without_a_readable_file_leads_to_the_branch_by_name(repo: Repository, damage: bytes | None) -> None:
    repo.save(training_state(9), branch="other", step=9)
    head = snapshot_name(repo.snapshot("main").id)
    if damage is None:
        repo.handle.backend.delete(head)
    else:
        replace_file(repo.handle.backend, head, damage)
    with pytest.warns(SkippedSnapshotWarning):
        found = open_on(repo.handle.backend).load_latest_valid("main")
    assert found.snapshot.step == 2
    assert_same(found.state, training_state(2))


def test_a_damaged_branch_file_does_too(repo: Repository) -> None:
    replace_file(repo.handle.backend, branch_name("main"), b"rubbish")
    with pytest.warns(SkippedSnapshotWarning):
        found = open_on(repo.handle.backend).load_latest_valid("main")
    assert found.snapshot.step == 3


def test_live_memory_is_touched_only_by_what_proved_whole(repo: Repository) -> None:
    rot(repo, "main")
    live = training_state(1)
    for value in live["model"].values():
        value[...] = 0
    with pytest.warns(SkippedSnapshotWarning):
        found = open_on(repo.handle.backend).load_latest_valid(into=live)
    assert found.snapshot.step == 2
    assert_same(live["model"], training_state(2)["model"])
    for ref in ("main~1", "main~2"):
        rot(repo, ref)
    for value in live["model"].values():
        value[...] = 0
    with pytest.raises(NoValidSnapshotError) as caught:
        open_on(repo.handle.backend).load_latest_valid(into=live)
    assert not any(np.any(value) for value in live["model"].values())
    assert len(caught.value.skipped) == 3


def test_the_rest_of_a_damaged_snapshot_may_be_all_that_is_asked_for(repo: Repository) -> None:
    rot(repo, "main")
    found = open_on(repo.handle.backend).load_latest_valid(paths=["optimizer/**"])
    assert (found.snapshot.step, found.skipped) == (3, ())


def test_what_is_wrong_with_the_call_is_raised(repo: Repository) -> None:
    with pytest.raises(UnknownRefError):
        repo.load_latest_valid("nothing")
    with pytest.raises(StateMismatchError):
        repo.load_latest_valid(into={"another": np.zeros(3)})
