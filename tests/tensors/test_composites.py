"""Sparse and quantized tensors, and what a stranger could write in their place."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from castore.errors import CastoreError, FormatError
from castore.format.manifest import Kind
from castore.tensors import flatten, unflatten
from tests.tensors.equality import leaf_table
from tests.tensors.round_trip import Saved, round_trip
from tests.tensors.strategies import quantized_tensors, sparse_tensors


@given(sparse_tensors() | quantized_tensors())
def test_every_layout_comes_back(tensor: torch.Tensor) -> None:
    loaded = round_trip(tensor)
    assert loaded.layout is tensor.layout
    assert loaded.dtype is tensor.dtype
    assert leaf_table(loaded) == leaf_table(tensor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64, torch.int64, torch.bool])
def test_values_of_other_types_come_back(dtype: torch.dtype) -> None:
    tensor = torch.eye(3).to(dtype).to_sparse()
    assert torch.equal(round_trip(tensor).to_dense(), tensor.to_dense())


def test_an_uncoalesced_tensor_stays_uncoalesced() -> None:
    index, values = torch.tensor([[0, 0, 1]]), torch.tensor([1.0, 2.0, 3.0])
    tensor = torch.sparse_coo_tensor(index, values, (2,), check_invariants=True)
    loaded = round_trip(tensor)
    assert not loaded.is_coalesced()
    assert loaded._nnz() == 3
    assert round_trip(tensor.coalesce()).is_coalesced()


def test_hybrid_empty_and_grad_requiring_sparse_tensors_come_back() -> None:
    hybrid = torch.sparse_coo_tensor(torch.tensor([[0, 2]]), torch.randn(2, 3), (4, 3), check_invariants=True)
    empty = torch.sparse_coo_tensor(size=(3, 3), check_invariants=True)
    loaded = round_trip([hybrid.requires_grad_(), empty, torch.nn.Parameter(torch.eye(2).to_sparse())])
    assert torch.equal(loaded[0].to_dense(), hybrid.to_dense())
    assert loaded[0].requires_grad
    assert loaded[1].shape == (3, 3)
    assert type(loaded[2]) is torch.nn.Parameter


def test_a_quantized_tensor_keeps_its_scale_to_the_bit() -> None:
    tensor = torch.quantize_per_tensor(torch.randn(3, 4), 0.1 + 2**-50, 7, torch.quint8)
    loaded = round_trip(tensor)
    assert loaded.q_scale() == tensor.q_scale()
    assert loaded.q_zero_point() == 7
    assert torch.equal(loaded.int_repr(), tensor.int_repr())


def test_paths_of_parts_are_as_pinned() -> None:
    scales = torch.ones(2)
    state = {
        "coo": torch.eye(2).to_sparse(),
        "csr": torch.eye(2).to_sparse_csr(),
        "csc": torch.eye(2).to_sparse_csc(),
        "q": torch.quantize_per_channel(torch.zeros(2, 2), scales, torch.zeros(2, dtype=torch.long), 0, torch.qint8),
    }
    assert [entry.path for entry in flatten(state).entries[1:]] == [
        *("coo", "coo/~indices", "coo/~values"),
        *("csr", "csr/~crow", "csr/~col", "csr/~values"),
        *("csc", "csc/~ccol", "csc/~row", "csc/~values"),
        *("q", "q/~int_repr", "q/~scales", "q/~zero_points"),
    ]


def test_parts_that_were_left_out_leave_a_dict_of_parts() -> None:
    loaded = Saved({"s": torch.eye(2).to_sparse()}).load(keep=lambda path: path == "s/~values")
    assert loaded["s"]["~values"].tolist() == [1, 1]


def changed(saved: Saved, path: str, value: torch.Tensor) -> Any:
    """Load with another tensor in the place of one part."""
    values = saved.values(saved.entries)
    values[path] = value
    return unflatten(saved.entries, values)


@pytest.mark.parametrize(
    ("tensor", "part", "value"),
    [
        (torch.eye(3).to_sparse(), "~indices", torch.tensor([[0, 1, 99], [0, 1, 2]])),
        (torch.eye(3).to_sparse(), "~indices", torch.tensor([[0, 1, -1], [0, 1, 2]])),
        (torch.eye(3).to_sparse(), "~indices", torch.tensor([[2, 1, 0], [0, 1, 2]])),
        (torch.eye(3).to_sparse(), "~indices", torch.tensor([[0, 0, 1], [0, 0, 2]])),
        (torch.eye(3).to_sparse(), "~values", torch.zeros(2)),
        (torch.eye(3).to_sparse(), "~indices", torch.zeros(2, 3)),
        (torch.eye(3).to_sparse_csr(), "~col", torch.tensor([0, 1, 77])),
        (torch.eye(3).to_sparse_csr(), "~crow", torch.tensor([0, 9, 2, 3])),
        (torch.eye(3).to_sparse_csr(), "~crow", torch.tensor([0, 3])),
    ],
)
def test_indices_that_point_outside_are_refused(tensor: torch.Tensor, part: str, value: torch.Tensor) -> None:
    with pytest.raises(FormatError, match="make no sparse tensor"):
        changed(Saved(tensor), part, value)


def test_quantization_parameters_that_do_not_fit_are_refused() -> None:
    zero_points = torch.zeros(2, dtype=torch.long)
    saved = Saved(torch.quantize_per_channel(torch.zeros(2, 2), torch.ones(2), zero_points, 0, torch.qint8))
    for part, value in [
        ("~scales", torch.ones(1)),
        ("~zero_points", torch.zeros(9, dtype=torch.long)),
        ("~int_repr", torch.zeros(2, 2, dtype=torch.uint8)),
        ("~int_repr", torch.zeros(3, dtype=torch.int8)),
        ("~int_repr", 3),
    ]:
        with pytest.raises(FormatError):
            changed(saved, part, value)  # type: ignore[arg-type]


ATTRIBUTES = st.dictionaries(
    st.sampled_from(["layout", "shape", "coalesced", "dtype", "qscheme", "scale", "zero_point", "axis"]),
    st.one_of(
        st.none(),
        st.integers(-3, 2**40),
        st.booleans(),
        st.binary(max_size=9),
        st.sampled_from(
            ["sparse_coo", "sparse_csr", "sparse_bsc", "qint8", "quint4x2", "per_tensor_affine", "float32"]
        ),
        st.lists(st.integers(-1, 5) | st.just(2**62), max_size=3),
    ),
)


@given(sparse_tensors() | quantized_tensors(), ATTRIBUTES)
def test_any_attributes_give_a_tensor_or_a_typed_error(tensor: torch.Tensor, attrs: dict[str, Any]) -> None:
    saved = Saved(tensor)
    entries = [replace(saved.entries[0], attrs={**saved.entries[0].attrs, **attrs}), *saved.entries[1:]]
    with suppress(CastoreError):
        unflatten(entries, saved.values(entries))


def test_a_part_that_is_its_own_whole_is_refused() -> None:
    saved = Saved([torch.eye(2).to_sparse(), torch.eye(2).to_sparse()])
    entries = [
        replace(entry, kind=Kind.ALIAS, attrs={"target": "0"}, raw_bytes=0, shape=(), dtype="", inline=None)
        if entry.path == "0/~values"
        else entry
        for entry in saved.entries
    ]
    with pytest.raises(FormatError, match="part of itself"):
        unflatten(entries, saved.values(entries))
