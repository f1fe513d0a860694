"""Staging: where the copies lie, and what they occupy."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from castore.checkpoint.stage import stage, staged_bytes
from castore.errors import UnsupportedLeafError
from castore.host_memory import SLOT_BYTES_MIN, BufferPool, HostCopy
from castore.options import GRID_BYTES
from castore.tensors import FlatState, Glance, HostCopies, flatten, glance

pytest.importorskip("torch")

from tests.tensors.strategies import states as any_states


class CountingPool(BufferPool):
    """Counts the slots that are out."""

    def __init__(self) -> None:
        super().__init__()
        self.out = 0

    def take(self, length: int) -> HostCopy:
        self.out += 1
        return super().take(length)

    def release(self, copy: HostCopy) -> None:
        self.out -= 1
        super().release(copy)


def states() -> list[dict[str, Any]]:
    sizes = random.Random(0)
    edges = [
        0,
        1,
        SLOT_BYTES_MIN - 1,
        SLOT_BYTES_MIN,
        SLOT_BYTES_MIN + 1,
        GRID_BYTES,
        GRID_BYTES + 1,
        5 * GRID_BYTES // 2,
    ]
    mixed = [
        {str(number): sizes.choice([sizes.randrange(3000), sizes.randrange(3 * GRID_BYTES)]) for number in range(30)}
        for _ in range(8)
    ]
    lengths = [{"one": edge} for edge in edges] + [{str(edge): edge for edge in edges}] + mixed
    return [
        {name: np.random.default_rng(length).integers(0, 256, length, np.uint8) for name, length in leaves.items()}
        for leaves in lengths
    ]


def test_copies_are_right_and_occupy_what_is_said_before() -> None:
    pool, pinned = CountingPool(), CountingPool()
    for state in states():
        flat = flatten(state)
        seen = glance(state)
        staged = stage(seen, lambda flat=flat: flat, pool, pinned)
        assert staged_bytes(seen) == staged.held_bytes == pool.out * GRID_BYTES
        for live, copy in zip(flat.payloads, staged.flatten().payloads, strict=True):
            if live is None or copy is None:
                assert live is copy
                continue
            for start in range(0, live.raw_bytes, GRID_BYTES):
                stop = min(start + GRID_BYTES, live.raw_bytes)
                assert copy.read(start, stop) == live.read(start, stop)
                assert copy.read((start + stop) // 2, stop) == live.read((start + stop) // 2, stop)
        staged.release()
        assert pool.out == pinned.out == 0


def test_small_leaves_share_slots() -> None:
    seen = glance({str(number): np.full(70_000, number, np.uint8) for number in range(28)})
    assert staged_bytes(seen) == 2 * GRID_BYTES


def test_what_the_first_look_does_not_find_is_staged_all_the_same() -> None:
    pool, pinned = CountingPool(), CountingPool()
    large = np.random.default_rng(0).integers(0, 256, 5 * GRID_BYTES // 2, np.uint8)
    flat = flatten({"large": large, "strided": large[::2], "text": "text " * GRID_BYTES})
    staged = stage(Glance(), lambda: flat, pool, pinned)
    for live, copy in zip(flat.payloads, staged.flatten().payloads, strict=True):
        for start in range(0, live.raw_bytes if live is not None else 0, GRID_BYTES):
            assert live is not None
            assert copy is not None
            stop = min(start + GRID_BYTES, live.raw_bytes)
            assert copy.read(start, stop) == live.read(start, stop)
    assert staged.held_bytes == pool.out * GRID_BYTES + len("text ") * GRID_BYTES
    staged.release()


def leaves(flat: FlatState) -> list[bytes | None]:
    return [None if payload is None else bytes(payload.read(0, payload.raw_bytes)) for payload in flat.payloads]


@given(any_states())
def test_any_state_is_staged_as_it_is(state: Any) -> None:
    """With an outline or without, views, conjugates and parts of composites too."""
    pool, pinned = CountingPool(), CountingPool()
    flat = flatten(state)
    expected = leaves(flat)
    seen = glance(state)
    staged = stage(seen, lambda: flatten(state, known=seen.arrays), pool, pinned)
    found = staged.flatten()
    assert found.entries == flat.entries
    assert leaves(found) == expected
    staged.release()
    assert pool.out == pinned.out == 0


def test_views_that_share_elements_are_taken_apart_at_once() -> None:
    pool, pinned = CountingPool(), CountingPool()
    whole = np.arange(1000, dtype=np.int32)
    state = {"whole": whole, "part": whole[100:300]}
    expected = leaves(flatten(state))
    seen = glance(state)
    assert seen.has_outline
    staged = stage(seen, lambda: flatten(state, known=seen.arrays), pool, pinned)
    whole[:] = 0
    assert leaves(staged.flatten()) == expected


def test_without_shared_elements_the_state_is_taken_apart_later() -> None:
    pool, pinned = CountingPool(), CountingPool()
    base = np.arange(1000, dtype=np.int32)
    state = {"even": base[::2], "odd": base[1::2], "empty": base[:0], "back": base[:0:-1].copy()[::-1]}
    expected = leaves(flatten(state))

    def fail() -> FlatState:
        raise AssertionError("not now")

    staged = stage(glance(state), fail, pool, pinned)
    base[:] = 0
    state.clear()
    assert leaves(staged.flatten()) == expected


def test_one_piece_of_memory_is_copied_once() -> None:
    torch = pytest.importorskip("torch")
    pool, pinned = CountingPool(), CountingPool()
    tied = torch.zeros(GRID_BYTES // 4)
    state = {"first": tied, "again": tied, "another object": tied.detach(), "same bytes": tied.view(torch.int32)}
    stage(glance(state), lambda: flatten({"first": tied}), pool, pinned)
    assert pool.out == 1


def test_a_state_that_is_refused_leaves_no_slot_behind() -> None:
    pool, pinned = CountingPool(), CountingPool()
    state = {"fine": np.zeros(5 * GRID_BYTES, np.uint8), "what": object()}
    with pytest.raises(UnsupportedLeafError, match="what"):
        stage(glance(state), lambda: flatten(state), pool, pinned)
    assert pool.out == pinned.out == 0


def test_ctrl_c_in_the_middle_of_the_copy_leaves_no_slot_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, pinned = CountingPool(), CountingPool()
    state = {"w": np.zeros(5 * GRID_BYTES, np.uint8)}
    inner = HostCopies.wait
    struck = False

    def wait(copies: HostCopies) -> None:
        nonlocal struck
        inner(copies)
        if not struck:
            struck = True
            raise KeyboardInterrupt

    monkeypatch.setattr(HostCopies, "wait", wait)
    with pytest.raises(KeyboardInterrupt):
        stage(glance(state), lambda: flatten(state), pool, pinned)
    assert pool.out == pinned.out == 0
