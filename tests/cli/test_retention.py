"""`castore forget`, `undelete` and `policy`, and what log, show and diff say of the forgotten and the thinned."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

import castore
from castore.api import Repository
from castore.cli.exits import Exit
from castore.format.layout import snapshot_name
from tests.suites.collector import collect


@pytest.fixture
def repo(tmp_path: Path):
    """Six snapshots of main, the third tagged."""
    with castore.init(tmp_path / "repo", compression="none") as repository:
        for step in range(6):
            noise = np.random.default_rng(step).standard_normal((2, 300))
            repository.save(
                {"model": noise[0], "optimizer": {"m": noise[1], "step": step}}, step=step, metrics={"loss": 9 - step}
            )
        repository.tag("best", at="main@2")
        yield repository


@pytest.fixture
def run(castore_command, repo: Repository):
    return partial(castore_command, "-R", repo.path)


def logged(run) -> list[int]:
    return [row["step"] for row in run("log", "--json").json["snapshots"]]


def test_forget_lists_each_snapshot_with_its_reason(run) -> None:
    shown = run("forget", "--keep-last", 1, "--keep-every", 3, "--keep-best", "loss:max:1")
    assert shown.code == 0
    assert [line.split()[0] for line in shown.lines[1:-1]] == ["keep"] * 4 + ["forgotten"] * 2
    assert "head of main, last 1" in shown.lines[1]
    assert "every 3 steps, best 1 by max loss" in shown.lines[4]
    assert "no rule keeps it" in shown.lines[5]
    assert shown.lines[-1] == "forgot 2 snapshots, kept 4"
    assert logged(run) == [5, 3, 2, 0]


def test_a_dry_run_changes_nothing(run) -> None:
    shown = run("forget", "--keep-last", 1, "-n")
    assert shown.lines[-1] == "would forget 4 snapshots, kept 2"
    assert logged(run) == [5, 4, 3, 2, 1, 0]
    fields = run("forget", "--keep-last", 1, "--dry-run", "--json").json
    assert fields["dry_run"] is True
    assert [choice["step"] for choice in fields["forget"]["dropped"]] == [4, 3, 1, 0]
    assert fields["forget"]["kept"][0]["reasons"] == ["head of main", "last 1"]
    assert fields["thin"] is None


def test_log_counts_what_was_forgotten_and_goes_on_behind_it(run, repo: Repository) -> None:
    run("forget", "main@3", "main@4", "main@1")
    for _ in range(2):
        lines = run("log").lines
        assert [line.split("  ")[1].strip() if line.startswith("*") else line for line in lines] == [
            "step 5",
            ": 2 snapshots forgotten (steps 3 to 4)",
            "step 2",
            ": 1 snapshot forgotten (step 1)",
            "step 0",
        ]
        everything = run("log", "--all").lines
        assert [line[0] for line in everything] == ["*", "*", "*", ":"]
        assert everything[-1] == ": 3 snapshots forgotten (steps 1 to 4)"
        assert len(run("log", "--json").json["forgotten"]) == 3
        assert run("log", "--json").json["gone"] == []
        assert "no difference" not in run("diff", "main").out
        assert run("diff", "main").lines[-3].count("(step ") == 2
        collect(repo)


def test_names_of_snapshots_forget_those_also_damaged_ones(run, repo: Repository) -> None:
    damaged = repo.snapshot("main@3").id
    path = repo.path / snapshot_name(damaged)
    path.write_bytes(path.read_bytes()[:100])
    assert run("log").code == Exit.DAMAGE
    refused = run("forget", "--keep-last", 4)
    assert refused.code == Exit.DAMAGE, "what lies behind the damage was not looked at"
    assert run("forget", damaged[:10]).code == 0
    assert run("log").code == 0
    assert logged(run) == [5, 4, 2, 1, 0]


def test_thinning_by_age_and_by_name(run) -> None:
    shown = run("forget", "--thin", "optimizer/**", "--older-than", 2)
    assert [line.split()[0] for line in shown.lines[1:-1]] == ["thinned"] * 3
    assert shown.lines[-1] == "thinned 3 snapshots by 7.0 KiB raw"
    assert run("forget", "--thin", "optimizer/**", "--older-than", "1h").lines == ["thinned 0 snapshots by 0 B raw"]
    named = run("forget", "--thin", "optimizer/**", "best", "--json").json
    assert [choice["step"] for choice in named["thin"]["thinned"]] == [2]
    lines = run("log").lines
    assert [line.endswith("thinned of optimizer/**") for line in lines] == [False, False, True, True, True, True]
    assert run("log", "--json").json["snapshots"][5]["dropped"] == ["optimizer/**"]


def test_show_diff_and_export_of_a_thinned_snapshot(run, tmp_path: Path) -> None:
    run("forget", "--thin", "optimizer/**", "--older-than", 1)
    shown = run("show", "main~1")
    assert "thinned   optimizer/**" in shown.out
    assert [line.split()[-1] for line in shown.lines[-3:]] == ["1", "dropped", "dropped"]
    leaf = run("show", "main~1", "optimizer/m")
    assert leaf.code == 0
    assert "dropped" in leaf.out
    assert "PACK" not in leaf.out
    assert run("show", "main~1", "optimizer/m", "--json").json["chunks"] == []
    row = next(line for line in run("diff", "main~1", "main").lines if "optimizer/m" in line)
    assert "dropped" in row
    refused = run("export", "main~1", tmp_path / "x.pt")
    assert refused.code == Exit.NOT_FOUND
    assert "left: model" in refused.err
    pytest.importorskip("torch")
    assert run("export", "main~1", tmp_path / "x.pt", "--path", "model").code == 0


def test_undelete_lists_and_brings_back(run, repo: Repository) -> None:
    assert "nothing was forgotten" in run("undelete").err
    run("forget", "--keep-last", 2, "--thin", "optimizer/**", "--older-than", 1)
    listed = run("undelete")
    assert [line.split()[1] for line in listed.lines[1:4]] == ["3", "1", "0"]
    assert "thinned of optimizer/**" in listed.lines[4]
    assert len(run("undelete", "--json").json["forgotten"]) == 3
    one = repo.forgotten()[0].id
    assert run("undelete", one).lines == [f"{one[:10]} is back"]
    assert run("undelete", "--all").code == 0
    thinned = repo.snapshot("main~1").id
    assert run("undelete", thinned).lines == [f"{thinned[:10]} is whole again"]
    assert logged(run) == [5, 4, 3, 2, 1, 0]
    run("forget", "main~1")
    collect(repo)
    gone = run("undelete", thinned)
    assert gone.code == Exit.DAMAGE
    assert "cannot come back" in gone.err
    assert "1 forgotten snapshot more: gc has freed them" in run("undelete").err


def test_policy_is_set_shown_applied_and_cleared(run) -> None:
    assert "no policy is stored" in run("policy").err
    rules = ("--keep-last", 2, "--keep-best", "loss:min:1", "--keep-branch", "rel/*", "--keep-within", "1s")
    shown = run("policy", "set", *rules, "--thin", "optimizer", "--older-than", 1, "--every-saves", 50)
    assert shown.lines == [
        "keep    last 2, within 1s, best loss:min:1, branch rel/*",
        "thin    optimizer of what is older than the newest 1",
        "applied after every 50 saves, and by `castore gc --auto`",
    ]
    assert run("policy", "show").lines == shown.lines
    fields = run("policy", "--json").json["policy"]
    assert fields["keep"]["best"] == [["loss", "min", 1]]
    assert fields["thin"] == {"globs": ["optimizer"], "older_than": 1}
    assert run("policy", "set", "--keep-last", 2).code == 0
    assert "would forget 3 snapshots" in run("policy", "apply", "-n").out
    assert logged(run) == [5, 4, 3, 2, 1, 0]
    assert run("policy", "apply", "--json").json["forget"]["kept"][0]["step"] == 5
    assert logged(run) == [5, 4, 2]
    assert run("policy", "clear").lines == ["policy cleared"]
    assert run("policy", "clear").lines == ["no policy was stored"]
    assert "no policy is stored" in run("policy", "apply").err


@pytest.mark.parametrize(
    "arguments",
    [
        ("forget",),
        ("forget", "main~1", "--keep-last", 1),
        ("forget", "--thin", "optimizer"),
        ("forget", "--older-than", 3),
        ("forget", "--keep-best", "loss"),
        ("forget", "--keep-best", "loss:min"),
        ("forget", "--keep-best", "loss:least:2"),
        ("forget", "--keep-last", 0),
        ("forget", "--keep-within", "soon"),
        ("forget", "main"),
        ("forget", "best"),
        ("undelete", "main"),
        ("undelete", "main", "--all"),
        ("policy", "set"),
        ("policy", "show", "--keep-last", 1),
        ("policy", "clear", "-n"),
        ("policy", "set", "--thin", "optimizer"),
    ],
    ids=lambda arguments: " ".join(map(str, arguments)),
)
def test_what_can_mean_nothing_is_wrong_usage_and_changes_nothing(run, repo: Repository, arguments) -> None:
    before = sorted(repo.path.rglob("*"))
    refused = run(*arguments)
    assert refused.code == Exit.USAGE
    assert refused.err.startswith("error: ")
    assert [path for path in sorted(repo.path.rglob("*")) if path not in before] == []


def test_a_glob_that_matches_nothing_is_not_found(run) -> None:
    assert run("forget", "--thin", "optimiser/**", "--older-than", 1).code == Exit.NOT_FOUND
