"""Writers beside a collector: nobody relies on a condemned pack, and publish-then-check heals what went meanwhile.

The collector is made by hand, at every moment of the operation: it condemns packs (gc/<random>.condemned), later
deletes them, and in the end its file. It lists the roots again after the condemnation, so the only root that it fails
to see is one that was published after it began.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from castore.api import Repository
from castore.backend import MemoryBackend
from castore.errors import CastoreError, ChecksumError, FormatError
from castore.ids import PackId
from castore.leases import condemned_packs
from castore.options import RepositoryOptions
from tests.checkpoint.repositories import (
    Collector,
    HookedBackend,
    at_call,
    condemn,
    copied,
    create_on,
    delete_packs,
    open_on,
    packs_of,
)
from tests.checkpoint.states import State, assert_same, training_state


def drifted(step: int) -> State:
    """Dense training: every element changes a little, so later saves are stored as differences."""
    weights = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
    return {"weights": weights * np.float32(1 + 1e-5 * step), "fixed": np.arange(2000.0), "step": step}


def history() -> MemoryBackend:
    """Two saves on main, the second stored as differences from the first."""
    backend = MemoryBackend()
    repo = create_on(backend)
    repo.save(drifted(0), step=0)
    repo.save(drifted(1), step=1)
    return backend


def calls_of(backend: MemoryBackend, operation: Callable[[Repository], Any]) -> list[tuple[str, str]]:
    hooked = HookedBackend(copied(backend))
    operation(open_on(hooked))
    return hooked.calls


# ---- saves -------------------------------------------------------------------------------------------------------


def test_the_history_of_these_tests_has_differences() -> None:
    repo = open_on(history())
    first, second = repo.snapshot("main~1"), repo.snapshot("main")
    assert second.stored_bytes < first.stored_bytes / 2


@pytest.mark.parametrize("compression", ["auto", "none"])
def test_a_save_writes_again_what_only_condemned_packs_hold(compression: Any) -> None:
    repo = create_on(MemoryBackend(), RepositoryOptions(compression=compression))
    first = repo.save(training_state(1), step=1)
    condemned = packs_of(repo)
    condemn(repo.handle.backend, condemned)
    again = repo.save(training_state(1))
    assert again.new_bytes == first.new_bytes
    assert again.state_id == first.state_id
    delete_packs(repo.handle.backend, condemned)
    with open_on(repo.handle.backend) as other:
        assert_same(other.load(again.id), training_state(1))
    # The chunks that were written again are there for the next one.
    assert repo.save(training_state(1)).new_bytes == 0


def test_a_save_takes_no_difference_from_a_condemned_chunk() -> None:
    """Nor from a chunk whose own base is condemned."""
    for condemned_save in (0, 1):
        backend = MemoryBackend()
        repo = create_on(backend)
        packs: list[frozenset[PackId]] = [frozenset()]
        for step in range(2):
            repo.save(drifted(step), step=step)
            packs.append(packs_of(repo))
        condemned = packs[condemned_save + 1] - packs[condemned_save]
        condemn(backend, condemned)
        snapshot = repo.save(drifted(2), step=2)
        delete_packs(backend, condemned)
        assert_same(open_on(backend).load(snapshot.id), drifted(2))


def test_a_collection_that_begins_at_any_call_before_the_publication_loses_nothing() -> None:
    """And ends at any call after that, or never."""
    backend = history()

    def save(repo: Repository) -> Any:
        return repo.save({**drifted(2), "note": "new"}, step=2)

    calls = calls_of(backend, save)
    published = [operation for operation, _ in calls].index("put_if_absent")
    for begin in range(published + 1):
        for end in range(begin, len(calls) + 1):
            own = copied(backend)
            collector = Collector(own)
            hooks = (at_call(begin, collector.begin), at_call(end, collector.end))
            hooked = HookedBackend(own, lambda *call, hooks=hooks: [hook(*call) for hook in hooks])
            snapshot = save(open_on(hooked))
            if end >= len(calls):
                collector.end()
            state = open_on(own).load(snapshot.id)
            assert_same(state, {**drifted(2), "note": "new"})


def test_a_resave_heals_when_its_packs_go_between_look_up_and_publication() -> None:
    """The save that writes no chunk of its own is the one that relies on others most."""
    backend = history()
    calls = calls_of(backend, lambda repo: repo.save(drifted(1)))
    published = [operation for operation, _ in calls].index("put_if_absent")
    for gone in range(published + 1):
        own = copied(backend)

        def collect(own: MemoryBackend = own) -> None:
            delete_packs(own, packs_of(open_on(own)))

        snapshot = open_on(HookedBackend(own, at_call(gone, collect))).save(drifted(1))
        assert_same(open_on(own).load(snapshot.id), drifted(1))


def test_healing_goes_on_until_a_look_finds_everything() -> None:
    """A collector that condemns what was just written again, twice."""
    backend = history()
    published: list[str] = []
    rounds: list[str] = []

    def condemn_all(operation: str, name: str) -> None:
        if operation == "put_if_absent":
            published.append(name)
        if (operation, name) == ("list", "gc/") and published and len(rounds) < 3:
            rounds.append(condemn(backend, packs_of(open_on(backend))))

    before = packs_of(open_on(backend))
    snapshot = open_on(HookedBackend(backend, condemn_all)).save(drifted(2), step=2)
    condemned = condemned_packs(backend)
    assert len(condemned - before) == 3, "what was written again was not condemned again"
    delete_packs(backend, condemned)
    assert_same(open_on(backend).load(snapshot.id), drifted(2))


def test_a_save_refuses_to_guess_what_is_condemned() -> None:
    backend = history()
    head = open_on(backend).snapshot("main").id
    backend.put_if_absent("gc/00.condemned", b"torn")
    with pytest.raises(FormatError, match=r"gc/00\.condemned"):
        open_on(backend).save(drifted(2))
    assert open_on(backend).snapshot("main").id == head
    assert_same(open_on(backend).load("main"), drifted(1))
    backend.delete("gc/00.condemned")
    backend.put_if_absent("gc/notes.txt", b"other files there mean nothing")
    open_on(backend).save(drifted(2))


# ---- branches and tags -------------------------------------------------------------------------------------------


def orphaned() -> tuple[MemoryBackend, str]:
    """An orphan whose chunks are differences from those of a snapshot that is still on main."""
    backend = history()
    repo = open_on(backend)
    orphan = repo.save(drifted(2), step=2, branch="lost", parent="main")
    repo.delete_branch("lost")
    return backend, orphan.id


ROOTS: dict[str, Callable[[Repository, str], object]] = {
    "branch": lambda repo, target: repo.branch("kept", at=target),
    "move": lambda repo, target: repo.branch("main", at=target, move=True),
    "tag": lambda repo, target: repo.tag("kept", at=target),
}


@pytest.mark.parametrize("kind", ROOTS)
def test_a_new_ref_copies_what_it_needs_out_of_condemned_packs(kind: str) -> None:
    backend, orphan = orphaned()
    condemned = packs_of(open_on(backend))
    condemn(backend, condemned)
    ROOTS[kind](open_on(backend), orphan)
    assert packs_of(open_on(backend)) > condemned
    delete_packs(backend, condemned)
    assert_same(open_on(backend).load(orphan), drifted(2))


@pytest.mark.parametrize("kind", ROOTS)
def test_a_new_ref_copies_what_rests_on_a_condemned_base(kind: str) -> None:
    """The differences stood in packs that stay; only the base's pack was condemned, and they went blind with it."""
    backend, orphan = orphaned()
    repo = open_on(backend)
    for pack_id in sorted(packs_of(repo)):
        own = copied(backend)
        condemn(own, {pack_id})
        ROOTS[kind](open_on(own), orphan)
        delete_packs(own, {pack_id})
        assert_same(open_on(own).load(orphan), drifted(2))


