"""Which chunk a difference is taken from: places, depth, and the proof that no cycle can arise."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from castore import chunk_writer
from castore.api import Repository
from castore.backend import MemoryBackend
from castore.checkpoint import bases
from castore.checkpoint.bases import Base, candidates, plan_bases, reference_of
from castore.closure import closure
from castore.codec.chooser import Encoded
from castore.format.manifest import Entry, Kind
from castore.format.pack import RecordKind, Row
from castore.hashing import hasher_for
from castore.ids import ChunkId, PackId
from castore.index.base import Location
from castore.options import DELTA_DEPTH_MAX, GRID_BYTES
from castore.store import preference
from castore.tensors import flatten
from tests.checkpoint.repositories import create_on, open_on

HASHER = hasher_for("xxh3-128")
NONE: frozenset[PackId] = frozenset()


def named(name: str) -> ChunkId:
    return HASHER.chunk_id(name.encode())


def pack(number: int) -> PackId:
    return PackId(f"{number:032x}")


def location(name: str, *, base: str | None = None, depth: int | None = None, in_pack: int = 1) -> Location:
    level = depth if depth is not None else int(base is not None)
    base_ids = (named(base),) if base is not None else ()
    row = Row(named(name), 96, 10, 100, 0, (16,) if base else (), RecordKind.LEAF, level, base_ids)
    return Location(pack(in_pack), row)


class Store:
    """What planning asks of a store."""

    def __init__(self, locations: Iterable[Location]) -> None:
        self._by_id: dict[ChunkId, list[Location]] = {}
        for found in locations:
            self._by_id.setdefault(found.row.chunk_id, []).append(found)

    def find_sound(self, ids: Sequence[ChunkId]) -> list[tuple[Location, ...]]:
        hits = (self._by_id.get(chunk_id, ()) for chunk_id in ids)
        return [tuple(sorted(found, key=lambda hit: preference(hit.row))) for found in hits]


def plan(wanted: Mapping[str, str], *locations: Location, condemned: frozenset[PackId] = NONE) -> dict[ChunkId, Base]:
    by_id = {named(chunk): named(base) for chunk, base in wanted.items()}
    return plan_bases(by_id, Store(locations), condemned)  # type: ignore[arg-type]


# ---- candidates --------------------------------------------------------------------------------------------------


def entry(path: str, chunks: str, *, raw_bytes: int | None = None, dtype: str = "float32", **other: Any) -> Entry:
    """A leaf whose chunks are named by letters."""
    like = next(found for found in flatten({"leaf": np.zeros(100, np.float32)}).entries if found.path == "leaf")
    length = raw_bytes if raw_bytes is not None else len(chunks) * GRID_BYTES
    fields = {name: getattr(like, name) for name in like.__dataclass_fields__}
    fields |= {"path": path, "dtype": dtype, "raw_bytes": length} | other
    return Entry(**{**fields, "chunks": b"".join(map(named, chunks)) or None})


def found_for(now: Entry, before: Entry) -> dict[ChunkId, ChunkId]:
    return candidates([now], [before], id_bytes=HASHER.digest_bytes)


def test_the_candidate_is_the_chunk_at_the_same_place() -> None:
    assert found_for(entry("w", "ABC"), entry("w", "abc")) == {
        named("A"): named("a"),
        named("B"): named("b"),
        named("C"): named("c"),
    }


@pytest.mark.parametrize(
    "before",
    [
        entry("other", "a"),
        entry("w", "a", dtype="int32"),
        entry("w", "a", dtype="float64"),
        entry("w", "a", kind=Kind.TENSOR),
        entry("w", "a", raw_bytes=GRID_BYTES - 4),
        entry("w", ""),
        entry("w", "A"),
    ],
)
def test_no_candidate_where_path_type_or_length_differ_or_nothing_changed(before: Entry) -> None:
    assert found_for(entry("w", "A"), before) == {}


def test_of_a_leaf_that_grew_the_full_chunks_have_candidates() -> None:
    now = entry("w", "ABC", raw_bytes=2 * GRID_BYTES + 8)
    assert found_for(now, entry("w", "ab", raw_bytes=GRID_BYTES + 8)) == {named("A"): named("a")}
    assert found_for(entry("w", "ab", raw_bytes=GRID_BYTES + 8), now) == {named("a"): named("A")}


def test_a_chunk_that_stands_at_two_places_has_one_candidate() -> None:
    assert found_for(entry("w", "AA"), entry("w", "ab")) == {named("A"): named("a")}


# ---- planning ----------------------------------------------------------------------------------------------------


def test_a_candidate_at_the_bound_is_passed_over_for_its_base() -> None:
    chain = [location("a"), location("b", base="a"), location("c", base="b", depth=2)]
    assert DELTA_DEPTH_MAX == 2
    for candidate, base in (("a", "a"), ("b", "b"), ("c", "b")):
        planned = plan({"new": candidate}, *chain)[named("new")]
        assert planned.chunk_id == named(base)
        assert planned.depth < DELTA_DEPTH_MAX
        assert planned.rests_on[-1].row.base_ids == ()


def test_records_deeper_than_we_write_are_passed_over_too() -> None:
    names = "abcdef"
    chain = [location("a")]
    chain += [location(name, base=names[at], depth=at + 1) for at, name in enumerate(names[1:])]
    assert plan({"new": "f"}, *chain)[named("new")].chunk_id == named("b")


def test_a_chunk_never_rests_on_itself() -> None:
    chain = [location("a"), location("b", base="a"), location("c", base="b", depth=2)]
    assert plan({"b": "c"}, *chain) == {}
    assert plan({"a": "a"}, *chain) == {}


def test_without_a_whole_chain_there_is_no_base() -> None:
    assert plan({"new": "a"}) == {}
    assert plan({"new": "b"}, location("b", base="a")) == {}


def test_condemned_packs_are_no_base_and_no_part_of_one() -> None:
    chain = [location("a", in_pack=1), location("b", base="a", in_pack=2)]
    assert named("new") in plan({"new": "b"}, *chain)
    for number in (1, 2):
        assert plan({"new": "b"}, *chain, condemned=frozenset({pack(number)})) == {}
    spare = location("b", in_pack=3)
    planned = plan({"new": "b"}, *chain, spare, condemned=frozenset({pack(1)}))[named("new")]
    assert planned.rests_on == (spare,)


def test_the_least_deep_place_is_taken() -> None:
    spare = location("b", in_pack=3)
    planned = plan({"new": "b"}, location("a"), location("b", base="a"), spare)[named("new")]
    assert planned.rests_on == (spare,)


def test_what_the_next_save_rests_on_is_what_memory_keeps() -> None:
    """`reference_of` says which copies are worth keeping; it must be what `plan_bases` takes."""
    chain = [location("a"), location("b", base="a"), location("c", base="b", depth=2)]
    for candidate in "abc":
        (rests_on,) = closure([named(candidate)], Store(chain), NONE).values()  # type: ignore[arg-type]
        assert plan({"new": candidate}, *chain)[named("new")].chunk_id == reference_of(rests_on)


# ---- references move ---------------------------------------------------------------------------------------------


def test_one_chunk_in_so_many_moves_its_reference_to_the_anchor(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = [location("a"), location("b", base="a"), location("c", base="b", depth=2)]
    number = int.from_bytes(named("c")[:4], "little")
    for every, expected in ((number, "a"), (number + 1, "b"), (2**32, "b")):
        monkeypatch.setattr(bases, "REFERENCE_MOVES_EVERY", every)
        planned = plan({"new": "c"}, *chain)[named("new")]
        assert (planned.chunk_id, planned.depth) == (named(expected), "ab".index(expected))


def test_a_reference_that_was_just_made_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bases, "REFERENCE_MOVES_EVERY", 1)
    assert plan({"new": "b"}, location("a"), location("b", base="a"))[named("new")].chunk_id == named("b")
    assert plan({"new": "a"}, location("a"))[named("new")].chunk_id == named("a")


@pytest.mark.parametrize("every", [1, 2])
def test_a_history_whose_references_move_is_read_back(monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    monkeypatch.setattr(bases, "REFERENCE_MOVES_EVERY", every)
    repo = create_on(MemoryBackend())
    snapshots = [repo.save(drifted(step), step=step) for step in range(8)]
    depths = {hit.row.depth for hits in repo.handle.store.find(list(kept(repo))) for hit in hits}
    assert depths <= {0, 1}
    for step, snapshot in enumerate(snapshots):
        assert repo.load(snapshot.id)["w"].tobytes() == drifted(step)["w"].tobytes()


# ---- no cycle ----------------------------------------------------------------------------------------------------

NAMES = "abcde"
any_location = st.builds(
    lambda name, base, depth, number: location(name, base=base, depth=depth if base else 0, in_pack=number),
    st.sampled_from(NAMES),
    st.none() | st.sampled_from(NAMES),
    st.integers(0, 6),
    st.integers(1, 4),
)


@given(st.lists(any_location, max_size=14), st.sets(st.integers(1, 4), max_size=2))
def test_whatever_the_packs_say_a_chunk_rests_on_ever_less_deep_records(
    locations: list[Location], condemned_numbers: set[int]
) -> None:
    condemned = frozenset(map(pack, condemned_numbers))
    store: Any = Store(locations)
    resting = closure(map(named, NAMES), store, condemned)
    for chunk_id, rests_on in resting.items():
        assert rests_on[0].row.chunk_id == chunk_id
        assert rests_on[-1].row.base_ids == ()
        for upper, lower in itertools.pairwise(rests_on):
            assert upper.row.base_ids == (lower.row.chunk_id,)
            assert lower.row.depth < upper.row.depth
        assert not {hit.pack_id for hit in rests_on} & condemned
    for chunk_id in map(named, set(NAMES)):
        # And a chunk that stands by itself in a usable pack is always found.
        alone = [
            hit for hit in store.find_sound([chunk_id])[0] if hit.row.base_ids == () and hit.pack_id not in condemned
        ]
        assert not alone or chunk_id in resting
    planned = plan_bases({named("new"): named(NAMES[0])}, store, condemned)
    for base in planned.values():
        assert base.depth < DELTA_DEPTH_MAX
        assert base.rests_on == resting[base.chunk_id] or base.depth > resting[base.chunk_id][0].row.depth


# ---- memory ------------------------------------------------------------------------------------------------------


def drifted(step: int, *, chunks: int = 3) -> dict[str, Any]:
    weights = np.random.default_rng(0).standard_normal(chunks * GRID_BYTES // 4, dtype=np.float32)
    return {"w": weights * np.float32(1 + 1e-6 * step), "step": step}


def held(repo: Repository) -> int:
    return repo.handle.bases.held_bytes


def kept(repo: Repository) -> set[ChunkId]:
    return set(repo.handle.bases._copies)


def test_the_first_save_keeps_nothing_and_later_ones_what_the_next_rests_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bases, "REFERENCE_MOVES_EVERY", 2**32)
    repo = create_on(MemoryBackend())
    repo.handle.base_memory_bytes = 10 * GRID_BYTES
    repo.save(drifted(0))
    assert held(repo) == 0
    for step in range(1, 6):
        repo.save(drifted(step))
        assert held(repo) == 3 * GRID_BYTES
        assert not repo.handle.bases._pins


@pytest.mark.parametrize("budget_chunks", [0, 1, 2])
def test_memory_stays_within_what_was_given_to_open(budget_chunks: int) -> None:
    repo = create_on(MemoryBackend())
    repo.handle.base_memory_bytes = budget_chunks * GRID_BYTES
    for step in range(5):
        snapshot = repo.save(drifted(step))
        assert held(repo) <= budget_chunks * GRID_BYTES
        loaded = repo.load(snapshot.id)
        assert loaded["w"].tobytes() == drifted(step)["w"].tobytes()


def test_a_state_that_shrank_gives_the_memory_back() -> None:
    repo = create_on(MemoryBackend())
    for step in range(3):
        repo.save(drifted(step))
    repo.save({"step": 3})
    assert held(repo) == 0


def test_several_branches_share_the_memory() -> None:
    repo = create_on(MemoryBackend())
    repo.handle.base_memory_bytes = 4 * GRID_BYTES
    base = repo.save(drifted(0))
    for step in range(1, 5):
        for offset, branch in ((0, "one"), (100, "two")):
            state = drifted(step + offset)
            snapshot = repo.save(state, branch=branch, parent=base.id if step == 1 else None, step=step)
            assert held(repo) <= 4 * GRID_BYTES
            assert not repo.handle.bases._pins
            assert repo.load(snapshot.id)["w"].tobytes() == state["w"].tobytes()


def test_a_save_that_fails_leaves_no_pin() -> None:
    repo = create_on(MemoryBackend())
    for step in range(3):
        repo.save(drifted(step))

    def interrupt(done: int, total: int) -> None:
        if repo.handle.bases._pins:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repo.save(drifted(9), progress=interrupt)
    assert not repo.handle.bases._pins
    repo.save({"step": 3})
    assert held(repo) == 0


@pytest.mark.parametrize("way", ["save", "save_async"])
def test_bases_are_kept_by_default(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bases, "REFERENCE_MOVES_EVERY", 2**32)
    repo = create_on(MemoryBackend())
    for step in range(3):
        repo.save(drifted(step)) if way == "save" else repo.save_async(drifted(step)).result(60)
        assert held(repo) == (3 * GRID_BYTES if step else 0)


def test_closing_gives_the_memory_back() -> None:
    """A process that closed its repository kept a gigabyte of slots."""
    repo = create_on(MemoryBackend())
    repo.handle.base_memory_bytes = 100 * GRID_BYTES
    for step in range(3):
        repo.save(drifted(step, chunks=10))
        assert kept(repo) or step == 0
    pool = repo.handle.pool
    repo.close()
    assert repo.handle.pool is not pool
    assert not repo.handle.pool._free


def test_a_bit_that_flips_in_a_kept_base_spoils_no_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    """The difference from it proved itself right, with the same wrong base."""
    monkeypatch.setattr(bases, "REFERENCE_MOVES_EVERY", 2**32)
    repo = create_on(MemoryBackend())
    for step in range(2):
        repo.save(drifted(step))
    copies = list(repo.handle.bases._copies.values())
    assert copies
    for copy in copies:
        copy.view[1000] ^= 1
    repo.save(drifted(2))
    assert open_on(repo.handle.backend).load("main")["w"].tobytes() == drifted(2)["w"].tobytes()


def test_a_bit_that_flips_in_a_base_while_it_is_used_spoils_no_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    repo = create_on(MemoryBackend())
    for step in range(2):
        repo.save(drifted(step))
    encode = chunk_writer.encode_chunk
    flipped = []

    def flipping(*args: Any, **options: Any) -> Encoded:
        if options["base"] is not None:
            options["base"][1000] ^= 1
            flipped.append(options["chunk_id"])
        return encode(*args, **options)

    monkeypatch.setattr(chunk_writer, "encode_chunk", flipping)
    repo.save(drifted(2))
    assert flipped
    assert open_on(repo.handle.backend).load("main")["w"].tobytes() == drifted(2)["w"].tobytes()
