"""LMDB's data file is read as it is, and anything else is damage."""

from __future__ import annotations

import os
import random
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import lmdb
import pytest

from castore.errors import DamageError
from castore.index.lmdb_file import Meta, changed_pages, read_free_lists, read_meta

PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with free pages in inline values, in overflow runs, and under a branch page."""
    path = tmp_path_factory.mktemp("lmdb") / "data"
    rng = random.Random(1)
    keys = [rng.randbytes(16) for _ in range(4000)]
    with lmdb.open(str(path), subdir=False, map_size=1 << 26, sync=False) as environment:
        with environment.begin(write=True) as transaction:
            for key in keys:
                transaction.put(key, bytes(400))
        with environment.begin():  # a reader that stays keeps freed pages from being used again
            for _ in range(300):
                with environment.begin(write=True) as transaction:
                    for key in rng.sample(keys, 3):
                        transaction.put(key, rng.randbytes(400))
            with environment.begin(write=True) as transaction:
                for key in keys[:3000]:
                    transaction.delete(key)
    return path


@pytest.fixture
def fd(path: Path, tmp_path: Path) -> Iterator[int]:
    shutil.copy(path, tmp_path / "copy")
    opened = os.open(tmp_path / "copy", os.O_RDWR)
    yield opened
    os.close(opened)


def test_meta_says_what_lmdb_says(path: Path, fd: int) -> None:
    meta = read_meta(fd)
    with lmdb.open(str(path), subdir=False, readonly=True, lock=False) as environment:
        info, stat = environment.info(), environment.stat()
    assert (meta.transaction, meta.page_count) == (info["last_txnid"], info["last_pgno"] + 1)
    assert meta.page_bytes == stat["psize"]
    assert meta.used_bytes <= os.fstat(fd).st_size


def test_free_and_used_pages_make_up_the_file(path: Path, fd: int) -> None:
    meta = read_meta(fd)
    _, free = changed_pages({}, read_free_lists(fd, meta))
    with lmdb.open(str(path), subdir=False, readonly=True, lock=False) as environment:
        stat = environment.stat()
    used_by_data = stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]
    used_by_free_lists = meta.page_count - 2 - len(free) - used_by_data
    assert 3 < used_by_free_lists < 50
    assert len(free) > 500
    assert min(free) >= 2
    assert max(free) < meta.page_count


def test_changed_pages_are_those_of_changed_lists() -> None:
    def numbers(*pages: int) -> bytes:
        return struct.pack(f"={len(pages)}Q", *pages)

    before = {b"1": numbers(9, 8), b"2": numbers(5, 4), b"3": numbers(3)}
    after = {b"1": numbers(9), b"2": numbers(5, 4), b"4": numbers(8, 7)}
    assert changed_pages(before, after) == ({3}, {7})
    assert changed_pages({}, after) == (set(), {9, 5, 4, 8, 7})
    assert changed_pages(before, before) == (set(), set())


@pytest.mark.parametrize("length", [0, 1, 16, 151, PAGE, PAGE + 100])
def test_a_file_without_both_metas_is_damage(fd: int, length: int) -> None:
    os.ftruncate(fd, length)
    with pytest.raises(DamageError):
        read_meta(fd)


def test_no_mutation_of_metas_or_free_lists_raises_anything_else(fd: int) -> None:
    rng = random.Random(5)
    meta = read_meta(fd)
    newer = PAGE * (meta.transaction % 2)
    sound = os.pread(fd, os.fstat(fd).st_size, 0)
    pages = [0, newer // PAGE, meta.free_root, *(rng.randrange(meta.page_count) for _ in range(30))]
    outcomes = set()
    for _ in range(1000):
        at = PAGE * rng.choice(pages[:3] * 10 + pages) + rng.randrange(rng.choice([24, 160, PAGE]))
        mutated = rng.choice([rng.randbytes(1), rng.randbytes(2), b"\xff" * 8, bytes(8)])
        os.pwrite(fd, mutated, at)
        try:
            found = read_meta(fd)
            if found.used_bytes <= len(sound):  # what every caller checks first
                read_free_lists(fd, found)
            outcomes.add("read")
        except DamageError:
            outcomes.add("damage")
        os.pwrite(fd, sound[at : at + len(mutated)], at)
    assert outcomes == {"read", "damage"}
    assert read_meta(fd) == meta


def test_free_lists_in_a_circle_end(fd: int) -> None:
    meta = read_meta(fd)
    page = meta.page_count - 1
    header = struct.pack("=QHHHH", page, 0, 1, 18, PAGE - 8) + struct.pack("=H", PAGE - 8)
    node = struct.pack("=HHHH", page & 0xFFFF, page >> 16, 0, 0)
    os.pwrite(fd, header.ljust(PAGE - 8, b"\0") + node, page * PAGE)
    with pytest.raises(DamageError, match="no tree"):
        read_free_lists(fd, Meta(meta.transaction, meta.page_bytes, meta.page_count, page))
