"""Each rule of gc is needed: the search that finds nothing in castore finds the loss when one rule is broken.

A mutation is a patch of the real code, made here and nowhere else. Each names the scenario in which it loses something.
The same search over the same scenario finds nothing without it: in full where it goes one turn deep, in a seeded sample
where it goes two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest

from castore.backend.base import Backend
from castore.checkpoint.session import WriteSession
from castore.chunk_writer import ChunkWriter
from castore.ids import PackId, new_pack_id
from castore.leases import Condemned, list_claims, read_condemned
from castore.maintenance.gc.collect import _Collection
from castore.maintenance.gc.survey import Survey
from castore.store import ChunkStore, pack_sizes
from tests.proof.effort import effort
from tests.proof.scenarios import SCENARIOS, past
from tests.proof.scheduler import explore

Mutation = Callable[[], AbstractContextManager[object]]

SAMPLED_RUNS = effort(100, 3000)


def skip_the_drain() -> AbstractContextManager[object]:
    """Sweep at once, whoever is still at work."""

    def drain(self: _Collection, condemned: list[Condemned]) -> Any:
        return condemned, {found.name: [] for found in condemned}

    return mock.patch.object(_Collection, "_drain", drain)


@contextmanager
def list_roots_before_the_drain() -> Iterator[None]:
    """See the roots when the condemned file is durable, and not again after the writers have ended."""
    condemn, look_again = _Collection._condemn, Survey.look_again

    def condemn_and_look(self: _Collection, survey: Survey, plan: Any) -> None:
        condemn(self, survey, plan)
        look_again(survey)

    with (
        mock.patch.object(_Collection, "_condemn", condemn_and_look),
        mock.patch.object(Survey, "look_again"),
    ):
        yield


@contextmanager
def check_before_publishing() -> Iterator[None]:
    """A save looks whether its chunks are still there when they are written, and not after its snapshot is visible."""
    write, heal = WriteSession.write, WriteSession.heal

    def write_and_check(self: WriteSession, *args: Any, **options: Any) -> int:
        written = write(self, *args, **options)
        with mock.patch.object(WriteSession, "write", write):
            heal(self)
        return written

    with (
        mock.patch.object(WriteSession, "write", write_and_check),
        mock.patch.object(WriteSession, "heal"),
    ):
        yield


@contextmanager
def let_condemnation_be_revoked() -> Iterator[None]:
    """A save takes a condemnation for void when its collector seems to be dead."""

    def condemned_by_the_living(backend: Backend) -> frozenset[PackId]:
        if not any(claim.held for claim in list_claims(backend, "gc/") if claim.name.endswith(".collector")):
            return frozenset()
        return frozenset[PackId]().union(*(found.packs for found in read_condemned(backend)))

    with mock.patch("castore.checkpoint.session.condemned_packs", condemned_by_the_living):
        yield


@contextmanager
def reuse_pack_names() -> Iterator[None]:
    """A new pack gets the name of one that is gone."""

    def name_for(backend: Any) -> PackId:
        shared = getattr(backend, "_world", None)
        there = pack_sizes(shared.backend) if shared is not None else {}
        gone = sorted(pack_sizes(past().history.backend).keys() - there.keys())
        return gone[0] if gone else new_pack_id()

    open_pack = ChunkWriter._open_pack

    def open_reused(self: ChunkWriter) -> Any:
        with mock.patch("castore.chunk_writer.new_pack_id", return_value=name_for(self._backend)):
            return open_pack(self)

    with mock.patch.object(ChunkWriter, "_open_pack", open_reused):
        yield


class _EveryPack(frozenset[PackId]):
    """A listing that nobody took: whatever is asked for stands."""

    def __contains__(self, pack_id: object) -> bool:
        return True

    def __sub__(self, condemned: Iterable[object]) -> frozenset[PackId]:  # type: ignore[override]
        without = frozenset(condemned)

        class Rest(frozenset[PackId]):
            def __contains__(self, pack_id: object) -> bool:
                return pack_id not in without

        return Rest()


@contextmanager
def trust_the_index() -> Iterator[None]:
    """What the index knows is there: packs are listed to learn of new ones, and never to doubt an old one."""
    forget_nothing = mock.patch.object(ChunkStore, "refresh", _refresh_without_forgetting)
    with forget_nothing, mock.patch("castore.checkpoint.session.list_packs", return_value=_EveryPack()):
        yield


def _refresh_without_forgetting(self: ChunkStore) -> frozenset[PackId]:
    with self._lock:
        known = self._index.packs()
        self._sizes = dict.fromkeys(known, 1 << 60) | pack_sizes(self._backend)
        self._add_tables(sorted(self._sizes.keys() - known))
        self._listing = frozenset(self._sizes)
        return self._listing


@contextmanager
def leave_bases_out_of_the_check() -> Iterator[None]:
    """The check of a save asks for its own records, and not for what they rest on."""
    heal = WriteSession.heal

    def heal_the_top(self: WriteSession) -> None:
        self._relied_on = {chunk_id: rests_on[:1] for chunk_id, rests_on in self._relied_on.items()}
        heal(self)

    with mock.patch.object(WriteSession, "heal", heal_the_top):
        yield


@dataclass(frozen=True)
class Broken:
    """A rule that is broken, and where that shows."""

    mutation: Mutation
    scenario: str
    turns_max: int = 1
    kills_max: int = 0

    def search(self, *, runs_max: int | None = None) -> int:
        """Every schedule within these bounds, or a seeded sample of so many."""
        run = SCENARIOS[self.scenario].run
        return explore(run, turns_max=self.turns_max, kills_max=self.kills_max, runs_max=runs_max)


MUTATIONS = {
    "skip the drain": Broken(skip_the_drain, "branch at what is going", 2, 1),
    "list roots before the drain": Broken(list_roots_before_the_drain, "branch at what is going", 2, 1),
    "check before publishing": Broken(check_before_publishing, "far: save of what is going"),
    "let condemnation be revoked": Broken(let_condemnation_be_revoked, "far: a collector that sleeps"),
    "reuse pack names": Broken(reuse_pack_names, "far: collect and save"),
    "trust the index without the pack listing": Broken(trust_the_index, "far: two saves"),
    "leave bases out of the check": Broken(leave_bases_out_of_the_check, "far: differences from what is going"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_rule_loses_something_and_the_search_finds_it(name: str) -> None:
    broken = MUTATIONS[name]
    past()  # made by the code as it is
    with broken.mutation(), pytest.raises(AssertionError, match="LOST") as caught:
        broken.search()
    assert "schedule" in caught.value.__notes__[0]


@pytest.mark.slow
@pytest.mark.timeout(effort(600, 7200))
@pytest.mark.parametrize("name", MUTATIONS)
def test_the_same_search_finds_nothing_in_castore_as_it_is(name: str) -> None:
    broken = MUTATIONS[name]
    if broken.turns_max == 1:
        assert broken.search() > 10
    else:
        assert broken.search(runs_max=SAMPLED_RUNS) == SAMPLED_RUNS
