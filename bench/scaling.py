"""Cost as work grows: states 1, 4 and 16 times as large, histories of 10, 1 000 and 10 000 snapshots.

    python -m bench.scaling [--write-results]

States are float32 noise that drifts by a small step between saves, so that every chunk is new and rests on the one
before. Histories beyond the first ten snapshots are made of snapshot files alone, all with the manifest of the last
real one: listing and loading read the same files as in a real history. Seconds of states are processor time, those of
histories wall time (commands are processes of their own), medians of several.
The figure bench/scaling.svg shows both on logarithmic axes, with a line of slope one to compare with.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import castore
from bench.sections import write_section
from castore.options import MIB
from castore.snapshots import read_record, write_record

FACTORS = (1, 4, 16)
UNIT_BYTES = 16 * MIB
HISTORIES = (10, 1_000, 10_000)
REPEATS = 5
FIGURE = Path(__file__).with_name("scaling.svg")


def states(factor: int) -> list[dict[str, Any]]:
    """Consecutive states of `factor` leaves of UNIT_BYTES each."""
    random = np.random.default_rng(factor)
    leaves = {f"layer{index}": random.standard_normal(UNIT_BYTES // 4, np.float32) for index in range(factor)}
    drift = (np.float32(1 + 2e-6 * step) for step in range(REPEATS + 2))
    return [{name: leaf * scale for name, leaf in leaves.items()} for scale in drift]


def processor_s(work: Callable[[], Any]) -> float:
    """Processor time of one call, all threads."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def measure_state(factor: int) -> dict[str, float]:
    """First save, later saves, loads of a state of that many units."""
    saves, stored, loads = [], [], []
    with tempfile.TemporaryDirectory() as place, castore.init(f"{place}/store") as repo:
        for step, state in enumerate(states(factor)):
            begin = time.process_time()
            snap = repo.save(state, step=step)
            saves.append(time.process_time() - begin)
            stored.append(snap.stored_bytes)
        loads = [processor_s(lambda: repo.load("main")) for _ in range(REPEATS)]
    return {
        "state, MiB": factor * UNIT_BYTES // MIB,
        "first save, s": saves[0],
        "later save, s": statistics.median(saves[2:]),
        "first save, MiB": stored[0] / MIB,
        "later save, MiB": statistics.median(stored[2:]) / MIB,
        "load, s": statistics.median(loads),
    }


def measure_history(count: int, place: str) -> dict[str, float]:
    """Listing and loading in a history of that many snapshots."""
    path = f"{place}/history-{count}"
    with castore.init(path) as repo:
        state = {"weights": np.random.default_rng(0).standard_normal(MIB // 4, np.float32)}
        for step in range(10):
            state["weights"] *= np.float32(1.00001)
            newest = repo.save(state, step=step).id
        backend, hasher = repo.handle.backend, repo.handle.hasher
        record = read_record(backend, newest)
        for step in range(10, count):
            nonce = step.to_bytes(8, "little")
            newest = write_record(backend, replace(record, parents=(newest,), step=step, nonce=nonce), hasher)
        if count > 10:
            repo.branch("main", at=newest, move=True)
    return {
        "snapshots": count,
        "log -n 20, s": _median_of(lambda: _command(path, "log", "-n", "20")),
        "log, s": _median_of(lambda: _command(path, "log")),
        "load main, s": _median_of(lambda: _load(path, "main")),
        "load main~5, s": _median_of(lambda: _load(path, "main~5")),
        "save, s": _median_of(lambda: _save(path, state)),
    }


def _median_of(work: Callable[[], None]) -> float:
    """Wall time: commands are other processes."""
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _command(path: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "castore", "-R", path, *arguments], check=True, stdout=subprocess.DEVNULL)


def _load(path: str, ref: str) -> None:
    with castore.open(path) as repo:
        repo.load(ref)


def _save(path: str, state: dict[str, Any]) -> None:
    state["weights"] *= np.float32(1.00001)
    with castore.open(path) as repo:
        repo.save(state)


def table(rows: Sequence[dict[str, float]]) -> str:
    """A Markdown table with a column for each key."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    lines += [
        "| " + " | ".join(f"{value:d}" if isinstance(value, int) else f"{value:.3g}" for value in row.values()) + " |"
        for row in rows
    ]
    return "\n".join(lines)


def draw(by_state: Sequence[dict[str, float]], by_history: Sequence[dict[str, float]]) -> None:
    """Write the figure."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "castore"  # the same figures give the same file
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, rows, title in ((axes[0], by_state, "state size"), (axes[1], by_history, "length of the history")):
        x_name, *names = [name for name in rows[0] if name in ("state, MiB", "snapshots") or name.endswith(", s")]
        xs = [row[x_name] for row in rows]
        for name in names:
            axis.plot(xs, [row[name] for row in rows], marker="o", label=name)
        lowest = min(min(row[name] for name in names) for row in rows)
        axis.plot(xs, [lowest * x / xs[0] for x in xs], linestyle=":", color="grey", label="slope one")
        axis.set(xscale="log", yscale="log", xlabel=x_name, ylabel="s", title=f"cost against {title}")
        axis.legend(fontsize=8)
    figure.savefig(FIGURE, metadata={"Date": None})


def main() -> None:
    """Measure, print both tables, draw the figure when results are written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write-results", action="store_true", help="also write RESULTS.md and scaling.svg")
    arguments = parser.parse_args()
    by_state = [measure_state(factor) for factor in FACTORS]
    print(table(by_state))
    with tempfile.TemporaryDirectory() as place:
        by_history = [measure_history(count, place) for count in HISTORIES]
    print(table(by_history))
    if arguments.write_results:
        draw(by_state, by_history)
        picture = "![Cost against the size of the state and the length of the history](scaling.svg)"
        write_section("scaling", "Cost as work grows", "\n\n".join((table(by_state), table(by_history), picture)))


if __name__ == "__main__":
    main()
