"""Saves as differences: exact whatever the history, the same from memory and from disk, and damage stays where it is.

Every comparison is by state id: equal ids mean equal bits.
"""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import castore
import tests.tensors.quiet  # noqa: F401
from castore import chunk_writer
from castore.api import Repository
from castore.backend import MemoryBackend
from castore.backend.base import Backend
from castore.checkpoint.plan import hash_state
from castore.codec.chooser import Encoded
from castore.codec.registry import DERIVED, DIFFERENCES
from castore.errors import CastoreError, DamageError, RepositoryAccessError, StorageError, UnsupportedFormatError
from castore.format.identity import state_id
from castore.format.layout import pack_name, snapshot_name
from castore.format.manifest import Entry
from castore.format.pack import RecordKind, Row
from castore.format.snapshot import SnapshotRecord
from castore.host_memory import BaseMemory
from castore.ids import Buffer, ChunkId, PackId
from castore.maintenance.tables import open_rows
from castore.manifests import ManifestReader
from castore.options import DELTA_DEPTH_MAX, GRID_BYTES, Compression, RepositoryOptions
from castore.snapshots import Snapshot, read_record
from castore.store import ChunkStore
from castore.tensors import flatten
from tests.checkpoint.repositories import (
    HookedBackend,
    at_call,
    condemn,
    copied,
    create_on,
    delete_packs,
    files_of,
    open_on,
    packs_of,
)
from tests.suites.packs import flip, rewrite

State = dict[str, Any]
AMPLE = 1 << 40


def id_of_state(state: Any, repo: Repository) -> str:
    hasher = repo.handle.hasher
    return state_id(hasher, hash_state(flatten(state), hasher, progress=lambda _: None).entries)


def check(repo: Repository, snapshots: Iterable[Snapshot]) -> None:
    """Each loads as the state that was saved."""
    for snapshot in snapshots:
        assert id_of_state(repo.load(snapshot.id), repo) == snapshot.state_id


def rows(backend: Backend, repo: Repository) -> Iterator[tuple[PackId, Row]]:
    """Every record of leaf data."""
    for pack_id in sorted(packs_of(repo)):
        for row in open_rows(backend, pack_id, repo.handle.hasher)[0]:
            if row.kind is RecordKind.LEAF:
                yield pack_id, row


def leaf_rows(repo: Repository) -> list[Row]:
    return [row for _, row in rows(repo.handle.backend, repo)]


def place_of(repo: Repository, chunk_id: ChunkId) -> tuple[PackId, Row]:
    return next(found for found in rows(repo.handle.backend, repo) if found[1].chunk_id == chunk_id)


def chunks_of(repo: Repository, ref: str, path: str) -> tuple[ChunkId, ...]:
    record = read_record(repo.handle.backend, repo.snapshot(ref).id)
    entry = next(entry for entry in repo.handle.manifests.entries(record) if entry.path == path)
    return entry.chunk_ids(repo.handle.hasher.digest_bytes)


def dense(step: int, *, items: int = 300_000) -> State:
    """Every element moves a little at every step; two chunks and a bit."""
    weights = np.random.default_rng(0).standard_normal(items, dtype=np.float32)
    moves = np.random.default_rng(1).standard_normal(items, dtype=np.float32)
    return {"w": weights + np.float32(1e-5 * step) * moves, "m": moves[:1000] * np.float32(0.9**step), "step": step}


def new_repo() -> Repository:
    return create_on(MemoryBackend())


# ---- a real run --------------------------------------------------------------------------------------------------


