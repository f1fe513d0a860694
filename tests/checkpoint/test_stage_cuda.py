"""Staging from a CUDA device: what is saved is the state at the call, whatever the device does next."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import castore
from tests.tensors.equality import assert_states_equal

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def make_state() -> dict[str, object]:
    base = torch.randn(512, 1024, device="cuda")
    return {
        "plain": base,
        "transposed": base.t(),
        "half": torch.randn(300_000, device="cuda").bfloat16(),
        "conj": torch.randn(40, 30, dtype=torch.complex64, device="cuda").conj(),
        "scalar": torch.tensor(2.5, device="cuda"),
        "empty": torch.empty(0, device="cuda"),
        "host": torch.randn(1000),
        "rng": torch.cuda.get_rng_state(),
    }


@pytest.mark.parametrize("worker_process", [False, True])
def test_a_state_that_changes_right_after_the_call_is_saved_as_it_was(tmp_path: Path, worker_process: bool) -> None:
    state = make_state()
    before = {name: value.cpu().clone() for name, value in state.items()}  # type: ignore[attr-defined]
    with castore.open(tmp_path / "store", create=True, worker_process=worker_process) as repo:
        torch.cuda._sleep(200_000_000)  # the copies must wait for work that was queued before them
        state["plain"].add_(1)  # type: ignore[attr-defined]
        before["plain"], before["transposed"] = before["plain"] + 1, (before["plain"] + 1).t()
        pending = repo.save_async(state, step=1)
        for name in ("plain", "half", "host"):
            state[name].fill_(7)  # type: ignore[attr-defined]
        pending.result()
        loaded = repo.load("main")
    for name, expected in before.items():
        assert torch.equal(loaded[name].resolve_conj(), expected.resolve_conj()), name


@pytest.mark.parametrize("worker_process", [False, True])
def test_staged_and_direct_saves_have_one_state_id(tmp_path: Path, worker_process: bool) -> None:
    state = make_state()
    with castore.open(tmp_path / "store", create=True, worker_process=worker_process) as repo:
        direct = repo.save(state, branch="direct")
        staged = repo.save_async(state, branch="staged").result()
        assert direct.state_id == staged.state_id
        live = {name: torch.zeros_like(value) for name, value in state.items() if name in ("plain", "half", "host")}  # type: ignore[call-overload]
        filled = repo.load("direct", into=live, strict=False)
        assert_states_equal(
            {name: value.cpu() for name, value in filled.items()},
            {name: state[name].cpu() for name in live},  # type: ignore[attr-defined]
        )
        assert filled["plain"].device.type == "cuda"
        assert repo.load("direct", device="cuda")["half"].device.type == "cuda"
