"""Real processes on one repository, killed and stopped at random: `make storm`, or python -m tests.proof.storm.

    4 savers      each saves to a branch of its own, now and then to one that all share, tags, forgets what is old, and
                  saves again what was saved, and perhaps forgotten and condemned, before
    1 collector   gc with an aggressive policy, over and over
    1 verifier    verify with data, and loads of the heads, over and over
    the parent    forks them, kills one with SIGKILL, stops one with SIGSTOP for up to three lease lengths, starts the
                  dead again, and writes down what each reported

Two of the savers are far: to the others their claims look as those of another host do, where no lock can be seen. So
a far saver that is stopped past its lease counts as dead, and goes on later.

At the end every snapshot that was reported durable, and whose forgetting nobody announced, is loaded and compared; then
a last gc must leave no more than the live bytes plus the waste that it is allowed.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import select
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import castore
from castore.api import Repository
from castore.backend import LocalBackend
from castore.backend.base import ClaimInfo
from castore.errors import CastoreError, ConflictError, DamageError, LeaseError, RefError, SnapshotGoneError
from tests.checkpoint.killing import Child, Report, fork
from tests.checkpoint.states import State, assert_same, training_state
from tests.proof.operations import collect, forget, live_bytes

LEASE_S = 0.5
GRACE_S = 2.0
SAVERS = 4
FAR = (2, 3)
FAR_REFS = "run-[23]|shared|t-[23]-[0-9]+"
WAKING_S = 20 * LEASE_S
"""Until the branch of a far saver is right again, or the collector has repaired it."""
KEPT = 4
"""Saves that a saver keeps of its own branch."""
SHARED = "shared"


def state_of(saver: int, content: int) -> State:
    """A megabyte, of which a part is common to all savers, a part moves on a little, and a part is new each time."""
    return training_state(saver * 100_003 + content, frozen_bytes=300_000, moving_bytes=120_000)


# ---- the processes ---------------------------------------------------------------------------------------------------


def save_for_ever(path: Path, saver: int, seed: int, report: Report) -> None:
    """A training run that goes on where its branch is, and thins its history out."""
    rng = random.Random(seed)
    branch = f"run-{saver}"
    # Saving an earlier content again is what this is about.
    warnings.simplefilter("ignore", castore.StaleSaveWarning)
    with castore.open(path) as repo:
        step = _next_step(repo, branch)
        report("ready")
        while True:
            # Now and then the content of an earlier step, whose chunks may be on their way out.
            content = step if rng.random() < 0.7 else rng.randrange(max(0, step - 12), step + 1)
            shared = rng.random() < 0.2
            with _taken_for_dead(saver), suppress(ConflictError):
                snapshot = _save(repo, rng, state_of(saver, content), step=step, branch=SHARED if shared else branch)
                report(f"saved {snapshot.id} {saver} {content}")
                step += 1
                if rng.random() < 0.1:
                    with suppress(RefError):  # the name is taken by who died after making it
                        repo.tag(f"t-{saver}-{step}", at=snapshot.id)
                if rng.random() < 0.5:
                    _forget_old(repo, branch, report)


@contextmanager
def _taken_for_dead(saver: int) -> Iterator[None]:
    """A far one that was stopped past its lease may be told so, and has then committed nothing."""
    try:
        yield
    except LeaseError:
        assert saver in FAR, "a writer of this host was taken for dead"


def _next_step(repo: Repository, branch: str) -> int:
    try:
        return (repo.snapshot(branch).step or 0) + 1
    except RefError:
        return 1


def _save(repo: Repository, rng: random.Random, state: State, *, step: int, branch: str) -> castore.Snapshot:
    options: dict[str, Any] = {"branch": branch, "step": step}
    if branch == SHARED and any(ref.name == SHARED for ref in repo.branches()):
        options["parent"] = SHARED
    if rng.random() < 0.5:
        return repo.save_async(state, **options).result()
    return repo.save(state, **options)


def _forget_old(repo: Repository, branch: str, report: Report) -> None:
    """Say what will be forgotten, then forget it; tagged snapshots stay."""
    try:
        history = [snapshot.id for snapshot in repo.log(branch)]
    except RefError:
        return
    tagged = {ref.snapshot_id for ref in repo.tags()}
    old = [snapshot_id for snapshot_id in history[KEPT:] if snapshot_id not in tagged]
    if old:
        report("forgetting " + " ".join(old))
        forget(repo, old)
        report("forgotten")


def collect_for_ever(path: Path, report: Report) -> None:
    """Garbage collection without a pause. Does what it is told to where a far saver was killed just after it moved a
    branch to a snapshot that was collected while it slept, and before its own check: repair.
    """
    with castore.open(path) as repo:
        report("ready")
        while True:
            try:
                report(f"freed {collect(repo).freed_bytes}")
            except DamageError as error:
                dangling = f"(branch|tag) '({FAR_REFS})' names snapshot \\w+, which is not there"
                assert re.match(dangling, str(error)), error
                repo.repair(fix_refs=True)
                report("mended")


def verify_for_ever(path: Path, report: Report) -> None:
    """A reader that believes nothing."""
    with castore.open(path) as repo:
        report("ready")
        while True:
            for ref in repo.branches():
                try:
                    repo.load(ref.snapshot_id)
                except (SnapshotGoneError, RefError):
                    # The branch moved on, and what it named was forgotten: nobody promised it any more.
                    assert _moves_on(repo, ref), f"the head of {ref.name} is gone"
            found = repo.verify(data=True)
            if any(problem.kind == "ref" for problem in found.problems):
                time.sleep(WAKING_S)  # as in `_moves_on`; all other problems stay problems
                found = repo.verify(data=True)
            assert found.ok, found.problems
            report("looked")


def _moves_on(repo: Repository, ref: castore.Ref) -> bool:
    """A far saver that slept past its grace may move its branch to what was collected; it then moves on by itself, or
    is killed, and the collector repairs.
    """
    deadline_s = time.monotonic() + WAKING_S
    while any(found == ref for found in repo.branches()):
        if time.monotonic() > deadline_s:
            return False
        time.sleep(LEASE_S / 5)
    return True


@contextmanager
def distance(is_far: bool, far_claims: Path) -> Iterator[None]:
    """Processes see no locks across the distance; a far one writes down which claims are its own."""
    claim, claims = LocalBackend.claim, LocalBackend.claims

    def noted_claim(self: LocalBackend, name: str, data: bytes) -> Any:
        if is_far:
            (far_claims / name.replace("/", "-")).touch()
        return claim(self, name, data)

    def seen_claims(self: LocalBackend, prefix: str) -> list[ClaimInfo]:
        found = claims(self, prefix)
        far = {path.name for path in far_claims.iterdir()}
        return [
            ClaimInfo(info.name, info.data, info.held and (info.name.replace("/", "-") in far) == is_far)
            for info in found
        ]

    with (
        mock.patch.object(LocalBackend, "claim", noted_claim),
        mock.patch.object(LocalBackend, "claims", seen_claims),
        mock.patch("castore.leases.boot_id", return_value="far" if is_far else "near"),
        mock.patch("castore.leases.socket.gethostname", return_value="far" if is_far else "near"),
    ):
        yield


# ---- the parent ------------------------------------------------------------------------------------------------------


@dataclass
class Record:
    """What was reported, by whom."""

    contents: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Snapshot → saver and content."""
    forgetting: set[str] = field(default_factory=set)
    """Announced: they may be gone."""
    freed_bytes: int = 0
    collections: int = 0
    looks: int = 0
    repairs: int = 0
    kills: int = 0
    stops: int = 0

    def take(self, line: str) -> None:
        """One line of a child."""
        word, *rest = line.split()
        if word == "saved":
            self.contents[rest[0]] = (int(rest[1]), int(rest[2]))
        elif word == "forgetting":
            self.forgetting |= set(rest)
        elif word == "freed":
            self.freed_bytes += int(rest[0])
            self.collections += 1
        elif word == "looked":
            self.looks += 1
        elif word == "mended":
            self.repairs += 1

    @property
    def owed(self) -> dict[str, tuple[int, int]]:
        """Every snapshot that must be whole."""
        return {found: content for found, content in self.contents.items() if found not in self.forgetting}


