"""Parity of a repository: added at any time, never needed to read, and never a keeper of rot."""

from __future__ import annotations

import numpy as np
import pytest

from castore.api import Repository
from castore.backend import MemoryBackend
from castore.errors import StorageError, UsageError
from castore.format.layout import pack_name, parity_name
from castore.maintenance.parity import (
    add_parity,
    parity_sizes,
    parity_status,
    remove_parity,
    stale_parity,
)
from castore.maintenance.restoring import restoring_handle
from tests.checkpoint.damage import flip_bit, replace_file, rows_of
from tests.checkpoint.repositories import HookedBackend, at_call, copied, create_on, files_of, open_on, packs_of
from tests.suites.fault_backend import Fault, FaultBackend, SimulatedCrash

pytest.importorskip("pyeclib")


@pytest.fixture
def repo() -> Repository:
    """Two packs, of some 200 and 100 kB."""
    repository = create_on(MemoryBackend())
    for seed, count in ((1, 200_000), (2, 100_000)):
        repository.save({"noise": np.random.default_rng(seed).integers(0, 256, count, np.uint8)})
    return repository


def read_pack(repo: Repository, pack_id: str) -> bytes:
    return files_of(repo.handle.backend)[f"packs/{pack_id[:2]}/{pack_id}.pack"]


def through_parity(repo: Repository, pack_id: str) -> bytes:
    reader = restoring_handle(repo.handle).backend.open_reader(f"packs/{pack_id[:2]}/{pack_id}.pack")
    try:
        return reader.read(0, reader.size_bytes)
    finally:
        reader.close()


def test_parity_is_added_to_the_packs_that_lack_it_and_reading_needs_none(repo) -> None:
    first = add_parity(repo.handle)
    assert set(first.added) == packs_of(repo)
    assert first.kept_count == 0
    assert first.added_bytes == sum(parity_sizes(repo.handle.backend).values())
    total = sum(len(read_pack(repo, pack)) for pack in packs_of(repo))
    assert first.added_bytes < 0.2 * total
    repo.save({"more": np.arange(1000.0)})
    second = add_parity(repo.handle)
    assert len(second.added) == 1
    assert second.kept_count == 2
    assert repo.verify(data=True).ok
    count, removed_bytes = remove_parity(repo.handle)
    assert (count, removed_bytes) == (3, first.added_bytes + second.added_bytes)
    assert repo.verify(data=True).ok


@pytest.mark.parametrize("overhead", [0, 101, -5])
def test_an_overhead_that_makes_no_sense_is_refused(repo, overhead) -> None:
    with pytest.raises(UsageError, match="1 to 100"):
        add_parity(repo.handle, overhead_percent=overhead)


def test_a_rotten_stretch_is_restored_bit_for_bit(repo) -> None:
    add_parity(repo.handle, overhead_percent=20)
    for pack_id in packs_of(repo):
        whole = read_pack(repo, pack_id)
        assert through_parity(repo, pack_id) == whole
        damaged = bytearray(whole)
        damaged[30_000:42_000] = bytes(12_000)
        damaged[-40:] = b"?" * 40
        replace_file(repo.handle.backend, pack_name(pack_id), bytes(damaged))
    left = open_on(repo.handle.backend)
    assert not left.verify(data=True).ok
    status = parity_status(left.handle, data=True)
    assert not status.ok
    assert all(pack.can_restore and pack.lost_cells for pack in status.packs)
    for pack_id in packs_of(left):
        replace_file(left.handle.backend, pack_name(pack_id), through_parity(left, pack_id))
    mended = open_on(repo.handle.backend)
    assert mended.verify(data=True).ok
    assert parity_status(mended.handle, data=True).ok


