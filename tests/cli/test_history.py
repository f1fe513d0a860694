"""`castore log`, `castore branch` and `castore tag`."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest

import castore


def test_log_lists_first_parents_newest_first(run) -> None:
    shown = run("log")
    assert shown.code == 0
    assert [re.search(r"step (\d+)", line).group(1) for line in shown.lines] == ["3", "2", "1"]
    newest, middle, oldest = shown.lines
    assert newest.startswith("* ")
    assert newest.endswith("(main)")
    assert "(tag: best)" in middle
    assert "loss=3.5 bad=nan" in oldest
    assert oldest.endswith("  first")
    assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \(\d+ (s|min)\)", oldest)
    assert re.search(r"new +\d+\.\d MiB, stored +\d+\.\d [KM]iB", oldest)
    assert "\x1b" not in shown.out


def test_log_takes_a_ref_and_a_limit(run) -> None:
    assert len(run("log", "-n", 2).lines) == 2
    assert len(run("log", "best").lines) == 2
    assert len(run("log", "main@1").lines) == 1
    assert len(run("log", "exp").lines) == 2
    assert [snapshot["step"] for snapshot in run("log", "-n", 2, "--json").json["snapshots"]] == [3, 2]


def test_log_all_draws_the_graph_of_every_branch(run) -> None:
    lines = run("log", "--all").lines
    steps = [re.match(r"([*|/_ ]+) [0-9a-f]{10}  step (\d+)", line) for line in lines]
    drawn = [
        (found.group(1).strip(), found.group(2)) if found else line for found, line in zip(steps, lines, strict=True)
    ]
    assert drawn == [("*", "20"), ("| *", "3"), ("| *", "2"), "|/", ("*", "1")]


def test_log_orphans_lists_what_no_ref_reaches(run) -> None:
    (orphan,) = run("log", "--orphans").lines
    assert "step 99" in orphan
    assert len([line for line in run("log", "--all", "--orphans").lines if "step" in line]) == 5
    assert [snapshot["step"] for snapshot in run("log", "--orphans", "--json").json["snapshots"]] == [99]


def test_log_json_has_raw_numbers_and_refs(run) -> None:
    oldest = run("log", "--json").json["snapshots"][-1]
    assert oldest["metrics"] == {"loss": 3.5, "bad": "nan"}
    assert oldest["message"] == "first\nsecond line"
    assert oldest["raw_bytes"] > 4_000_000
    assert oldest["new_bytes"] <= oldest["raw_bytes"]
    assert oldest["created_at"].endswith("+00:00")
    assert run("log", "--json").json["snapshots"][1]["refs"] == {"branches": [], "tags": ["best"]}


def test_a_parent_that_is_gone_is_shown_and_ends_the_line(run, store: Path) -> None:
    middle = run("log", "--json").json["snapshots"][1]["id"]
    (store / "snapshots" / middle).unlink()
    shown = run("log")
    assert shown.code == 0
    assert len(shown.lines) == 2
    assert re.fullmatch(rf"\* {middle[:10]}  \(tag: best\)  gone", shown.lines[1])
    assert run("log", "--json").json["gone"] == [middle]
    assert any(line.endswith("gone") for line in run("log", "--all").lines)


def test_a_damaged_snapshot_costs_its_own_line_and_the_exit_code(run, store: Path) -> None:
    middle = run("log", "--json").json["snapshots"][1]["id"]
    (store / "snapshots" / middle).write_bytes(b"rubbish")
    shown = run("log", "--all")
    assert shown.code == 3
    assert [line for line in shown.lines if middle[:10] in line and "damaged: " in line]
    assert len([line for line in shown.lines if "step" in line]) == 3
    document = run("log", "--json")
    assert document.code == 3
    assert list(document.json["damaged"]) == [middle]


def test_a_damaged_ref_is_named_and_the_others_are_listed(run, store: Path) -> None:
    (store / "refs" / "branches" / "exp").write_bytes(b"rubbish")
    shown = run("log")
    assert shown.code == 3
    assert len(shown.lines) == 3
    assert "damaged ref refs/branches/exp" in shown.err
    listed = run("branch")
    assert listed.code == 3
    assert re.search(r"^exp .*damaged: ", listed.out, re.MULTILINE)
    assert re.search(r"^main ", listed.out, re.MULTILINE)
    assert run("tag").code == 0
    assert run("branch", "--move", "exp", "main").code == 0
    assert run("branch").code == 0


def test_an_empty_repository_has_no_history(castore_command, tmp_path: Path) -> None:
    castore.init(tmp_path / "new").close()
    run = partial(castore_command, "-R", tmp_path / "new")
    assert run("log").code == 4
    assert "save something first" in run("log").err
    assert run("log", "--all").err == "no snapshots\n"
    assert run("log", "--all", "--json").json["snapshots"] == []
    assert (run("branch").code, run("branch").err) == (0, "no branches\n")
    assert (run("tag").code, run("tag").err) == (0, "no tags\n")


def test_log_shows_no_control_characters(run, store: Path) -> None:
    with castore.open(store) as repo:
        repo.save({"x": 1}, message="evil \x1b[2J\rtext", metrics={"a\x07": 1.0})
    line = run("log", "-n", 1).lines[0]
    assert r"evil \x1b[2J\rtext" in line
    assert r"a\x07=1" in line


@pytest.mark.parametrize("arguments", [["main", "--all"], ["main", "--orphans"]])
def test_a_ref_and_all_refs_exclude_each_other(run, arguments: list[str]) -> None:
    assert run("log", *arguments).code == 2


# ---- branch and tag -----------------------------------------------------------------------------------------


def test_branches_are_made_listed_moved_and_deleted(run) -> None:
    assert run("branch", "new").out.startswith("branch new is at ")
    assert run("branch", "old/one", "main~2").code == 0
    rows = {row["name"]: row for row in run("branch", "--json").json["branches"]}
    assert {name: row["step"] for name, row in rows.items()} == {"exp": 20, "main": 3, "new": 3, "old/one": 1}
    assert run("branch", "new", "best").code == 5
    moved = run("branch", "--move", "new", "best", "--json").json
    assert (moved["name"], moved["snapshot"]) == ("new", run("show", "best", "--json").json["id"])
    assert run("branch", "-d", "new").out == "branch new deleted\n"
    assert run("branch", "-d", "new").code == 4
    lines = run("branch").lines
    assert lines[0].split() == ["NAME", "SNAPSHOT", "STEP", "SAVED", "MESSAGE"]
    assert [line.split()[0] for line in lines[1:]] == ["exp", "main", "old/one"]


def test_tags_are_made_listed_and_deleted_and_never_move(run) -> None:
    assert run("tag", "v1", "main@1").code == 0
    assert [(row["name"], row["step"]) for row in run("tag", "--json").json["tags"]] == [("best", 2), ("v1", 1)]
    assert run("tag", "v1").code == 5
    assert run("tag", "v1", "main").code == 5
    assert run("tag", "exp").code == 5
    assert run("tag", "--delete", "v1", "--json").json == {"kind": "tag", "deleted": "v1"}
    assert run("tag", "--delete", "v1").code == 4


@pytest.mark.parametrize(
    "arguments",
    [
        ["branch", "--delete"],
        ["branch", "--move"],
        ["branch", "--move", "exp"],
        ["branch", "--delete", "exp", "main"],
        ["branch", "--delete", "--move", "exp", "main"],
        ["branch", "a..b"],
        ["tag", "--delete"],
        ["tag", "--delete", "best", "main"],
        ["tag", "a b"],
    ],
    ids=" ".join,
)
def test_what_makes_no_sense_is_wrong_usage(run, arguments: list[str]) -> None:
    shown = run(*arguments)
    assert shown.code == 2, shown.err
    assert shown.err.startswith("error: ")


def test_a_ref_to_a_snapshot_that_is_gone_is_listed_as_gone(run, store: Path) -> None:
    (store / "snapshots" / run("show", "best", "--json").json["id"]).unlink()
    assert run("tag").lines[1].endswith("gone")
    assert run("tag", "--json").json["tags"][0]["state"] == "gone"


def test_a_long_history_is_read_once_and_a_short_look_reads_little(
    castore_command, tmp_path: Path, monkeypatch
) -> None:
    reads: list[str] = []
    from castore.backend.local import LocalBackend

    with castore.init(tmp_path / "long") as repo:
        for step in range(40):
            repo.save({"step": step}, step=step)
    read, listed = LocalBackend.read, LocalBackend.list
    monkeypatch.setattr(LocalBackend, "read", lambda self, name, **o: reads.append(name) or read(self, name, **o))
    monkeypatch.setattr(LocalBackend, "list", lambda self, prefix: reads.append(prefix) or listed(self, prefix))
    assert len(castore_command("-R", tmp_path / "long", "log", "-n", 3).lines) == 3
    assert len(reads) <= 12
    reads.clear()
    assert len(castore_command("-R", tmp_path / "long", "log", "--all").lines) == 40
    assert len([name for name in reads if name.startswith("snapshots/")]) <= 42
