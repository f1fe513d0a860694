"""Build a small whole repository, and copies of it that are broken on purpose, each in one way.

    python -m tools.make_golden OUT       OUT/whole, whole-torch, whole-runs, OUT/broken/<case>, OUT/cases.json

Each case (golden_cases.py) says what castore must answer: the error of `open`, `load` and `save`, the kinds of problems
that `verify` finds without and with `data`, and exactly which leaves of which snapshots are lost. tests/test_golden.py
builds every case and asks. These bytes are made afresh each time, by the writer of today; those of released versions
are checked in (tests/golden).

Pack ids, nonces and the repository id are random by design; the clock and the contents are fixed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from castore.api import Repository
from castore.options import RepositoryOptions
from castore.repository import create
from tools.golden_cases import CASES, Case
from tools.golden_workshop import FIRST_NS, Workshop


class SteppingClock:
    """A clock of its own."""

    def __init__(self) -> None:
        self._now_ns = FIRST_NS

    def __call__(self) -> int:
        self._now_ns += 60 * 10**9
        return self._now_ns


def make_state(step: int) -> dict[str, Any]:
    """A training state of Python and numpy values: arrays, differences, shared memory, spilled text, inline values."""
    rng = np.random.default_rng(step)
    buffer = np.random.default_rng(100).standard_normal(30_000, dtype=np.float32)
    weight = rng.standard_normal((100, 500), dtype=np.float32)
    return {
        "model": {
            "weight": weight,
            "bias": np.full(10, step, dtype=np.float32),
            "frozen": np.random.default_rng(101).standard_normal(50_000, dtype=np.float32),
            "drift": np.random.default_rng(102).standard_normal(20_000, dtype=np.float32) * np.float32(1 + step / 1e6),
        },
        "optimizer": {
            "state": {0: {"step": step, "exp_avg": np.zeros(100_000, dtype=np.float32)}},
            "lr": 0.1 / step,
        },
        "tied": weight,
        "tally": rng.integers(0, 2**31, 50_000, dtype=np.int32),
        "window": buffer[10:20_000],
        "buffer": buffer,
        "vocabulary": "the quick brown fox " * 500,
        "history": [(index, 1.0 / (index + 1)) for index in range(step)],
    }


def make_torch_state(step: int) -> dict[str, Any]:
    """The same in torch, with the kinds of tensors that numpy has not."""
    import torch

    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(300, 1000, generator=generator)
    frozen = torch.randn(60_000, generator=torch.Generator().manual_seed(0))
    return {
        "model": {
            "weight": torch.nn.Parameter(weight),
            "half": weight.to(torch.bfloat16),
            "frozen": frozen,
            "corner": frozen[:2000].view(40, 50),
            "transposed": weight[:, :400].T,
        },
        "sparse": torch.eye(400).to_sparse(),
        "rng": torch.Generator().manual_seed(step).get_state(),
        "step": step,
    }


def build_whole(
    root: Path, *, make: Callable[[int], Any] = make_state, options: RepositoryOptions | None = None
) -> None:
    """Three snapshots on `main` (the first tagged `v1`), one on `side`, and an orphan of step 99."""
    with Repository(root, create(root, options or RepositoryOptions(), clock=SteppingClock())) as repo:
        for step in (1, 2, 3):
            repo.save(make(step), step=step, metrics={"loss": 1.0 / step}, tags=("v1",) if step == 1 else ())
        repo.branch("side", at="main~1")
        repo.save(make(20), branch="side", step=20, metadata={"why": "a fork"}, message="on the side")
        repo.save(make(99), branch="lost", step=99)
        repo.delete_branch("lost")


def build_broken(broken: Case, whole: Path, root: Path, *, keep_index: bool = False) -> None:
    """Copy a whole repository and damage the copy; without its index unless it is the index that is damaged."""
    shutil.copytree(whole, root)
    workshop = Workshop(root)
    broken.damage(workshop)
    if not broken.keeps_index and not keep_index:
        workshop.forget_index()


WHOLE: dict[str, Callable[[Path], None]] = {
    "whole": build_whole,
    "whole-torch": lambda root: build_whole(root, make=make_torch_state),
    "whole-runs": lambda root: build_whole(root, options=RepositoryOptions(compression="none")),
}


def source_of(broken: Case) -> str:
    """The whole repository that a case breaks."""
    return "whole-runs" if broken.runs else "whole"


def describe(broken: Case) -> dict[str, Any]:
    """A case as JSON."""
    return {
        "ref": broken.ref,
        "opens": broken.opens.__name__ if broken.opens else None,
        "loads": broken.loads.__name__ if broken.loads else None,
        "saves": broken.saves.__name__ if broken.saves else None,
        "structure": sorted(broken.structure),
        "data": sorted(broken.data),
        "lost": {str(step): list(leaves) for step, leaves in broken.lost.items()},
    }


def main() -> int:
    """Build everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a directory that does not exist yet")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True)
    for name, build in WHOLE.items():
        build(out / name)
    for broken in CASES:
        whole = out / source_of(broken)
        build_broken(broken, whole, out / "broken" / broken.name)
    (out / "cases.json").write_text(json.dumps({broken.name: describe(broken) for broken in CASES}, indent=2) + "\n")
    print(f"{len(WHOLE)} whole and {len(CASES)} broken repositories in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
