"""The index can be thrown away at any time."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import castore
from castore.format.layout import pack_name
from castore.ids import PackId
from castore.store import list_packs


def save_three(path: Path) -> castore.Repository:
    repository = castore.init(path)
    for step in range(3):
        repository.save({"w": np.random.default_rng(step).standard_normal(1000), "same": np.arange(500.0)}, step=step)
    return repository


def test_it_counts_packs_and_distinct_chunks(tmp_path: Path) -> None:
    with save_three(tmp_path / "store") as repository:
        report = repository.reindex()
        assert (report.pack_count, report.chunk_count, report.damaged_packs) == (3, 7, ())
        assert repository.verify(data=True).ok


def test_an_empty_repository_has_an_empty_index(tmp_path: Path) -> None:
    with castore.init(tmp_path / "store") as repository:
        report = repository.reindex()
    assert report.to_json() == {"pack_count": 0, "chunk_count": 0, "damaged_packs": {}}


def test_it_forgets_what_is_not_there(tmp_path: Path) -> None:
    with save_three(tmp_path / "store") as repository:
        row = next(iter(repository.handle.store.locate([]).values()), None)
        assert row is None
        stranger = PackId("f" * 32)
        repository.handle.store._index.add({stranger: []})
        repository.reindex()
        assert repository.handle.store._index.packs() == list_packs(repository.handle.backend)


def test_a_damaged_pack_is_named_and_salvaged(tmp_path: Path) -> None:
    with save_three(tmp_path / "store") as repository:
        (first, *_) = sorted(list_packs(repository.handle.backend))
        path = tmp_path / "store" / pack_name(first)
        data = bytearray(path.read_bytes())
        data[-10] ^= 1
        path.write_bytes(data)
        report = repository.reindex()
        assert [name for name, _ in report.damaged_packs] == [pack_name(first)]
        assert report.chunk_count == 7
        for snapshot in repository.log():
            assert repository.load(snapshot.id)["w"].shape == (1000,)


def test_progress_ends_at_the_number_of_packs(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    with save_three(tmp_path / "store") as repository:
        repository.reindex(progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
