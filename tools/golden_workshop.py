"""Tools to break a repository with: what a bad disk does, and what a stranger's writer could do.

A bad disk flips and cuts. A stranger writes whatever he likes and puts every checksum and digest right afterwards, so
that the checks behind them are the ones that must hold.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import castore
from castore.backend import LocalBackend
from castore.errors import FormatError
from castore.format import manifest, pack, snapshot, textfile
from castore.format.identity import state_id
from castore.format.layout import pack_name, snapshot_name
from castore.format.manifest import Entry
from castore.format.pack import RecordKind, Row, Trailer
from castore.hashing import checksum, hasher_for
from castore.ids import ChunkId, PackId, SnapshotId, StateId, new_pack_id
from castore.index.base import Location
from castore.pack.reader import read_table
from castore.pack.writer import PackWriter
from castore.refs import move_branch
from castore.repository import Handle, open_repository
from castore.snapshots import read_record

FIRST_NS = 1_700_000_000 * 10**9
"""When everything happens."""
HASHER = hasher_for("xxh3-128")
N = HASHER.digest_bytes


@dataclass(frozen=True, slots=True)
class Workshop:
    """One repository to be broken."""

    root: Path

    def packs(self) -> list[Path]:
        return sorted((self.root / "packs").glob("*/*.pack"))

    def snapshot_file(self, ref: str) -> Path:
        with castore.open(self.root) as repo:
            return self.root / snapshot_name(repo.snapshot(ref).id)

    def location(self, path: str, *, ref: str = "main", index: int = 0) -> Location:
        """Where chunk `index` of a leaf lies."""
        with castore.open(self.root) as repo:
            snapshot_id = repo.snapshot(ref).id
            record = read_record(repo.handle.backend, snapshot_id)
            entry = next(entry for entry in repo.handle.manifests.entries(record) if entry.path == path)
            chunk_id = entry.chunk_ids(N)[index]
            return repo.handle.store.locate([chunk_id])[chunk_id][0]

    def part_location(self, ref: str = "main") -> Location:
        """Where the first manifest part of a snapshot lies."""
        with castore.open(self.root) as repo:
            record = read_record(repo.handle.backend, repo.snapshot(ref).id)
            return repo.handle.store.locate(record.part_ids)[record.part_ids[0]][0]

    def pack_file(self, location: Location) -> Path:
        return self.root / pack_name(location.pack_id)

    def forget_index(self) -> None:
        shutil.rmtree(self.root / "cache", ignore_errors=True)

    def plant(self, entries: Sequence[Entry]) -> None:
        """A snapshot of these entries, whole in every other respect, on branch `hostile`."""
        self.plant_parts([manifest.encode_part(entries)], entries)

    def plant_parts(
        self,
        parts: Sequence[bytes],
        entries: Sequence[Entry] = (),
        *,
        make_pack: Callable[[PackWriter], None] | None = None,
        part_ids: Sequence[ChunkId] | None = None,
    ) -> None:
        """The same of parts that are bytes already; `make_pack` may add records of its own."""
        handle = open_repository(self.root)
        plant(handle, parts, entries, make_pack=make_pack, part_ids=part_ids)
        handle.close()

    def write_ref(self, kind: str, file_name: str, snapshot_id: str, *, name: str | None = None) -> None:
        path = self.root / "refs" / kind / file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        fields = {"name": file_name if name is None else name, "snapshot": snapshot_id, "time_ns": FIRST_NS}
        path.write_bytes(textfile.encode_text_file(fields))

    def head(self, ref: str = "main") -> SnapshotId:
        with castore.open(self.root) as repo:
            return repo.snapshot(ref).id


def plant(
    handle: Handle,
    parts: Sequence[bytes],
    entries: Sequence[Entry] = (),
    *,
    make_pack: Callable[[PackWriter], None] | None = None,
    part_ids: Sequence[ChunkId] | None = None,
) -> SnapshotId:
    """What a stranger's writer would leave: a pack and a snapshot of step 666 with every digest right, on `hostile`."""
    pack_id = new_pack_id()
    header = pack.PackHeader(pack_id, handle.config.repository_id, HASHER, FIRST_NS)
    writer = PackWriter(handle.backend.create_stream(pack_name(pack_id)), header)
    for raw in parts:
        writer.append(HASHER.chunk_id(raw), raw, kind=RecordKind.PART, raw_bytes=len(raw), chain=())
    if make_pack is not None:
        make_pack(writer)
    writer.seal()
    try:
        state = state_id(HASHER, entries)
    except FormatError:
        state = StateId(bytes(N).hex())
    record = snapshot.SnapshotRecord(
        state_id=state,
        parents=(),
        branch="hostile",
        step=666,
        time_ns=FIRST_NS,
        metrics={},
        metadata={},
        message="",
        raw_bytes=sum(entry.raw_bytes for entry in entries if entry.has_bytes),
        new_bytes=0,
        stored_bytes=0,
        leaf_count=sum(not entry.is_container for entry in entries),
        part_ids=tuple(part_ids) if part_ids is not None else tuple(map(HASHER.chunk_id, parts)),
        software="tools/make_golden.py",
        nonce=bytes(8),
    )
    snapshot_id, data = snapshot.encode_snapshot(record, HASHER)
    handle.backend.put_if_absent(snapshot_name(snapshot_id), data)
    move_branch(handle.backend, "hostile", expected_id=None, new_id=snapshot_id, now_ns=FIRST_NS)
    return snapshot_id


def flip(path: Path, offset: int, *, mask: int = 0x10) -> None:
    """Change one bit (by default) of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= mask
    path.write_bytes(data)


def cut(path: Path, size: int) -> None:
    """Shorten a file."""
    path.write_bytes(path.read_bytes()[:size])


def rewrite_table(path: Path, change: Callable[[list[Row]], list[Row]], **trailer_fields: Any) -> None:
    """Change the rows of a pack's table, or fields of its trailer, and put every checksum right again."""
    backend = LocalBackend(path.parents[2])
    pack_id = PackId(path.stem)
    reader = backend.open_reader(pack_name(pack_id))
    rows = read_table(reader, where=path.name, expected_id=pack_id, hasher=HASHER)
    reader.close()
    data = path.read_bytes()
    old_bytes = len(pack.encode_table(rows, id_bytes=N))
    table_offset = len(data) - pack.TRAILER_BYTES - old_bytes
    changed = change(rows)
    table = pack.encode_table(changed, id_bytes=N)
    second_bases = sum(len(row.base_ids) > 1 for row in changed)
    trailer = Trailer(pack_id, table_offset, len(changed), checksum(table), second_bases)
    path.write_bytes(data[:table_offset] + table + pack.encode_trailer(replace(trailer, **trailer_fields)))


def rewrite_record(path: Path, row: Row, **fields: Any) -> None:
    """Change the header of one record, its checksum put right, and its row of the table with it."""
    changed = replace(row, **fields)
    data = bytearray(path.read_bytes())
    start = row.offset - pack.record_header_bytes(N, base_count=len(row.base_ids))
    data[start : row.offset] = pack.encode_record_header(changed, id_bytes=N)
    path.write_bytes(data)
    rewrite_table(path, lambda rows: [changed if found == row else found for found in rows])


def edit_config(root: Path, **fields: Any) -> None:
    """Change fields of the config, its digest put right."""
    path = root / "config"
    path.write_bytes(textfile.encode_text_file(textfile.decode_text_file(path.read_bytes(), name="config") | fields))
