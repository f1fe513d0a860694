"""Every decoder, fed with mutated, random and adversarial bytes: correct data or a CastoreError, never anything else.

Memory stays bounded, too: what a decoder may allocate is checked with tracemalloc against the caps of the format.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import lz4.block
import msgpack
import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from castore import marks
from castore.backend import MemoryBackend
from castore.checkpoint.undelete import list_forgotten
from castore.codec.base import Elements
from castore.codec.delta import Choice, encode_delta
from castore.codec.registry import DELTA, DERIVED, NAMES, ORDERED, base_lengths, codec_numbered, decode_chain
from castore.codec.rounding import Rule
from castore.codec.transform import BASE_MODES, Mode, kernel
from castore.dump import dump_reader
from castore.errors import CastoreError
from castore.format import layout, paths
from castore.format.config import Config, decode_config, encode_config
from castore.format.identity import state_id
from castore.format.manifest import Entry, Kind, decode_id_list, decode_part, encode_part, part_references
from castore.format.pack import (
    HEADER_BYTES,
    TRAILER_BYTES,
    PackHeader,
    RecordKind,
    Row,
    Trailer,
    decode_header,
    decode_record_header,
    decode_run_fixed,
    decode_run_header,
    decode_table,
    decode_trailer,
    encode_header,
    encode_record_header,
    encode_run_header,
    encode_table,
    encode_trailer,
    row_bytes,
)
from castore.format.pack_columns import TableColumns, columns_of, decode_columns
from castore.format.parity import HEADER_BYTES as PARITY_HEADER_BYTES
from castore.format.parity import (
    ParityHeader,
    ParityLayout,
    decode_parity_header,
    encode_parity_header,
    encode_sums,
)
from castore.format.snapshot import SnapshotRecord, decode_snapshot, encode_snapshot
from castore.format.textfile import decode_text_file, encode_text_file
from castore.hashing import checksum, hasher_for
from castore.ids import ChunkId, PackId, SnapshotId, StateId
from castore.maintenance.policy import read_policy
from castore.maintenance.retention import Candidate, Keep, Line, plan_retention
from castore.options import GRID_BYTES, MIB, RepositoryOptions
from castore.pack.reader import Gap, read_table, scan_records
from castore.pack.writer import PackWriter
from castore.parity.restore import open_parity
from castore.repository import Handle
from castore.snapshots import make_snapshot
from tests.suites.sealed import sealed_text

HASHER = hasher_for("xxh3-128")
N = HASHER.digest_bytes
PACK_ID = PackId("ab" * 16)
ROUNDS = 400 * (10 if os.environ.get("CASTORE_TEST_PROFILE") == "thorough" else 1)


def chunk_id(seed: int) -> ChunkId:
    return HASHER.chunk_id(seed.to_bytes(8, "little"))


# ---- seeds: valid bytes of everything --------------------------------------------------------------------------------

ROWS = [
    Row(chunk_id(1), 144, 5000, 6000, 7, (3,), RecordKind.LEAF),
    Row(chunk_id(2), 8192, 100, 100, 8, (), RecordKind.PART),
    Row(chunk_id(3), 9000, 70, 4096, 9, (4,), RecordKind.ID_LIST, 1, (chunk_id(1),)),
    Row(chunk_id(6), 9100, 1, 4096, 9, (17,), RecordKind.LEAF, 2, (chunk_id(1), chunk_id(2))),
]
HEADER = encode_header(PackHeader(PACK_ID, bytes(16), HASHER, 5))
TABLE = encode_table(ROWS, id_bytes=N)
TRAILER = Trailer(PACK_ID, 16384, len(ROWS), checksum(TABLE), 1)
PACK_BYTES = TRAILER.table_offset + len(TABLE) + TRAILER_BYTES
RUN = encode_run_header(
    [(chunk_id(4), 1), (chunk_id(5), 2)],
    kind=RecordKind.LEAF,
    payload_bytes=GRID_BYTES + 10,
    offset=64,
    id_bytes=N,
)
ENTRIES = [
    Entry("", Kind.DICT, shape=(4,)),
    Entry("a", Kind.NDARRAY, "<f4", (2, 2), {}, {"stride": [1, 2]}, 16, inline=bytes(range(16))),
    Entry("b", Kind.TENSOR, "float32", (1000,), raw_bytes=4000, chunks=chunk_id(6)),
    Entry("c", Kind.ALIAS, attrs={"target": "a"}),
    Entry("d", Kind.VIEW, "<f4", (1,), {"storage": "~storage/0"}, {}, 4, digest=chunk_id(7)),
    Entry("e", Kind.BYTES, raw_bytes=GRID_BYTES * 1500, id_lists=chunk_id(8) + chunk_id(9)),
    Entry("~storage/0", Kind.STORAGE, "|u1", (16,), raw_bytes=16, inline=bytes(16)),
]
PART = encode_part(ENTRIES)
CONFIG = encode_config(
    Config(bytes(16), RepositoryOptions(), 1, {"read": frozenset(), "write": frozenset(), "gc": frozenset()})
)
SNAPSHOT_ID, SNAPSHOT = encode_snapshot(
    SnapshotRecord(
        StateId("00" * N),
        (SnapshotId("11" * N),),
        "main",
        3,
        10**18,
        {"loss": 0.5},
        {"nested": {"a": [1, None]}},
        "hello",
        100,
        50,
        40,
        3,
        (chunk_id(1), chunk_id(2)),
        "test",
        bytes(8),
    ),
    HASHER,
)
TEXT = encode_text_file({"name": "main", "snapshot": SNAPSHOT_ID, "time_ns": 3})


def decode_whole_part(data: bytes) -> Any:
    """As readers go on: the state id is computed over what was decoded."""
    return state_id(HASHER, decode_part(data, id_bytes=N, where="w"))


def part_and_references(data: bytes) -> tuple[bytes, bytes]:
    """What gc reads of a part: of every part that decodes, the same ids as its entries have."""
    chunks, id_lists = part_references(data, id_bytes=N, where="w")
    try:
        entries = decode_part(data, id_bytes=N, where="w")
    except CastoreError:
        return chunks, id_lists  # gc needs no more than ids of the right width; verify says what else is wrong
    assert chunks == b"".join(entry.chunks or b"" for entry in entries)
    assert id_lists == b"".join(entry.id_lists or b"" for entry in entries)
    return chunks, id_lists


def columns_like_rows(data: bytes, trailer: Trailer = TRAILER) -> list[bytes]:
    """The columns of a table; of every table that decodes into rows, they say what those say."""
    found = decode_columns(data, trailer, id_bytes=N, where="w")
    said = columns_said(found)
    try:
        rows = decode_table(data, trailer, id_bytes=N, where="w")
    except CastoreError:
        return said  # a row out of bounds: what a collection copies is read and hashed
    assert said == columns_said(columns_of(rows, id_bytes=N))
    return said


def columns_said(columns: TableColumns) -> list[bytes]:
    return [getattr(columns, name).tobytes() for name in TableColumns.__slots__]


PARITY_LAYOUT = ParityLayout(5000, 2, 1, 4096, 4096)
SUMS = encode_sums([1, 2, 3])
PARITY_HEAD = encode_parity_header(ParityHeader(PARITY_LAYOUT, PACK_ID, bytes(16), checksum(SUMS)))
PARITY = PARITY_HEAD + SUMS + bytes(4096) + SUMS + PARITY_HEAD


def opened_parity(data: bytes) -> Any:
    """Header and table as a reader of the file gets them."""
    backend = MemoryBackend()
    backend.put_if_absent("x", data)
    file = open_parity(backend.open_reader("x"), PACK_ID, where="w")
    return file.header, list(file.sums)


DECODERS: dict[str, tuple[bytes, Callable[[bytes], Any]]] = {
    "textfile": (TEXT, lambda data: decode_text_file(data, name="w")),
    "config": (CONFIG, lambda data: decode_config(data, where="w")),
    "snapshot": (SNAPSHOT, lambda data: decode_snapshot(data, where="w")),
    "part": (PART, decode_whole_part),
    "references of a part": (PART, part_and_references),
    "id list": (bytes(64), lambda data: decode_id_list(data, expected_count=4, id_bytes=N, where="w")),
    "pack header": (HEADER, lambda data: decode_header(data, where="w")),
    "trailer": (
        encode_trailer(TRAILER),
        lambda data: decode_trailer(data, pack_bytes=PACK_BYTES, id_bytes=N, where="w"),
    ),
    "table": (TABLE, lambda data: decode_table(data, TRAILER, id_bytes=N, where="w")),
    "columns of a table": (TABLE, columns_like_rows),
    "record": (
        encode_record_header(ROWS[2], id_bytes=N),
        lambda data: decode_record_header(data, offset=64, id_bytes=N, where="w"),
    ),
    "record with two bases": (
        encode_record_header(ROWS[3], id_bytes=N),
        lambda data: decode_record_header(data, offset=64, id_bytes=N, where="w"),
    ),
    "run fixed": (RUN, lambda data: decode_run_fixed(data, id_bytes=N, where="w")),
    "run": (RUN, lambda data: decode_run_header(data, offset=64, id_bytes=N, where="w")),
    "parity header": (PARITY[:PARITY_HEADER_BYTES], lambda data: decode_parity_header(data, where="w")),
    "parity file": (PARITY, opened_parity),
}


DIGESTED = {
    "textfile",
    "config",
    "pack header",
    "trailer",
    "table",
    "columns of a table",
    "record",
    "record with two bases",
    "run",
    "parity header",
    "parity file",
}


def mutations(seed: bytes, rounds: int, *, key: str) -> Iterator[bytes]:
    """Flips, cuts, insertions, repetitions and overwritten integers, several at once; the same on every run."""
    rng = random.Random(key)
    yield b""
    yield seed
    for size in {*range(min(len(seed), 80)), len(seed) - 1}:
        yield seed[:size]
    for _ in range(rounds):
        data = bytearray(seed)
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            mutate(data, rng)
        yield bytes(data)
    for size in (1, 8, 64, 200, 5000):
        yield rng.randbytes(size)


def mutate(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data) + 1)
    what = rng.randrange(6)
    if what == 0 and data:
        data[at % len(data)] ^= 1 << rng.randrange(8)
    elif what == 1:
        del data[at : at + rng.randrange(1, 20)]
    elif what == 2:
        data[at:at] = rng.randbytes(rng.randrange(1, 20))
    elif what == 3:
        data[at : at + 8] = rng.choice(INTEGERS)
    elif what == 4:
        data[at:at] = data[rng.randrange(len(data) + 1) :][:64]
    elif data:
        data[at % len(data)] = rng.choice((0, 1, 0x7F, 0x80, 0xC0, 0xD9, 0xDD, 0xDF, 0xFF))


INTEGERS = [struct.pack("<Q", value) for value in (0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)]


def decodes_or_refuses(decode: Callable[[bytes], Any], data: bytes) -> Any:
    try:
        return decode(data)
    except CastoreError as error:
        return error


# ---- the format's decoders -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECODERS)
def test_mutated_bytes_are_refused_with_a_typed_error(name: str) -> None:
    seed, decode = DECODERS[name]
    good = decode(seed)
    for data in mutations(seed, ROUNDS, key=name):
        found = decodes_or_refuses(decode, data)
        assert not isinstance(found, CastoreError) or len(str(found)) < 4000
        # What a digest covers is refused when it changed, or it did not change in what it says.
        if name in DIGESTED and data[: len(seed)] != seed:
            assert isinstance(found, CastoreError) or found == good


@pytest.mark.parametrize("name", DECODERS)
@given(data=st.binary(max_size=300))
def test_random_bytes_are_refused_with_a_typed_error(name: str, data: bytes) -> None:
    decodes_or_refuses(DECODERS[name][1], data)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)


@given(changes=st.dictionaries(st.sampled_from(sorted(decode_text_file(CONFIG, name=""))), json_values, max_size=4))
def test_a_config_with_right_digest_and_wrong_fields_is_refused(changes: dict[str, Any]) -> None:
    fields = decode_text_file(CONFIG, name="") | changes
    decodes_or_refuses(lambda data: decode_config(data, where="w"), sealed_text(json.dumps(fields).encode()))


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"lease_s":' + b"9" * 5000 + b"}",
        b'{"lease_s":1e999}',
        b'"\\ud800"',
        b"\xff\xfe",
        b"",
        b"null",
    ],
    ids=lambda line: repr(line[:12]),
)
def test_hostile_json_with_a_right_digest_is_refused(line: bytes) -> None:
    for decode in (lambda data: decode_text_file(data, name="w"), lambda data: decode_config(data, where="w")):
        decodes_or_refuses(decode, sealed_text(line))


HOSTILE = json_values | st.sampled_from([[], [3], ["*"], ["["], "7d", 10**40, -1, {"globs": ["x"], "older_than": 1}])
MARK_ID = SnapshotId("aa" * N)
MARKS: dict[str, tuple[str, dict[str, Any], Callable[[MemoryBackend], Any]]] = {
    "forgotten": (
        layout.forgotten_name(MARK_ID),
        {
            "parents": [SNAPSHOT_ID],
            "branch": "b",
            "step": 1,
            "time_ns": 1,
            "forgotten_ns": 2,
            "reason": "",
            "count": 1,
        },
        lambda backend: list_forgotten(Handle(backend, decode_config(CONFIG, where="w"))),
    ),
    "thin": (
        layout.thin_name(MARK_ID),
        {"dropped": ["optimizer/**"], "thinned_ns": 1},
        lambda backend: [mark.drops("optimizer/state/0/m") for mark in marks.thinnings(backend).values()],
    ),
    "orphan": (layout.orphan_name(MARK_ID), {"since_ns": 1}, marks.orphan_notes),
    "policy": (
        layout.POLICY,
        {
            "keep": {"last": 3, "within": "7d", "best": [["loss", "min", 1]], "branches": ["a"]},
            "thin": {"globs": ["x"], "older_than": 3},
            "every_saves": 2,
            "set_ns": 1,
        },
        read_policy,
    ),
}


@pytest.mark.parametrize("name", MARKS)
@given(data=st.data())
def test_a_mark_or_policy_with_a_right_digest_and_any_fields_is_refused_or_makes_sense(name: str, data: Any) -> None:
    file_name, good, read = MARKS[name]
    changes = data.draw(st.dictionaries(st.sampled_from(sorted(good)), HOSTILE, max_size=3))
    backend = MemoryBackend()
    backend.put_if_absent(file_name, sealed_text(json.dumps(good | changes).encode()))
    with suppress(CastoreError):
        read(backend)


@given(rules=st.dictionaries(st.sampled_from(["last", "every", "within", "best", "branches", "daily"]), HOSTILE))
def test_rules_of_any_shape_are_refused_or_can_be_planned_with(rules: dict[str, Any]) -> None:
    with suppress(CastoreError):
        keep = Keep.from_json(rules, where="policy")
        plan_retention(keep, [Line("main", (Candidate(MARK_ID, 3, 10**18, {"loss": 1.0}),))], tags={})


msgpack_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=40)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=8))
    | st.builds(msgpack.Timestamp, st.integers(-(2**40), 2**40), st.integers(0, 999_999_999)),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=5) | st.binary(max_size=5) | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(index=st.integers(0, 8), entry=st.integers(0, len(ENTRIES) - 1), value=msgpack_values)
def test_an_entry_with_any_value_in_any_field_is_refused_or_makes_sense(index: int, entry: int, value: Any) -> None:
    version, packed = msgpack.unpackb(PART, use_list=True)
    packed[entry][index] = value
    data = msgpack.packb([version, packed], use_bin_type=True)
    decodes_or_refuses(decode_whole_part, data)
    decodes_or_refuses(part_and_references, data)


@given(value=msgpack_values)
def test_a_part_of_any_shape_is_refused(value: Any) -> None:
    for packed in (value, [1, value], [1, [value]], [value, []]):
        data = msgpack.packb(packed, use_bin_type=True)
        decodes_or_refuses(decode_whole_part, data)
        decodes_or_refuses(part_and_references, data)


def test_columns_of_any_mutated_table_under_a_right_checksum_are_refused_or_say_what_the_rows_say() -> None:
    decoded = 0
    for data in mutations(TABLE, ROUNDS, key="columns under a right checksum"):
        sealed = replace(TRAILER, table_checksum=checksum(data))
        found = decodes_or_refuses(partial(columns_like_rows, trailer=sealed), data)
        decoded += not isinstance(found, CastoreError)
    assert decoded > 50


def sealed_snapshot(body: bytes) -> bytes:
    """A snapshot file whose digest is right, whatever the body says."""
    return SNAPSHOT[:16] + struct.pack("<Q", len(body)) + body + HASHER.tagged(b"castore.snapshot", (body,))


BODY = msgpack.unpackb(SNAPSHOT[24:-N])


@given(key=st.sampled_from(sorted(BODY)), value=msgpack_values)
def test_a_snapshot_with_right_digest_and_any_field_is_refused_or_can_be_shown(key: str, value: Any) -> None:
    data = sealed_snapshot(msgpack.packb(BODY | {key: value}, use_bin_type=True))
    record = decodes_or_refuses(lambda data: decode_snapshot(data, where="w"), data)
    if isinstance(record, SnapshotRecord):
        repr(make_snapshot(SNAPSHOT_ID, record, lambda _: ()))


@given(body=msgpack_values)
def test_a_snapshot_with_right_digest_and_any_body_is_refused(body: Any) -> None:
    decodes_or_refuses(
        lambda data: decode_snapshot(data, where="w"), sealed_snapshot(msgpack.packb(body, use_bin_type=True))
    )


def test_deep_nesting_with_right_digests_is_refused() -> None:
    for depth in (500, 1000, 100_000):
        deep = b"\x91" * depth + b"\xc0"
        decodes_or_refuses(lambda data: decode_snapshot(data, where="w"), sealed_snapshot(deep))
        decodes_or_refuses(decode_whole_part, deep)
        decodes_or_refuses(decode_whole_part, b"\x92\x00\x91" + deep)


rows = st.builds(
    Row,
    st.binary(min_size=N, max_size=N).map(ChunkId),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**64 - 1),
    st.lists(st.integers(1, 255), max_size=4).map(tuple),
    st.sampled_from(list(RecordKind)),
    st.integers(0, 255),
    st.lists(st.binary(min_size=N, max_size=N).map(ChunkId), max_size=2).map(tuple),
    st.booleans(),
)


@given(table=st.lists(rows, max_size=5), table_offset=st.integers(0, 2**64 - 1), row_count=st.integers(0, 2**64 - 1))
def test_rows_with_right_checksums_and_any_numbers_stay_within_bounds(
    table: list[Row], table_offset: int, row_count: int
) -> None:
    packed = encode_table(table, id_bytes=N)
    seconds = sum(len(row.base_ids) > 1 for row in table)
    honest = Trailer(PACK_ID, 2**40, len(table), checksum(packed), seconds)
    for row in decoded_rows(lambda: decode_table(packed, honest, id_bytes=N, where="w")):
        assert row.offset + row.stored_bytes <= 2**40
    for row in table:
        header = encode_record_header(row, id_bytes=N)
        decoded_rows(lambda header=header: [decode_record_header(header, offset=64, id_bytes=N, where="w")])
    lying = encode_trailer(Trailer(PACK_ID, table_offset, row_count, 0))
    decodes_or_refuses(lambda data: decode_trailer(data, pack_bytes=PACK_BYTES, id_bytes=N, where="w"), lying)


def decoded_rows(decode: Callable[[], list[Row]]) -> list[Row]:
    try:
        found = decode()
    except CastoreError:
        return []
    for row in found:
        assert row.raw_bytes <= 16 * MIB
        assert row.stored_bytes <= 16 * MIB
    return found


@given(count=st.integers(0, 2**32 - 1), header_bytes=st.integers(0, 2**32 - 1), payload_bytes=st.integers(0, 2**64 - 1))
def test_a_run_with_any_lengths_is_refused_or_agrees_with_itself(
    count: int, header_bytes: int, payload_bytes: int
) -> None:
    fixed = struct.pack("<4sBBHIIQ", b"CRUN", 1, N, 0, count, header_bytes, payload_bytes)
    body = RUN[32:]
    data = fixed + checksum(fixed + body).to_bytes(8, "little") + body
    for decode in (DECODERS["run fixed"][1], DECODERS["run"][1]):
        decodes_or_refuses(decode, data)


# ---- names and paths -------------------------------------------------------------------------------------------------


@given(st.text(max_size=60) | st.from_regex(r"(~[sbfyt]:)?[a-z0-9%,.~uE-]{0,20}", fullmatch=True))
def test_a_path_component_is_a_key_or_is_refused(component: str) -> None:
    try:
        key = paths.decode_key(component)
    except CastoreError:
        return
    assert paths.encode_key(key) == component


@pytest.mark.parametrize(
    "component",
    [
        "9" * 5000,
        "-" + "9" * 5000,
        "~f:0x1p99999999",
        "~t:" + "~t:" * 3000,
        "~t:" + "," * 5000,
        "~y:0g",
        "%",
        "%u",
        "~",
        "~q:",
    ],
    ids=lambda component: component[:12],
)
def test_an_absurd_path_component_is_refused_or_comes_back(component: str) -> None:
    test_a_path_component_is_a_key_or_is_refused.hypothesis.inner_test(component)


@given(st.text(max_size=50))
def test_layout_parsers_take_any_name(name: str) -> None:
    for prefix in ("", "packs/", "packs/ab/", "snapshots/", "refs/branches/"):
        found = layout.parse_pack_name(prefix + name)
        assert found is None or layout.pack_name(found) == prefix + name
        layout.parse_snapshot_name(prefix + name)
    try:
        decoded = layout.decode_ref_name(name)
    except CastoreError:
        return
    assert layout.encode_ref_name(decoded) == name


@given(st.text(max_size=30))
def test_a_ref_name_that_is_allowed_becomes_a_file_name_and_comes_back(name: str) -> None:
    try:
        layout.check_ref_name(name)
    except CastoreError:
        return
    encoded = layout.encode_ref_name(name)
    assert "/" not in encoded
    assert not encoded.startswith(".")
    assert layout.decode_ref_name(encoded) == name


@given(st.text(alphabet="ab*?[]!-/\\^~%.", max_size=20), st.text(alphabet="ab/~%.", max_size=20))
def test_any_glob_compiles_and_answers(pattern: str, path: str) -> None:
    with suppress(CastoreError):
        paths.compile_glob(pattern)(path)


# ---- codecs ----------------------------------------------------------------------------------------------------------


def samples() -> list[tuple[bytes, Elements]]:
    rng = np.random.default_rng(0)
    floats = rng.standard_normal(3000, dtype=np.float32)
    return [
        (floats.tobytes(), Elements(4, is_float=True)),
        (floats.astype(np.float64).tobytes() + b"tail", Elements(8, is_float=True)),
        (np.arange(5000, dtype=np.int16).tobytes(), Elements(2)),
        (b"the quick brown fox " * 300, Elements(1)),
        (bytes(4096), Elements(4)),
    ]


Encodings = list[tuple[bytes, bytes, bytes | None]]
"""(raw, payload, base)"""


def encodings(number: int) -> Encodings:
    """What the codec makes of the samples."""
    found: Encodings = []
    for raw, elements in samples():
        if number == DERIVED:
            for rule in Rule:
                copy = bytearray(len(raw) // 4 * 2)
                kernel.derive(raw[: 2 * len(copy)], copy, rule)
                found.append((bytes(copy), bytes([rule]), raw[: 2 * len(copy)]))
            continue
        if number not in (DELTA, ORDERED):
            payload = codec_numbered(number).encode(raw, elements)
            if payload is not None:
                found.append((raw, bytes(payload), None))
            continue
        base = bytes(byte ^ (index % 97 == 0) for index, byte in enumerate(raw))
        for mode in BASE_MODES - ({Mode.SCALED} if elements.item_bytes != 4 else set()):
            if number == ORDERED and elements.item_bytes == 1:
                continue
            choice = Choice(mode, float(np.float32(0.999)), 0.5, ordered=number == ORDERED)
            delta = encode_delta(raw, base, elements, choice)
            if delta is not None:
                found.append((raw, bytes(delta), base))
    return found


@pytest.mark.parametrize("number", NAMES, ids=NAMES.get)
def test_a_mutated_payload_decodes_to_the_declared_length_or_is_refused(number: int) -> None:
    found = encodings(number)
    assert found
    for raw, payload, base in found:
        out = bytearray(len(raw))
        decode_chain((number,), memoryview(payload), memoryview(out), base=base)
        assert out == raw
        for data in mutations(payload, ROUNDS // 6, key=str(number)):
            for length in (len(raw), len(raw) - 1, len(raw) + 1, 0):
                guarded = bytearray(b"\xa5" * 64 + bytes(length) + b"\xa5" * 64)
                view = memoryview(guarded)[64 : 64 + length]
                # The store reads bases of exactly the lengths that the chain needs.
                needed = sum(base_lengths((number,), length))
                beside = None if base is None else base[:needed].ljust(needed, b"\0")
                with suppress(CastoreError):
                    decode_chain((number,), memoryview(data), view, base=beside)
                assert guarded[:64] == guarded[-64:] == b"\xa5" * 64


@given(number=st.sampled_from(sorted(NAMES)), data=st.binary(max_size=200), length=st.integers(0, 5000))
def test_a_random_payload_is_refused_or_decodes(number: int, data: bytes, length: int) -> None:
    base = bytes(sum(base_lengths((number,), length))) if number in (DELTA, DERIVED, ORDERED) else None
    with suppress(CastoreError):
        decode_chain((number,), memoryview(data), memoryview(bytearray(length)), base=base)


@pytest.mark.parametrize(
    "chain", [(0,), (5,), (255,), (1, 2), (3, 2, 1, 4), (1, 0, 2), (16,), (3, 16), (17,), (18,), (3, 18)]
)
def test_an_unknown_chain_is_refused(chain: tuple[int, ...]) -> None:
    with pytest.raises(CastoreError):
        decode_chain(chain, memoryview(bytes(10)), memoryview(bytearray(10)))


def planes_bomb() -> bytes:
    """Four planes that each claim to unpack to far more than the chunk has."""
    bomb = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(256 * MIB))
    return b"\x04\x00" + b"".join(struct.pack("<BI", 1, len(bomb)) for _ in range(4)) + bomb * 4


BOMBS = {
    "zstd": (2, lambda: zstandard.ZstdCompressor(write_content_size=False).compress(bytes(512 * MIB))),
    "zstd with size": (2, lambda: zstandard.ZstdCompressor().compress(bytes(512 * MIB))),
    "zstd claims an exabyte": (2, lambda: b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 2**60) + b"\x01\x00\x00"),
    "lz4": (1, lambda: lz4.block.compress(bytes(64 * MIB), store_size=False)),
    "planes": (3, planes_bomb),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_does_not_go_off(name: str) -> None:
    number, make = BOMBS[name]
    payload = make()
    out = memoryview(bytearray(GRID_BYTES))
    with measured_memory() as peak_bytes, pytest.raises(CastoreError):
        decode_chain((number,), memoryview(payload), out)
    assert peak_bytes() < 16 * MIB


# ---- whole packs -----------------------------------------------------------------------------------------------------


def whole_pack() -> bytes:
    backend = MemoryBackend()
    name = layout.pack_name(PACK_ID)
    writer = PackWriter(backend.create_stream(name), PackHeader(PACK_ID, bytes(16), HASHER, 5))
    for seed, size in enumerate((10, 300, 1000)):
        raw = random.Random(seed).randbytes(size)
        writer.append(HASHER.chunk_id(raw), raw, kind=RecordKind.LEAF, raw_bytes=size, chain=())
    run = [random.Random(9).randbytes(size) for size in (GRID_BYTES, 700)]
    writer.append_run(
        [(HASHER.chunk_id(raw), lambda raw=raw: raw) for raw in run],
        kind=RecordKind.LEAF,
        payload_bytes=GRID_BYTES + 700,
    )
    last = random.Random(10).randbytes(50)
    writer.append(HASHER.chunk_id(last), last, kind=RecordKind.PART, raw_bytes=50, chain=())
    writer.seal()
    return backend.read(name, max_bytes=1 << 30)


WHOLE_PACK = whole_pack()


def read_pack(data: bytes) -> tuple[list[Row], list[Row | Gap]]:
    """Rows of the table (none when it is refused), and what a scan finds."""
    backend = MemoryBackend()
    name = layout.pack_name(PACK_ID)
    backend.put_if_absent(name, data)
    reader = backend.open_reader(name)
    try:
        table = read_table(reader, where="w", expected_id=PACK_ID, hasher=HASHER)
    except CastoreError:
        table = []
    return table, list(scan_records(reader, where="w", id_bytes=N))


def test_a_scan_finds_every_record_that_damage_did_not_touch() -> None:
    table, found = read_pack(WHOLE_PACK)
    assert [row for row in found if isinstance(row, Row)] == table
    interesting = [*range(600), *range(4000, 4200), *range(len(WHOLE_PACK) - 1600, len(WHOLE_PACK))]
    rng = random.Random(3)
    for at in rng.sample(interesting, 150):
        data = bytearray(WHOLE_PACK)
        data[at] ^= 1 << rng.randrange(8)
        _, scanned = read_pack(bytes(data))
        rows_found = {row.chunk_id for row in scanned if isinstance(row, Row)}
        untouched = [row for row in table if not header_start(row) <= at < row.offset and not row.in_run]
        assert rows_found >= {row.chunk_id for row in untouched}


def header_start(row: Row) -> int:
    return row.offset - 32 - 2 * N


def test_a_scan_of_any_mutation_ends_and_covers_the_file() -> None:
    small = WHOLE_PACK[:2000] + WHOLE_PACK[-1600:]
    for data in mutations(small, ROUNDS // 2, key="pack"):
        table, found = read_pack(data)
        for row in (*table, *(row for row in found if isinstance(row, Row))):
            assert row.offset + row.stored_bytes <= len(data)
        gaps = [gap for gap in found if isinstance(gap, Gap)]
        assert all(gap.length > 0 for gap in gaps)
        assert sum(gap.length for gap in gaps) <= len(data)


def test_false_magics_do_not_make_a_scan_slow() -> None:
    data = HEADER + b"CREC" * (2 * MIB // 4) + b"\0CRECREC" * 10_000
    _, found = read_pack(data)
    assert [gap.length for gap in found if isinstance(gap, Gap)] == [len(data) - HEADER_BYTES]


def test_dump_describes_any_bytes() -> None:
    seeds = {"config": CONFIG, "x.pack": WHOLE_PACK[:3000], SNAPSHOT_ID: SNAPSHOT, "main": TEXT, "x.parity": PARITY}
    for name, seed in seeds.items():
        for data in itertools.islice(mutations(seed, ROUNDS // 4, key=name), ROUNDS):
            backend = MemoryBackend()
            backend.put_if_absent("file", data)
            for where in (name, "snapshots/x", "refs/branches/%zz", "a.condemned"):
                described = dump_reader(backend.open_reader("file"), where)
                json.dumps(described, allow_nan=False)
                assert (
                    described["problems"]
                    or data == seed
                    or described["kind"] in ("index", "pack", "parity", "snapshot")
                )


# ---- memory ----------------------------------------------------------------------------------------------------------


class measured_memory:  # noqa: N801  reads as a function
    """Peak of Python's allocations inside the block."""

    def __enter__(self) -> Callable[[], int]:
        tracemalloc.start()
        return lambda: self.peak

    def __exit__(self, *_: object) -> None:
        self.peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()


@pytest.mark.parametrize(
    "body",
    [
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\x92\x00\xdd\x7f\xff\xff\xff",
    ],
    ids=lambda body: body.hex(),
)
def test_claimed_lengths_allocate_nothing(body: bytes) -> None:
    with measured_memory() as peak_bytes:
        decodes_or_refuses(decode_whole_part, body)
        decodes_or_refuses(lambda data: decode_snapshot(data, where="w"), sealed_snapshot(body))
    assert peak_bytes() < MIB


def test_a_table_of_false_length_allocates_nothing() -> None:
    backend = MemoryBackend()
    name = layout.pack_name(PACK_ID)
    trailer = encode_trailer(Trailer(PACK_ID, HEADER_BYTES, 2**40 // row_bytes(N), 0))
    backend.put_if_absent(name, HEADER + trailer)
    reader = backend.open_reader(name)
    with measured_memory() as peak_bytes, pytest.raises(CastoreError):
        read_table(reader, where="w", expected_id=PACK_ID, hasher=HASHER)
    assert peak_bytes() < MIB
