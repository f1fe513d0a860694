"""What the machine and strangers put in the way: a clear error of a few lines, its exit code, and nothing lost."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import castore
from castore.format.textfile import decode_text_file, encode_text_file

PROJECT = Path(__file__).resolve().parent.parent.parent

AS_NOBODY = """
import contextlib, io, os, sys
import contextvars, numpy, numpy.random, random, secrets  # `show` of a value needs numpy
from castore.cli.main import cli

def run(*arguments):
    try:
        cli.main(list(arguments))
    except SystemExit as end:
        return end.code or 0

repo, *arguments = sys.argv[1:]
# Everything that is imported late is imported now: the packages may lie where nobody may read.
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    warm_up = ["log"], ["log", "none"], ["verify"], ["branch", "warm"], ["branch", "-d", "warm"], ["show"]
    for warm in (*warm_up, ["show", "main", "step"]):
        run("-R", repo, *warm)
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
sys.exit(run(*arguments))
"""

WITH_FILE_LIMIT = """
import resource, sys
from castore.cli.main import main
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
main()
"""


def short(outcome) -> bool:
    return outcome.err.startswith("error: ") and len(outcome.err.splitlines()) <= 4 and "Traceback" not in outcome.err


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A file of 4 MB that does not compress."""
    torch = pytest.importorskip("torch")
    torch.save({"w": torch.rand(1_000_000)}, tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


# ---- what is no repository ----------------------------------------------------------------------------------


def test_no_repository(castore_command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for path in ("absent", "file", "file/below", "folder"):
        shown = castore_command("-R", tmp_path / path, "log")
        assert shown.code == 4, path
        assert short(shown)


def test_a_foreign_directory_with_a_config_file(castore_command, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "config").write_text("[core]\n\tbare = true\n")
    shown = castore_command("-R", tmp_path, "log")
    assert shown.code == 3
    assert short(shown)
    monkeypatch.chdir(tmp_path)
    assert castore_command("log").code == 4


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "huge", "gone"])
def test_a_damaged_config(castore_command, store: Path, damage: str) -> None:
    config = store / "config"
    data = config.read_bytes()
    if damage == "gone":
        config.unlink()
    else:
        changed = {"cut": data[:-5], "flipped": b"{" + data[2:], "empty": b"", "huge": data * 100_000}
        config.write_bytes(changed[damage])
    shown = castore_command("-R", store, "log")
    assert shown.code == 3
    assert short(shown)


def test_a_repository_of_a_newer_format(castore_command, store: Path) -> None:
    fields = decode_text_file((store / "config").read_bytes(), name="config")
    (store / "config").write_bytes(encode_text_file(fields | {"format": 99}))
    shown = castore_command("-R", store, "log")
    assert shown.code == 8
    assert "install a newer castore" in shown.err
    assert short(shown)


def test_a_repository_with_a_feature_that_this_castore_lacks(castore_command, store: Path, weights: Path) -> None:
    fields = decode_text_file((store / "config").read_bytes(), name="config")
    fields["features"]["write"] = ["sharding-2"]
    (store / "config").write_bytes(encode_text_file(fields))
    assert castore_command("-R", store, "log").code == 0
    shown = castore_command("-R", store, "save", weights)
    assert shown.code == 8
    assert "sharding-2" in shown.err
    fields["features"]["read"] = ["sharding-2"]
    (store / "config").write_bytes(encode_text_file(fields))
    assert castore_command("-R", store, "log").code == 8


@pytest.mark.parametrize(
    "ref",
    ["mian", "", "abc", "ffff", "main~99", "main@7", "main~1@", "--", "../config", "heads/none", "a" * 5000, "ä\x1b"],
)
def test_an_unknown_ref(run, ref: str) -> None:
    shown = run("log", "--", ref)
    assert shown.code in (2, 4)
    assert short(shown)
    assert len(shown.err) < 6000


def test_an_ambiguous_ref_lists_what_it_may_mean(run, store: Path) -> None:
    names = [path.name for path in (store / "snapshots").iterdir()]
    other = names[0][:8] + ("0" if names[0][8] != "0" else "1") + names[0][9:]
    (store / "snapshots" / other).write_bytes(b"x")
    shown = run("log", names[0][:8])
    assert shown.code == 4
    assert names[0][:16] in shown.err


def test_snapshots_of_a_stranger_cannot_name_files_outside(run, store: Path) -> None:
    (store / "refs" / "branches" / "%2E%2E%2Fescape").write_bytes(b"x")
    shown = run("branch")
    assert shown.code == 3
    assert "damaged" in shown.out


