"""Lost stretches come back bit for bit up to the limit; beyond it there is an error, never wrong bytes."""

from __future__ import annotations

import random

import pytest

from castore.backend import MemoryBackend
from castore.backend.base import RangeReader
from castore.errors import ChecksumError, DamageError, FormatError, ParityExceededError
from castore.format.layout import parity_name
from castore.format.parity import HEADER_BYTES, ParityLayout
from castore.ids import PackId
from castore.parity.build import CELL_BYTES, build_parity, plan_parity
from castore.parity.restore import ParityFile, RestoredPack, find_losses, open_parity, restore_pack

pytest.importorskip("pyeclib")

PACK = PackId("ab" * 16)
NAME = parity_name(PACK)


def reader_of(data: bytes | None) -> RangeReader | None:
    if data is None:
        return None
    backend = MemoryBackend()
    backend.put_if_absent("x", data)
    return backend.open_reader("x")


def built(pack: bytes, layout: ParityLayout) -> bytes:
    backend = MemoryBackend()
    sink = backend.create_stream(NAME)
    reader = reader_of(pack)
    assert reader is not None
    build_parity(reader, sink, layout, PACK, progress=lambda _: None)
    sink.commit()
    return backend.read(NAME, max_bytes=1 << 30)


def opened(parity: bytes) -> ParityFile:
    reader = reader_of(parity)
    assert reader is not None
    return open_parity(reader, PACK, where=NAME)


def restored(pack: bytes | None, parity: bytes) -> RestoredPack:
    left, file = reader_of(pack), opened(parity)
    return restore_pack(left, file, find_losses(left, file), where=NAME)


def all_of(pack: RestoredPack) -> bytes:
    return pack.read(0, pack.size_bytes)


LAYOUTS = {
    "one byte": (1, 10),
    "less than a stretch": (4095, 10),
    "two stretches": (4097, 10),
    "many": (123_457, 25),
    "a hundred": (700_001, 10),
    "twice the pack": (60_000, 100),
}


@pytest.fixture(params=LAYOUTS, ids=str)
def case(request: pytest.FixtureRequest) -> tuple[bytes, bytes, ParityLayout]:
    """(pack, parity file, layout)"""
    size, overhead = LAYOUTS[request.param]
    pack = random.Random(size).randbytes(size)
    layout = plan_parity(size, overhead_percent=overhead)
    return pack, built(pack, layout), layout


def spoiled(data: bytes, at: int, length: int, how: str, chance: random.Random) -> bytes:
    end = min(len(data), at + length)
    if how == "zeros":
        return data[:at] + bytes(end - at) + data[end:]
    if how == "noise":
        return data[:at] + chance.randbytes(end - at) + data[end:]
    return data[:at]  # cut


def test_the_file_is_as_long_as_its_layout_says_and_a_whole_pack_loses_nothing(case) -> None:
    pack, parity, layout = case
    assert len(parity) == layout.file_bytes
    losses = find_losses(reader_of(pack), opened(parity))
    assert (losses.cells, losses.worst_count) == (frozenset(), 0)
    assert all_of(restored(pack, parity)) == pack


@pytest.mark.parametrize("how", ["zeros", "noise"])
def test_random_stretches_up_to_the_limit_come_back_bit_for_bit(case, how: str) -> None:
    pack, parity, layout = case
    chance = random.Random(3)
    for _ in range(10):
        damaged_pack, damaged_parity = pack, parity
        for stretch in chance.sample(range(layout.stretch_count), chance.randint(1, layout.parity_count)):
            if stretch < layout.data_count:
                at = stretch * layout.stretch_bytes
                damaged_pack = spoiled(damaged_pack, at, layout.stretch_bytes, how, chance)
            else:
                at = layout.parity_offset(stretch - layout.data_count, 0)
                damaged_parity = spoiled(damaged_parity, at, layout.stretch_bytes, how, chance)
        assert all_of(restored(damaged_pack, damaged_parity)) == pack


def test_one_piece_as_long_as_the_parity_less_one_stretch_may_lie_anywhere(case) -> None:
    pack, parity, layout = case
    chance = random.Random(4)
    length = (layout.parity_count - 1) * layout.stretch_bytes + 1
    for _ in range(10):
        at = chance.randrange(len(pack))
        assert all_of(restored(spoiled(pack, at, length, "noise", chance), parity)) == pack


def test_a_pack_that_was_cut_or_grew_comes_back(case) -> None:
    pack, parity, layout = case
    kept = max(0, len(pack) - layout.parity_count * layout.stretch_bytes + layout.stretch_bytes)
    assert (
        all_of(restored(pack[: max(kept, layout.stretch_bytes * (layout.data_count - layout.parity_count))], parity))
        == pack
    )
    assert all_of(restored(pack + b"more", parity)) == pack


def test_a_pack_that_is_gone_comes_back_only_from_as_much_parity(case) -> None:
    pack, parity, layout = case
    if layout.parity_count >= layout.data_count:
        assert all_of(restored(None, parity)) == pack
    else:
        with pytest.raises(ParityExceededError):
            restored(None, parity)


