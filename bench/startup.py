"""How long the command line takes to answer: wall time of whole processes, the median of several.

    python -m bench.startup [--repeat 21] [--write-results]

The target is 150 ms for `castore log`, `--help` and `--version`, interpreter included.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

from bench.sections import write_section

COMMANDS = (("--version",), ("--help",), ("log",), ("show", "main"), ("diff", "main", "--no-values"), ("verify",))


def measure(repeat: int) -> list[tuple[str, float, float]]:
    """(command, fastest, median) in seconds, on a repository of two small snapshots."""
    import castore

    found = []
    with tempfile.TemporaryDirectory() as place:
        with castore.init(f"{place}/store") as repo:
            for step in (1, 2):
                repo.save({"weights": np.full(1000, step, dtype=np.float32)}, step=step)
        # Compiled modules, as an installation has them.
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        environment |= {"CASTORE_REPO": f"{place}/store", "PYTHONPYCACHEPREFIX": f"{place}/bytecode"}
        for arguments in COMMANDS:
            times = []
            for _ in range(repeat + 1):
                begin = time.perf_counter()
                subprocess.run(
                    [sys.executable, "-m", "castore", *arguments], check=True, capture_output=True, env=environment
                )
                times.append(time.perf_counter() - begin)
            found.append((" ".join(arguments), min(times[1:]), statistics.median(times[1:])))
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=21)
    parser.add_argument("--write-results", action="store_true")
    arguments = parser.parse_args()
    rows = measure(arguments.repeat)
    lines = ["| command | fastest, ms | median, ms |", "|---|---|---|"]
    lines += [f"| castore {name} | {1000 * fastest:.0f} | {1000 * median:.0f} |" for name, fastest, median in rows]
    table = "\n".join(lines)
    print(table)
    if arguments.write_results:
        write_section("start-up", "Start-up of the command line", f"Target: 150 ms.\n\n{table}")


if __name__ == "__main__":
    main()
