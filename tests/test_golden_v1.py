"""Repositories that the first castore of version 1 wrote, checked in, are read for ever: bit for bit."""

from __future__ import annotations

import ast
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import castore
from castore.dump import dump
from tests.independent_reader import Repository as IndependentReader
from tests.suites.golden_rows import Point, row, rows_of

GOLDEN = Path(__file__).parent / "golden"
V1 = GOLDEN / "v1"
NAMES = ("copies", "crashed-gc", "history", "id-list", "lz4", "ordered", "repaired", "runs", "torch")
SOUND = tuple(name for name in NAMES if name != "repaired")
BROKEN: dict[str, Any] = json.loads((V1 / "broken.json").read_text())
CLASSES = {"tests.suites.golden_rows:Point": Point}
CONTAINERS = {"DICT", "ORDERED_DICT", "LIST", "TUPLE", "NAMEDTUPLE", "DATACLASS", "SPARSE", "QUANTIZED"}

ENCODINGS = {
    *((1, 0), (1, 1, 0), (1, 2, 0), (1, 4, 0)),  # raw, lz4, zstd, constant
    *((1, 3, 1, 0), (1, 16, 2, 1), (1, 16, 3, 1), (1, 16, 4, 1)),  # planes; difference, xor, scaled
    *((1, 18, 2, 1), (1, 18, 4, 1)),  # difference and scaled, sorted
    *((1, 17, 1, 1), (1, 17, 1, 2), (1, 17, 2, 1), (1, 17, 3, 1), (1, 17, 4, 1)),  # derived, from one or two chunks
    *((2, 0), (2, 1, 0), (2, 2, 0), (3, 0)),  # manifest parts, an id list
}
"""Kind of record, codecs, mode or rule of the last one, count of bases."""


def expected_of(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((V1 / f"{name}.json").read_text())
    return found


@pytest.fixture
def copy(name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(V1 / name, tmp_path / "repository"))


def text_rows(rows: dict[str, list[Any]]) -> dict[str, str]:
    return {path: " ".join(map(str, found)) for path, found in rows.items()}


def is_lost(name: str, step: int, path: str) -> bool:
    """What had rotted, and was put on record, before the repository was checked in."""
    lost = {1: {"buffer", "window"}, 2: {"model/weight", "tied", "buffer", "window"}}
    return name == "repaired" and path in lost[step]


# ---- the files themselves --------------------------------------------------------------------------------------------


def test_no_golden_file_was_changed_removed_or_added_without_a_line() -> None:
    listed = dict(reversed(line.split("  ", 1)) for line in (GOLDEN / "SHA256SUMS").read_text().splitlines())
    found = {
        path.relative_to(GOLDEN).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in V1.rglob("*")
        if path.is_file()
    }
    assert found == listed, "golden files never change; add new cases beside the old ones"
    assert {path.stem for path in V1.glob("*.json")} == {*NAMES, "broken"}


def test_what_makes_them_never_makes_them_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tools import golden_v1

    monkeypatch.setattr("sys.argv", ["golden_v1", str(V1), "history"])
    with pytest.raises(SystemExit, match="never change"):
        golden_v1.main()


# ---- castore reads them ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_history_is_as_it_was_recorded(name: str, copy: Path) -> None:
    expected = expected_of(name)
    with castore.open(copy) as repo:
        assert {ref.name: ref.snapshot_id for ref in repo.branches()} == expected["branches"]
        assert {ref.name: ref.snapshot_id for ref in repo.tags()} == expected["tags"]
        assert {name: [found.id for found in repo.log(name)] for name in expected["branches"]} == expected["log"]
        assert [found.id for found in repo.orphans()] == expected["orphans"]
        assert {found.id for found in repo.forgotten()} >= set(expected["forgotten"])
        for snapshot_id, fields in expected["snapshots"].items():
            found = repo.snapshot(snapshot_id)
            for key in ("state_id", "step", "message", "metrics", "metadata"):
                assert getattr(found, key) == fields[key]
            assert list(found.parents) == fields["parents"]


@pytest.mark.parametrize("name", SOUND)
@pytest.mark.parametrize("mmap", [False, True])
def test_every_snapshot_loads_bit_exactly(name: str, copy: Path, mmap: bool) -> None:
    with castore.open(copy) as repo:
        for snapshot_id, fields in expected_of(name)["snapshots"].items():
            if fields["dropped"]:
                with pytest.raises(castore.ThinnedError):
                    repo.load(snapshot_id, classes=CLASSES)
                state = repo.load(snapshot_id, classes=CLASSES, paths=["model/weight", "buffer", "literals/**"])
                found = text_rows(rows_of(state))
                assert len(found) > 10
                # What lost items is a dict, and every container counts what is left.
                leaves = {path for path, text in found.items() if text.split()[0] not in CONTAINERS}
                assert {path: found[path] for path in leaves} == {path: fields["rows"][path] for path in leaves}
            else:
                state = repo.load(snapshot_id, classes=CLASSES, mmap=mmap)
                assert text_rows(rows_of(state)) == fields["rows"]


@pytest.mark.parametrize("name", SOUND)
def test_every_byte_verifies(name: str, copy: Path) -> None:
    with castore.open(copy) as repo:
        report = repo.verify(data=True)
    assert report.ok, report.problems
    assert report.checked_bytes > 0


@pytest.mark.parametrize("name", ["repaired"])
def test_what_was_lost_before_is_named_and_the_rest_is_there(name: str, copy: Path) -> None:
    expected = expected_of(name)
    with castore.open(copy) as repo:
        for snapshot_id, fields in expected["snapshots"].items():
            for path, text in fields["rows"].items():
                if is_lost(name, fields["step"], path):
                    with pytest.raises(castore.CastoreError):
                        repo.read(snapshot_id, path)
                elif text.split()[0] == "NDARRAY":
                    assert text_rows({path: rows_of(repo.read(snapshot_id, path))[""]}) == {path: text}
        damaged = repo.verify(data=True).damaged_snapshots
    steps = {snapshot_id: fields["step"] for snapshot_id, fields in expected["snapshots"].items()}
    # What lost/ has on record is no news.
    assert {steps[found]: set(leaves) for found, leaves in damaged.items()} == {
        1: {"buffer", "window"},
        2: {"buffer", "window"},
    }


@pytest.mark.parametrize("name", SOUND)
def test_a_save_and_a_collection_lose_nothing_of_it(name: str, copy: Path) -> None:
    expected = expected_of(name)
    added = {"added": np.arange(1000, dtype=np.float32)}
    with castore.open(copy) as repo:
        saved = repo.save(added, branch="added")
        repo.gc(repack_below=1.0, wait_s=0.0)
    with castore.open(copy) as repo:
        assert repo.verify(data=True).ok
        np.testing.assert_array_equal(repo.load(saved)["added"], added["added"])
        for snapshot_id, fields in expected["snapshots"].items():
            if not fields["dropped"]:
                assert text_rows(rows_of(repo.load(snapshot_id, classes=CLASSES))) == fields["rows"]


@pytest.mark.parametrize("name", ["crashed-gc"])
def test_the_collection_that_was_killed_is_finished(name: str, copy: Path) -> None:
    with castore.open(copy) as repo:
        repo.gc()
    assert not list(copy.glob("gc/*.condemned"))
    assert len(list(copy.glob("packs/*/*.pack"))) < len(list((V1 / name).glob("packs/*/*.pack")))


FILES = [path for path in sorted(V1.rglob("*")) if path.is_file() and path.suffix != ".json"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(V1)))
def test_every_file_can_be_dumped(path: Path) -> None:
    shown = dump(path)
    json.dumps(shown)
    if path.relative_to(V1).parts[0] != "broken" and "quarantine" not in path.parts:
        is_rotten = path.parent.parent.name == "packs" and "repaired" in path.parts
        assert is_rotten or not shown.get("problems"), shown


