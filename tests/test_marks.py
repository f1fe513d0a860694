"""Marks are small files beside snapshots, and say which leaves a thinned snapshot still needs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from castore.backend import MemoryBackend
from castore.errors import DamageError, UsageError
from castore.format.layout import forgotten_name, orphan_name, thin_name
from castore.format.manifest import Entry, Kind
from castore.ids import SnapshotId
from castore.marks import (
    Forgotten,
    Thinning,
    across,
    damaged_marks,
    forget_snapshot,
    forgotten,
    forgotten_ids,
    kept_entries,
    note_orphan,
    orphan_notes,
    read_forgotten,
    read_thinning,
    thin_snapshot,
    thinned_ids,
    thinnings,
    unforget_snapshot,
    unthin_snapshot,
)

A, B = SnapshotId("aa" * 16), SnapshotId("bb" * 16)
MARK = Forgotten(A, (B,), "main", 7, 1_000, 2_000, "keep last 3")
OVERLAY = Thinning(A, ("optimizer/**", "ema"), 3_000)


def test_a_forgotten_mark_comes_back_as_it_was_written() -> None:
    backend = MemoryBackend()
    assert forgotten(backend) == {}
    assert forget_snapshot(backend, MARK)
    assert read_forgotten(backend, A) == MARK
    assert forgotten(backend) == {A: MARK}
    assert forgotten_ids(backend) == {A}
    assert unforget_snapshot(backend, A)
    assert not unforget_snapshot(backend, A)
    assert read_forgotten(backend, A) is None


def test_a_second_forgetting_leaves_the_first_mark() -> None:
    backend = MemoryBackend()
    forget_snapshot(backend, MARK)
    assert not forget_snapshot(backend, Forgotten(A, (), "main", None, 0, 9_000, "again"))
    assert read_forgotten(backend, A) == MARK


def test_history_goes_on_behind_what_was_forgotten_first_parents_first() -> None:
    c, d = SnapshotId("cc" * 16), SnapshotId("dd" * 16)
    marks = {A: replace(MARK, parents=(B, c, d)), B: Forgotten(B, (d, A), "main", 6, 500, 2_000, "a marker may lie")}
    assert across((A, c), marks) == ([d, c], {A, B})
    assert across((c,), marks) == ([c], set())


def test_a_damaged_mark_is_an_error_and_can_be_written_again() -> None:
    backend = MemoryBackend()
    forget_snapshot(backend, MARK)
    thin_snapshot(backend, OVERLAY)
    for name in (forgotten_name(A), thin_name(A)):
        data = backend.read(name, max_bytes=4096)
        backend.compare_and_swap(name, expected=data, new=data.replace(b"0", b"1", 1))
    assert set(damaged_marks(backend)) == {forgotten_name(A), thin_name(A)}
    with pytest.raises(DamageError, match=forgotten_name(A)):
        forgotten(backend)
    with pytest.raises(DamageError, match=thin_name(A)):
        thinnings(backend)
    assert forget_snapshot(backend, MARK)
    assert thin_snapshot(backend, OVERLAY)
    assert damaged_marks(backend) == {}


def test_an_overlay_comes_back_and_gives_way_to_another() -> None:
    backend = MemoryBackend()
    assert thin_snapshot(backend, OVERLAY)
    assert not thin_snapshot(backend, Thinning(A, OVERLAY.dropped, 9_000))
    assert read_thinning(backend, A) == OVERLAY
    wider = Thinning(A, ("optimizer/**", "ema", "rng"), 9_000)
    assert thin_snapshot(backend, wider)
    assert thinnings(backend) == {A: wider}
    assert thinned_ids(backend) == {A}
    assert unthin_snapshot(backend, A)
    assert thinnings(backend) == {}


def test_an_overlay_without_globs_or_larger_than_it_can_be_read_is_refused() -> None:
    backend = MemoryBackend()
    with pytest.raises(UsageError, match="glob"):
        thin_snapshot(backend, Thinning(A, (), 0))
    with pytest.raises(UsageError, match="fewer globs"):
        thin_snapshot(backend, Thinning(A, ("x" * 2_000_000,), 0))
    assert thinnings(backend) == {}


def test_the_latest_time_a_ref_left_counts() -> None:
    backend = MemoryBackend(now_ns=lambda: 77)
    note_orphan(backend, A, now_ns=50)
    note_orphan(backend, A, now_ns=40)
    assert orphan_notes(backend) == {A: 50}
    note_orphan(backend, A, now_ns=60)
    assert orphan_notes(backend) == {A: 60}
    backend.compare_and_swap(orphan_name(A), expected=backend.read(orphan_name(A), max_bytes=4096), new=b"?")
    assert orphan_notes(backend) == {A: 77}


# ---- which entries a thinned snapshot keeps --------------------------------------------------------------------


def tensor(path: str) -> Entry:
    return Entry(path, Kind.TENSOR, "float32", (300,), raw_bytes=1200, chunks=path.encode().ljust(16, b"."))


def kept(entries: list[Entry], *globs: str) -> set[str]:
    return {entry.path for entry in kept_entries(entries, Thinning(A, globs, 0)) if entry.chunks}


def test_without_an_overlay_everything_is_kept() -> None:
    entries = [tensor("model/a"), tensor("optimizer/a")]
    assert kept_entries(entries, None) == entries


def test_leaves_below_a_glob_are_dropped() -> None:
    entries = [tensor("model/a"), tensor("optimizer/state/0/exp_avg"), tensor("optimizer2/a")]
    assert kept(entries, "optimizer/**") == {"model/a", "optimizer2/a"}
    assert kept(entries, "optimizer", "model") == {"optimizer2/a"}


def test_bytes_of_a_dropped_leaf_stay_while_a_kept_alias_needs_them() -> None:
    alias = Entry("model/head", Kind.ALIAS, attrs={"target": "ema/head"})
    assert kept([tensor("ema/head"), tensor("ema/other"), alias], "ema/**") == {"ema/head"}
    assert kept([tensor("ema/head"), alias], "ema/**", "model/**") == set()


def test_a_hidden_storage_stays_until_all_of_its_views_are_dropped() -> None:
    def view(path: str) -> Entry:
        return Entry(path, Kind.VIEW, "float32", (10,), attrs={"storage": "~storage/0"}, raw_bytes=40)

    storage = Entry("~storage/0", Kind.STORAGE, "uint8", (1200,), raw_bytes=1200, chunks=b"s" * 16)
    entries = [view("model/a"), view("flat/a"), storage]
    assert kept(entries, "flat") == {"~storage/0"}
    assert kept(entries, "flat", "model") == set()
    assert kept(entries, "**") == set()
    aliased = [*entries, Entry("other", Kind.ALIAS, attrs={"target": "flat/a"})]
    assert kept(aliased, "flat", "model") == {"~storage/0"}


def test_a_tensor_made_of_parts_is_dropped_whole_or_not_at_all() -> None:
    sparse = Entry("optimizer/grad", Kind.SPARSE, shape=(2,))
    entries = [sparse, tensor("optimizer/grad/~indices"), tensor("optimizer/grad/~values")]
    parts = {"optimizer/grad/~indices", "optimizer/grad/~values"}
    assert kept(entries, "optimizer/grad/~values") == parts
    assert kept(entries, "optimizer/*") == set()
    assert kept([*entries, Entry("model/g", Kind.ALIAS, attrs={"target": "optimizer/grad"})], "optimizer") == parts


def test_an_escaped_key_is_no_part_of_a_tensor() -> None:
    entries = [tensor("optimizer/~s:12"), tensor("optimizer/~n"), tensor("optimizer/x")]
    assert kept(entries, "optimizer/~s:12", "optimizer/~n") == {"optimizer/x"}
