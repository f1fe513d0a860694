"""`castore init`, `castore save` and `castore export`."""

from __future__ import annotations

import itertools
from collections import OrderedDict, namedtuple
from pathlib import Path

import numpy as np
import pytest

import castore
from castore.cli.create import parse_metadata, parse_metrics
from castore.errors import UsageError

torch = pytest.importorskip("torch")


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    path = tmp_path / "empty"
    castore.init(path).close()
    return path


@pytest.fixture
def run(castore_command, empty: Path):
    return lambda *arguments: castore_command("-R", empty, *arguments)


def training_state() -> dict[str, object]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Linear(30, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 20)).sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}


# ---- init ---------------------------------------------------------------------------------------------------


def test_init_makes_a_repository_with_the_options(castore_command, tmp_path: Path) -> None:
    shown = castore_command("init", tmp_path / "a" / "b", "--hash", "blake3", "--compression", "lz4")
    assert (shown.code, shown.out) == (0, f"created {tmp_path}/a/b (blake3, compression lz4)\n")
    with castore.open(tmp_path / "a" / "b") as repo:
        assert (repo.options.hash, repo.options.compression) == ("blake3", "lz4")
    document = castore_command("init", tmp_path / "c", "--json").json
    assert document == {"path": str(tmp_path / "c"), "hash": "xxh3-128", "compression": "auto"}


def test_init_takes_its_place_from_where_other_commands_do(castore_command, tmp_path: Path, monkeypatch) -> None:
    assert castore_command("-R", tmp_path / "a", "init").code == 0
    monkeypatch.setenv("CASTORE_REPO", str(tmp_path / "b"))
    assert castore_command("init").code == 0
    assert (tmp_path / "b" / "config").exists()
    monkeypatch.delenv("CASTORE_REPO")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert castore_command("init").code == 0
    assert castore_command("init").code == 5


def test_init_refuses_what_is_there(castore_command, empty: Path, tmp_path: Path) -> None:
    assert castore_command("init", empty).code == 5
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    assert castore_command("init", tmp_path / "full").code == 2
    assert castore_command("init", tmp_path / "full" / "thesis.tex").code == 2
    assert castore_command("init", tmp_path / "x", "--hash", "md5").code == 2


# ---- save ---------------------------------------------------------------------------------------------------


def test_a_pt_file_is_saved_bit_for_bit_with_its_facts(run, empty: Path, tmp_path: Path) -> None:
    torch.save(training_state(), tmp_path / "s.pt")
    shown = run(
        "save", tmp_path / "s.pt", "--step", 100, "--metric", "loss=1.5", "--meta", "lr=2e-5", "-m", "hello", "-t", "v1"
    )
    assert shown.code == 0, shown.err
    assert "(main, tag v1)" in shown.lines[0]
    with castore.open(empty) as repo:
        snapshot = repo.snapshot("v1")
        assert (snapshot.step, snapshot.metrics, snapshot.metadata) == (100, {"loss": 1.5}, {"lr": 2e-5})
        assert snapshot.message == "hello"
        loaded = repo.load("main")
        again = repo.save(training_state())
    assert again.state_id == snapshot.state_id
    assert loaded["epoch"] == 3


def test_save_to_a_branch_and_from_a_parent(run, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "s.pt")
    ids = [run("save", tmp_path / "s.pt", "--json").json["id"] for _ in range(2)]
    fork = run("save", tmp_path / "s.pt", "-b", "exp", "--parent", "main~1", "--json").json
    assert fork["parents"] == [ids[0]]
    assert fork["branch"] == "exp"
    assert fork["new_bytes"] == 0
    assert fork["seconds"] > 0


def test_a_taken_tag_is_a_conflict_and_nothing_is_saved(run, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "s.pt")
    run("save", tmp_path / "s.pt", "-t", "v1")
    assert run("save", tmp_path / "s.pt", "-t", "v1").code == 5
    assert len(run("log").lines) == 1


