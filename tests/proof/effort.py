"""How much is tried: a bounded form in every run of the tests, the long one with CASTORE_TEST_PROFILE=thorough."""

from __future__ import annotations

import os
from typing import TypeVar

THOROUGH = os.environ.get("CASTORE_TEST_PROFILE") == "thorough"

_T = TypeVar("_T")


def effort(bounded: _T, thorough: _T) -> _T:
    """The one that applies to this run."""
    return thorough if THOROUGH else bounded
