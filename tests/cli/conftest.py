"""The command line called in this process, and a small repository to call it on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import castore
from castore.cli.main import cli


@dataclass(frozen=True)
class Outcome:
    """What a command left."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one document on stdout."""
        return json.loads(self.out, parse_constant=_refuse)

    @property
    def lines(self) -> list[str]:
        """The lines of stdout."""
        return self.out.splitlines()


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


Run = Callable[..., Outcome]


@pytest.fixture
def castore_command() -> Run:
    """`castore_command("log", "-n", 1)` in this process, with no repository given."""

    def run(*arguments: object) -> Outcome:
        result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
        assert isinstance(result.exception, SystemExit | None), result.exc_info
        return Outcome(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def run(castore_command: Run, store: Path) -> Run:
    """The same with `-R` of the small repository."""
    return lambda *arguments: castore_command("-R", store, *arguments)


def example_state(step: int) -> dict[str, Any]:
    """Two leaves of several chunks, one that never changes, and values of several kinds."""
    numbers = np.arange(400_000, dtype=np.float32)
    return {
        "model": {"weight": (numbers + step).reshape(400, 1000), "frozen": numbers[::-1].copy(), "bias": np.ones(3)},
        "optimizer": {"state": {0: {"exp_avg": numbers * step}}, "lr": 1e-3},
        "name": "run \x1b[31mred",
        "step": step,
    }


@pytest.fixture(scope="session")
def example_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """main: steps 1, 2, 3 (tag best at 2); exp: step 20, forked from step 1; one orphan of step 99."""
    path = tmp_path_factory.mktemp("example") / "store"
    with castore.init(path) as repo:
        repo.save(example_state(1), step=1, message="first\nsecond line", metrics={"loss": 3.5, "bad": float("nan")})
        repo.branch("exp")
        repo.save(example_state(2), step=2, metadata={"lr": 2e-5}, tags=("best",))
        repo.save(example_state(3), step=3)
        repo.save(example_state(20), branch="exp", step=20)
        repo.save(example_state(99), branch="gone", step=99, parent="main~1")
        repo.delete_branch("gone")
    return path


@pytest.fixture
def store(example_store: Path, tmp_path: Path) -> Path:
    """A copy of the example to do anything to."""
    return Path(shutil.copytree(example_store, tmp_path / "store"))