def train(saves: int, *, width: int = 128) -> Iterator[State]:
    """A small network trained with AdamW; what is yielded is live."""
    import torch

    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, saves)
    for step in range(saves):
        inputs = torch.randn(16, width, generator=generator)
        loss = (model(inputs) - inputs[:, :16].sin()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        yield {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "rng": generator.get_state(),
            "half": {name: value.bfloat16() for name, value in model.state_dict().items()},
            "loss": loss.item(),
            "step": step,
        }


def check_history_of_a_run(repo: Repository, saves: int) -> None:
    snapshots = []
    for state in train(saves):
        snapshot = repo.save(state, step=state["step"])
        assert snapshot.state_id == id_of_state(state, repo)
        snapshots.append(snapshot)
    fresh = open_on(repo.handle.backend)
    check(fresh, snapshots)
    assert len({snapshot.state_id for snapshot in snapshots}) == saves
    depths = Counter(row.depth for row in leaf_rows(fresh) if row.chain != (DERIVED,))
    assert set(depths) == {0, 1, 2}
    assert any(row.chain == (DERIVED,) for row in leaf_rows(fresh))
    assert depths[2] > depths[1]
    later = [snapshot.stored_bytes / snapshot.raw_bytes for snapshot in snapshots[saves // 2 :]]
    first = snapshots[0].stored_bytes / snapshots[0].raw_bytes
    assert max(later) < first
    report = fresh.verify(data=True)
    assert report.ok, report.problems


def test_every_snapshot_of_a_run_comes_back() -> None:
    check_history_of_a_run(new_repo(), 60)


@pytest.mark.slow
def test_every_snapshot_of_a_long_run_comes_back(tmp_path: Path) -> None:
    with castore.init(tmp_path / "store") as repo:
        check_history_of_a_run(repo, 200)


# ---- where bases come from ---------------------------------------------------------------------------------------


def test_bases_from_memory_and_from_the_repository_give_the_same_records() -> None:
    def saved(prepare: Callable[[Repository], Repository]) -> tuple[list[str], list[tuple[object, ...]]]:
        repo = new_repo()
        ids = []
        for step in (0, 1, 2, 5, 6, 7):
            repo = prepare(repo)
            ids.append(repo.save(dense(step), step=step).state_id)
        check(repo, repo.snapshots())
        stored = [
            (row.chunk_id, row.base_ids, row.depth, row.chain, row.stored_bytes, row.checksum)
            for row in leaf_rows(repo)
        ]
        return ids, sorted(stored, key=repr)

    def with_memory(budget_bytes: int | None) -> Callable[[Repository], Repository]:
        def prepare(repo: Repository) -> Repository:
            repo.handle.base_memory_bytes = budget_bytes
            return repo

        return prepare

    usual = saved(with_memory(AMPLE))
    assert {row[2] for row in usual[1]} == {0, 1, 2}
    for budget_bytes in (None, 0, GRID_BYTES):
        assert saved(with_memory(budget_bytes)) == usual
    assert saved(lambda repo: open_on(repo.handle.backend)) == usual


def test_a_base_in_memory_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    # The anchor of a reference that moves is read again.
    monkeypatch.setattr("castore.checkpoint.bases.REFERENCE_MOVES_EVERY", 2**32)
    repo = new_repo()
    repo.handle.base_memory_bytes = AMPLE
    read: set[ChunkId] = set()
    original = ChunkStore.read_into

    def watched(store: ChunkStore, chunk_id: ChunkId, *args: Any, **options: Any) -> None:
        read.add(chunk_id)
        original(store, chunk_id, *args, **options)

    monkeypatch.setattr(ChunkStore, "read_into", watched)
    for step in range(4):
        read.clear()
        repo.save(dense(step), step=step)
        # The first save keeps nothing, so the second one reads, and keeps what it has read.
        bases = {base_id for row in leaf_rows(repo) for base_id in row.base_ids}
        assert bool(read & bases) == (step == 1)
    repo.handle.base_memory_bytes = 0
    repo.handle.bases.keep_only(())
    repo.save(dense(4), step=4)
    assert read & set(chunks_of(repo, "main@1", "w"))


def test_a_save_reads_what_it_continues_unless_it_is_what_its_handle_wrote_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    repo = new_repo()
    read: list[SnapshotRecord] = []
    original = ManifestReader.entries

    def watched(reader: ManifestReader, record: SnapshotRecord) -> list[Entry]:
        read.append(record)
        return original(reader, record)

    monkeypatch.setattr(ManifestReader, "entries", watched)

    def save(repo: Repository, step: int, **options: Any) -> int:
        """How many snapshots are read; every save is a difference."""
        read.clear()
        snapshot = repo.save(dense(step), step=step, **options)
        assert place_of(repo, chunks_of(repo, snapshot.id, "w")[0])[1].chain in DIFFERENCES
        return len(read) - 1  # chunks_of reads one

    first = repo.save(dense(0), step=0)
    assert not read
    assert save(repo, 1) == 0
    assert save(repo, 2) == 0
    assert save(repo, 3, branch="fork", parent=first.id) == 1
    assert save(repo, 4, branch="fork") == 0
    assert save(repo, 5) == 1, "what was written last is on the other branch"
    repo.close()
    assert save(repo, 6) == 1
    assert save(open_on(repo.handle.backend), 7) == 1


def test_a_new_reference_takes_the_memory_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is like its base, a save would else hold the old state and the new one."""
    repo = new_repo()
    repo.handle.base_memory_bytes = AMPLE
    held: list[int] = []
    put = BaseMemory.put

    def watched(memory: BaseMemory, *args: Any) -> None:
        put(memory, *args)
        held.append(memory.held_bytes)

    monkeypatch.setattr(BaseMemory, "put", watched)
    for step in range(5):
        repo.save({"noise": np.random.default_rng(step).integers(0, 256, 16 * GRID_BYTES, np.uint8)}, step=step)
    assert max(held) == 16 * GRID_BYTES
    check(open_on(repo.handle.backend), repo.snapshots())


def test_a_base_that_two_new_chunks_share_serves_both_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slower one still reads it when the faster one has been kept."""
    repo = new_repo()
    repo.handle.base_memory_bytes = AMPLE
    noise = np.random.default_rng(0).standard_normal(3 * GRID_BYTES // 4, dtype=np.float32).reshape(3, -1)
    repo.save({"a": noise[0], "b": noise[0].copy()})
    repo.save({"a": noise[1], "b": noise[1].copy()})  # kept, and the base of both below
    later = [(noise[1] * np.float32(1 + 1e-6 * step)).astype(np.float32) for step in (1, 2)]
    slow_id = repo.handle.hasher.chunk_id(later[1])
    faster_is_kept = threading.Event()
    encode, put = chunk_writer.encode_chunk, BaseMemory.put

    def slow_for_one(*args: Any, **options: Any) -> Encoded:
        if options["chunk_id"] == slow_id:
            assert faster_is_kept.wait(60)
        return encode(*args, **options)

    def watched(memory: BaseMemory, chunk_id: ChunkId, raw: Buffer) -> None:
        put(memory, chunk_id, raw)
        faster_is_kept.set()

    monkeypatch.setattr(chunk_writer, "worker_count", lambda: 2)
    monkeypatch.setattr(chunk_writer, "encode_chunk", slow_for_one)
    monkeypatch.setattr(BaseMemory, "put", watched)
    snapshot = repo.save(dict(zip("ab", later, strict=True)))
    bases = [place_of(repo, chunk_id)[1].base_ids for path in "ab" for chunk_id in chunks_of(repo, "main", path)]
    assert bases == 2 * [tuple(chunks_of(repo, "main~1", "a"))]
    check(open_on(repo.handle.backend), [snapshot])


def test_a_base_that_another_place_still_holds_stays_in_memory() -> None:
    repo = new_repo()
    repo.handle.base_memory_bytes = AMPLE
    noise = [np.random.default_rng(seed).integers(0, 256, GRID_BYTES, np.uint8) for seed in range(5)]
    for first in noise[1:4]:
        repo.save({"a": first, "b": noise[0]})
    repo.save({"a": noise[3], "b": noise[3].copy()})
    repo.save({"a": noise[4], "b": noise[3]})
    (still,) = chunks_of(repo, "main", "b")
    assert repo.handle.bases.get(still) is not None


# ---- shape of the history ----------------------------------------------------------------------------------------


def test_no_record_is_ever_deeper_than_the_bound() -> None:
    repo = new_repo()
    for step in range(12):
        branch = ("main", "fork")[step % 2]
        repo.save(dense(step), branch=branch, parent="main" if step == 1 else None, step=step)
    assert max(row.depth for row in leaf_rows(repo)) == DELTA_DEPTH_MAX
    for _, row in rows(repo.handle.backend, repo):
        assert bool(row.base_ids) == (row.depth > 0) == (row.chain in DIFFERENCES)
        for base_id in row.base_ids:
            assert place_of(repo, base_id)[1].depth < row.depth
            assert row.stored_bytes < row.raw_bytes


def changing_states() -> list[State]:
    base = np.random.default_rng(0).standard_normal(400_000).astype("f4")
    half = base.astype("f2")
    return [
        {"a": base, "b": half},
        {"a": base + np.float32(1e-6), "b": half + np.float16(0.01)},
        {"a": base[:399_999], "b": half[:300_001]},  # shorter
        {"a": np.concatenate([base, base]), "b": half.reshape(400, 1000)},  # longer; another shape, the same bytes
        {"a": half, "b": base},  # types change places
        {"a": base.astype("f8"), "b": base.view("i4")},
        {"a": base.view("i4") + 1, "b": base.view("i4") + 1},  # the same chunks twice
        {"b": {"a": base}, "c": [half, half[::-1]]},  # a leaf becomes a branch, and others are new
        {"a": np.zeros_like(base), "b": np.full(400_000, np.nan, "f4")},
        {
            "a": base * 0 - 0.0,
            "b": np.tile(np.array([0x7FA00001, 0xFFC00002, 1, 0x80000001], "u4"), 100_000).view("f4"),
        },
        {"a": base[::-1], "b": base[:0], "c": base[0], "d": base[:100]},
        {},
        {"a": base, "b": base.tobytes()[:999_999]},
        {"a": base.reshape(4, -1).T, "b": base.tobytes()[1:1_000_000]},
        {"a": np.frombuffer(base.tobytes(), "c8"), "b": base.view("u1")[:1_500_001]},
        {"a": np.frombuffer(base.tobytes(), "c8") * 1.0001, "b": base.view("u1")[1:1_500_002]},
        {"a": base.view("i8"), "b": base.view("u2")},
        {"a": base.view("i8") + 3, "b": base.view("u2") + np.uint16(1), "c": base > 0},
        {"a": base.view("i8") - 3, "b": base.view("u2") - np.uint16(7), "c": base > 0.001},
    ]


@pytest.mark.parametrize("in_memory", [True, False])
def test_shapes_types_and_paths_may_change_between_saves(in_memory: bool) -> None:
    repo = new_repo()
    repo.handle.base_memory_bytes = AMPLE if in_memory else 0
    states = changing_states()
    snapshots = [repo.save(state, step=step) for step, state in enumerate([*states, *states[::-1]])]
    assert [snapshot.state_id for snapshot in snapshots] == [
        id_of_state(state, repo) for state in [*states, *states[::-1]]
    ]
    check(open_on(repo.handle.backend), snapshots)
    assert any(row.depth for row in leaf_rows(repo))
    assert repo.verify(data=True).ok


def test_torch_states_may_change_type_between_saves() -> None:
    import torch

    torch.manual_seed(0)
    weights = torch.randn(600, 600)
    states: list[State] = [
        {"w": weights, "tied": weights},
        {"w": weights + 1e-6, "tied": weights + 1e-6},
        {"w": weights.bfloat16(), "tied": weights.half()},
        {"w": weights.bfloat16() + 0.01, "tied": weights.half() + 0.01},
        {"w": weights.t(), "tied": weights[::2, 1::3]},
        {"w": torch.nn.Parameter(weights + 2e-6), "tied": weights.double()},
        {"w": weights.to(torch.float8_e4m3fn), "tied": torch.complex(weights, -weights).conj()},
        {"w": (weights * 1.01).to(torch.float8_e4m3fn), "tied": torch.complex(weights + 1e-6, -weights).conj()},
    ]
    repo = new_repo()
    snapshots = [repo.save(state, step=step) for step, state in enumerate(states)]
    check(open_on(repo.handle.backend), snapshots)
    assert repo.verify(data=True).ok


def test_a_fork_rests_on_the_fork_point() -> None:
    repo = new_repo()
    for step in (0, 1000, 2000, 3000):
        repo.save(dense(step), step=step)
    fork = repo.save(dense(1), branch="fork", parent="main@0")
    assert fork.parents == (repo.snapshot("main@0").id,)
    bases = chunks_of(repo, "main@0", "w")
    assert [place_of(repo, chunk_id)[1].base_ids for chunk_id in chunks_of(repo, "fork", "w")] == [
        (base,) for base in bases
    ]
    # And goes on from there, not from what main does.
    repo.save(dense(4000), step=4000)
    repo.save(dense(2), branch="fork")
    for chunk_id, base_id in zip(chunks_of(repo, "fork", "w"), chunks_of(repo, "fork~1", "w"), strict=True):
        assert place_of(repo, chunk_id)[1].base_ids == (base_id,)
    check(open_on(repo.handle.backend), repo.snapshots())


def test_branches_may_be_saved_in_turns() -> None:
    repo = new_repo()
    repo.handle.base_memory_bytes = AMPLE
    root = repo.save(dense(0))
    for step in range(1, 6):
        for number in range(3):
            state = dense(step + 1000 * number)
            repo.save(state, branch=f"b{number}", parent=root.id if step == 1 else None, step=step)
    for number in range(3):
        assert [snapshot.step for snapshot in repo.log(f"b{number}")] == [5, 4, 3, 2, 1, None]
    check(open_on(repo.handle.backend), repo.snapshots())
    assert repo.verify(data=True).ok


def test_a_base_that_several_leaves_share_serves_them_all() -> None:
    repo = new_repo()
    first = dense(0)["w"]
    repo.save({"a": first, "b": first.copy(), "c": first.copy()})
    later = [dense(step)["w"] for step in (1, 2, 3)]
    snapshot = repo.save(dict(zip("abc", later, strict=True)))
    bases = {place_of(repo, chunk_id)[1].base_ids[0] for path in "abc" for chunk_id in chunks_of(repo, "main", path)}
    assert bases == set(chunks_of(repo, "main~1", "a"))
    check(open_on(repo.handle.backend), [snapshot])


@pytest.mark.parametrize("compression", ["lz4", "none"])
def test_only_auto_makes_differences(compression: Compression) -> None:
    repo = create_on(MemoryBackend(), RepositoryOptions(compression=compression))
    for step in range(4):
        repo.save(dense(step), step=step)
    assert all(row.depth == 0 and row.chain in {(), (1,), (4,)} for row in leaf_rows(repo))
    assert repo.handle.bases.held_bytes == 0
    check(open_on(repo.handle.backend), repo.snapshots())


def test_blake3_repositories_make_differences_too() -> None:
    pytest.importorskip("blake3")
    repo = create_on(MemoryBackend(), RepositoryOptions(hash="blake3"))
    for step in range(4):
        repo.save(dense(step), step=step)
    assert {row.depth for row in leaf_rows(repo)} == {0, 1, 2}
    check(open_on(repo.handle.backend), repo.snapshots())


# ---- flush to zero -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saving", [True, False])
@pytest.mark.parametrize("loading", [True, False])
def test_flush_to_zero_changes_nothing(saving: bool, loading: bool) -> None:
    """A process that flushes subnormals may read what another wrote, and the other way round."""
    import torch

    values = np.random.default_rng(0).standard_normal(300_000).astype("f4")
    values[::3] *= np.float32(1e-39)
    values[1::3] = np.ldexp(values[1::3], -126)
    states = [{"v": values * np.float32(0.999**step)} for step in range(4)]
    for step, state in enumerate(states):  # untouched rows decay: that is what scaled bases are for
        state["v"][::7] = values[::7]
        state["v"][5 * step :: 1000] += np.float32(1e-40)
    wanted = [state["v"].tobytes() for state in states]
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        torch.set_flush_denormal(saving)
        repo = new_repo()
        snapshots = [repo.save(state, step=step) for step, state in enumerate(states)]
        torch.set_flush_denormal(loading)
        fresh = open_on(repo.handle.backend)
        assert [fresh.load(snapshot.id)["v"].tobytes() for snapshot in snapshots] == wanted
        assert fresh.verify(data=True).ok
    finally:
        torch.set_flush_denormal(False)
    assert any(row.depth for row in leaf_rows(repo))


# ---- damage ------------------------------------------------------------------------------------------------------


@pytest.fixture
def drifting(monkeypatch: pytest.MonkeyPatch) -> Repository:
    """Five snapshots: `w` rests on that of the first, from the third on by way of the second; and one that does not."""
    monkeypatch.setattr("castore.checkpoint.bases.REFERENCE_MOVES_EVERY", 2**32)
    repo = new_repo()
    for step in range(5):
        repo.save({**dense(step), "noise": np.random.default_rng(step).bytes(5000)}, step=step)
    assert [place_of(repo, chunks_of(repo, f"main@{step}", "w")[0])[1].depth for step in range(5)] == [0, 1, 2, 2, 2]
    return repo


def on_copy(repo: Repository) -> tuple[Repository, MemoryBackend]:
    backend = copied(repo.handle.backend)
    return open_on(backend), backend


@pytest.mark.parametrize("step", [0, 1, 3])
def test_a_rotten_base_is_named_with_everything_that_it_touches(drifting: Repository, step: int) -> None:
    repo, backend = on_copy(drifting)
    rotten = chunks_of(repo, f"main@{step}", "w")[1]
    pack_id, row = place_of(repo, rotten)
    rewrite(backend, pack_name(pack_id), flip(row.offset + row.stored_bytes // 2))
    repo = open_on(backend)
    touched = {0: {0, 1, 2, 3, 4}, 1: {1, 2, 3, 4}, 3: {3}}[step]
    for found in repo.log("main"):
        if found.step not in touched:
            check(repo, [found])
            continue
        with pytest.raises(DamageError) as caught:
            repo.load(found.id)
        assert rotten.hex() in str(caught.value)
        assert pack_id in str(caught.value)
        # The rest of a snapshot that is touched can still be had.
        rest = repo.load(found.id, paths=["m", "noise", "step"])
        assert rest["noise"] == np.random.default_rng(found.step).bytes(5000)
    report = repo.verify(data=True)
    assert {repo.snapshot(key).step: leaves for key, leaves in report.damaged_snapshots.items()} == dict.fromkeys(
        touched, ("w",)
    )
    (problem,) = report.problems
    assert pack_id in problem.where
    assert rotten.hex() in problem.message


def test_a_missing_pack_of_bases_is_named_with_everything_that_it_touches(drifting: Repository) -> None:
    repo, backend = on_copy(drifting)
    base_id = chunks_of(repo, "main@1", "w")[0]
    gone, _ = place_of(repo, base_id)
    delete_packs(backend, [gone])
    repo = open_on(backend)
    for found in list(repo.snapshots()):
        if found.step == 0:
            check(repo, [found])
        else:
            with pytest.raises(DamageError) as caught:
                repo.load(found.id)
            if found.step != 1:
                assert base_id.hex() in str(caught.value)
    for data in (False, True):
        report = repo.verify(data=data)
        assert {repo.snapshot(key).step for key in report.damaged_snapshots} == {1, 2, 3, 4}


def test_a_save_on_a_rotten_base_stands_by_itself(drifting: Repository) -> None:
    """From a fresh process, which has no copy in memory."""
    for step in (0, 1):
        repo, backend = on_copy(drifting)
        for chunk_id in chunks_of(repo, f"main@{step}", "w"):
            pack_id, row = place_of(repo, chunk_id)
            rewrite(backend, pack_name(pack_id), flip(row.offset + 100))
        repo = open_on(backend)
        snapshot = repo.save({**dense(7), "noise": b""}, step=7)
        check(open_on(backend), [snapshot])
        assert snapshot.id not in open_on(backend).verify(data=True).damaged_snapshots


def parent_file(backend: MemoryBackend, repo: Repository) -> None:
    rewrite(backend, snapshot_name(repo.snapshot("main").id), flip(60))


def parent_gone(backend: MemoryBackend, repo: Repository) -> None:
    backend.delete(snapshot_name(repo.snapshot("main").id))


def parent_part(backend: MemoryBackend, repo: Repository) -> None:
    for part_id in read_record(backend, repo.snapshot("main").id).part_ids:
        location = repo.handle.store.locate([part_id])[part_id][0]
        rewrite(backend, pack_name(location.pack_id), flip(location.row.offset + 3))


def parent_packs(backend: MemoryBackend, repo: Repository) -> None:
    delete_packs(backend, packs_of(repo))


@pytest.mark.parametrize("spoil", [parent_file, parent_gone, parent_part, parent_packs])
def test_a_save_whose_parent_cannot_be_read_works(
    drifting: Repository, spoil: Callable[[MemoryBackend, Repository], None]
) -> None:
    repo, backend = on_copy(drifting)
    head = repo.snapshot("main").id
    spoil(backend, repo)
    fresh = open_on(backend)
    snapshot = fresh.save(dense(9), step=9)
    assert snapshot.parents == (head,)
    check(open_on(backend), [snapshot])
    following = fresh.save(dense(10), step=10)
    check(open_on(backend), [following])
    assert following.stored_bytes < snapshot.stored_bytes


@pytest.mark.parametrize(
    "error", [StorageError("bad sector"), RepositoryAccessError("not yours"), UnsupportedFormatError("from the future")]
)
@pytest.mark.parametrize("what", ["snapshots/", "packs/"])
def test_a_parent_or_base_that_may_not_be_read_costs_only_the_difference(
    drifting: Repository, error: CastoreError, what: str
) -> None:
    def refuse(operation: str, name: str) -> None:
        if operation in ("read", "open_reader") and name in protected:
            raise error

    _, backend = on_copy(drifting)
    protected = {name for name in files_of(backend) if name.startswith(what)}
    hooked = HookedBackend(backend)
    repo = open_on(hooked)
    assert repo.handle.store.refresh()  # the index is there, as it is for a process that comes later
    hooked.hook = refuse
    snapshot = repo.save(dense(9), step=9)
    hooked.hook = lambda operation, name: None
    check(open_on(backend), [snapshot])


# ---- beside a collector ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("condemned_step", [0, 1])
def test_a_base_in_a_condemned_pack_is_not_used(drifting: Repository, condemned_step: int) -> None:
    repo, backend = on_copy(drifting)
    condemned = {place_of(repo, chunk_id)[0] for chunk_id in chunks_of(repo, f"main@{condemned_step}", "w")}
    condemn(backend, condemned)
    before = packs_of(repo)
    fresh = open_on(backend)
    snapshot = fresh.save(dense(9), step=9)
    condemned_chunks = {row.chunk_id for pack_id, row in rows(backend, fresh) if pack_id in condemned}
    written = [row for pack_id, row in rows(backend, fresh) if pack_id not in before]
    assert not {base_id for row in written for base_id in row.base_ids} & condemned_chunks
    delete_packs(backend, condemned)
    check(open_on(backend), [snapshot])
    assert snapshot.id not in open_on(backend).verify(data=True).damaged_snapshots


@pytest.mark.parametrize("base_step", [0, 1])
@pytest.mark.parametrize("deleted", [True, False])
def test_bases_that_go_at_any_call_of_a_save_are_healed(base_step: int, deleted: bool) -> None:
    """Through a handle that keeps its bases in memory, so that nothing fails until somebody loads."""
    start = MemoryBackend()
    repo = create_on(start)
    for step in range(3):
        repo.save(small(step), step=step)
    going = {place_of(repo, chunk_id)[0] for chunk_id in chunks_of(repo, f"main@{base_step}", "w")}
    healed, number, published = 0, 0, 1
    while number <= published:
        backend = copied(start)
        hooked = HookedBackend(backend)
        saving = open_on(hooked)
        saving.handle.base_memory_bytes = AMPLE
        saving.save(small(5), branch="other", parent="main")  # brings the bases into memory
        names: list[str] = []

        def collect(backend: MemoryBackend = backend, names: list[str] = names) -> None:
            names.append(condemn(backend, going))
            if deleted:
                delete_packs(backend, going)

        hooked.calls.clear()
        hooked.hook = at_call(number, collect)
        snapshot = saving.save(small(3), step=3)
        operations = [operation for operation, _ in hooked.calls]
        healed += operations.count("create_stream") > 1
        delete_packs(backend, going)
        backend.delete(names[0])
        check(open_on(backend), [snapshot])
        assert snapshot.id not in open_on(backend).verify(data=True).damaged_snapshots
        number, published = number + 1, operations.index("put_if_absent")
    assert healed


def small(step: int) -> State:
    return dense(step, items=20_000)


def test_a_healed_repository_verifies_once_the_collector_is_done() -> None:
    """The record whose base went is left in its pack, beside the one that was written again."""
    backend = HookedBackend(MemoryBackend())
    repo = create_on(backend)
    repo.save(small(0), step=0)
    going = packs_of(repo)
    names: list[str] = []
    backend.hook = at_call(0, lambda: names.append(condemn(backend.inner, going)), operation="put_if_absent")
    snapshot = repo.save(small(1), step=1)
    assert names
    delete_packs(backend.inner, going)
    for name in (names[0], snapshot_name(repo.snapshot("main~1").id)):
        backend.inner.delete(name)
    fresh = open_on(backend.inner)
    check(fresh, [snapshot])
    report = fresh.verify(data=True)
    assert not report.damaged_snapshots
    following = fresh.save(small(2), step=2)
    check(open_on(backend.inner), [snapshot, following])


# ---- two writers -------------------------------------------------------------------------------------------------


def merged(*backends: Backend) -> MemoryBackend:
    """What racing writers of one repository leave together: all packs and snapshots; the refs of the first."""
    together = MemoryBackend()
    for backend in backends:
        for name, data in files_of(backend).items():
            together.put_if_absent(name, data)
    return together


def crossed() -> tuple[MemoryBackend, list[Snapshot]]:
    """X alone and Y on X by one writer, Y alone and X on Y by another; more that rests on either."""
    empty = create_on(MemoryBackend()).handle.backend
    one, other = open_on(copied(empty)), open_on(copied(empty))
    snapshots = [one.save(small(step), branch="one") for step in (0, 1, 2)]
    snapshots += [other.save(small(step), branch="other") for step in (1, 0, 3)]
    return merged(one.handle.backend, other.handle.backend), snapshots


def test_two_writers_may_store_two_chunks_as_differences_from_each_other() -> None:
    backend, snapshots = crossed()
    repo = open_on(backend)
    pairs = {(row.chunk_id, base_id) for row in leaf_rows(repo) for base_id in row.base_ids}
    assert any((base_id, chunk_id) in pairs for chunk_id, base_id in pairs), "nothing is crossed"
    check(repo, snapshots)
    report = repo.verify(data=True)
    assert report.ok, report.problems
    # A save that continues either finds its way, too.
    for branch, other in (("one", "other"), ("other", "one")):
        with open_on(copied(backend)) as fresh:
            made = [fresh.save(small(step), branch=branch, parent=branch) for step in (0, 1, 2, 3, 4)]
            made += [fresh.save(small(step), branch=other, parent=branch) for step in (1, 0, 5)]
            check(fresh, [*snapshots, *made])
            assert fresh.verify(data=True).ok
            assert max(row.depth for row in leaf_rows(fresh)) <= DELTA_DEPTH_MAX


def test_of_crossed_packs_any_may_go_without_a_reader_going_in_circles() -> None:
    """A chunk is lost only with every way to it; a reader then says so, and a writer writes it again."""
    backend, snapshots = crossed()
    packs = sorted(packs_of(open_on(backend)))
    assert len(packs) == 6
    survived = Counter[bool]()
    for gone in range(1, 1 << len(packs)):
        own = copied(backend)
        delete_packs(own, [pack_id for bit, pack_id in enumerate(packs) if gone >> bit & 1])
        repo = open_on(own)
        for snapshot in snapshots:
            try:
                loaded = repo.load(snapshot.id)
            except DamageError:
                survived[False] += 1
            else:
                assert id_of_state(loaded, repo) == snapshot.state_id
                survived[True] += 1
        if gone % 7 == 0:
            check(repo, [repo.save(small(step), branch=f"again-{step}", parent="one") for step in (0, 1)])
    assert survived[True]
    assert survived[False]


@pytest.mark.slow
def test_two_processes_that_save_the_same_states_in_opposite_orders(tmp_path: Path) -> None:
    """The same with real writers that race for real."""
    from tests.checkpoint.killing import Report, fork, until

    path = tmp_path / "store"
    castore.init(path).close()
    for attempt in range(6):
        gate = tmp_path / f"gate-{attempt}"
        steps = [100 * attempt + step for step in range(4)]

        def save(name: str, order: list[int], report: Report, gate: Path = gate) -> None:
            with castore.open(path) as own:
                report("ready")
                until(gate.exists)
                for step in order:
                    report(own.save(small(step), branch=name, step=step).id)

        children = [
            fork(lambda report, order=order, number=number: save(f"{attempt}-{number}", order, report))  # noqa: B023
            for number, order in enumerate((steps, steps[::-1]))
        ]
        for child in children:
            child.next_line()
        gate.touch()
        for child in children:
            child.wait()
    with castore.open(path) as repo:
        check(repo, repo.snapshots())
        assert repo.verify(data=True).ok
    shutil.rmtree(path / "cache")
    with castore.open(path) as repo:
        check(repo, repo.snapshots())