class Storm:
    """Forks, stops, continues and kills."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path = path
        self.record = Record()
        self._rng = random.Random(seed)
        self._far_claims = path.parent / "far-claims"
        self._far_claims.mkdir()
        self._children: dict[str, Child] = {}
        self._taken: dict[str, int] = {}
        self._stopped: dict[str, float] = {}
        """Name → when it goes on."""

    def rage(self, seconds: float) -> None:
        """For so long; every process is dead at the end."""
        deadline_s = time.monotonic() + seconds
        for name in [*(f"saver-{number}" for number in range(SAVERS)), "collector", "verifier"]:
            self._start(name)
        try:
            while (now_s := time.monotonic()) < deadline_s:
                self._listen(self._rng.uniform(0.01, 0.2))
                self._continue(now_s)
                self._strike(now_s)
            self._continue(float("inf"))
            self._listen(1.0)
        finally:
            for name in list(self._children):
                self._kill(name)

    def _start(self, name: str) -> None:
        kind, _, number = name.partition("-")
        seed = self._rng.randrange(1 << 30)
        work: dict[str, Callable[[Report], object]] = {
            "saver": lambda report: save_for_ever(self.path, int(number), seed, report),
            "collector": lambda report: collect_for_ever(self.path, report),
            "verifier": lambda report: verify_for_ever(self.path, report),
        }
        is_far = kind == "saver" and int(number) in FAR

        def live(report: Report) -> None:
            with distance(is_far, self._far_claims):
                work[kind](report)

        self._children[name] = fork(live)
        self._taken[name] = 0

    def _listen(self, seconds: float) -> None:
        """Take what is reported; a child that ends by itself is a failure, its traceback is on stderr."""
        end_s = time.monotonic() + seconds
        while (left_s := end_s - time.monotonic()) > 0:
            fds = {child._fd: name for name, child in self._children.items()}
            for fd in select.select(list(fds), [], [], left_s)[0]:
                name = fds[fd]
                block = os.read(fd, 1 << 16)
                assert block, f"{name} ended by itself; its traceback is above"
                self._children[name]._take(block)
                self._note(name)

    def _note(self, name: str) -> None:
        lines = self._children[name].lines
        for line in lines[self._taken[name] :]:
            self.record.take(line)
        self._taken[name] = len(lines)

    def _continue(self, now_s: float) -> None:
        for name, until_s in list(self._stopped.items()):
            if until_s <= now_s:
                del self._stopped[name]
                os.kill(self._children[name].pid, signal.SIGCONT)

    def _strike(self, now_s: float) -> None:
        name = self._rng.choice(list(self._children))
        if name in self._stopped:
            return
        chance = self._rng.random()
        if chance < 0.25:
            self._kill(name)
            self.record.kills += 1
            self._start(name)
        elif chance < 0.6 and len(self._stopped) < SAVERS:
            os.kill(self._children[name].pid, signal.SIGSTOP)
            self._stopped[name] = now_s + self._rng.uniform(0, 3 * LEASE_S)
            self.record.stops += 1

    def _kill(self, name: str) -> None:
        child = self._children.pop(name)
        self._stopped.pop(name, None)
        child.kill()
        for line in child.lines[self._taken[name] :]:
            self.record.take(line)


# ---- afterwards ------------------------------------------------------------------------------------------------------


def check(path: Path, record: Record) -> dict[str, int]:
    """Everything that is owed is whole, and a last gc leaves no more than it may. Returns figures to print."""
    with castore.open(path) as repo:
        _check_owed(repo, record)
        report = repo.verify(data=True)
        assert report.ok, report.problems[:3]
        before = directory_bytes(path)
        time.sleep(2 * GRACE_S)  # orphans, and leases of the far, which nobody renews any more
        for _ in range(3):
            collect(repo)
        after = directory_bytes(path)
        _check_owed(repo, record)
        report = repo.verify(data=True)
        assert report.ok, report.problems[:3]
        live, waste = live_bytes(repo)
        packs = sum(info.size_bytes for info in repo.handle.backend.list("packs/"))
        assert packs <= live + waste, f"{packs} bytes of packs, of which {live} live; {waste} may be wasted"
    return {
        "snapshots reported": len(record.contents),
        "of these not forgotten": len(record.owed),
        "collections": record.collections,
        "looks": record.looks,
        "repairs": record.repairs,
        "kills": record.kills,
        "stops": record.stops,
        "bytes freed meanwhile": record.freed_bytes,
        "bytes before the last gc": before,
        "bytes after it": after,
        "live bytes in packs": live,
        "bytes of packs": packs,
    }


def _check_owed(repo: Repository, record: Record) -> None:
    for snapshot_id, (saver, content) in record.owed.items():
        try:
            found = repo.load(snapshot_id)
        except CastoreError as error:
            raise AssertionError(f"LOST: {snapshot_id} of saver {saver}: {error}") from error
        assert_same(found, state_of(saver, content))
    for ref in (*repo.branches(), *repo.tags()):
        repo.load(ref.snapshot_id)


def directory_bytes(path: Path) -> int:
    """Of all files but the cache."""
    found = 0
    for file in path.rglob("*"):
        with suppress(FileNotFoundError):
            found += file.stat().st_size if file.is_file() and "cache" not in file.parts else 0
    return found


def run(directory: Path, *, seconds: float, seed: int) -> dict[str, int]:
    """A whole storm in an empty directory."""
    path = directory / "store"
    castore.init(path, lease_s=LEASE_S, orphan_grace_s=GRACE_S).close()
    np.random.default_rng(0)  # imports, so that no child has to
    storm = Storm(path, seed)
    storm.rage(seconds)
    return check(path, storm.record)


def main() -> None:
    """From the command line."""
    parser = argparse.ArgumentParser(
        description="kill and stop processes on one repository, and see that nothing is lost"
    )
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="castore-storm-"))
    sys.stdout.write(f"{options.seconds:g} s in {directory}, seed {options.seed}\n")
    for name, value in run(directory, seconds=options.seconds, seed=options.seed).items():
        sys.stdout.write(f"{name:>28}  {value:>15,}\n")
    shutil.rmtree(directory)
    sys.stdout.write("nothing was lost\n")


if __name__ == "__main__":
    main()
