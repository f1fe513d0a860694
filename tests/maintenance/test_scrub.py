"""Incremental verification: the least recently read first, remembered, and never trusted more than a cache is."""

from __future__ import annotations

from pathlib import Path

import pytest

import castore
from castore.api import Repository
from castore.backend import MemoryBackend
from castore.errors import UsageError
from castore.format.layout import pack_name
from castore.ids import PackId
from castore.maintenance.scrub import SCRUB_MEMORY, LastRead, load_memory, plan_scrub, remember
from castore.maintenance.verify import verify
from tests.checkpoint.damage import damage_leaf, flip_bit, rows_of
from tests.checkpoint.repositories import create_on, files_of, open_on, packs_of
from tests.checkpoint.states import training_state

DAY_S = 24 * 3600.0
A, B, C = (PackId(letter * 32) for letter in "abc")


@pytest.fixture
def repo() -> Repository:
    """Three packs, the later ones with differences."""
    repo = create_on(MemoryBackend())
    for step in (1, 2, 3):
        repo.save(training_state(step), step=step)
    return repo


def read_packs(repo: Repository) -> set[PackId]:
    return set(load_memory(repo.handle.backend))


def test_packs_that_wait_longest_come_first() -> None:
    plan = plan_scrub([A, B, C], {A: LastRead(50), C: LastRead(20)}, now_ns=100, max_age_s=None)
    assert plan.order == (B, C, A)
    assert plan.recent == ()


def test_packs_that_were_read_within_the_age_are_left_out() -> None:
    plan = plan_scrub([A, B, C], {A: LastRead(90), B: LastRead(10)}, now_ns=100, max_age_s=40e-9)
    assert (plan.order, plan.recent) == ((C, B), (A,))


def test_a_damaged_pack_waits_its_turn_and_is_never_left_out() -> None:
    memory = {A: LastRead(90, was_damaged=True), B: LastRead(95), C: LastRead(80)}
    assert plan_scrub([A, B, C], memory, now_ns=100, max_age_s=None).order == (C, A, B)
    plan = plan_scrub([A, B, C], memory, now_ns=100, max_age_s=40e-9)
    assert (plan.order, plan.recent) == ((A,), (C, B))


def test_a_damaged_pack_keeps_no_other_from_being_read_and_stays_told(repo: Repository) -> None:
    clock = iter(range(10**9, 10**10))
    repo.handle.clock = lambda: next(clock)
    first = min(packs_of(repo))
    flip_bit(repo.handle.backend, pack_name(first), rows_of(repo, first)[0].offset)
    for count in (1, 2, 3, 3, 3):
        report = repo.verify(max_duration=1e-9)
        assert report.scrub.read_count == 1
        assert len(read_packs(repo)) == count
        assert {problem.where for problem in report.problems} == {pack_name(first)}
    memory = load_memory(repo.handle.backend)
    assert [pack_id for pack_id in memory if memory[pack_id].was_damaged] == [first]
    times = sorted(last.time_ns for last in memory.values())
    assert memory[first].time_ns == times[1], "read by the first run and the fourth, before the one of the fifth"


def test_a_pack_that_cannot_be_opened_keeps_no_other_from_being_read(tmp_path: Path) -> None:
    with castore.init(tmp_path / "store") as repo:
        for step in (1, 2):
            repo.save(training_state(step), step=step)
        first, second = sorted(packs_of(repo))
        path = tmp_path / "store" / pack_name(first)
        path.rename(tmp_path / "aside")
        path.mkdir()
        for _ in range(2):
            assert not repo.verify(max_duration=1e-9).ok
        assert load_memory(repo.handle.backend)[second].was_damaged is False


def test_a_record_that_only_lost_its_base_is_as_it_was_written(repo: Repository) -> None:
    """In data that nobody needs it is a note, and its pack is not read over and over."""
    first, *later = sorted(packs_of(repo), key=lambda pack_id: max(row.depth for row in rows_of(repo, pack_id)))
    repo.handle.backend.delete(pack_name(first))
    fresh = open_on(repo.handle.backend)
    fresh.verify(max_duration="1h")
    memory = load_memory(repo.handle.backend)
    assert {pack_id: memory[pack_id].was_damaged for pack_id in later} == dict.fromkeys(later, False)
    assert fresh.verify(max_age="30d").scrub.recent_count == len(later)


