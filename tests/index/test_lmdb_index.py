"""The LMDB index keeps the contract, across handles, threads, processes, forks and kills."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from castore.errors import StorageError
from castore.format.pack import Row
from castore.ids import ChunkId
from castore.index import Index, cache_files, lmdb_environment, lmdb_index, open_lmdb_index
from castore.index.lmdb_file import changed_pages, read_free_lists, read_meta
from castore.index.lmdb_guard import Guard, read_guard
from castore.index.lmdb_registry import _environments
from tests.suites.forked import in_child, running_child
from tests.suites.index_suite import IndexSuite, agrees, find_one, pack, row, table

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # 3.12: our children are tame

REPOSITORY_ID = bytes(range(16))


def open_at(directory: Path, *, repository_id: bytes = REPOSITORY_ID) -> lmdb_index.LmdbIndex:
    index = open_lmdb_index(directory, repository_id=repository_id, id_bytes=16)
    assert isinstance(index, lmdb_index.LmdbIndex)
    return index


@pytest.fixture
def index(tmp_path: Path):
    before = set(_environments)
    opened = open_at(tmp_path)
    yield opened
    opened.close()
    assert set(_environments) <= before


class TestLmdbIndex(IndexSuite):
    @pytest.fixture
    def index(self, index: Index) -> Index:
        return index


class TestLmdbIndexThatGrows(IndexSuite):
    """The same with a map that is far too small."""

    @pytest.fixture
    def index(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(lmdb_environment, "MAP_BYTES_FIRST", 1 << 15)
        opened = open_at(tmp_path)
        yield opened
        opened.close()


# ---- bytes ---------------------------------------------------------------------------------------------------


def test_ids_of_32_bytes(tmp_path: Path) -> None:
    index = open_lmdb_index(tmp_path, repository_id=REPOSITORY_ID, id_bytes=32)
    rows = [row(number, base=number % 2 or None, id_bytes=32) for number in range(100)]
    index.add({pack(1): rows})
    assert [hits[0].row for hits in index.find([each.chunk_id for each in rows])] == rows
    index.close()


@pytest.mark.parametrize("id_", [b"", b"short", bytes(17)])
def test_an_id_of_the_wrong_width_is_a_mistake_of_the_caller(index: Index, id_: bytes) -> None:
    index.add({pack(1): table([1])})
    with pytest.raises(ValueError, match="16 bytes"):
        index.find([ChunkId(id_)])
    with pytest.raises(ValueError, match="16 bytes"):
        index.add({pack(2): [Row(ChunkId(id_), 64, 1, 1, 1, (), row(1).kind)]})
    assert index.packs() == {pack(1)}


def test_an_entry_takes_about_a_hundred_bytes(index: Index, tmp_path: Path) -> None:
    for number in range(10):
        index.add({pack(number): table(range(2000 * number, 2000 * number + 2000))})
    guard = read_guard(tmp_path / "index.guard", repository_id=REPOSITORY_ID, id_bytes=16)
    used_pages = sum(digest != 0 for digest in guard.digests)
    assert used_pages * guard.page_bytes / 20_000 < 110


# ---- handles -------------------------------------------------------------------------------------------------


def test_handles_of_one_process_share_the_environment(index: Index, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    other = open_at(tmp_path / "link")
    other.add({pack(1): table([1])})
    assert index.packs() == {pack(1)}
    other.close()
    assert index.packs() == {pack(1)}
    with pytest.raises(ValueError, match="closed"):
        other.packs()


def test_what_was_added_is_there_at_the_next_opening(tmp_path: Path) -> None:
    for number in range(5):
        index = open_at(tmp_path)
        assert index.packs() == {pack(each) for each in range(number)}
        index.add({pack(number): table(range(100 * number, 100 * number + 100))})
        index.close()
    index = open_at(tmp_path)
    agrees(index, {pack(n): table(range(100 * n, 100 * n + 100)) for n in range(5)}, range(500))
    index.close()


def test_one_process_cannot_use_a_directory_for_two_repositories(index: Index, tmp_path: Path) -> None:
    index.add({pack(1): table([1])})
    with pytest.raises(StorageError, match="already uses it"):
        open_at(tmp_path, repository_id=bytes(16))
    assert index.packs() == {pack(1)}


def test_another_repository_begins_empty(tmp_path: Path) -> None:
    index = open_at(tmp_path)
    index.add({pack(1): table([1])})
    index.close()
    other = open_at(tmp_path, repository_id=bytes(16))
    assert other.packs() == frozenset()
    other.close()


def test_a_directory_with_an_odd_name(tmp_path: Path) -> None:
    index = open_at(tmp_path / os.fsdecode(b"caf\xe9 \xff") / "new\nline")
    index.add({pack(1): table([1])})
    assert index.packs() == {pack(1)}
    index.close()


# ---- the cache goes away while it is open ----------------------------------------------------------------------


def test_a_deleted_cache_directory_is_begun_anew(index: Index, tmp_path: Path) -> None:
    index.add({pack(1): table([1])})
    for child in tmp_path.iterdir():
        child.unlink()
    assert index.packs() == frozenset()
    shutil.rmtree(tmp_path)
    index.add({pack(2): table([2])})
    assert index.packs() == {pack(2)}
    assert find_one(index, 1) == ()


@pytest.mark.parametrize("bytes_left", [0, 1, 4096, 5000, 8192, 12288, -4096, -1])
def test_a_file_cut_while_it_is_open_kills_nobody(index: Index, tmp_path: Path, bytes_left: int) -> None:
    index.add({pack(number): table(range(200 * number, 200 * number + 200)) for number in range(5)})
    data = tmp_path / "index.lmdb"

    def cut_and_read() -> tuple[int, int]:
        mine = open_at(tmp_path)
        mine.packs()
        os.truncate(data, bytes_left if bytes_left >= 0 else data.stat().st_size + bytes_left)
        return len(mine.packs()), len(find_one(mine, 7))

    assert in_child(cut_and_read) == (0, 0)
    assert index.packs() == frozenset()
    index.add({pack(1): table([1])})
    assert len(find_one(index, 1)) == 1


def test_a_file_replaced_by_another_process_is_followed(index: Index, tmp_path: Path) -> None:
    index.add({pack(1): table([1])})

    def replace() -> None:
        other = open_at(tmp_path)
        other.clear()
        other.add({pack(2): table([2])})

    for _ in range(3):
        in_child(replace)
        assert index.packs() == {pack(2)}
        index.add({pack(3): table([3])})
        assert index.packs() == {pack(2), pack(3)}


def test_a_replaced_lock_file_is_followed(index: Index, tmp_path: Path) -> None:
    """Two processes with different lock files would each count transactions for themselves."""
    index.add({pack(1): table([1])})

    def remove_and_add() -> None:
        (tmp_path / "index.lmdb-lock").unlink()
        other = open_at(tmp_path)
        other.add({pack(2): table([2])})

    in_child(remove_and_add)
    index.add({pack(3): table([3])})
    assert index.packs() == {pack(1), pack(2), pack(3)}


# ---- several processes -----------------------------------------------------------------------------------------


def test_two_processes_write_a_hundred_transactions_each(index: Index, tmp_path: Path) -> None:
    identity = (tmp_path / "index.lmdb").stat().st_ino

    def write(first: int) -> None:
        mine = open_at(tmp_path)
        for number in range(first, first + 100):
            mine.add({pack(number): table([number, 1000 + number, 5000])})
            assert len(find_one(mine, number)) == 1

    def both(say) -> None:
        write(0)
        say(b"0")

    with running_child(both) as (_, heard):
        in_child(lambda: write(100))
        assert os.read(heard, 1) == b"0"
    agrees(
        index,
        {pack(number): table([number, 1000 + number, 5000]) for number in range(200)},
        [*range(200), *range(1000, 1200), 5000],
    )
    assert (tmp_path / "index.lmdb").stat().st_ino == identity, "nothing was rebuilt on the way"


def test_a_map_grown_by_another_process_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmdb_environment, "MAP_BYTES_FIRST", 1 << 15)
    index = open_at(tmp_path)
    known = {}

    def add_in_child(number: int) -> None:
        in_child(lambda: open_at(tmp_path).add({pack(number): known[pack(number)]}))

    for number in range(6):
        known[pack(number)] = table(range(1000 * number, 1000 * number + 1000))
        add_in_child(number)
        if number % 2:
            known[pack(100 + number)] = table([9000 + number])
            index.add({pack(100 + number): known[pack(100 + number)]})
        agrees(index, known, [*range(0, 6000, 7), *range(9000, 9006)])
    index.close()


# ---- fork ------------------------------------------------------------------------------------------------------


def test_a_forked_child_uses_an_environment_of_its_own(index: Index, tmp_path: Path) -> None:
    index.add({pack(1): table([1])})

    def use() -> list[int]:
        assert len(find_one(index, 1)) == 1
        index.add({pack(2): table([2])})
        seen = [len(index.packs())]
        grandchild = in_child(lambda: (index.add({pack(3): table([3])}), len(index.packs()))[1])
        index.close()
        return [*seen, grandchild]

    assert in_child(use) == [2, 3]
    assert index.packs() == {pack(1), pack(2), pack(3)}
    index.forget([pack(2)])
    assert index.packs() == {pack(1), pack(3)}


def test_a_fork_does_not_cost_the_parent_a_verification(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = []
    index.add({pack(1): table([1])})
    monkeypatch.setattr(Guard, "check", lambda *_: checks.append(1))
    in_child(lambda: None)
    assert index.packs() == {pack(1)}
    assert not checks
    in_child(lambda: open_at(tmp_path).add({pack(2): table([2])}))
    assert index.packs() == {pack(1), pack(2)}
    assert checks == [1], "what another process wrote meanwhile is verified"


def test_a_child_may_outlive_its_parents_handle(index: Index, tmp_path: Path) -> None:
    index.add({pack(1): table([1])})
    with running_child(lambda say: (time.sleep(0.2), say(b"%d" % len(index.packs())))) as (_, heard):
        index.close()
        assert os.read(heard, 10) == b"1"


def test_forking_while_threads_write(index: Index, tmp_path: Path) -> None:
    stop = threading.Event()
    written = 0

    def write() -> None:
        nonlocal written
        while not stop.is_set():
            index.add({pack(written): table([written])})
            written += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for number in range(15):

            def use(number=number) -> bool:
                index.add({pack(10_000 + number): table([10_000 + number])})
                return len(find_one(index, 10_000 + number)) == 1

            assert in_child(use, timeout_s=20)
    finally:
        stop.set()
        writer.join()
    assert index.packs() == {pack(each) for each in (*range(written), *range(10_000, 10_015))}


# ---- processes that die or stop ----------------------------------------------------------------------------------


def test_writers_killed_at_random_moments_block_nobody_and_lose_nothing(index: Index, tmp_path: Path) -> None:
    """This process keeps its environment open, so that LMDB's locks live on and must be recovered."""
    rng = random.Random(3)
    known: set[int] = set()
    rebuild_count = 0
    for turn in range(30):
        first = 1000 * (turn + 1)

        def write(say, first=first) -> None:
            for number in range(first, first + 1000):
                index.add({pack(number): table(range(50 * number, 50 * number + 50))})
                say(number.to_bytes(4, "big"))

        with running_child(write) as (pid, heard):
            said = os.read(heard, 4)
            index.packs()
            time.sleep(rng.uniform(0, 0.04))
            os.kill(pid, signal.SIGKILL)
            while part := os.read(heard, 1 << 12):
                said += part
        reported = {int.from_bytes(said[at : at + 4], "big") for at in range(0, len(said), 4)}
        unreported = max(reported) + 1  # it may have been written before it could be reported
        started = time.monotonic()
        index.add({pack(turn): table(range(50 * turn, 50 * turn + 50))})
        assert time.monotonic() - started < 5
        found = index.packs()
        if found == {pack(turn)}:
            rebuild_count, known = rebuild_count + 1, {turn}
        else:
            known |= reported | {turn}
            known |= {unreported} if pack(unreported) in found else set()
        assert found == {pack(each) for each in known}
    agrees(
        index,
        {pack(each): table(range(50 * each, 50 * each + 50)) for each in known},
        [50 * each + 7 for each in known],
    )
    assert rebuild_count < 25, "the window between a commit and its guard is short, even if nothing else is done"


