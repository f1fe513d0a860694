"""A history of a hundred saves one step apart: the full fine-tune continued, two of its six layers kept.

Two layers (weights and both moments, 43 MB a state) behave as all six do, and a hundred states of them fit on a disk.
"""

from __future__ import annotations

from collections.abc import Callable

from bench.train import loop, minilm

SAVES = 100
_LAYERS = ("encoder.layer.0.", "encoder.layer.1.")


def continue_from(start: loop.State, save: Callable[[int, loop.State], None]) -> None:
    """Train on from a state of the full fine-tune, saving after each of SAVES steps."""
    run = minilm.full()
    loop.restore(run, start)
    until = range(run.step + 1, run.step + SAVES + 1)
    loop.train(run, until=until, save=lambda step, state: save(step, _two_layers(run, state)))


def _two_layers(run: loop.Run, state: loop.State) -> loop.State:
    numbers = {
        index: name
        for index, (name, _) in enumerate(run.model.named_parameters())
        if any(layer in name for layer in _LAYERS)
    }
    kept = set(numbers.values())
    return {
        "model": {name: tensor for name, tensor in state["model"].items() if name in kept},
        "optimizer": {index: state["optimizer"]["state"][index] for index in numbers},
        "step": state["step"],
    }
