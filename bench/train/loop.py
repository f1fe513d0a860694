"""One training loop for all runs, and what a saved state of it holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

SEED = 20261123
SAVE_STEPS = (100, 101, 110, 120, 220)
"""The saves of every run: 1, 9, 10 and 100 steps after the one before."""
SCHEDULE_STEPS = 1000
WARMUP_STEPS = 20
THREADS = 2
"""Fixed, since the number of threads decides the order of sums and so the last bits of every weight."""

State = dict[str, Any]


@dataclass
class Run:
    """A training run: everything that changes from step to step."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[], torch.Tensor]
    """Draws a batch from the global generator and returns its loss."""
    after_step: Callable[[], None] = lambda: None
    extra: Callable[[], State] = dict
    """What the state holds beside model, optimizer, scheduler, rng and step."""
    clip_norm: float | None = 1.0
    """None where the gradients are sparse: clipping has no kernel for them."""
    scheduler: torch.optim.lr_scheduler.LRScheduler = field(init=False)
    step: int = 0

    def __post_init__(self) -> None:
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, _warm_up_then_decay)


def _warm_up_then_decay(step: int) -> float:
    return min((step + 1) / WARMUP_STEPS, 1.0) * max(0.0, 1.0 - step / SCHEDULE_STEPS)


def begin() -> None:
    """Fix what the numbers of a run depend on; call before its model is made."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(SEED)


def train(run: Run, *, until: Sequence[int], save: Callable[[int, State], None]) -> float:
    """Train to the last of `until` and hand the state of each to `save`; returns the last loss."""
    run.model.train()
    last = float("nan")
    for step in range(run.step + 1, max(until) + 1):
        loss = run.loss()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        if run.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.clip_norm)
        run.optimizer.step()
        run.scheduler.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.after_step()
        run.step, last = step, float(loss.detach())
        if step in until:
            save(step, capture(run))
    return last


def capture(run: Run) -> State:
    """The state after the last step, with the live tensors: write or copy them before the next step."""
    return {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scheduler": run.scheduler.state_dict(),
        "rng": torch.get_rng_state(),
        "step": run.step,
        **run.extra(),
    }


def restore(run: Run, state: State) -> None:
    """Continue from a captured state (of a run without extra state)."""
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.scheduler.load_state_dict(state["scheduler"])
    torch.set_rng_state(state["rng"])
    run.step = state["step"]
