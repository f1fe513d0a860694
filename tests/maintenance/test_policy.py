"""A stored policy is applied after every n-th save, whoever makes it, and costs a look at one file otherwise."""

from __future__ import annotations

import itertools
import json
import warnings
from datetime import timedelta

import pytest

import castore
from castore.api import Repository
from castore.backend import MemoryBackend
from castore.errors import DamageError, PolicyWarning, ThinnedError, UsageError
from castore.format.layout import POLICY, POLICY_APPLIED
from castore.maintenance.policy import PolicyCounter
from castore.options import RepositoryOptions
from tests.checkpoint.repositories import HookedBackend, create_on, open_on


@pytest.fixture
def backend() -> MemoryBackend:
    ticks = itertools.count(1)
    return MemoryBackend(now_ns=lambda: next(ticks))


@pytest.fixture
def repository(backend: MemoryBackend) -> Repository:
    return create_on(backend, RepositoryOptions(compression="none"))


def save(repository: Repository, step: int) -> None:
    repository.save({"model": [step], "optimizer": [step, step]}, step=step)


def steps(repository: Repository) -> list[int | None]:
    return [snapshot.step for snapshot in repository.log()]


def test_a_policy_comes_back_as_it_was_stored(repository: Repository) -> None:
    assert repository.policy() is None
    keep = castore.Keep(last=3, within="7d", best=("loss", "min", 2))
    stored = repository.set_policy(keep, thin=["optimizer/**"], older_than=timedelta(days=1), every_saves=5)
    assert repository.policy() == stored
    assert (stored.keep, stored.thin, stored.older_than, stored.every_saves) == (keep, ("optimizer/**",), "86400s", 5)
    assert json.loads(json.dumps(stored.to_json()))["thin"]["older_than"] == "86400s"
    again = repository.set_policy(castore.Keep(last=1))
    assert repository.policy() == again
    assert repository.clear_policy()
    assert not repository.clear_policy()
    assert repository.policy() is None
    assert repository.apply_policy() is None


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"thin": ["optimizer"]},
        {"older_than": 3},
        {"thin": ["optimizer"], "older_than": 0},
        {"thin": "optimizer", "older_than": 3},
        {"keep": castore.Keep(last=1), "every_saves": 0},
    ],
)
def test_a_policy_that_does_nothing_is_refused(repository: Repository, arguments) -> None:
    with pytest.raises(UsageError):
        repository.set_policy(**arguments)
    assert repository.policy() is None


def test_applying_it_forgets_and_thins(repository: Repository) -> None:
    for step in range(6):
        save(repository, step)
    repository.set_policy(castore.Keep(last=4), thin=["optimizer"], older_than=2)
    plan = repository.apply_policy(dry_run=True)
    assert steps(repository) == [5, 4, 3, 2, 1, 0]
    done = repository.apply_policy()
    assert plan is not None
    assert done is not None
    assert plan.forget is not None
    assert done.forget is not None
    assert plan.forget.dropped == done.forget.dropped
    assert plan.thin is not None
    assert done.thin is not None
    assert [choice.step for choice in plan.thin.thinned] == [choice.step for choice in done.thin.thinned] == [3, 2]
    assert steps(repository) == [5, 4, 3, 2]
    with pytest.raises(ThinnedError):
        repository.load("main~2")


def test_every_nth_save_applies_it(repository: Repository) -> None:
    repository.set_policy(castore.Keep(last=1), every_saves=3)
    seen = []
    for step in range(8):
        save(repository, step)
        seen.append(steps(repository))
    assert seen == [[0], [1, 0], [2], [3, 2], [4, 3, 2], [5], [6, 5], [7, 6, 5]]


def test_saves_of_all_handles_and_of_background_threads_count_together(backend: MemoryBackend) -> None:
    first = create_on(backend, RepositoryOptions(compression="none"))
    first.set_policy(castore.Keep(last=1), every_saves=4)
    for step in range(3):
        handle = open_on(backend)
        handle.save_async({"x": step}, step=step).result()
    assert steps(first) == [2, 1, 0]
    open_on(backend).save({"x": 3}, step=3)
    assert steps(first) == [3]


def test_a_policy_that_is_changed_or_cleared_counts_anew(repository: Repository) -> None:
    repository.set_policy(castore.Keep(last=1), every_saves=2)
    save(repository, 0)
    repository.set_policy(castore.Keep(last=1), every_saves=3)
    save(repository, 1)
    save(repository, 2)
    assert steps(repository) == [2, 1, 0]
    repository.clear_policy()
    save(repository, 3)
    assert steps(repository) == [3, 2, 1, 0]
    repository.set_policy(castore.Keep(last=1))
    save(repository, 4)
    assert steps(repository) == [4, 3, 2, 1, 0], "without every_saves only when asked for"


def test_a_save_that_is_not_due_looks_at_one_file(backend: MemoryBackend, repository: Repository) -> None:
    repository.set_policy(castore.Keep(last=1), every_saves=100)
    counter = PolicyCounter()
    assert not counter.is_due(backend)
    hooked = HookedBackend(backend)
    for _ in range(50):
        assert not counter.is_due(hooked)
    assert set(hooked.calls) == {("stat", POLICY)}


def test_without_a_policy_a_save_costs_one_look_more(backend: MemoryBackend, repository: Repository) -> None:
    hooked = HookedBackend(backend)
    save(open_on(hooked), 1)
    assert [call for call in hooked.calls if "policy" in call[1]] == [("stat", POLICY)]


def test_a_policy_that_cannot_be_applied_warns_and_the_save_is_durable(
    backend: MemoryBackend, repository: Repository
) -> None:
    repository.set_policy(castore.Keep(last=1), every_saves=1)
    save(repository, 0)
    data = backend.read(POLICY, max_bytes=4096)
    backend.compare_and_swap(POLICY, expected=data, new=data[:-2])
    with pytest.warns(PolicyWarning, match="the save is durable"):
        save(repository, 1)
    assert steps(repository) == [1, 0]
    with pytest.raises(DamageError, match="policy"):
        repository.policy()
    assert repository.clear_policy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(repository, 2)


@pytest.mark.parametrize(
    "fields",
    [{}, {"keep": {}}, {"keep": {"last": -1}}, {"thin": {"globs": ["x"]}}, {"keep": 3}, {"thin": 3}],
)
def test_a_policy_file_that_is_none_is_damage(backend: MemoryBackend, repository: Repository, fields) -> None:
    from castore.format.textfile import encode_text_file

    backend.put_if_absent(POLICY, encode_text_file(fields))
    with pytest.raises(DamageError, match="policy"):
        repository.policy()


def test_what_it_did_last_is_written_down_before_it_is_done(backend: MemoryBackend, repository: Repository) -> None:
    """Of several writers who find it due at once, one does the work."""
    repository.set_policy(castore.Keep(last=1), every_saves=1)
    save(repository, 0)
    before = backend.stat(POLICY_APPLIED)
    save(repository, 1)
    after = backend.stat(POLICY_APPLIED)
    assert before is not None
    assert after is not None
    assert after.modified_ns > before.modified_ns
