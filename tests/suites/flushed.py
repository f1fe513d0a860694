"""A processor that takes denormal floats for zero, as training code may have set it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Of this thread."""
    torch = pytest.importorskip("torch")
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals to zero")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
