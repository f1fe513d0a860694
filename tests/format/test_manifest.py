"""Manifest parts: pinned bytes, every field checked, cuts that depend on nothing but the entries."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from castore.errors import FormatError
from castore.format.manifest import (
    CONTAINER_KINDS,
    REFERENCE_KINDS,
    Entry,
    Kind,
    chunk_bytes,
    chunk_count,
    cut_parts,
    decode_id_list,
    decode_part,
    encode_id_list,
    encode_part,
    part_references,
)
from castore.options import (
    GRID_BYTES,
    INLINE_BYTES_MAX,
    PART_BYTES_MAX,
    PART_CHUNKS_MAX,
    PART_ENTRIES_MAX,
    PART_ENTRIES_MIN,
)
from tests.suites.golden import assert_golden

N = 16
ENTRIES = (
    Entry("", Kind.DICT, shape=(3,)),
    Entry("lr", Kind.FLOAT, raw_bytes=8, inline=bytes(8)),
    Entry(
        "w",
        Kind.TENSOR,
        "bfloat16",
        (512, 512),
        hints={"strides": [1, 512], "requires_grad": True},
        raw_bytes=GRID_BYTES // 2,
        chunks=bytes(range(N)),
    ),
    Entry("tied", Kind.ALIAS, attrs={"target": "w"}),
    Entry(
        "v",
        Kind.VIEW,
        "float32",
        (2,),
        {"storage": "~storage/0", "offset": 1, "stride": [1]},
        raw_bytes=8,
        digest=b"d" * N,
    ),
)


def packed(**fields: Any) -> bytes:
    """A part with one entry, a tensor of 1000 bytes, but for the given fields."""
    entry = {
        "path": "w",
        "kind": 48,
        "dtype": "float32",
        "shape": [250],
        "attrs": None,
        "hints": None,
        "raw_bytes": 1000,
        "data": [bytes(N)],
        "digest": None,
    }
    assert fields.keys() <= entry.keys()
    return msgpack.packb([1, [list({**entry, **fields}.values())]])


def part(data: bytes) -> list[Entry]:
    return decode_part(data, id_bytes=N, where="part 0")


# ---- bytes -------------------------------------------------------------------------------------------------


def test_the_bytes_are_pinned() -> None:
    assert_golden(
        encode_part(ENTRIES),
        """
        92 01 95
        99 a0 01 a0 91 03 c0 c0 00 c0 c0
        99 a2 6c72 13 a0 90 c0 c0 08 c408 0000000000000000 c0
        99 a1 77 30 a8 62666c6f61743136 92 cd0200 cd0200 c0
            82 ad 72657175697265735f67726164 c3 a7 73747269646573 92 01 cd0200
            ce00080000 91 c410 000102030405060708090a0b0c0d0e0f c0
        99 a4 74696564 38 a0 90 81 a6 746172676574 a1 77 c0 00 c0 c0
        99 a1 76 39 a7 666c6f61743332 91 02
            83 a6 6f6666736574 01 a7 73746f72616765 aa 7e73746f726167652f30 a6 737472696465 91 01 c0
            08 c0 c410 64646464646464646464646464646464
        """,
    )


def test_kind_numbers_are_permanent() -> None:
    numbers = {
        "DICT": 1, "ORDERED_DICT": 2, "LIST": 3, "TUPLE": 4, "NAMEDTUPLE": 5, "DATACLASS": 6,
        "SPARSE": 7, "QUANTIZED": 8,
        "NONE": 16, "BOOL": 17, "INT": 18, "FLOAT": 19, "COMPLEX": 20, "STR": 21, "BYTES": 22,
        "INT_LIST": 23, "INT_TUPLE": 24, "FLOAT_LIST": 25, "FLOAT_TUPLE": 26,
        "TORCH_DTYPE": 32, "TORCH_DEVICE": 33, "TORCH_SIZE": 34, "NUMPY_SCALAR": 35,
        "TENSOR": 48, "NDARRAY": 49, "STORAGE": 50, "ALIAS": 56, "VIEW": 57, "PICKLE": 62,
    }  # fmt: skip
    assert {kind.name: kind.value for kind in Kind} == numbers, "the format changed: bump the version"


def test_entries_come_back() -> None:
    assert part(encode_part(ENTRIES)) == list(ENTRIES)


def test_equal_entries_give_equal_bytes_whatever_the_order_of_attributes() -> None:
    view = ENTRIES[-1]
    turned = replace(view, attrs=dict(reversed(list(view.attrs.items()))))
    assert encode_part([turned]) == encode_part([view])


def test_id_lists_are_told_from_chunk_ids() -> None:
    raw_bytes = 2 * PART_CHUNKS_MAX * GRID_BYTES
    entry = Entry("big", Kind.STORAGE, raw_bytes=raw_bytes, id_lists=bytes(2 * N))
    decoded = part(encode_part([entry]))[0]
    assert decoded == entry
    assert decoded.chunks is None
    assert decoded.chunk_ids(N) == []


names = st.text(max_size=8)
maps = st.dictionaries(
    names, st.none() | st.booleans() | st.integers(-9, 2**40) | names | st.lists(st.integers(0, 9)), max_size=3
)


@st.composite
def entries(draw: st.DrawFn) -> Entry:
    kind = draw(st.sampled_from(list(Kind)))
    raw_bytes = draw(st.sampled_from([0, 1, 255, 256, 257, GRID_BYTES, GRID_BYTES + 1, 5 * GRID_BYTES]))
    entry = Entry(
        draw(names), kind, draw(names), tuple(draw(st.lists(st.integers(0, 2**62), max_size=4))), draw(maps), draw(maps)
    )
    if kind in CONTAINER_KINDS:
        return entry
    entry = replace(entry, raw_bytes=raw_bytes)
    if kind in REFERENCE_KINDS:
        return replace(entry, digest=bytes(N) if kind is Kind.VIEW else None)
    count = chunk_count(raw_bytes)
    if count == 0:
        return replace(entry, inline=bytes(raw_bytes))
    return replace(entry, chunks=draw(st.binary(min_size=count * N, max_size=count * N)))


@given(st.lists(entries(), max_size=5))
def test_any_entries_come_back(some: list[Entry]) -> None:
    assert part(encode_part(some)) == some


# ---- what cannot be ----------------------------------------------------------------------------------------


def test_the_plain_entry_of_these_tests_is_whole() -> None:
    assert part(packed()) == [Entry("w", Kind.TENSOR, "float32", (250,), raw_bytes=1000, chunks=bytes(N))]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": 5}, "an entry of 9 fields"),
        ({"kind": 0}, "kind 0 is unknown"),
        ({"kind": 9}, "kind 9 is unknown"),
        ({"kind": "48"}, "kind 48 is unknown"),
        ({"kind": []}, "unknown"),
        ({"dtype": None}, "expected str"),
        ({"shape": None}, "expected a shape"),
        ({"shape": [1] * 65}, "expected a shape"),
        ({"shape": [-1]}, "expected a length"),
        ({"shape": [1.5]}, "expected a length"),
        ({"shape": [True]}, "expected a length"),
        ({"shape": [2**63]}, "expected a length"),
        ({"attrs": []}, "a map with text keys"),
        ({"hints": "x"}, "a map with text keys"),
        ({"raw_bytes": -1}, "expected a length"),
        ({"raw_bytes": 2**63}, "expected a length"),
        ({"raw_bytes": None}, "expected a length"),
        ({"data": None}, "expected 16 bytes of data or ids, found None"),
        ({"data": bytes(N)}, "found None"),
        ({"data": [bytes(N - 1)]}, "found 15"),
        ({"data": [bytes(2 * N)]}, "found 32"),
        ({"data": [bytes(N), bytes(N)]}, "found None"),
        ({"data": []}, "found None"),
        ({"data": ["x" * N]}, "found None"),
        ({"data": [bytes(N - 1), None]}, "found 15"),
        ({"raw_bytes": GRID_BYTES + 1}, "expected 32 bytes"),
        ({"raw_bytes": 2**62}, "raw bytes: expected"),
        ({"raw_bytes": 256}, "expected 256 bytes of data or ids, found None"),
        ({"raw_bytes": 3, "data": b"four"}, "expected 3 bytes of data or ids, found 4"),
        ({"raw_bytes": 0, "data": None}, "expected 0 bytes of data or ids, found None"),
        ({"digest": bytes(N)}, "views have one, nothing else"),
        ({"digest": "x"}, "expected bytes"),
        ({"kind": 57, "data": None}, "views have one"),
        ({"kind": 57, "data": None, "digest": bytes(N - 1)}, "views have one"),
        ({"kind": 57, "digest": bytes(N)}, "VIEW carries data and must not"),
        ({"kind": 56}, "ALIAS carries data and must not"),
        ({"kind": 1, "raw_bytes": 0}, "DICT carries data and must not"),
        ({"kind": 1, "data": None}, "DICT carries data and must not"),
    ],
)
def test_an_entry_that_cannot_be_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        part(packed(**fields))
    assert str(caught.value).startswith("part 0")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\xc0",
        msgpack.packb(0),
        msgpack.packb([]),
        msgpack.packb([0]),
        msgpack.packb([1, None]),
        msgpack.packb([1, {}]),
        msgpack.packb([0, []]),
        msgpack.packb([2, []]),
        msgpack.packb([None, []]),
        msgpack.packb([1, [], 0]),
        msgpack.packb([1, [None]]),
        msgpack.packb([1, [[]]]),
        msgpack.packb([1, [[""] * 10]]),
        msgpack.packb({0: []}),
        msgpack.packb([1, []]) + b"\0",
        msgpack.packb([1, [{"a": 1}]]),
        b"\x92\x01\xdd\xff\xff\xff\xff",
        b"\x92\x01\x91\xc6\xff\xff\xff\xff",
        b"\x92\x01\x91" + b"\x91" * 500 + b"\xc0",
        b"\x92\x01\x91" + b"\x91" * 1000 + b"\xc0",
        b"\x92\x01\x91" + b"\x91" * 100_000 + b"\xc0",
        b"\x92\x01\x91\xc7\x0c\xff" + b"\xff" * 12,
        b"\x92\x01\x91\xa2\xff\xff",
        bytes(PART_BYTES_MAX + 1),
    ],
)
def test_what_is_no_part_is_a_format_error(data: bytes) -> None:
    with pytest.raises(FormatError) as caught:
        part(data)
    assert len(str(caught.value)) < 500


def test_a_newer_part_says_so() -> None:
    with pytest.raises(FormatError, match="expected part version 1, found 7; a newer castore may read it"):
        part(msgpack.packb([7, []]))


@given(st.integers(0, 2**32), st.integers(0, 255), st.integers(0, 2**32), st.binary(max_size=4))
def test_a_damaged_part_gives_entries_or_a_format_error(at: int, value: int, cut: int, extra: bytes) -> None:
    data = bytearray(encode_part(ENTRIES))
    data[at % len(data)] = value
    for damaged in (data, data[: cut % len(data)], data[: cut % len(data)] + extra + data[cut % len(data) :]):
        with contextlib.suppress(FormatError):
            part(bytes(damaged))


@given(st.binary(max_size=100))
def test_garbage_gives_entries_or_a_format_error(data: bytes) -> None:
    for garbage in (data, b"\x92\x01" + data, b"\x92\x01\x91\x99" + data):
        with contextlib.suppress(FormatError):
            part(garbage)


# ---- the grid ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw_bytes", "count"),
    [
        (0, 0),
        (1, 0),
        (INLINE_BYTES_MAX, 0),
        (INLINE_BYTES_MAX + 1, 1),
        (GRID_BYTES, 1),
        (GRID_BYTES + 1, 2),
        (5 << 30, 5120),
    ],
)
def test_the_grid_cuts_what_does_not_live_inline(raw_bytes: int, count: int) -> None:
    assert chunk_count(raw_bytes) == count
    if count:
        lengths = [chunk_bytes(raw_bytes, index) for index in range(count)]
        assert sum(lengths) == raw_bytes
        assert set(lengths[:-1]) <= {GRID_BYTES}
        assert 0 < lengths[-1] <= GRID_BYTES


def test_constants_of_the_format_are_pinned() -> None:
    assert (GRID_BYTES, INLINE_BYTES_MAX) == (1 << 20, 256), "the format changed: bump the version"
    assert (PART_ENTRIES_MIN, PART_ENTRIES_MAX, PART_CHUNKS_MAX) == (16, 256, 1024)


def test_chunk_ids_are_taken_apart_in_grid_order() -> None:
    entry = Entry("w", Kind.TENSOR, raw_bytes=2 * GRID_BYTES, chunks=b"a" * N + b"b" * N)
    assert entry.chunk_ids(N) == [b"a" * N, b"b" * N]


def test_an_id_list_has_the_count_that_its_leaf_needs() -> None:
    ids = bytes(3 * N)
    assert decode_id_list(encode_id_list(ids), expected_count=3, id_bytes=N, where="x") == ids
    for count in (2, 4):
        with pytest.raises(FormatError, match=f"x: expected {count} chunk ids, found 48 bytes"):
            decode_id_list(ids, expected_count=count, id_bytes=N, where="x")


# ---- the cut into parts ------------------------------------------------------------------------------------


def small(count: int) -> list[Entry]:
    return [Entry(f"optimizer/state/{index}/step", Kind.INT, raw_bytes=1, inline=b"\1") for index in range(count)]


def cut(some: list[Entry]) -> list[list[Entry]]:
    return list(cut_parts(some, id_bytes=N))


def test_parts_hold_all_entries_in_order() -> None:
    for count in (0, 1, 15, 16, 17, 1000):
        parts = cut(small(count))
        assert [entry for one in parts for entry in one] == small(count)
        assert all(PART_ENTRIES_MIN <= len(one) <= PART_ENTRIES_MAX for one in parts[:-1])
        assert all(parts)


def test_the_places_of_the_cuts_are_pinned() -> None:
    assert [len(one) for one in cut(small(1000))] == [152, 35, 22, 21, 81, 42, 140, 46, 16, 105, 174, 166], (
        "the format changed: bump the version"
    )


def test_a_part_ends_where_its_chunk_ids_would_grow_too_many() -> None:
    big = [Entry(f"w{index}", Kind.TENSOR, raw_bytes=300 * GRID_BYTES, chunks=bytes(300 * N)) for index in range(8)]
    assert [len(one) for one in cut(big)] == [4, 4]


def test_one_entry_more_in_the_middle_moves_few_cuts() -> None:
    before = small(3000)
    after = [*before[:1500], Entry("new", Kind.NONE, inline=b""), *before[1500:]]
    old, new = ({encode_part(one) for one in cut(some)} for some in (before, after))
    assert len(new - old) <= 3
    assert len(old) > 20


# ---- what a part names, without its entries ------------------------------------------------------------------------


def test_the_ids_that_a_part_names_are_those_of_its_entries() -> None:
    entries = [
        Entry("", Kind.DICT, shape=(4,)),
        Entry("a", Kind.TENSOR, "float32", (1,), raw_bytes=4, inline=b"1234"),
        Entry("b", Kind.TENSOR, "uint8", (3 << 20,), raw_bytes=3 << 20, chunks=bytes(range(48))),
        Entry("c", Kind.TENSOR, "uint8", (1025 << 20,), raw_bytes=1025 << 20, id_lists=bytes(range(100, 132))),
        Entry("d", Kind.TENSOR, "uint8", (1 << 20,), raw_bytes=1 << 20, chunks=bytes(16)),
    ]
    chunks, id_lists = part_references(encode_part(entries), id_bytes=16, where="part")
    assert chunks == bytes(range(48)) + bytes(16)
    assert id_lists == bytes(range(100, 132))


@pytest.mark.parametrize(
    "part",
    [
        b"",
        b"\xc1",
        msgpack.packb([1, [[1, 2, 3]]]),
        msgpack.packb([7, []]),
        msgpack.packb([1, 5]),
        msgpack.packb([1, [["x", 48, "uint8", [1], None, None, 300, [b"short"], None]]]),
        msgpack.packb([1, [["x", 48, "uint8", [1], None, None, 300, [bytes(16), None, 1], None]]]),
        msgpack.packb([1, [["x", 48, "uint8", [1], None, None, 300, ["text"], None]]]),
    ],
)
def test_a_part_that_is_none_names_nothing(part: bytes) -> None:
    """Never an empty answer: a collector would take it for leave to delete."""
    with pytest.raises(FormatError):
        part_references(part, id_bytes=16, where="part")
