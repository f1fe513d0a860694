"""The histories that bench/gc_scale.py makes are real to castore, which opens, lists and collects them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import castore
from bench.gc_scale import PROMISED, Case, Found, measure, sentences, table


@pytest.mark.parametrize("pattern", ["clustered", "scattered"])
def test_a_small_history_is_built_and_half_of_it_collected(tmp_path: Path, pattern: str) -> None:
    case = Case(pattern, snapshots=8, chunks=300)
    found = measure(case, tmp_path / "store")
    assert found.snapshots_removed == found.snapshots_left == 4
    assert found.chunks >= 300 + 7 * 3
    assert found.ledger_bytes > 0
    assert f"| {pattern} | 8 of 300 | {found.chunks} |" in table([found])
    with castore.open(tmp_path / "store") as repo:
        assert [snapshot.step for snapshot in repo.log("main")] == [7, 5, 3, 1]


def test_the_text_says_what_was_missed_and_how_time_grows() -> None:
    row = Found(
        PROMISED, index_s=1, mark_s=70, mark_cpu_s=20, collect_s=50, collect_cpu_s=30, chunks=1000, ledger_bytes=60_000,
        peak_bytes=400 << 20, snapshots_removed=5000, snapshots_left=5000,
    )  # fmt: skip
    less = replace(row, case=Case("scattered", 1000, 10_000), mark_s=10, mark_cpu_s=5, collect_s=4, collect_cpu_s=2)
    more = replace(row, case=Case("scattered", 2000, 10_000), mark_s=25, mark_cpu_s=10, collect_s=8, collect_cpu_s=4)
    text = sentences([row, more, less])
    assert "**missed** by wall time (70.0 s" in text
    assert "kept by processor time (30.0 s)" in text
    assert "kept in memory (400 MiB)" in text
    assert "1000 → 2000 snapshots (2.0x): mark 2.5x by wall time and 2.0x by processor time; collect 2.0x" in text
    assert "not measured" in sentences([less, more])
