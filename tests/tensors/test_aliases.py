"""What shares memory is stored once and shares memory again."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch

from castore.errors import UnsupportedLeafError
from castore.format.manifest import Kind
from castore.tensors import flatten
from tests.tensors.round_trip import Saved, round_trip


def kinds(state: Any) -> dict[str, Kind]:
    return {entry.path: entry.kind for entry in flatten(state).entries}


def test_the_same_tensor_twice_is_stored_once_and_comes_back_as_one() -> None:
    weight = torch.randn(4, 4)
    assert kinds({"a": weight, "b": weight}) == {"": Kind.DICT, "a": Kind.TENSOR, "b": Kind.ALIAS}
    loaded = round_trip({"a": weight, "b": weight})
    assert loaded["a"] is loaded["b"]


def test_another_object_over_the_same_memory_comes_back_as_another_object() -> None:
    tied = torch.nn.Linear(4, 4)
    state = {"plain": tied.weight.detach(), "one": tied.weight, "two": tied.weight}
    loaded = round_trip(state)
    assert loaded["one"] is loaded["two"]
    assert loaded["one"] is not loaded["plain"]
    assert type(loaded["one"]) is torch.nn.Parameter
    assert type(loaded["plain"]) is torch.Tensor
    assert loaded["one"].requires_grad
    assert not loaded["plain"].requires_grad
    loaded["plain"].fill_(7)
    assert loaded["two"].detach().unique().tolist() == [7]


def test_tied_weights_of_a_state_dict_stay_tied() -> None:
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(5, 3), "head": torch.nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embed"].weight  # type: ignore[assignment]
    loaded = round_trip(model.state_dict())
    assert loaded["embed.weight"].data_ptr() == loaded["head.weight"].data_ptr()


def test_neighbours_in_one_buffer_are_stored_separately() -> None:
    flat = torch.arange(30.0)
    found = kinds([flat[:10], flat[10:20], flat[20:], flat[:0]])
    assert set(found.values()) == {Kind.LIST, Kind.TENSOR}


def test_a_small_view_of_a_huge_buffer_stores_only_the_view() -> None:
    flat = flatten({"w": torch.zeros(1_000_000)[5:8]})
    assert [payload.raw_bytes for payload in flat.payloads if payload] == [12]


def test_interleaved_views_without_a_common_element_are_stored_separately() -> None:
    base = torch.arange(60.0).reshape(6, 10)
    assert Kind.STORAGE not in kinds([base[:, :5], base[:, 5:], base.t()[:0]]).values()
    assert Kind.STORAGE not in kinds([base.flatten()[::2], base.flatten()[1::2]]).values()
    assert Kind.STORAGE not in kinds([torch.zeros(3, dtype=torch.complex64).real, torch.zeros(3)]).values()
    pair = torch.zeros(3, dtype=torch.complex64)
    assert Kind.STORAGE not in kinds([pair.real, pair.imag]).values()


def test_overlapping_views_are_one_hull_and_share_memory_again() -> None:
    base = torch.arange(100.0)
    flat = flatten({"a": base[10:40], "b": base[30:60], "c": base[90:]})
    assert [(e.path, e.kind) for e in flat.entries[1:]] == [
        ("a", Kind.VIEW),
        ("b", Kind.VIEW),
        ("c", Kind.TENSOR),
        ("~storage/0", Kind.STORAGE),
    ]
    assert flat.entries[-1].raw_bytes == 200
    assert flat.entries[2].attrs == {"storage": "~storage/0", "offset_bytes": 80, "stride_bytes": [4]}
    loaded = round_trip({"a": base[10:40], "b": base[30:60]})
    loaded["a"][20] = -1
    assert loaded["b"][0] == -1


def test_a_covered_hull_is_read_without_a_copy() -> None:
    base = torch.arange(100.0)
    hull = flatten([base[:60], base[40:]]).payloads[-1]
    assert hull is not None
    assert np.frombuffer(hull.read(0, 400), np.uint8).ctypes.data == base.data_ptr()


def test_what_no_view_covers_is_not_stored() -> None:
    base = torch.full((4, 6), 7.0)
    flat = flatten([base[:, :2], base[:, 1:3]])
    assert flat.payloads[-1] is not None
    hull = np.frombuffer(flat.payloads[-1].read(0, flat.entries[-1].raw_bytes), "<f4")
    assert hull.tolist() == [7, 7, 7, 0, 0, 0, 7, 7, 7, 0, 0, 0, 7, 7, 7, 0, 0, 0, 7, 7, 7]


@pytest.mark.parametrize(
    "views",
    [
        lambda base: [base, base.t()],
        lambda base: [base, base[1]],
        lambda base: [base, base[2].expand(5, 6)],
        lambda base: [base.view(torch.int32), base.view(torch.float16)],
        lambda base: [base.view(torch.complex64), base.view(torch.complex64).imag],
        lambda base: [base.view(torch.complex64), base.view(torch.complex64).conj()],
        lambda base: [base, torch._neg_view(base)],
        lambda base: [base[:, 1:], base.view(torch.complex64)],
    ],
)
def test_different_views_share_memory_again(views: Any) -> None:
    state = views(torch.arange(24.0).reshape(4, 6))
    loaded = round_trip(state)
    for mine, theirs in zip(loaded, state, strict=True):
        assert torch.equal(mine, theirs)
        assert mine.stride() == theirs.stride()
    assert loaded[0].untyped_storage().data_ptr() == loaded[1].untyped_storage().data_ptr()


def test_views_from_two_storages_over_one_numpy_buffer_share_memory_again() -> None:
    buffer = np.arange(10, dtype="<f4")
    loaded = round_trip([torch.from_numpy(buffer[:6]), torch.from_numpy(buffer[4:])])
    loaded[0][5] = 99
    assert loaded[1][1] == 99


def test_a_torch_view_between_elements_is_refused_with_advice() -> None:
    raw = bytearray(16)
    views = [
        torch.frombuffer(raw, dtype=torch.int32, count=2),
        torch.frombuffer(raw, dtype=torch.int32, count=2, offset=2),
    ]
    with pytest.raises(UnsupportedLeafError, match="clone"):
        flatten(views)


def test_fields_of_records_share_memory_with_their_records() -> None:
    records = np.zeros(5, np.dtype([("tag", "|u1"), ("value", "<f4")]))
    loaded = round_trip({"all": records, "values": records["value"], "reversed": records["tag"][::-1]})
    loaded["all"][4] = (7, 1.5)
    assert loaded["values"].tolist() == [0, 0, 0, 0, 1.5]
    assert loaded["reversed"].tolist() == [7, 0, 0, 0, 0]


def test_torch_and_numpy_over_one_buffer_come_back_apart() -> None:
    tensor = torch.arange(4.0)
    assert kinds([tensor, tensor.numpy()]) == {"": Kind.LIST, "0": Kind.TENSOR, "1": Kind.NDARRAY}


def test_empty_tensors_never_alias() -> None:
    empty = torch.empty(0, 3)
    assert kinds([empty, empty]) == {"": Kind.LIST, "0": Kind.TENSOR, "1": Kind.TENSOR}


def test_a_sparse_tensor_twice_is_stored_once() -> None:
    sparse = torch.eye(3).to_sparse()
    assert kinds([sparse, sparse])["1"] is Kind.ALIAS
    loaded = round_trip([sparse, sparse])
    assert loaded[0] is loaded[1]


def test_parts_of_a_sparse_tensor_share_memory_with_other_leaves() -> None:
    values = torch.tensor([1.0, 2.0])
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 2]]), values, (3,), is_coalesced=True, check_invariants=True)
    assert sparse._values().data_ptr() == values.data_ptr()
    loaded = round_trip({"values": values, "sparse": sparse})
    loaded["values"][0] = 9
    assert loaded["sparse"].to_dense().tolist() == [9, 0, 2]


def test_a_thousand_views_of_one_buffer_are_found_in_little_time() -> None:
    flat = torch.zeros(100_000)
    state = [flat, *(flat[at * 100 : at * 100 + 100] for at in range(1000))]
    started = time.process_time()
    found = flatten(state)
    assert time.process_time() - started < 1.0
    assert sum(entry.kind is Kind.STORAGE for entry in found.entries) == 1
    columns = torch.zeros(100, 300)
    assert Kind.STORAGE not in kinds([columns[:, at] for at in range(300)]).values()


def test_the_entries_do_not_depend_on_where_memory_lies() -> None:
    def state() -> Any:
        base = torch.arange(50.0)
        return {"x": base[:30], "y": base[20:], "z": base[:30]}

    assert Saved(state()).entries == Saved(state()).entries
