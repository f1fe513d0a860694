"""The first look: what it finds is what taking the state apart describes."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
import pytest

from castore.errors import UnsupportedLeafError, UsageError
from castore.tensors import ArrayPayload, find_arrays, flatten

torch = pytest.importorskip("torch")


class Pair(NamedTuple):
    left: Any
    right: Any


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
        "scalars": [1, 2.5, None, "text", b"bytes", torch.float32, torch.Size([1, 2])],
    }
    found = find_arrays(state)
    assert {name: array.key for name, array in found.items()} == described(state)
    assert flatten(state, known=found).entries == flatten(state).entries


def test_it_leaves_to_flatten_what_it_does_not_know() -> None:
    quantized = torch.quantize_per_tensor(torch.randn(4), 0.1, 0, torch.qint8)
    strange = [
        torch.randn(3, 3).to_sparse(),
        torch.randn(3, 3).to_sparse_csr(),
        quantized,
        torch.empty(3, device="meta"),
        np.array([object()]),
        object(),
        torch.nn.Linear(2, 2),
    ]
    assert find_arrays({"strange": strange}) == {}
    for value in strange[3:]:
        with pytest.raises(UnsupportedLeafError):
            flatten({"value": value}, known=find_arrays({"value": value}))


def test_freed_storage_is_not_read() -> None:
    freed = torch.randn(1000)
    freed.untyped_storage().resize_(0)
    assert find_arrays([freed]) == {}


def test_a_state_that_holds_itself_ends() -> None:
    state: dict[str, Any] = {"w": torch.zeros(3)}
    state["self"] = [state]
    assert len(find_arrays(state)) == 1
    with pytest.raises(UsageError, match="contains itself"):
        flatten(state, known=find_arrays(state))


def test_a_deep_state_is_no_recursion() -> None:
    state: Any = torch.zeros(1)
    for _ in range(100_000):
        state = [state]
    assert len(find_arrays(state)) == 1
    while isinstance(state, list):  # taken down by hand: the interpreter would recurse
        state = state.pop()
