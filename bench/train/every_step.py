"""A history of a hundred saves one step apart: the full fine-tune continued, a third of its state kept.

Two of the six layers and every third row of the word embedding (weights and both moments, 90 MB a state) behave as all
of them do, and a hundred states of them fit on a disk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.train import loop, minilm

SAVES = 100
_LAYERS = ("encoder.layer.0.", "encoder.layer.1.")
_EMBEDDING = "word_embeddings."
_ROWS = slice(None, None, 3)


def continue_from(start: loop.State, save: Callable[[int, loop.State], None]) -> None:
    """Train on from a state of the full fine-tune, saving after each of SAVES steps."""
    run = minilm.full()
    loop.restore(run, start)
    until = range(run.step + 1, run.step + SAVES + 1)
    loop.train(run, until=until, save=lambda step, state: save(step, _third(run, state)))


def _third(run: loop.Run, state: loop.State) -> loop.State:
    model, optimizer = {}, {}
    for index, (name, _) in enumerate(run.model.named_parameters()):
        if any(layer in name for layer in _LAYERS):
            model[name], optimizer[index] = state["model"][name], state["optimizer"]["state"][index]
        elif _EMBEDDING in name:
            model[name] = _rows(state["model"][name])
            optimizer[index] = {key: _rows(value) for key, value in state["optimizer"]["state"][index].items()}
    return {"model": model, "optimizer": optimizer, "step": state["step"]}


def _rows(value: Any) -> Any:
    return value[_ROWS].clone() if isinstance(value, torch.Tensor) and value.ndim == 2 else value
