"""How garbage collection scales: synthetic histories of many snapshots of many chunks, a real collection on them.

    python -m bench.gc_scale [--snapshots 1000] [--chunks 2000] [--full] [--place DIR] [--write-results]

clustered    the 1 % of chunks that are new in each snapshot lie side by side: most manifest parts are shared
scattered    they are spread evenly: most parts change with every snapshot, and each must be read

Snapshot files, manifest parts, packs, tables and the index are real; only the payloads of leaves are stand-ins of 8
bytes and the manifests have no containers, so nothing is rewritten and nothing can be loaded. Every second snapshot is
forgotten, and a collection frees what only those held. It runs in a process of its own, whose peak memory the kernel
reports; "bytes/chunk" is what the columns of the ledger take. `--full` is the size that is promised: 10 000 snapshots
of 10 000 chunks, clustered, below 60 s and 1 GiB on 2 cores; scattered at a tenth and a fifth of it, to show how time
grows.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import msgpack

import castore
from bench.sections import write_section
from castore.backend import LocalBackend
from castore.format.layout import branch_name, pack_name, snapshot_name
from castore.format.manifest import PART_VERSION, Entry, Kind, cut_parts, decode_part, encode_part
from castore.format.pack import PackHeader, RecordKind
from castore.format.snapshot import SnapshotRecord, encode_snapshot
from castore.format.textfile import encode_text_file
from castore.hashing import hasher_for
from castore.ids import Buffer, ChunkId, SnapshotId, StateId, new_pack_id
from castore.maintenance.gc.collect import GcRequest, collect
from castore.marks import Forgotten, forget_snapshot
from castore.options import MIB
from castore.pack.writer import PackWriter
from castore.snapshots import read_record

HASHER = hasher_for("xxh3-128")
NEW_SHARE = 0.01
PAYLOAD = bytes(8)


HOW = """Wall time; in parentheses processor time of the one process, which is less where other work kept the cores
busy. Mark reads every manifest of a repository where everything is live; collect marks again and removes half of the
snapshots. Peak memory includes the reading of the index before."""


@dataclass(frozen=True, slots=True)
class Case:
    """One history."""

    pattern: str
    snapshots: int
    chunks: int


PROMISED = Case("clustered", 10_000, 10_000)
PROMISED_S = 60
PROMISED_BYTES = 1024 * MIB


@dataclass(frozen=True, slots=True)
class Found:
    """What one collection took."""

    case: Case
    index_s: float
    mark_s: float
    """Of a dry run: everything is live."""
    mark_cpu_s: float
    collect_s: float
    """Of the collection that removes half of the snapshots; it marks again."""
    collect_cpu_s: float
    chunks: int
    """Live before."""
    ledger_bytes: int
    peak_bytes: int
    snapshots_removed: int
    snapshots_left: int


class PlainSink:
    """A pack file written without syncing: it only has to last as long as the measurement."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("wb")

    def write(self, *buffers: Buffer) -> None:
        for buffer in buffers:
            self._file.write(buffer)

    def flush_hint(self) -> None:
        pass

    def commit(self) -> None:
        self._file.close()

    def abort(self) -> None:
        self._file.close()


class Manifest:
    """A manifest of one-chunk leaves whose parts are made again without packing every entry."""

    def __init__(self, ids: list[bytes]) -> None:
        self.ids = ids
        marker = bytes(range(16))
        entries = [
            Entry(f"model/layer.{index}/weight", Kind.TENSOR, "float32", (262144,), raw_bytes=1 << 20, chunks=marker)
            for index in range(len(ids))
        ]
        self._around: list[tuple[bytes, bytes]] = []
        self._ranges: list[range] = []
        start = 0
        for part in cut_parts(entries, id_bytes=16):
            self._ranges.append(range(start, start + len(part)))
            start += len(part)
        for entry in entries:
            before, after = encode_part([entry])[3:].split(marker)
            self._around.append((before, after))
        self.part_of = {index: number for number, part in enumerate(self._ranges) for index in part}

    def part(self, number: int) -> bytes:
        """The bytes of one part, as encode_part would make them."""
        places = self._ranges[number]
        packer = msgpack.Packer()
        pieces = [packer.pack_array_header(2) + packer.pack(PART_VERSION) + packer.pack_array_header(len(places))]
        for index in places:
            before, after = self._around[index]
            pieces += (before, self.ids[index], after)
        return b"".join(pieces)

    @property
    def part_count(self) -> int:
        return len(self._ranges)


