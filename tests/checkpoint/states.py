"""Small training states without torch, and a comparison that forgives nothing."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

State = dict[str, Any]


def training_state(seed: int, *, frozen_bytes: int = 40_000, moving_bytes: int = 20_000) -> State:
    """What a run holds at one step: frozen weights that every seed shares, weights that move, counters, a generator.

    The moving weights are noise (stored raw), the frozen ones are not (stored encoded), the drifting ones are nearly
    those of any other seed (stored as differences), and some leaves live inline.
    """
    generator = np.random.default_rng(seed)
    frozen = np.random.default_rng(0).integers(0, 9, frozen_bytes // 4).astype(np.float32)
    drifting = np.random.default_rng(1).standard_normal(1500).astype(np.float32)
    return {
        "model": {
            "frozen": frozen,
            "moving": generator.integers(0, 256, (moving_bytes // 4, 4), np.uint8),
            "drifting": drifting * np.float32(1 + 1e-5 * seed),
            "head": generator.standard_normal((30, 20)),
        },
        "optimizer": {"state": {0: {"step": seed, "exp_avg": generator.standard_normal(500)}, 1: {"step": seed + 1}}},
        "rng": (3, tuple(random.Random(seed).getstate()[1][:40]), None),
        "epoch": seed / 3,
        "note": f"step {seed}, " + "long text " * 40,
    }


def assert_same(found: Any, expected: Any, path: str = "") -> None:
    """Equal types, shapes, dtypes, order of keys, and bits: -0.0 is not 0.0, and one NaN is not another."""
    assert type(found) is type(expected), f"{path}: expected {type(expected)}, found {type(found)}"
    if isinstance(expected, np.ndarray):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), path
        assert found.tobytes() == expected.tobytes(), f"{path}: values differ"
    elif isinstance(expected, dict):
        assert list(found) == list(expected), path
        for key, value in expected.items():
            assert_same(found[key], value, f"{path}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), path
        for index, (left, right) in enumerate(zip(found, expected, strict=True)):
            assert_same(left, right, f"{path}/{index}")
    elif isinstance(expected, float | np.generic):
        assert np.asarray(found).tobytes() == np.asarray(expected).tobytes(), f"{path}: {found!r} is not {expected!r}"
    else:
        assert found == expected, path
