"""Build a small whole repository, and copies of it that are broken on purpose, each in one way.

    python tools/make_golden.py OUT        OUT/whole, OUT/whole-torch, OUT/whole-runs, OUT/broken/<case>, OUT/cases.json

Each case says what castore must answer: the error of `open`, `load` and `save`, the kinds of problems that `verify` finds
without and with `data`, and exactly which leaves of which snapshots are lost. tests/test_golden.py builds every case and
asks. While the format is provisional the bytes are made afresh each time; later they are checked in.

Pack ids, nonces and the repository id are random by design; the clock and the contents are fixed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import zstandard

import castore
from castore.backend import LocalBackend
from castore.errors import (
    CastoreError,
    ChecksumError,
    ChunkMissingError,
    CodecError,
    FormatError,
    PickleRefusedError,
    UnknownClassError,
    UnknownRefError,
    UnsupportedFormatError,
)
from castore.format import manifest, pack, snapshot, textfile
from castore.format.identity import leaf_digest, state_id
from castore.format.layout import branch_name, pack_name, parse_pack_name, snapshot_name
from castore.format.manifest import Entry, Kind
from castore.format.pack import RecordKind, Row, Trailer
from castore.hashing import checksum, hasher_for
from castore.ids import ChunkId, PackId, SnapshotId, StateId, new_pack_id
from castore.index import open_index
from castore.index.base import Location
from castore.options import GRID_BYTES, RepositoryOptions
from castore.pack.reader import read_table
from castore.pack.writer import PackWriter
from castore.repository import create, open_repository

FIRST_NS = 1_700_000_000 * 10**9
"""The clock starts here and goes on by a minute each time that it is read."""
HASHER = hasher_for("xxh3-128")
N = HASHER.digest_bytes


# ---- whole repositories --------------------------------------------------------------------------------------------


class SteppingClock:
    """A clock of its own."""

    def __init__(self) -> None:
        self._now_ns = FIRST_NS

    def __call__(self) -> int:
        self._now_ns += 60 * 10**9
        return self._now_ns


def make_state(step: int) -> dict[str, Any]:
    """A training state of Python and numpy values: two chunks that change, shared memory, spilled text, inline values."""
    rng = np.random.default_rng(step)
    buffer = np.random.default_rng(100).standard_normal(30_000, dtype=np.float32)
    weight = rng.standard_normal((300, 1000), dtype=np.float32)
    return {
        "model": {
            "weight": weight,
            "bias": np.full(10, step, dtype=np.float32),
            "frozen": np.random.default_rng(101).standard_normal(50_000, dtype=np.float32),
        },
        "optimizer": {
            "state": {0: {"step": step, "exp_avg": np.zeros(100_000, dtype=np.float32)}},
            "lr": 0.1 / step,
        },
        "tied": weight,
        "window": buffer[10:20_000],
        "buffer": buffer,
        "vocabulary": "the quick brown fox " * 500,
        "history": [(index, 1.0 / (index + 1)) for index in range(step)],
    }


def make_torch_state(step: int) -> dict[str, Any]:
    """The same in torch, with the kinds of tensors that numpy has not."""
    import torch

    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(300, 1000, generator=generator)
    frozen = torch.randn(60_000, generator=torch.Generator().manual_seed(0))
    return {
        "model": {
            "weight": torch.nn.Parameter(weight),
            "half": weight.to(torch.bfloat16),
            "frozen": frozen,
            "corner": frozen[:2000].view(40, 50),
            "transposed": weight[:, :400].T,
        },
        "sparse": torch.eye(400).to_sparse_coo(),
        "rng": torch.Generator().manual_seed(step).get_state(),
        "step": step,
    }


def build_whole(
    root: Path, *, make: Callable[[int], Any] = make_state, options: RepositoryOptions | None = None
) -> None:
    """Three snapshots on `main` (the first tagged `v1`), one on `side`, and an orphan of step 99."""
    with castore.Repository(root, create(root, options or RepositoryOptions(), clock=SteppingClock())) as repo:
        for step in (1, 2, 3):
            repo.save(make(step), step=step, metrics={"loss": 1.0 / step}, tags=("v1",) if step == 1 else ())
        repo.branch("side", at="main~1")
        repo.save(make(20), branch="side", step=20, metadata={"why": "a fork"}, message="on the side")
        repo.save(make(99), branch="lost", step=99)
        repo.delete_branch("lost")


# ---- tools to damage with ------------------------------------------------------------------------------------------


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
            record = castore.snapshots.read_record(repo.handle.backend, snapshot_id)
            entry = next(entry for entry in repo.handle.manifests.entries(record) if entry.path == path)
            chunk_id = entry.chunk_ids(N)[index]
            return repo.handle.store.locate([chunk_id])[chunk_id][0]

    def part_location(self, ref: str = "main") -> Location:
        """Where the first manifest part of a snapshot lies."""
        with castore.open(self.root) as repo:
            record = castore.snapshots.read_record(repo.handle.backend, repo.snapshot(ref).id)
            return repo.handle.store.locate(record.part_ids)[record.part_ids[0]][0]

    def pack_file(self, location: Location) -> Path:
        return self.root / pack_name(location.pack_id)

    def forget_index(self) -> None:
        shutil.rmtree(self.root / "cache", ignore_errors=True)

    def plant(self, entries: Sequence[Entry], *, chunks: Mapping[ChunkId, bytes] | None = None) -> None:
        """A snapshot of these entries, whole in every other respect, on branch `hostile`."""
        self.plant_parts([manifest.encode_part(entries)], entries, chunks=chunks)

    def plant_parts(
        self,
        parts: Sequence[bytes],
        entries: Sequence[Entry] = (),
        *,
        chunks: Mapping[ChunkId, bytes] | None = None,
        make_pack: Callable[[PackWriter], None] | None = None,
        part_ids: Sequence[ChunkId] | None = None,
    ) -> None:
        handle = open_repository(self.root)
        pack_id = new_pack_id()
        header = pack.PackHeader(pack_id, handle.config.repository_id, HASHER, FIRST_NS)
        writer = PackWriter(handle.backend.create_stream(pack_name(pack_id)), header)
        for raw in parts:
            writer.append(HASHER.chunk_id(raw), raw, kind=RecordKind.PART, raw_bytes=len(raw), chain=())
        for chunk_id, raw in (chunks or {}).items():
            writer.append(chunk_id, raw, kind=RecordKind.LEAF, raw_bytes=len(raw), chain=())
        if make_pack is not None:
            make_pack(writer)
        writer.seal()
        try:
            state = state_id(HASHER, entries)
        except FormatError:
            state = StateId(bytes(N).hex())
        record = snapshot.SnapshotRecord(
            state,
            (),
            "hostile",
            666,
            FIRST_NS,
            {},
            {},
            "",
            sum(entry.raw_bytes for entry in entries if entry.has_bytes),
            0,
            0,
            sum(not entry.is_container for entry in entries),
            tuple(part_ids) if part_ids is not None else tuple(HASHER.chunk_id(raw) for raw in parts),
            "tools/make_golden.py",
            bytes(8),
        )
        snapshot_id, data = snapshot.encode_snapshot(record, HASHER)
        handle.backend.put_if_absent(snapshot_name(snapshot_id), data)
        self.write_ref("branches", "hostile", snapshot_id)
        handle.close()

    def write_ref(self, kind: str, file_name: str, snapshot_id: str, *, name: str | None = None) -> None:
        path = self.root / "refs" / kind / file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        fields = {"name": file_name if name is None else name, "snapshot": snapshot_id, "time_ns": FIRST_NS}
        path.write_bytes(textfile.encode_text_file(fields))

    def head(self, ref: str = "main") -> SnapshotId:
        with castore.open(self.root) as repo:
            return repo.snapshot(ref).id


def flip(path: Path, offset: int, *, mask: int = 0x10) -> None:
    """Change one bit (by default) of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= mask
    path.write_bytes(data)