def test_slices_of_no_time_come_round_one_pack_a_run(repo: Repository) -> None:
    packs = packs_of(repo)
    assert len(packs) == 3
    for count in (1, 2, 3):
        report = repo.verify(max_duration=1e-9)
        assert report.ok
        assert report.scrub.read_count == 1
        assert report.scrub.pending_count == 2
        assert len(read_packs(repo)) == count
        assert (report.scrub.oldest_ns is None) is (count < 3)
    assert read_packs(repo) == packs


def test_a_whole_verification_is_remembered_too(repo: Repository) -> None:
    assert repo.verify(data=True).scrub is None
    report = repo.verify(max_age="30d")
    assert (report.scrub.read_count, report.scrub.recent_count) == (0, 3)
    assert report.checked_bytes == 0
    assert report.with_data


def test_what_is_old_enough_is_read_again(repo: Repository) -> None:
    repo.verify(data=True)
    now_ns = repo.handle.clock()
    repo.handle.clock = lambda: now_ns + int(31 * DAY_S * 1e9)
    assert repo.verify(max_age="30d").scrub.read_count == 3
    assert repo.verify(max_age="30d").scrub.read_count == 0


@pytest.mark.parametrize("leaf", ["model/frozen", "model/drifting"])
def test_a_scrub_finds_what_a_whole_verification_finds(repo: Repository, leaf: str) -> None:
    damage_leaf(repo, "main~1", leaf)
    whole = open_on(repo.handle.backend).verify(data=True)
    report = open_on(repo.handle.backend).verify(max_age="1s", max_duration="1h")
    assert not report.ok
    assert report.damaged_snapshots == whole.damaged_snapshots
    assert {problem.kind for problem in report.problems} == {problem.kind for problem in whole.problems}
    again = open_on(repo.handle.backend).verify(max_age="30d")
    assert not again.ok, "a damaged pack is not remembered as read"
    assert again.scrub.read_count >= 1


def test_gaps_and_headers_are_read_too(repo: Repository) -> None:
    pack_id = min(packs_of(repo))
    row = rows_of(repo, pack_id)[0]
    flip_bit(repo.handle.backend, pack_name(pack_id), row.offset - 10)
    (problem,) = repo.verify(max_duration="1h").problems
    assert (problem.kind, problem.where, problem.offset) == ("record", pack_name(pack_id), row.offset)
    assert problem.chunks == (row.chunk_id,)


@pytest.mark.parametrize("rubbish", [b"", b"CASTSCR2", b"x" * 100, b"CASTSCR2" + bytes(25 + 8)])
def test_a_damaged_memory_costs_nothing_but_reading_again(repo: Repository, rubbish: bytes) -> None:
    repo.verify(data=True)
    repo.handle.backend.delete(SCRUB_MEMORY)
    repo.handle.backend.put_if_absent(SCRUB_MEMORY, rubbish)
    assert load_memory(repo.handle.backend) == {}
    assert repo.verify(max_age="30d").scrub.read_count == 3
    assert repo.verify(max_age="30d").scrub.read_count == 0


def test_packs_that_are_gone_are_forgotten() -> None:
    backend = MemoryBackend()
    remember(backend, whole=[A, B], damaged=[], there=[A, B], now_ns=7)
    assert load_memory(backend) == {A: LastRead(7), B: LastRead(7)}
    remember(backend, whole=[C], damaged=[B], there=[B, C], now_ns=9)
    assert load_memory(backend) == {B: LastRead(9, was_damaged=True), C: LastRead(9)}


def test_progress_counts_the_packs_that_are_due(repo: Repository) -> None:
    seen: list[tuple[int, int]] = []
    repo.verify(max_duration="1h", progress=lambda done, total: seen.append((done, total)))
    total = sum(info.size_bytes for info in repo.handle.backend.list("packs/"))
    assert seen[-1] == (total, total)


def test_durations_that_are_none_are_refused(repo: Repository) -> None:
    with pytest.raises(UsageError, match="expected a duration"):
        repo.verify(max_age="soon")
    with pytest.raises(UsageError, match="max_age_s"):
        verify(repo.handle, max_age_s=-1)


def test_the_memory_is_no_part_of_the_repository(repo: Repository) -> None:
    before = files_of(repo.handle.backend)
    repo.verify(data=True)
    assert files_of(repo.handle.backend) == before
