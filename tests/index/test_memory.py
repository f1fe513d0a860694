"""The index in memory keeps the contract."""

from __future__ import annotations

import pytest

from castore.index import Index, MemoryIndex
from tests.suites.index_suite import IndexSuite


class TestMemoryIndex(IndexSuite):
    @pytest.fixture
    def index(self) -> Index:
        return MemoryIndex()