@contextmanager
def stopped_in_transaction(index: Index):
    """The pid of a child that waits for ever in a write transaction, while this process has the file open."""
    gate, opener = os.pipe()

    def write(say) -> None:
        put = lmdb_index._put_tables

        def put_and_wait(transaction, databases, *, tables) -> None:
            put(transaction, databases, tables=tables)
            say(b"!")
            time.sleep(1000)

        lmdb_index._put_tables = put_and_wait
        os.read(gate, 1)
        index.add({pack(2): table(range(1000))})

    with running_child(write) as (pid, heard):
        index.packs()  # opened again after the fork: LMDB's lock file stays as it is
        os.write(opener, b"!")
        assert os.read(heard, 1) == b"!"
        yield pid
    os.close(gate)
    os.close(opener)


def test_a_writer_killed_inside_a_transaction_leaves_nothing(index: Index) -> None:
    index.add({pack(1): table([1])})
    for number in range(10, 15):
        with stopped_in_transaction(index) as pid:
            os.kill(pid, signal.SIGKILL)
        started = time.monotonic()
        index.add({pack(number): table([number])})
        assert time.monotonic() - started < 5
    assert index.packs() == {pack(1), *(pack(number) for number in range(10, 15))}
    assert [hit.pack_id for hit in find_one(index, 1)] == [pack(1)]


