"""Runs made from the states of another: the fork of the full fine-tune, and its mixed-precision form."""

from __future__ import annotations

from typing import Any

import torch

from bench.train import loop, minilm

FORK_FROM, FORK_STEPS = 110, 10
"""The fork leaves the full fine-tune at step 110 with another seed and is saved 10 steps later."""


def fork(trunk: loop.State) -> loop.State:
    """The trunk's state at FORK_FROM, trained on for FORK_STEPS with other batches and other dropout."""
    run = minilm.full()
    loop.restore(run, trunk)
    torch.manual_seed(loop.SEED + 1)
    saved: list[loop.State] = []
    loop.train(run, until=[FORK_FROM + FORK_STEPS], save=lambda _, state: saved.append(state))
    return saved[0]


def with_bf16_copy(state: loop.State) -> loop.State:
    """The state as mixed precision keeps it: the fp32 masters and the rounded weights computed with."""
    return {**state, "model_bf16": {name: _rounded(value) for name, value in state["model"].items()}}


def _rounded(value: Any) -> Any:
    return value.to(torch.bfloat16) if torch.is_tensor(value) and value.is_floating_point() else value
