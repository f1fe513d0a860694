"""Choose entries of a manifest by path globs, as a pure function: the rest is neither read nor returned."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence

from castore.errors import PathNotFoundError, UsageError
from castore.format.manifest import Entry, Kind
from castore.format.paths import compile_glob
from castore.tensors import select

_NEAR_MAX = 5


def any_of(patterns: Sequence[str]) -> Callable[[str], bool]:
    """A predicate over paths: whether any of the globs matches."""
    matches = [compile_glob(pattern) for pattern in patterns]
    return lambda path: any(match(path) for match in matches)


def select_entries(entries: Sequence[Entry], patterns: Sequence[str] | None, *, where: str) -> Sequence[Entry]:
    """The entries that match any pattern, with what holds them and what they need (targets of aliases, storages of
    views).

    Raises PathNotFoundError for a pattern that matches nothing, with near matches.
    """
    if patterns is None:
        return entries
    if isinstance(patterns, str):
        raise UsageError(
            f"paths: expected a sequence of globs, found the text {patterns!r}; write paths=[{patterns!r}]"
        )
    for pattern in patterns:
        match = compile_glob(pattern)
        if not any(match(entry.path) for entry in entries if entry.kind is not Kind.STORAGE):
            raise no_such_path(pattern, entries, where=where)
    return select(entries, any_of(patterns))


def no_such_path(path: str, entries: Sequence[Entry], *, where: str) -> PathNotFoundError:
    """The error for a path or pattern that matches no leaf."""
    paths = [entry.path for entry in entries if not entry.is_container and entry.kind is not Kind.STORAGE]
    near = difflib.get_close_matches(path, paths, n=_NEAR_MAX, cutoff=0.4)
    advice = f"did you mean {', '.join(near)}?" if near else "`castore show` lists the paths"
    return PathNotFoundError(f"{where}: no leaf matches {path!r}; {advice}", near)
