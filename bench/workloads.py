"""The workloads: what is saved, in which order, and what is read back.

    name                states                                                    saves
    full_finetune       all-MiniLM-L6-v2, every weight trained, AdamW lr 2e-5     1, 9, 10, 100 steps apart
    bf16_copy           the same with a bf16 copy of the weights                  the same
    frozen_body         last two of six layers trained, the rest frozen           the same
    lora                rank-8 adapters on query and value, base frozen           the same
    gpt_scratch         small byte-level GPT from scratch, lr 3e-4, with EMA      the same
    sparse_embeddings   hashed n-gram table under SparseAdam                      the same
    decayed_embeddings  the same table under AdamW: moments of all rows decay     the same
    resave              full_finetune                                             one state twice
    fork                full_finetune to step 110, then ten steps of a fork       on the fork
    load_all            full_finetune                                             one; all of it is read
    load_touch          full_finetune                                             one; all is read, every page touched
    load_one_leaf       full_finetune                                             one; one weight is read
    smoke               a synthetic state of 4 MB, to try the harness itself      only when named

Every save is waited for before the next begins. Every load begins with opening the store, as after a crash.
What was read is compared with what was saved, byte by byte; the comparison is not timed.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from bench import measure
from bench.peers import Contestant
from bench.states import EQUALITIES, Equality, LeafPath, State, compare, tensors
from bench.train import cache

LEAF: LeafPath = ("model", "encoder.layer.3.intermediate.dense.weight")
"""2.4 MB of the 271 MB of a full fine-tune."""
SMOKE_SHAPE = (512, 1024)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Save:
    """One save, as measured."""

    step: int
    gap_steps: int
    """Steps since the save before; 0 for the first save and for the same state again."""
    call_s: float
    durable_s: float
    stored_bytes: int
    """Growth of the directory, caches and indexes included."""
    written_bytes: int | None
    """What the kernel counted as written for this process."""
    peak_bytes: int
    """Highest resident size during the save, above that before the store was opened."""


@dataclass(frozen=True, slots=True)
class Read:
    """Opening the store and reading from it, as measured."""

    seconds: float
    peak_bytes: int
    """Highest resident size, the result included, above that before the store was opened."""
    disk_bytes: int | None
    """What the kernel read from the disk for this process; only telling with a cold cache."""


@dataclass(slots=True)
class Trial:
    """One contestant on one workload, once."""

    saves: list[Save] = field(default_factory=list)
    warm: Read | None = None
    cold: Read | None = None
    fork_s: float | None = None
    equal: Equality = "yes"
    error: str = ""

    def check(self, equality: Equality) -> None:
        """Keep the worst verdict."""
        self.equal = max(self.equal, equality, key=EQUALITIES.index)


@dataclass(frozen=True, slots=True)
class Step:
    """A state to save and the step it was captured at."""

    step: int
    state: State


@dataclass(slots=True)
class Probe:
    """Measures one contestant in one directory; made before the contestant opens its store."""

    contestant: Contestant
    directory: Path
    cold: bool
    """Also read with the files dropped from the page cache."""
    warm_bytes: int
    """Memory to touch before each measurement; see `measure.warm_memory`."""
    base_bytes: int = field(default_factory=measure.resident_bytes)

    def save(self, target: Step, *, previous: Step | None = None) -> Save:
        bytes_before = measure.directory_bytes(self.directory)
        written_before = measure.disk_written_bytes()
        measure.warm_memory(self.warm_bytes)
        with measure.PeakMemory() as memory:
            call_s, durable_s = measure.save_seconds(
                lambda: self.contestant.save(target.state, step=target.step), self.contestant.wait
            )
        return Save(
            step=target.step,
            gap_steps=target.step - previous.step if previous else 0,
            call_s=call_s,
            durable_s=durable_s,
            stored_bytes=measure.directory_bytes(self.directory) - bytes_before,
            written_bytes=_difference(measure.disk_written_bytes(), written_before),
            peak_bytes=memory.peak_bytes - self.base_bytes,
        )

    def read(self, call: Callable[[], T], *, cold: bool) -> tuple[T, Read]:
        """Close the store, open it again and call; with `cold`, from the disk instead of the page cache."""
        self.contestant.close()
        if cold:
            measure.forget_pages(self.directory)
        read_before = measure.disk_read_bytes()
        results: list[T] = []

        def open_and_call() -> None:
            self.contestant.open()
            results.append(call())

        measure.warm_memory(self.warm_bytes)
        with measure.PeakMemory() as memory:
            seconds = measure.timed(open_and_call)
        disk_bytes = _difference(measure.disk_read_bytes(), read_before)
        return results[0], Read(seconds, memory.peak_bytes - self.base_bytes, disk_bytes)


def history(steps: Sequence[Step], probe: Probe, trial: Trial) -> None:
    """Save every state; read the newest; check the oldest too."""
    previous: Step | None = None
    for target in steps:
        trial.saves.append(probe.save(target, previous=previous))
        previous = target
    _load(steps[-1], len(steps) - 1, probe, trial)
    trial.check(compare(probe.contestant.load(0), steps[0].state))


def resave(steps: Sequence[Step], probe: Probe, trial: Trial) -> None:
    """Save one state twice; the second save is the measured one."""
    trial.saves = [probe.save(steps[0]), probe.save(steps[0])]
    _load(steps[0], 1, probe, trial)


def fork(steps: Sequence[Step], probe: Probe, trial: Trial) -> None:
    """Save the trunk, leave it at its last state, and save the state that was trained from there."""
    *trunk, forked = steps
    previous: Step | None = None
    for target in trunk:
        trial.saves.append(probe.save(target, previous=previous))
        previous = target
    trial.fork_s = measure.timed(lambda: probe.contestant.fork(len(trunk) - 1))
    trial.saves.append(probe.save(forked, previous=previous))
    _load(forked, len(trunk), probe, trial)
    trial.check(compare(probe.contestant.load(len(trunk) - 1), trunk[-1].state))


def load_all(steps: Sequence[Step], probe: Probe, trial: Trial) -> None:
    """Save one state; read all of it."""
    trial.saves.append(probe.save(steps[0]))
    _load(steps[0], 0, probe, trial)


def load_touch(steps: Sequence[Step], probe: Probe, trial: Trial) -> None:
    """Save one state; read all of it and touch every page, so that those who map their file read it too."""
    trial.saves.append(probe.save(steps[0]))
    for cold in (False, True) if probe.cold else (False,):
        state, read = probe.read(lambda: _touched(probe.contestant.load(0)), cold=cold)
        trial.check(compare(state, steps[0].state))
        del state
        _keep(read, trial, cold=cold)


def load_one_leaf(steps: Sequence[Step], probe: Probe, trial: Trial) -> None:
    """Save one state; read one weight matrix of it."""
    trial.saves.append(probe.save(steps[0]))
    expected = {"leaf": steps[0].state[str(LEAF[0])][LEAF[1]]}
    for cold in (False, True) if probe.cold else (False,):
        leaf, read = probe.read(lambda: probe.contestant.load_leaf(0, LEAF), cold=cold)
        trial.check(compare({"leaf": leaf}, expected))
        del leaf
        _keep(read, trial, cold=cold)


@dataclass(frozen=True, slots=True)
class Workload:
    """States and what is done with them."""

    states: Callable[[Path], list[Step]]
    """Reads the states of its run from a cache directory, training first where they are missing."""
    measured: Callable[[Sequence[Step], Probe, Trial], None]
    trunk_saves: int = 1
    """Saves before those that count as later saves."""


def _run(name: str, *, first: int | None = None) -> Callable[[Path], list[Step]]:
    def read(directory: Path) -> list[Step]:
        return [Step(saved.step, saved.load()) for saved in cache.ensure(name, directory)[:first]]

    return read


def _forked(directory: Path) -> list[Step]:
    trunk = _run("full_finetune", first=3)(directory)
    return trunk + _run("full_finetune_fork")(directory)


def _smoke(_: Path) -> list[Step]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(SMOKE_SHAPE, generator=generator) for _ in range(2)]
    moved = [w + 1e-5 * torch.randn(SMOKE_SHAPE, generator=generator) for w in weights]
    return [_smoke_step(1, weights), _smoke_step(2, moved)]


def _smoke_step(step: int, weights: list[torch.Tensor]) -> Step:
    state = {
        "model": {"weight": weights[0]},
        "optimizer": {
            "state": {0: {"exp_avg": weights[1], "step": torch.tensor(float(step))}},
            "lr": (0.1, 1),
        },
        "step": step,
    }
    return Step(step, state)


WORKLOADS: dict[str, Workload] = {
    "full_finetune": Workload(_run("full_finetune"), history),
    "bf16_copy": Workload(_run("bf16_copy"), history),
    "frozen_body": Workload(_run("frozen_body"), history),
    "lora": Workload(_run("lora"), history),
    "gpt_scratch": Workload(_run("gpt_scratch"), history),
    "sparse_embeddings": Workload(_run("sparse_embeddings"), history),
    "decayed_embeddings": Workload(_run("decayed_embeddings"), history),
    "resave": Workload(_run("full_finetune", first=1), resave),
    "fork": Workload(_forked, fork, trunk_saves=3),
    "load_all": Workload(_run("full_finetune", first=1), load_all),
    "load_touch": Workload(_run("full_finetune", first=1), load_touch),
    "load_one_leaf": Workload(_run("full_finetune", first=1), load_one_leaf),
    "smoke": Workload(_smoke, history),
}
DEFAULT_WORKLOADS = tuple(name for name in WORKLOADS if name != "smoke")


def _load(target: Step, index: int, probe: Probe, trial: Trial) -> None:
    for cold in (False, True) if probe.cold else (False,):
        state, read = probe.read(lambda: probe.contestant.load(index), cold=cold)
        trial.check(compare(state, target.state))
        del state
        _keep(read, trial, cold=cold)


def _touched(state: State) -> State:
    """The state after one byte of each of its pages was read."""
    for tensor in tensors(state):
        tensor.detach().reshape(-1).view(torch.uint8)[:: mmap.PAGESIZE].sum()
    return state


def _keep(read: Read, trial: Trial, *, cold: bool) -> None:
    if cold:
        trial.cold = read
    else:
        trial.warm = read


def _difference(after: int | None, before: int | None) -> int | None:
    return None if after is None or before is None else after - before
