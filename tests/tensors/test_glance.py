"""The first look: what it finds is what taking the state apart describes."""

from __future__ import annotations

import dataclasses
import gc
import random
import sys
import types
import weakref
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given

from castore.errors import UnsupportedLeafError, UsageError
from castore.options import SKELETON_DEPTH_MAX
from castore.tensors import ArrayPayload, flatten, flatten_outline, glance
from tests.tensors.strategies import states

torch = pytest.importorskip("torch")


class Pair(NamedTuple):
    left: Any
    right: Any


class Counted(NamedTuple):
    step: int
    weights: Any


@dataclasses.dataclass
class Record:
    weights: Any
    note: str = "text"


def described(state: Any) -> dict[int, tuple[object, ...]]:
    payloads = [payload for payload in flatten(state).payloads if isinstance(payload, ArrayPayload)]
    return {id(payload.array.value): payload.array.key for payload in payloads}


def test_it_finds_the_arrays_of_every_container() -> None:
    shared = torch.randn(40, 30)
    state = {
        "dict": {"w": torch.randn(3, 5), 7: np.zeros((2, 3))},
        "ordered": OrderedDict(a=torch.nn.Parameter(torch.randn(4)), b=torch.zeros(())),
        "list": [torch.ones(3, dtype=torch.bfloat16), (np.arange(5), [torch.empty(0)])],
        "pair": Pair(torch.randn(2), np.ones(2, ">f8")),
        "record": Record(torch.randn(6)),
        "transposed": shared.t(),
        "conj": torch.randn(5, dtype=torch.complex64).conj(),
        "numbers": list(range(1000)),
        "first a number": [0.9, {"ema": torch.randn(7)}, (3, torch.randn(8))],
        "counted": Counted(5, torch.randn(9)),
        "scalars": [1, 2.5, None, "text", b"bytes", torch.float32, torch.Size([1, 2])],
    }
    found = glance(state).arrays
    assert {name: array.key for name, array in found.items()} == described(state)
    assert flatten(state, known=found).entries == flatten(state).entries


def test_it_leaves_to_flatten_what_it_does_not_know() -> None:
    strange = [
        torch.empty(3, device="meta"),
        np.array([object()]),
        object(),
        torch.nn.Linear(2, 2),
    ]
    assert glance({"strange": strange}).arrays == {}
    for value in strange:
        with pytest.raises(UnsupportedLeafError):
            flatten({"value": value}, known=glance({"value": value}).arrays)


def test_freed_storage_is_not_read() -> None:
    freed = torch.randn(1000)
    freed.untyped_storage().resize_(0)
    assert glance([freed]).arrays == {}


def test_a_state_that_holds_itself_ends() -> None:
    state: dict[str, Any] = {"w": torch.zeros(3)}
    state["self"] = [state]
    assert len(glance(state).arrays) == 1
    with pytest.raises(UsageError, match="contains itself"):
        flatten(state, known=glance(state).arrays)


def test_states_that_hold_themselves_in_many_ways_end() -> None:
    """2 to the power of 200 ways round."""
    both: list[Any] = [torch.zeros(3)]
    both.extend([both, both])
    root: dict[str, Any] = {"parent": None, "children": []}
    for _ in range(3):
        child: dict[str, Any] = {"parent": root, "children": [], "w": torch.zeros(2)}
        child["children"].extend({"parent": child, "root": root} for _ in range(3))
        root["children"].append(child)
    record = Record([])
    record.weights.extend([record, record, both])
    for state, count in ((both, 1), (root, 3), ({"x": record}, 1)):
        found = glance(state)
        assert not found.has_outline
        assert len(found.arrays) == count
        with pytest.raises(UsageError, match="contains itself"):
            flatten(state, known=found.arrays)


def test_a_container_at_several_places_has_an_outline() -> None:
    shared = {"w": torch.zeros(3), "list": [1, "x"]}
    found = glance({"one": shared, "two": [shared, shared]})
    assert found.has_outline
    assert flatten_outline(found.outline).entries == flatten({"one": shared, "two": [shared, shared]}).entries


def test_a_state_that_is_too_deep_is_left_to_flatten() -> None:
    state: Any = torch.zeros(1)
    for depth in range(100_000):
        state = [state]
        if depth + 1 in (SKELETON_DEPTH_MAX, SKELETON_DEPTH_MAX + 1):
            found = glance(state)
            assert found.has_outline == (depth < SKELETON_DEPTH_MAX)
            assert len(found.arrays) == found.has_outline
    assert not glance(state).has_outline
    with pytest.raises(UsageError, match="nested deeper"):
        flatten(state, known=glance(state).arrays)


# ---- outlines ----------------------------------------------------------------------------------------------


@given(states())
def test_an_outline_stands_for_the_state(state: Any) -> None:
    found = glance(state)
    try:
        flat = flatten(state)
    except (UnsupportedLeafError, UsageError):
        assert not found.has_outline
        return
    if not found.has_outline:
        return
    outlined = flatten_outline(found.outline)
    assert outlined.entries == flat.entries
    for one, other in zip(outlined.payloads, flat.payloads, strict=True):
        assert type(one) is type(other)
        if one is not None and other is not None:
            assert one.read(0, one.raw_bytes) == other.read(0, other.raw_bytes)
    for array in found.arrays.values():
        array.let_go()
    assert flatten_outline(found.outline).entries == flat.entries


