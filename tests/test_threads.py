"""How many threads there are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from castore.threads import worker_count

if TYPE_CHECKING:
    import pytest


def test_there_is_a_thread_for_each_core_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= worker_count() <= 8
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert worker_count() == 8
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: None)
    assert worker_count() == 1
