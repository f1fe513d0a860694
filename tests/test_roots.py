"""What is live, what may go, and when nothing may."""

from __future__ import annotations

import pytest

from castore.api import Repository
from castore.backend import MemoryBackend
from castore.errors import DamageError
from castore.format.layout import branch_name, forgotten_name, orphan_name, snapshot_name, thin_name
from castore.ids import SnapshotId
from castore.leases import writer_lease
from castore.marks import Forgotten, Thinning, forget_snapshot, note_orphan, replace_forgotten, thin_snapshot
from castore.roots import Roots, live_roots
from castore.snapshots import ancestry, read_record
from tests.checkpoint.repositories import create_on

LATER_NS = 1 << 62
GRACE_NS = 10


@pytest.fixture
def repository() -> Repository:
    return create_on(MemoryBackend())


def line(repository: Repository, count: int, *, branch: str = "main", first: int = 0) -> list[SnapshotId]:
    """Snapshots of a branch, oldest first."""
    return [repository.save({"step": step}, step=step, branch=branch).id for step in range(first, first + count)]


def forget(repository: Repository, *snapshot_ids: SnapshotId) -> None:
    backend = repository.handle.backend
    for snapshot_id in snapshot_ids:
        record = read_record(backend, snapshot_id)
        mark = Forgotten(snapshot_id, record.parents, record.branch, record.step, record.time_ns, 1, "a test")
        forget_snapshot(backend, mark)


def sweep(repository: Repository, *snapshot_ids: SnapshotId) -> None:
    for snapshot_id in snapshot_ids:
        assert repository.handle.backend.delete(snapshot_name(snapshot_id))


def roots(repository: Repository, *, now_ns: int = LATER_NS) -> Roots:
    return live_roots(repository.handle.backend, now_ns=now_ns, grace_ns=GRACE_NS)


def test_everything_a_ref_reaches_is_live(repository: Repository) -> None:
    ids = line(repository, 3)
    repository.branch("side", at=ids[1])
    side = line(repository, 2, branch="side", first=10)
    found = roots(repository)
    assert found.live.keys() == {*ids, *side}
    assert (found.dead, found.orphans, found.damaged, found.missing, found.stale_marks) == ({}, {}, {}, {}, ())


def test_forgotten_snapshots_may_go_and_history_behind_them_stays(repository: Repository) -> None:
    ids = line(repository, 5)
    forget(repository, ids[1], ids[2])
    found = roots(repository)
    assert found.live.keys() == {ids[0], ids[3], ids[4]}
    assert found.dead == dict.fromkeys((ids[1], ids[2]), "forgotten: a test")
    assert (found.missing, found.stale_marks) == ({}, ())
    assert [s.id for s in repository.log()] == [ids[4], ids[3], ids[0]]
    sweep(repository, ids[1], ids[2])
    found = roots(repository)
    assert found.live.keys() == {ids[0], ids[3], ids[4]}
    assert (found.dead, found.missing, found.stale_marks) == ({}, {}, (forgotten_name(ids[1]),))
    assert [s.id for s in repository.log()] == [ids[4], ids[3], ids[0]]


def test_a_ref_outweighs_a_marker(repository: Repository) -> None:
    ids = line(repository, 3)
    repository.tag("best", at=ids[1])
    forget(repository, ids[1], ids[2])
    assert roots(repository).live.keys() == {*ids}


def test_tombstones_in_a_row_are_drawn_together(repository: Repository) -> None:
    ids = line(repository, 7)
    repository.branch("fork", at=ids[3])
    line(repository, 1, branch="fork", first=20)
    forget(repository, *ids[1:6])
    found = roots(repository)
    assert (found.contracted, found.stale_marks) == ({}, ()), "their files are there: undelete may bring them back"
    sweep(repository, *ids[1:6])
    found = roots(repository)
    assert {name: new.parents for name, (_, new) in found.contracted.items()} == {
        ids[5]: (ids[0],),
        ids[3]: (ids[0],),
    }
    assert {name: new.count for name, (_, new) in found.contracted.items()} == {ids[5]: 5, ids[3]: 3}
    assert set(found.stale_marks) == {forgotten_name(ids[number]) for number in (1, 2, 4)}
    for old, new in found.contracted.values():
        assert not replace_forgotten(repository.handle.backend, new, expected=new), "another one is there"
        assert replace_forgotten(repository.handle.backend, new, expected=old)
    for name in found.stale_marks:
        repository.handle.backend.delete(name)
    again = roots(repository)
    assert again.live.keys() == found.live.keys()
    assert (again.contracted, again.stale_marks, again.missing) == ({}, (), {})
    assert [snapshot.step for snapshot in repository.log()] == [6, 0]
    assert [snapshot.step for snapshot in repository.log("fork")] == [20, 0]