def test_a_stopped_writer_is_not_waited_for_for_ever(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    index.add({pack(1): table([1])})
    monkeypatch.setattr(cache_files, "LOCK_WAIT_S", 0.2)
    with stopped_in_transaction(index):
        assert index.packs() == {pack(1)}, "readers do not wait at all"
        with pytest.raises(StorageError, match="another process has held it"):
            index.add({pack(3): table([3])})
        assert index.packs() == {pack(1)}
    index.add({pack(3): table([3])})
    assert index.packs() == {pack(1), pack(3)}


def test_a_writer_killed_before_its_guard_costs_a_rebuild(index: Index, tmp_path: Path) -> None:
    index.add({pack(1): table([1])})

    def write(say) -> None:
        def wait(path, guard) -> None:
            say(b"!")
            time.sleep(1000)

        lmdb_environment.write_guard = wait
        index.add({pack(2): table([2])})

    with running_child(write) as (pid, heard):
        assert os.read(heard, 1) == b"!"
        os.kill(pid, signal.SIGKILL)
    assert in_child(lambda: len(open_at(tmp_path).packs())) == 0
    index.add({pack(3): table([3])})
    assert index.packs() == {pack(3)}


def test_an_interrupt_between_commit_and_guard_costs_nothing(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = lmdb_environment.Environment._run

    def interrupted(self, body, *, write):
        result = run(self, body, write=write)
        if write:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(lmdb_environment.Environment, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        index.add({pack(1): table([1])})
    monkeypatch.undo()
    assert index.packs() == {pack(1)}
    assert in_child(lambda: len(open_at(tmp_path).packs())) == 1


def test_a_guard_that_could_not_be_written_is_caught_up(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path, guard) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lmdb_environment, "write_guard", full)
    with pytest.raises(StorageError, match="No space"):
        index.add({pack(1): table([1])})
    monkeypatch.undo()
    index.add({pack(2): table([2])})
    assert in_child(lambda: len(open_at(tmp_path).packs())) == 2


def test_readers_that_died_are_cleared_at_open(index: Index, tmp_path: Path) -> None:
    def read(say) -> None:
        open_at(tmp_path)._environment().read(lambda *_: (say(b"!"), time.sleep(1000)))

    def pids_of_readers() -> str:
        opened = index._shared._opened
        assert opened is not None
        return opened.environment.readers()

    with running_child(read) as (pid, heard):
        assert os.read(heard, 1) == b"!"
        index.packs()
    assert str(pid) in pids_of_readers()
    assert index._shared.suspend()
    index._shared.resume()
    index.packs()
    assert str(pid) not in pids_of_readers()


# ---- the guard -------------------------------------------------------------------------------------------------


def test_the_guard_follows_every_page_through_a_random_story(index, tmp_path: Path) -> None:
    """What the guard assumes of LMDB: a transaction writes only to pages that were free, or new, and to metas."""
    rng = random.Random(8)
    known: set[int] = set()
    for _ in range(60):
        if rng.random() < 0.6 or len(known) < 3:
            new = {rng.randrange(300) for _ in range(rng.randrange(1, 4))}
            size = rng.choice([3, 30, 300, 2000])
            index.add({pack(n): table(range(2000 * n, 2000 * n + size)) for n in new})
            known |= new
        else:
            gone = set(rng.sample(sorted(known), rng.randrange(1, len(known) // 2 + 1)))
            index.forget([pack(number) for number in gone])
            known -= gone
        fd = os.open(tmp_path / "index.lmdb", os.O_RDONLY)
        try:
            meta = read_meta(fd)
            guard = read_guard(tmp_path / "index.guard", repository_id=REPOSITORY_ID, id_bytes=16)
            guard.check(fd, meta)
            free = {page for page, digest in enumerate(guard.digests) if digest == 0}
            assert free == changed_pages({}, read_free_lists(fd, meta))[1]
        finally:
            os.close(fd)
    assert meta.page_count > 300
    assert index.packs() == {pack(number) for number in known}


def test_rot_between_two_saves_is_not_blessed_by_the_second(index: Index, tmp_path: Path) -> None:
    """Fails with a guard that digests the file anew after each transaction."""

    def rot_and_save() -> int:
        mine = open_at(tmp_path)
        spread = [ChunkId(bytes([first]) + bytes(15)) for first in range(256)]
        rows = [
            Row(ChunkId(each[:1] + bytes([n]) + bytes(14)), 64, n, n, n, (), row(1).kind)
            for each in spread
            for n in range(10)
        ]
        mine.add({pack(1): rows})
        before = read_guard(tmp_path / "index.guard", repository_id=REPOSITORY_ID, id_bytes=16).digests
        low = Row(ChunkId(bytes(16)), 64, 1, 1, 1, (), row(1).kind)
        shutil.copy(tmp_path / "index.lmdb", tmp_path / "copy")
        mine.add({pack(2): [low]})
        after = read_guard(tmp_path / "index.guard", repository_id=REPOSITORY_ID, id_bytes=16).digests
        kept = [page for page in range(2, len(before)) if before[page] and before[page] == after[page]]
        with (tmp_path / "index.lmdb").open("r+b") as file:
            file.seek(4096 * kept[-1] + 4090)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 4]))
        mine.add({pack(3): [low]})
        return len(mine.packs())

    assert in_child(rot_and_save) == 3
    assert in_child(lambda: len(open_at(tmp_path).packs())) == 0
