"""How many threads castore works with."""

from __future__ import annotations

import os

_THREADS_MAX = 8


def worker_count() -> int:
    """Threads for hashing, coding, copying and reading: one per core that this process may use, at most 8."""
    return min(_THREADS_MAX, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
