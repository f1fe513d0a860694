"""A full disk costs the save that meets it and nothing else, wherever it is met; and gc makes room on it.

On a small tmpfs where this process is root, with everything that castore writes in it, the index included; and on a
backend with a quota, anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import castore
from castore.api import Repository
from castore.backend import LocalBackend
from castore.errors import NoSpaceError
from castore.options import RepositoryOptions
from castore.repository import make_reserve
from tests.checkpoint.crashes import refs_of
from tests.checkpoint.repositories import create_on, files_of, held_leases, open_on
from tests.checkpoint.states import State, assert_same, training_state
from tests.proof.operations import collect, forget
from tests.proof.small_disk import PAGE_BYTES, QuotaBackend, filled, tmpfs

# The warning before a save that may not fit has tests of its own; here saves go on and meet the wall.
pytestmark = pytest.mark.filterwarnings("ignore::castore.LowSpaceWarning")

DISK_BYTES = 4 * 1024 * 1024


def small(seed: int) -> State:
    return training_state(seed, frozen_bytes=40_000, moving_bytes=60_000)


def fill(repo: Repository) -> dict[str, State]:
    """Eight saves, of which the first five are forgotten; returns the others."""
    states: dict[str, State] = {}
    for seed in range(8):
        state = training_state(seed, frozen_bytes=40_000, moving_bytes=200_000)
        states[repo.save(state, step=seed).id] = state
    old = [snapshot.id for snapshot in repo.log("main")][3:]
    forget(repo, old)
    return {snapshot_id: state for snapshot_id, state in states.items() if snapshot_id not in old}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    try:
        with tmpfs(tmp_path / "disk", DISK_BYTES) as directory:
            yield directory
    except PermissionError as error:
        pytest.skip(f"no small disk: {error}")


def check_refused(repo: Repository, error: NoSpaceError, before: dict[str, str]) -> None:
    """Said clearly, and nothing that counts is left: no ref moved, no lease held, all that was there is whole."""
    assert "free some space" in str(error)
    assert repo.path.name in str(error) or "quota:" in str(error)
    backend = repo.handle.backend
    assert refs_of(backend) == before
    assert held_leases(backend) == []
    if isinstance(backend, LocalBackend):
        assert list(backend.temporaries(modified_before_ns=1 << 62)) == []
    report = repo.verify(data=True)
    assert report.ok, report.problems


def save_with(repo: Repository, states: dict[str, State], seed: int) -> NoSpaceError | None:
    """Save; when the disk is full, check that it is as if nothing had been tried."""
    before = refs_of(repo.handle.backend)
    try:
        states[repo.save(small(seed), step=seed).id] = small(seed)
    except NoSpaceError as error:
        check_refused(repo, error, before)
        return error
    return None


def check_all(repo: Repository, states: dict[str, State]) -> None:
    for snapshot_id, state in states.items():
        assert_same(repo.load(snapshot_id), state)


# ---- a real one ------------------------------------------------------------------------------------------------------


def test_a_save_that_meets_a_full_disk_at_any_page_is_refused_and_the_next_one_works(disk: Path) -> None:
    """With so many pages free, then one more, until it fits: every write of a save is once the first that fails."""
    repo = castore.init(disk / "store")
    states: dict[str, State] = {}
    assert save_with(repo, states, 0) is None
    refusals, places, pages, fits = 0, set(), 0, 0
    while fits < 3:
        with filled(disk, free_bytes=pages * PAGE_BYTES):
            error = save_with(repo, states, 1 + pages)
        if error is not None:
            refusals += 1
            places.add(str(error).split("/store/")[1].split("/")[0].split(":")[0])
        fits = fits + 1 if error is None else 0
        pages += 1
        # Room again: the same handle goes on, and so does a fresh one.
        assert save_with(repo, states, 1000 + pages) is None
        check_all(repo, dict(list(states.items())[-2:]))
        if pages % 8 == 0:
            repo = _with_fewer(disk, repo, states)
    assert refusals > 10, "the disk was never full"
    assert places >= {"leases", "packs", "snapshots", "refs"}, places
    check_all(castore.open(disk / "store"), states)
    repo.close()


def _with_fewer(disk: Path, repo: Repository, states: dict[str, State]) -> Repository:
    """The disk is small: begin anew."""
    import shutil

    repo.close()
    shutil.rmtree(disk / "store")
    states.clear()
    repo = castore.init(disk / "store")
    assert save_with(repo, states, 0) is None
    return repo


def test_gc_frees_on_a_disk_without_a_free_page(disk: Path) -> None:
    with castore.init(disk / "store", lease_s=1.0, orphan_grace_s=0.001) as repo:
        states = fill(repo)
        with filled(disk, free_bytes=0):
            free = repo.handle.backend.free_bytes()
            assert free == 0
            collect(repo)
            assert (repo.handle.backend.free_bytes() or 0) >= 500_000, "gc freed nothing on a full disk"
            check_all(repo, states)
            assert save_with(repo, states, 100) is None, "there is room, and the save does not find it"
        assert repo.verify(data=True).ok
        check_all(repo, states)


# ---- a quota, anywhere -----------------------------------------------------------------------------------------------


def test_a_save_that_meets_a_quota_anywhere_is_refused_and_the_next_one_works() -> None:
    backend = QuotaBackend()
    repo = create_on(backend)
    states: dict[str, State] = {}
    assert save_with(repo, states, 0) is None
    refusals = 0
    for pages in range(60):
        backend.quota_bytes = backend.used_bytes() + pages * PAGE_BYTES
        error = save_with(repo, states, 1 + pages)
        refusals += error is not None
        backend.quota_bytes = None
        assert save_with(repo, states, 1000 + pages) is None
        check_all(open_on(backend), dict(list(states.items())[-2:]))
    assert 10 < refusals < 60
    check_all(repo, states)


@pytest.mark.parametrize("free_pages", [0, 1, 2, 3, 10, 100])
def test_gc_frees_within_a_quota_that_is_used_up(free_pages: int) -> None:
    """Whatever is free: wholly dead packs go first and need no scratch; what it cannot do, it leaves as it was."""
    backend = QuotaBackend()
    repo = create_on(backend, RepositoryOptions(lease_s=1.0, orphan_grace_s=0.001))
    make_reserve(backend)
    states = fill(repo)
    used = backend.used_bytes()
    backend.quota_bytes = used + free_pages * PAGE_BYTES
    collect(repo)
    assert backend.used_bytes() < used - 500_000
    backend.quota_bytes = None
    check_all(repo, states)
    assert repo.verify(data=True).ok
    assert files_of(backend)