def test_beyond_the_limit_there_is_a_typed_error(case) -> None:
    pack, parity, layout = case
    chance = random.Random(5)
    damaged_pack, damaged_parity = pack, parity
    for stretch in chance.sample(range(layout.stretch_count), layout.parity_count + 1):
        if stretch < layout.data_count:
            at = stretch * layout.stretch_bytes
            flipped = bytearray(damaged_pack)
            flipped[at] ^= 1
            damaged_pack = bytes(flipped)
        else:
            flipped = bytearray(damaged_parity)
            flipped[layout.parity_offset(stretch - layout.data_count, 0)] ^= 1
            damaged_parity = bytes(flipped)
    with pytest.raises(ParityExceededError, match=f"restores {layout.parity_count}"):
        restored(damaged_pack, damaged_parity)


def test_scattered_flips_may_hit_more_stretches_than_the_parity_has_when_no_column_has_too_many() -> None:
    size = 100 * 4 * CELL_BYTES
    pack = random.Random(0).randbytes(size)
    layout = plan_parity(size, overhead_percent=1)
    assert (layout.parity_count, layout.column_count) == (1, 4)
    parity = built(pack, layout)
    flipped = bytearray(pack)
    for stretch, column in ((3, 0), (17, 1), (50, 2), (99, 3)):
        flipped[stretch * layout.stretch_bytes + column * layout.cell_bytes + 5] ^= 0x40
    assert all_of(restored(bytes(flipped), parity)) == pack
    flipped[60 * layout.stretch_bytes] ^= 1
    with pytest.raises(ParityExceededError):
        restored(bytes(flipped), parity)


def test_slabs_of_a_large_pack_are_read_back_where_they_were_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("castore.format.parity.SLAB_COLUMNS", 2)
    monkeypatch.setattr("castore.parity.build.SLAB_COLUMNS", 2)
    pack = random.Random(1).randbytes(50_000)
    layout = ParityLayout(len(pack), 10, 3, 5056, 1024)
    assert layout.column_count == 5
    parity = built(pack, layout)
    chance = random.Random(2)
    offsets = sorted(layout.parity_offset(row, column) for row in range(3) for column in range(5))
    assert len(set(offsets)) == 15
    for stretches in ((0, 4, 9), (1, 2, 12), (10, 11, 3)):
        damaged = pack
        for stretch in stretches:
            if stretch < 10:
                damaged = spoiled(damaged, stretch * 5056, 5056, "zeros", chance)
        assert all_of(restored(damaged, parity)) == pack


@pytest.mark.parametrize("where", ["head", "tail"])
def test_header_and_table_are_read_from_whichever_end_is_whole(case, where: str) -> None:
    pack, parity, layout = case
    length = HEADER_BYTES + layout.table_bytes
    damaged = bytearray(parity)
    if where == "head":
        damaged[:length] = bytes(length)
    else:
        damaged[-length:] = bytes(length)
    assert all_of(restored(pack[:-1] + b"\0", bytes(damaged))) == pack
    damaged[:HEADER_BYTES] = damaged[-HEADER_BYTES:] = bytes(HEADER_BYTES)
    with pytest.raises(FormatError):
        opened(bytes(damaged))


def test_every_flipped_bit_of_a_parity_file_is_noticed_or_harmless(case) -> None:
    pack, parity, layout = case
    chance = random.Random(9)
    damaged_pack = bytes(len(pack[: layout.stretch_bytes])) + pack[layout.stretch_bytes :]
    for _ in range(30):
        flipped = bytearray(parity)
        flipped[chance.randrange(len(parity))] ^= 1 << chance.randrange(8)
        try:
            assert all_of(restored(damaged_pack, bytes(flipped))) == pack
        except DamageError:
            assert layout.parity_count == 1  # the only parity cell of that column


def test_cut_and_foreign_files_are_typed_errors(case) -> None:
    _, parity, _ = case
    for cut in (0, 1, HEADER_BYTES - 1):
        with pytest.raises(FormatError):
            opened(parity[:cut])
    reader = reader_of(parity)
    assert reader is not None
    with pytest.raises(ChecksumError, match="swapped"):
        open_parity(reader, PackId("cd" * 16), where=NAME)


def test_reading_a_restored_pack_in_ranges_crosses_cells_and_stops_at_its_end() -> None:
    pack = random.Random(6).randbytes(30_000)
    layout = plan_parity(len(pack), overhead_percent=20)
    found = restored(bytes(4096) + pack[4096:], built(pack, layout))
    for start, length in ((0, 30_000), (4090, 20), (1, 0), (29_999, 1), (100, 9000)):
        assert found.read(start, length) == pack[start : start + length]
    with pytest.raises(FormatError):
        found.read(29_999, 2)
    with pytest.raises(FormatError):
        found.read_into(29_999, memoryview(bytearray(2)))
