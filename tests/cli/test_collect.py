"""`castore gc`: what it says, in text and as JSON."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import castore
from castore.backend import LocalBackend
from castore.format.layout import new_collector_name, snapshot_name
from castore.leases import claim_text, writer_lease


def noise(step: int) -> dict[str, Any]:
    return {"noise": np.random.default_rng(step).integers(0, 256, 50_000, np.uint8), "step": step}


@pytest.fixture
def lossy(tmp_path: Path) -> Path:
    """Four snapshots, of which the first two were forgotten."""
    path = tmp_path / "lossy"
    with castore.init(path, lease_s=1.0) as repo:
        for step in range(4):
            repo.save(noise(step), step=step)
        repo.forget(castore.Keep(last=2))
    return path


def test_a_dry_run_says_what_goes_and_takes_nothing(castore_command: Any, lossy: Path) -> None:
    shown = castore_command("-R", lossy, "gc", "--dry-run")
    assert shown.code == 0
    assert [line.split()[:3] for line in shown.lines[:2]] == [["would", "remove", "snapshot"]] * 2
    assert shown.lines[2].startswith("would free ")
    assert castore_command("-R", lossy, "gc", "-n").out == shown.out


def test_a_collection_ends_with_an_account(castore_command: Any, lossy: Path) -> None:
    shown = castore_command("-R", lossy, "gc")
    assert shown.code == 0
    assert sum(line.startswith("removed snapshot ") for line in shown.lines) == 2
    (freed,) = [line for line in shown.lines if line.startswith("freed ")]
    assert "2 packs deleted" in freed
    assert "in packs: 2 snapshots" in shown.lines[-1]
    assert castore_command("-R", lossy, "gc").lines[0].startswith("freed 0 B")
    assert castore_command("-R", lossy, "verify", "--data").code == 0


def test_the_account_as_json(castore_command: Any, lossy: Path) -> None:
    found = castore_command("-R", lossy, "gc", "--json").json
    assert (found["dry_run"], found["is_complete"], found["pending"]) == (False, True, [])
    assert len(found["snapshots"]) == 2
    assert found["freed_bytes"] > 100_000
    assert found["total_bytes"] < 110_000


def test_what_a_running_save_holds_up_is_listed_with_its_process(castore_command: Any, lossy: Path) -> None:
    with writer_lease(LocalBackend(lossy), purpose="save", now_ns=1 << 62):
        shown = castore_command("-R", lossy, "gc", "--wait", "0")
        assert shown.code == 0
        (pending,) = [line for line in shown.lines if line.startswith("pending ")]
        assert f"pid {os.getpid()}" in pending
        found = castore_command("-R", lossy, "gc", "--wait", "0", "--json").json
        assert [(one["kind"], one["pid"]) for one in found["pending"]] == [("writer", os.getpid())]
        assert not found["is_complete"]
    assert castore_command("-R", lossy, "gc", "--json").json["is_complete"]


def test_a_second_collector_is_a_conflict(castore_command: Any, lossy: Path) -> None:
    claim = LocalBackend(lossy).claim(new_collector_name(), claim_text("gc", 1))
    shown = castore_command("-R", lossy, "gc")
    assert shown.code == 5
    assert f"process {os.getpid()}" in shown.err
    claim.release()


def test_an_unreadable_snapshot_is_damage_and_named(castore_command: Any, lossy: Path) -> None:
    with castore.open(lossy) as repo:
        victim = repo.snapshot("main~1").id
    (lossy / snapshot_name(victim)).write_bytes(b"torn")
    shown = castore_command("-R", lossy, "gc")
    assert shown.code == 3
    assert victim in shown.err
    assert "castore forget" in shown.err


def test_a_size_that_cannot_be_reached_is_told(castore_command: Any, lossy: Path) -> None:
    shown = castore_command("-R", lossy, "gc", "--target-bytes", "1000")
    assert shown.code == 0
    assert any("cannot be reached" in line for line in shown.lines)


@pytest.mark.parametrize(
    "arguments", [["--repack-below", "2"], ["--wait", "-1"], ["--max-repack-bytes", "x"], ["--target-bytes", "-1"]]
)
def test_numbers_that_make_no_sense_are_wrong_usage(castore_command: Any, lossy: Path, arguments: list[str]) -> None:
    assert castore_command("-R", lossy, "gc", *arguments).code == 2