# ---- what the system refuses --------------------------------------------------------------------------------


def run_as_nobody(warm: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    return subprocess.run(
        [sys.executable, "-c", AS_NOBODY, str(warm), *map(str, arguments)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_directory_without_permission(store: Path, castore_command) -> None:
    with tempfile.TemporaryDirectory() as closed:
        Path(closed).chmod(0o700)
        for arguments in (["-R", closed, "log"], ["-R", f"{closed}/store", "log"], ["init", f"{closed}/new"]):
            result = run_as_nobody(store, *arguments)
            assert result.returncode == 6, result.stderr
            assert result.stderr.startswith("error: ")
            assert len(result.stderr.splitlines()) == 1


def test_a_repository_that_may_be_read_but_not_written(example_store: Path, store: Path, castore_command) -> None:
    import shutil

    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        readable = Path(shutil.copytree(example_store, Path(folder) / "store"))
        for path in (readable, *readable.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        for arguments in (["log"], ["show", "main", "step"], ["verify"], ["du"]):
            result = run_as_nobody(store, "-R", readable, *arguments)
            assert result.returncode == 0, (arguments, result.stderr)
        for arguments in (["branch", "new"], ["tag", "new"], ["branch", "-d", "exp"]):
            result = run_as_nobody(store, "-R", readable, *arguments)
            assert result.returncode == 6, (arguments, result.stderr)
            assert result.stderr.startswith("error: ")
        assert castore_command("-R", readable, "branch").out.count("\n") == 3


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[object]:
    """A function that mounts; the test is skipped where that is not allowed."""
    points: list[Path] = []

    def mounted(*arguments: str) -> Path:
        point = tmp_path / f"mount{len(points)}"
        point.mkdir()
        result = subprocess.run(["mount", *arguments, str(point)], capture_output=True, text=True, check=False)
        if result.returncode:
            pytest.skip(f"cannot mount here: {result.stderr.strip()}")
        points.append(point)
        return point

    yield mounted
    for point in reversed(points):
        subprocess.run(["umount", "--lazy", str(point)], check=False)


def test_a_read_only_mount(mount, store: Path, weights: Path, castore_command) -> None:
    point = mount("--bind", "-o", "ro", str(store))
    if os.access(point, os.W_OK):
        subprocess.run(["mount", "-o", "remount,bind,ro", str(point)], check=True)
    for arguments in (["log"], ["show", "main", "model/weight"], ["verify", "--data"], ["du"], ["diff"]):
        assert castore_command("-R", point, *arguments).code == 0, arguments
    for arguments in (["save", weights], ["branch", "new"], ["tag", "new"], ["init", point / "x"]):
        shown = castore_command("-R", point, *arguments)
        assert shown.code == 6, (arguments, shown.err)
        assert short(shown)
    assert castore_command("-R", store, "export", "main", point / "x.pt").code == 6


@pytest.mark.filterwarnings("ignore::castore.LowSpaceWarning")  # it is told, and then it is so
def test_a_full_disk(mount, weights: Path, castore_command, tmp_path: Path) -> None:
    point = mount("-t", "tmpfs", "-o", "size=2m", "tmpfs")
    with castore.init(point / "store") as repo:
        repo.save({"small": np.arange(1000)}, step=1)
    shown = castore_command("-R", point / "store", "save", weights)
    assert shown.code == 7
    assert short(shown)
    assert castore_command("-R", point / "store", "log").out.count("step 1") == 1
    assert castore_command("-R", point / "store", "verify", "--data").code == 0
    with castore.init(tmp_path / "other") as repo:
        repo.save({"w": np.random.default_rng(0).random(1_000_000)})
    shown = castore_command("-R", tmp_path / "other", "export", "main", point / "big.pt")
    assert shown.code == 7
    assert short(shown)
    assert sorted(path.name for path in point.iterdir()) == ["store"]


def test_a_limit_on_the_size_of_files(store: Path, weights: Path, castore_command, tmp_path: Path) -> None:
    before = castore_command("-R", store, "log", "--json").json
    out = tmp_path / "out.safetensors"
    for arguments in (["save", weights], ["export", "main", out, "--tensors-only"]):
        command = [sys.executable, "-c", WITH_FILE_LIMIT, "-R", str(store), *map(str, arguments)]
        result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
        assert result.returncode == 7, result.stderr
        assert result.stderr.startswith("error: ")
        assert len(result.stderr.splitlines()) == 1
    assert castore_command("-R", store, "log", "--json").json == before
    assert castore_command("-R", store, "verify", "--data").code == 0
    assert not out.exists()