def test_more_than_the_parity_restores_is_told_and_changes_nothing(repo) -> None:
    add_parity(repo.handle)
    pack_id = max(packs_of(repo), key=lambda pack: len(read_pack(repo, pack)))
    whole = read_pack(repo, pack_id)
    damaged = bytes(len(whole) // 2) + whole[len(whole) // 2 :]
    replace_file(repo.handle.backend, pack_name(pack_id), damaged)
    before = files_of(repo.handle.backend)
    assert through_parity(repo, pack_id) == damaged
    assert files_of(repo.handle.backend) == before
    assert [pack.can_restore for pack in parity_status(repo.handle, data=True).packs if pack.lost_cells] == [False]


def test_no_parity_is_made_for_a_pack_that_is_rotten_already(repo) -> None:
    pack_id = max(packs_of(repo), key=lambda pack: len(read_pack(repo, pack)))
    row = max(rows_of(repo, pack_id), key=lambda row: row.stored_bytes)
    damaged = bytearray(read_pack(repo, pack_id))
    damaged[row.offset + 9] ^= 1
    replace_file(repo.handle.backend, pack_name(pack_id), bytes(damaged))
    report = add_parity(open_on(repo.handle.backend).handle)
    ((refused, why),) = report.refused
    assert refused == pack_id
    assert "checksum" in why
    assert parity_name(pack_id) not in files_of(repo.handle.backend)
    assert len(report.added) == 1


def test_damage_of_the_parity_file_itself_is_told(repo) -> None:
    add_parity(repo.handle)
    pack_id = min(packs_of(repo))
    replace_file(repo.handle.backend, parity_name(pack_id), b"nonsense" * 100)
    status = parity_status(repo.handle)
    assert not status.ok
    (broken,) = [pack for pack in status.packs if pack.error]
    assert broken.pack_id == pack_id
    assert not broken.can_restore


def test_rotten_parity_is_made_anew_unless_its_pack_needs_it(repo) -> None:
    """It counted as there, so it could only be removed, all of it, and made again."""
    backend = repo.handle.backend
    add_parity(repo.handle)
    made = files_of(backend, "parity/")
    first, second = sorted(packs_of(repo))
    torn, rotten = parity_name(first), parity_name(second)
    replace_file(backend, torn, made[torn][: len(made[torn]) // 2])
    flip_bit(backend, rotten, len(made[rotten]) // 2)
    assert add_parity(repo.handle).renewed == (first,)
    assert add_parity(repo.handle, data=True).renewed == (second,)
    assert files_of(backend, "parity/") == made
    again = add_parity(repo.handle, data=True)
    assert (again.added, again.kept_count) == ((), 2)

    flip_bit(backend, rotten, len(made[rotten]) // 2)
    row = max(rows_of(repo, second), key=lambda row: row.stored_bytes)
    flip_bit(backend, pack_name(second), row.offset + 9)
    report = add_parity(open_on(backend).handle, data=True)
    assert [pack_id for pack_id, _ in report.refused] == [second]
    assert not open_on(backend).repair().losses


def test_parity_that_the_disk_refuses_to_read_is_made_anew(repo) -> None:
    add_parity(repo.handle)
    first = min(packs_of(repo))
    hooked = HookedBackend(repo.handle.backend)

    def refuse(operation: str, name: str) -> None:
        if (operation, name) == ("open_reader", parity_name(first)):
            raise StorageError(f"{name}: cannot read: Input/output error")

    hooked.hook = refuse
    assert add_parity(open_on(hooked).handle).renewed == (first,)


def test_a_parity_file_that_is_empty_is_damaged_and_not_absent(repo) -> None:
    add_parity(repo.handle)
    pack_id = min(packs_of(repo))
    replace_file(repo.handle.backend, parity_name(pack_id), b"")
    status = parity_status(repo.handle)
    assert not status.ok
    assert [pack.pack_id for pack in status.packs if pack.error] == [pack_id]


def test_parity_without_its_pack_is_garbage(repo) -> None:
    add_parity(repo.handle)
    assert stale_parity(repo.handle.backend) == {}
    gone = min(packs_of(repo))
    repo.handle.backend.delete(pack_name(gone))
    assert list(stale_parity(repo.handle.backend)) == [gone]
    assert parity_status(repo.handle).orphans == (gone,)


def test_a_pack_that_is_collected_while_its_parity_is_made_leaves_none(repo) -> None:
    counted = HookedBackend(copied(repo.handle.backend))
    add_parity(open_on(counted).handle)
    for call in range(len(counted.calls)):
        beside = HookedBackend(copied(repo.handle.backend))
        doomed = min(packs_of(open_on(beside.inner)))
        beside.hook = at_call(call, lambda backend=beside.inner, pack=doomed: backend.delete(pack_name(pack)))
        report = add_parity(open_on(beside).handle)
        if doomed not in report.added:
            assert parity_name(doomed) not in files_of(beside.inner)
        assert len(report.added) >= 1


def test_a_crash_while_parity_is_made_leaves_whole_files_only(repo) -> None:
    call = 0
    while True:
        faulty = FaultBackend(copied(repo.handle.backend), Fault(call, "during"))
        try:
            add_parity(open_on(faulty).handle)
            break
        except SimulatedCrash:
            left = open_on(faulty.restore_in_memory(unsynced="lost"))
        assert left.verify(data=True).ok
        assert parity_status(left.handle, data=True).ok
        call += 1
    assert call > 5


def test_a_collection_keeps_the_parity_of_a_pack_that_the_disk_lost() -> None:
    """Only the parity can bring it back; that of a pack whose chunks nobody misses goes."""
    repo = create_on(MemoryBackend())
    noise = np.random.default_rng(1).integers(0, 256, 200_000, np.uint8)
    first = repo.save({"noise": noise})
    (lost,) = packs_of(repo)
    second = repo.save({"noise": noise, "more": np.arange(1000.0)})
    repo.forget(ids=[first])
    add_parity(repo.handle, overhead_percent=100)
    repo.handle.backend.delete(pack_name(lost))

    repo = open_on(repo.handle.backend)
    report = repo.gc()
    assert any("castore repair" in note for note in report.notes)
    assert lost in parity_sizes(repo.handle.backend)
    assert not repo.repair().losses
    assert np.array_equal(open_on(repo.handle.backend).load(second)["noise"], noise)
    repo.gc()
    assert lost not in parity_sizes(repo.handle.backend)
