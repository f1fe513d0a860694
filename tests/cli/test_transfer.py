"""`castore push` and `castore pull`."""

from __future__ import annotations

from pathlib import Path

import pytest

import castore


@pytest.fixture
def other(tmp_path: Path) -> Path:
    castore.init(tmp_path / "other").close()
    return tmp_path / "other"


def test_push_sends_everything_and_says_what_became_of_each_ref(run, castore_command, other: Path) -> None:
    shown = run("push", other)
    assert shown.code == 0
    assert any(line.split()[0] == "heads/main" and line.endswith("new") for line in shown.lines)
    assert shown.lines[-1].startswith("sent 4 snapshots, ")
    assert castore_command("-R", other, "verify", "--data").code == 0
    again = run("push", other)
    assert again.lines[-1].startswith("sent 0 snapshots, 0 chunks")
    assert all(line.endswith("up to date") for line in again.lines[1:-1])


def test_a_dry_run_tells_and_sends_nothing(run, castore_command, other: Path) -> None:
    shown = run("push", other, "main", "--depth", 1, "--dry-run")
    assert shown.code == 0
    assert shown.lines[-1].startswith("would send 1 snapshot, ")
    assert castore_command("-R", other, "log", "--all").out.strip() in ("", "no snapshots")
    document = run("push", other, "main", "--depth", 1, "--dry-run", "--json").json
    assert document["dry_run"]
    assert len(document["plan"]["missing"]) == 1
    assert document["plan"]["is_exact"]


def test_pull_fetches_under_another_name(run, castore_command, store: Path, other: Path) -> None:
    shown = castore_command("-R", other, "pull", store, "main:theirs/main", "best", "--json")
    assert shown.code == 0
    document = shown.json
    assert set(document["refs"]) == {"heads/theirs/main", "tags/best"}
    assert set(document["sent"]) == set(document["plan"]["missing"])
    assert castore_command("-R", other, "show", "theirs/main").code == 0


def test_a_change_of_hash_shows_which_snapshot_became_which(run, castore_command, tmp_path: Path) -> None:
    castore.init(tmp_path / "strong", hash="blake3").close()
    shown = run("push", tmp_path / "strong", "main")
    assert shown.code == 0
    assert sum(line.endswith(" there") for line in shown.lines) == 3
    assert castore_command("-R", tmp_path / "strong", "verify", "--data").code == 0


def test_a_pull_speaks_from_the_side_of_the_one_who_pulls(castore_command, store: Path, tmp_path: Path) -> None:
    """Ids that are here were said to be there, and what was fetched to be sent."""
    castore.init(tmp_path / "strong", hash="blake3").close()
    planned = castore_command("-R", tmp_path / "strong", "pull", store, "main", "--dry-run")
    assert planned.lines[-1].startswith("would fetch 3 snapshots, ")
    assert planned.lines[-1].endswith(" there")
    shown = castore_command("-R", tmp_path / "strong", "pull", store, "main")
    assert sum(line.endswith(" here") for line in shown.lines) == 3
    assert shown.lines[-1].startswith("fetched 3 snapshots, ")


def test_conflicts_exit_with_5_and_what_is_not_there_with_4(run, castore_command, store: Path, other: Path) -> None:
    assert run("push", other).code == 0
    with castore.open(other) as repo:
        repo.save({"x": 1})
    with castore.open(store) as repo:
        repo.save({"x": 2})
    refused = run("push", other, "main", "--json")
    assert refused.code == 5
    assert refused.json["error"]["type"] == "DivergedError"
    assert refused.json["error"]["found"]
    assert run("push", other, "main", "--force").code == 0
    assert run("push", other / "nowhere").code == 4
    assert run("push", other, "nothing").code == 4
    assert run("push", store).code == 2


def test_damage_of_the_source_exits_with_3(run, store: Path, other: Path) -> None:
    pack = max(store.glob("packs/*/*.pack"), key=lambda path: path.stat().st_size)
    data = bytearray(pack.read_bytes())
    data[len(data) // 2] ^= 0xFF
    pack.write_bytes(data)
    failed = run("push", other)
    assert failed.code == 3
    assert "leaf" in failed.err
