"""`castore verify`, `castore du`, `castore dump` and `castore reindex`."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest


def largest_pack(store: Path) -> Path:
    return max(store.glob("packs/*/*.pack"), key=lambda path: path.stat().st_size)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)


# ---- verify -------------------------------------------------------------------------------------------------


def test_verify_of_a_whole_repository_is_one_line_and_a_note_of_the_orphan(run) -> None:
    shown = run("verify")
    assert shown.code == 0
    assert shown.lines[-1].startswith("ok: 5 snapshots, ")
    assert "--data reads every byte" in shown.lines[-1]
    assert "note: 1 orphan; `castore log --orphans` lists them" in shown.lines
    assert "read)" in run("verify", "--data").lines[-1]
    document = run("verify", "--data", "--json").json
    assert document["ok"]
    assert document["snapshot_count"] == 5
    assert len(document["orphans"]) == 1


def test_verify_names_the_damaged_snapshots_and_leaves_and_exits_with_3(run, store: Path) -> None:
    flip(largest_pack(store), 5000)
    assert run("verify").code == 0
    shown = run("verify", "--data")
    assert shown.code == 3
    assert "damaged " in shown.out
    assert "damaged snapshots:" in shown.lines
    assert re.match(r"\d+ problems?: ", shown.lines[-1])
    document = run("verify", "--data", "--json")
    assert document.code == 3
    assert not document.json["ok"]
    assert all(leaves for leaves in document.json["damaged_snapshots"].values())


def test_verify_finds_a_missing_pack_without_reading_data(run, store: Path) -> None:
    largest_pack(store).unlink()
    shown = run("verify")
    assert shown.code == 3
    assert "damaged snapshots:" in shown.lines


# ---- du -----------------------------------------------------------------------------------------------------


def test_du_says_where_the_bytes_are(run) -> None:
    shown = run("du")
    assert shown.code == 0
    headers = [line.split()[0] for line in shown.lines if line.split()[1:2] in (["BRANCH"], ["RAW"], ["CHUNKS"])]
    assert headers == ["SNAPSHOT", "LEAVES", "CODEC"]
    assert any(line.startswith("model ") for line in shown.lines)
    assert any(line.startswith("total: ") for line in shown.lines)


def test_du_adds_up(run, store: Path) -> None:
    document = run("du", "--json").json
    packs = sum(path.stat().st_size for path in store.glob("packs/*/*.pack"))
    assert document["pack_bytes"] == packs
    parts = ("leaf_bytes", "manifest_bytes", "unreferenced_bytes", "overhead_bytes")
    assert sum(document[part] for part in parts) == packs
    assert len(document["snapshots"]) == 5


def test_du_groups_by_depth(run) -> None:
    deep = {group["path"] for group in run("du", "--depth", 2, "--json").json["groups"]}
    assert {"model/weight", "optimizer/state"} <= deep
    assert len(run("du", "--depth", 0, "--json").json["groups"]) == 1


def test_du_of_a_damaged_repository_counts_the_rest_and_exits_with_3(run, store: Path) -> None:
    snapshot = run("show", "best", "--json").json["id"]
    (store / "snapshots" / snapshot).write_bytes(b"rubbish")
    shown = run("du")
    assert shown.code == 3
    assert "damaged snapshots/" in shown.out
    assert "total: " in shown.out


# ---- dump ---------------------------------------------------------------------------------------------------


def test_dump_describes_every_file_of_a_repository_and_changes_none(castore_command, store: Path) -> None:
    files = [path for path in store.rglob("*") if path.is_file() and not path.name.startswith(".")]
    before = {path: path.read_bytes() for path in files}
    for path in files:
        shown = castore_command("dump", path)
        assert shown.code == 0, (path, shown.out)
        assert castore_command("dump", path, "--json").json["kind"]
    assert {path: path.read_bytes() for path in files} == before


def test_dump_takes_a_name_within_the_repository(run) -> None:
    assert run("dump", "config", "--json").json["kind"] == "config"


def test_dump_describes_damaged_files_and_exits_with_3(castore_command, store: Path, tmp_path: Path) -> None:
    for source in (largest_pack(store), store / "config", next((store / "snapshots").iterdir())):
        for name, data in (("cut", source.read_bytes()[:-10]), ("flipped", None)):
            copy = tmp_path / name
            shutil.copy(source, copy)
            if data is None:
                flip(copy, source.stat().st_size - 20)
            else:
                copy.write_bytes(data)
            shown = castore_command("dump", copy)
            assert shown.code == 3, (source, name, shown.out)
            assert "problems" in shown.out
            assert json.loads(castore_command("dump", copy, "--json").out)["problems"]


@pytest.mark.parametrize("data", [b"", b"\x00" * 100, b"hello\n", bytes(range(256)) * 100])
def test_dump_of_any_file_never_fails_with_a_traceback(castore_command, tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "foreign"
    path.write_bytes(data)
    shown = castore_command("dump", path)
    assert shown.code in (0, 3)
    assert "Traceback" not in shown.err


def test_dump_of_nothing_is_not_found_and_of_a_directory_wrong_usage(castore_command, tmp_path: Path) -> None:
    assert castore_command("dump", tmp_path / "nothing").code == 4
    assert castore_command("dump", tmp_path).code == 2


# ---- reindex ------------------------------------------------------------------------------------------------


def test_reindex_builds_the_index_again(run, store: Path) -> None:
    shutil.rmtree(store / "cache", ignore_errors=True)
    shown = run("reindex")
    assert shown.code == 0
    assert shown.out.startswith("indexed ")
    document = run("reindex", "--json").json
    assert document["damaged_packs"] == {}
    assert document["pack_count"] == len(list(store.glob("packs/*/*.pack")))


def test_reindex_salvages_a_pack_whose_table_is_damaged(run, store: Path) -> None:
    pack = largest_pack(store)
    flip(pack, pack.stat().st_size - 100)
    shown = run("reindex")
    assert shown.code == 3
    assert f"damaged packs/{pack.stem[:2]}/{pack.name}" in shown.out
    assert run("show", "main", "model/weight").code == 0
