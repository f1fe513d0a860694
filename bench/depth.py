"""What the depth of differences costs and gains: a history of 100 saves, one step apart, at several bounds.

    python -m bench.depth [--bounds 1,2,4,8] [--moves 4,8,16,32,never] [--write-results]

The bound and the pace at which references move are constants, so each combination runs in a process of its own that
changes them before castore is imported. Shares are exact and repeatable; seconds are processor time of loading the last
snapshot (the median of several loads), which other work on the machine disturbs less than wall time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.sections import write_section
from bench.train import cache

NEVER = 2**32
"""Larger than what chunk ids are compared by: no reference moves."""
LOADS = 5


def measure(depth: int, moves_every: int, directory: Path) -> dict[str, Any]:
    """Run in the child: save the history, load its end."""
    import castore.options

    castore.options.DELTA_DEPTH_MAX = depth
    castore.options.REFERENCE_MOVES_EVERY = moves_every
    import castore

    states = cache.ensure("every_step", directory, log=lambda _: None)
    shares, save_s, load_s = [], [], []
    with tempfile.TemporaryDirectory() as place:
        with castore.init(f"{place}/store") as repo:
            for saved in states:
                state = saved.load()
                begin = time.process_time()
                snap = repo.save(state, step=saved.step)
                save_s.append(time.process_time() - begin)
                shares.append(snap.stored_bytes / snap.raw_bytes)
        for _ in range(LOADS):
            with castore.open(f"{place}/store") as repo:
                begin = time.process_time()
                repo.load("main")
                load_s.append(time.process_time() - begin)
    later = shares[1:]
    return {
        "later": statistics.mean(later),
        "last": statistics.mean(later[-10:]),
        "worst": max(later),
        "save_s": statistics.mean(save_s[1:]),
        "load_s": statistics.median(load_s),
    }


def table(rows: list[tuple[int, str, dict[str, Any]]]) -> str:
    """A Markdown table of everything measured."""
    lines = [
        "| depth | references move | later save, mean | mean of the last ten | largest | save, CPU s | load, CPU s |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {depth} | {moves} | {found['later']:.2%} | {found['last']:.2%} | {found['worst']:.2%} | "
        f"{found['save_s']:.2f} | {found['load_s']:.3f} |"
        for depth, moves, found in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure every combination in a child process and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bounds", default="1,2,4,8")
    parser.add_argument("--moves", default="4,8,16,never", help="for bounds above 1")
    parser.add_argument("--write-results", action="store_true")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    directory = cache.default_directory()
    if arguments.child:
        depth, moves = arguments.child
        print(json.dumps(measure(int(depth), int(moves), directory)))
        return
    cache.ensure("every_step", directory)
    rows = []
    for depth in map(int, arguments.bounds.split(",")):
        for moves in arguments.moves.split(",") if depth > 1 else ["never"]:
            number = NEVER if moves == "never" else int(moves)
            command = [sys.executable, "-m", "bench.depth", "--child", str(depth), str(number)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            label = moves if moves == "never" else f"every {moves} saves"
            rows.append((depth, label, json.loads(done.stdout)))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    found = table(rows)
    print(found)
    if arguments.write_results:
        write_section("depth", "Depth of differences", f"A hundred saves one step apart (`every_step`).\n\n{found}")


if __name__ == "__main__":
    main()
