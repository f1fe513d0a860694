"""Every way in which tools/make_golden.py breaks a repository, and what castore must answer.

A case is a function that damages a copy of the repository that make_golden.build_whole makes; its name is the name of
the case. The decorator says what is expected.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import msgpack
import zstandard

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
from castore.format import manifest, pack, textfile
from castore.format.identity import leaf_digest
from castore.format.layout import pack_name, parse_pack_name
from castore.format.manifest import Entry, Kind
from castore.format.pack import RecordKind, Row
from castore.hashing import checksum
from castore.ids import new_pack_id
from castore.index import open_index
from castore.options import GRID_BYTES
from castore.pack.reader import read_table
from castore.pack.writer import PackWriter
from castore.repository import open_repository
from tools.golden_workshop import FIRST_NS, HASHER, N, Workshop, cut, edit_config, flip, rewrite_record, rewrite_table

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
    """With no index; the index of before may still know better, or worse."""
    saves: Errors = None
    """Saving another snapshot to `main`."""
    structure: frozenset[str] = frozenset()
    """Kinds of problems that `verify` must find."""
    data: frozenset[str] = frozenset()
    """Kinds of problems that `verify(data=True)` must find: by default the same."""
    lost: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    """Step → lost leaves of every snapshot that `verify(data=True)` must name; no leaves: all of it."""
    runs: bool = False
    """Whether the repository stores without compression, so that arrays lie in runs."""
    keeps_index: bool = False
    """Whether the damage is to the index."""
    misleads_index: bool = False
    """Whether the index of before makes loads fail that need not; `reindex` helps."""


CASES: list[Case] = []


def case(*, structure: str = "", data: str | None = None, **fields: Any) -> Callable[[Damage], Damage]:
    """Register a case under the name of its function; kinds of problems are given as words."""

    def register(damage: Damage) -> Damage:
        kinds = frozenset(structure.split())
        data_kinds = kinds if data is None else frozenset(data.split())
        CASES.append(Case(damage.__name__.replace("_", "-"), damage, structure=kinds, data=data_kinds, **fields))
        return damage

    return register


WEIGHT = ("model/weight", "tied")
ALL_STEPS = (1, 2, 3, 20, 99)
SHARED = ("model/frozen", "optimizer/state/0/exp_avg")


# ---- packs: what lies between header and trailer ---------------------------------------------------------------------


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


@case(loads=ChecksumError, data="record", lost={3: WEIGHT}, runs=True)
def flipped_payload_in_a_run(shop: Workshop) -> None:
    location = shop.location("model/weight")
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


@case(data="record", runs=True)
def flipped_run_header(shop: Workshop) -> None:
    location = shop.location("model/weight")
    flip(shop.pack_file(location), location.row.offset // 4096 * 4096 - 4000)


@case(data="pack", runs=True)
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


@case(structure="pack part", loads=ChunkMissingError, lost={3: ()})
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
        **dict.fromkeys((2, 3, 20), ("buffer", "model/drift", *SHARED, "vocabulary", "window")),
        99: ("buffer", *SHARED, "vocabulary", "window"),
    },
)
def missing_first_pack(shop: Workshop) -> None:
    shop.pack_file(shop.location("model/frozen")).unlink()


@case(structure="pack", misleads_index=True)
def swapped_packs(shop: Workshop) -> None:
    first, second = (shop.pack_file(shop.location("model/weight", ref=ref)) for ref in ("main", "side"))
    spare = first.with_suffix(".spare")
    first.rename(spare)
    second.rename(first)
    spare.rename(second)


@case(
    structure="index pack part",
    data="index pack part record",
    loads=UnsupportedFormatError,
    lost=dict.fromkeys(ALL_STEPS, ()),
)
def pack_of_a_newer_format(shop: Workshop) -> None:
    path = shop.pack_file(shop.location("model/weight"))
    data = bytearray(path.read_bytes())
    struct.pack_into("<H", data, 8, 9)
    struct.pack_into("<Q", data, 56, checksum(bytes(data[:56])))
    path.write_bytes(data)


# ---- bases: step 1 ← step 2 ← steps 3 and 20 -----------------------------------------------------------------------


@case(loads=ChecksumError, data="record", lost=dict.fromkeys((1, 2, 3, 20), ("model/drift",)))
def flipped_base(shop: Workshop) -> None:
    location = shop.location("model/drift", ref="v1")
    assert location.row.depth == 0
    flip(shop.pack_file(location), location.row.offset + 50)


@case(loads=ChecksumError, data="record", lost=dict.fromkeys((2, 3, 20), ("model/drift",)))
def flipped_base_of_depth_1(shop: Workshop) -> None:
    location = shop.location("model/drift", ref="main~1")
    assert location.row.depth == 1
    flip(shop.pack_file(location), location.row.offset + 50)


@case(loads=ChecksumError, data="record", lost={3: ("model/drift",)})
def flipped_difference(shop: Workshop) -> None:
    location = shop.location("model/drift")
    assert location.row.depth == 2
    flip(shop.pack_file(location), location.row.offset + 50)


@case(loads=ChunkMissingError, structure="record", lost={3: ("model/drift",)})
def a_base_that_is_not_less_deep(shop: Workshop) -> None:
    location = shop.location("model/drift")
    rewrite_record(shop.pack_file(location), location.row, depth=1)


@case(loads=ChecksumError, data="record", lost={3: ("model/drift",)})
def a_base_that_is_another_chunk(shop: Workshop) -> None:
    location = shop.location("model/drift")
    other = shop.location("model/drift", ref="v1")
    rewrite_record(shop.pack_file(location), location.row, base_ids=(other.row.chunk_id,))


@case(loads=CodecError, data="record", lost={3: ("model/drift",)})
def a_difference_without_a_base(shop: Workshop) -> None:
    location = shop.location("model/drift")
    rewrite_record(shop.pack_file(location), location.row, base_ids=(), depth=0)


# ---- lengths that lie, their checksums put right ---------------------------------------------------------------------


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


@case(data="record", loads=ChecksumError, lost={3: WEIGHT})
def stored_bytes_that_reach_into_the_next_record(shop: Workshop) -> None:
    location = shop.location("model/weight")
    rewrite_record(shop.pack_file(location), location.row, stored_bytes=location.row.stored_bytes + 64)


@case(data="record", loads=ChecksumError, lost={3: (*WEIGHT[:1], "tally", *WEIGHT[1:])})
def a_table_that_exchanges_two_chunks(shop: Workshop) -> None:
    first, second = shop.location("model/weight").row, shop.location("tally").row
    assert first.raw_bytes == second.raw_bytes

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


# ---- snapshots and refs ----------------------------------------------------------------------------------------------


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


# ---- config and condemned set ----------------------------------------------------------------------------------------


@case(opens=UnsupportedFormatError)
def config_of_a_newer_format(shop: Workshop) -> None:
    edit_config(shop.root, format=2)


@case(opens=UnsupportedFormatError)
def config_of_a_pre_release(shop: Workshop) -> None:
    edit_config(shop.root, format=0)


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


# ---- the index: never the truth --------------------------------------------------------------------------------------


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


@case(keeps_index=True, structure="index")
def lying_index(shop: Workshop) -> None:
    """Says that a chunk lies where another one does. Only a program at fault could write it; loads look past it."""
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


# ---- manifests of a stranger: every digest is right, and what they say is not ----------------------------------------


def dict_of(children: Mapping[str, Entry], **root: Any) -> list[Entry]:
    """A dict of these children."""
    return [Entry("", Kind.DICT, shape=(root.get("count", len(children)),)), *children.values()]


def text(path: str, value: str = "x") -> Entry:
    """A str leaf."""
    return Entry(path, Kind.STR, raw_bytes=len(value), inline=value.encode())


def array(path: str, dtype: str, shape: tuple[int, ...], data: bytes, **fields: Any) -> Entry:
    """An inline ndarray."""
    return Entry(path, Kind.NDARRAY, dtype, shape, raw_bytes=len(data), inline=data, **fields)


HOSTILE: dict[str, Any] = {"ref": "hostile", "loads": FormatError}


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


@case(ref="hostile", structure="snapshot", lost={666: ()})
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


PART: dict[str, Any] = {"ref": "hostile", "loads": FormatError, "structure": "part", "lost": {666: ()}}


@case(**PART)
def a_part_that_is_no_part(shop: Workshop) -> None:
    shop.plant_parts([b"\xc1\xff certainly no msgpack"])


@case(**PART)
def a_part_of_a_newer_version(shop: Workshop) -> None:
    plant_packed(shop, [9, [packed_entry()]])


@case(**PART)
def a_part_with_too_few_fields(shop: Workshop) -> None:
    plant_packed(shop, [1, [packed_entry()[:8]]])


@case(**PART)
def a_leaf_of_an_unknown_kind(shop: Workshop) -> None:
    plant_packed(shop, [1, [packed_entry(kind=63)]])


@case(**PART)
def a_leaf_of_an_exabyte(shop: Workshop) -> None:
    plant_packed(shop, [1, [packed_entry(raw_bytes=2**60, data=[b"0" * 16])]])


@case(**PART)
def a_leaf_of_a_negative_length(shop: Workshop) -> None:
    plant_packed(shop, [1, [packed_entry(raw_bytes=-1, data=b"")]])


@case(**PART)
def a_shape_that_no_machine_can_count(shop: Workshop) -> None:
    plant_packed(shop, [1, [packed_entry(kind=int(Kind.NDARRAY), dtype="<f4", shape=[2**63, 2])]])


@case(**PART)
def attributes_with_keys_of_two_types(shop: Workshop) -> None:
    plant_packed(shop, [1, [packed_entry(attrs={"a": 1, b"a": 2})]])


@case(**PART)
def a_part_that_says_it_has_four_billion_entries(shop: Workshop) -> None:
    shop.plant_parts([b"\x92\x00\xdd\xff\xff\xff\xff"])


@case(ref="hostile", structure="snapshot", lost={666: ()})
def attributes_nested_without_end(shop: Workshop) -> None:
    packed = msgpack.packb([1, [packed_entry(attrs={"a": None})]], use_bin_type=True)
    deep = b"\x91" * 900 + b"\xc0"
    shop.plant_parts([packed.replace(b"\xa1a\xc0", b"\xa1a" + deep)])


@case(ref="hostile", structure="part", loads=ChunkMissingError, lost={666: ()})
def a_part_that_is_nowhere(shop: Workshop) -> None:
    shop.plant_parts([], part_ids=[HASHER.chunk_id(b"nowhere")])


@case(ref="hostile", structure="chunk", loads=ChunkMissingError, lost={666: ("a",)})
def a_chunk_that_is_nowhere(shop: Workshop) -> None:
    chunk_id = HASHER.chunk_id(b"nowhere")
    shop.plant(dict_of({"a": Entry("a", Kind.BYTES, raw_bytes=1000, chunks=chunk_id)}))
