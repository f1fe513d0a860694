"""Dump describes any file of a repository, and changes none."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import castore
from castore.dump import dump
from castore.errors import NotFoundError, UsageError
from castore.format.textfile import encode_text_file


def make_state(step: int) -> dict[str, Any]:
    return {"w": np.random.default_rng(step).standard_normal(5000), "zeros": np.zeros(2000), "step": step}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    with castore.init(tmp_path / "store") as repository:
        first = repository.save(
            make_state(1), step=1, metrics={"loss": float("nan")}, metadata={"lr": 0.5}, tags=("v1",)
        )
        repository.save(make_state(2), step=2, message="second")
        assert first.id
    return tmp_path / "store"


def described(path: Path, **options: Any) -> dict[str, Any]:
    """Always JSON, and never anything written."""
    before = path.read_bytes(), path.stat().st_mtime_ns, sorted(path.parent.iterdir())
    found = dump(path, **options)
    assert (path.read_bytes(), path.stat().st_mtime_ns, sorted(path.parent.iterdir())) == before
    return json.loads(json.dumps(found, allow_nan=False))


def a_pack(store: Path) -> Path:
    return min((store / "packs").glob("*/*.pack"))


def a_snapshot(store: Path, step: int = 1) -> Path:
    with castore.open(store) as repository:
        return store / "snapshots" / repository.snapshot(f"main@{step}").id


def damage(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x20
    path.write_bytes(data)


# ---- whole files -----------------------------------------------------------------------------------------------------


def test_every_file_of_a_repository_is_described_without_a_problem(store: Path) -> None:
    kinds = {}
    for path in store.rglob("*"):
        if path.is_file():
            found = described(path)
            assert found["problems"] == [], path
            assert found["bytes"] == path.stat().st_size
            kinds[str(path.relative_to(store)).split("/")[0]] = found["kind"]
    assert kinds.pop("gc", "reserve") == "reserve"
    assert kinds.pop(".lock") == "lock"
    assert kinds == {"config": "config", "packs": "pack", "snapshots": "snapshot", "refs": "ref", "cache": "index"}


def test_a_pack_shows_header_trailer_and_records(store: Path) -> None:
    path = a_pack(store)
    found = described(path)
    assert found["header"]["state"] == found["trailer"]["state"] == found["trailer"]["table"] == "ok"
    assert found["header"]["pack"] == found["trailer"]["pack"] == path.stem
    assert found["records_from"] == "table"
    assert found["record_count"] == found["trailer"]["row_count"] == len(found["records"])
    assert {record["kind"] for record in found["records"]} == {"leaf", "part"}
    assert found["gaps"] == []


def test_a_snapshot_shows_its_fields(store: Path) -> None:
    path = a_snapshot(store)
    found = described(path)
    assert found["snapshot"] == path.name
    fields = found["fields"]
    assert (fields["step"], fields["branch"], fields["metadata"]) == (1, "main", {"lr": 0.5})
    assert fields["metrics"] == {"loss": "nan"}
    assert len(fields["parts"]) == fields["part_count"] == 1


def test_a_ref_and_the_config_show_their_fields(store: Path) -> None:
    assert described(store / "refs/tags/v1")["fields"]["name"] == "v1"
    assert described(store / "config")["fields"]["hash"] == "xxh3-128"


def test_leases_and_condemned_sets_are_known(tmp_path: Path) -> None:
    for name, fields in (
        ("a.lease", {"pid": 1, "host": "h", "purpose": "save", "boot": "", "started_ns": 1}),
        ("b.condemned", {"condemned_ns": 1, "packs": []}),
    ):
        path = tmp_path / name
        path.write_bytes(encode_text_file(fields))
        assert (described(path)["kind"], described(path)["problems"]) == (path.suffix[1:], [])


def test_a_file_copied_out_and_renamed_is_known_by_its_first_bytes(store: Path, tmp_path: Path) -> None:
    for source, kind in ((a_pack(store), "pack"), (a_snapshot(store), "snapshot"), (store / "config", "config")):
        copy = tmp_path / "renamed.bin"
        shutil.copy(source, copy)
        assert described(copy)["kind"] == kind


def test_records_beyond_the_limit_are_counted(store: Path) -> None:
    found = described(a_pack(store), limit=1)
    assert len(found["records"]) == 1
    assert found["records_left_out"] == found["record_count"] - 1
    assert described(a_pack(store), limit=None)["records_left_out"] == 0


# ---- damaged files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("at", "part"), [(20, "header"), (-20, "trailer"), (-100, "table")])
def test_a_pack_with_damage_outside_its_records_shows_them_all(store: Path, at: int, part: str) -> None:
    whole = described(a_pack(store))
    damage(a_pack(store), at)
    found = described(a_pack(store))
    assert [problem.partition(":")[0] for problem in found["problems"]] == [part]
    assert found["records_from"] == "scan"
    assert found["records"] == whole["records"]
    assert found["gap_count"] == 1  # table and trailer


def test_the_id_width_is_found_without_a_header(tmp_path: Path) -> None:
    with castore.init(tmp_path / "store", hash="blake3") as repository:
        repository.save(make_state(1))
    path = a_pack(tmp_path / "store")
    whole = described(path)
    damage(path, 30)
    assert described(path)["records"] == whole["records"]


def test_a_pack_with_a_damaged_record_header_shows_a_gap(store: Path) -> None:
    path = a_pack(store)
    whole = described(path)
    damage(path, -20)
    first = whole["records"][0]
    damage(path, first["offset"] - 30)
    found = described(path)
    assert found["records"] == whole["records"][1:]
    assert found["gaps"][0]["offset"] == 64


@pytest.mark.parametrize("size", [0, 1, 40, 64, 100, 2000])
def test_a_cut_pack_shows_what_is_left(store: Path, size: int) -> None:
    path = a_pack(store)
    path.write_bytes(path.read_bytes()[:size])
    found = described(path)
    assert found["kind"] == "pack"
    assert found["problems"]


def test_a_damaged_snapshot_shows_unverified_fields(store: Path) -> None:
    path = a_snapshot(store)
    damage(path, -30)
    found = described(path)
    assert found["fields"]["branch"] == "main"
    assert any("not verified" in problem for problem in found["problems"])


def test_a_cut_snapshot_shows_the_fields_before_the_cut(store: Path) -> None:
    path = a_snapshot(store)
    path.write_bytes(path.read_bytes()[:150])
    found = described(path)
    assert found["fields"]["branch"] == "main"
    assert "nonce" not in found["fields"]


def test_a_snapshot_under_another_name_is_told(store: Path) -> None:
    path = a_snapshot(store)
    other = path.with_name("0" * 32)
    path.rename(other)
    assert path.name in described(other)["problems"][0]


def test_a_damaged_ref_shows_unverified_fields(store: Path) -> None:
    path = store / "refs/branches/main"
    data = path.read_bytes().replace(b'"name":"main"', b'"name":"mail"')
    path.write_bytes(data)
    found = described(path)
    assert (found["kind"], found["fields"]["name"]) == ("ref", "mail")
    assert len(found["problems"]) == 2


def test_swapped_refs_are_told(store: Path) -> None:
    shutil.copy(store / "refs/tags/v1", store / "refs/branches/main")
    assert "swapped" in described(store / "refs/branches/main")["problems"][0]


def test_a_config_of_the_future_is_shown_and_told(store: Path) -> None:
    fields = described(store / "config")["fields"]
    (store / "config").write_bytes(encode_text_file(fields | {"format": 7}))
    found = described(store / "config")
    assert found["fields"]["format"] == 7
    assert "format 7" in found["problems"][0]


def test_a_stranger_is_told(tmp_path: Path) -> None:
    path = tmp_path / "holiday.jpg"
    path.write_bytes(b"\xff\xd8\xff and so on")
    found = described(path)
    assert found["kind"] == "unknown"
    assert found["head"].startswith("ffd8ff")
    assert found["problems"]


# ---- no file ---------------------------------------------------------------------------------------------------------


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        dump(tmp_path / "nothing")


def test_a_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a directory"):
        dump(tmp_path)


def test_dump_needs_neither_numpy_nor_torch(store: Path) -> None:
    code = (
        "import sys; from castore.dump import dump; dump(sys.argv[1]); assert not {'numpy', 'torch'} & set(sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(a_pack(store))], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_a_parity_file_is_described_and_its_damage_named(tmp_path: Path) -> None:
    pytest.importorskip("pyeclib")

    with castore.init(tmp_path / "store") as repo:
        repo.save({"x": list(range(1000))})
        repo.add_parity()
    (path,) = (tmp_path / "store").glob("parity/*/*.parity")
    described = dump(path)
    assert (described["kind"], described["problems"]) == ("parity", [])
    assert described["pack"] == path.stem
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert "1 parity cells" in dump(path)["problems"][0]
    path.write_bytes(b"x" * 300)
    assert dump(path)["kind"] == "parity"
    assert dump(path)["problems"]
