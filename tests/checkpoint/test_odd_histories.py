"""Any history of a leaf comes back bit for bit: whatever its bits, however its type and shape change between saves.

Subnormals, NaN payloads, negative zeros and infinities, of every element type; saved in either way, with flush-to-zero
on or off when they are saved and when they are loaded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from castore.backend import MemoryBackend
from castore.codec.registry import DELTA, DERIVED
from castore.codec.rounding import Rule
from castore.codec.transform import kernel
from tests.checkpoint.damage import rows_of
from tests.checkpoint.repositories import create_on, open_on, packs_of
from tests.suites.flushed import flushed_denormals
from tests.suites.odd_words import odd_words

DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.complex64,
)  # fmt: skip
SHAPES = ((), (0, 3), (1,), (7, 11), (1000,), (33, 129), (2, 3, 2500))


@dataclass(frozen=True)
class Step:
    """How the leaf changes before a save, and how it is saved."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    moved: int
    """One element in so many is another; 0: none."""
    flush: bool
    in_background: bool


steps = st.builds(
    Step,
    st.sampled_from(DTYPES),
    st.sampled_from(SHAPES),
    st.sampled_from((0, 1, 2, 50)),
    st.booleans(),
    st.booleans(),
)


def leaf(step: Step, number: int, seed: int) -> torch.Tensor:
    """Odd words in long runs, most of them where they were in the step before."""
    rng = np.random.default_rng(seed)
    width = step.dtype.itemsize
    items = int(np.prod(step.shape))
    odd = np.array(odd_words(min(width, 8)), np.uint64)
    words = np.repeat(odd[rng.integers(0, len(odd), items // 20 + 1)], 20)[:items]
    if step.moved:
        places = np.arange(number % step.moved, items, step.moved)
        words[places] += np.uint64(number)
    raw = words.astype("<u8").view(np.uint8).reshape(items, 8)[:, :width].copy()
    return torch.from_numpy(raw.reshape(-1)).view(step.dtype).reshape(step.shape)


def rounded(tensor: torch.Tensor) -> torch.Tensor:
    """The copy that the rule makes of any bits, where NaN payloads differ between processors and libraries."""
    if tensor.numel() == 0:
        return tensor.bfloat16()
    master = tensor.reshape(-1).view(torch.uint8).numpy()
    copy = np.empty(len(master) // 2, np.uint8)
    kernel.derive(master.tobytes(), copy.data, Rule.BFLOAT16_NEAREST)
    return torch.from_numpy(copy).view(torch.bfloat16).reshape(tensor.shape)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@settings(max_examples=30)
@given(
    first=steps,
    later=st.lists(st.none() | steps, min_size=2, max_size=5),
    seed=st.integers(0, 1 << 32),
    loaded_flushed=st.booleans(),
)
def test_every_snapshot_of_any_history_comes_back_bit_for_bit(
    first: Step, later: list[Step | None], seed: int, loaded_flushed: bool
) -> None:
    """None goes on with the type and shape of the step before: that is where differences are made."""
    repo = create_on(MemoryBackend())
    saved: dict[str, dict[str, torch.Tensor]] = {}
    step = first
    for number, change in enumerate([first, *later]):
        step = change or step
        tensor = leaf(step, number, seed)
        state = {"odd": tensor, "copy": rounded(tensor) if tensor.dtype == torch.float32 else tensor.clone()}
        with flushed_denormals(on=step.flush):
            if step.in_background:
                snapshot = repo.save_async(state, step=number).result(60)
            else:
                snapshot = repo.save(state, step=number)
        saved[snapshot.id] = state
    repo.close()
    fresh = open_on(repo.handle.backend)
    assert len(saved) == 1 + len(later)
    with flushed_denormals(on=loaded_flushed):
        for snapshot_id, state in saved.items():
            found = fresh.load(snapshot_id)
            for name, tensor in state.items():
                assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
                assert bits(found[name]) == bits(tensor), (snapshot_id, name)
    assert fresh.verify(data=True).ok


def test_such_histories_hold_differences_and_roundings() -> None:
    repo = create_on(MemoryBackend())
    for number in range(3):
        tensor = leaf(Step(torch.float32, (2, 3, 2500), 50, flush=False, in_background=False), number, seed=1)
        repo.save({"odd": tensor, "copy": rounded(tensor)}, step=number)
    rows = [row for pack_id in packs_of(repo) for row in rows_of(repo, pack_id)]
    assert any(row.chain == (DELTA,) for row in rows)
    assert any(row.chain == (DERIVED,) for row in rows)
