"""Taking states apart: paths, order, containers, what is refused."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import numpy as np
import pytest
import torch

from castore.errors import UnsupportedLeafError, UsageError
from castore.format.manifest import Kind
from castore.options import SKELETON_DEPTH_MAX
from castore.tensors import flatten
from castore.tensors.strided import row_major_stride
from tests.tensors.equality import assert_states_equal
from tests.tensors.round_trip import Saved, round_trip


def paths(state: Any) -> list[str]:
    return [entry.path for entry in flatten(state).entries]


def test_entries_come_depth_first_in_the_order_of_the_state() -> None:
    state = {"b": [1, (2.0,)], "a": {10: "x", "10": "y"}, "c/d": None}
    assert paths(state) == ["", "b", "b/0", "b/1", "b/1/0", "a", "a/10", "a/~s:10", "c%2Fd"]


def test_a_bare_leaf_is_the_root() -> None:
    assert paths(3) == [""]
    assert round_trip(3) == 3
    assert round_trip({}) == {}


def test_every_container_counts_its_children() -> None:
    entries = {e.path: e for e in flatten({"a": [1, 2, 3], "b": ()}).entries}
    assert (entries[""].shape, entries["a"].shape, entries["b"].shape) == ((2,), (3,), (0,))


def test_payloads_stand_beside_their_entries() -> None:
    base = torch.arange(10.0)
    flat = flatten({"t": torch.zeros(2), "again": None, "views": [base[:6], base[4:], base[:6]]})
    for entry, payload in zip(flat.entries, flat.payloads, strict=True):
        if entry.is_container or entry.kind is Kind.ALIAS:
            assert payload is None
        else:
            assert payload is not None
            assert payload.raw_bytes == entry.raw_bytes


def test_containers_that_hold_themselves_are_refused() -> None:
    loop: dict[str, Any] = {"a": []}
    loop["a"].append(loop)
    with pytest.raises(UsageError, match=r"'a/0'.*contains itself"):
        flatten(loop)


def test_a_container_that_is_met_twice_is_stored_twice() -> None:
    inner = [torch.zeros(2)]
    loaded = round_trip({"a": inner, "b": inner})
    assert loaded["a"] is not loaded["b"]
    assert loaded["a"][0] is loaded["b"][0]


def test_nesting_is_bounded() -> None:
    state: Any = 1
    for _ in range(SKELETON_DEPTH_MAX):
        state = [state]
    assert_states_equal(round_trip(state), state)
    with pytest.raises(UsageError, match="nested deeper"):
        flatten([state])


@pytest.mark.parametrize("value", [defaultdict(int), Counter("a"), deque([1]), frozenset()])
def test_other_containers_are_refused(value: Any) -> None:
    with pytest.raises(UnsupportedLeafError, match="save"):
        flatten({"x": value})


def test_keys_without_a_path_component_are_refused_with_their_dict() -> None:
    with pytest.raises(UnsupportedLeafError, match="as a dict key") as caught:
        flatten({"outer": {np.int64(3): 1}})
    assert caught.value.path == "outer"


def test_two_nan_keys_are_refused() -> None:
    with pytest.raises(UsageError, match="same once written down"):
        flatten({float("nan"): 1, float("-nan"): 2})


def test_the_metadata_of_a_state_dict_comes_back() -> None:
    state = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1)).state_dict()
    loaded = round_trip(state)
    assert type(loaded) is OrderedDict
    assert loaded._metadata == state._metadata  # type: ignore[attr-defined]
    assert type(loaded._metadata) is OrderedDict  # type: ignore[attr-defined]


def test_other_attributes_of_an_ordered_dict_are_refused() -> None:
    state: Any = OrderedDict(a=1)
    state.note = "x"
    with pytest.raises(UnsupportedLeafError, match="note would be lost"):
        flatten(state)


def test_strides_are_hints_only_where_they_say_something() -> None:
    def hint(tensor: torch.Tensor) -> Any:
        return flatten(tensor).entries[0].hints.get("stride")

    image = torch.zeros(2, 3, 4, 5)
    assert hint(image) is None
    assert hint(image.contiguous(memory_format=torch.channels_last)) == [60, 1, 15, 3]
    assert hint(image[:, :2]) is None
    assert hint(torch.zeros(3, 1).expand(3, 4)) is None
    assert hint(torch.zeros(0, 3).t()) is None
    assert row_major_stride((0, 3), 1) == torch.zeros(0, 3).stride()


def test_channels_last_with_one_channel_is_still_channels_last() -> None:
    image = torch.zeros(2, 1, 4, 5).to(memory_format=torch.channels_last)
    assert image.stride() == (20, 1, 5, 1)
    assert round_trip(image).stride() == (20, 1, 5, 1)


def test_parameters_and_buffers_come_back_as_such() -> None:
    frozen = torch.nn.Parameter(torch.zeros(2), requires_grad=False)
    buffer = torch.nn.Buffer(torch.ones(2), persistent=False)
    loaded = round_trip([frozen, buffer, torch.zeros(2, requires_grad=True), torch.nn.Parameter(torch.zeros(()))])
    assert type(loaded[0]) is torch.nn.Parameter
    assert not loaded[0].requires_grad
    assert isinstance(loaded[1], torch.nn.Buffer)
    assert loaded[1].persistent is False
    assert loaded[2].requires_grad
    assert loaded[2].is_leaf
    assert loaded[3].shape == ()


def test_a_memory_mapped_array_is_an_array(tmp_path: Any) -> None:
    mapped = np.memmap(tmp_path / "data", "<i4", "w+", shape=(4,))
    mapped[:] = [1, 2, 3, 4]
    loaded = round_trip(mapped)
    assert type(loaded) is np.ndarray
    assert loaded.tolist() == [1, 2, 3, 4]


def test_fortran_order_comes_back() -> None:
    array = np.asfortranarray(np.arange(24).reshape(2, 3, 4))
    loaded = round_trip(array)
    assert loaded.strides == array.strides
    assert np.array_equal(loaded, array)


@pytest.mark.parametrize("kind", [np.matrix, np.recarray])
def test_array_subclasses_are_refused(kind: Any) -> None:
    with pytest.raises(UnsupportedLeafError, match="asarray"):
        flatten({"x": np.zeros((1, 1)).view(kind)})


def test_tensor_subclasses_are_refused_by_name() -> None:
    class Marked(torch.Tensor):
        pass

    with pytest.raises(UnsupportedLeafError, match="Marked"):
        flatten({"x": torch.zeros(2).as_subclass(Marked)})


def test_a_buffer_is_a_tensor_for_a_torch_without_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = Saved([torch.nn.Buffer(torch.ones(2))])
    monkeypatch.delattr(torch.nn, "Buffer")
    (loaded,) = saved.load()
    assert type(loaded) is torch.Tensor
    assert torch.equal(loaded, torch.ones(2))


def test_dtypes_of_other_packages_are_refused() -> None:
    types = pytest.importorskip("ml_dtypes")
    with pytest.raises(UnsupportedLeafError, match="view it as bytes"):
        flatten(np.zeros(2, types.bfloat16))


def test_a_new_kind_of_string_array_is_refused() -> None:
    if not hasattr(np.dtypes, "StringDType"):
        pytest.skip("numpy 2 has it")
    with pytest.raises(UnsupportedLeafError):
        flatten(np.array(["a"], np.dtypes.StringDType()))


def test_a_real_training_state_comes_back() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    scheduler.step()
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "scaler": torch.amp.GradScaler(enabled=False).state_dict(),
        "rng": torch.get_rng_state(),
    }
    loaded = round_trip(state)
    assert_states_equal(loaded, state)
    model.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    scheduler.load_state_dict(loaded["scheduler"])


def test_flatten_changes_nothing() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    version = weight._version
    flatten({"w": weight, "s": torch.eye(2).to_sparse(), "t": weight.detach().t()})
    assert weight._version == version
    assert weight.grad is None


def test_states_without_tensors_never_import_torch() -> None:
    code = """
