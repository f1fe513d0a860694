"""Real processes, SIGKILL and SIGSTOP at random: nothing reported is lost, and what is dead is freed (see storm.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.proof.effort import effort
from tests.proof.storm import run

SECONDS = effort(60, 300)


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 600)
def test_a_storm_of_savers_collectors_and_signals_loses_nothing_and_frees_bytes(tmp_path: Path) -> None:
    figures = run(tmp_path, seconds=SECONDS, seed=20260101)
    assert figures["of these not forgotten"] >= 20
    assert figures["snapshots reported"] > figures["of these not forgotten"]
    assert figures["collections"] >= 5
    assert figures["kills"] >= 10
    assert figures["stops"] >= 10
    assert figures["bytes freed meanwhile"] > 1_000_000
    assert figures["bytes after it"] <= figures["bytes before the last gc"]
