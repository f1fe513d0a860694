"""SIGKILL of real saving processes at random moments: what was reported durable is there, whatever happened after."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import castore
from castore.backend import LocalBackend
from tests.checkpoint.killing import Report, fork
from tests.checkpoint.repositories import held_leases
from tests.checkpoint.states import assert_same, training_state

KILLS = 220
CHECKED_EVERY = 10


def state_of(step: int) -> dict[str, Any]:
    """Enough to write that a random moment often falls into the middle of a pack."""
    return training_state(step, frozen_bytes=200_000, moving_bytes=800_000)


def save_for_ever(path: Path, report: Report) -> None:
    """A training run that resumes where the branch is."""
    with castore.open(path) as repo:
        step = (repo.snapshot("main").step or 0) + 1 if repo.branches() else 1
        report("ready")
        while True:
            state = state_of(step)
            snapshot = repo.save(state, step=step, tags=(f"step-{step}",) if step % 7 == 0 else ())
            report(f"{snapshot.id} {step}")
            step += 1


@pytest.mark.slow
def test_what_a_killed_process_reported_is_there(tmp_path: Path) -> None:
    path = tmp_path / "store"
    castore.init(path).close()
    np.random.default_rng(0)  # imports, so that no child has to
    moments = random.Random(0)
    durable: dict[str, int] = {}
    cut_short, longest_s = 0, 0.05
    for kill in range(KILLS):
        child = fork(lambda report: save_for_ever(path, report))
        assert child.next_line() == "ready"
        time.sleep(moments.uniform(0, longest_s))
        reported = {snapshot_id: int(step) for snapshot_id, step in map(str.split, child.kill()[1:])}
        durable |= reported
        cut_short += not reported
        # However busy this machine is: about as many die in their first save as in a later one.
        longest_s = max(0.01, longest_s * (0.8 if reported else 1.25))
        with castore.open(path) as repo:
            assert held_leases(repo.handle.backend) == []
            for snapshot_id, step in reported.items():
                assert repo.snapshot(snapshot_id).step == step
            if reported:
                head = repo.snapshot("main")
                last = max(durable.values())
                assert head.step in (last, last + 1), "the branch went back, or on without a save"
                assert_same(repo.load("main"), state_of(head.step or 0))
            if kill % CHECKED_EVERY == 0 and durable:
                chosen = moments.choice(sorted(durable))
                assert_same(repo.load(chosen), state_of(durable[chosen]))
    assert 0.1 * KILLS < cut_short < 0.9 * KILLS
    _check_whole(path, durable)


def _check_whole(path: Path, durable: dict[str, int]) -> None:
    with castore.open(path) as repo:
        history = [snapshot.id for snapshot in repo.log("main")]
        steps = [snapshot.step for snapshot in repo.log("main")]
        assert steps == list(range(len(steps), 0, -1)), "a save is missing in the history"
        assert set(durable) <= set(history)
        report = repo.verify(data=True)
        assert report.ok, report.problems
        assert all(ref.snapshot_id in history for ref in repo.tags())
        # The litter of the dead is known for what it is: no lease is held, and temporary files are never listed.
        backend = repo.handle.backend
        assert isinstance(backend, LocalBackend)
        assert not any(claim.held for claim in backend.claims("leases/"))
        assert list(backend.temporaries(modified_before_ns=1 << 62))