# ---- broken ones -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_repository_gives_its_recorded_answer(case: str, tmp_path: Path) -> None:
    expected = BROKEN[case]
    root = tmp_path / "repository"
    shutil.copytree(V1 / "broken" / "whole", root)
    if (V1 / "broken" / case).exists():
        shutil.copytree(V1 / "broken" / case, root, dirs_exist_ok=True)
    for name in expected["removed"]:
        (root / name).unlink()
    if expected["opens"]:
        check_error(expected["opens"], lambda: castore.open(root))
        return
    with castore.open(root) as repo:
        if expected["loads"]:
            check_error(expected["loads"], lambda: repo.load(expected["ref"]))
        else:
            repo.load(expected["ref"])
        if expected["saves"]:
            check_error(expected["saves"], lambda: repo.save({"a": 1}))
        assert sorted({problem.kind for problem in repo.verify().problems}) == expected["structure"]
        assert sorted({problem.kind for problem in repo.verify(data=True).problems}) == expected["data"]


def check_error(expected: str, action: Any) -> None:
    with pytest.raises(castore.CastoreError) as caught:
        action()
    assert type(caught.value).__name__ == expected, caught.value


# ---- a stranger reads them -------------------------------------------------------------------------------------------


def test_the_independent_reader_imports_nothing_of_castore() -> None:
    source = ast.parse((Path(__file__).parent / "independent_reader.py").read_text())
    imported = {alias.name for node in ast.walk(source) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(source) if isinstance(node, ast.ImportFrom)}
    packages = {"blake3", "lz4.block", "msgpack", "numpy", "xxhash", "zstandard"}
    assert imported - packages == {"__future__", "json", "pathlib", "re", "struct", "typing", "urllib.parse"}


@pytest.mark.parametrize("name", SOUND)
def test_a_reader_written_from_the_document_finds_the_same(name: str) -> None:
    expected = expected_of(name)
    reader = IndependentReader(V1 / name)
    assert (reader.branches, reader.tags) == (expected["branches"], expected["tags"])
    for snapshot_id, fields in expected["snapshots"].items():
        body = reader.snapshot(snapshot_id)
        assert (body["state"], body["step"], body["parents"]) == (fields["state_id"], fields["step"], fields["parents"])
        assert reader.state_id(snapshot_id) == fields["state_id"]
        dropped = reader.drops(snapshot_id)
        found = {}
        for path, (kind, dtype, shape, data) in reader.leaves(snapshot_id).items():
            if data is None:
                assert any(glob.match(path) for glob in dropped)
            else:
                found[path] = [kind, dtype, shape, 0, ""] if kind in CONTAINERS else row(kind, data, dtype, shape)
        kept = {path: text for path, text in fields["rows"].items() if path in found}
        assert text_rows(found) == kept
        assert dropped or len(kept) == len(fields["rows"])


def test_every_encoding_is_among_them() -> None:
    seen: set[tuple[int, ...]] = set()
    for name in SOUND:
        reader = IndependentReader(V1 / name)
        for snapshot_id in expected_of(name)["snapshots"]:
            reader.leaves(snapshot_id)
        seen |= reader.seen
    assert seen == ENCODINGS
