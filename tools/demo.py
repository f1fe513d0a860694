"""The main job on real input: a fine-tuning run is killed in the middle of a save and goes on, bit for bit.

    1  a reference run, never interrupted; every state is also written with torch.save, to compare the cost
    2  the same run again, saving in the background, killed with SIGKILL while it writes a pack
    3  every snapshot that was reported as saved is there, and every byte of the repository verifies
    4  the killed run is started again, and goes on from the last committed snapshot
    5  both runs end with the same bits: state ids, and every tensor compared
    6  old snapshots are forgotten and their space is freed while the run goes on and saves

Each claim is checked; the exit code is 1 when one fails, 2 when the demo cannot run. Under four minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import castore

TRAIN_SCRIPT = Path(__file__).with_name("demo_train.py")
STEPS = 20
SAVE_EVERY = 4
KEEP_LAST = 2
"""Snapshots that the retention at the end keeps."""
COMMITTED_BEFORE_KILL = 2
"""The kill comes in the third save: two snapshots must survive it, and two more follow the resume."""
GROWN_BYTES_MIN = 8 << 20
"""A temporary pack that grew past this is in the middle of a save: whole states take 100 MB and more."""
POLL_S = 0.002
KILL_ATTEMPTS = 6
DISK_BYTES_MIN = 4 << 30
"""Ten snapshots of 270 MB that cannot deduplicate much, one torch.save file, and room to spare."""

console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())


class DemoError(Exception):
    """The demo cannot run here; no claim was disproved."""


@dataclass
class Claims:
    """What the demo says about castore, each with whether it held."""

    rows: list[tuple[str, bool]] = field(default_factory=list)

    def check(self, claim: str, holds: bool) -> None:  # noqa: FBT001 - reads as "claim, holds"
        self.rows.append((claim, holds))
        console.print(f"  [green]✓[/] {claim}" if holds else f"  [bold red]✗ {claim}[/]")

    @property
    def all_hold(self) -> bool:
        return all(holds for _, holds in self.rows)


@dataclass(frozen=True)
class TrainingRun:
    """One run of demo_train.py: its repository, and the journal in which it tells what was saved."""

    folder: Path

    @property
    def repo(self) -> Path:
        return self.folder / "store"

    def command(self, *extra: str, steps: int = STEPS) -> list[str]:
        journal = str(self.folder / "journal.jsonl")
        plan = ["--steps", str(steps), "--save-every", str(SAVE_EVERY)]
        return [
            sys.executable,
            str(TRAIN_SCRIPT),
            "--repo",
            str(self.repo),
            "--journal",
            journal,
            *plan,
            *extra,
        ]

    def journal(self, event: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (self.folder / "journal.jsonl").read_text().splitlines()]
        return [line for line in lines if line["event"] == event]


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill a fine-tuning run in the middle of a save, and resume it.")
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"), help="emptied first (default: %(default)s)")
    folder: Path = parser.parse_args().folder
    began = time.monotonic()
    claims = Claims()
    try:
        prepare(folder)
        reference, killed = TrainingRun(folder / "reference"), TrainingRun(folder / "killed")
        run_reference(reference)
        run_and_kill(killed)
        check_survivors(killed, claims)
        resume(killed, claims)
        compare(reference, killed, claims)
        show_history(killed)
        show_costs(reference, killed)
        collect_beside_saves(killed, claims)
    except DemoError as error:
        console.print(f"[bold red]the demo cannot run:[/] {error}")
        return 2
    console.print()
    failed = sum(not holds for _, holds in claims.rows)
    verdict = f"[bold red]{failed} claims FAILED[/]" if failed else "[bold green]all claims hold[/]"
    seconds = time.monotonic() - began
    console.print(f"{verdict} after {seconds:.0f} s. Look around: castore -R {killed.repo} log")
    return 1 if failed else 0


def prepare(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("reference", "killed"):
        (folder / name).mkdir(parents=True)
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < DISK_BYTES_MIN:
        raise DemoError(f"{folder} has {megabytes(free_bytes)} free, needs {megabytes(DISK_BYTES_MIN)}; give --folder")


# ---- the five acts -----------------------------------------------------------------------------------------


def run_reference(run: TrainingRun) -> None:
    headline("1  the reference: all-MiniLM-L6-v2, full fine-tune, AdamW, never interrupted")
    train_to_the_end(run, "--torch-save", str(run.folder / "state.pt"))


def run_and_kill(run: TrainingRun) -> None:
    """Leave behind a repository whose writer died inside a save."""
    headline("2  the same again, saving in the background, killed with SIGKILL in the middle of a save")
    for _ in range(KILL_ATTEMPTS):
        torn = kill_in_a_save(run)
        if torn is not None:
            console.print(f"  killed while it wrote {torn.name}, {megabytes(torn.stat().st_size)} so far")
            return
        if committed_count(run) == STEPS // SAVE_EVERY:
            console.print("  the run ended first: once more")
            shutil.rmtree(run.folder)
            run.folder.mkdir()
    raise DemoError(f"no save was hit in {KILL_ATTEMPTS} attempts")


def kill_in_a_save(run: TrainingRun) -> Path | None:
    """The temporary pack that the kill left behind, or None when the save was complete before that."""
    left_before = set(temporary_packs(run))
    process = subprocess.Popen(run.command("--in-background"))
    try:
        while process.poll() is None:
            time.sleep(POLL_S)
            if committed_count(run) >= COMMITTED_BEFORE_KILL:
                growing = [path for path in temporary_packs(run) if path not in left_before and has_grown(path)]
                if growing:
                    process.kill()
                    process.wait()
                    return growing[0] if growing[0].exists() else None
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    if process.returncode != 0:
        raise DemoError(f"the training script ended with code {process.returncode}")
    return None


def check_survivors(run: TrainingRun, claims: Claims) -> None:
    headline("3  what the killed run had saved")
    with castore.open(run.repo) as repo:
        history = [snapshot.id for snapshot in repo.log("main")]
    reported = [line["snapshot_id"] for line in run.journal("save")]
    claims.check(f"every snapshot reported as saved is in the history ({len(reported)})", set(reported) <= set(history))
    claims.check("castore verify --data: every committed byte is right", run_castore(run, "verify", "--data"))


def resume(run: TrainingRun, claims: Claims) -> None:
    headline("4  started again, nothing repaired by hand")
    with castore.open(run.repo) as repo:
        step = next(iter(repo.log("main"))).step
    train_to_the_end(run, "--in-background")
    resumed_at = run.journal("start")[-1]["step"]
    claims.check(f"training went on from the last committed snapshot (step {step})", resumed_at == step)


def compare(reference: TrainingRun, killed: TrainingRun, claims: Claims) -> None:
    headline("5  the run that was killed against the run that never was")
    with castore.open(reference.repo) as first, castore.open(killed.repo) as second:
        state_ids = [{snapshot.step: snapshot.state_id for snapshot in repo.log("main")} for repo in (first, second)]
        claims.check(f"the same state id at every save ({len(state_ids[0])})", state_ids[0] == state_ids[1])
        expected, found = dict(leaves(first.load("main"))), dict(leaves(second.load("main")))
    differing = [path for path in expected.keys() | found.keys() if not same_bits(expected.get(path), found.get(path))]
    if differing:
        console.print(f"  [red]differing leaves:[/] {', '.join(sorted(differing)[:5])}")
    claims.check(f"every leaf of the final state is bit-equal ({len(expected)} compared)", not differing)
    claims.check("castore verify --data after the resume", run_castore(killed, "verify", "--data"))


def show_history(run: TrainingRun) -> None:
    headline("the history of the killed run")
    run_castore(run, "log")
    headline("what the last four steps changed: in all, and in the last layer where it moved most")
    run_castore(run, "diff", "main~1", "main", "--stat")
    run_castore(run, "diff", "main~1", "main", "--sort", "l2", "--path", "model/encoder.layer.5.output.*")


def collect_beside_saves(run: TrainingRun, claims: Claims) -> None:
    headline("6  the run goes on; while it saves, old snapshots are forgotten and their space is freed")
    before_bytes = packs_bytes(run)
    left_before = set(temporary_packs(run))
    process = subprocess.Popen(run.command("--in-background", steps=STEPS + 2 * SAVE_EVERY))
    try:
        while process.poll() is None and not any(path not in left_before for path in temporary_packs(run)):
            time.sleep(POLL_S)
        beside = process.poll() is None
        claims.check("forget, while a save is being written", run_castore(run, "forget", "--keep-last", str(KEEP_LAST)))
        claims.check("gc, beside it", run_castore(run, "gc") and beside)
        code = process.wait()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    claims.check("the run ended well, and never noticed", code == 0)
    claims.check("a last gc frees what the save held up", run_castore(run, "gc", "--repack-below", "1"))
    with castore.open(run.repo) as repo:
        kept = {snapshot.id for snapshot in repo.log("main")}
    newest = [line["snapshot_id"] for line in run.journal("save")][-KEEP_LAST:]
    claims.check(f"the newest {KEEP_LAST} snapshots are there", kept.issuperset(newest))
    claims.check("castore verify --data: nothing that is kept was touched", run_castore(run, "verify", "--data"))
    after_bytes = packs_bytes(run)
    claims.check(
        f"space was freed: {megabytes(before_bytes)} held {STEPS // SAVE_EVERY} snapshots, {megabytes(after_bytes)} "
        f"hold the {len(kept)} kept ones",
        after_bytes < before_bytes,
    )


def show_costs(run: TrainingRun, background: TrainingRun) -> None:
    headline("what each save cost, against torch.save + fsync of the same state in the same process")
    table = Table("step", "loss", "castore wrote", "torch.save wrote", "share", "castore took", "torch.save took")
    for column in table.columns:
        column.justify = "right"
    saves = run.journal("save")
    for line in saves:
        table.add_row(
            str(line["step"]),
            f"{line['loss']:.4f}",
            megabytes(line["stored_bytes"]),
            megabytes(line["torch_save_bytes"]),
            f"{line['stored_bytes'] / line['torch_save_bytes']:.0%}",
            f"{line['save_s']:.2f} s",
            f"{line['torch_save_s']:.2f} s",
        )
    console.print(table)
    stored_bytes, torch_bytes = (sum(line[key] for line in saves) for key in ("stored_bytes", "torch_save_bytes"))
    console.print(
        f"in all {megabytes(stored_bytes)} against {megabytes(torch_bytes)}: {stored_bytes / torch_bytes:.0%}"
    )
    stalls = sorted(line["stall_s"] for line in background.journal("save"))
    waits = sorted(line["torch_save_s"] for line in saves)
    console.print(
        f"in the background (the second run), training stood still for {stalls[len(stalls) // 2]:.2f} s a save "
        f"(median), against {waits[len(waits) // 2]:.2f} s for torch.save + fsync"
    )


# ---- helpers -----------------------------------------------------------------------------------------------


def headline(text: str) -> None:
    console.print(f"\n[bold]{text}[/]")
    sys.stdout.flush()


def megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB"


def train_to_the_end(run: TrainingRun, *extra: str) -> None:
    code = subprocess.run(run.command(*extra), check=False).returncode
    if code != 0:
        raise DemoError(f"the training script ended with code {code}")


def run_castore(run: TrainingRun, *arguments: str) -> bool:
    """Show and run one castore command on the run's repository; whether it succeeded."""
    console.print(f"  [dim]$ castore {' '.join(arguments)}[/]")
    sys.stdout.flush()
    environment = os.environ | {"CASTORE_REPO": str(run.repo)}
    command = [sys.executable, "-m", "castore", *arguments]
    return subprocess.run(command, env=environment, check=False).returncode == 0


def committed_count(run: TrainingRun) -> int:
    return sum(not path.name.startswith(".") for path in run.repo.glob("snapshots/*"))


def temporary_packs(run: TrainingRun) -> list[Path]:
    return list(run.repo.glob("packs/**/.tmp-*"))


def packs_bytes(run: TrainingRun) -> int:
    return sum(path.stat().st_size for path in run.repo.glob("packs/**/*.pack"))


def has_grown(path: Path) -> bool:
    try:
        return path.stat().st_size >= GROWN_BYTES_MIN
    except FileNotFoundError:
        return False  # renamed into place a moment ago


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a nested state with its place in it; containers count by what they hold."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}/{index}")
    else:
        yield path, value


def same_bits(expected: Any, found: Any) -> bool:
    import numpy as np
    import torch

    if type(expected) is not type(found):
        return False
    if isinstance(expected, torch.Tensor):
        expected, found = expected.numpy(), found.numpy()
    if isinstance(expected, np.ndarray):
        same_kind = expected.dtype == found.dtype and expected.shape == found.shape
        return bool(same_kind and expected.tobytes() == found.tobytes())
    return repr(expected) == repr(found)  # exact for every float, and tells -0.0 from 0.0


if __name__ == "__main__":
    sys.exit(main())
