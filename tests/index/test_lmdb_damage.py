"""A damaged, cut, foreign or missing cache never kills, hangs or lies: it is empty, and works once it is filled.

Everything runs in forked children: a signal in one of them is what these tests are about.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from castore.index.lmdb_file import changed_pages, read_free_lists, read_meta
from castore.index.lmdb_index import open_lmdb_index
from tests.suites.forked import in_child
from tests.suites.index_suite import agrees, pack, table

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # 3.12: our children are tame

REPOSITORY_ID = bytes(range(16))
DATA, GUARD, LOCK, LMDB_LOCK = "index.lmdb", "index.guard", "index.lock", "index.lmdb-lock"
TABLES = {pack(number): table(range(80 * number, 80 * number + 85)) for number in range(8)}
NUMBERS = range(660)
PAGE = 4096

Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with a tree of two levels, several locations for some chunks, and free pages."""
    directory = tmp_path_factory.mktemp("pristine")

    def fill() -> None:
        index = open_lmdb_index(directory, repository_id=REPOSITORY_ID, id_bytes=16)
        for pack_id, rows in TABLES.items():
            index.add({pack_id: rows, pack(1000): table(range(200))})
        index.forget([pack(1000)])
        index.close()

    in_child(fill)
    fd = os.open(directory / DATA, os.O_RDONLY)
    meta = read_meta(fd)
    assert 10 < len(changed_pages({}, read_free_lists(fd, meta))[1]) < meta.page_count - 15
    os.close(fd)
    return directory


def survives(pristine: Path, directory: Path, damages: list[Damage], *, emptied: bool | None) -> None:
    """After each damage the index opens, is whole or empty, and is right once what it lacks was added."""

    def run() -> None:
        for at, damage in enumerate(damages):
            copy = directory / str(at)
            shutil.copytree(pristine, copy)
            damage(copy)
            index = open_lmdb_index(copy, repository_id=REPOSITORY_ID, id_bytes=16)
            known = index.packs()
            assert known in (frozenset(), TABLES.keys())
            if emptied is not None:
                assert (not known) == emptied, f"damage {at}"
            index.add(TABLES)
            agrees(index, TABLES, NUMBERS)
            index.forget([pack(3)])
            index.close()
            again = open_lmdb_index(copy, repository_id=REPOSITORY_ID, id_bytes=16)
            agrees(again, {id_: rows for id_, rows in TABLES.items() if id_ != pack(3)}, NUMBERS)
            again.close()
            shutil.rmtree(copy)

    in_child(run)


def cut(name: str, length: int) -> Damage:
    return lambda directory: os.truncate(directory / name, length)


def overwrite(name: str, offset: int, data: bytes) -> Damage:
    def damage(directory: Path) -> None:
        with (directory / name).open("r+b") as file:
            file.seek(offset)
            file.write(data)

    return damage


