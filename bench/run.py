"""Carries out workloads: contestants alternated within each repetition, each time in a fresh directory."""

from __future__ import annotations

import os
import platform
import random
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch

from bench import measure
from bench.peers import CONTESTANTS, Contestant
from bench.states import raw_bytes
from bench.train import cache
from bench.train.loop import THREADS
from bench.workloads import LEAF, WORKLOADS, Probe, Step, Trial, Workload

WARM_COPIES = 4
"""Copies of the state that a save or load takes at most, files in the page cache included."""

Results = dict[str, Any]
"""As written to JSON: `about`, and under `workloads` raw bytes, floors and the trials of each contestant."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What one invocation measures."""

    workloads: Sequence[str]
    contestants: Sequence[str]
    repeat: int
    cold: bool
    warm_memory: bool
    cache: Path
    scratch: Path
    command: Sequence[str]


def run(settings: Settings, log: Callable[[str], None], keep: Callable[[Results], None]) -> Results:
    """Measure everything in `settings`; `keep` gets what there is after each workload."""
    torch.set_num_threads(THREADS)
    settings.scratch.mkdir(parents=True, exist_ok=True)
    file_system = measure.file_system(settings.scratch)
    if file_system in measure.MEMORY_FILE_SYSTEMS:
        raise ValueError(
            f"{settings.scratch} lies in memory ({file_system}): choose a directory on a disk with --scratch"
        )
    contestants = _present(settings.contestants, log)
    measured: Results = {}
    results: Results = {}
    for name in settings.workloads:
        measured[name] = _workload(name, contestants, settings, log)
        results = {"about": _about(settings, contestants, file_system), "workloads": measured}
        keep(results)
    return results


def _present(names: Sequence[str], log: Callable[[str], None]) -> list[type[Contestant]]:
    present = []
    for name in names:
        reason = CONTESTANTS[name].missing()
        if reason:
            log(f"{name} is left out: {reason}")
        else:
            present.append(CONTESTANTS[name])
    return present


def _workload(
    name: str, contestants: Sequence[type[Contestant]], settings: Settings, log: Callable[[str], None]
) -> Results:
    workload = WORKLOADS[name]
    steps = workload.states(settings.cache)
    trials: dict[str, list[Results]] = {contestant.name: [] for contestant in contestants}
    floors: list[Results] = []
    for repetition in range(settings.repeat):
        with measure.fresh_directory(settings.scratch) as directory:
            measure.warm_memory(_warm_bytes(steps, settings))
            copy_s, write_s = measure.floor_seconds([step.state for step in steps], directory)
            floors.append({"copy_s": copy_s, "write_s": write_s})
        for contestant in _shuffled(contestants, repetition):
            trial = _trial(workload, steps, contestant, settings)
            trials[contestant.name].append(asdict(trial))
            log(f"{name} {repetition + 1}/{settings.repeat} {contestant.name}: {_one_line(trial)}")
    return {
        "raw_bytes": raw_bytes(steps[-1].state),
        "trunk_saves": workload.trunk_saves,
        "leaf_bytes": steps[0].state[str(LEAF[0])][LEAF[1]].nbytes if name == "load_one_leaf" else None,
        "floors": floors,
        "trials": trials,
    }


def _shuffled(contestants: Sequence[type[Contestant]], repetition: int) -> list[type[Contestant]]:
    """Another order in each repetition: nobody is always first, or always after the same one."""
    order = list(contestants)
    random.Random(repetition).shuffle(order)
    return order


def _warm_bytes(steps: Sequence[Step], settings: Settings) -> int:
    return WARM_COPIES * raw_bytes(steps[-1].state) if settings.warm_memory else 0


def _trial(workload: Workload, steps: Sequence[Step], cls: type[Contestant], settings: Settings) -> Trial:
    trial = Trial()
    with measure.fresh_directory(settings.scratch) as directory:
        contestant = cls(directory)
        measure.settle()
        probe = Probe(contestant, directory, settings.cold, _warm_bytes(steps, settings))
        try:
            contestant.open()
            workload.measured(steps, probe, trial)
            contestant.close()
        except Exception as error:  # noqa: BLE001  # one that fails is reported and must not stop the others
            trial.error = f"{type(error).__name__}: {error}"
    return trial


def _one_line(trial: Trial) -> str:
    if trial.error:
        return f"FAILED: {trial.error}"
    last = trial.saves[-1]
    load = f", load {trial.warm.seconds:.3f} s" if trial.warm else ""
    stored = f"{last.stored_bytes / 1e6:.2f} MB"
    return f"call {last.call_s:.3f} s, durable {last.durable_s:.3f} s, {stored}{load}, equal: {trial.equal}"


def _about(settings: Settings, contestants: Sequence[type[Contestant]], file_system: str) -> Results:
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for contestant in contestants:
        versions |= contestant.versions()
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join(["python", "-m", "bench", *settings.command]),
        "repeat": settings.repeat,
        "memory": "warm" if settings.warm_memory else "as it is",
        "contestants": [contestant.name for contestant in contestants],
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
            "system": f"{platform.system()} {platform.release()}",
            "file_system": file_system,
            "torch_threads": torch.get_num_threads(),
            "load_average": psutil.getloadavg()[0],
        },
        "versions": versions,
    }


def _processor() -> str:
    unknown = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return unknown
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), unknown)


def make_states(names: Sequence[str], directory: Path, log: Callable[[str], None]) -> None:
    """Train what the named workloads need and the cache lacks."""
    for name in cache.recipes(directory):
        if name in names or name.startswith("full_finetune"):
            cache.ensure(name, directory, log=log)
