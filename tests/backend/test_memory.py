"""The memory backend keeps the contract."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from castore.backend import MemoryBackend
from tests.suites.backend_suite import BackendSuite

if TYPE_CHECKING:
    from castore.backend.base import Backend


class TestMemoryBackend(BackendSuite):
    @pytest.fixture
    def backend(self) -> Backend:
        return MemoryBackend()


def test_the_clock_comes_in_as_an_argument() -> None:
    backend = MemoryBackend("here", now_ns=lambda: 12)
    backend.put_if_absent("x", b"")
    info = backend.stat("x")
    assert info is not None
    assert info.modified_ns == 12
    assert backend.location == "here"
