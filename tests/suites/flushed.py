"""A processor that takes denormal floats for zero, as training code may have set it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def flushed_denormals(*, on: bool = True) -> Iterator[None]:
    """In this thread; with `on=False` it does not."""
    torch = pytest.importorskip("torch")
    if not torch.set_flush_denormal(on) and on:
        pytest.skip("this processor cannot flush denormals to zero")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
