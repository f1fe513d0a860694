"""What is wrong with a manifest, told leaf by leaf."""

from __future__ import annotations

import pytest

from castore.format.identity import state_id
from castore.format.manifest import Entry, Kind
from castore.format.snapshot import SnapshotRecord
from castore.hashing import hasher_for
from castore.ids import StateId
from castore.maintenance.manifest_check import check_manifest

HASHER = hasher_for("xxh3-128")


def leaf(path: str, value: bytes = b"x") -> Entry:
    return Entry(path, Kind.BYTES, raw_bytes=len(value), inline=value)


def record_of(entries: list[Entry]) -> SnapshotRecord:
    """A record that agrees with the entries."""
    try:
        state = state_id(HASHER, entries)
    except ValueError:
        state = StateId("")
    raw_bytes = sum(entry.raw_bytes for entry in entries if entry.has_bytes)
    leaves = sum(not entry.is_container for entry in entries)
    return SnapshotRecord(state, (), "main", 1, 0, {}, {}, "", raw_bytes, 0, 0, leaves, (), "", b"")


def complaints(entries: list[Entry]) -> dict[str, str]:
    return dict(check_manifest(entries, record_of(entries), HASHER))


def test_a_tree_with_every_sort_of_entry_is_fine() -> None:
    entries = [
        Entry("", Kind.DICT, shape=(6,)),
        Entry("list", Kind.LIST, shape=(2,)),
        leaf("list/0"),
        leaf("list/1"),
        Entry("empty", Kind.TUPLE, shape=(0,)),
        Entry("sparse", Kind.SPARSE, shape=(2,)),
        leaf("sparse/~indices"),
        leaf("sparse/~values"),
        leaf("~s:12"),
        Entry("tied", Kind.ALIAS, attrs={"target": "~s:12"}),
        Entry("view", Kind.VIEW, "<f4", (1,), {"storage": "~storage/0"}, {}, 4, digest=bytes(16)),
        Entry("~storage/0", Kind.STORAGE, "|u1", (8,), raw_bytes=8, inline=bytes(8)),
    ]
    assert complaints(entries) == {}


def test_a_single_leaf_is_a_state() -> None:
    assert complaints([leaf("")]) == {}


@pytest.mark.parametrize(
    ("entries", "path", "words"),
    [
        ([], "", "for the root"),
        ([Entry("", Kind.DICT, shape=(2,)), leaf("a"), leaf("a")], "a", "twice"),
        ([Entry("", Kind.LIST, shape=(3,)), leaf("0")], "", "children"),
        ([Entry("", Kind.DICT, shape=(1,)), leaf("a/b")], "a/b", "parent"),
        ([leaf(""), leaf("a")], "a", "no container"),
        ([Entry("", Kind.DICT, shape=(1,)), leaf("..")], "..", "escaped key"),
        ([Entry("", Kind.DICT, shape=(1,)), leaf("~indices")], "~indices", "escaped key"),
        ([Entry("", Kind.DICT, shape=(1,)), Entry("a", Kind.ALIAS, attrs={"target": "b"})], "a", "alias"),
        ([Entry("", Kind.ALIAS, attrs={})], "", "alias"),
    ],
)
def test_what_is_wrong_is_told_with_its_path(entries: list[Entry], path: str, words: str) -> None:
    try:
        found = complaints(entries)
    except Exception:  # noqa: BLE001  no state id can be computed, so there is no record that agrees
        record = record_of([leaf("")])
        found = dict(reversed(check_manifest(entries, record, HASHER)))
    assert words in found[path]


def test_a_record_that_does_not_agree_is_told() -> None:
    record = record_of([leaf("", b"other")])
    messages = [message for _, message in check_manifest([leaf("")], record, HASHER)]
    assert any("5 bytes" in message for message in messages)
    assert any(record.state_id in message for message in messages)
