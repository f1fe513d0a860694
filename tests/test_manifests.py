"""Manifests are read part by part, and make the leaf table."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch

from castore.backend import MemoryBackend
from castore.codec.base import PLAIN
from castore.errors import (
    ChunkMissingError,
    FormatError,
)
from castore.format.identity import entry_digest
from castore.format.manifest import Entry, Kind, encode_id_list, encode_part
from castore.format.pack import RecordKind
from castore.format.snapshot import SnapshotRecord
from castore.ids import ChunkId
from castore.index import MemoryIndex
from castore.manifests import ManifestReader, check_paths, elements_of, leaf_table, split_ids
from castore.options import GRID_BYTES, PART_CHUNKS_MAX
from castore.snapshots import Leaf
from castore.store import ChunkStore
from castore.tensors.dtypes import numpy_element, torch_element
from tests.checkpoint.test_bases import entry
from tests.suites.packs import HASHER, write_pack
from tests.suites.records import RECORD


class CountingStore:
    """A store of chunks in a dict that counts what is read."""

    def __init__(self, *chunks: bytes) -> None:
        self.chunks = {HASHER.chunk_id(raw): raw for raw in chunks}
        self.reads: Counter[ChunkId] = Counter()
        self.hasher = HASHER

    def get(self, chunk_id: ChunkId) -> bytearray:
        self.reads[chunk_id] += 1
        return bytearray(self.chunks[chunk_id])


def reader_of(*chunks: bytes) -> tuple[ManifestReader, CountingStore]:
    store = CountingStore(*chunks)
    return ManifestReader(cast("ChunkStore", store)), store


def record_of(*parts: bytes) -> SnapshotRecord:
    return replace(RECORD, part_ids=tuple(HASHER.chunk_id(part) for part in parts))


ROOT = Entry("", Kind.DICT, shape=(2,))
LR = Entry("lr", Kind.FLOAT, raw_bytes=8, inline=bytes(8))
STEP = Entry("step", Kind.INT, raw_bytes=1, inline=b"\1")


def test_a_manifest_is_its_parts_in_order() -> None:
    parts = [encode_part([ROOT, LR]), encode_part([STEP])]
    manifests, _ = reader_of(*parts)
    assert manifests.entries(record_of(*parts)) == [ROOT, LR, STEP]
    assert manifests.entries(record_of()) == []


def test_a_part_that_snapshots_share_is_read_once() -> None:
    shared, old, new = encode_part([ROOT, LR]), encode_part([STEP]), encode_part([replace(STEP, inline=b"\2")])
    manifests, store = reader_of(shared, old, new)
    manifests.entries(record_of(shared, old))
    assert manifests.entries(record_of(shared, new))[2].inline == b"\2"
    assert set(store.reads.values()) == {1}
    assert len(store.reads) == 3


def test_few_parts_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("castore.manifests._CACHED_PARTS_MAX", 2)
    parts = [encode_part([replace(STEP, path=f"step{index}")]) for index in range(4)]
    manifests, store = reader_of(*parts)
    manifests.entries(record_of(*parts))
    manifests.entries(record_of(*parts[2:]))
    assert max(store.reads.values()) == 1, "the newest are kept"
    manifests.entries(record_of(parts[0]))
    assert store.reads[HASHER.chunk_id(parts[0])] == 2, "the oldest are not"


def long_leaf(counts: list[int], *, raw_chunks: int) -> tuple[bytes, list[bytes]]:
    """A part with one leaf of so many chunks, and id lists of the given lengths."""
    lists = [encode_id_list(bytes([number]) * 16 * count) for number, count in enumerate(counts, start=1)]
    packed = b"".join(HASHER.chunk_id(one) for one in lists)
    entry = Entry("big", Kind.TENSOR, "uint8", raw_bytes=raw_chunks * GRID_BYTES, id_lists=packed)
    return encode_part([entry]), lists


def test_id_lists_are_resolved() -> None:
    part, lists = long_leaf([PART_CHUNKS_MAX, 3], raw_chunks=PART_CHUNKS_MAX + 3)
    manifests, _ = reader_of(part, *lists)
    (entry,) = manifests.entries(record_of(part))
    assert entry.chunks == b"".join(lists)
    assert len(entry.chunk_ids(16)) == PART_CHUNKS_MAX + 3


@pytest.mark.parametrize("counts", [[PART_CHUNKS_MAX, 2], [PART_CHUNKS_MAX, 4], [PART_CHUNKS_MAX - 1, 4]])
def test_id_lists_of_another_length_are_a_format_error(counts: list[int]) -> None:
    part, lists = long_leaf(counts, raw_chunks=PART_CHUNKS_MAX + 3)
    manifests, _ = reader_of(part, *lists)
    with pytest.raises(FormatError, match=r"manifest part \w+: expected \d+ chunk ids"):
        manifests.entries(record_of(part))


def test_a_manifest_is_read_from_packs() -> None:
    backend = MemoryBackend()
    part = encode_part([ROOT, LR, STEP])
    write_pack(backend, [part], kind=RecordKind.PART, compression="auto")
    manifests = ManifestReader(ChunkStore(backend, MemoryIndex(), HASHER))
    assert manifests.entries(record_of(part)) == [ROOT, LR, STEP]
    with pytest.raises(ChunkMissingError):
        manifests.entries(RECORD)


def test_a_chunk_that_is_no_part_is_a_format_error() -> None:
    manifests, _ = reader_of(b"something else")
    with pytest.raises(FormatError, match="manifest part"):
        manifests.entries(record_of(b"something else"))


# ---- tables ------------------------------------------------------------------------------------------------


def test_the_leaf_table_has_the_leaves_and_neither_containers_nor_hidden_storages() -> None:
    weight = Entry("w", Kind.TENSOR, "float32", (512, 1024), raw_bytes=2 * GRID_BYTES, chunks=bytes(32))
    alias = Entry("tied", Kind.ALIAS, attrs={"target": "w"})
    view = Entry("v", Kind.VIEW, "float32", (2,), {"storage": "~storage/0"}, raw_bytes=8, digest=b"d" * 16)
    storage = Entry("~storage/0", Kind.STORAGE, raw_bytes=300, chunks=bytes(16))
    table = leaf_table([ROOT, LR, weight, alias, view, storage], HASHER)
    assert table == (
        Leaf("lr", "float", "", (), 8, 0, entry_digest(HASHER, LR).hex()),
        Leaf("w", "tensor", "float32", (512, 1024), 2 * GRID_BYTES, 2, entry_digest(HASHER, weight).hex()),
        Leaf("tied", "alias", "", (), 0, 0, ""),
        Leaf("v", "view", "float32", (2,), 8, 0, "64" * 16),
    )


def test_equal_bytes_have_equal_digests_in_the_table() -> None:
    same = replace(LR, path="other")
    first, second = leaf_table([LR, same], HASHER)
    assert first.digest == second.digest
    (other,) = leaf_table([replace(LR, inline=b"12345678")], HASHER)
    assert other.digest != first.digest


def test_a_path_stands_once_in_a_manifest() -> None:
    check_paths([ROOT, LR, STEP], where="x")
    with pytest.raises(FormatError, match="x: path 'lr' appears twice"):
        check_paths([ROOT, LR, STEP, LR], where="x")


def test_packed_ids_are_taken_apart() -> None:
    assert split_ids(b"a" * 16 + b"b" * 16, 16) == [b"a" * 16, b"b" * 16]
    assert split_ids(b"", 32) == []


def dtypes() -> list[Any]:
    names = "float64 float32 float16 bfloat16 float8_e4m3fn complex128 complex64 complex32 int64 uint16 int8 bool"
    codes = "<f8 >f4 <f2 <c8 <c32 <f16 <i2 >i8 |u1 |b1 <U12 |S7 <M8[ns] >M8[s] <m8[D] |V3"
    return [*(getattr(torch, name) for name in names.split()), *(np.dtype(code) for code in codes.split())]


@pytest.mark.parametrize("dtype", dtypes(), ids=str)
def test_elements_are_told_by_the_name_of_the_dtype_as_a_save_sees_them(dtype: Any) -> None:
    element = numpy_element(dtype, "leaf") if isinstance(dtype, np.dtype) else torch_element(dtype)
    found = elements_of(entry("leaf", "A", dtype=element.name))
    assert (found.item_bytes, found.is_float) == (element.plane_bytes, element.is_float)


@pytest.mark.parametrize("name", ["", "quint8", "x", "<", "float"])
def test_of_names_that_say_nothing_bytes_are_bytes(name: str) -> None:
    assert elements_of(entry("leaf", "A", dtype=name)) == PLAIN
