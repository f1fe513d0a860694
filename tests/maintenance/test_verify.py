"""Verify names what is damaged and whom it touches, and finds nothing where nothing is."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import castore
from castore.api import Repository
from castore.backend import MemoryBackend
from castore.backend.base import Backend, RangeReader
from castore.errors import StorageError
from castore.format.layout import CONFIG, pack_name, snapshot_name
from castore.format.manifest import Entry, Kind, encode_part
from castore.format.pack import RecordKind, Row
from castore.ids import PackId
from castore.index.base import Location
from castore.leases import condemn, writer_lease
from castore.maintenance import verify as verify_module
from castore.maintenance.tables import open_rows
from castore.maintenance.verify import Examination, VerifyReport, examine, settled, verify
from castore.options import GRID_BYTES, Compression, RepositoryOptions
from castore.pack.writer import PackWriter
from castore.repository import Handle
from castore.snapshots import read_record
from castore.store import list_packs
from tests.checkpoint.repositories import copied, create_on, files_of, open_on
from tests.suites.packs import flip, rewrite, write_pack
from tools.golden_workshop import HASHER, plant

N = HASHER.digest_bytes


def make_state(step: int) -> dict[str, object]:
    rng = np.random.default_rng(step)
    return {
        "weight": rng.standard_normal(1000, dtype=np.float32),
        "frozen": np.random.default_rng(0).standard_normal(500, dtype=np.float32),
        "step": step,
    }


@pytest.fixture
def repo() -> Repository:
    repository = create_on(MemoryBackend())
    for step in (1, 2):
        repository.save(make_state(step), step=step)
    return repository


def location_of(repository: Repository, path: str, *, ref: str = "main", index: int = 0) -> Location:
    leaf = entry_of(repository, path, ref=ref)
    chunk_id = leaf.chunk_ids(N)[index]
    return repository.handle.store.locate([chunk_id])[chunk_id][0]


def entry_of(repository: Repository, path: str, *, ref: str = "main") -> Entry:
    record = read_record(repository.handle.backend, repository.snapshot(ref).id)
    return next(entry for entry in repository.handle.manifests.entries(record) if entry.path == path)


def by_step(repository: Repository, report: VerifyReport) -> dict[int | None, tuple[str, ...]]:
    return {repository.snapshot(key).step: leaves for key, leaves in report.damaged_snapshots.items()}


def kinds(report: VerifyReport) -> list[str]:
    return [problem.kind for problem in report.problems]


# ---- nothing is wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [RepositoryOptions(hash=name) for name in ("xxh3-128", "blake3")], ids=str)
def test_a_whole_repository_has_no_problem(options: RepositoryOptions) -> None:
    repository = create_on(MemoryBackend(), options)
    repository.save(make_state(1))
    report = repository.verify(data=True)
    assert report.ok, report.problems
    assert (report.snapshot_count, report.pack_count, report.chunk_count) == (1, 1, 3)
    assert report.notes == report.orphans == ()
    assert report.damaged_snapshots == {}


def test_an_empty_repository_has_no_problem() -> None:
    report = create_on(MemoryBackend()).verify(data=True)
    assert report.ok
    assert (report.snapshot_count, report.pack_count, report.checked_bytes) == (0, 0, 0)


def test_without_data_no_record_is_counted_as_read(repo: Repository) -> None:
    assert repo.verify().checked_bytes == 0
    assert repo.verify(data=True).checked_bytes > 0


@pytest.mark.parametrize("data", [False, True])
def test_progress_rises_to_the_bytes_of_all_packs(repo: Repository, data: bool) -> None:
    seen: list[tuple[int, int]] = []
    repo.verify(data=data, progress=lambda done, total: seen.append((done, total)))
    backend = repo.handle.backend
    total = sum(info.size_bytes for info in backend.list("packs/"))
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_each_record_is_read_once_however_many_snapshots_share_it(repo: Repository) -> None:
    repo.save(make_state(2), step=3)
    reads: Counter[tuple[str, int]] = Counter()
    backend = ReaderBackend(repo.handle.backend, lambda reader, name: CountingReader(reader, name, reads))
    report = verify_on(backend, repo)
    assert report.ok
    frozen = location_of(repo, "frozen")
    assert reads[pack_name(frozen.pack_id), frozen.row.offset] == 1
    for pack_id, row in all_rows(repo):
        # Parts are read once to be followed and once to be checked.
        assert reads[pack_name(pack_id), row.offset] == (2 if row.kind is RecordKind.PART else 1)


def test_beside_running_saves_nothing_looks_damaged(tmp_path: Path) -> None:
    with castore.init(tmp_path / "store") as writer, castore.open(tmp_path / "store") as reader:
        done = threading.Event()

        def save() -> None:
            try:
                for step in range(15):
                    writer.save(make_state(step), step=step)
            finally:
                done.set()

        thread = threading.Thread(target=save)
        thread.start()
        reports = []
        while not done.is_set():
            reports.append(reader.verify(data=len(reports) % 2 == 0))
        thread.join()
        assert [problem for report in reports for problem in report.problems] == []
        assert reader.verify(data=True).snapshot_count == 15


# ---- any byte --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["auto", "none"])
def test_a_flipped_byte_anywhere_is_found(compression: Compression) -> None:
    repository = create_on(MemoryBackend(), RepositoryOptions(compression=compression))
    repository.save({**make_state(1), "long": np.arange(20_000, dtype=np.int32), "zeros": np.zeros(900)}, tags=("v1",))
    files = files_of(repository.handle.backend)
    rng = random.Random(compression)
    for name, data in files.items():
        for at in rng.sample(range(len(data)), min(len(data), 120)):
            backend = copied(repository.handle.backend)
            rewrite(backend, name, flip(at))
            assert not verify_on(backend, repository).ok, (name, at)


@pytest.mark.parametrize("compression", ["auto", "none"])
def test_a_file_cut_short_anywhere_is_found(compression: Compression) -> None:
    repository = create_on(MemoryBackend(), RepositoryOptions(compression=compression))
    repository.save(make_state(1))
    for name, data in files_of(repository.handle.backend).items():
        for size in {0, 1, 63, 64, 65, len(data) // 2, len(data) - 1}:
            backend = copied(repository.handle.backend)
            rewrite(backend, name, lambda found, size=size: found.__delitem__(slice(size, None)))
            if size < len(data):
                assert not verify_on(backend, repository, data=False).ok, (name, size)


# ---- whom it touches -------------------------------------------------------------------------------------------------


def test_a_damaged_record_is_charged_to_every_snapshot_and_leaf_that_needs_it(repo: Repository) -> None:
    repo.save({"another": {"name": make_state(0)["frozen"]}}, branch="other", step=7)
    frozen = location_of(repo, "frozen")
    rewrite(repo.handle.backend, pack_name(frozen.pack_id), flip(frozen.row.offset))
    assert repo.verify().ok
    report = repo.verify(data=True)
    assert kinds(report) == ["record"]
    assert by_step(repo, report) == {1: ("frozen",), 2: ("frozen",), 7: ("another/name",)}
    (problem,) = report.problems
    assert problem.where == pack_name(frozen.pack_id)
    assert problem.leaves == ("another/name", "frozen")
    assert frozen.row.chunk_id.hex() in problem.message


def test_damage_is_charged_to_aliases_and_views_but_never_to_the_hidden_storage() -> None:
    repository = create_on(MemoryBackend())
    base = np.arange(1000.0)
    repository.save({"base": base, "window": base[5:900], "tied": base, "again": base[5:900], "other": np.ones(500)})
    assert entry_of(repository, "base").kind is Kind.VIEW
    storage = location_of(repository, "~storage/0")
    rewrite(repository.handle.backend, pack_name(storage.pack_id), flip(storage.row.offset + 1))
    (leaves,) = repository.verify(data=True).damaged_snapshots.values()
    assert leaves == ("again", "base", "tied", "window")


def test_the_chunk_in_the_middle_of_a_long_leaf_is_found() -> None:
    repository = create_on(MemoryBackend())
    repository.save({"long": np.random.default_rng(0).bytes(3 * GRID_BYTES + 5)})
    middle = location_of(repository, "long", index=1)
    rewrite(repository.handle.backend, pack_name(middle.pack_id), flip(middle.row.offset + 9))
    report = repository.verify(data=True)
    assert [problem.leaves for problem in report.problems] == [("long",)]


def test_a_damaged_record_with_another_whole_copy_loses_nothing(repo: Repository) -> None:
    frozen = location_of(repo, "frozen")
    raw = bytes(repo.handle.store.get(frozen.row.chunk_id))
    write_pack(repo.handle.backend, [raw])
    rewrite(repo.handle.backend, pack_name(frozen.pack_id), flip(frozen.row.offset))
    report = repo.verify(data=True)
    assert [(problem.kind, problem.snapshots, problem.leaves) for problem in report.problems] == [("record", (), ())]
    assert "another copy" in report.problems[0].message
    assert report.damaged_snapshots == {}
    np.testing.assert_array_equal(repo.load()["frozen"], make_state(0)["frozen"])


def test_a_damaged_record_that_nobody_needs_loses_nothing(repo: Repository) -> None:
    weight = location_of(repo, "weight")
    repo.handle.backend.delete(snapshot_name(repo.snapshot("main").id))
    repo.branch("main", at=repo.snapshot(next(iter(repo.snapshots())).id).id, move=True)
    rewrite(repo.handle.backend, pack_name(weight.pack_id), flip(weight.row.offset))
    report = repo.verify(data=True)
    assert [problem.snapshots for problem in report.problems] == [()]
    assert "no snapshot needs it" in report.problems[0].message


def test_lost_chunks_are_one_problem_for_each_group_of_snapshots(repo: Repository) -> None:
    first = location_of(repo, "frozen", ref="main~1")
    part = repo.snapshot("main~1")
    repo.handle.backend.delete(pack_name(first.pack_id))
    report = open_on(repo.handle.backend).verify()
    assert sorted(kinds(report)) == ["chunk", "part"]
    assert {repo.snapshot(key).step: leaves for key, leaves in report.damaged_snapshots.items()} == {
        1: (),
        2: ("frozen",),
    }
    assert part.id in report.damaged_snapshots


def test_the_id_list_of_a_huge_leaf_is_followed() -> None:
    """A leaf of 1.5 GiB, all of it the same two chunks."""
    repository = create_on(MemoryBackend())
    length = 1500 * GRID_BYTES + 300
    full, last = bytes(GRID_BYTES), bytes(300)
    ids = HASHER.chunk_id(full) * 1500 + HASHER.chunk_id(last)
    lists = [ids[: 1024 * N], ids[1024 * N :]]
    stored = Entry("", Kind.BYTES, raw_bytes=length, id_lists=b"".join(HASHER.chunk_id(raw) for raw in lists))
    resolved = Entry("", Kind.BYTES, raw_bytes=length, chunks=ids)
    plant(repository.handle, [encode_part([stored])], [resolved], make_pack=adding(full, last, *lists))
    report = repository.verify(data=True)
    assert report.ok, report.problems
    assert report.chunk_count == 5

    list_id = HASHER.chunk_id(lists[1])
    place = repository.handle.store.locate([list_id])[list_id][0]
    rewrite(repository.handle.backend, pack_name(place.pack_id), flip(place.row.offset))
    report = open_on(repository.handle.backend).verify(data=True)
    assert kinds(report) == ["part", "record"]
    assert list(report.damaged_snapshots.values()) == [("",)]


# ---- bases -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def drifting() -> Repository:
    """Four snapshots whose array rests on that of the first, the last two by way of the second."""
    repository = create_on(MemoryBackend())
    for step in range(4):
        values = np.random.default_rng(0).standard_normal(20_000, dtype=np.float32) * np.float32(1 + 1e-6 * step)
        repository.save({"drift": values, "other": make_state(step)["weight"]}, step=step)
    assert [location_of(repository, "drift", ref=f"main@{step}").row.depth for step in range(4)] == [0, 1, 2, 2]
    assert repository.verify(data=True).ok
    return repository


@pytest.mark.parametrize(("step", "touched"), [(0, (0, 1, 2, 3)), (1, (1, 2, 3)), (2, (2,)), (3, (3,))])
def test_a_rotten_base_is_one_problem_with_every_snapshot_that_rests_on_it(
    drifting: Repository, step: int, touched: tuple[int, ...]
) -> None:
    rotten = location_of(drifting, "drift", ref=f"main@{step}")
    rewrite(drifting.handle.backend, pack_name(rotten.pack_id), flip(rotten.row.offset + 20))
    assert drifting.verify().ok
    report = open_on(drifting.handle.backend).verify(data=True)
    assert kinds(report) == ["record"]
    assert by_step(drifting, report) == dict.fromkeys(touched, ("drift",))
    assert rotten.row.chunk_id.hex() in report.problems[0].message


def test_a_rotten_base_whose_own_snapshot_was_forgotten_is_named_with_those_that_rest_on_it(
    drifting: Repository,
) -> None:
    rotten = location_of(drifting, "drift", ref="main@0")
    drifting.handle.backend.delete(snapshot_name(drifting.snapshot("main@0").id))
    rewrite(drifting.handle.backend, pack_name(rotten.pack_id), flip(rotten.row.offset + 20))
    report = open_on(drifting.handle.backend).verify(data=True)
    assert kinds(report) == ["record"]
    assert by_step(drifting, report) == dict.fromkeys((1, 2, 3), ("drift",))


def test_a_base_that_is_gone_is_found_without_reading_data(drifting: Repository) -> None:
    gone = location_of(drifting, "drift", ref="main@0")
    drifting.handle.backend.delete(snapshot_name(drifting.snapshot("main@0").id))
    drifting.handle.backend.delete(pack_name(gone.pack_id))
    for data in (False, True):
        report = open_on(drifting.handle.backend).verify(data=data)
        assert kinds(report) == ["chunk"]
        assert by_step(drifting, report) == dict.fromkeys((1, 2, 3), ("drift",))


def test_two_rotten_records_of_one_chain_are_both_named(drifting: Repository) -> None:
    for step in (0, 2):
        rotten = location_of(drifting, "drift", ref=f"main@{step}")
        rewrite(drifting.handle.backend, pack_name(rotten.pack_id), flip(rotten.row.offset + 20))
    report = open_on(drifting.handle.backend).verify(data=True)
    assert kinds(report) == ["record", "record"]
    assert by_step(drifting, report) == dict.fromkeys((0, 1, 2, 3), ("drift",))


def test_a_base_is_decoded_once_for_all_that_rest_on_it(drifting: Repository) -> None:
    base = location_of(drifting, "drift", ref="main@1")
    reads: Counter[tuple[str, int]] = Counter()
    backend = ReaderBackend(drifting.handle.backend, lambda reader, name: CountingReader(reader, name, reads))
    assert verify_on(backend, drifting).ok
    assert reads[pack_name(base.pack_id), base.row.offset] == 2  # by itself, and for the two that rest on it
    for step in (2, 3):
        delta = location_of(drifting, "drift", ref=f"main@{step}")
        assert reads[pack_name(delta.pack_id), delta.row.offset] == 1


def test_a_pack_that_holds_nothing_but_bases_is_needed(drifting: Repository) -> None:
    drifting.handle.backend.delete(snapshot_name(drifting.snapshot("main@0").id))
    report = drifting.verify()
    assert report.ok
    assert not any("hold nothing" in note for note in report.notes)


def test_records_that_rest_on_each_other_are_refused() -> None:
    repository = create_on(MemoryBackend())
    ids = [HASHER.chunk_id(bytes([seed])) for seed in (1, 2)]

    def circle(writer: PackWriter) -> None:
        for chunk_id, base_id in (ids, reversed(ids)):
            writer.append(
                chunk_id, b"x" * 50, kind=RecordKind.LEAF, raw_bytes=1000, chain=(16,), base_ids=(base_id,), depth=1
            )

    entries = [
        Entry("", Kind.LIST, shape=(2,)),
        *(Entry(str(index), Kind.BYTES, raw_bytes=1000, chunks=chunk_id) for index, chunk_id in enumerate(ids)),
    ]
    plant(repository.handle, [encode_part(entries)], entries, make_pack=circle)
    for data in (False, True):
        report = repository.verify(data=data)
        assert not report.ok
        assert list(report.damaged_snapshots.values()) == [("0", "1")]


# ---- what is no damage -----------------------------------------------------------------------------------------------


def test_a_parent_that_is_gone_is_a_note(repo: Repository) -> None:
    repo.handle.backend.delete(snapshot_name(repo.snapshot("main~1").id))
    report = repo.verify()
    assert report.ok
    assert any("parent" in note and "gone" in note for note in report.notes)


def test_orphans_are_listed_newest_first(repo: Repository) -> None:
    for step in (10, 11):
        repo.save(make_state(step), branch=f"lost-{step}", step=step, parent="main")
        repo.delete_branch(f"lost-{step}")
    report = repo.verify()
    assert report.ok
    assert [repo.snapshot(snapshot_id).step for snapshot_id in report.orphans] == [11, 10]


def test_strangers_are_notes(repo: Repository) -> None:
    for name in ("packs/readme", "snapshots/notes.txt", "leases/dead.lease"):
        repo.handle.backend.put_if_absent(name, b"?")
    report = repo.verify(data=True)
    assert report.ok
    for word in ("packs/readme", "snapshots/notes.txt", "leases/dead.lease"):
        assert any(word in note for note in report.notes), word


def test_what_a_crash_left_is_a_note(tmp_path: Path) -> None:
    with castore.init(tmp_path / "store") as repository:
        repository.save(make_state(1))
        (tmp_path / "store/packs/.tmp-1234").write_bytes(b"half a pack")
        report = repository.verify(data=True)
    assert report.ok
    assert any("1 temporary files (11 bytes)" in note for note in report.notes)


def test_a_pack_that_nobody_needs_is_a_note(repo: Repository) -> None:
    write_pack(repo.handle.backend, [b"z" * 500])
    report = repo.verify()
    assert report.ok
    assert any("hold nothing that a snapshot needs" in note for note in report.notes)


# ---- other damage ----------------------------------------------------------------------------------------------------


def test_index_rows_that_disagree_with_the_table_are_mended_when_they_are_met(repo: Repository) -> None:
    rows = all_rows(repo)
    for pack_id in {pack_id for pack_id, _ in rows}:
        table = [row for found, row in rows if found == pack_id]
        repo.handle.store._index.forget([pack_id])
        repo.handle.store._index.add({pack_id: [replace(row, offset=row.offset + 8) for row in table]})
    report = repo.verify(data=True)
    assert set(kinds(report)) <= {"index"}
    assert report.damaged_snapshots == {}
    repo.load("main")
    assert repo.verify(data=True).ok


def test_a_config_that_changed_since_it_was_opened_is_found(repo: Repository) -> None:
    other = create_on(MemoryBackend()).handle.backend
    data = other.read(CONFIG, max_bytes=10_000)
    rewrite(repo.handle.backend, CONFIG, lambda found: found.__setitem__(slice(None), data))
    assert kinds(repo.verify()) == ["config"]


def test_a_file_that_the_disk_refuses_to_read_is_a_problem_not_an_error(repo: Repository) -> None:
    bad = location_of(repo, "weight").pack_id
    backend = ReaderBackend(
        repo.handle.backend,
        lambda reader, name: RefusingReader(reader, name, Counter()) if name == pack_name(bad) else reader,
    )
    report = verify_on(backend, repo)
    assert not report.ok
    assert any(problem.where == pack_name(bad) and "Input/output" in problem.message for problem in report.problems)


def test_a_report_is_json(repo: Repository) -> None:
    frozen = location_of(repo, "frozen")
    rewrite(repo.handle.backend, pack_name(frozen.pack_id), flip(frozen.row.offset))
    document = repo.verify(data=True).to_json()
    assert document["ok"] is False
    assert document["problems"][0]["leaves"] == ["frozen"]
    assert set(document["damaged_snapshots"]) == {snapshot.id for snapshot in repo.log()}


# ---- tools -----------------------------------------------------------------------------------------------------------


def verify_on(backend: Backend, repository: Repository, *, data: bool = True) -> VerifyReport:
    """With the config that was read before the damage."""
    return verify(Handle(backend, repository.handle.config), data=data)


def adding(*chunks: bytes) -> Callable[[PackWriter], None]:
    def add(writer: PackWriter) -> None:
        for raw in chunks:
            writer.append(HASHER.chunk_id(raw), raw, kind=RecordKind.LEAF, raw_bytes=len(raw), chain=())

    return add


def all_rows(repository: Repository) -> list[tuple[PackId, Row]]:
    backend = repository.handle.backend
    return [(pack_id, row) for pack_id in list_packs(backend) for row in open_rows(backend, pack_id, HASHER)[0]]


class CountingReader:
    def __init__(self, reader: RangeReader, name: str, reads: Counter[tuple[str, int]]) -> None:
        self._reader, self._name, self._reads = reader, name, reads

    def __getattr__(self, attribute: str) -> object:
        return getattr(self._reader, attribute)

    def read_into(self, offset: int, target: memoryview) -> None:
        self._reads[self._name, offset] += 1
        self._reader.read_into(offset, target)


class RefusingReader(CountingReader):
    def read_into(self, offset: int, target: memoryview) -> None:
        raise StorageError(f"{self._name}: cannot read at offset {offset}: Input/output error")

    def read(self, offset: int, size_bytes: int) -> bytes:
        raise StorageError(f"{self._name}: cannot read at offset {offset}: Input/output error")


class ReaderBackend:
    """A backend whose readers are replaced."""

    def __init__(self, inner: Backend, wrap: Callable[[RangeReader, str], RangeReader]) -> None:
        self._inner, self._wrap = inner, wrap

    def __getattr__(self, attribute: str) -> object:
        return getattr(self._inner, attribute)

    def open_reader(self, name: str) -> RangeReader:
        return self._wrap(self._inner.open_reader(name), name)


@pytest.mark.parametrize(("moving", "looks"), [(12, 14), (3, 8), (10**6, 64)])
def test_what_two_looks_in_a_row_do_not_find_is_no_damage(
    monkeypatch: pytest.MonkeyPatch, moving: int, looks: int
) -> None:
    """Beside a collector that never rests: false alarms differ from look to look, damage stays."""
    made = 0

    def look() -> Any:
        nonlocal made
        made += 1
        where = f"look {made}" if made <= moving else "damage"
        return SimpleNamespace(
            findings=SimpleNamespace(problems=[SimpleNamespace(kind="part", where=where)]), pack_ids=()
        )

    listings = iter(range(10**6))
    monkeypatch.setattr(verify_module, "list_packs", lambda _: frozenset([str(next(listings))]))
    settled(create_on(MemoryBackend()).handle, look)
    assert made == looks


def test_what_a_waking_writer_puts_back_was_never_missing(repo: Repository) -> None:
    """It was taken for dead, shows its snapshot first, and then puts back what was collected of it."""
    backend = repo.handle.backend
    name = snapshot_name(repo.snapshot("main").id)
    data = backend.read(name, max_bytes=1 << 20)
    backend.delete(name)
    has_looked, reports = threading.Event(), []

    def writer() -> None:
        with writer_lease(backend, purpose="save", now_ns=1):
            has_started.set()
            assert has_looked.wait(60)
            assert backend.put_if_absent(name, data)

    def look() -> Examination:
        found = examine(repo.handle, data=False)
        reports.append(found.findings.problems)
        has_looked.set()
        return found

    has_started = threading.Event()
    thread = threading.Thread(target=writer)
    thread.start()
    assert has_started.wait(60)
    assert not settled(repo.handle, look).findings.problems
    thread.join()
    assert [problem.kind for problem in reports[0]] == ["ref"]


def test_damage_stays_damage_however_long_a_writer_is_under_way() -> None:
    repo = create_on(MemoryBackend(), RepositoryOptions(lease_s=0.05))
    repo.handle.backend.delete(snapshot_name(repo.save(make_state(1)).id))
    with writer_lease(repo.handle.backend, purpose="save", now_ns=1):
        assert kinds(repo.verify()) == ["ref"]


def test_a_condemned_snapshot_that_no_ref_reaches_is_passed_over() -> None:
    """Its writer slept while its chunks were collected, showed it, and was killed: nobody was told of it."""
    repo = create_on(MemoryBackend())
    lost = repo.save(make_state(3), branch="lost")
    repo.delete_branch("lost")
    for pack_id in list_packs(repo.handle.backend):
        repo.handle.backend.delete(pack_name(pack_id))
    kept = repo.save(make_state(1), step=1)
    head = repo.save(make_state(2), step=2)
    repo = open_on(repo.handle.backend)
    assert repo.verify().damaged_snapshots.keys() == {lost.id}
    condemn(repo.handle.backend, packs=(), snapshots=[lost.id, kept.id], now_ns=1)
    report = repo.verify()
    assert report.ok
    assert not report.orphans
    assert any("snapshots that no ref reaches are being collected" in note for note in report.notes)
    damaged = location_of(repo, "weight", ref=kept.id)
    repo.handle.backend.delete(pack_name(damaged.pack_id))
    assert repo.verify().damaged_snapshots.keys() == {kept.id, head.id}