def test_a_copy_out_of_a_condemned_pack_launders_no_rot() -> None:
    backend, orphan = orphaned()
    for pack_id in sorted(packs_of(open_on(backend))):
        name = f"packs/{pack_id[:2]}/{pack_id}.pack"
        data = bytearray(backend.read(name, max_bytes=1 << 20))
        data[150] ^= 1  # in the payload of its first record
        backend.delete(name)
        backend.put_if_absent(name, data)
    condemn(backend, packs_of(open_on(backend)))
    with pytest.raises(ChecksumError):
        open_on(backend).branch("kept", at=orphan)
    # Nothing points at what could not be saved.
    assert [ref.name for ref in open_on(backend).branches()] == ["main"]


@pytest.mark.parametrize("kind", ["branch", "tag"])
def test_a_ref_made_beside_a_collection_is_whole_or_refused(kind: str) -> None:
    """A collector that began before our lease and listed the roots before our ref may be through before our check: the
    condemned set was empty again by then, and the ref was reported over a snapshot without chunks.
    """
    backend, orphan = orphaned()

    def collect(own: MemoryBackend, collector: Collector) -> None:
        own.delete(f"snapshots/{orphan}")
        collector.end()

    refused = 0
    record = backend.read(f"snapshots/{orphan}", max_bytes=1 << 20)
    beside = copied(backend)
    Collector(beside).begin()
    calls = calls_of(beside, lambda repo: ROOTS[kind](repo, orphan))
    for end in range(len(calls)):
        own = copied(backend)
        collector = Collector(own)
        collector.begin()
        hook = at_call(end, lambda own=own, collector=collector: collect(own, collector))
        try:
            ROOTS[kind](open_on(HookedBackend(own, hook)), orphan)
        except CastoreError:
            refused += 1
            repo = open_on(own)
            assert "kept" not in {ref.name for ref in (*repo.branches(), *repo.tags())}
        else:
            # All that it needs was copied out before; the snapshot file itself is put back to see it.
            own.put_if_absent(f"snapshots/{orphan}", record)
            assert_same(open_on(own).load("kept"), drifted(2))
    assert 0 < refused < len(calls)