import sys, random, numpy
from castore.tensors import flatten, unflatten, allocate, decode_value, ARRAY_KINDS, match, assign
state = {"a": [1, 2.0, None, "x"], "b": numpy.arange(3), "c": random.getstate(), "d": numpy.float32(1)}
flat = flatten(state)
values = {}
for entry, payload in zip(flat.entries, flat.payloads):
    if payload is None:
        continue
    if entry.kind in ARRAY_KINDS:
        values[entry.path], target = allocate(entry)
        target.memory()[:] = payload.read(0, payload.raw_bytes)
        target.finish()
    else:
        values[entry.path] = decode_value(entry, payload.read(0, payload.raw_bytes), allow_pickle=False)
assert repr(unflatten(flat.entries, values)) == repr(state)
assign(state, match(flatten(state), flat.entries), values)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@dataclasses.dataclass
class Loop:
    inner: Any


def test_a_dataclass_that_holds_itself_is_refused() -> None:
    loop = Loop(None)
    loop.inner = [loop]
    with pytest.raises(UsageError, match="contains itself"):
        flatten(loop)


def test_the_sides_of_an_entry_are_plain_enough_for_the_manifest() -> None:
    model = torch.nn.Linear(2, 2)
    records = np.zeros(3, [("a", "<i4"), ("b", "<f4", (2,))])
    quantized = torch.quantize_per_tensor(torch.zeros(2), 0.5, 1, torch.quint8)
    Saved({"m": model.state_dict(), "r": records, "q": quantized, "s": torch.eye(2).to_sparse(), "p": model.weight})
