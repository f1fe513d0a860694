"""The wheel holds the package and nothing else, and works in an environment with only its dependencies."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Mapping
from email import message_from_string
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

PROJECT = Path(__file__).resolve().parent.parent
SHIPPED = ("castore", "pyproject.toml", "setup.py", "README.md", "LICENSE")

SAVE_AND_LOAD = """
import sys
sys.modules["torch"] = None  # importing it fails: the core must do without
import numpy as np, castore
repo_path, package_root = sys.argv[1:]
assert castore.__file__.startswith(package_root), castore.__file__
state = {"weights": np.arange(300_000, dtype=np.float32), "step": 7, "name": "run"}
with castore.init(repo_path) as repo:
    repo.save(state, branch="main", step=7)
loaded = castore.load(repo_path)
assert loaded["weights"].tobytes() == state["weights"].tobytes() and loaded["step"] == 7
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["compiler", "no compiler"])
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools writes into the folder that it builds from."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    compiler = {"CC": "/bin/false"} if request.param == "no compiler" else {}
    for name in SHIPPED:
        if (PROJECT / name).is_dir():
            shutil.copytree(PROJECT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(PROJECT / name, source / name)
    for decoy in ("tests", "tools", "bench", "docs"):
        (source / decoy).mkdir()
        (source / decoy / "__init__.py").touch()
    run(
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(target),
        str(source),
        settings=compiler,
    )
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment with the wheel installed; dependencies are borrowed from this one.

    A line of a `.pth` file adds a folder to the end of the path without reading the `.pth` files in it, so an
    editable install of castore in the lending environment stays invisible.
    """
    folder = tmp_path_factory.mktemp("clean") / "env"
    venv.create(folder, with_pip=False, symlinks=True)
    interpreter = folder / "bin" / "python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(interpreter),
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        str(wheel),
    )
    site_packages = installed_in(interpreter)
    (site_packages / "borrowed.pth").write_text(f"{Path(np.__file__).parent.parent}\n")
    return interpreter


def test_the_wheel_holds_the_package_the_license_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"castore"}
    assert "castore/py.typed" in names
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    sources = {str(path.relative_to(PROJECT)) for path in (PROJECT / "castore").rglob("*.py")}
    assert sources - set(names) == set()


def test_the_wheel_without_a_compiler_is_whole_but_for_what_is_compiled(
    wheel: Path, request: pytest.FixtureRequest
) -> None:
    compiled = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")}
    both = {"castore/codec/_kernel.abi3.so", "castore/tensors/_memory.abi3.so"}
    assert compiled == (set() if "no compiler" in request.node.name else both)


def test_the_metadata_says_what_is_needed(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = message_from_string(archive.read(name).decode())
    required = {
        line.split(">")[0].split("=")[0] for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line
    }
    assert required == {"click", "lmdb", "lz4", "msgpack", "numpy", "rich", "xxhash", "zstandard"}
    assert {"bench", "blake3", "demo", "dev", "parity", "torch"} == set(metadata.get_all("Provides-Extra", []))
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"


def test_the_lower_bounds_are_the_versions_that_are_tested() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    needed, extras = project["dependencies"], project["optional-dependencies"]
    lines = (PROJECT / "constraints-lowest.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if not line.startswith("#"))
    lists = (needed, *extras.values())
    bounds = [requirement.split(">=") for requirements in lists for requirement in requirements if ">=" in requirement]
    assert {requirement.split(">=")[0] for requirement in needed} < tested.keys() <= {name for name, _ in bounds}
    for name, bound in bounds:
        assert tested.get(name, bound) in {bound, f"{bound}.0"}, name


def test_a_clean_environment_saves_and_loads_without_torch(python: Path, tmp_path: Path) -> None:
    run(str(python), "-c", SAVE_AND_LOAD, str(tmp_path / "store"), str(installed_in(python)), folder=tmp_path)


def test_the_castore_command_works_in_a_clean_environment(python: Path, tmp_path: Path) -> None:
    command = str(python.with_name("castore"))
    repo = str(tmp_path / "store")
    assert "0.1.0" in run(command, "--version", folder=tmp_path)
    run(str(python), "-c", SAVE_AND_LOAD, repo, str(installed_in(python)), folder=tmp_path)
    assert "7" in run(command, "-R", repo, "log", folder=tmp_path)
    run(command, "-R", repo, "verify", "--data", folder=tmp_path)


def installed_in(interpreter: Path) -> Path:
    return Path(run(str(interpreter), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())


def run(*command: str, folder: Path | None = None, settings: Mapping[str, str] = MappingProxyType({})) -> str:
    """Standard output of a command that must succeed, with nothing of this project on its import path."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "CASTORE"))}
    result = subprocess.run(
        command, cwd=folder, env=environment | settings, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout
