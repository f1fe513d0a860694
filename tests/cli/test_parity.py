"""`castore parity`."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("pyeclib")


def test_add_status_remove(run, store: Path) -> None:
    packs = len(list(store.glob("packs/*/*.pack")))
    assert run("parity", "status").lines[-1] == f"0 of {packs} packs protected"
    added = run("parity", "add", "--overhead", 25)
    assert added.code == 0
    assert added.lines[-1].startswith(f"added parity to {packs} packs, ")
    again = run("parity", "add", "--json").json
    assert again["added"] == []
    assert again["kept_count"] == packs
    assert run("parity", "status", "--data").lines[-1] == f"{packs} of {packs} packs protected"
    assert run("verify", "--data").code == 0
    removed = run("parity", "remove")
    assert removed.lines[-1].startswith(f"removed {packs} parity files, ")


def test_status_tells_what_is_lost_and_exits_with_3(run, store: Path) -> None:
    run("parity", "add")
    pack = max(store.glob("packs/*/*.pack"), key=lambda path: path.stat().st_size)
    data = bytearray(pack.read_bytes())
    data[1000] ^= 1
    pack.write_bytes(data)
    assert run("parity", "status").code == 0
    shown = run("parity", "status", "--data")
    assert shown.code == 3
    assert "1 cell lost, can be restored" in shown.out
    document = run("parity", "status", "--data", "--json").json
    assert not document["ok"]
    assert sum(found["lost_cells"] for found in document["packs"]) == 1


def test_rotten_parity_is_added_again(run, store: Path) -> None:
    run("parity", "add")
    path = max(store.glob("parity/*/*"), key=lambda path: path.stat().st_size)
    path.write_bytes(b"torn")
    added = run("parity", "add", "--data").lines[-1]
    assert added.startswith("added parity to 1 pack, ")
    assert "to 1 of them anew: theirs was rotten" in added
    assert run("parity", "status", "--data").code == 0


def test_wrong_usage_exits_with_2(run) -> None:
    for arguments in (
        ("parity",),
        ("parity", "fix"),
        ("parity", "remove", "--data"),
        ("parity", "status", "--overhead", 5),
    ):
        assert run(*arguments).code == 2
    assert run("parity", "add", "--overhead", 0).code == 2
