"""What the chunk grid costs and gains: the six runs saved and loaded with grids of 256 KiB to 4 MiB.

    python -m bench.chunk_grid [--workloads full_finetune,lora] [--write-results]

The grid is a constant of the format, so each size runs in a process of its own that changes the constant before castore
is imported. Shares are exact and repeatable; seconds are processor time of the whole process, which other work on the
machine disturbs less than wall time.
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

SIZES_KIB = (256, 512, 1024, 2048, 4096)
WORKLOADS = ("full_finetune", "bf16_copy", "frozen_body", "lora", "gpt_scratch", "sparse_embeddings")


def measure(grid_kib: int, workload: str, directory: Path) -> dict[str, Any]:
    """Run in the child: save every state of a workload, load the last one."""
    import castore.options

    castore.options.GRID_BYTES = grid_kib * 1024
    castore.options.RECORD_STORED_BYTES_MAX = grid_kib * 1024 + 64 * 1024
    import castore

    states = cache.ensure(workload, directory, log=lambda _: None)
    shares, save_s = [], []
    with tempfile.TemporaryDirectory() as place:
        with castore.init(f"{place}/store") as repo:
            for saved in states:
                state = saved.load()
                begin = time.process_time()
                snap = repo.save(state, step=saved.step)
                save_s.append(time.process_time() - begin)
                shares.append(snap.stored_bytes / snap.raw_bytes)
        with castore.open(f"{place}/store") as repo:
            begin = time.process_time()
            repo.load("main")
            load_s = time.process_time() - begin
    return {
        "first": shares[0],
        "later": statistics.mean(shares[1:]),
        "save_s": statistics.mean(save_s[1:]),
        "load_s": load_s,
    }


def table(rows: list[tuple[str, int, dict[str, Any]]]) -> str:
    """A Markdown table of everything measured."""
    lines = ["| run | grid | first save | later save | save, CPU s | load, CPU s |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {name} | {size} KiB | {found['first']:.2%} | {found['later']:.2%} | {found['save_s']:.2f} | "
        f"{found['load_s']:.2f} |"
        for name, size, found in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Spawn a process for each size and run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--cache", type=Path, default=cache.default_directory())
    parser.add_argument("--write-results", action="store_true")
    parser.add_argument("--child", nargs=2, metavar=("KIB", "RUN"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        size, name = arguments.child
        print(json.dumps(measure(int(size), name, arguments.cache)))
        return
    rows = []
    for name in arguments.workloads.split(","):
        for size in SIZES_KIB:
            command = [
                sys.executable,
                "-m",
                "bench.chunk_grid",
                "--cache",
                str(arguments.cache),
                "--child",
                str(size),
                name,
            ]
            answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rows.append((name, size, json.loads(answer.splitlines()[-1])))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    if arguments.write_results:
        body = f"Mean of the later saves; processor time of the whole process.\n\n{table(rows)}"
        write_section("chunk grid", "Chunk grid", body)


if __name__ == "__main__":
    main()
