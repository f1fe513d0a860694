"""What a save costs the training beside it: a real fine-tuning loop on the machine's cores, saved in several ways.

    python -m bench.step_slowdown [--steps 61] [--every 20] [--rounds 3] [--niceness 10 15] [--write-results]

The loop (full fine-tune of all-MiniLM-L6-v2, 271 MB of state) runs once without saves and once for each way of saving;
the ways are alternated, so that other work on the machine falls on all of them. A step is slowed down when a save is
being written beside it; the stall is what the call itself takes; durable is from the call until the branch has moved.
Saving more often than writing takes is not measured: that is back-pressure, not slow-down. `--niceness` adds worker
processes that stand back less far than they do by default.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

import castore
from bench.sections import write_section
from bench.train import loop, minilm
from castore.checkpoint import worker
from castore.options import WORKER_NICENESS

Save = Callable[[int, loop.State], Any]


class Measured:
    """Times of one way of saving."""

    def __init__(self) -> None:
        self.stalls: list[float] = []
        self.steps_beside: list[float] = []
        """Steps while a save was being written."""
        self.steps_alone: list[float] = []
        self.durable_s: list[float] = []
        self.total_s: list[float] = []


def train(steps: int, every: int, save: Save | None, found: Measured) -> None:
    """Run the loop once and note the time of each step and each call."""
    run = minilm.full()
    pending: Any = None
    begins = [time.perf_counter()]
    warm_up = every  # the first steps touch fresh memory
    watchers: list[threading.Thread] = []

    def watch(save: Any, begin: float) -> None:
        save.result()
        found.durable_s.append(time.perf_counter() - begin)

    def on_step(step: int, state: loop.State) -> None:
        nonlocal pending
        beside = pending is not None and not pending.done()
        if step > warm_up:
            (found.steps_beside if beside else found.steps_alone).append(time.perf_counter() - begins[-1])
        if save is not None and step % every == 0:
            begin = time.perf_counter()
            pending = save(step, state)
            found.stalls.append(time.perf_counter() - begin)
            if pending is not None:
                watchers.append(threading.Thread(target=watch, args=(pending, begin)))
                watchers[-1].start()
        begins.append(time.perf_counter())

    begin = time.perf_counter()
    loop.train(run, until=range(1, steps + 1), save=on_step)
    found.total_s.append(time.perf_counter() - begin)
    for watcher in watchers:
        watcher.join()


def torch_save(place: Path, _: ExitStack) -> Save:
    """A durable torch.save, in the loop."""

    def save(step: int, state: loop.State) -> None:
        buffer = io.FileIO(place / f"{step}.pt", "w")
        with buffer:
            torch.save(state, buffer)
            os.fsync(buffer.fileno())

    return save


def castore_save(place: Path, opened: ExitStack) -> Save:
    repo = opened.enter_context(castore.init(place / "store"))
    return lambda step, state: repo.save(state, step=step) and None


def castore_save_async(
    place: Path, opened: ExitStack, *, worker_process: bool, niceness: int = WORKER_NICENESS
) -> Save:
    worker.WORKER_NICENESS = niceness
    repo = opened.enter_context(castore.open(place / "store", create=True, worker_process=worker_process))
    return lambda step, state: repo.save_async(state, step=step)


WAYS: dict[str, Callable[[Path, ExitStack], Save | None]] = {
    "no saves": lambda _place, _opened: None,
    "torch.save + fsync": torch_save,
    "castore save": castore_save,
    "castore save_async": partial(castore_save_async, worker_process=False),
    "castore save_async, worker process": partial(castore_save_async, worker_process=True),
}


def main() -> None:
    """Run every way of saving in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=61)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--niceness", type=int, nargs="*", default=[])
    parser.add_argument("--write-results", action="store_true")
    arguments = parser.parse_args()
    ways = dict(WAYS)
    for niceness in arguments.niceness:
        name = f"castore save_async, worker process at niceness {niceness}"
        ways[name] = partial(castore_save_async, worker_process=True, niceness=niceness)
    found = {name: Measured() for name in ways}
    for _ in range(arguments.rounds):
        for name, way in ways.items():
            with tempfile.TemporaryDirectory() as place, ExitStack() as opened:
                train(arguments.steps, arguments.every, way(Path(place), opened), found[name])
    table = report(found)
    print(table)
    if arguments.write_results:
        write_section("step slow-down", "What a save costs the training beside it", table)


def report(found: dict[str, Measured]) -> str:
    """The table; times in milliseconds."""
    alone = statistics.median(found["no saves"].steps_alone)
    titles = "way", "stall of a call, ms", "step beside a save, ms", "slow-down of those steps", "durable after, s"
    lines = [
        f"| {' | '.join(titles)} | whole loop, s |",
        "|---|---|---|---|---|---|",
        f"| no saves | - | {1000 * alone:.0f} (alone) | - | - | {statistics.median(found['no saves'].total_s):.1f} |",
    ]
    for name, measured in found.items():
        if name == "no saves":
            continue
        stall = 1000 * statistics.median(measured.stalls)
        beside = statistics.median(measured.steps_beside) if measured.steps_beside else None
        shown = (f"{1000 * beside:.0f}", f"{beside / alone - 1:+.0%}") if beside is not None else ("-", "-")
        durable = f"{statistics.median(measured.durable_s):.1f}" if measured.durable_s else "-"
        total = statistics.median(measured.total_s)
        lines.append(f"| {name} | {stall:.0f} | {shown[0]} | {shown[1]} | {durable} | {total:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
