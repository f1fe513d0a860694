"""Loading into a live state: what fits, what does not, and what is written where."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch

from castore.tensors import Match, flatten, match
from tests.tensors.equality import assert_states_equal
from tests.tensors.round_trip import Saved
from tests.tensors.strategies import Frozen, Mutable, Plain


def matched(live: Any, saved: Any, **options: Any) -> Match:
    return match(flatten(live), Saved(saved).entries, **options)


def test_everything_that_differs_is_reported_at_once() -> None:
    live = {"a": torch.zeros(3), "b": torch.zeros(2), "c": torch.zeros(2), "gone": 1, "same": torch.zeros(1)}
    saved = {
        "a": torch.zeros(4),
        "b": torch.zeros(2, dtype=torch.float16),
        "c": 5,
        "new": [torch.zeros(1)],
        "same": torch.ones(1),
    }
    found = matched(live, saved)
    assert found.missing == ("gone",)
    assert found.unexpected == ("new/0",)
    assert [text.partition(":")[0] for text in found.mismatched] == ["a", "b", "c"]
    assert "tensor float32 [3]" in found.mismatched[0]
    assert "tensor float32 [4]" in found.mismatched[0]
    assert "float16" in found.mismatched[1]
    assert "a value (int)" in found.mismatched[2]
    assert [pair.path for pair in found.pairs] == ["same"]
    assert not found.is_exact


@pytest.mark.parametrize(
    ("live", "saved"),
    [
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        (torch.zeros(2, dtype=torch.float64), torch.zeros(2)),
        (torch.zeros(2), np.zeros(2, "<f4")),
        (torch.zeros(()), 0.0),
        (None, torch.zeros(2)),
        (torch.zeros(2), None),
        (np.zeros(2, "<f4"), np.zeros(2, ">f4")),
        (np.zeros(2, [("a", "<i4")]), np.zeros(2, [("b", "<i4")])),
        ([torch.zeros(1)], {"0": torch.zeros(1)}),
        ({"a": 1}, [1]),
        ({"a": 1}, 1),
        (Plain(1, 2), Mutable(1, 2)),
        (torch.eye(2).to_sparse(), torch.eye(2)),
        (torch.eye(2).to_sparse(), torch.eye(2).to_sparse_csr()),
        (torch.eye(2).to_sparse(), torch.eye(3).to_sparse()),
        (torch.eye(2).to_sparse(), torch.eye(2).double().to_sparse()),
        (torch.eye(2).to_sparse_csr(), torch.ones(2, 2).to_sparse_csr()),
        (torch.zeros(1).expand(3), torch.zeros(3)),
    ],
)
def test_these_never_fit(live: Any, saved: Any) -> None:
    found = matched({"x": live}, {"x": saved})
    assert len(found.mismatched) == 1
    assert found.mismatched[0].startswith("x: ")
    assert not found.pairs
    assert not found.replaced


@pytest.mark.parametrize(
    ("live", "saved"),
    [
        (torch.nn.Parameter(torch.zeros(2)), torch.ones(2)),
        (torch.zeros(2), torch.nn.Parameter(torch.ones(2))),
        (torch.zeros(2, 3), torch.ones(3, 2).t()),
        (torch.zeros(4, 4)[::2, ::2], torch.ones(2, 2)),
        (1, 2.5),
        (None, "x"),
        ([], [1.0, 2.0]),
        ([1.0] * 50, [1.0] * 60),
        (None, [1, 2]),
        ([1, [2]], (1, 2, 3)),
        (OrderedDict(a=1), {"a": 2}),
        ([torch.zeros(1)], (torch.ones(1),)),
    ],
)
def test_these_fit(live: Any, saved: Any) -> None:
    assert matched({"x": live}, {"x": saved}).is_exact


def test_live_arrays_are_filled_where_they_are() -> None:
    model = torch.nn.Linear(3, 2)
    live = {"model": dict(model.named_parameters()), "array": np.zeros(3), "step": 0, "history": [1.0]}
    history = live["history"]
    saved = {
        "model": {"weight": torch.full((2, 3), 5.0), "bias": torch.full((2,), 6.0)},
        "array": np.arange(3.0),
        "step": 7,
        "history": [1.0, 2.0, 3.0],
    }
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    loaded = Saved(saved).load_into(live)
    assert loaded is live
    assert model.weight.detach().unique().tolist() == [5]
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    assert type(loaded["model"]["weight"]) is torch.nn.Parameter
    assert loaded["array"].tolist() == [0, 1, 2]
    assert loaded["step"] == 7
    assert loaded["history"] is history
    assert history == [1.0, 2.0, 3.0]


def test_immutable_containers_are_made_anew_only_where_something_changed() -> None:
    live = {"same": (torch.zeros(1), "x"), "t": (torch.zeros(1), 1), "n": Plain(torch.zeros(1), 1), "f": Frozen("a", 1)}
    before = dict(live)
    saved = {"same": (torch.ones(1), "x"), "t": (torch.ones(1), 2), "n": Plain(torch.ones(1), 2), "f": Frozen("b", 1)}
    loaded = Saved(saved).load_into(live)
    assert_states_equal(loaded, saved)
    assert loaded is live
    assert loaded["t"] is not before["t"]
    assert loaded["t"][0] is before["t"][0]
    assert loaded["n"][0] is before["n"].first
    assert type(loaded["n"]) is Plain
    assert type(loaded["f"]) is Frozen


def test_a_mutable_dataclass_is_changed_in_place() -> None:
    live = Mutable("old", {"w": torch.zeros(2), "lr": 1.0})
    loaded = Saved(Mutable("new", {"w": torch.ones(2), "lr": 2.0})).load_into(live)
    assert loaded is live
    assert live.name == "new"
    assert live.values["lr"] == 2.0
    assert live.values["w"].tolist() == [1, 1]


def test_a_root_that_cannot_be_changed_comes_back_new() -> None:
    assert Saved(5).load_into(4) == 5
    tensor = torch.zeros(2)
    assert Saved(torch.ones(2)).load_into(tensor) is tensor
    assert Saved((1, 2)).load_into((3, 4)) == (1, 2)


def test_the_intersection_can_be_loaded() -> None:
    live = {"a": torch.zeros(2), "mine": 1, "bad": torch.zeros(3)}
    loaded = Saved({"a": torch.ones(2), "theirs": 2, "bad": torch.zeros(4)}).load_into(live, strict=False)
    assert loaded.keys() == {"a", "mine", "bad"}
    assert loaded["a"].tolist() == [1, 1]
    assert loaded["mine"] == 1


def test_a_partial_load_misses_only_what_was_asked_for() -> None:
    live = {"model": {"a": torch.zeros(1), "b": torch.zeros(1)}, "step": 1}
    saved = Saved({"model": {"a": torch.ones(1)}, "step": 2})
    entries = [entry for entry in saved.entries if entry.path in ("model", "model/a")]
    found = match(flatten(live), entries, selected=lambda path: path.startswith("model"))
    assert found.missing == ("model/b",)
    assert found.replaced == ()
    assert match(flatten(live), entries, selected=lambda path: path == "model/a").is_exact


def test_sparse_and_quantized_tensors_take_the_values_in_place() -> None:
    def state(number: float) -> dict[str, Any]:
        dense = torch.eye(3) * number
        return {
            "coo": dense.to_sparse(),
            "csr": dense.to_sparse_csr(),
            "q": torch.quantize_per_tensor(dense, number, 0, torch.qint8),
            "c": torch.quantize_per_channel(dense, torch.full((3,), number), torch.zeros(3).long(), 0, torch.qint8),
        }

    live = state(1.0)
    before = dict(live)
    loaded = Saved(state(2.0)).load_into(live)
    assert_states_equal(loaded, state(2.0))
    assert all(loaded[name] is before[name] for name in live)
    more = Saved({**state(2.0), "coo": torch.ones(3, 3).to_sparse()}).load_into(live)
    assert more["coo"].to_dense().sum() == 9


def test_tied_live_tensors_take_tied_values() -> None:
    tied, values = torch.zeros(100), torch.arange(100.0)
    saved = Saved({"a": values, "b": values})
    live = {"a": tied, "b": tied}
    assert [pair.path for pair in match(flatten(live), saved.entries).pairs] == ["a"]
    assert saved.load_into(live)["b"].tolist() == values.tolist()
    apart = {"a": torch.zeros(100), "b": torch.zeros(100)}
    assert saved.load_into(apart)["b"].tolist() == values.tolist()


def test_tied_live_tensors_refuse_two_values_but_not_two_copies() -> None:
    tied = torch.zeros(100)
    live = {"a": tied, "b": tied}
    found = matched(live, {"a": torch.zeros(100), "b": torch.ones(100)})
    assert len(found.mismatched) == 1
    assert "shares its memory with 'a'" in found.mismatched[0]
    assert [pair.path for pair in found.pairs] == ["a"]
    assert matched(live, {"a": torch.ones(100), "b": torch.ones(100)}).is_exact
    assert matched({"a": tied[:5], "b": tied[:5]}, {"a": torch.ones(5), "b": torch.ones(5)}).is_exact


def test_overlapping_live_views_take_overlapping_values_only() -> None:
    base = torch.arange(200.0)
    saved = Saved({"a": base[:150], "b": base[100:]})
    live_base = torch.zeros(300)
    live = {"a": live_base[20:170], "b": live_base[120:220]}
    saved.load_into(live)
    assert live_base[20:220].tolist() == base.tolist()
    assert live_base[:20].tolist() == [0] * 20
    assert saved.load_into({"a": torch.zeros(150), "b": torch.zeros(100)})["b"].tolist() == base[100:].tolist()
    shifted = {"a": live_base[20:170], "b": live_base[121:221]}
    assert len(match(flatten(shifted), saved.entries).mismatched) == 1
    assert len(matched(live, {"a": torch.zeros(150), "b": torch.ones(100)}).mismatched) == 1


def test_parts_of_live_sparse_tensors_that_others_share_are_refused() -> None:
    def state() -> dict[str, Any]:
        values = torch.tensor([1.0, 2.0])
        index = torch.tensor([[0, 2]])
        return {
            "s": torch.sparse_coo_tensor(index, values, (3,), is_coalesced=True, check_invariants=True),
            "v": values,
        }

    found = matched(state(), state())
    assert [text.partition(":")[0] for text in found.mismatched] == ["s"]


def test_a_read_only_array_is_reported_before_anything_is_written() -> None:
    array = np.zeros(3)
    array.flags.writeable = False
    found = matched({"x": array}, {"x": np.ones(3)})
    assert found.mismatched == ("x: the live array is read-only",)


def test_the_live_optimizer_of_another_process_takes_a_saved_one() -> None:
    def run(steps: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.ones(3, 4)).pow(2).sum().backward()
            optimizer.step()
        return model, optimizer

    model, optimizer = run(3)
    saved = Saved({"m": model.state_dict(), "o": optimizer.state_dict()})
    other_model, other_optimizer = run(1)
    live = {"m": other_model.state_dict(), "o": other_optimizer.state_dict()}
    loaded = saved.load_into(live)
    assert_states_equal(loaded, {"m": model.state_dict(), "o": optimizer.state_dict()})
    assert torch.equal(other_model[0].weight, model[0].weight)  # type: ignore[index]
