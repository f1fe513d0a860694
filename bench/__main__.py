"""The command line, as in `python -m bench --workloads lora,resave --peers castore,moonclip --repeat 5`."""

from __future__ import annotations

import argparse
import faulthandler
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import peers, report, workloads
from bench.run import Settings, make_states, run
from bench.sections import replace_table
from bench.targets import OWN
from bench.train.cache import default_directory

HOME = Path(__file__).parent
REPEAT = 5


def main(arguments: Sequence[str]) -> int:
    """0 when all finished and castore gave back every bit, 1 otherwise, 2 for bad usage."""
    parser = _parser()
    options = parser.parse_args(arguments)
    chosen = _names(parser, "workload", options.workloads, workloads.WORKLOADS, workloads.DEFAULT_WORKLOADS)
    contestants = _names(parser, "peer", options.peers, peers.CONTESTANTS, tuple(peers.CONTESTANTS))
    if options.prepare:
        make_states(chosen, options.cache, _log)
        return 0
    settings = Settings(
        workloads=chosen,
        contestants=contestants,
        repeat=1 if options.quick else options.repeat,
        cold=options.cold,
        warm_memory=options.memory == "warm",
        cache=options.cache,
        scratch=options.scratch or options.cache / "scratch",
        command=arguments,
    )

    def keep(results: dict[str, Any]) -> None:
        for path in (options.json, HOME / "results.json" if options.write_results else None):
            if path:
                path.write_text(json.dumps(results, indent=1) + "\n")

    faulthandler.enable()  # contestants are native code: a crash must leave a trace
    try:
        results = run(settings, _log, keep)
    except ValueError as error:
        parser.error(str(error))
    text = report.markdown(results)
    sys.stdout.write(text)
    if options.write_results:
        replace_table(text)
    return 0 if _sound(results) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure castore beside its peers on states of real training runs.",
        epilog=f"workloads: {workloads.__doc__}\npeers: {peers.__doc__}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workloads", metavar="A,B", help="default: all but smoke")
    parser.add_argument("--peers", metavar="A,B", help="contestants; default: all that are installed")
    parser.add_argument("--repeat", type=int, default=REPEAT, help="repetitions; their medians are reported")
    parser.add_argument("--quick", action="store_true", help="one repetition")
    parser.add_argument(
        "--cold", action=argparse.BooleanOptionalAction, default=True, help="also load with a cold page cache"
    )
    parser.add_argument(
        "--memory",
        choices=("as-is", "warm"),
        default="as-is",
        help="warm: touch and free memory before each measurement (for virtual machines, see README)",
    )
    parser.add_argument("--prepare", action="store_true", help="only train what the workloads need")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every single measurement")
    parser.add_argument("--write-results", action="store_true", help="write RESULTS.md and results.json in bench/")
    parser.add_argument(
        "--cache",
        type=Path,
        default=default_directory(),
        help="where the states are; default $CASTORE_BENCH_CACHE",
    )
    parser.add_argument("--scratch", type=Path, help="where contestants write, on a disk; default CACHE/scratch")
    return parser


def _names(
    parser: argparse.ArgumentParser,
    what: str,
    given: str | None,
    known: Iterable[str],
    default: Sequence[str],
) -> Sequence[str]:
    if given is None:
        return default
    names = [name.strip() for name in given.split(",") if name.strip()]
    for name in names:
        if name not in known:
            parser.error(f"unknown {what} {name!r}: choose from {', '.join(known)}")
    return names


def _sound(results: dict[str, Any]) -> bool:
    return all(
        not trial["error"] and (trial["equal"] == "yes" or not name.startswith(OWN))
        for workload in results["workloads"].values()
        for name, trials in workload["trials"].items()
        for trial in trials
    )


def _log(message: str) -> None:
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
