"""Savers, makers of refs, collectors and readers in every order: nothing that was reported is ever not whole.

Each scenario (scenarios.py) runs under every schedule with one turn, a seeded sample of those with three, of which one
may be a death, and random walks. `far` actors are on another host: who waits for them sees their lease expire.

A failure prints its schedule; `SCENARIOS[name].run(following(schedule))` runs it again.
"""

from __future__ import annotations

import pytest

from tests.proof.effort import effort
from tests.proof.scenarios import SCENARIOS
from tests.proof.scheduler import explore, wander


@pytest.mark.slow
@pytest.mark.timeout(effort(600, 7200))
@pytest.mark.parametrize("name", SCENARIOS)
def test_nothing_is_lost_whoever_goes_on(name: str) -> None:
    run = SCENARIOS[name].run
    assert explore(run, turns_max=1, kills_max=effort(0, 1)) > 5
    explore(run, turns_max=3, kills_max=1, runs_max=effort(20, 1500), seed=1)
    wander(run, seeds=range(effort(10, 600)), turn_chance=0.15, kill_chance=0.003)
