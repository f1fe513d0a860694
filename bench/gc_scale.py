"""How garbage collection scales: synthetic histories of many snapshots of many chunks, a real collection on them.

    python -m bench.gc_scale [--snapshots 1000] [--chunks 2000] [--full] [--place DIR] [--write-results]

clustered    the 1 % of chunks that are new in each snapshot lie side by side: most manifest parts are shared
scattered    they are spread evenly: most parts change with every snapshot, and each must be read

Snapshot files, manifest parts, packs, tables and the index are real; only the payloads of leaves are stand-ins of 8
bytes, so nothing is rewritten. Every second snapshot is forgotten, and a collection frees what only those held. It runs
in a process of its own, whose peak memory the kernel reports; "mark" is what the columns of the ledger take. `--full`
is the size that is promised: 10 000 snapshots of 10 000 chunks, clustered, below 60 s and 1 GiB on 2 cores; scattered
at a tenth and a fifth of it, to show that time is linear.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgpack

import castore
from castore.backend import LocalBackend
from castore.format.layout import branch_name, pack_name, snapshot_name
from castore.format.manifest import Entry, Kind, cut_parts, decode_part, encode_part
from castore.format.pack import PackHeader, RecordKind
from castore.format.snapshot import SnapshotRecord, encode_snapshot
from castore.format.textfile import encode_text_file
from castore.hashing import hasher_for
from castore.ids import Buffer, ChunkId, SnapshotId, StateId, new_pack_id
from castore.maintenance.gc.collect import GcRequest, collect
from castore.marks import Forgotten, forget_snapshot
from castore.pack.writer import PackWriter
from castore.snapshots import read_record

HASHER = hasher_for("xxh3-128")
NEW_SHARE = 0.01
PAYLOAD = bytes(8)


@dataclass(frozen=True, slots=True)
class Case:
    """One history."""

    pattern: str
    snapshots: int
    chunks: int


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
        head = b"\x92\x00" + msgpack.Packer().pack_array_header(len(places))
        pieces = [head]
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
    assert decode_part(manifest.part(0), id_bytes=16, where="part")  # it is one
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
        handle = repository.handle
        began = time.perf_counter()
        repository.reindex()
        index_s = time.perf_counter() - began
    with castore.open(place) as repository:
        handle = repository.handle
        base_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
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
    print(
        json.dumps(
            {
                "index_s": index_s,
                "mark_s": mark_s,
                "mark_cpu_s": mark_cpu_s,
                "collect_s": collect_s,
                "collect_cpu_s": collect_cpu_s,
                "chunks": whole.chunk_count,
                "ledger_bytes": whole.ledger_bytes,
                "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "base_bytes": base_kib * 1024,
                "snapshots_removed": len(report.snapshots),
            }
        )
    )


def measure(case: Case, place: Path) -> str:
    """One row of the table."""
    began = time.perf_counter()
    build(place, case)
    build_s = time.perf_counter() - began
    command = [sys.executable, "-m", "bench.gc_scale", "--child", str(place)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(result.stdout)
    print(f"{case}: built in {build_s:.0f} s, {found}", file=sys.stderr)
    each = found["ledger_bytes"] / found["chunks"]
    return (
        f"| {case.pattern} | {case.snapshots} of {case.chunks} | {found['chunks']} | {found['mark_s']:.1f} "
        f"({found['mark_cpu_s']:.1f}) | {found['collect_s']:.1f} ({found['collect_cpu_s']:.1f}) | "
        f"{found['peak_bytes'] / 2**20:.0f} | {each:.0f} | {found['index_s']:.1f} |"
    )


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
            Case("clustered", 10_000, 10_000),
            Case("scattered", 1000, 10_000),
            Case("scattered", 2000, 10_000),
        ]
    else:
        sizes = arguments.snapshots, arguments.chunks
        cases = [Case("clustered", *sizes), Case("scattered", *sizes), Case("scattered", sizes[0] // 2, sizes[1])]
    lines = [
        "| new | snapshots of chunks | live | mark, s (CPU) | collect, s (CPU) | peak, MiB | bytes/chunk | index, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        place = Path(tempfile.mkdtemp(prefix="castore-gc-", dir=arguments.place))
        try:
            lines.append(measure(case, place / "store"))
        finally:
            shutil.rmtree(place)
    table = "\n".join(lines)
    print(table)
    if arguments.write_results:
        from bench.sections import write_section

        write_section("gc scale", "Garbage collection", f"Target, clustered in full: 60 s, 1 GiB.\n\n{table}")


if __name__ == "__main__":
    main()
