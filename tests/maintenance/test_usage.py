"""Usage counts every byte of a pack once, and says who alone needs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import castore
from castore.api import Repository
from castore.backend import MemoryBackend
from castore.format.layout import pack_name
from castore.maintenance.tally import group_of
from castore.maintenance.usage import Usage
from castore.options import RepositoryOptions
from castore.store import list_packs
from tests.checkpoint.damage import flip_bit
from tests.checkpoint.repositories import create_on, open_on
from tests.suites.packs import flip, rewrite, write_pack


def noise(seed: int, count: int = 1000) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(count, dtype=np.float32)


@pytest.fixture
def repo() -> Repository:
    repository = create_on(MemoryBackend(), RepositoryOptions(compression="none"))
    repository.save({"model": {"frozen": noise(0), "head": noise(1)}, "optimizer": {"m": noise(2)}}, step=1)
    repository.save({"model": {"frozen": noise(0), "head": noise(3)}, "optimizer": {"m": noise(4)}}, step=2)
    return repository


def check_adds_up(usage: Usage) -> None:
    check_sums(usage)
    assert sum(snapshot.raw_bytes for snapshot in usage.snapshots) == usage.raw_bytes
    assert sum(group.raw_bytes for group in usage.groups) == usage.raw_bytes


def check_sums(usage: Usage) -> None:
    parts = usage.leaf_bytes, usage.manifest_bytes, usage.unreferenced_bytes, usage.overhead_bytes
    assert sum(parts) == usage.pack_bytes
    assert min(parts) >= 0
    assert sum(group.stored_bytes for group in usage.groups) == usage.leaf_bytes
    assert sum(codec.stored_bytes for codec in usage.codecs) == usage.pack_bytes - usage.overhead_bytes


def test_parity_and_what_repairs_put_aside_count_in_all(repo: Repository) -> None:
    """The total was less than what lay on the disk."""
    before = repo.usage()
    assert (before.parity_bytes, before.quarantine_bytes) == (0, 0)
    repo.add_parity()
    flip_bit(repo.handle.backend, pack_name(min(list_packs(repo.handle.backend))), 5000)
    repo.repair()
    usage = repo.usage()
    assert usage.parity_bytes == sum(info.size_bytes for info in repo.handle.backend.list("parity/")) > 0
    assert usage.quarantine_bytes == sum(info.size_bytes for info in repo.handle.backend.list("quarantine/")) > 0
    parts = usage.pack_bytes, usage.parity_bytes, usage.snapshot_bytes, usage.cache_bytes, usage.quarantine_bytes
    assert usage.total_bytes == sum(parts)


def test_every_byte_is_counted_once(repo: Repository) -> None:
    usage = repo.usage()
    check_adds_up(usage)
    assert usage.unreferenced_bytes == 0
    assert usage.leaf_bytes == 5 * 4000
    assert usage.pack_bytes == sum(info.size_bytes for info in repo.handle.backend.list("packs/"))
    assert usage.snapshot_bytes == sum(info.size_bytes for info in repo.handle.backend.list("snapshots/"))
    assert usage.total_bytes == usage.pack_bytes + usage.snapshot_bytes
    assert usage.unreadable == ()


def test_snapshots_come_newest_first_with_what_they_cost(repo: Repository) -> None:
    usage = repo.usage()
    assert [row.step for row in usage.snapshots] == [2, 1]
    second, first = usage.snapshots
    assert (first.new_bytes, second.new_bytes) == (12_000, 8_000)
    assert second.stored_bytes == repo.snapshot("main").stored_bytes


def test_a_chunk_that_snapshots_share_is_exclusive_of_none(repo: Repository) -> None:
    second, first = repo.usage().snapshots
    manifest_bytes = repo.usage().manifest_bytes
    assert first.exclusive_bytes + second.exclusive_bytes == 4 * 4000 + manifest_bytes
    assert first.exclusive_bytes < first.raw_bytes


def test_the_same_state_again_is_exclusive_of_neither(repo: Repository) -> None:
    repo.save({"model": {"frozen": noise(0), "head": noise(3)}, "optimizer": {"m": noise(4)}}, step=3)
    third, second, first = repo.usage().snapshots
    assert third.exclusive_bytes == second.exclusive_bytes == 0
    assert first.exclusive_bytes > 8000
    assert third.stored_bytes == 0


def test_groups_follow_the_depth(repo: Repository) -> None:
    assert {row.path: (row.raw_bytes, row.stored_bytes) for row in repo.usage().groups} == {
        "model": (16_000, 12_000),
        "optimizer": (8_000, 8_000),
    }
    assert {row.path: row.stored_bytes for row in repo.usage(depth=2).groups} == {
        "model/frozen": 4_000,
        "model/head": 8_000,
        "optimizer/m": 8_000,
    }
    assert [(row.path, row.stored_bytes) for row in repo.usage(depth=0).groups] == [("", 20_000)]


@pytest.mark.parametrize(
    ("path", "depth", "group"), [("a/b/c", 1, "a"), ("a/b/c", 2, "a/b"), ("a", 3, "a"), ("", 1, ""), ("a/b", 0, "")]
)
def test_a_group_is_the_beginning_of_a_path(path: str, depth: int, group: str) -> None:
    assert group_of(path, depth) == group


def test_inline_leaves_have_raw_bytes_and_store_nothing_of_their_own(repo: Repository) -> None:
    repo.save({"small": np.arange(5.0)}, step=3)
    usage = repo.usage()
    check_adds_up(usage)
    assert next((row.raw_bytes, row.stored_bytes) for row in usage.groups if row.path == "small") == (40, 0)


def test_codecs_are_told_apart() -> None:
    repository = create_on(MemoryBackend())
    repository.save({"noise": noise(0, 50_000), "zeros": np.zeros(1000), "text": "to be or not to be " * 200})
    usage = repository.usage()
    check_adds_up(usage)
    found = {row.name: (row.chunk_count, row.raw_bytes) for row in usage.codecs}
    assert found["planes"] == (1, 200_000)
    assert found["constant"] == (1, 8_000)
    assert {row.name for row in usage.codecs} >= {"planes", "constant", "zstd"}


def test_what_no_snapshot_needs_is_unreferenced(repo: Repository) -> None:
    chunk = noise(0).tobytes()  # a second copy
    write_pack(repo.handle.backend, [b"x" * 700, chunk])
    usage = repo.usage()
    check_adds_up(usage)
    assert usage.unreferenced_bytes == 700 + 4000
    assert usage.leaf_bytes == 5 * 4000


def test_an_orphan_counts_like_any_snapshot(repo: Repository) -> None:
    repo.save({"x": noise(9)}, branch="lost", step=9)
    repo.delete_branch("lost")
    usage = repo.usage()
    assert usage.unreferenced_bytes == 0
    assert usage.snapshots[0].step == 9
    assert usage.snapshots[0].exclusive_bytes >= 4000


def test_the_index_is_counted(tmp_path: Path) -> None:
    with castore.init(tmp_path / "store") as repository:
        repository.save({"x": noise(0)})
        usage = repository.usage()
    files = [path.stat().st_size for path in (tmp_path / "store/cache").rglob("*") if path.is_file()]
    assert usage.cache_bytes == sum(files) > 0


def test_damage_is_listed_and_the_rest_counted(repo: Repository) -> None:
    backend = repo.handle.backend
    names = [pack_name(pack_id) for pack_id in list_packs(backend)]
    rewrite(backend, names[0], flip(-20))
    snapshot_id = repo.snapshot("main~1").id
    rewrite(backend, f"snapshots/{snapshot_id}", flip(60))
    usage = open_on(backend).usage()
    assert [line.partition(":")[0] for line in usage.unreadable] == [f"snapshots/{snapshot_id}", names[0]]
    check_sums(usage)
    assert usage.unreferenced_bytes > 2 * 4000


def test_a_base_counts_for_what_rests_on_it() -> None:
    repository = create_on(MemoryBackend())
    ids = [repository.save({"drift": drift(step)}, step=step).id for step in range(4)]
    whole = repository.usage()
    check_adds_up(whole)
    assert whole.pinned_bytes == 0
    *later, first = whole.snapshots
    assert first.exclusive_bytes < 1000, "the others rest on its chunk"
    assert all(row.exclusive_bytes > 1000 for row in later[:2])

    repository.handle.backend.delete(f"snapshots/{ids[0]}")
    usage = repository.usage()
    check_adds_up(usage)
    assert usage.pinned_bytes > 10_000
    assert usage.leaf_bytes == whole.leaf_bytes
    assert [row.path for row in usage.groups] == ["drift"]
    assert usage.unreferenced_bytes < 1000, "its manifest"


def drift(step: int) -> np.ndarray:
    """Changes by little from step to step, so that differences pay."""
    return noise(0, 20_000) * np.float32(1 + 1e-6 * step)


def test_a_lost_manifest_is_listed(repo: Repository) -> None:
    backend = repo.handle.backend
    part_id = repo.handle.manifests and castore.snapshots.read_record(backend, repo.snapshot("main").id).part_ids[0]
    place = repo.handle.store.locate([part_id])[part_id][0]
    rewrite(backend, pack_name(place.pack_id), flip(place.row.offset))
    usage = open_on(backend).usage()
    assert any(part_id.hex() in line for line in usage.unreadable)
    assert usage.unreferenced_bytes == 8000


def test_an_empty_repository_uses_nothing() -> None:
    usage = create_on(MemoryBackend()).usage()
    check_adds_up(usage)
    assert usage.total_bytes == usage.raw_bytes == 0


def test_progress_counts_files(repo: Repository) -> None:
    seen: list[tuple[int, int]] = []
    repo.usage(progress=lambda done, total: seen.append((done, total)))
    assert seen == [(count, 4) for count in (1, 2, 3, 4)]


def test_usage_is_json(repo: Repository) -> None:
    document = json.loads(json.dumps(repo.usage().to_json()))
    assert document["total_bytes"] == repo.usage().total_bytes
    assert document["snapshots"][0]["step"] == 2


def test_usage_needs_neither_numpy_nor_torch(tmp_path: Path) -> None:
    with castore.init(tmp_path / "store") as repository:
        repository.save({"x": noise(0, 50_000)})
    code = (
        "import sys; from castore.repository import open_repository; from castore.maintenance.usage import usage; "
        "from castore.maintenance.verify import verify; from castore.maintenance.reindex import reindex; "
        "handle = open_repository(sys.argv[1]); usage(handle); verify(handle); reindex(handle); "
        "assert not {'numpy', 'torch', 'rich'} & set(sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "store")], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
