"""Of two copies the good one stays; what cannot be read keeps its pack; the smallest space is enough."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import pytest

from castore.api import Repository
from castore.backend import MemoryBackend
from castore.errors import NoSpaceError
from castore.format.layout import pack_name
from castore.format.pack import HEADER_BYTES, RecordKind, Row
from castore.ids import Buffer, ChunkId, PackId, SnapshotId
from castore.maintenance.gc.copying import units
from castore.options import GRID_BYTES, RepositoryOptions
from castore.snapshots import read_record
from castore.store import pack_sizes
from tests.checkpoint.repositories import condemn, copied, create_on, open_on, packs_of
from tests.maintenance.gc.histories import check_whole, drifting, forget, fresh, gc, gc_files, line
from tests.suites.packs import rewrite


def stored_twice(first: int = 0) -> tuple[Repository, SnapshotId, PackId, PackId]:
    """A snapshot whose chunks lie in two packs: condemned when it was saved again, and let off."""
    repo, _ = line(1, lambda _: fresh(first))
    (old,) = packs_of(repo)
    name = condemn(repo.handle.backend, [old])
    snapshot = repo.save(fresh(first)).id
    repo.handle.backend.delete(name)
    (new,) = packs_of(repo) - {old}
    return repo, snapshot, old, new


def spoil(repo: Repository, pack_id: PackId, place: int = 150) -> None:
    """Rot in the payload of the first record."""
    rewrite(repo.handle.backend, pack_name(pack_id), lambda data: data.__setitem__(place, data[place] ^ 1))


def test_one_of_two_sound_copies_goes_without_copying() -> None:
    repo, snapshot, old, new = stored_twice()
    for condemned in (old, new):
        own = open_on(copy_of(repo))
        condemn(own.handle.backend, [condemned])
        report = gc(own)
        assert packs_of(own) == {old, new} - {condemned}
        assert report.copied_bytes == 0
        check_whole(own, {snapshot: fresh(0)})


def test_a_good_copy_is_not_deleted_for_the_sake_of_a_rotten_one() -> None:
    repo, snapshot, old, new = stored_twice()
    for rotten, condemned in ((old, new), (new, old)):
        own = open_on(copy_of(repo))
        spoil(own, rotten)
        condemn(own.handle.backend, [condemned])
        report = gc(own)
        assert condemned not in packs_of(own)
        assert report.copied_bytes > 0
        assert own.load(snapshot)["noise"].tobytes() == fresh(0)["noise"].tobytes()


def test_no_rot_is_given_a_fresh_checksum() -> None:
    repo, ids = line(2)
    victim = pack_of(repo, ids[0])
    spoil(repo, victim)
    condemn(repo.handle.backend, [victim])
    report = gc(repo)
    assert victim in packs_of(repo)
    (pending,) = report.pending
    assert (pending.kind, pending.bytes) == ("damage", pack_sizes(repo.handle.backend)[victim])
    assert victim in pending.message
    assert not report.is_complete
    assert not open_on(repo.handle.backend).verify(data=True).ok
    assert gc_files(repo), "it is still condemned"
    # The same content, saved again, heals the chunk, and the pack may go.
    repo.save(fresh(0))
    assert gc(open_on(repo.handle.backend)).is_complete
    assert victim not in packs_of(repo)
    check_whole(repo, {ids[0]: fresh(0), ids[1]: fresh(1)})


def test_a_base_that_rotted_keeps_only_the_packs_that_need_it() -> None:
    repo, ids = line(3, drifting)
    forget(repo, ids[1])
    packs = {pack_of(repo, snapshot_id) for snapshot_id in ids}
    spoil(repo, pack_of(repo, ids[0]))
    condemn(repo.handle.backend, packs)
    report = gc(open_on(repo.handle.backend))
    assert report.pending
    assert {pending.kind for pending in report.pending} == {"damage"}
    assert pack_of(repo, ids[0]) in packs_of(repo)


def copy_of(repo: Repository) -> MemoryBackend:
    return copied(repo.handle.backend)


def pack_of(repo: Repository, snapshot_id: SnapshotId) -> PackId:
    """Where the first manifest part lies, with all that was new in that save."""
    part_ids = read_record(repo.handle.backend, snapshot_id).part_ids
    return repo.handle.store.locate(part_ids[:1])[part_ids[0]][0].pack_id


# ---- little space --------------------------------------------------------------------------------------------------


class SmallDisk(MemoryBackend):
    """Holds so many bytes, like a disk: a pack being written counts."""

    def __init__(self) -> None:
        super().__init__()
        self.room_bytes: int | None = None

    def used_bytes(self) -> int:
        return sum(len(file.data) for file in self._files.values())

    def put_if_absent(self, name: str, data: Buffer) -> bool:
        self.charge(len(data), name)
        return super().put_if_absent(name, data)

    def compare_and_swap(self, name: str, *, expected: bytes | None, new: bytes | None) -> bool:
        self.charge(len(new or b""), name)
        return super().compare_and_swap(name, expected=expected, new=new)

    def claim(self, name: str, data: bytes) -> Any:
        self.charge(len(data), name)
        return super().claim(name, data)

    def create_stream(self, name: str) -> Any:
        sink = super().create_stream(name)
        write, written = sink.write, bytearray()

        def charged(*buffers: Buffer) -> None:
            for buffer in buffers:
                written.extend(buffer)
            self.charge(len(written), name)
            write(*buffers)

        sink.write = charged  # type: ignore[method-assign]
        return sink

    def charge(self, count_bytes: int, name: str) -> None:
        if self.room_bytes is not None and self.used_bytes() + count_bytes > self.room_bytes:
            raise NoSpaceError(f"{name}: no space")


def test_a_full_disk_is_collected_wholly_dead_packs_first() -> None:
    """Not even the claim fits: the reserve makes room for it."""
    disk = SmallDisk()
    repo, ids = line(4, backend=disk)
    gc(repo)  # makes the reserve
    forget(repo, *ids[:2])
    disk.room_bytes = disk.used_bytes()
    report = gc(repo)
    assert report.snapshots.keys() == set(ids[:2])
    assert report.freed_bytes > 18_000
    assert disk.stat("gc/reserve") is None or disk.used_bytes() <= disk.room_bytes
    check_whole(repo, {ids[2]: fresh(2), ids[3]: fresh(3)})
    repo.save(fresh(9), step=9)


def test_without_a_reserve_a_full_disk_is_said_to_be_full() -> None:
    disk = SmallDisk()
    repo, ids = line(2, backend=disk)
    forget(repo, ids[0])
    disk.room_bytes = disk.used_bytes()
    with pytest.raises(NoSpaceError):
        gc(repo)
    check_whole(repo, {ids[1]: fresh(1)})


def test_copies_that_do_not_fit_together_are_made_one_pack_at_a_time() -> None:
    disk = SmallDisk()
    options = RepositoryOptions(compression="none")
    repo = create_on(disk, options)
    ids = [repo.save(mixed(step), step=step).id for step in range(4)]
    kept = [repo.save({"keep": mixed(step)["keep"]}, branch=f"b{step}").id for step in range(4)]
    forget(repo, *ids)
    repo.delete_branch("main")
    packs = packs_of(repo)
    disk.room_bytes = disk.used_bytes() + 32_000  # one pack's live bytes are 20 000
    report = gc(repo, repack_below=0.9)
    assert len(report.packs_rewritten) == 4
    assert not [pending for pending in report.pending if pending.kind == "space"]
    assert len(packs & packs_of(repo)) == 4
    check_whole(repo, {snapshot: {"keep": mixed(step)["keep"]} for step, snapshot in enumerate(kept)})


def mixed(step: int) -> dict[str, Any]:
    generator = np.random.default_rng(step)
    return {"keep": generator.integers(0, 256, 20_000, np.uint8), "drop": generator.integers(0, 256, 40_000, np.uint8)}


def test_what_does_not_fit_at_all_stays_and_is_told() -> None:
    disk = SmallDisk()
    repo = create_on(disk, RepositoryOptions(compression="none"))
    gc(repo)
    first = repo.save(mixed(0)).id
    kept = repo.save({"keep": mixed(0)["keep"]}).id
    forget(repo, first)
    disk.room_bytes = disk.used_bytes() + 3000
    report = gc(repo, repack_below=0.9)
    assert [pending.kind for pending in report.pending] == ["space"]
    assert report.packs_rewritten == ()
    check_whole(repo, {kept: {"keep": mixed(0)["keep"]}})
    disk.room_bytes = None
    assert gc(repo).is_complete
    check_whole(repo, {kept: {"keep": mixed(0)["keep"]}})
    assert gc_files(repo) == []


# ---- units ---------------------------------------------------------------------------------------------------------


def row(offset: int, length: int = GRID_BYTES, *, in_run: bool = True) -> Row:
    return Row(ChunkId(bytes(16)), offset, length, length, 0, (), RecordKind.LEAF, in_run=in_run)


def test_whole_runs_are_copied_together_and_the_rest_by_itself() -> None:
    first = [row(4096), row(4096 + GRID_BYTES), row(4096 + 2 * GRID_BYTES, 77)]
    second = [row(5 * GRID_BYTES), row(6 * GRID_BYTES)]
    third = [row(8 * GRID_BYTES)]  # a header lies between
    table = [row(100, 50, in_run=False), *first, *second, *third, row(9 * GRID_BYTES + 500, 50, in_run=False)]

    def cut(wanted: Collection[int]) -> list[tuple[int, int, bool]]:
        return [(unit.place, len(unit.rows), unit.is_run) for unit in units(table, wanted)]

    assert cut(range(8)) == [(0, 1, False), (1, 3, True), (4, 2, True), (6, 1, True), (7, 1, False)]
    assert cut({1, 3, 4, 5, 6}) == [(1, 1, False), (3, 1, False), (4, 2, True), (6, 1, True)]
    assert cut({7}) == [(7, 1, False)]
    assert cut(()) == []


def test_a_condemned_pack_whose_table_was_damaged_since_is_left_to_repair() -> None:
    """gc deleted it by what a scan found: a record whose header had rotted too was lost, though parity had it."""
    repo, ids = line(3)
    (first,) = (
        pack for pack in packs_of(repo) if repo.handle.store.find([leaf_chunk(repo, ids[0])])[0][0].pack_id == pack
    )
    condemn(repo.handle.backend, [first])
    rewrite(repo.handle.backend, pack_name(first), rot_header_and_trailer)
    report = gc(open_on(repo.handle.backend))
    assert first in packs_of(repo)
    assert [pending.kind for pending in report.pending] == ["damage"]
    assert "castore repair" in report.pending[0].message
    again = gc(open_on(repo.handle.backend))
    assert first in packs_of(repo)
    assert again.freed_bytes == 0


def leaf_chunk(repo: Repository, snapshot_id: SnapshotId) -> ChunkId:
    entries = repo.handle.manifests.entries(read_record(repo.handle.backend, snapshot_id))
    return next(entry.chunk_ids(16)[0] for entry in entries if entry.chunks)


def rot_header_and_trailer(data: bytearray) -> None:
    data[HEADER_BYTES] ^= 1  # the magic of the first record
    data[-10] ^= 1
