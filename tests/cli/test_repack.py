"""`castore repack`, and what `show --stored` and `du` say of encodings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import castore
from castore.format.layout import snapshot_name


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Two saves of a weight that drifts, and its copy in half precision."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(50_000, np.float32)
    with castore.init(tmp_path / "mixed") as repo:
        for step in (1, 2):
            weight = weight + (rng.standard_normal(50_000) * 1e-5).astype(np.float32)
            repo.save({"weight": weight, "copy": weight.astype(np.float16), "zeros": np.zeros(400)}, step=step)
    return tmp_path / "mixed"


def test_show_says_how_each_leaf_is_stored(castore_command, mixed: Path) -> None:
    lines = castore_command("-R", mixed, "show", "main", "--stored").lines
    assert next(line for line in lines if line.startswith("PATH")).split()[-3:] == ["STORED", "CODECS", "DEPTH"]
    cells = {line.split()[0]: line.split()[-2:] for line in lines if line.startswith(("weight", "copy", "zeros"))}
    assert cells == {"weight": ["ordered", "1"], "copy": ["derived", "2"], "zeros": ["constant", "0"]}
    document = castore_command("-R", mixed, "show", "main", "--stored", "--json").json
    copy = next(leaf for leaf in document["leaves"] if leaf["path"] == "copy")
    assert (copy["stored_bytes"], copy["codecs"], copy["depth"]) == (1, {"derived": 1}, 2)
    assert "codecs" not in castore_command("-R", mixed, "show", "main", "--json").json["leaves"][0]


def test_one_leaf_names_its_masters(castore_command, mixed: Path) -> None:
    (chunk,) = castore_command("-R", mixed, "show", "main", "copy", "--json").json["chunks"]
    (master,) = castore_command("-R", mixed, "show", "main", "weight", "--json").json["chunks"]
    assert chunk["bases"] == [master["chunk_id"]]
    assert chunk["chunk_id"] != master["chunk_id"]


def test_du_counts_codecs_and_pinned_bases(castore_command, mixed: Path) -> None:
    document = castore_command("-R", mixed, "du", "--json").json
    counts = {codec["name"]: (codec["chunk_count"], codec["raw_bytes"]) for codec in document["codecs"]}
    assert counts["derived"] == (2, 200_000)
    assert counts["ordered"] == (1, 200_000)
    assert document["pinned_bytes"] == 0
    assert "no snapshot needs itself" not in castore_command("-R", mixed, "du").out
    with castore.open(mixed) as repo:
        (mixed / snapshot_name(repo.snapshot("main~1").id)).unlink()
    shown = castore_command("-R", mixed, "du")
    assert any(line.startswith("bases that no snapshot needs itself: ") for line in shown.lines)
    assert castore_command("-R", mixed, "du", "--json").json["pinned_bytes"] > 50_000


def test_flatten_takes_the_depth_away_and_a_dry_run_does_not(castore_command, mixed: Path) -> None:
    planned = castore_command("-R", mixed, "repack", "--flatten", "main", "--dry-run")
    assert planned.code == 0
    assert planned.out.startswith("would look at 2 chunks of ")
    assert "derived" in castore_command("-R", mixed, "show", "main", "--stored").out
    shown = castore_command("-R", mixed, "repack", "--flatten", "main")
    assert shown.code == 0
    assert "wrote 2 chunks again in " in shown.lines[1]
    after = castore_command("-R", mixed, "show", "main", "--stored", "--json").json["leaves"]
    assert {leaf["depth"] for leaf in after} == {0}
    assert castore_command("-R", mixed, "verify", "--data").code == 0


def test_archiving_reports_as_json(castore_command, mixed: Path) -> None:
    report = castore_command("-R", mixed, "repack", "--level", "max", "--json").json
    assert report["new_bytes"] <= report["old_bytes"]
    assert not report["dry_run"]


def test_nothing_to_do_is_wrong_usage(castore_command, mixed: Path) -> None:
    shown = castore_command("-R", mixed, "repack", "main")
    assert shown.code == 2
    assert "ask for flatten" in shown.err
    assert castore_command("-R", mixed, "repack", "--flatten", "nobody").code == 4
