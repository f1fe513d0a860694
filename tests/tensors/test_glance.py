"""The first look: what it finds is what taking the state apart describes."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
import pytest

from castore.errors import UnsupportedLeafError, UsageError
from castore.tensors import ArrayPayload, flatten, glance

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


def test_a_deep_state_is_no_recursion() -> None:
    state: Any = torch.zeros(1)
    for _ in range(100_000):
        state = [state]
    assert len(glance(state).arrays) == 1


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
