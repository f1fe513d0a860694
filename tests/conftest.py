"""What every test gets: a process that no user's settings reach, and hypothesis profiles.

CASTORE_TEST_PROFILE=thorough runs ten times the examples of the hypothesis tests.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# No deadline: the first example imports torch, and two shared cores stall.
settings.register_profile(
    "default",
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=bool(os.environ.get("CI")),  # a landing is judged by the same examples each time; people explore
)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=1000)
settings.load_profile(os.environ.get("CASTORE_TEST_PROFILE", "default"))


def pytest_sessionfinish() -> None:
    """Saves that died with their simulated process are never asked for their errors: not to be told of at the end."""
    logging.getLogger("castore").addHandler(logging.NullHandler())


@pytest.fixture(autouse=True)
def isolated_environment(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No repository, cache folder or terminal of the user reaches a test."""
    home: Path = tmp_path_factory.getbasetemp() / "home"
    home.mkdir(exist_ok=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / ".cache"))
    monkeypatch.setenv("COLUMNS", "120")
    for name in ("CASTORE_REPO", "FORCE_COLOR", "CLICOLOR_FORCE"):
        monkeypatch.delenv(name, raising=False)
