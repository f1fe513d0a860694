"""The golden repositories of version 1, as they were made once: tests/golden/v1. Never make them again.

    python -m tools.golden_v1 OUT NAME...       OUT/NAME/ and OUT/NAME.json, which must not exist yet

What is checked in was written by the castore that froze the format, and must be read by every later one, so this file
only says how it came about. Cases that are missing are added under names of their own, beside the old ones.

Beside each repository stands what must be found in it, as plain data: the rows of the states that went in
(tests/suites/golden_rows.py), made from the states themselves and never from what castore gives back.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from sched import Event
from typing import Any

import numpy as np

import castore
from castore.api import Repository
from castore.backend import LocalBackend
from castore.format import manifest
from castore.format.pack import RecordKind
from castore.marks import read_thinning
from castore.options import RepositoryOptions
from castore.repository import create
from tests.suites.golden_rows import Point, rows_of
from tools.golden_cases import CASES
from tools.golden_workshop import HASHER, Workshop, flip, plant
from tools.make_golden import SteppingClock, describe

CENTURY_S = 100 * 365.25 * 24 * 3600
EVENT: tuple[Any, ...] = (1.5, 2, 3, "action", (), {})
"""A named tuple of the standard library, with any values."""
TEMPORARY = ("cache", "leases", ".lock", "gc/reserve")
"""What a repository can do without, and what is not checked in."""


def noise(seed: int, *shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


# ---- states ----------------------------------------------------------------------------------------------------------


def plain_state(step: int) -> dict[str, Any]:
    """Every kind of leaf that needs no torch, small; weights move a little from step to step."""
    weight = noise(1, 20, 100) * np.float32(1 + step / 1e6)
    buffer = noise(2, 3000)
    second = np.abs(noise(3, 2000)) * np.float32(0.9985) ** np.float32(step)
    masks = np.random.default_rng(4).integers(0, 100, 2000, dtype=np.int64)
    masks[step] += 1
    record = np.zeros(60, dtype=[("name", "<U3"), ("value", ">f8"), ("sub", [("a", "i1"), ("b", "<i4")])])
    record["value"] = np.arange(60) + step
    return {
        "model": {
            "weight": weight,
            "frozen": noise(5, 1500),
            "zeros": np.zeros(1000, np.float32),
            "second_moment": second,
            "bias": np.full(10, step, np.float32),
            "scalar": np.array(2.5 + step),
            "empty": np.zeros((0, 3), np.float32),
            "fortran": np.asfortranarray(noise(6, 20, 30)),
            "big_endian": np.arange(200, dtype=">i4"),
            "text": np.array(["a", "bcd", "ä"]),
            "times": np.array(["2024-01-01", "NaT"], "M8[s]"),
            "records": record,
            "complex": noise(7, 200).astype(np.complex64) * 1j,
            "bools": np.arange(300) % 3 == 0,
        },
        "tied": weight,
        "buffer": buffer,
        "window": buffer[10:2000],
        "every_third": buffer[::-3],
        "masks": masks,
        "vocabulary": "the quick brown fox " * 100,
        "blob": bytes(range(256)) * 2,
        "array": bytearray(b"changes"),
        "numbers": list(range(-20, 40)),
        "losses": tuple(1 / (index + 1) for index in range(40)),
        "literals": [None, True, False, 0, -1, 255, 2**80, -0.0, float("nan"), float("inf"), 1 - 2j, "ä\ud800", b"\0"],
        "numpy": (np.float16(1.5), np.int64(step), np.True_, np.datetime64("2024-05-06")),
        "keys": {7: "int", "1": "text", True: "bool", None: "none", 0.5: "float", b"\1": "bytes", (1, "b"): "tuple",
                 "a/b*%": "escaped", "": "empty", "~x": "tilde"},
        "ordered": OrderedDict(b=1, a={}),
        "event": Event(*EVENT),
        "point": Point(1, "y"),
        "nothing": [],
        "step": step,
    }  # fmt: skip


def torch_state(step: int) -> dict[str, Any]:
    """Every dtype and every kind of tensor."""
    import torch

    weight = torch.from_numpy(noise(11, 40, 60)) * (1 + step / 1e6)
    base = torch.from_numpy(noise(12, 3000))
    state: dict[str, Any] = {
        "parameter": torch.nn.Parameter(weight),
        "half": weight.to(torch.bfloat16),
        "float16": weight.to(torch.float16),
        "transposed": weight.T,
        "base": base,
        "corner": base[:800].view(20, 40),
        "sparse": torch.eye(30).to_sparse(),
        "csr": torch.eye(30).to_sparse_csr(),
        "quantized": torch.quantize_per_tensor(base[:300], 0.05, 3, torch.qint8),
        "channels": torch.quantize_per_channel(
            weight, torch.full((40,), 0.1, dtype=torch.float64), torch.zeros(40, dtype=torch.int64), 0, torch.quint8
        ),
        "conjugate": torch.complex(base[:200], base[200:400]).conj(),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
        "size": torch.Size([1, 2, 3]),
        "dtype": torch.float8_e5m2,
        "device": torch.device("cuda:1"),
        "numpy": noise(13, 100),
        "step": step,
    }
    bits = torch.from_numpy(np.random.default_rng(14).integers(0, 256, 1600, dtype=np.uint8))
    for name in ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64", "complex128",
                 "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"):  # fmt: skip
        state[f"dtypes.{name}"] = bits.view(getattr(torch, name))
    state["dtypes.bool"] = bits > 100
    return state


def copies_state(step: int) -> dict[str, Any]:
    """16-bit copies by all rules, one of them with chunks that rest on two chunks of the master."""
    long = np.zeros(300_000, np.float32)
    long[:: 997 + step] = noise(21, len(long[:: 997 + step]))
    short = noise(22, 3000)
    upper = short.view(np.uint32) >> 16
    import torch

    return {
        "long": torch.from_numpy(long),
        "long_copy": torch.from_numpy(long).to(torch.bfloat16),
        "short": torch.from_numpy(short),
        "cut": torch.from_numpy(upper.astype(np.uint16).view(np.int16)).view(torch.bfloat16),
        "half": torch.from_numpy(short).to(torch.float16),
        "half_cut": torch.from_numpy(_cut_half(short)),
    }


def _cut_half(values: np.ndarray[Any, np.dtype[np.float32]]) -> np.ndarray[Any, np.dtype[np.float16]]:
    nearest = values.astype(np.float16)
    away = np.abs(nearest.astype(np.float32)) > np.abs(values)
    halves: np.ndarray[Any, np.dtype[np.float16]] = (nearest.view(np.uint16) - away).view(np.float16)
    return halves


def trained_state(step: int) -> dict[str, Any]:
    """Floats of all sizes that each step moves by about as much; some rows are never touched, some decay besides."""
    weights = noise(71, 20_000) * np.float32(0.05) + noise(80 + step, 20_000) * np.float32(1e-4)
    rows = noise(72, 200, 32)
    rows[step::3] += noise(90 + step, 200, 32)[step::3] * np.float32(1e-3)
    decayed = noise(73, 12_000) * np.float32(0.99) ** np.float32(step) + noise(74 + step, 12_000) * np.float32(1e-5)
    return {
        "weights": weights,
        "rows": rows,
        "decayed": decayed,
        "half": (weights * 64).astype(np.float16)[:6000],
        "double": weights[:3000].astype(np.float64) + noise(100 + step, 3000),
    }


def runs_state(step: int) -> dict[str, Any]:
    """One array long enough for a run, and more values than one manifest part holds."""
    return {
        "many": {index: index * step for index in range(280)},
        "long": noise(31 + step, 17_000),
        "short": noise(30, 200),
        "tail": np.arange(70_001, dtype=np.uint8),
    }


def broken_state(step: int) -> dict[str, Any]:
    """What the broken cases break: the paths that tools/golden_cases.py names."""
    buffer = noise(41, 3000)
    weight = noise(50 + step, 20, 100)
    return {
        "model": {"weight": weight, "frozen": noise(42, 2000), "drift": noise(43, 2000) * np.float32(1 + step / 1e6)},
        "optimizer": {"state": {0: {"step": step, "exp_avg": np.zeros(10_000, np.float32)}}},
        "tied": weight,
        "window": buffer[10:2000],
        "buffer": buffer,
        "vocabulary": "the quick brown fox " * 100,
    }


# ---- repositories ----------------------------------------------------------------------------------------------------


class Recorder:
    """Saves states and keeps what went in."""

    def __init__(self, root: Path, **options: Any) -> None:
        options = {"orphan_grace_s": CENTURY_S, **options}
        self.repo = Repository(root, create(root, RepositoryOptions(**options), clock=SteppingClock()))
        self.states: dict[str, Any] = {}

    def save(self, state: Any, **how: Any) -> str:
        snapshot = self.repo.save(state, **how)
        self.states[snapshot.id] = state
        return snapshot.id


def build_history(root: Path) -> Recorder:
    """Branches, tags, an orphan, what was forgotten, thinned and collected, a policy, parity."""
    made = Recorder(root)
    repo = made.repo
    for step in range(1, 7):
        made.save(plain_state(step), step=step, metrics={"loss": 1 / step, "n": step}, message=f"step {step}")
    made.save(plain_state(20), branch="side", step=20, metadata={"why": ["a fork", None, {"x": 1.5}]})
    repo.branch("Größe/2", at="main~2")
    repo.tag("v1.0", at="main~5")
    made.save(plain_state(99), branch="lost", step=99)
    repo.delete_branch("lost")
    repo.forget(ids=["main~3", "main~4"])
    repo.gc(repack_below=1.0)
    repo.thin(["model/frozen", "masks", "vocabulary"], ids=["main~1"])
    repo.gc(repack_below=1.0)
    gone = made.save(plain_state(50), branch="gone", step=50)
    repo.delete_branch("gone")
    repo.forget(ids=[gone])
    repo.set_policy(castore.Keep(last=3, best=("loss", "min", 1)), thin=["optimizer/**"], older_than=20, every_saves=50)
    repo.add_parity(overhead_percent=10)
    return made


def build_torch(root: Path) -> Recorder:
    made = Recorder(root, hash="blake3")
    for step in (1, 2):
        made.save(torch_state(step), step=step)
    return made


def build_copies(root: Path) -> Recorder:
    made = Recorder(root)
    for step in (1, 2):
        made.save(copies_state(step), step=step)
    return made


def build_ordered(root: Path) -> Recorder:
    """Differences sorted by the exponents of their base: with the feature flag that came with them."""
    made = Recorder(root)
    for step in (1, 2):
        made.save(trained_state(step), step=step)
    return made


def build_runs(root: Path) -> Recorder:
    made = Recorder(root, compression="none")
    made.save(runs_state(1), step=1)
    return made


def build_lz4(root: Path) -> Recorder:
    made = Recorder(root, compression="lz4", hash="blake3")
    made.save(plain_state(1), step=1)
    return made


def build_id_list(root: Path) -> Recorder:
    """A leaf whose chunk ids stand in an id list, as those of leaves above 1 GiB do; written without `save`."""
    made = Recorder(root)
    raw = bytes(1 << 20) + b"tail" * 1000
    chunks = [raw[: 1 << 20], raw[1 << 20 :]]
    ids = b"".join(map(HASHER.chunk_id, chunks))
    entries = [
        manifest.Entry("", manifest.Kind.DICT, shape=(1,)),
        manifest.Entry("long", manifest.Kind.BYTES, raw_bytes=len(raw), id_lists=HASHER.chunk_id(ids)),
    ]

    def append(writer: Any) -> None:
        for chunk, unit in zip(chunks, (b"\0", b"tail"), strict=True):
            writer.append(HASHER.chunk_id(chunk), unit, kind=RecordKind.LEAF, raw_bytes=len(chunk), chain=(4,))
        writer.append(HASHER.chunk_id(ids), ids, kind=RecordKind.ID_LIST, raw_bytes=len(ids), chain=())

    resolved = [entries[0], replace(entries[1], id_lists=None, chunks=ids)]
    snapshot_id = plant(made.repo.handle, [manifest.encode_part(entries)], resolved, make_pack=append)
    made.states[snapshot_id] = {"long": raw}
    return made


def build_crashed_gc(root: Path) -> Recorder:
    """A collector was killed when it was about to remove its first pack: condemned, drain and claim are there."""
    made = Recorder(root, orphan_grace_s=1.0)
    for step in (1, 2, 3):
        made.save({"weight": noise(60 + step, 3000)}, step=step)
    made.repo.forget(ids=["main~1", "main~2"])
    child = os.fork()
    if child == 0:
        LocalBackend.delete = lambda *_: os._exit(9)  # type: ignore[method-assign]
        castore.open(root).gc()
        os._exit(1)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 9:
        raise SystemExit("the collector was not killed")
    return made


def build_repaired(root: Path) -> Recorder:
    """A leaf was lost, found by a load and put on record by a repair; then another one rotted and was only met."""
    made = Recorder(root)
    made.save(broken_state(1), step=1)
    made.save(broken_state(2), step=2)
    for path in ("model/weight", "buffer"):
        location = Workshop(root).location("~storage/0" if path == "buffer" else path)
        flip(Workshop(root).pack_file(location), location.row.offset + 9)
        shutil.rmtree(root / "cache")
        with castore.open(root) as repo:
            with suppress(castore.DamageError):
                repo.load(paths=[path])
            if path == "model/weight":
                repo.repair()
    return made


BUILDERS: dict[str, Callable[[Path], Recorder]] = {
    "history": build_history,
    "torch": build_torch,
    "copies": build_copies,
    "ordered": build_ordered,
    "runs": build_runs,
    "lz4": build_lz4,
    "id-list": build_id_list,
    "crashed-gc": build_crashed_gc,
    "repaired": build_repaired,
}

BROKEN = (
    "flipped-payload",
    "flipped-manifest-part",
    "flipped-table-and-payload",
    "flipped-difference",
    "cut-pack",
    "swapped-packs",
    "pack-of-a-newer-format",
    "a-codec-of-the-future",
    "a-codec-that-cannot-have-made-the-payload",
    "snapshot-of-a-newer-format",
    "missing-snapshot",
    "flipped-snapshot",
    "swapped-refs",
    "config-of-a-pre-release",
    "config-with-an-unknown-read-feature",
    "config-with-an-unknown-write-feature",
    "flipped-config",
    "flipped-condemned-set",
    "a-pickle",
    "a-view-beyond-its-storage",
    "a-part-of-a-newer-version",
    "a-leaf-of-an-exabyte",
)


# ---- what must be found ----------------------------------------------------------------------------------------------


def expectation(root: Path, made: Recorder) -> dict[str, Any]:
    """Names and ids as castore gave them when it wrote; rows of what it was given."""
    repo = made.repo
    history: dict[str, Any] = {snapshot.id: snapshot for snapshot in repo.snapshots()}
    snapshots = {}
    for snapshot_id, state in made.states.items():
        snapshot = history.get(snapshot_id)
        if snapshot is None:
            continue
        thinning = read_thinning(repo.handle.backend, snapshot.id)
        snapshots[snapshot_id] = {
            "state_id": snapshot.state_id,
            "step": snapshot.step,
            "message": snapshot.message,
            "metrics": dict(snapshot.metrics),
            "metadata": dict(snapshot.metadata),
            "parents": list(snapshot.parents),
            "dropped": list(thinning.dropped) if thinning else [],
            "rows": {path: " ".join(map(str, row)) for path, row in rows_of(state).items()},
        }
    return {
        "branches": {ref.name: ref.snapshot_id for ref in repo.branches()},
        "tags": {ref.name: ref.snapshot_id for ref in repo.tags()},
        "log": {ref.name: [snapshot.id for snapshot in repo.log(ref.name)] for ref in repo.branches()},
        "orphans": [snapshot.id for snapshot in repo.orphans()],
        "forgotten": sorted(path.name for path in root.glob("forgotten/*")),
        "snapshots": snapshots,
    }


def build_broken_cases(out: Path) -> None:
    """The whole repository, and of each case the files in which it differs from that."""
    whole = out / "broken" / "whole"
    made = Recorder(whole)
    for step in (1, 2, 3):
        made.save(broken_state(step), step=step)
    made.repo.branch("side", at="main~1")
    made.repo.close()
    tidy(whole)
    cases = {}
    for case in CASES:
        if case.name not in BROKEN:
            continue
        scratch = out / "broken" / "scratch"
        shutil.copytree(whole, scratch)
        case.damage(Workshop(scratch))
        tidy(scratch)
        removed = []
        for path in sorted(whole.rglob("*")):
            name, other = path.relative_to(whole), scratch / path.relative_to(whole)
            if path.is_file() and not other.exists():
                removed.append(str(name))
        for path in sorted(scratch.rglob("*")):
            name = path.relative_to(scratch)
            same = (whole / name).exists() and path.is_file() and (whole / name).read_bytes() == path.read_bytes()
            if path.is_file() and not same:
                target = out / "broken" / case.name / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
        shutil.rmtree(scratch)
        cases[case.name] = {"removed": removed, **describe(case)}
    (out / "broken.json").write_text(json.dumps(cases, indent=1) + "\n")


def tidy(root: Path) -> None:
    """Leave what is checked in."""
    for name in TEMPORARY:
        path = root / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def main() -> int:
    """Build the named repositories."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="+", choices=[*BUILDERS, "broken"])
    arguments = parser.parse_args()
    out: Path = arguments.out
    for name in arguments.names:
        if (out / name).exists():
            raise SystemExit(f"{out / name} is there: golden repositories never change; add one under another name")
        if name == "broken":
            build_broken_cases(out)
            continue
        made = BUILDERS[name](out / name)
        expected = expectation(out / name, made)
        made.repo.close()
        tidy(out / name)
        (out / f"{name}.json").write_text(json.dumps(expected, indent=1, ensure_ascii=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
