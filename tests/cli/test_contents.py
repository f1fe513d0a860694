"""`castore show` and `castore diff`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import castore


def test_show_prints_the_facts_and_the_leaves(run) -> None:
    shown = run("show", "main~2")
    assert shown.code == 0
    facts = dict(line.split(maxsplit=1) for line in shown.lines[: shown.lines.index("")] if not line.startswith(" "))
    assert facts["step"] == "1"
    assert facts["metrics"] == "loss=3.5 bad=nan"
    assert facts["parents"] == "none"
    assert facts["message"] == "first"
    assert "          second line" in shown.lines
    rows = {line.split()[0]: line.split() for line in shown.lines[shown.lines.index("") + 1 :]}
    assert rows["PATH"] == ["PATH", "KIND", "DTYPE", "SHAPE", "BYTES", "CHUNKS"]
    assert rows["model/weight"] == ["model/weight", "ndarray", "<f4", "[400,", "1000]", "1.5", "MiB", "2"]
    assert rows["optimizer/lr"] == ["optimizer/lr", "float", "8", "B", "-"]


def test_show_defaults_to_main_and_shows_metadata_and_refs(run) -> None:
    assert "step      3" in run("show").lines
    shown = run("show", "best").lines
    assert "metadata  lr=2e-05" in shown
    assert "refs      tag: best" in shown


def test_show_json_is_the_snapshot_with_its_leaf_table(run) -> None:
    document = run("show", "best", "--json").json
    assert (document["step"], document["refs"], document["metadata"]) == (2, ["tag: best"], {"lr": 2e-5})
    leaves = {leaf["path"]: leaf for leaf in document["leaves"]}
    assert leaves["model/weight"]["shape"] == [400, 1000]
    assert leaves["model/weight"]["raw_bytes"] == 1_600_000
    assert document["leaf_count"] == len(leaves)


@pytest.mark.parametrize(("pattern", "count"), [("model", 3), ("model/*", 3), ("**/exp_avg", 1), ("optimizer/**", 2)])
def test_show_takes_globs(run, pattern: str, count: int) -> None:
    assert len(run("show", "main", pattern).lines) == 1 + count
    assert len(run("show", "main", pattern, "--json").json["leaves"]) == count


def test_a_path_that_no_leaf_has_names_near_ones(run) -> None:
    shown = run("show", "main", "model/wieght")
    assert shown.code == 4
    assert "did you mean model/weight, " in shown.err


def test_one_leaf_is_shown_with_numbers_and_how_its_chunks_are_stored(run) -> None:
    shown = run("show", "main", "model/weight")
    assert shown.code == 0
    assert "numbers   min=3 max=400002 mean=200002 std=115470 count=400000" in shown.lines
    assert "first     3 4 5 6 7 8 9 10" in shown.lines
    assert shown.lines[-3].split()[:2] == ["#", "CHUNK"]
    detail = run("show", "main", "model/weight", "--json").json
    assert [chunk["raw_bytes"] for chunk in detail["chunks"]] == [1024 * 1024, 1_600_000 - 1024 * 1024]
    assert all(len(chunk["pack"]) == 32 and chunk["copies"] == 1 for chunk in detail["chunks"])
    assert detail["stored_bytes"] == sum(chunk["stored_bytes"] for chunk in detail["chunks"])
    assert detail["summary"]["min"] == 3


def test_values_that_are_no_arrays_are_shown(run) -> None:
    assert "value     0.001" in run("show", "main", "optimizer/lr").lines
    assert r"value     'run \x1b[31mred'" in run("show", "main", "name").lines
    assert run("show", "main", "step", "--json").json["value"] == 3
    assert "bytes     raw 8 B, in the manifest" in run("show", "main", "optimizer/lr").lines


def test_many_kinds_of_leaf_can_be_shown(castore_command, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    base = torch.arange(12.0)
    state = {
        "bf16": torch.tensor([1.0, float("nan"), float("inf"), 0.0], dtype=torch.bfloat16),
        "fp8": torch.ones(300, dtype=torch.float8_e5m2),
        "bool": torch.tensor([True, False, True]),
        "int": torch.tensor([2**62, -(2**63)]),
        "complex": torch.tensor([1 + 2j]),
        "empty": torch.zeros(0, 3),
        "row": base[:6],
        "overlap": base[3:9],
        "alias": base[:6],
        "sparse": torch.eye(3).to_sparse(),
        "dtype": torch.float16,
        "size": torch.Size([1, 2]),
        "device": torch.device("cpu"),
        "none": None,
        "numpy": np.arange(3, dtype=">i2"),
        "text": np.array(["ab", "c"]),
        "big": 10**40,
        "bytes": b"\x00\xff",
        "list": list(range(50)),
    }
    with castore.init(tmp_path / "kinds") as repo:
        repo.save(state)

    def show(path: str) -> dict[str, object]:
        found = castore_command("-R", tmp_path / "kinds", "show", "main", path, "--json")
        assert found.code == 0, found.err
        assert castore_command("-R", tmp_path / "kinds", "show", "main", path).code == 0
        return found.json

    assert show("bf16")["summary"] == {
        "min": 0.0,
        "max": 1.0,
        "mean": 0.5,
        "std": 0.5,
        "count": 4,
        "zeros": 1,
        "nan": 1,
        "inf": 1,
        "first": [1.0, "nan", "inf", 0.0],
    }
    assert show("fp8")["summary"] == show("empty")["summary"] == show("text")["summary"] == {}
    assert show("bool")["summary"]["mean"] == pytest.approx(2 / 3)
    assert (show("int")["summary"]["min"], show("int")["summary"]["max"]) == (-(2**63), 2**62)
    assert show("complex")["summary"]["first"] == ["(1+2j)"]
    assert show("overlap")["summary"]["max"] == 8.0
    assert show("overlap")["kind"] == "view"
    assert show("alias")["target"] == "row"
    assert show("alias")["shape"] == [6]
    assert len(castore_command("-R", tmp_path / "kinds", "show", "main", "sparse").lines) == 3
    assert show("sparse/~values")["summary"]["count"] == 3
    assert show("numpy")["summary"]["max"] == 2
    assert (show("dtype")["value"], show("device")["value"], show("size")["value"]) == ("torch.float16", "cpu", [1, 2])
    assert (show("none")["value"], show("big")["value"], show("bytes")["value"]) == (None, 10**40, "00ff")
    assert show("list")["value"] == list(range(50))


def test_a_pickle_is_named_and_never_read(castore_command, tmp_path: Path) -> None:
    with castore.init(tmp_path / "store") as repo:
        repo.save({"x": {1, 2}}, allow_pickle=True)
    shown = castore_command("-R", tmp_path / "store", "show", "main", "x")
    assert shown.code == 0
    assert "value     'a pickle of builtins.set, " in shown.out
    assert "not read" in shown.out


def test_a_leaf_whose_pack_is_gone_says_so(run, store: Path) -> None:
    pack = run("show", "main", "model/weight", "--json").json["chunks"][0]["pack"]
    (store / "packs" / pack[:2] / f"{pack}.pack").unlink()
    shown = run("show", "main", "model/weight")
    # The manifest was in that pack, too.
    assert shown.code == 3
    assert "no pack" in shown.err
    assert "Traceback" not in shown.err


# ---- diff ---------------------------------------------------------------------------------------------------


def test_diff_of_a_snapshot_and_its_parent_lists_what_changed(run) -> None:
    shown = run("diff")
    assert shown.code == 0
    rows = {line.split()[1]: line.split() for line in shown.lines if line[:1] in "+-~="[:4] and line[:1].strip()}
    assert set(rows) == {"model/weight", "optimizer/state/0/exp_avg", "step"}
    assert rows["model/weight"][-4:] == ["2/2", "1", rows["model/weight"][-2], "1"]
    assert "3 changed, 0 added, 0 removed, 4 same" in shown.out
    assert "4 of 6 chunks changed (66.7 %)" in shown.out
    assert "bytes shared 1.5 MiB" in shown.out


def test_diff_json_has_every_number(run) -> None:
    document = run("diff", "main~2", "main", "--json").json
    leaves = {leaf["path"]: leaf for leaf in document["leaves"]}
    assert leaves["model/weight"]["max_abs"] == 2.0
    assert leaves["optimizer/state/0/exp_avg"]["relative_l2"] == pytest.approx(2.0)
    assert document["totals"]["changed"] == 3
    assert document["bytes_shared"] == 1_600_000
    assert "model/frozen" not in leaves
    assert "model/frozen" in {leaf["path"] for leaf in run("diff", "--all", "--json").json["leaves"]}


def test_diff_sorts_and_filters(run) -> None:
    def paths(*arguments: str) -> list[str]:
        return [leaf["path"] for leaf in run("diff", "main~2", "main", "--json", *arguments).json["leaves"]]

    assert paths("--sort", "l2")[0] in ("step", "optimizer/state/0/exp_avg")
    assert paths("--sort", "max")[0] == "optimizer/state/0/exp_avg"
    assert paths("--sort", "bytes")[-1] == "step"
    assert paths("--path", "model/**") == ["model/weight"]
    assert paths("-p", "model/**", "-p", "step") == ["model/weight", "step"]
    assert run("diff", "--path", "nothing").code == 4


def test_diff_stat_prints_totals_only(run) -> None:
    shown = run("diff", "--stat")
    assert len(shown.lines) == 3
    assert "leaves" not in run("diff", "--stat", "--json").json


def test_diff_without_values_compares_ids(run) -> None:
    shown = run("diff", "--no-values")
    assert "MAX ABS" not in shown.out
    assert "~  model/weight" in shown.out
    leaf = next(leaf for leaf in run("diff", "--no-values", "--json").json["leaves"] if leaf["path"] == "model/weight")
    assert leaf["max_abs"] is None


def test_diff_shows_added_removed_and_retyped_leaves(castore_command, tmp_path: Path) -> None:
    with castore.init(tmp_path / "store") as repo:
        repo.save({"a": np.zeros(3), "b": np.zeros(2), "c": np.zeros(2), "bad": np.zeros(2)})
        repo.save({"b": np.zeros(3), "c": np.zeros(2, "f4"), "d": 1, "bad": np.array([np.nan, 1.0])})
    shown = castore_command("-R", tmp_path / "store", "diff")
    assert "-  a" in shown.out
    assert "+  d" in shown.out
    assert "[2] -> [3]" in shown.out
    assert "<f8 -> <f4" in shown.out
    assert "NONFINITE" in shown.out
    document = json.dumps(castore_command("-R", tmp_path / "store", "diff", "--json").json)
    assert "Infinity" not in document


def test_diff_of_equal_snapshots_says_so(run) -> None:
    shown = run("diff", "main", "main")
    assert shown.code == 0
    assert "no difference" in shown.lines[0]


def test_diff_needs_a_parent_or_two_refs(run) -> None:
    shown = run("diff", "main~2")
    assert shown.code == 2
    assert "has no parent" in shown.err
    assert run("diff", "main", "main", "main").code == 2
    assert run("diff", "nothing", "main").code == 4