def training_state() -> dict[str, Any]:
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 5)).sum().backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "parameters": list(model.parameters()),
        "optimizer": optimizer.state_dict(),
        "torch_rng": torch.get_rng_state(),
        "python_rng": random.getstate(),
        "numpy_rng": np.random.default_rng(0).bit_generator.state,
        "tied": [model[0].weight, model[0].weight, model[0].weight.detach()],
        "strided": torch.randn(6, 4).t()[1:],
        "loader": {"order": list(range(100)), "seen": bytearray(b"0123"), "epochs": [1, 2.5, None], 3: np.float32(7)},
        "kinds": (torch.float32, torch.device("cpu"), torch.Size([1, 2]), 3 + 4j, -(10**50)),
    }


def test_the_state_of_a_training_has_an_outline_that_no_change_reaches() -> None:
    state = training_state()
    expected = flatten(state).entries
    found = glance(state)
    assert found.has_outline
    seen = [weakref.ref(array.value) for array in found.arrays.values()]

    state["model"]._metadata["0"]["version"] = 99
    state["model"].clear()
    state["parameters"][0].requires_grad_(False)
    state["parameters"].append(5)
    state["optimizer"]["param_groups"][0]["lr"] = 7.0
    state["optimizer"]["param_groups"][0]["params"].append(8)
    state["tied"][2].requires_grad_()
    state["loader"]["order"].reverse()
    state["loader"]["epochs"][0] = 9
    state["loader"]["seen"][0] = 0
    state["torch_rng"].resize_(3)
    state["strided"].t_()
    del state

    for array in found.arrays.values():
        array.let_go()
    gc.collect()
    assert not any(ref() is not None for ref in seen)
    assert flatten_outline(found.outline).entries == expected


def test_texts_are_what_they_were() -> None:
    state = {"seen": bytearray(b"before"), "order": [1, 2, 3] * 20}
    found = glance(state)
    state["seen"][:] = b"after!"
    state["order"][:] = [0] * 60
    flat = flatten_outline(found.outline)
    leaves = zip(flat.entries, flat.payloads, strict=True)
    texts = {entry.path: bytes(payload.read(0, payload.raw_bytes)) for entry, payload in leaves if payload}
    assert texts["seen"] == b"before"
    assert np.frombuffer(texts["order"], "<i8").tolist() == [1, 2, 3] * 20


@pytest.mark.parametrize(
    "state",
    [
        {"x": object()},
        {"x": Pair(1, 2)},
        {"x": Record(1)},
        {object(): 1},
        {float("nan"): 1, -float("nan"): 2},
        {(1, 2): 3},
        {10**1000: 1},
        {"x": np.array([object()])},
        {"x": torch.empty(3, device="meta")},
        {"x": torch.randn(3, 3).to_sparse()},
    ],
    ids=lambda state: str(next(iter(state)))[:10] + type(next(iter(state.values()))).__name__,
)
def test_what_flatten_may_refuse_or_takes_apart_has_no_outline(state: Any) -> None:
    assert not glance(state).has_outline
    assert not glance({"before": 1, "deep": [state], "after": torch.zeros(3)}).has_outline


def test_an_ordered_dict_with_attributes_has_no_outline() -> None:
    state: Any = OrderedDict(a=1)
    state.note = "would be lost"
    assert not glance({"x": state}).has_outline


def test_parts_of_composites_are_found_and_text_is_counted() -> None:
    sparse = torch.randn(300, 300).to_sparse()
    quantized = torch.quantize_per_tensor(torch.randn(4000), 0.1, 0, torch.qint8)
    found = glance({"sparse": sparse, "csr": torch.randn(30, 30).to_sparse_csr(), "quantized": quantized})
    lengths = sorted(array.raw_bytes for array in found.arrays.values())
    assert lengths[-2:] == [300 * 300 * 4, 2 * 300 * 300 * 8]
    assert 4000 in lengths
    assert glance([b"x" * 1000, "y" * 500, bytearray(20)]).text_bytes == 1520


def test_no_code_of_the_state_runs_that_flatten_does_not_run() -> None:
    class Hostile(list):  # type: ignore[type-arg]
        def __bool__(self) -> bool:
            raise RuntimeError("asked")

        def __getitem__(self, index: Any) -> Any:
            raise RuntimeError("asked")

        def __iter__(self) -> Any:
            raise RuntimeError("asked")

    state = {"hostile": Hostile([1, 2]), "w": torch.randn(3)}
    assert len(glance(state).arrays) == 1
    with pytest.raises(UnsupportedLeafError):
        flatten(state, known=glance(state).arrays)


def test_torch_may_be_half_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """By another thread: there is a torch.Tensor long before there is a torch.nn."""
    half = types.ModuleType("torch")
    half.Tensor = torch.Tensor  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch", half)
    state = {"w": np.ones(3), "step": 1, "note": "text"}
    assert flatten(state, known=glance(state).arrays).entries == flatten(state).entries