def test_a_tombstone_goes_when_no_history_reaches_through_it(repository: Repository) -> None:
    ids = line(repository, 4)
    forget(repository, ids[0], ids[1])
    sweep(repository, ids[0])
    assert roots(repository).stale_marks == ()
    forget(repository, ids[2])
    sweep(repository, ids[1], ids[2])
    assert set(roots(repository).stale_marks) == {forgotten_name(ids[0]), forgotten_name(ids[1])}
    repository.save({"other": 1}, branch="other")
    note_orphan(repository.handle.backend, ids[3], now_ns=1)
    repository.delete_branch("main")
    found = roots(repository)
    assert found.dead == {ids[3]: "no branch or tag reaches it"}
    assert forgotten_name(ids[2]) not in found.stale_marks, "a later branch may still adopt what descends from it"
    sweep(repository, ids[3])
    found = roots(repository)
    assert set(found.stale_marks) >= {forgotten_name(snapshot_id) for snapshot_id in ids[:3]}
    assert orphan_name(ids[3]) in found.stale_marks


def test_orphans_stay_for_their_grace_period_with_all_they_descend_from(repository: Repository) -> None:
    line(repository, 1)
    side = line(repository, 3, branch="side", first=10)
    saved_ns = read_record(repository.handle.backend, side[2]).time_ns
    (repository.handle.backend).delete(branch_name("side"))
    found = roots(repository, now_ns=saved_ns + GRACE_NS)
    assert set(side) <= found.live.keys()
    assert found.orphans == {side[2]: saved_ns + GRACE_NS}
    assert roots(repository, now_ns=saved_ns + GRACE_NS + 1).dead.keys() == set(side)


def test_the_grace_period_of_an_old_snapshot_starts_when_its_ref_goes(repository: Repository) -> None:
    line(repository, 1)
    side = line(repository, 2, branch="side", first=10)
    repository.handle.backend.delete(branch_name("side"))
    note_orphan(repository.handle.backend, side[1], now_ns=LATER_NS)
    found = roots(repository, now_ns=LATER_NS + GRACE_NS)
    assert set(side) <= found.live.keys()
    assert found.stale_marks == ()
    late = roots(repository, now_ns=LATER_NS + GRACE_NS + 1)
    assert late.dead.keys() == set(side)
    assert late.stale_marks == (orphan_name(side[1]),)


def test_an_orphan_that_a_save_under_way_may_have_made_stays(repository: Repository) -> None:
    ids = line(repository, 2)
    backend = repository.handle.backend
    saved_ns = read_record(backend, ids[1]).time_ns
    repository.branch("main", at=ids[0], move=True)
    with writer_lease(backend, purpose="save", now_ns=saved_ns):
        assert ids[1] in roots(repository).live
    assert ids[1] in roots(repository).dead


def test_a_snapshot_that_cannot_be_read_is_named_unless_it_was_forgotten(repository: Repository) -> None:
    ids = line(repository, 3)
    backend = repository.handle.backend
    spoil(repository, snapshot_name(ids[1]))
    found = roots(repository)
    assert found.damaged.keys() == {ids[1]}
    assert ids[1] not in found.dead
    forget_snapshot(backend, Forgotten(ids[1], (ids[0],), "main", None, 0, 1, "damaged"))
    found = roots(repository)
    assert (found.damaged, found.missing) == ({}, {})
    assert found.live.keys() == {ids[0], ids[2]}
    assert found.dead.keys() == {ids[1]}


def test_a_parent_or_head_that_is_gone_without_a_marker_is_missing(repository: Repository) -> None:
    ids = line(repository, 3)
    sweep(repository, ids[1])
    assert roots(repository).missing == {ids[1]: f"snapshot {ids[2][:12]}"}
    sweep(repository, ids[2])
    assert roots(repository).missing == {ids[2]: "branch 'main'"}


def test_overlays_of_live_snapshots_are_given_and_those_of_gone_ones_are_stale(repository: Repository) -> None:
    ids = line(repository, 2)
    backend = repository.handle.backend
    for snapshot_id in (*ids, SnapshotId("ab" * 16)):
        thin_snapshot(backend, Thinning(snapshot_id, ("step",), 1))
    found = roots(repository)
    assert found.thinnings.keys() == set(ids)
    assert found.stale_marks == (thin_name(SnapshotId("ab" * 16)),)


@pytest.mark.parametrize("name", [forgotten_name, thin_name, lambda _: branch_name("main")])
def test_a_damaged_ref_or_mark_is_an_error_because_to_guess_would_be_to_lose_data(repository: Repository, name) -> None:
    ids = line(repository, 2)
    backend = repository.handle.backend
    forget(repository, ids[0])
    thin_snapshot(backend, Thinning(ids[0], ("step",), 1))
    spoil(repository, name(ids[0]))
    with pytest.raises(DamageError):
        roots(repository)


def test_tombstones_that_name_each_other_do_not_hang(repository: Repository) -> None:
    ids = line(repository, 2)
    backend = repository.handle.backend
    other = SnapshotId("ab" * 16)
    forget_snapshot(backend, Forgotten(ids[0], (other,), "main", None, 0, 1, "forged"))
    forget_snapshot(backend, Forgotten(other, (ids[0],), "main", None, 0, 1, "forged"))
    assert [snapshot_id for snapshot_id, _ in ancestry(backend, ids[1])] == [ids[1]]
    assert roots(repository).live.keys() == {ids[1]}


def spoil(repository: Repository, name: str) -> None:
    backend = repository.handle.backend
    data = backend.read(name, max_bytes=1 << 20)
    backend.compare_and_swap(name, expected=data, new=data[:-9] + bytes(9))
