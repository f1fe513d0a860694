"""Putting states together: whole, in part, and from entries that a stranger wrote."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from castore.errors import CastoreError, FormatError, UsageError
from castore.format.manifest import Entry, Kind
from castore.tensors import allocate, flatten, make_view, match, select, slice_rows, unflatten
from tests.tensors.equality import assert_states_equal
from tests.tensors.round_trip import Saved
from tests.tensors.strategies import states


def keep(*wanted: str) -> Any:
    return lambda path: path in wanted


def test_a_list_that_lost_an_item_becomes_a_dict_keyed_by_index() -> None:
    saved = Saved({"a": [10, 11, (12, 13)], "b": 5})
    assert saved.load(keep=keep("a/1", "a/2/0")) == {"a": {1: 11, 2: {0: 12}}}
    assert saved.load(keep=keep("a")) == {"a": [10, 11, (12, 13)]}


def test_a_subset_without_its_containers_gets_dicts_around_it() -> None:
    saved = Saved({"a": [10, {"b": 11}]})
    entries = [entry for entry in saved.entries if entry.path == "a/1/b"]
    assert unflatten(entries, saved.values(entries)) == {"a": {1: {"b": 11}}}
    assert unflatten([], {}) == {}


def test_empty_containers_can_be_selected() -> None:
    saved = Saved({"a": {}, "b": [], "c": 1})
    assert saved.load(keep=keep("a")) == {"a": {}}
    assert saved.load(keep=keep("b")) == {"b": []}


def test_nothing_selected_is_an_empty_selection() -> None:
    assert select(Saved({"a": 1}).entries, keep("nowhere")) == ()


def test_everything_selected_is_the_same_entries() -> None:
    entries = Saved({"a": [1, torch.zeros(2)]}).entries
    assert select(entries, lambda _: True) == entries
    assert select(entries, keep("")) == entries


def test_an_alias_without_its_target_takes_the_targets_place() -> None:
    weight = torch.randn(20, 20)
    saved = Saved({"target": weight, "one": weight, "two": weight, "other": weight.detach(), "more": weight})
    loaded = saved.load(keep=keep("one", "two", "other"))
    assert torch.equal(loaded["one"], weight)
    assert loaded["one"] is loaded["two"]
    assert loaded["other"] is not loaded["one"]
    assert loaded["other"].data_ptr() == loaded["one"].data_ptr()
    alone = saved.load(keep=keep("other"))
    assert torch.equal(alone["other"], weight)


def test_another_object_that_takes_the_targets_place_keeps_what_it_is() -> None:
    linear = torch.nn.Linear(30, 30)
    saved = Saved({"plain": linear.weight.detach(), "parameter": linear.weight, "again": linear.weight})
    loaded = saved.load(keep=keep("parameter", "again"))
    assert type(loaded["parameter"]) is torch.nn.Parameter
    assert loaded["again"] is loaded["parameter"]
    back = Saved({"parameter": linear.weight, "plain": linear.weight.detach()}).load(keep=keep("plain"))
    assert type(back["plain"]) is torch.Tensor
    assert not back["plain"].requires_grad


def test_an_alias_of_a_sparse_tensor_takes_its_parts_along() -> None:
    values = torch.randn(100)
    sparse = torch.sparse_coo_tensor(torch.arange(100)[None], values, (100,), is_coalesced=True, check_invariants=True)
    saved = Saved({"v": values, "first": sparse, "second": sparse, "third": sparse})
    loaded = saved.load(keep=keep("second", "third"))
    assert torch.equal(loaded["second"].to_dense(), sparse.to_dense())
    assert loaded["second"] is loaded["third"]
    both = saved.load(keep=keep("second", "v"))
    both["v"][3] = 77
    assert both["second"].to_dense()[3] == 77
    part = saved.load(keep=keep("second", "first/~values"))
    assert torch.equal(part["second"].to_dense(), sparse.to_dense())


def test_one_view_is_loaded_from_its_hull() -> None:
    base = torch.randn(10, 10)
    saved = Saved({"a": base, "b": base.t(), "c": torch.zeros(2)})
    assert [entry.path for entry in select(saved.entries, keep("b"))] == ["", "b", "~storage/0"]
    assert torch.equal(saved.load(keep=keep("b"))["b"], base.t())
    assert "~storage/0" not in [entry.path for entry in select(saved.entries, keep("c"))]


@given(states(), st.sets(st.integers(0, 30)))
def test_any_selection_is_complete_in_itself(state: Any, numbers: set[int]) -> None:
    saved = Saved(state)
    wanted = {entry.path for at, entry in enumerate(saved.entries) if at in numbers}
    chosen = select(saved.entries, wanted.__contains__)
    unflatten(chosen, saved.values(chosen))
    assert select(chosen, lambda _: True) == chosen


@pytest.mark.parametrize("order", ["rows", "columns"])
def test_rows_are_read_by_their_bytes(order: str) -> None:
    tensor = torch.arange(60, dtype=torch.int32).reshape(5, 4, 3)
    if order == "columns":
        tensor = tensor.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    flat = flatten(tensor)
    part, first = slice_rows(flat.entries[0], 1, 4)
    value, target = allocate(part)
    assert flat.payloads[0] is not None
    target.memory()[:] = flat.payloads[0].read(first, first + part.raw_bytes)
    assert torch.equal(value, tensor[1:4])


def test_rows_that_are_not_there_are_refused() -> None:
    entry = flatten(np.zeros((3, 2))).entries[0]
    assert slice_rows(entry, 3, 3) == (replace(entry, shape=(0, 2), raw_bytes=0), 48)
    for start, stop in [(0, 4), (2, 1), (-1, 2)]:
        with pytest.raises(UsageError, match="expected rows"):
            slice_rows(entry, start, stop)
    with pytest.raises(UsageError, match="no axes"):
        slice_rows(flatten(torch.tensor(1)).entries[0], 0, 1)


def test_a_value_that_was_not_given_is_named() -> None:
    with pytest.raises(UsageError, match="leaf 'a'"):
        unflatten(Saved({"a": 1}).entries, {})


def view(**changes: Any) -> Entry:
    attrs = {"storage": "~storage/0", "offset_bytes": 4, "stride_bytes": [8, 4], **changes.pop("attrs", {})}
    return replace(Entry("v", Kind.VIEW, "float32", (2, 2), attrs=attrs, raw_bytes=16), **changes)


def test_a_view_reads_and_writes_its_storage() -> None:
    for storage, dtype in ((torch.arange(24, dtype=torch.uint8), "float32"), (np.arange(24, dtype="|u1"), "<f4")):
        made = make_view(view(dtype=dtype), storage)
        made[0, 0] = 0.0
        assert storage[4:8].tolist() == [0, 0, 0, 0]
        assert storage[8] == 8


@pytest.mark.parametrize(
    "entry",
    [
        view(attrs={"offset_bytes": 12}),
        view(attrs={"offset_bytes": -4}),
        view(attrs={"offset_bytes": 2}),
        view(attrs={"offset_bytes": None}),
        view(attrs={"offset_bytes": 2**70}),
        view(attrs={"stride_bytes": [8, 6]}),
        view(attrs={"stride_bytes": [-4, 4]}),
        view(attrs={"stride_bytes": [4]}),
        view(attrs={"stride_bytes": ["8", 4]}),
        view(attrs={"stride_bytes": [2**70, 4]}),
        view(shape=(9, 2), raw_bytes=72),
        view(raw_bytes=17),
        view(dtype="<f4"),
        view(dtype="qint8"),
    ],
)
def test_a_view_that_reaches_beyond_its_storage_is_refused(entry: Entry) -> None:
    with pytest.raises(FormatError, match="leaf 'v'"):
        make_view(entry, torch.zeros(24, dtype=torch.uint8))


def value(path: str, kind: Kind = Kind.NONE, **fields: Any) -> Entry:
    return Entry(path, kind, **fields)


@pytest.mark.parametrize(
    "entries",
    [
        [value("", Kind.LIST, shape=(1,)), value("1")],
        [value("", Kind.LIST, shape=(2,)), value("1"), value("0")],
        [value("", Kind.LIST, shape=(1,)), value("a")],
        [value("a"), value("a/b")],
        [value("a"), value("a")],
        [value("~bad:x")],
        [value("~b:true"), value("1")],
        [value("/".join(["a"] * 300))],
        [value("a", Kind.ALIAS, attrs={"target": "a"})],
        [value("a", Kind.ALIAS, attrs={"target": "b"}), value("b", Kind.ALIAS, attrs={"target": "a"})],
        [value("a", Kind.ALIAS, attrs={"target": "b"}), value("b")],
        [value("a", Kind.ALIAS)],
        [value("a", Kind.VIEW, dtype="float32", attrs={"storage": "~storage/0"})],
        [value("s", Kind.SPARSE, shape=(0,))],
        [value("s", Kind.SPARSE, shape=(0,), attrs={"layout": "x"})],
    ],
)
def test_entries_that_make_no_state_are_refused(entries: list[Entry]) -> None:
    values = {entry.path: None for entry in entries}
    with pytest.raises(FormatError):
        unflatten(entries, values)


KINDS = st.sampled_from(sorted(Kind))
ODD = (
    st.none()
    | st.integers(-5, 2**66)
    | st.text(max_size=3)
    | st.lists(st.integers(-9, 99), max_size=3)
    | st.binary(max_size=8)
)
NAMES = [
    "target",
    "storage",
    "offset_bytes",
    "stride_bytes",
    "class",
    "fields",
    "layout",
    "shape",
    "descr",
    "stride",
    "object",
]


@given(states(max_leaves=6), st.data())
def test_hostile_changes_of_entries_give_a_state_or_a_typed_error(state: Any, data: st.DataObject) -> None:
    saved = Saved(state)
    entries = list(saved.entries)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(entries) - 1))
        entry = entries[at]
        others = st.sampled_from([other.path for other in entries]) | st.just("~storage/0")
        change = data.draw(st.sampled_from(["path", "kind", "dtype", "shape", "attrs", "hints", "drop", "raw_bytes"]))
        if change == "drop":
            del entries[at]
            if not entries:
                return
        elif change == "path":
            entries[at] = replace(entry, path=data.draw(others | st.text("ab/~:1", max_size=6)))
        elif change == "kind":
            entries[at] = replace(entry, kind=data.draw(KINDS))
        elif change == "dtype":
            entries[at] = replace(
                entry, dtype=data.draw(st.sampled_from(["float32", "<f4", "int8", "", "|O", "uint1", "x"]))
            )
        elif change == "shape":
            entries[at] = replace(entry, shape=tuple(data.draw(st.lists(st.integers(0, 2**40), max_size=3))))
        elif change == "raw_bytes":
            entries[at] = replace(entry, raw_bytes=data.draw(st.integers(0, 500)))
        else:
            extra = {data.draw(st.sampled_from(NAMES)): data.draw(ODD | others)}
            entries[at] = replace(entry, **{change: {**getattr(entry, change), **extra}})
    _try_everything(saved, entries, state)


def _try_everything(saved: Saved, entries: list[Entry], state: Any) -> None:
    """Loading may fail in its own words only, and without touching memory that it does not own."""
    values: dict[str, Any] = {}
    for entry in entries:
        try:
            values.update(saved.values([replace(entry, inline=b"\1" * entry.raw_bytes, chunks=None)]))
        except CastoreError:
            continue
    for call in (
        lambda: unflatten(entries, values, missing_classes="dict"),
        lambda: unflatten(select(entries, lambda path: len(path) % 2 == 0), values),
        lambda: match(flatten(state), entries),
    ):
        try:
            call()
        except CastoreError:
            continue


def test_loading_twice_gives_states_that_share_nothing() -> None:
    saved = Saved({"a": torch.zeros(3)})
    one, other = saved.load(), saved.load()
    one["a"][0] = 1
    assert_states_equal(other, {"a": torch.zeros(3)})
