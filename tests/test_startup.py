"""Commands answer at once: what they do not need is not imported. `python -m bench.startup` measures the time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import castore

WITHOUT_TENSORS = [
    ["log"],
    ["show", "main"],
    ["diff", "main", "--no-values"],
    ["du"],
    ["verify"],
    ["verify", "--data"],
    ["branch"],
    ["tag"],
    ["reindex"],
    ["gc"],
    ["gc", "--dry-run"],
]

RUN_AND_TELL_MODULES = """
import sys
from castore.cli.main import main
try:
    main()
except SystemExit as exit:
    code = exit.code or 0
else:
    code = 0
heavy = {"torch", "safetensors", "blake3", "IPython", "hypothesis"} & set(sys.modules)
print(f"\\n{code} {sorted(heavy)}", file=sys.stderr)
"""


@pytest.fixture(scope="module")
def repo_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("startup") / "store"
    with castore.init(path) as repo:
        for step in (1, 2):
            repo.save({"weights": np.full(1000, step, dtype=np.float32), "step": step}, branch="main", step=step)
    return path


@pytest.mark.parametrize("arguments", WITHOUT_TENSORS, ids=" ".join)
def test_a_command_that_needs_no_tensors_does_not_import_torch(repo_path: Path, arguments: list[str]) -> None:
    result = run_python("-c", RUN_AND_TELL_MODULES, *arguments, repo=repo_path)
    assert result.stderr.splitlines()[-1] == "0 []", result.stderr


def test_importing_castore_imports_no_heavy_module() -> None:
    code = "import sys, castore, json; print(json.dumps(sorted(sys.modules)))"
    modules = set(json.loads(run_python("-c", code).stdout))
    assert modules & {"torch", "safetensors", "blake3", "rich", "click"} == set()


@pytest.mark.parametrize("arguments", [["--version"], ["-h"], ["log"]], ids=" ".join)
def test_a_command_that_answers_at_once_imports_little(repo_path: Path, arguments: list[str]) -> None:
    code = RUN_AND_TELL_MODULES.replace(
        '"torch",', '"torch", "numpy", "rich", "lmdb", "zstandard", "lz4", "asyncio", "multiprocessing",'
    )
    result = run_python("-c", code, *arguments, repo=repo_path)
    assert result.stderr.splitlines()[-1] == "0 []", result.stderr


def run_python(*arguments: str, repo: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ) | ({"CASTORE_REPO": str(repo)} if repo else {})
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
