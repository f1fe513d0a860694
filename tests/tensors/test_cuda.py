"""Tensors on a CUDA device: read range by range into host memory, filled through it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from castore.format.manifest import Kind
from castore.tensors import allocate, flatten
from tests.tensors.equality import assert_states_equal
from tests.tensors.round_trip import Saved, round_trip

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

MIB = 1024 * 1024


def layouts() -> dict[str, torch.Tensor]:
    base = torch.randn(6, 5, 4, 3, device="cuda")
    return {
        "plain": base,
        "offset": base[2:4],
        "transposed": base.transpose(1, 3),
        "channels_last": base.contiguous(memory_format=torch.channels_last),
        "sliced": base[::2, :, 1:3],
        "expanded": base[:1].expand(3, 5, 4, 3),
        "half": base.bfloat16(),
        "fp8": base.to(torch.float8_e4m3fn).transpose(0, 1),
        "complex": torch.randn(4, 3, dtype=torch.complex128, device="cuda").t(),
        "conj": torch.randn(4, 3, dtype=torch.complex64, device="cuda").conj(),
        "scalar": torch.tensor(3.5, device="cuda"),
        "empty": torch.empty(0, 3, device="cuda"),
        "bool": torch.ones(3, 3, dtype=torch.bool, device="cuda").t(),
    }


@pytest.mark.parametrize("name", list(layouts()) if torch.cuda.is_available() else ["none"])
def test_every_layout_is_read_and_comes_back_on_either_device(name: str) -> None:
    tensor = layouts()[name]
    assert_states_equal(round_trip(tensor), tensor.cpu(), strides=False)
    there = round_trip(tensor, device="cuda")
    assert there.device.type == "cuda"
    assert_states_equal(there, tensor)


def test_the_device_is_a_hint() -> None:
    assert flatten(torch.zeros(1, device="cuda")).entries[0].hints["device"] == "cuda:0"


def test_only_the_range_is_copied() -> None:
    tensor = torch.zeros(4096, 4096, device="cuda").t()
    payload = flatten(tensor).payloads[0]
    assert payload is not None
    payload.read(0, MIB)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    payload.read(5 * MIB, 6 * MIB)
    assert torch.cuda.max_memory_allocated() - before <= 2 * MIB


def test_shared_memory_is_shared_again() -> None:
    base = torch.arange(24.0, device="cuda").reshape(4, 6)
    state = {"a": base, "same": base, "t": base.t(), "gap": base[:, 1:3]}
    kinds = [entry.kind for entry in flatten(state).entries[1:]]
    assert kinds == [Kind.VIEW, Kind.ALIAS, Kind.VIEW, Kind.VIEW, Kind.STORAGE]
    for device in ("cpu", "cuda"):
        loaded = round_trip(state, device=device)
        assert_states_equal(loaded, state)
        loaded["a"][0, 1] = 99
        assert loaded["t"][1, 0] == 99
        assert loaded["gap"][0, 0] == 99
        assert loaded["a"] is loaded["same"]
    apart = {"l": base[:, :2], "r": base[:, 3:]}
    assert Kind.STORAGE not in [entry.kind for entry in flatten(apart).entries]


@pytest.mark.parametrize("name", ["plain", "transposed", "channels_last", "sliced", "complex", "conj", "fp8", "scalar"])
def test_live_tensors_are_filled_in_place(name: str) -> None:
    saved = Saved({"x": layouts()[name].cpu().clone()})
    live = layouts()[name]
    pointer = live.data_ptr()
    state = {"x": live}
    assert saved.load_into(state)["x"] is live
    assert live.data_ptr() == pointer
    assert_states_equal(live, saved.load(device="cuda")["x"], strides=False)


def test_a_live_parameter_on_the_device_is_filled() -> None:
    model = torch.nn.Linear(3, 2, device="cuda")
    saved = Saved({"w": torch.ones(2, 3)})
    saved.load_into({"w": model.weight})
    assert model.weight.unique().tolist() == [1]
    assert model.weight.requires_grad


def test_sparse_and_random_state_come_back() -> None:
    state: dict[str, Any] = {
        "sparse": torch.eye(4, device="cuda").to_sparse(),
        "csr": torch.eye(4, device="cuda").to_sparse_csr(),
        "rng": torch.cuda.get_rng_state_all(),
    }
    loaded = round_trip(state, device="cuda")
    assert torch.equal(loaded["sparse"].to_dense(), state["sparse"].to_dense())
    assert torch.equal(loaded["csr"].to_dense(), state["csr"].to_dense())


def test_new_tensors_on_the_device_are_written_in_pieces() -> None:
    value, target = allocate(flatten(torch.zeros(1000, dtype=torch.int16)).entries[0], device="cuda:0")
    assert not target.direct
    data = torch.arange(1000, dtype=torch.int16).numpy().tobytes()
    for start in range(0, 2000, 500):
        target.write(start, memoryview(data)[start : start + 500])
    target.finish()
    assert value.tolist() == list(range(1000))
