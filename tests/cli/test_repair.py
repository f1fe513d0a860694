"""`castore repair`, `castore verify` in slices, and `castore export --latest-valid`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import castore
from tests.cli.conftest import Run, example_state


def flip_largest_pack(store: Path) -> Path:
    path = max(store.glob("packs/*/*.pack"), key=lambda found: found.stat().st_size)
    data = bytearray(path.read_bytes())
    data[5000] ^= 0xFF
    path.write_bytes(data)
    return path


def test_repair_of_a_whole_repository_is_one_line(run: Run) -> None:
    shown = run("repair")
    assert (shown.code, shown.lines) == (0, ["nothing to mend"])
    assert run("repair", "--yes").lines == ["done; nothing is lost"]


def test_the_plan_is_shown_first_and_nothing_is_changed(run: Run, store: Path) -> None:
    path = flip_largest_pack(store)
    shown = run("repair")
    assert shown.code == 3
    assert f"pack {path.stem}: " in shown.out
    assert "lost of snapshot " in shown.out
    assert shown.lines[-1].startswith("nothing was changed; --yes ")
    assert path.exists()
    assert not (store / "quarantine").exists()


def test_yes_acts_and_verify_is_quiet_about_what_is_known(run: Run, store: Path) -> None:
    path = flip_largest_pack(store)
    done = run("repair", "--yes")
    assert done.code == 3, "something is lost"
    assert not path.exists()
    (moved,) = (store / "quarantine").glob(f"*/packs/*/{path.name}")
    assert moved.is_file()
    assert any(line.startswith("quarantine, yours to delete: ") for line in run("du").lines)
    verified = run("verify", "--data")
    assert verified.code == 0
    assert "known to be lost, as repairs have found:" in verified.lines
    assert run("verify", "--data", "--json").json["lost_snapshots"]
    assert run("repair", "--json").json["plan"]["salvages"] == []


def test_marks_that_will_say_nothing_are_part_of_the_plan(run: Run, store: Path) -> None:
    flip_largest_pack(store)
    run("verify", "--data")
    (mark,) = (store / "damaged").iterdir()
    assert run("repair", "--json").json["plan"]["stale_marks"] == [f"damaged/{mark.name}"]
    assert "take away 1 mark of damage that is mended by then" in run("repair").lines
    run("repair", "--yes")
    assert not list((store / "damaged").iterdir())


def test_another_repository_or_a_file_heals(run: Run, store: Path, tmp_path: Path) -> None:
    flip_largest_pack(store)
    with castore.init(tmp_path / "other") as other:
        other.save({"all": [example_state(step) for step in (1, 2, 3, 20, 99)]})
    document = run("repair", "--from", tmp_path / "other", "--yes", "--json")
    assert document.code == 0
    assert document.json["healed_count"] > 0
    assert document.json["losses"] == {}
    assert run("verify", "--data").code == 0
    with castore.open(store) as repo:
        assert np.array_equal(repo.load()["model"]["weight"], example_state(3)["model"]["weight"])


def test_a_source_that_is_not_there_is_not_found(run: Run, tmp_path: Path) -> None:
    assert run("repair", "--from", tmp_path / "nothing").code == 4
    (tmp_path / "readme.txt").write_text("no checkpoint")
    assert run("repair", "--from", tmp_path / "readme.txt").code == 2


def test_a_broken_branch_is_offered_a_snapshot(run: Run, store: Path) -> None:
    head = run("show", "main", "--json").json["id"]
    parent = run("show", "main~1", "--json").json["id"]
    (store / "snapshots" / head).write_bytes(b"rubbish")
    shown = run("repair", "--yes")
    assert shown.code == 3
    assert f"castore branch --move main {parent[:10]}" in shown.out
    fixed = run("repair", "--yes", "--fix-refs")
    assert fixed.code == 0
    assert run("show", "main", "--json").json["id"] == parent


def test_verify_in_slices_says_what_is_to_come(run: Run) -> None:
    shown = run("verify", "--max-duration", "1h")
    assert shown.code == 0
    expected = "scrub: 5 packs read, 0 read lately, 0 to come; all were read since "
    assert any(line.startswith(expected) for line in shown.lines)
    assert run("verify", "--max-age", "1d", "--json").json["scrub"]["recent_count"] == 5
    assert run("verify", "--max-age", "soon").code == 2


def test_export_of_the_latest_valid_snapshot_says_what_was_passed_over(run: Run, store: Path, tmp_path: Path) -> None:
    head = run("show", "main", "--json").json["id"]
    (store / "snapshots" / head).write_bytes(b"rubbish")
    out = tmp_path / "state.safetensors"
    assert run("export", "main", out, "--tensors-only").code == 3
    shown = run("export", "main", out, "--tensors-only", "--latest-valid")
    assert shown.code == 0
    assert "passed over main" in shown.err
    assert out.exists()


def test_dump_knows_quarantine_marks_and_the_lock(castore_command: Run, run: Run, store: Path) -> None:
    flip_largest_pack(store)
    run("verify", "--data")
    marks = list((store / "damaged").iterdir())
    assert [castore_command("dump", mark, "--json").json["kind"] for mark in marks] == ["damage mark"] * len(marks)
    run("repair", "--yes")
    assert castore_command("dump", next((store / "lost").iterdir()), "--json").json["kind"] == "loss"
    (why,) = (store / "quarantine").glob("*/why")
    assert castore_command("dump", why, "--json").json["kind"] == "quarantine"
    (pack,) = (store / "quarantine").glob("*/packs/*/*.pack")
    assert castore_command("dump", pack, "--json").json["kind"] == "pack"
    assert castore_command("dump", store / ".lock", "--json").json["kind"] == "lock"
    assert castore_command("dump", store / "cache/scrub", "--json").json["kind"] == "scrub memory"
