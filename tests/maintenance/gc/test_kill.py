"""Real collectors, killed at random moments, beside real savers: the next collection completes the work."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import castore
from castore.backend import LocalBackend
from castore.errors import LeaseError, NoSpaceError
from tests.checkpoint.killing import Report, fork, forked, until
from tests.checkpoint.states import assert_same

KILLS = 40
LEASE_S = 0.2


def state_of(step: int) -> dict[str, Any]:
    weights = np.random.default_rng(1).standard_normal(20_000).astype(np.float32)
    noise = np.random.default_rng(step).integers(0, 256, 100_000, np.uint8)
    return {"weights": weights * np.float32(1 + 1e-5 * step), "noise": noise, "step": step}


def save_one_more(path: Path) -> None:
    with castore.open(path) as repo:
        step = (repo.snapshot("main").step or 0) + 1
        repo.save(state_of(step), step=step)
        repo.forget(castore.Keep(last=3))


def collect(path: Path, report: Report) -> None:
    with castore.open(path) as repo:
        report("ready")
        while True:
            try:
                found = repo.gc(repack_below=1, wait_s=0)
            except LeaseError:
                report("excluded")
                continue
            report(f"{len(found.snapshots)}")


@pytest.mark.slow
def test_a_killed_collection_is_completed_by_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with castore.init(path, lease_s=LEASE_S, orphan_grace_s=1e-3) as repo:
        repo.save(state_of(1), step=1)
    moments = random.Random(0)
    interrupted = 0
    for _ in range(KILLS):
        for _ in range(3):
            save_one_more(path)
        with forked(lambda report: collect(path, report)) as child:
            assert child.next_line() == "ready"
            time.sleep(moments.uniform(0, 0.15))
            lines = child.kill()
        interrupted += len(lines) < 2
        with castore.open(path) as repo:
            for snapshot in [snapshot for snapshot, _ in zip(repo.log("main"), range(3), strict=False)]:
                assert_same(repo.load(snapshot.id), state_of(snapshot.step or 0))
    assert interrupted, "every one came to its end: the moments are too late"
    time.sleep(2 * LEASE_S)  # temporary files are not too young any more
    with castore.open(path) as repo:
        report = repo.gc(repack_below=1)
        assert report.is_complete, report.pending
        verified = repo.verify(data=True)
        assert verified.ok, verified.problems
        assert len(list(repo.log("main"))) == 3
        assert report.wasted_bytes == 0
        backend = repo.handle.backend
        assert isinstance(backend, LocalBackend)
        assert list(backend.temporaries(modified_before_ns=1 << 62)) == []
        assert [info.name for info in backend.list("gc/")] == ["gc/reserve"]
        assert [info.name for info in backend.list("leases/")] == []
        packs = sum(info.size_bytes for info in backend.list("packs/"))
        assert packs < 1.1 * report.live_bytes + 4096


def test_of_two_collectors_one_goes_on_and_the_other_is_told_which(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with castore.init(path) as repo:
        repo.save(state_of(1), step=1)

        def hold(report: Report) -> None:
            from castore.maintenance.gc.claim import collector_claim
            from castore.maintenance.gc.writers import Watch

            with collector_claim(LocalBackend(path), Watch(lease_s=1), now_ns=1):
                report("holds")
                time.sleep(60)

        child = fork(hold)
        assert child.next_line() == "holds"
        with pytest.raises(LeaseError, match=f"process {child.pid} "):
            repo.gc()
        child.kill()
        until(lambda: repo.gc().is_complete)


# ---- a full disk ---------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB; needs root."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    if subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip("no right to mount a small file system")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.filterwarnings("ignore::castore.LowSpaceWarning")
def test_a_full_disk_is_told_collected_and_used_again(small_disk: Path) -> None:
    path = small_disk / "store"
    noise = np.random.default_rng(0)
    states = [{"noise": noise.integers(0, 256, 1_500_000, np.uint8), "step": step} for step in range(12)]
    with castore.init(path, lease_s=LEASE_S) as repo:
        saved = []
        with pytest.raises(NoSpaceError):
            for step, state in enumerate(states):
                saved.append(repo.save(state, step=step).id)
        assert 2 <= len(saved) <= 5
        filler = small_disk / "filler"
        with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(bytes(4096))
        for step, snapshot_id in enumerate(saved):
            assert_same(repo.load(snapshot_id), states[step])
        filler.unlink()
        repo.forget(castore.Keep(last=1))
        with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(bytes(4096))
        report = repo.gc(wait_s=0)
        assert report.freed_bytes > 1_400_000
        again = repo.save(states[11], step=11)
        assert_same(repo.load(again.id), states[11])
        assert_same(repo.load(saved[-1]), states[len(saved) - 1])
    with castore.open(path) as repo:
        assert repo.verify(data=True).ok


def test_a_save_that_may_not_fit_says_so_before_it_writes(small_disk: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, 20 << 20, np.uint8)
    with castore.init(small_disk / "store") as repo:
        with pytest.warns(castore.LowSpaceWarning, match="may not fit"), pytest.raises(NoSpaceError):
            repo.save({"noise": noise})
        repo.save({"noise": noise[:1000]})