def test_a_lost_race_names_the_orphan(run, tmp_path: Path, monkeypatch) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "s.pt")
    run("save", tmp_path / "s.pt")
    monkeypatch.setattr("castore.checkpoint.save.move_branch", lambda *_, **__: False)
    document = run("save", tmp_path / "s.pt", "--json")
    assert document.code == 5
    monkeypatch.undo()
    assert run("branch", "adopted", document.json["error"]["snapshot"]).code == 0


def test_metrics_are_numbers_and_metadata_is_json_or_text() -> None:
    assert parse_metrics(["a=1", "b=-2.5e3", "c=inf", "d= 7"]) == {"a": 1, "b": -2500.0, "c": float("inf"), "d": 7}
    assert parse_metadata(["a=1", "b=x y", 'c={"k": [1]}', "d=", "e=NaN", "f=a=b", "g=true"]) == {
        "a": 1,
        "b": "x y",
        "c": {"k": [1]},
        "d": "",
        "e": "NaN",
        "f": "a=b",
        "g": True,
    }
    for wrong in (["a"], ["=1"], ["a=x"], ["a=1", "a=2"], ["a="]):
        with pytest.raises(UsageError):
            parse_metrics(wrong)


# ---- export -------------------------------------------------------------------------------------------------


def test_an_exported_pt_file_holds_the_state(run, empty: Path, tmp_path: Path) -> None:
    state = training_state()
    with castore.open(empty) as repo:
        repo.save(state)
    assert run("export", "main", tmp_path / "out.pt").code == 0
    loaded = torch.load(tmp_path / "out.pt", weights_only=True)
    assert loaded["epoch"] == 3
    assert torch.equal(loaded["model"]["0.weight"], state["model"]["0.weight"])
    assert loaded["optimizer"]["state"].keys() == state["optimizer"]["state"].keys()
    assert run("export", "main", tmp_path / "part.pt", "--path", "model/0*", "--json").json["format"] == "pt"
    assert set(torch.load(tmp_path / "part.pt", weights_only=True)["model"]) == {"0.weight", "0.bias"}


def test_a_safetensors_file_comes_back_as_it_was(run, tmp_path: Path) -> None:
    reference = pytest.importorskip("safetensors.torch")
    dtypes = [
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.float8_e5m2,
        torch.float8_e4m3fn,
        torch.int16,
        torch.uint16,
        torch.float16,
        torch.bfloat16,
        torch.int32,
        torch.uint32,
        torch.float32,
        torch.complex64,
        torch.float64,
        torch.int64,
        torch.uint64,
    ]
    tensors = {f"layer.{index}.{dtype}": torch.ones(3, 5).to(dtype) for index, dtype in enumerate(dtypes)}
    tensors |= {"empty": torch.zeros(0, 4), "scalar": torch.tensor(2.5), "large": torch.randn(700, 500)}
    reference.save_file(tensors, tmp_path / "in.safetensors", metadata={"format": "pt", "author": "me"})
    assert run("save", tmp_path / "in.safetensors").code == 0
    assert run("export", "main", tmp_path / "out.safetensors").code == 0
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "in.safetensors").read_bytes()


