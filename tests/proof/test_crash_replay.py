"""A crash at any file-system operation, with anything lost that was not synced, costs nothing that was reported.

The operations of a story are recorded once; then every prefix of them is replayed with every choice of what was lost
where that is little enough to enumerate, else with a seeded sample (journal.py says what may be lost). Each disk must
open without repair, load every snapshot that was reported and not forgotten, let gc run, and verify clean after it.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

import castore
from castore.errors import CastoreError
from tests.checkpoint.killing import Report, fork
from tests.checkpoint.states import assert_same
from tests.proof.crash_story import CHAPTERS, STORE, Examiner, Promise, Story, files_of_repository, moments
from tests.proof.effort import effort
from tests.proof.journal import KILLED, ROOT, Disk, Enter, IndexCommit, Operation, Outcome, Sync

SEED = 20260101
STATES = effort(400, 12_000)
DIRECTORIES = effort(20, 400)
WORKERS = effort(1, 2)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    told = Story(tmp_path_factory.mktemp("story"), keeps_caches=True)
    told.tell(CHAPTERS)
    return told


@dataclass(frozen=True)
class Left:
    """One disk that a crash can leave."""

    length: int
    """Operations before the crash."""
    outcome: Outcome
    indexes: Mapping[str, IndexCommit | None]
    """What is left of the index of each repository."""
    before: Promise
    after: Promise

    def __str__(self) -> str:
        variants = {node: variant for node, variant in self.outcome.variants.items() if variant != "whole"}
        indexes = {name: None if left is None else len(left.packs) for name, left in self.indexes.items()}
        return (
            f"crash after {self.length} operations, in {self.after.doing!r}; lost names {sorted(self.outcome.lost)}, "
            f"bytes {variants}, packs in the indexes {indexes}"
        )


def crashes(journal: Sequence[Operation], *, exhaustive_max: int, random_count: int) -> Iterator[Left]:
    """Every disk to look at, each different from all before in some byte, with an index that fits or does not."""
    rng = random.Random(SEED)
    disk, applied, seen = Disk(), 0, set()
    for length, before, after in moments(journal):
        while applied < length:
            disk.apply(journal[applied])
            applied += 1
        for outcome in disk.outcomes(rng, exhaustive_max=exhaustive_max, random_count=random_count):
            files = disk.survivors(outcome)
            shape = frozenset((name, hash(data)) for name, data in files.items())
            if shape not in seen:
                seen.add(shape)
                indexes = {
                    name: rng.choice([None, *commits[:1], *commits[-2:]]) for name, commits in disk.indexes.items()
                }
                yield Left(length, outcome, indexes, before, after)


def disks(journal: Sequence[Operation], chosen: Sequence[Left]) -> Iterator[tuple[Left, dict[str, bytes]]]:
    """The files of each, in order of the crash."""
    disk, applied = Disk(), 0
    for left in chosen:
        while applied < left.length:
            disk.apply(journal[applied])
            applied += 1
        yield left, disk.survivors(left.outcome)


def examine_all(story: Story, chosen: Sequence[Left]) -> list[str]:
    """What does not hold, of each disk where something does not."""
    examiner = Examiner(story.states)
    broken = []
    for number, (left, files) in enumerate(disks(story.recorder.journal, chosen)):
        try:
            examiner.examine(files, left.indexes, left.before, left.after, saves=number % 10 == 0)
        except (AssertionError, CastoreError) as error:
            broken.append(f"{left}: {type(error).__name__}: {error}")
    return broken


def examine_beside(story: Story, chosen: Sequence[Left]) -> list[str]:
    """The same by several processes."""

    def work(share: Sequence[Left], report: Report) -> None:
        for line in examine_all(story, share):
            report(line.replace("\n", " ")[:2000])

    shares = [chosen[worker::WORKERS] for worker in range(WORKERS)]
    children = [fork(lambda report, share=share: work(share, report)) for share in shares]
    return [line for child in children for line in child.wait()]


def sampled(found: Sequence[Left], count: int) -> list[Left]:
    """Of every operation of the story the same number of disks, as far as it has so many; in order."""
    rng = random.Random(SEED)
    by_chapter: dict[str, list[Left]] = {}
    for left in found:
        by_chapter.setdefault(left.after.doing, []).append(left)
    chosen: list[Left] = []
    for done, lefts in enumerate(sorted(by_chapter.values(), key=len)):
        share = (count - len(chosen)) // (len(by_chapter) - done)
        chosen += rng.sample(lefts, min(share, len(lefts)))
    return sorted(chosen, key=lambda left: left.length)


@pytest.mark.slow
@pytest.mark.timeout(effort(600, 7200))
def test_no_crash_at_any_system_call_costs_anything_that_was_reported(
    story: Story, record_testsuite_property: Callable[[str, object], None]
) -> None:
    found = list(crashes(story.recorder.journal, exhaustive_max=effort(64, 512), random_count=effort(4, 40)))
    assert {left.after.doing for left in found} == set(CHAPTERS), "an operation left no trace"
    assert len(found) > STATES
    chosen = sampled(found, STATES)
    assert len(chosen) == STATES
    broken = examine_beside(story, chosen) if WORKERS > 1 else examine_all(story, chosen)
    assert not broken, f"{len(broken)} of {len(chosen)} disks are broken, the first: {broken[0]}"
    record_testsuite_property("crash_states", len(chosen))


@pytest.mark.parametrize("kind", ["files", "directories"])
def test_a_program_that_skips_its_syncs_is_found_out(story: Story, kind: str) -> None:
    """The same replay of a program without the one or the other: it shows what it would cost."""
    journal = story.recorder.journal
    begin = journal[: next(at for at, found in enumerate(journal) if isinstance(found, IndexCommit)) + 40]
    directories = {ROOT} | {found.node for found in begin if isinstance(found, Enter) and found.is_directory}
    skipped = [
        found
        for found in begin
        if not isinstance(found, Sync) or (found.node in directories) != (kind == "directories")
    ]
    assert len(skipped) < len(begin)
    found = [left for left in crashes(skipped, exhaustive_max=0, random_count=2) if left.outcome != KILLED]
    mutant = replace_journal(story, skipped)
    rng = random.Random(SEED)
    assert any(examine_all(mutant, [left]) for left in rng.sample(found, 40))


def replace_journal(story: Story, journal: list[Operation]) -> Story:
    """The same story as told by another program."""
    mutant = copy.copy(story)
    mutant.recorder = copy.copy(story.recorder)
    mutant.recorder.journal = journal
    return mutant


@pytest.mark.slow
def test_a_directory_left_by_a_crash_opens_with_whatever_became_of_its_cache(story: Story, tmp_path: Path) -> None:
    """The same with real files and LMDB: the cache as of some commit, torn, or gone."""
    rng = random.Random(SEED)
    found = list(crashes(story.recorder.journal, exhaustive_max=16, random_count=2))
    sound = [left for left in found if not left.before.owed[STORE].rotten | left.after.owed[STORE].rotten]
    chosen = sorted(rng.sample(sound, DIRECTORIES), key=lambda left: left.length)
    for number, (left, files) in enumerate(disks(story.recorder.journal, chosen)):
        commit = left.indexes.get(STORE)
        cache = dict(commit.files) if commit else {}
        if number % 3 == 0:
            cache = {name: data[: len(data) // 2] + bytes(len(data) - len(data) // 2) for name, data in cache.items()}
        directory = tmp_path / str(number)
        for name, data in (files_of_repository(files, STORE) | cache).items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        with castore.open(directory) as repo:
            for snapshot_id in left.before.owed[STORE].whole & left.after.owed[STORE].whole:
                assert_same(repo.load(snapshot_id), story.states[snapshot_id])
            repo.gc()
            snapshot = repo.save(story.states[next(iter(story.states))], branch="next")
            report = repo.verify(data=True)
            assert report.ok, f"{left}: {report.problems}"
            assert repo.load(snapshot.id)


def test_the_journal_misses_nothing_that_is_on_the_disk(story: Story) -> None:
    """Replayed to its end with nothing lost, it gives the directory as it is."""
    disk = Disk()
    for operation in story.recorder.journal:
        disk.apply(operation)
    base = story.recorder.base
    there = {
        str(path.relative_to(base)): path.read_bytes()
        for path in base.rglob("*")
        if path.is_file() and "cache" not in path.parts
    }
    assert disk.survivors(KILLED) == there
    # And what was reported last is certain: nothing that is lost can take it back.
    certain = disk.survivors(Outcome(frozenset(disk.pending_entries()), dict.fromkeys(disk.dirty_files(), "lost")))
    expected = {name: data for name, data in there.items() if "/." not in name and "/leases/" not in name}
    assert {name: data for name, data in certain.items() if name in expected} == expected
