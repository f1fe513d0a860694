"""How much memory this process may count on: what machine and control groups leave, shared with the ranks beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_PROC, _CONTROL_GROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def available_bytes(proc: Path = _PROC, control_groups: Path = _CONTROL_GROUPS) -> int:
    """Memory that can be had without swapping, within the limits of all control groups above this process, divided by
    the ranks of this machine (LOCAL_WORLD_SIZE, which torchrun sets); 0 if unknown.
    """
    return min(_of_system(proc), *_of_groups(proc, control_groups)) // _ranks_here()


def _of_system(proc: Path) -> int:
    try:
        for line in (proc / "meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return 0


def _of_groups(proc: Path, root: Path) -> list[int]:
    """What each limited group leaves; one at least, so that there is something to take the minimum of."""
    left = []
    for directory, (limit_name, used_name, cached_names) in _groups(proc, root):
        try:
            limit = int((directory / limit_name).read_text(encoding="ascii"))
            used = int((directory / used_name).read_text(encoding="ascii"))
            fields = dict(line.split() for line in (directory / "memory.stat").read_text(encoding="ascii").splitlines())
            cached = sum(int(fields.get(name, 0)) for name in cached_names)
        except (OSError, ValueError):  # no such file, or "max": no limit
            continue
        left.append(max(0, limit - max(0, used - cached)))  # pages of files are given up when memory is wanted
    return left or [2**63]


_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
_V2 = ("memory.max", "memory.current", ("inactive_file", "active_file"))


def _groups(proc: Path, root: Path) -> Iterator[tuple[Path, tuple[str, str, tuple[str, ...]]]]:
    """The directories of the groups that this process is in, up to the root, and the names of their files."""
    try:
        lines = (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers == "":
            base, names = root, _V2
        elif "memory" in controllers.split(","):
            base, names = root / "memory", _V1
        else:
            continue
        directory = base / path.lstrip("/")
        while directory != base and base in directory.parents:
            yield directory, names
            directory = directory.parent
        yield base, names  # a container sees its own group here, under whatever path its host knows it


def _ranks_here() -> int:
    try:
        return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    except ValueError:
        return 1