def test_nested_states_are_named_by_their_keys(run, empty: Path, tmp_path: Path) -> None:
    reference = pytest.importorskip("safetensors.torch")
    Pair = namedtuple("Pair", ["left", "right"])  # noqa: PYI024
    shared = torch.arange(6.0)
    state = {
        "model": OrderedDict([("a.b", torch.ones(2)), ("tied", shared), ("tied2", shared), ("view", shared[2:])]),
        "optimizer": {0: {"exp_avg": torch.zeros(2, 3).t()}},
        "list": [torch.tensor(1), Pair(torch.tensor(2), np.arange(3, dtype=">f4"))],
    }
    with castore.open(empty) as repo:
        repo.save(state)
    out = tmp_path / "out.safetensors"
    assert run("export", "main", out).code == 0, run("export", "main", out, "--force").err
    loaded = reference.load_file(out)
    assert set(loaded) == {
        "model.a.b",
        "model.tied",
        "model.tied2",
        "model.view",
        "optimizer.0.exp_avg",
        "list.0",
        "list.1.left",
        "list.1.right",
    }
    assert torch.equal(loaded["model.view"], shared[2:])
    assert loaded["optimizer.0.exp_avg"].shape == (3, 2)
    assert loaded["list.1.right"].tolist() == [0, 1, 2]
    assert run("export", "main", out, "--separator", "/", "--force", "--path", "model").code == 0
    assert set(reference.load_file(out)) == {"model/a.b", "model/tied", "model/tied2", "model/view"}


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"a": torch.ones(2), "lr": 0.1, "name": "x"}, "not lr (float), name (str)"),
        ({"a": torch.eye(2).to_sparse()}, "sparse or quantized"),
        ({"a": torch.ones(2, dtype=torch.complex128)}, "no element type complex128"),
        ({"a": np.array(["x"])}, "no element type str"),
        ({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, "both be called 'a.b'"),
        ({1: torch.ones(1), "1": torch.ones(1)}, "both be called '1'"),
        (torch.ones(2), "without a name"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_safetensors_cannot_hold_is_refused_and_no_file_is_made(
    run, empty: Path, tmp_path: Path, state: object, said: str
) -> None:
    with castore.open(empty) as repo:
        repo.save(state)
    shown = run("export", "main", tmp_path / "out.safetensors")
    assert shown.code == 2
    assert said in shown.err
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_tensors_only_leaves_the_rest_out(run, empty: Path, tmp_path: Path) -> None:
    reference = pytest.importorskip("safetensors.torch")
    with castore.open(empty) as repo:
        repo.save({"a": torch.ones(2), "lr": 0.1, "s": torch.eye(2).to_sparse()})
        repo.save({"lr": 0.1}, branch="none")
    assert run("export", "main", tmp_path / "out.safetensors", "--tensors-only").code == 0
    assert set(reference.load_file(tmp_path / "out.safetensors")) == {"a"}
    assert run("export", "none", tmp_path / "none.safetensors", "--tensors-only").code == 2


def test_a_file_is_overwritten_only_when_asked(run, empty: Path, tmp_path: Path) -> None:
    with castore.open(empty) as repo:
        repo.save({"a": torch.ones(2)})
    for suffix in ("pt", "safetensors"):
        out = tmp_path / f"out.{suffix}"
        out.write_text("precious")
        shown = run("export", "main", out)
        assert (shown.code, out.read_text()) == (5, "precious")
        assert "--force" in shown.err
        assert run("export", "main", out, "--force").code == 0
        assert out.stat().st_size > 60


def test_a_class_that_is_not_here_is_named_or_becomes_a_dict(run, empty: Path, tmp_path: Path) -> None:
    name = next(f"Made{number}" for number in itertools.count())
    Made = namedtuple(name, ["x"])  # noqa: PYI024
    Made.__module__ = "module_that_is_gone"
    import sys
    import types

    module = types.ModuleType("module_that_is_gone")
    setattr(module, name, Made)
    sys.modules["module_that_is_gone"] = module
    with castore.open(empty) as repo:
        repo.save({"p": Made(torch.ones(1))})
    del sys.modules["module_that_is_gone"]
    shown = run("export", "main", tmp_path / "out.pt")
    assert shown.code == 1
    assert "module_that_is_gone" in shown.err
    assert run("export", "main", tmp_path / "out.pt", "--classes-as-dicts").code == 0
    assert torch.load(tmp_path / "out.pt", weights_only=True)["p"].keys() == {"x"}


def test_unknown_suffixes_and_refs_are_refused_before_anything_is_read(run, tmp_path: Path) -> None:
    assert run("export", "main", tmp_path / "out.npz").code == 2
    assert run("export", "main", tmp_path / "out.pt").code == 4
    assert run("export", "main", tmp_path / "missing" / "out.pt").code == 4