def build(place: Path, case: Case) -> None:
    """A repository with that history on one branch."""
    castore.init(place).close()
    repository = castore.open(place)
    repository_id = repository.handle.config.repository_id
    backend = LocalBackend(place)
    chooser = random.Random(0)
    manifest = Manifest([chooser.randbytes(16) for _ in range(case.chunks)])
    entries = decode_part(manifest.part(0), id_bytes=16, where="part")
    assert encode_part(entries) == manifest.part(0)  # it is one, as castore writes it
    new_count = max(1, int(case.chunks * NEW_SHARE))
    part_ids = [ChunkId(b"")] * manifest.part_count
    parents: tuple[SnapshotId, ...] = ()
    (place / "snapshots").mkdir()
    for step in range(case.snapshots):
        changed = _changed(chooser, case, new_count) if step else range(case.chunks)
        for index in changed:
            manifest.ids[index] = chooser.randbytes(16)
        pack_id = new_pack_id()
        sink = PlainSink(place / pack_name(pack_id))
        writer = PackWriter(sink, PackHeader(pack_id, repository_id, HASHER, time.time_ns()))
        for index in changed:
            chunk_id = ChunkId(manifest.ids[index])
            writer.append(chunk_id, PAYLOAD, kind=RecordKind.LEAF, raw_bytes=1 << 20, chain=(4,))
        for number in sorted({manifest.part_of[index] for index in changed}):
            part = manifest.part(number)
            part_ids[number] = HASHER.chunk_id(part)
            writer.append(part_ids[number], part, kind=RecordKind.PART, raw_bytes=len(part), chain=())
        writer.seal()
        record = SnapshotRecord(
            StateId("0" * 32), parents, "main", step, step, {}, {}, "", case.chunks << 20, new_count << 20, 0,
            case.chunks, tuple(part_ids), "bench", chooser.randbytes(8),
        )  # fmt: skip
        snapshot_id, data = encode_snapshot(record, HASHER)
        (place / snapshot_name(snapshot_id)).write_bytes(data)
        parents = (snapshot_id,)
    head = encode_text_file({"name": "main", "snapshot": parents[0], "time_ns": 0})
    backend.compare_and_swap(branch_name("main"), expected=None, new=head)


def _changed(chooser: random.Random, case: Case, new_count: int) -> Iterator[int] | list[int] | range:
    if case.pattern == "scattered":
        return chooser.sample(range(case.chunks), new_count)
    start = chooser.randrange(case.chunks - new_count + 1)
    return range(start, start + new_count)


def child(place: Path) -> None:
    """In a process of its own: index, mark (a dry run), forget every second snapshot, collect; prints JSON."""
    with castore.open(place) as repository:
        began = time.perf_counter()
        repository.reindex()
        index_s = time.perf_counter() - began
    with castore.open(place) as repository:
        handle = repository.handle
        began, began_cpu = time.perf_counter(), time.process_time()
        whole = collect(handle, GcRequest(dry_run=True, repack_below=0))
        mark_s, mark_cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
        for number, snapshot in enumerate(list(repository.log("main"))):
            if number % 2:
                record = read_record(handle.backend, snapshot.id)
                mark = Forgotten(snapshot.id, record.parents, "main", snapshot.step, 0, time.time_ns(), "bench")
                forget_snapshot(handle.backend, mark)
        began, began_cpu = time.perf_counter(), time.process_time()
        report = collect(handle, GcRequest(repack_below=0))
        collect_s, collect_cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
    found = {
        "index_s": index_s,
        "mark_s": mark_s,
        "mark_cpu_s": mark_cpu_s,
        "collect_s": collect_s,
        "collect_cpu_s": collect_cpu_s,
        "chunks": whole.chunk_count,
        "ledger_bytes": whole.ledger_bytes,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "snapshots_removed": len(report.snapshots),
        "snapshots_left": report.snapshot_count,
    }
    print(json.dumps(found))


