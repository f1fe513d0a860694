"""What a chunk rests on: all of its bases, each less deep than what rests on it."""

from __future__ import annotations

import string
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from castore.closure import closure
from castore.format.pack import DEPTH_MAX, RecordKind, Row
from castore.ids import ChunkId
from castore.index.base import Location
from castore.store import Locations
from tests.checkpoint.test_bases import NONE, Store, location, named, pack

NAMES = "abcdef"


def resting_on(name: str, bases: str, *, depth: int, in_pack: int = 1) -> Location:
    chain = ((), (16,), (17,))[len(bases)]
    base_ids = tuple(map(named, bases))
    return Location(pack(in_pack), Row(named(name), 96, 10, 100, 0, chain, RecordKind.LEAF, depth, base_ids))


def found(*locations: Location, condemned: frozenset[Any] = NONE) -> dict[ChunkId, Locations]:
    return closure(map(named, NAMES), Store(locations), condemned)  # type: ignore[arg-type]


COPY = [resting_on("c", "ab", depth=2), location("a", in_pack=2), resting_on("b", "a", depth=1, in_pack=3)]


def test_both_bases_and_what_they_rest_on_are_in_it() -> None:
    copy, first, second = COPY
    assert found(*COPY)[named("c")] == (copy, first, second)


def test_a_chunk_is_there_only_with_both_of_its_bases() -> None:
    for absent in COPY[1:]:
        assert named("c") not in found(*(each for each in COPY if each is not absent))
        assert named("c") not in found(*COPY, condemned=frozenset({absent.pack_id}))


def test_a_base_as_deep_as_what_rests_on_it_is_none() -> None:
    for depth in (2, 3):
        assert named("c") not in found(COPY[0], COPY[1], resting_on("b", "a", depth=depth))


def test_another_place_of_a_base_will_do() -> None:
    spare = location("b", in_pack=4)
    assert found(*COPY, spare, condemned=frozenset({pack(3)}))[named("c")] == (COPY[0], COPY[1], spare)


def test_a_tree_of_bases_that_a_stranger_made_is_walked_once() -> None:
    """Two bases at each of 40 levels are 2 ** 39 paths to one chunk."""
    names = string.ascii_letters[:40]
    levels = [location(names[0])]
    levels += [resting_on(names[depth], names[depth - 1] * 2, depth=depth) for depth in range(1, 40)]
    (rests_on,) = closure([named(names[-1])], Store(levels), NONE).values()  # type: ignore[arg-type]
    assert len(rests_on) == len(levels)


any_location = st.builds(
    lambda name, bases, depth, number: resting_on(name, bases, depth=depth if bases else 0, in_pack=number),
    st.sampled_from(NAMES),
    st.text(NAMES, max_size=2),
    st.integers(1, DEPTH_MAX),
    st.integers(1, 4),
)


@given(st.lists(any_location, max_size=16), st.sets(st.integers(1, 4), max_size=2))
def test_whatever_the_packs_say_every_walk_ends_at_chunks_that_stand_by_themselves(
    locations: list[Location], condemned_numbers: set[int]
) -> None:
    condemned = frozenset(map(pack, condemned_numbers))
    for chunk_id, rests_on in found(*locations, condemned=condemned).items():
        assert rests_on[0].row.chunk_id == chunk_id
        assert not {hit.pack_id for hit in rests_on} & condemned
        for hit in rests_on:
            for base_id in hit.row.base_ids:
                assert any(other.row.chunk_id == base_id and other.row.depth < hit.row.depth for other in rests_on)
