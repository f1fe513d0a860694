"""State ids and leaf digests: pinned, and the same whatever is no part of the content."""

from __future__ import annotations

from dataclasses import replace

import pytest

from castore.errors import FormatError
from castore.format.identity import entry_digest, leaf_digest, state_id
from castore.format.manifest import Entry, Kind
from castore.hashing import hasher_for
from castore.options import GRID_BYTES

XXH3 = hasher_for("xxh3-128")
ALGORITHMS = pytest.mark.parametrize("name", ["xxh3-128", "blake3"])
RAW = bytes(range(8))
WEIGHT = Entry("w", Kind.TENSOR, "float32", (2, 1), raw_bytes=8, inline=RAW)
STATE = (
    Entry("", Kind.DICT, shape=(3,)),
    WEIGHT,
    Entry("tied", Kind.ALIAS, attrs={"target": "w"}),
    Entry("step", Kind.INT, raw_bytes=1, inline=b"\x07"),
)


def test_leaf_digests_are_pinned() -> None:
    ids = XXH3.digest(RAW)
    assert leaf_digest(XXH3, 8, ids).hex() == "49713f895b818a694939d91fa1c7cc87", "the format changed: bump the version"
    assert leaf_digest(XXH3, 8, ids) == XXH3.digest(b"castore.leaf\0" + (8).to_bytes(8, "little") + ids)
    assert leaf_digest(XXH3, 0, b"").hex() == "3c759341c8c5c952c5a9a48c5fde1aa1"


def test_the_state_id_is_pinned() -> None:
    assert state_id(XXH3, STATE) == "95a0524979fd0fca0cd99bb9416bd40c", "the format changed: bump the version"
    assert state_id(hasher_for("blake3"), STATE) == "b7772513feb232be7a299aab410f7ef89959dd64bbf27709ab67873788239cf5"
    assert state_id(XXH3, ()) == XXH3.digest(b"castore.state\0").hex()


@ALGORITHMS
def test_a_leaf_is_the_same_inline_and_in_chunks(name: str) -> None:
    hasher = hasher_for(name)
    in_chunks = replace(WEIGHT, inline=None, chunks=hasher.digest(RAW))
    assert entry_digest(hasher, in_chunks) == entry_digest(hasher, WEIGHT)
    assert state_id(hasher, (STATE[0], in_chunks, *STATE[2:])) == state_id(hasher, STATE)


def test_an_empty_leaf_has_no_chunk_ids() -> None:
    empty = Entry("e", Kind.TENSOR, "float32", (0, 5), inline=b"")
    assert entry_digest(XXH3, empty) == leaf_digest(XXH3, 0, b"")


def test_containers_have_no_digest_and_views_their_own() -> None:
    assert entry_digest(XXH3, STATE[0]) == b""
    assert entry_digest(XXH3, Entry("v", Kind.VIEW, digest=b"d" * 16)) == b"d" * 16


def test_what_is_no_content_does_not_change_it() -> None:
    turned = tuple(reversed(STATE))
    hinted = tuple(replace(entry, hints={"strides": [1, 2], "requires_grad": True}) for entry in STATE)
    attributed = Entry("n", Kind.NAMEDTUPLE, shape=(0,), attrs={"class": "a:B", "fields": []})
    other_order = replace(attributed, attrs={"fields": [], "class": "a:B"})
    assert state_id(XXH3, turned) == state_id(XXH3, hinted) == state_id(XXH3, STATE)
    assert state_id(XXH3, (attributed,)) == state_id(XXH3, (other_order,))


def test_any_content_that_changes_changes_it() -> None:
    others = [
        replace(WEIGHT, path="x"),
        replace(WEIGHT, path="ẅ"),
        replace(WEIGHT, kind=Kind.NDARRAY),
        replace(WEIGHT, dtype="int32"),
        replace(WEIGHT, shape=(1, 2)),
        replace(WEIGHT, shape=(2,)),
        replace(WEIGHT, attrs={"class": "Parameter"}),
        replace(WEIGHT, inline=RAW[::-1]),
        replace(WEIGHT, raw_bytes=7, inline=RAW[:7]),
    ]
    ids = [state_id(XXH3, (entry,)) for entry in (WEIGHT, *others)]
    ids += [state_id(XXH3, ()), state_id(XXH3, (WEIGHT, Entry("", Kind.DICT, shape=(1,))))]
    assert len(set(ids)) == len(ids)


def test_the_hash_is_part_of_it() -> None:
    assert len(state_id(XXH3, STATE)) == 32
    assert len(state_id(hasher_for("blake3"), STATE)) == 64


def test_an_alias_counts_as_a_copy_of_its_target() -> None:
    copied = (STATE[0], WEIGHT, replace(WEIGHT, path="tied"), STATE[3])
    assert state_id(XXH3, copied) == state_id(XXH3, STATE)


def test_a_view_counts_as_what_it_is_and_its_storage_not_at_all() -> None:
    raw = bytes(GRID_BYTES)
    storage = Entry("~storage/0", Kind.STORAGE, raw_bytes=len(raw), chunks=XXH3.digest(raw))
    digest = entry_digest(XXH3, WEIGHT)
    for kind, dtype in ((Kind.TENSOR, "float32"), (Kind.NDARRAY, "<f4"), (Kind.NDARRAY, "|u1")):
        view = Entry("w", Kind.VIEW, dtype, (2, 1), {"storage": "~storage/0", "offset": 3}, raw_bytes=8, digest=digest)
        whole = replace(WEIGHT, kind=kind, dtype=dtype)
        assert state_id(XXH3, (view, storage)) == state_id(XXH3, (whole,))


@pytest.mark.parametrize(
    "alias",
    [
        Entry("a", Kind.ALIAS, attrs={"target": "nowhere"}),
        Entry("a", Kind.ALIAS),
        Entry("a", Kind.ALIAS, attrs={"target": "a"}),
        Entry("a", Kind.ALIAS, attrs={"target": ["w"]}),
    ],
)
def test_an_alias_of_nothing_is_a_format_error(alias: Entry) -> None:
    with pytest.raises(FormatError, match="leaf 'a': alias of"):
        state_id(XXH3, (WEIGHT, alias))


def test_attributes_that_cannot_be_packed_are_a_format_error() -> None:
    deep: list[object] = []
    for _ in range(2000):
        deep = [deep]
    with pytest.raises(FormatError, match="leaf 'w': attributes that castore cannot have written"):
        state_id(XXH3, (replace(WEIGHT, attrs={"x": deep}),))