def measure(case: Case, place: Path) -> Found:
    """Build the history and collect it."""
    began = time.perf_counter()
    build(place, case)
    build_s = time.perf_counter() - began
    command = [sys.executable, "-m", "bench.gc_scale", "--child", str(place)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = Found(case, **json.loads(result.stdout))
    print(f"built in {build_s:.0f} s, {found}", file=sys.stderr)
    return found


# ---- the text --------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Found]) -> str:
    """One line each."""
    lines = [
        "| new | snapshots of chunks | live | mark, s (CPU) | collect, s (CPU) | peak, MiB | bytes/chunk | index, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.case.pattern} | {row.case.snapshots} of {row.case.chunks} | {row.chunks} | {row.mark_s:.1f} "
        f"({row.mark_cpu_s:.1f}) | {row.collect_s:.1f} ({row.collect_cpu_s:.1f}) | {row.peak_bytes / MIB:.0f} | "
        f"{row.ledger_bytes / row.chunks:.0f} | {row.index_s:.1f} |"
        for row in rows
    ]
    return "\n".join(lines)


def sentences(rows: Sequence[Found]) -> str:
    """What the rows say of the promise, and how time grows with a scattered history."""
    return "\n".join([*_of_the_promise(rows), *_of_growth([row for row in rows if row.case.pattern == "scattered"])])


def _of_the_promise(rows: Sequence[Found]) -> Iterator[str]:
    row = next((row for row in rows if row.case == PROMISED), None)
    if row is None:
        yield f"The promised size was not measured ({PROMISED.pattern}, {PROMISED.snapshots} of {PROMISED.chunks})."
        return
    wall_s, cpu_s = max(row.mark_s, row.collect_s), max(row.mark_cpu_s, row.collect_cpu_s)
    yield (
        f"The promise for the {PROMISED.pattern} history, {PROMISED_S} s and {PROMISED_BYTES // MIB} MiB: "
        f"{_verdict(wall_s, PROMISED_S)} by wall time ({wall_s:.1f} s, the longer of both), "
        f"{_verdict(cpu_s, PROMISED_S)} by processor time ({cpu_s:.1f} s), "
        f"{_verdict(row.peak_bytes, PROMISED_BYTES)} in memory ({row.peak_bytes / MIB:.0f} MiB)."
    )


def _of_growth(scattered: Sequence[Found]) -> Iterator[str]:
    for less, more in pairwise(sorted(scattered, key=lambda row: row.case.snapshots)):
        grown = [
            f"{name} {_times(getattr(more, f'{name}_s'), getattr(less, f'{name}_s'))} by wall time and "
            f"{_times(getattr(more, f'{name}_cpu_s'), getattr(less, f'{name}_cpu_s'))} by processor time"
            for name in ("mark", "collect")
        ]
        yield (
            f"Scattered, {less.case.snapshots} → {more.case.snapshots} snapshots "
            f"({_times(more.case.snapshots, less.case.snapshots)}): {'; '.join(grown)}."
        )


def _verdict(found: float, bound: float) -> str:
    return "kept" if found <= bound else "**missed**"


def _times(more: float, less: float) -> str:
    return f"{more / less:.1f}x"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--snapshots", type=int, default=1000)
    parser.add_argument("--chunks", type=int, default=2000)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--place", type=Path)
    parser.add_argument("--write-results", action="store_true")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child)
        return
    if arguments.full:
        cases = [
            PROMISED,
            Case("scattered", 1000, 10_000),
            Case("scattered", 2000, 10_000),
        ]
    else:
        sizes = arguments.snapshots, arguments.chunks
        cases = [Case("clustered", *sizes), Case("scattered", *sizes), Case("scattered", sizes[0] // 2, sizes[1])]
    rows = []
    for case in cases:
        place = Path(tempfile.mkdtemp(prefix="castore-gc-", dir=arguments.place))
        try:
            rows.append(measure(case, place / "store"))
        finally:
            shutil.rmtree(place)
    text = f"{table(rows)}\n\n{sentences(rows)}"
    print(text)
    if arguments.write_results:
        command = " ".join(["python -m bench.gc_scale", *(["--full"] if arguments.full else [])])
        write_section("gc scale", "Garbage collection", f"`{command}`. {HOW}\n{_load()}\n\n{text}")


def _load() -> str:
    minutes = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    return f"{os.cpu_count()} cores; load averages over 1, 5 and 15 minutes at the end: {minutes}."


if __name__ == "__main__":
    main()