def flip(name: str, bit: int) -> Damage:
    def damage(directory: Path) -> None:
        with (directory / name).open("r+b") as file:
            file.seek(bit // 8)
            byte = file.read(1)[0]
            file.seek(bit // 8)
            file.write(bytes([byte ^ 1 << bit % 8]))

    return damage


def replace(name: str, data: bytes) -> Damage:
    return lambda directory: (directory / name).write_bytes(data) and None


def remove(name: str) -> Damage:
    return lambda directory: (directory / name).unlink()


def put_in_place(name: str, make: Callable[[Path], object]) -> Damage:
    def damage(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        make(directory / name)

    return damage


def test_a_pristine_copy_is_not_rebuilt(pristine: Path, tmp_path: Path) -> None:
    survives(pristine, tmp_path, [lambda _: None], emptied=False)


def test_a_cut_file(pristine: Path, tmp_path: Path) -> None:
    size = (pristine / DATA).stat().st_size
    edges = [PAGE, 2 * PAGE, 3 * PAGE, size // 2 // PAGE * PAGE, size - PAGE, size]
    lengths = {0, 1, 15, 16, 100, 151, 152, *(edge + step for edge in edges for step in (-1, 0, 1))} - {size, size + 1}
    survives(pristine, tmp_path, [cut(DATA, length) for length in sorted(lengths)], emptied=True)


def test_a_file_with_a_tail_is_as_good(pristine: Path, tmp_path: Path) -> None:
    size = (pristine / DATA).stat().st_size
    survives(pristine, tmp_path, [cut(DATA, size + extra) for extra in (1, PAGE, 1 << 20)], emptied=False)


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bits_in_used_pages(pristine: Path, tmp_path: Path, seed: int) -> None:
    """Fifty of each seed; in a free page a flipped bit changes nothing."""
    rng = random.Random(seed)
    fd = os.open(pristine / DATA, os.O_RDONLY)
    meta = read_meta(fd)
    used = sorted(set(range(meta.page_count)) - changed_pages({}, read_free_lists(fd, meta))[1])
    os.close(fd)
    bits = [8 * PAGE * rng.choice(used) + rng.randrange(8 * PAGE) for _ in range(30)]
    bits += [8 * PAGE * rng.choice(used) + rng.randrange(8 * 16) for _ in range(12)]  # page headers
    bits += [8 * PAGE * rng.randrange(2) + 8 * 16 + rng.randrange(8 * 136) for _ in range(8)]  # metas
    survives(pristine, tmp_path, [flip(DATA, bit) for bit in bits], emptied=True)


def test_garbage_in_free_pages_is_as_good(pristine: Path, tmp_path: Path) -> None:
    fd = os.open(pristine / DATA, os.O_RDONLY)
    free = sorted(changed_pages({}, read_free_lists(fd, read_meta(fd)))[1])
    os.close(fd)

    def scribble(directory: Path) -> None:
        for page in free:
            overwrite(DATA, page * PAGE, b"\xaa" * PAGE)(directory)

    survives(pristine, tmp_path, [scribble], emptied=False)


def test_zeros(pristine: Path, tmp_path: Path) -> None:
    size = (pristine / DATA).stat().st_size
    damages = [overwrite(DATA, 0, bytes(size))]
    damages += [overwrite(DATA, page * PAGE, bytes(PAGE)) for page in (0, 1)]
    damages += [overwrite(DATA, 0, bytes(2 * PAGE)), overwrite(DATA, 2 * PAGE, bytes(size - 2 * PAGE))]
    survives(pristine, tmp_path, damages, emptied=True)


def test_foreign_files(pristine: Path, tmp_path: Path) -> None:
    rng = random.Random(1)
    size = (pristine / DATA).stat().st_size
    contents = [b"", b"hello\n", rng.randbytes(PAGE), rng.randbytes(size), b"SQLite format 3\0".ljust(8192, b"\1")]
    survives(pristine, tmp_path, [replace(DATA, content) for content in contents if content], emptied=True)


def test_another_lmdb_file(pristine: Path, tmp_path: Path) -> None:
    lmdb = pytest.importorskip("lmdb")

    def foreign(directory: Path) -> None:
        remove(DATA)(directory)
        with lmdb.open(str(directory / DATA), subdir=False) as environment, environment.begin(write=True) as txn:
            txn.put(b"a", b"b")

    survives(pristine, tmp_path, [foreign, lambda at: (foreign(at), remove(LMDB_LOCK)(at))[1]], emptied=True)


def test_metas_that_contradict_the_file(pristine: Path, tmp_path: Path) -> None:
    """Each is well-formed, and would send LMDB to places that do not exist."""
    many = (1 << 50).to_bytes(8, "little")
    damages = [
        overwrite(DATA, page * PAGE + 16 + field, value)
        for page in (0, 1)
        for field, value in [
            (0, b"\0" * 4),  # magic
            (4, (3).to_bytes(4, "little")),  # data version
            (16, many),  # map bytes
            (24, (8192).to_bytes(4, "little")),  # page size
            (24, (3).to_bytes(4, "little")),
            (24, (1 << 31).to_bytes(4, "little")),
            (64, many),  # root of the free pages
            (112, many),  # root of the main database
            (120, many),  # last page
            (120, bytes(8)),
            (128, many),  # transaction
        ]
    ]
    survives(pristine, tmp_path, damages, emptied=True)


def test_a_guard_that_is_garbage(pristine: Path, tmp_path: Path) -> None:
    rng = random.Random(2)
    size = (pristine / GUARD).stat().st_size
    damages = [remove(GUARD), replace(GUARD, b"x"), replace(GUARD, rng.randbytes(size))]
    damages += [overwrite(GUARD, 0, bytes(size)), overwrite(GUARD, size, b"more")]
    damages += [cut(GUARD, length) for length in (0, 63, 64, 72, size - 8, size - 1)]
    damages += [flip(GUARD, rng.randrange(8 * size)) for _ in range(15)]
    damages += [flip(GUARD, rng.randrange(8 * 64)) for _ in range(10)]
    survives(pristine, tmp_path, damages, emptied=True)


def test_a_guard_of_another_version_of_castore(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("castore.index.lmdb_guard.GUARD_VERSION", 7)
    survives(pristine, tmp_path, [lambda _: None], emptied=True)


def test_an_older_file_under_a_newer_guard(pristine: Path, tmp_path: Path) -> None:
    def restore_after_a_save(directory: Path) -> None:
        shutil.copy(directory / DATA, directory / "old")
        index = open_lmdb_index(directory, repository_id=REPOSITORY_ID, id_bytes=16)
        index.add({pack(5000): []})
        index.close()
        (directory / "old").replace(directory / DATA)

    survives(pristine, tmp_path, [restore_after_a_save], emptied=True)


def test_lock_files_that_are_garbage(pristine: Path, tmp_path: Path) -> None:
    """LMDB's lock file is begun anew when nobody has it open; ours is only a name."""
    rng = random.Random(4)
    size = (pristine / LMDB_LOCK).stat().st_size
    damages = [remove(LMDB_LOCK), remove(LOCK), replace(LOCK, b"anything")]
    damages += [replace(LMDB_LOCK, rng.randbytes(size)), overwrite(LMDB_LOCK, 0, b"\xff" * size)]
    damages += [cut(LMDB_LOCK, length) for length in (0, 1 << 20)]
    survives(pristine, tmp_path, damages, emptied=False)
    survives(pristine, tmp_path, [cut(LMDB_LOCK, length) for length in (1, 100, size - 1)], emptied=True)


@pytest.mark.parametrize("name", [DATA, GUARD, LMDB_LOCK, LOCK])
def test_something_else_in_the_place_of_a_file(pristine: Path, tmp_path: Path, name: str) -> None:
    def full_directory(path: Path) -> None:
        path.mkdir()
        (path / "precious").write_bytes(b"data")

    def bind(path: Path) -> None:
        os.chdir(path.parent)  # the length of a socket's name is limited
        with socket.socket(socket.AF_UNIX) as endpoint:
            endpoint.bind(path.name)

    makers = [Path.mkdir, full_directory, os.mkfifo]
    makers += [lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path.parent / "nowhere")]
    makers += [lambda path: path.symlink_to(path)]
    makers.append(bind)
    emptied = None if name == LOCK else True
    survives(pristine, tmp_path, [put_in_place(name, make) for make in makers], emptied=emptied)


def test_a_directory_in_the_way_is_moved_and_not_deleted(pristine: Path, tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    (directory / DATA).mkdir(parents=True)
    (directory / DATA / "precious").write_bytes(b"data")
    in_child(lambda: open_lmdb_index(directory, repository_id=REPOSITORY_ID, id_bytes=16).close())
    (moved,) = directory.glob("*.foreign")
    assert (moved / "precious").read_bytes() == b"data"
    assert (directory / DATA).is_file()