def cut(path: Path, size: int) -> None:
    """Shorten a file."""
    path.write_bytes(path.read_bytes()[:size])


def rewrite_table(path: Path, change: Callable[[list[Row]], list[Row]], **trailer_fields: int) -> None:
    """Change the rows of a pack's table, or fields of its trailer, and put every checksum right again."""
    backend = LocalBackend(path.parents[2])
    pack_id = PackId(path.stem)
    reader = backend.open_reader(pack_name(pack_id))
    rows = read_table(reader, where=path.name, expected_id=pack_id, hasher=HASHER)
    reader.close()
    data = path.read_bytes()
    old_bytes = len(rows) * pack.row_bytes(N)
    table_offset = len(data) - pack.TRAILER_BYTES - old_bytes
    table = pack.encode_table(change(rows), id_bytes=N)
    trailer = Trailer(pack_id, table_offset, len(table) // pack.row_bytes(N), checksum(table))
    path.write_bytes(data[:table_offset] + table + pack.encode_trailer(replace(trailer, **trailer_fields)))


def rewrite_record(path: Path, row: Row, **fields: Any) -> None:
    """Change the header of one record, its checksum put right, and its row of the table with it."""
    changed = replace(row, **fields)
    data = bytearray(path.read_bytes())
    start = row.offset - pack.record_header_bytes(N)
    data[start : row.offset] = pack.encode_record_header(changed, id_bytes=N)
    path.write_bytes(data)
    rewrite_table(path, lambda rows: [changed if found == row else found for found in rows])


def edit_config(root: Path, **fields: Any) -> None:
    """Change fields of the config, its digest put right."""
    path = root / "config"
    path.write_bytes(textfile.encode_text_file(textfile.decode_text_file(path.read_bytes(), name="config") | fields))


# ---- cases ---------------------------------------------------------------------------------------------------------

Errors = type[CastoreError] | None
Damage = Callable[[Workshop], None]


@dataclass(frozen=True)
class Case:
    """One way to break a repository, and what castore must answer."""

    name: str
    damage: Damage
    ref: str = "main"
    """What is loaded."""
    opens: Errors = None
    loads: Errors = None
    """With no index; with the index of before, any DamageError will do."""
    saves: Errors = None
    """Saving another snapshot to `main`."""
    structure: frozenset[str] = frozenset()
    """Kinds of problems that `verify` must find."""
    data: frozenset[str] | None = None
    """The same with `data`; None: the same kinds."""
    lost: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    """Step → lost leaves of every snapshot that `verify(data=True)` must name; no leaves: all of it."""
    options: RepositoryOptions = RepositoryOptions()
    keeps_index: bool = False
    """Whether the damage is to the index."""

    @property
    def data_kinds(self) -> frozenset[str]:
        """Kinds of problems that `verify(data=True)` must find."""
        return self.structure if self.data is None else self.data


CASES: list[Case] = []


def case(**fields: Any) -> Callable[[Damage], Damage]:
    """Register a case under the name of its function."""

    def register(damage: Damage) -> Damage:
        kinds = {key: frozenset(fields.pop(key).split()) for key in ("structure", "data") if key in fields}
        CASES.append(Case(damage.__name__.replace("_", "-"), damage, **kinds, **fields))
        return damage

    return register


WEIGHT = ("model/weight", "tied")
ALL_STEPS = (1, 2, 3, 20, 99)


def build_broken(broken: Case, whole: Path, root: Path, *, keep_index: bool = False) -> None:
    """Copy a whole repository and damage the copy; without its index unless it is the index that is damaged."""
    shutil.copytree(whole, root)
    workshop = Workshop(root)
    broken.damage(workshop)
    if not broken.keeps_index and not keep_index:
        workshop.forget_index()


# Packs: what lies between header and trailer.


@case(loads=ChecksumError, data="record", lost={3: WEIGHT})
def flipped_payload(shop: Workshop) -> None:
    location = shop.location("model/weight")
    flip(shop.pack_file(location), location.row.offset + location.row.stored_bytes // 2)


@case(loads=ChecksumError, data="record", lost=dict.fromkeys(ALL_STEPS, ("model/frozen",)))
def flipped_payload_that_all_snapshots_share(shop: Workshop) -> None:
    location = shop.location("model/frozen")
    flip(shop.pack_file(location), location.row.offset)


@case(loads=ChecksumError, data="record", lost=dict.fromkeys(ALL_STEPS, ("buffer", "window")))
def flipped_payload_of_shared_memory(shop: Workshop) -> None:
    location = shop.location("~storage/0")
    flip(shop.pack_file(location), location.row.offset + 100)


@case(loads=ChecksumError, data="record", lost={3: WEIGHT}, options=RepositoryOptions(compression="none"))
def flipped_payload_in_a_run(shop: Workshop) -> None:
    location = shop.location("model/weight", index=1)
    assert location.row.in_run
    flip(shop.pack_file(location), location.row.offset + 5)


@case(loads=ChecksumError, structure="part", data="part record", lost={3: ()})
def flipped_manifest_part(shop: Workshop) -> None:
    location = shop.part_location()
    flip(shop.pack_file(location), location.row.offset + 3)


@case(data="record")
def flipped_record_header(shop: Workshop) -> None:
    location = shop.location("model/weight")
    flip(shop.pack_file(location), location.row.offset - 20)


@case(data="record", options=RepositoryOptions(compression="none"))
def flipped_run_header(shop: Workshop) -> None:
    location = shop.location("model/weight")
    flip(shop.pack_file(location), location.row.offset // 4096 * 4096 - 4000)


@case(data="pack", options=RepositoryOptions(compression="none"))
def flipped_padding(shop: Workshop) -> None:
    location = shop.location("model/weight")
    flip(shop.pack_file(location), location.row.offset - 1)


@case(structure="pack")
def flipped_pack_header(shop: Workshop) -> None:
    flip(shop.pack_file(shop.location("model/weight")), 30)


@case(structure="pack")
def flipped_table(shop: Workshop) -> None:
    flip(shop.pack_file(shop.location("model/weight")), -pack.TRAILER_BYTES - 40)


@case(structure="pack")
def flipped_trailer(shop: Workshop) -> None:
    flip(shop.pack_file(shop.location("model/weight")), -30)


@case(loads=ChecksumError, structure="pack", data="pack record", lost={3: WEIGHT})
def flipped_table_and_payload(shop: Workshop) -> None:
    flipped_table(shop)
    flipped_payload(shop)


@case(loads=ChunkMissingError, structure="pack part", lost={3: ()})
def cut_pack(shop: Workshop) -> None:
    path = shop.pack_file(shop.location("model/weight"))
    cut(path, path.stat().st_size // 2)


@case(structure="pack", loads=ChunkMissingError, lost={3: ()})
def cut_pack_in_its_header(shop: Workshop) -> None:
    cut(shop.pack_file(shop.location("model/weight")), 40)


@case(structure="pack part", loads=ChunkMissingError, lost={3: ()})
def empty_pack(shop: Workshop) -> None:
    cut(shop.pack_file(shop.location("model/weight")), 0)


@case(structure="part", loads=ChunkMissingError, lost={3: ()})
def missing_pack(shop: Workshop) -> None:
    shop.pack_file(shop.location("model/weight")).unlink()


@case(
    structure="chunk part",
    loads=ChunkMissingError,
    lost={
        1: (),
        **dict.fromkeys(
            (2, 3, 20, 99), ("buffer", "model/frozen", "optimizer/state/0/exp_avg", "vocabulary", "window")
        ),
    },
)
def missing_first_pack(shop: Workshop) -> None:
    shop.pack_file(shop.location("model/frozen")).unlink()


@case(structure="pack")
def swapped_packs(shop: Workshop) -> None:
    first, second = (shop.pack_file(shop.location("model/weight", ref=ref)) for ref in ("main", "side"))
    spare = first.with_suffix(".spare")
    first.rename(spare)
    second.rename(first)
    spare.rename(second)


@case(structure="pack")
def pack_of_a_newer_format(shop: Workshop) -> None:
    path = shop.pack_file(shop.location("model/weight"))
    data = bytearray(path.read_bytes())
    struct.pack_into("<H", data, 8, 9)
    struct.pack_into("<Q", data, 56, checksum(bytes(data[:56])))
    path.write_bytes(data)


# Lengths that lie, their checksums put right.


@case(structure="pack")
def huge_row_count(shop: Workshop) -> None:
    rewrite_table(shop.pack_file(shop.location("model/weight")), lambda rows: rows, row_count=2**60)


@case(structure="pack")
def huge_table_offset(shop: Workshop) -> None:
    rewrite_table(shop.pack_file(shop.location("model/weight")), lambda rows: rows, table_offset=2**63)


@case(structure="pack")
def huge_raw_bytes_in_the_table(shop: Workshop) -> None:
    location = shop.location("model/weight")
    rewrite_table(shop.pack_file(location), lambda rows: [replace(row, raw_bytes=2**32 - 1) for row in rows])


@case(structure="pack")
def offset_beyond_the_pack(shop: Workshop) -> None:
    location = shop.location("model/weight")
    rewrite_table(shop.pack_file(location), lambda rows: [replace(row, offset=2**63) for row in rows])


@case(structure="pack chunk", loads=ChunkMissingError, lost={3: WEIGHT})
def huge_raw_bytes_in_table_and_record(shop: Workshop) -> None:
    location = shop.location("model/weight")
    rewrite_record(shop.pack_file(location), location.row, raw_bytes=2**32 - 1)


@case(structure="record", loads=ChecksumError, lost={3: WEIGHT})
def raw_bytes_that_the_manifest_does_not_expect(shop: Workshop) -> None:
    location = shop.location("model/weight")
    rewrite_record(shop.pack_file(location), location.row, raw_bytes=location.row.raw_bytes - 4)


@case(data="record pack", loads=ChecksumError, lost={3: WEIGHT})
def stored_bytes_that_reach_into_the_next_record(shop: Workshop) -> None:
    location = shop.location("model/weight")
    rewrite_record(shop.pack_file(location), location.row, stored_bytes=location.row.stored_bytes + 64)


@case(data="record", loads=ChecksumError, lost={3: WEIGHT})
def a_table_that_exchanges_two_chunks(shop: Workshop) -> None:
    first, second = (shop.location("model/weight", index=index).row for index in (0, 1))

    def exchange(rows: list[Row]) -> list[Row]:
        ids = {first.chunk_id: second.chunk_id, second.chunk_id: first.chunk_id}
        return [replace(row, chunk_id=ids.get(row.chunk_id, row.chunk_id)) for row in rows]

    rewrite_table(shop.pack_file(shop.location("model/weight")), exchange)


@case(data="record", loads=CodecError, lost={3: WEIGHT})
def a_codec_that_cannot_have_made_the_payload(shop: Workshop) -> None:
    location = shop.location("model/weight")
    rewrite_record(shop.pack_file(location), location.row, chain=(2,))


@case(data="record", loads=UnsupportedFormatError, lost={3: WEIGHT})
def a_codec_of_the_future(shop: Workshop) -> None:
    location = shop.location("model/weight")
    rewrite_record(shop.pack_file(location), location.row, chain=(77,))


@case(ref="hostile", data="record", loads=CodecError, lost={666: ("bomb",)})
def a_payload_that_unpacks_to_a_gigabyte(shop: Workshop) -> None:
    bomb = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 30))
    chunk_id = HASHER.chunk_id(b"never what it unpacks to")
    entries = dict_of({"bomb": Entry("bomb", Kind.BYTES, raw_bytes=GRID_BYTES, chunks=chunk_id)})

    def append(writer: PackWriter) -> None:
        writer.append(chunk_id, bomb, kind=RecordKind.LEAF, raw_bytes=GRID_BYTES, chain=(2,))

    shop.plant_parts([manifest.encode_part(entries)], entries, make_pack=append)


@case(structure="snapshot", loads=FormatError, lost={3: ()})
def huge_snapshot_body(shop: Workshop) -> None:
    path = shop.snapshot_file("main")
    data = bytearray(path.read_bytes())
    struct.pack_into("<Q", data, 16, 2**62)
    path.write_bytes(data)


# Snapshots and refs.


@case(structure="snapshot", loads=FormatError, lost={3: ()})
def truncated_snapshot(shop: Workshop) -> None:
    path = shop.snapshot_file("main")
    cut(path, path.stat().st_size - 7)


@case(structure="snapshot", loads=ChecksumError, lost={3: ()})
def flipped_snapshot(shop: Workshop) -> None:
    flip(shop.snapshot_file("main"), 100)


@case(structure="snapshot", loads=FormatError, lost={3: ()})
def empty_snapshot(shop: Workshop) -> None:
    cut(shop.snapshot_file("main"), 0)


@case(structure="snapshot", loads=ChecksumError, lost={3: (), 20: ()})
def swapped_snapshots(shop: Workshop) -> None:
    first, second = shop.snapshot_file("main"), shop.snapshot_file("side")
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)


@case(structure="ref", loads=UnknownRefError, saves=None, lost={3: ()})
def missing_snapshot(shop: Workshop) -> None:
    shop.snapshot_file("main").unlink()


@case(structure="snapshot", loads=UnsupportedFormatError, lost={3: ()})
def snapshot_of_a_newer_format(shop: Workshop) -> None:
    path = shop.snapshot_file("main")
    data = bytearray(path.read_bytes())
    struct.pack_into("<H", data, 8, 9)
    path.write_bytes(data)


@case(structure="ref", loads=FormatError, saves=FormatError)
def swapped_refs(shop: Workshop) -> None:
    main, side = (shop.root / "refs/branches" / name for name in ("main", "side"))
    one, other = main.read_bytes(), side.read_bytes()
    main.write_bytes(other)
    side.write_bytes(one)


@case(structure="ref", loads=ChecksumError, saves=ChecksumError)
def flipped_ref(shop: Workshop) -> None:
    flip(shop.root / "refs/branches/main", 20)


@case(structure="ref", loads=FormatError, saves=FormatError)
def empty_ref(shop: Workshop) -> None:
    cut(shop.root / "refs/branches/main", 0)


@case(structure="ref", loads=FormatError, saves=FormatError)
def ref_to_something_that_is_no_id(shop: Workshop) -> None:
    shop.write_ref("branches", "main", "../../etc/passwd")


@case(structure="ref")
def ref_files_with_hostile_names(shop: Workshop) -> None:
    head = shop.head()
    shop.write_ref("branches", "%2E%2E%2Fevil", head, name="../evil")
    shop.write_ref("branches", "Upper", head)
    shop.write_ref("branches", "%6dain", head, name="main")
    shop.write_ref("branches", "nested/name", head)
    shop.write_ref("tags", "%FF", head)
    shop.write_ref("tags", "a%2Elock", head, name="a.lock")


# Config and condemned set.


@case(opens=UnsupportedFormatError)
def config_of_a_newer_format(shop: Workshop) -> None:
    edit_config(shop.root, format=1)


@case(opens=UnsupportedFormatError)
def config_with_an_unknown_read_feature(shop: Workshop) -> None:
    edit_config(shop.root, features={"read": ["telepathy"], "write": [], "gc": []})


@case(saves=UnsupportedFormatError)
def config_with_an_unknown_write_feature(shop: Workshop) -> None:
    edit_config(shop.root, features={"read": [], "write": ["telepathy"], "gc": []})


@case(opens=UnsupportedFormatError)
def config_with_an_unknown_hash(shop: Workshop) -> None:
    edit_config(shop.root, hash="md5")


@case(opens=FormatError)
def config_with_absurd_values(shop: Workshop) -> None:
    edit_config(shop.root, lease_s=10**400)


@case(opens=ChecksumError)
def flipped_config(shop: Workshop) -> None:
    flip(shop.root / "config", 30)


@case(opens=FormatError)
def empty_config(shop: Workshop) -> None:
    cut(shop.root / "config", 0)


@case(opens=FormatError)
def missing_config(shop: Workshop) -> None:
    (shop.root / "config").unlink()


@case(structure="gc", saves=ChecksumError)
def flipped_condemned_set(shop: Workshop) -> None:
    path = shop.root / "gc" / f"{'0' * 32}.condemned"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(textfile.encode_text_file({"condemned_ns": FIRST_NS, "packs": []}))
    flip(path, 5)


@case(structure="gc", saves=FormatError)
def condemned_set_of_something_else(shop: Workshop) -> None:
    path = shop.root / "gc" / f"{'0' * 32}.condemned"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(textfile.encode_text_file({"condemned_ns": FIRST_NS, "packs": [17]}))


@case()
def strangers_and_leftovers(shop: Workshop) -> None:
    for name in ("packs/.tmp-0123", "packs/zz/readme.txt", "snapshots/notes", "leases/dead.lease", "packs/ab/xy.pack"):
        path = shop.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not of this world")


# The index: never the truth.


@case(keeps_index=True)
def truncated_index(shop: Workshop) -> None:
    path = shop.root / "cache/index.lmdb"
    cut(path, path.stat().st_size // 2)


@case(keeps_index=True)
def flipped_index(shop: Workshop) -> None:
    path = shop.root / "cache/index.lmdb"
    for offset in range(100, path.stat().st_size, 1000):
        flip(path, offset)


@case(keeps_index=True)
def foreign_index(shop: Workshop) -> None:
    (shop.root / "cache/index.lmdb").write_bytes(b"no database at all" * 1000)


@case(keeps_index=True)
def stale_index(shop: Workshop) -> None:
    """Knows nothing of the last two packs, and of one that is gone."""
    handle = open_repository(shop.root)
    index = open_index(shop.root, repository_id=handle.config.repository_id, id_bytes=N)
    known = {pack_id for path in shop.packs() if (pack_id := parse_pack_name(f"packs/{path.parent.name}/{path.name}"))}
    index.forget(sorted(known)[:2])
    index.add({new_pack_id(): [shop.location("model/weight").row]})
    index.close()
    handle.close()


@case(keeps_index=True, structure="index", loads=ChecksumError)
def lying_index(shop: Workshop) -> None:
    """Says that a chunk lies where another one does. Only a program at fault could write it."""
    location = shop.location("model/weight")
    wrong = replace(location.row, offset=location.row.offset + 8)
    handle = open_repository(shop.root)
    index = open_index(shop.root, repository_id=handle.config.repository_id, id_bytes=N)
    rows = read_table(
        handle.backend.open_reader(pack_name(location.pack_id)), where="", expected_id=location.pack_id, hasher=HASHER
    )
    index.forget([location.pack_id])
    index.add({location.pack_id: [wrong if row == location.row else row for row in rows]})
    index.close()
    handle.close()


# Manifests of a stranger: every digest is right, and what they say is not.


def dict_of(children: Mapping[str, Entry], **root: Any) -> list[Entry]:
    """A dict of these children."""
    return [Entry("", Kind.DICT, shape=(root.get("count", len(children)),)), *children.values()]


def text(path: str, value: str = "x") -> Entry:
    """A str leaf."""
    return Entry(path, Kind.STR, raw_bytes=len(value), inline=value.encode())


def array(path: str, dtype: str, shape: tuple[int, ...], data: bytes, **fields: Any) -> Entry:
    """An inline ndarray."""
    return Entry(path, Kind.NDARRAY, dtype, shape, raw_bytes=len(data), inline=data, **fields)


HOSTILE = {"ref": "hostile", "loads": FormatError}


@case(**HOSTILE, structure="snapshot", lost={666: ("a",)})
def a_path_that_appears_twice(shop: Workshop) -> None:
    shop.plant([Entry("", Kind.DICT, shape=(2,)), text("a", "1"), text("a", "2")])


@case(**HOSTILE, structure="snapshot", lost={666: ("..",)})
def a_path_that_climbs(shop: Workshop) -> None:
    shop.plant(dict_of({"..": text("..")}))


@case(**HOSTILE, structure="snapshot", lost={666: ("a//b",)})
def a_path_with_an_empty_component(shop: Workshop) -> None:
    shop.plant(dict_of({"a//b": text("a//b")}))


@case(**HOSTILE, structure="snapshot", lost={666: ("a%2fb",)})
def a_path_that_is_not_canonical(shop: Workshop) -> None:
    shop.plant(dict_of({"a%2fb": text("a%2fb")}))


@case(**HOSTILE, structure="snapshot", lost={666: ("a/b",)})
def a_leaf_below_a_leaf(shop: Workshop) -> None:
    shop.plant([Entry("", Kind.DICT, shape=(1,)), text("a"), text("a/b")])


@case(**HOSTILE, structure="snapshot", lost={666: ()})
def a_list_that_lacks_an_item(shop: Workshop) -> None:
    shop.plant([Entry("", Kind.LIST, shape=(3,)), text("0"), text("2")])


@case(**HOSTILE, structure="snapshot", lost={666: ("a", "b")})
def aliases_of_each_other(shop: Workshop) -> None:
    shop.plant(dict_of({name: Entry(name, Kind.ALIAS, attrs={"target": other}) for name, other in ("ab", "ba")}))


@case(**HOSTILE, structure="snapshot", lost={666: ("a",)})
def a_view_of_nothing(shop: Workshop) -> None:
    attrs = {"storage": "~storage/7", "offset_bytes": 0, "stride_bytes": [4]}
    shop.plant(dict_of({"a": view("a", attrs)}))


@case(**HOSTILE)
def a_view_beyond_its_storage(shop: Workshop) -> None:
    attrs = {"storage": "~storage/0", "offset_bytes": 2**40, "stride_bytes": [4]}
    shop.plant([*dict_of({"a": view("a", attrs)}), storage()])


@case(**HOSTILE)
def a_view_with_strides_that_leave_its_storage(shop: Workshop) -> None:
    attrs = {"storage": "~storage/0", "offset_bytes": 0, "stride_bytes": [-(2**40)]}
    shop.plant([*dict_of({"a": view("a", attrs)}), storage()])


def view(path: str, attrs: Mapping[str, Any]) -> Entry:
    return Entry(path, Kind.VIEW, "<f4", (2,), attrs, {}, 8, digest=leaf_digest(HASHER, 8, HASHER.digest(bytes(8))))


def storage() -> Entry:
    return Entry("~storage/0", Kind.STORAGE, "|u1", (16,), raw_bytes=16, inline=bytes(16))


@case(**HOSTILE)
def an_array_of_objects(shop: Workshop) -> None:
    shop.plant(dict_of({"a": array("a", "|O", (2,), bytes(range(16)))}))


@case(**HOSTILE)
def an_array_of_a_dtype_that_does_not_exist(shop: Workshop) -> None:
    shop.plant(dict_of({"a": array("a", "<q77", (2,), bytes(16))}))


@case(**HOSTILE)
def an_array_with_more_elements_than_bytes(shop: Workshop) -> None:
    shop.plant(dict_of({"a": array("a", "<f4", (1000, 1000, 1000), bytes(16))}))


@case(**HOSTILE)
def an_array_whose_size_overflows(shop: Workshop) -> None:
    shop.plant(dict_of({"a": array("a", "<f4", (2**62, 2**62, 2**3), b"")}))


@case(**HOSTILE)
def a_tensor_whose_bytes_are_not_its_shape(shop: Workshop) -> None:
    entry = Entry("a", Kind.TENSOR, "float32", (5,), raw_bytes=16, inline=bytes(16))
    shop.plant(dict_of({"a": entry}))


@case(ref="hostile", loads=UnknownClassError)
def a_class_to_be_imported(shop: Workshop) -> None:
    attrs = {"class": "os:system", "fields": ["command"]}
    shop.plant([Entry("", Kind.DATACLASS, shape=(1,), attrs=attrs), text("command", "echo pwned")])


@case(ref="hostile", loads=PickleRefusedError)
def a_pickle(shop: Workshop) -> None:
    data = b"cos\nsystem\n(S'echo pwned'\ntR."
    shop.plant(dict_of({"a": Entry("a", Kind.PICKLE, raw_bytes=len(data), inline=data, attrs={"type": "harmless"})}))


@case(**HOSTILE)
def nesting_without_end(shop: Workshop) -> None:
    entries = [Entry("/".join(["a"] * depth), Kind.DICT, shape=(1,)) for depth in range(400)]
    shop.plant([*entries, text("/".join(["a"] * 400))])


@case(**HOSTILE)
def a_scalar_that_is_not_its_kind(shop: Workshop) -> None:
    shop.plant(dict_of({"a": Entry("a", Kind.FLOAT, raw_bytes=3, inline=b"abc")}))


@case(**HOSTILE)
def text_that_is_not_utf_8(shop: Workshop) -> None:
    shop.plant(dict_of({"a": Entry("a", Kind.STR, raw_bytes=2, inline=b"\xff\xfe")}))


def plant_packed(shop: Workshop, packed: Any) -> None:
    """Plant a part that encode_part would not make."""
    shop.plant_parts([msgpack.packb(packed, use_bin_type=True)])


def packed_entry(**fields: Any) -> list[Any]:
    names = ("path", "kind", "dtype", "shape", "attrs", "hints", "raw_bytes", "data", "digest")
    values = {"path": "", "kind": int(Kind.BYTES), "dtype": "", "shape": [], "raw_bytes": 1, "data": b"x"} | fields
    return [values.get(name) for name in names]


PART = {"ref": "hostile", "loads": FormatError, "structure": "part", "lost": {666: ()}}


@case(**PART)
def a_part_that_is_no_part(shop: Workshop) -> None:
    shop.plant_parts([b"\xc1\xff certainly no msgpack"])


@case(**PART)
def a_part_of_a_newer_version(shop: Workshop) -> None:
    plant_packed(shop, [9, [packed_entry()]])


@case(**PART)
def a_part_with_too_few_fields(shop: Workshop) -> None:
    plant_packed(shop, [0, [packed_entry()[:8]]])


@case(**PART)
def a_leaf_of_an_unknown_kind(shop: Workshop) -> None:
    plant_packed(shop, [0, [packed_entry(kind=63)]])


@case(**PART)
def a_leaf_of_an_exabyte(shop: Workshop) -> None:
    plant_packed(shop, [0, [packed_entry(raw_bytes=2**60, data=[b"0" * 16])]])


@case(**PART)
def a_leaf_of_a_negative_length(shop: Workshop) -> None:
    plant_packed(shop, [0, [packed_entry(raw_bytes=-1, data=b"")]])


@case(**PART)
def a_shape_that_no_machine_can_count(shop: Workshop) -> None:
    plant_packed(shop, [0, [packed_entry(kind=int(Kind.NDARRAY), dtype="<f4", shape=[2**63, 2])]])


@case(**PART)
def attributes_with_keys_of_two_types(shop: Workshop) -> None:
    plant_packed(shop, [0, [packed_entry(attrs={"a": 1, b"a": 2})]])


@case(**PART)
def a_part_that_says_it_has_four_billion_entries(shop: Workshop) -> None:
    shop.plant_parts([b"\x92\x00\xdd\xff\xff\xff\xff"])


@case(ref="hostile", structure="snapshot", loads=FormatError, lost={666: ()})
def attributes_nested_without_end(shop: Workshop) -> None:
    packed = msgpack.packb([0, [packed_entry(attrs={"a": None})]], use_bin_type=True)
    deep = b"\x91" * 900 + b"\xc0"
    shop.plant_parts([packed.replace(b"\xa1a\xc0", b"\xa1a" + deep)])


@case(ref="hostile", structure="part", loads=ChunkMissingError, lost={666: ()})
def a_part_that_is_nowhere(shop: Workshop) -> None:
    shop.plant_parts([], part_ids=[HASHER.chunk_id(b"nowhere")])


@case(ref="hostile", structure="chunk", loads=ChunkMissingError, lost={666: ("a",)})
def a_chunk_that_is_nowhere(shop: Workshop) -> None:
    chunk_id = HASHER.chunk_id(b"nowhere")
    shop.plant(dict_of({"a": Entry("a", Kind.BYTES, raw_bytes=1000, chunks=chunk_id)}))


# ---- command line --------------------------------------------------------------------------------------------------

WHOLE: dict[str, Callable[[Path], None]] = {
    "whole": lambda root: build_whole(root),
    "whole-torch": lambda root: build_whole(root, make=make_torch_state),
    "whole-runs": lambda root: build_whole(root, options=RepositoryOptions(compression="none")),
}


def describe(broken: Case) -> dict[str, Any]:
    """A case as JSON."""
    return {
        "ref": broken.ref,
        "opens": broken.opens.__name__ if broken.opens else None,
        "loads": broken.loads.__name__ if broken.loads else None,
        "saves": broken.saves.__name__ if broken.saves else None,
        "structure": sorted(broken.structure),
        "data": sorted(broken.data_kinds),
        "lost": {str(step): list(leaves) for step, leaves in broken.lost.items()},
    }


def main() -> int:
    """Build everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a directory that does not exist yet")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True)
    for name, build in WHOLE.items():
        build(out / name)
    for broken in CASES:
        whole = out / ("whole-runs" if broken.options.compression == "none" else "whole")
        build_broken(broken, whole, out / "broken" / broken.name)
    (out / "cases.json").write_text(json.dumps({broken.name: describe(broken) for broken in CASES}, indent=2) + "\n")
    print(f"{len(WHOLE)} whole and {len(CASES)} broken repositories in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
