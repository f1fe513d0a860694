"""Hypothesis: any state comes back as it was, whole, in part, and into a live state."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from castore.format.identity import entry_digest
from castore.format.manifest import Kind
from castore.hashing import hasher_for
from castore.tensors import flatten
from tests.tensors.equality import array_bytes, assert_states_equal, leaf_table
from tests.tensors.round_trip import Saved, read_pieces, round_trip, write_pieces
from tests.tensors.strategies import ndarrays, scalars, sharing_ndarrays, sharing_tensors, states, tensors


@given(states())
def test_any_state_comes_back(state: Any) -> None:
    assert_states_equal(round_trip(state), state)


@given(states())
def test_a_loaded_state_saves_to_the_same_entries(state: Any) -> None:
    saved = Saved(state)
    again = Saved(saved.load())
    shared = {entry.path for entry in saved.entries if entry.kind in (Kind.VIEW, Kind.STORAGE)}
    if not any(entry.attrs.get("conj") or entry.attrs.get("neg") for entry in saved.entries):
        assert [e for e in again.entries if e.path not in shared] == [e for e in saved.entries if e.path not in shared]


@given(scalars())
def test_any_scalar_comes_back(value: Any) -> None:
    assert_states_equal(round_trip(value), value)


@given(tensors())
def test_the_payload_of_a_tensor_is_its_logical_bytes(tensor: torch.Tensor) -> None:
    flat = flatten(tensor)
    (payload,) = flat.payloads
    assert payload is not None
    assert read_pieces(payload) == array_bytes(tensor)
    assert bytes(payload.read(0, payload.raw_bytes)) == array_bytes(tensor)


@given(tensors(), st.data())
def test_any_range_of_a_tensor_can_be_read(tensor: torch.Tensor, data: st.DataObject) -> None:
    (payload,) = flatten(tensor).payloads
    assert payload is not None
    start = data.draw(st.integers(0, payload.raw_bytes))
    stop = data.draw(st.integers(start, payload.raw_bytes))
    assert bytes(payload.read(start, stop)) == array_bytes(tensor)[start:stop]


@given(ndarrays(), st.data())
def test_any_range_of_an_ndarray_can_be_read(array: np.ndarray[Any, Any], data: st.DataObject) -> None:
    (payload,) = flatten(array).payloads
    assert payload is not None
    assert payload.raw_bytes == array.nbytes
    start = data.draw(st.integers(0, payload.raw_bytes))
    stop = data.draw(st.integers(start, payload.raw_bytes))
    whole = bytes(payload.read(0, payload.raw_bytes))
    assert bytes(payload.read(start, stop)) == whole[start:stop]
    assert read_pieces(payload, piece_bytes=7) == whole


@given(st.lists(sharing_tensors() | sharing_ndarrays(), min_size=1, max_size=3))
def test_what_shared_memory_shares_it_again(groups: list[list[Any]]) -> None:
    state = [item for group in groups for item in group]
    loaded = round_trip(state)
    assert_states_equal(loaded, state)
    for at, value in enumerate(state):
        for other in range(at):
            is_same_group = _bounds(value) is not None and _overlaps(value, state[other])
            assert _overlaps(loaded[at], loaded[other]) == is_same_group
            if value.nbytes and not isinstance(value, torch.nn.Parameter):
                assert (loaded[at] is loaded[other]) == (value is state[other])


@given(st.lists(sharing_tensors(), min_size=1, max_size=2), st.data())
def test_a_write_through_one_view_shows_in_the_others(groups: list[list[Any]], data: st.DataObject) -> None:
    # Without expanded ones: these come back with memory of its own for every element.
    state = [item for group in groups for item in group if 0 not in item.stride()]
    loaded = round_trip(state)
    for at in data.draw(st.permutations(range(len(state)))):
        for values in (state, loaded):
            raw = values[at].detach()
            if raw.numel():
                raw[0].fill_(at)
    assert_states_equal(loaded, state)


@given(states(), st.data())
def test_a_part_of_a_state_is_that_part_of_the_whole(state: Any, data: st.DataObject) -> None:
    saved = Saved(state)
    visible = [e.path for e in saved.entries if e.kind is not Kind.STORAGE and "~" not in e.path.rpartition("/")[2][:1]]
    if not visible:
        return
    path = data.draw(st.sampled_from(visible))
    part = saved.load(keep=lambda other: other == path)
    for component in path.split("/") if path else []:
        part = _child(part, component)
    whole = saved.load()
    for component in path.split("/") if path else []:
        whole = _child(whole, component)
    assert_states_equal(part, whole)


@given(states())
def test_a_live_state_takes_the_values_of_another(state: Any) -> None:
    saved = Saved(state)
    try:
        live = copy.deepcopy(state)
    except (RuntimeError, NotImplementedError):
        return  # torch cannot copy every dtype
    flat = flatten(live)
    if any(entry.kind in (Kind.ALIAS, Kind.VIEW, Kind.STORAGE, Kind.QUANTIZED) for entry in flat.entries):
        return
    if [e.kind for e in flat.entries] != [e.kind for e in saved.entries]:
        return
    arrays = [p.array for p in flat.payloads if hasattr(p, "array")]
    if any(a.may_overlap_itself or (a.family == "numpy" and not a.value.flags.writeable) for a in arrays):
        return
    for payload in flat.payloads:
        if hasattr(payload, "array"):
            _scramble(payload.array.value)
    loaded = saved.load_into(live)
    assert_states_equal(loaded, state, strides=False)


def test_two_states_of_equal_bytes_have_equal_leaf_digests() -> None:
    hasher = hasher_for("xxh3-128")
    base = torch.arange(200, dtype=torch.float32).reshape(10, 20)
    shared = Saved({"a": base, "b": base.t()}).entries
    apart = Saved({"a": base.clone(), "b": base.t().contiguous()}).entries
    for path in ("a", "b"):
        left, right = (next(e for e in entries if e.path == path) for entries in (shared, apart))
        assert entry_digest(hasher, left) == entry_digest(hasher, right)


def _bounds(value: Any) -> tuple[int, int] | None:
    return None if value.nbytes == 0 else (0, 1)


def _overlaps(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) is not isinstance(b, torch.Tensor) or not a.nbytes or not b.nbytes:
        return False
    return bool(np.shares_memory(_addresses(a), _addresses(b)))


def _addresses(value: Any) -> np.ndarray[Any, Any]:
    if isinstance(value, np.ndarray):
        return value
    plain = value.detach()
    words = torch.empty(0, dtype=torch.uint8).set_(
        plain.untyped_storage(),
        plain.storage_offset() * plain.itemsize,
        (*plain.shape, plain.itemsize),
        (*(step * plain.itemsize for step in plain.stride()), 1),
    )
    return words.numpy()


def _child(value: Any, component: str) -> Any:
    from castore.format.paths import decode_key

    key: Any = decode_key(component)
    if isinstance(value, dict):
        return value[key]
    return value[key] if isinstance(value, list | tuple) and isinstance(key, int) else getattr(value, str(key))


def _scramble(value: Any) -> None:
    if value.nbytes:
        from castore.tensors.targets import live_target

        entry = flatten(value).entries[0]
        write_pieces(live_target(value, entry), b"\x5a" * entry.raw_bytes)


def test_the_table_of_a_view_shows_its_own_bytes() -> None:
    base = torch.arange(6, dtype=torch.float32)
    rows = {row[0]: row for row in leaf_table({"a": base[:4], "b": base[2:]})}
    assert rows["a"][5] == base[:4].numpy().tobytes()
    assert rows["b"][5] == base[2:].numpy().tobytes()
    assert rows["~storage/0"][5] == base.numpy().tobytes()
