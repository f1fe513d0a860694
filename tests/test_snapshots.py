"""Snapshots are values; their files name their content; manifests are read once and checked."""

from __future__ import annotations

import dataclasses
import pickle
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from castore.backend import MemoryBackend
from castore.backend.base import Backend
from castore.errors import (
    ChecksumError,
    DamageError,
    StorageError,
    UnknownRefError,
)
from castore.format.layout import snapshot_name
from castore.hashing import hasher_for
from castore.ids import ChunkId, SnapshotId, StateId
from castore.options import SNAPSHOT_BYTES_MAX
from castore.snapshots import Leaf, ancestry, list_snapshot_ids, make_snapshot, read_record, write_record
from tests.suites.packs import HASHER, flip, rewrite
from tests.suites.records import NOW_NS, RECORD


def chain(backend: Backend, count: int) -> list[SnapshotId]:
    """Snapshots that continue one another, oldest first."""
    ids: list[SnapshotId] = []
    for step in range(count):
        ids.append(write_record(backend, replace(RECORD, parents=tuple(ids[-1:]), step=step), HASHER))
    return ids


# ---- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["xxh3-128", "blake3"])
def test_a_record_that_was_written_is_read(name: str) -> None:
    backend, hasher = MemoryBackend(), hasher_for(name)
    width = hasher.digest_bytes
    record = replace(RECORD, state_id=StateId("ab" * width), part_ids=(ChunkId(b"p" * width),))
    snapshot_id = write_record(backend, record, hasher)
    assert read_record(backend, snapshot_id) == record
    assert list(list_snapshot_ids(backend)) == [snapshot_id]


def test_a_nonce_that_repeats_is_an_error() -> None:
    backend = MemoryBackend()
    write_record(backend, RECORD, HASHER)
    with pytest.raises(StorageError, match="its nonce repeats"):
        write_record(backend, RECORD, HASHER)


def test_a_snapshot_that_is_not_there_is_unknown() -> None:
    with pytest.raises(UnknownRefError, match=f"here has no snapshot {'0' * 32}"):
        read_record(MemoryBackend("here"), SnapshotId("0" * 32))


def test_damaged_and_swapped_files_are_seen() -> None:
    backend = MemoryBackend()
    first, second = chain(backend, 2)
    data = backend.read(snapshot_name(second), max_bytes=SNAPSHOT_BYTES_MAX)
    rewrite(backend, snapshot_name(first), lambda old: old.__setitem__(slice(None), data))
    with pytest.raises(ChecksumError, match=f"snapshots/{first}: expected snapshot {first}, found {second}"):
        read_record(backend, first)
    rewrite(backend, snapshot_name(second), flip(100))
    with pytest.raises(DamageError, match=f"snapshots/{second}"):
        read_record(backend, second)


def test_snapshots_are_listed_by_prefix_and_strangers_passed_over() -> None:
    backend = MemoryBackend()
    ids = ["ab" * 16, "ac" * 16, "ac" * 32]
    for name in (*ids, "README", "AB" * 16, "ab"):
        backend.put_if_absent(f"snapshots/{name}", b"")
    assert list(list_snapshot_ids(backend)) == ids
    assert list(list_snapshot_ids(backend, prefix="ac")) == ids[1:]
    assert list(list_snapshot_ids(backend, prefix="b")) == []


# ---- ancestry ----------------------------------------------------------------------------------------------


def test_ancestry_goes_from_the_newest_to_the_first() -> None:
    backend = MemoryBackend()
    ids = chain(backend, 4)
    found = list(ancestry(backend, ids[3]))
    assert [snapshot_id for snapshot_id, _ in found] == ids[::-1]
    assert [record.step for _, record in found] == [3, 2, 1, 0]


def test_ancestry_ends_where_a_parent_is_gone() -> None:
    backend = MemoryBackend()
    ids = chain(backend, 4)
    backend.delete(snapshot_name(ids[1]))
    assert [snapshot_id for snapshot_id, _ in ancestry(backend, ids[3])] == [ids[3], ids[2]]


def test_ancestry_of_what_is_not_there_is_unknown() -> None:
    with pytest.raises(UnknownRefError):
        list(ancestry(MemoryBackend(), SnapshotId("0" * 32)))


def test_a_damaged_parent_is_no_end_but_an_error() -> None:
    backend = MemoryBackend()
    ids = chain(backend, 3)
    rewrite(backend, snapshot_name(ids[1]), flip(60))
    found = ancestry(backend, ids[2])
    assert next(found)[0] == ids[2]
    with pytest.raises(DamageError):
        next(found)


# ---- the value ---------------------------------------------------------------------------------------------

LEAVES = (Leaf("w", "tensor", "float32", (2,), 8, 0, "ab"),)


def leaves_of(_: SnapshotId) -> tuple[Leaf, ...]:
    return LEAVES


def test_a_snapshot_is_a_frozen_value() -> None:
    snapshot = make_snapshot(SnapshotId("cd" * 16), RECORD, leaves_of)
    assert (snapshot.id, snapshot.state_id, snapshot.branch, snapshot.step) == ("cd" * 16, "ab" * 16, "main", 7)
    assert (snapshot.raw_bytes, snapshot.new_bytes, snapshot.stored_bytes, snapshot.leaf_count) == (1000, 900, 800, 5)
    assert (snapshot.metrics, snapshot.metadata, snapshot.message) == ({"loss": 1.5}, {"lr": 1e-4}, "half way")
    with pytest.raises(dataclasses.FrozenInstanceError):
        snapshot.step = 8  # type: ignore[misc]  # that it is refused is the point
    assert snapshot == make_snapshot(SnapshotId("cd" * 16), RECORD, lambda _: ())
    assert pickle.loads(pickle.dumps(snapshot)) == snapshot
    assert "leaves_of" not in repr(snapshot)


def test_the_time_is_utc_and_exact_to_the_microsecond() -> None:
    for time_ns, expected in (
        (NOW_NS, datetime(2023, 11, 14, 22, 13, 20, 123456, UTC)),
        (0, datetime(1970, 1, 1, tzinfo=UTC)),
        (2**63 - 1, datetime(2262, 4, 11, 23, 47, 16, 854775, UTC)),
    ):
        found = make_snapshot(SnapshotId("cd" * 16), replace(RECORD, time_ns=time_ns), leaves_of).created_at
        assert found.tzinfo is UTC
        assert abs((found - expected).total_seconds()) < 5e-6


def test_leaves_are_read_when_they_are_asked_for() -> None:
    asked: list[SnapshotId] = []

    def read(snapshot_id: SnapshotId) -> tuple[Leaf, ...]:
        asked.append(snapshot_id)
        return LEAVES

    snapshot = make_snapshot(SnapshotId("cd" * 16), RECORD, read)
    assert asked == []
    assert snapshot.leaves == LEAVES
    assert asked == ["cd" * 16]
