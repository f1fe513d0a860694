"""The guard vouches for every used page of one transaction, and its own bytes for themselves."""

from __future__ import annotations

import os
import random
import struct
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest

from castore.errors import DamageError
from castore.index.lmdb_file import META_PAGES, Meta
from castore.index.lmdb_guard import Guard, decode_guard, read_guard, write_guard

REPOSITORY_ID = bytes(range(16))
PAGE = 4096


def lists(*pages: int) -> dict[bytes, bytes]:
    return {b"1": struct.pack(f"={len(pages)}Q", *pages)}


def meta_of(transaction: int, page_count: int) -> Meta:
    return Meta(transaction, PAGE, page_count, free_root=0)


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    """A file of 100 pages."""
    opened = os.open(tmp_path / "data", os.O_RDWR | os.O_CREAT)
    os.write(opened, random.Random(1).randbytes(100 * PAGE))
    yield opened
    os.close(opened)


@pytest.fixture
def guard(fd: int) -> Guard:
    """Of transaction 7: pages 10 to 39 are free."""
    guard = Guard(REPOSITORY_ID, 16)
    guard.update(fd, meta_of(7, 100), before={}, after=lists(*range(10, 40)))
    return guard


def scribble(fd: int, page: int) -> None:
    os.pwrite(fd, random.randbytes(PAGE), page * PAGE)


def test_what_was_not_touched_passes(fd: int, guard: Guard) -> None:
    guard.check(fd, meta_of(7, 100))


@pytest.mark.parametrize("page", [0, 1, 2, 9, 40, 99])
def test_a_used_page_that_changed_does_not_pass(fd: int, guard: Guard, page: int) -> None:
    scribble(fd, page)
    with pytest.raises(DamageError, match="has changed"):
        guard.check(fd, meta_of(7, 100))


@pytest.mark.parametrize("page", [10, 25, 39])
def test_a_free_page_may_change(fd: int, guard: Guard, page: int) -> None:
    scribble(fd, page)
    guard.check(fd, meta_of(7, 100))


@pytest.mark.parametrize(
    "meta", [meta_of(8, 100), meta_of(6, 100), meta_of(7, 99), meta_of(7, 101), Meta(7, 8192, 100, 0)]
)
def test_another_transaction_or_size_does_not_pass(fd: int, guard: Guard, meta: Meta) -> None:
    with pytest.raises(DamageError):
        guard.check(fd, meta)


def test_an_update_digests_what_became_used_and_nothing_else(fd: int, guard: Guard) -> None:
    for page in (0, 1, 10, 11, 100, 101):
        scribble(fd, page)
    scribble(fd, 50)  # rot: this transaction cannot have written it
    free = [*range(12, 40), 60, 102]
    os.ftruncate(fd, 103 * PAGE)
    guard.update(fd, meta_of(8, 103), before=lists(*range(10, 40)), after=lists(*free))
    assert {page for page, digest in enumerate(guard.digests) if digest == 0} == set(free)
    with pytest.raises(DamageError, match="has changed"):
        guard.check(fd, meta_of(8, 103))
    digests = array("Q", guard.digests)
    guard.digests[50] = 0
    guard.check(fd, meta_of(8, 103))
    assert all(digests[page] for page in range(META_PAGES))


def test_an_update_that_fails_leaves_no_valid_guard(fd: int, guard: Guard) -> None:
    with pytest.raises(DamageError, match="expected"):
        guard.update(fd, meta_of(8, 500), before={}, after={})
    with pytest.raises(DamageError):
        guard.check(fd, meta_of(8, 500))
    assert guard.transaction == -1


@pytest.mark.parametrize(("meta", "free"), [(meta_of(8, 99), []), (meta_of(8, 100), [100]), (Meta(8, 512, 100, 0), [])])
def test_an_update_refuses_what_cannot_be(fd: int, guard: Guard, meta: Meta, free: list[int]) -> None:
    with pytest.raises(DamageError):
        guard.update(fd, meta, before=lists(*range(10, 40)), after=lists(*free))


def test_a_guard_comes_back_from_its_file(tmp_path: Path, guard: Guard) -> None:
    path = tmp_path / "guard"
    write_guard(path, guard)
    assert read_guard(path, repository_id=REPOSITORY_ID, id_bytes=16) == guard
    guard.digests = guard.digests[:5]
    write_guard(path, guard)
    assert read_guard(path, repository_id=REPOSITORY_ID, id_bytes=16) == guard


def test_another_repository_or_width_is_damage(guard: Guard) -> None:
    data = guard.encode()
    for repository_id, id_bytes in ((bytes(16), 16), (REPOSITORY_ID, 32)):
        with pytest.raises(DamageError, match="repository"):
            decode_guard(data, repository_id=repository_id, id_bytes=id_bytes)


def test_every_flipped_bit_and_every_length_is_damage(guard: Guard) -> None:
    data = guard.encode()
    rng = random.Random(2)
    broken = [data[:length] for length in range(0, len(data), 37)] + [data + b"\0", data + bytes(8)]
    for bit in [*range(8 * 64), *(rng.randrange(8 * len(data)) for _ in range(300))]:
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        broken.append(bytes(flipped))
    for each in broken:
        with pytest.raises(DamageError):
            decode_guard(each, repository_id=REPOSITORY_ID, id_bytes=16)
