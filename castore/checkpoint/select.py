"""Choose entries of a manifest by path globs, as a pure function: the rest is neither read nor returned."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace

from castore.errors import PathNotFoundError
from castore.format.manifest import Entry, Kind
from castore.format.paths import compile_glob, parent_of

COMPOSITE_KINDS = frozenset({Kind.SPARSE, Kind.QUANTIZED})
"""One value made of child leaves: chosen whole or not at all."""

_NEAR_MAX = 5


def select_entries(entries: Sequence[Entry], patterns: Sequence[str] | None, *, where: str) -> list[Entry]:
    """The entries that match any pattern, what holds them, and what they need (targets of aliases, storages of views).

    Raises PathNotFoundError for a pattern that matches nothing, with near matches.
    """
    if patterns is None:
        return list(entries)
    by_path = {entry.path: entry for entry in entries}
    matched: set[str] = set()
    for pattern in patterns:
        match = compile_glob(pattern)
        hits = {entry.path for entry in entries if entry.kind is not Kind.STORAGE and match(entry.path)}
        if not hits:
            raise no_such_path(pattern, entries, where=where)
        matched |= hits
    chosen = matched | _composites(matched, by_path)
    return _with_needs([entry for entry in entries if entry.path in chosen], chosen, by_path)


def no_such_path(path: str, entries: Sequence[Entry], *, where: str) -> PathNotFoundError:
    """The error for a path or pattern that matches no leaf."""
    paths = [entry.path for entry in entries if not entry.is_container and entry.kind is not Kind.STORAGE]
    near = difflib.get_close_matches(path, paths, n=_NEAR_MAX, cutoff=0.4)
    advice = f"did you mean {', '.join(near)}?" if near else "`castore show` lists the paths"
    return PathNotFoundError(f"{where}: no leaf matches {path!r}; {advice}", near)


def _composites(matched: set[str], by_path: dict[str, Entry]) -> set[str]:
    """Composite parents of matched children, and all children of matched composites."""
    parents = {
        parent
        for path in matched
        if (parent := parent_of(path)) in by_path and by_path[parent].kind in COMPOSITE_KINDS
    }
    parents |= {path for path in matched if by_path[path].kind in COMPOSITE_KINDS}
    return parents | {path for path in by_path if parent_of(path) in parents and path}


def _with_needs(chosen: list[Entry], paths: set[str], by_path: dict[str, Entry]) -> list[Entry]:
    """Add containers and storages; an alias whose target was not chosen takes the target's place."""
    stand_ins: dict[str, str] = {}
    selected: list[Entry] = []
    needed: set[str] = set()
    for entry in chosen:
        if entry.kind is Kind.ALIAS:
            target = str(entry.attrs["target"])
            if target in stand_ins:
                entry = replace(entry, attrs={"target": stand_ins[target]})  # noqa: PLW2901  the same value, renamed
            elif target not in paths:
                stand_ins[target] = entry.path
                entry = replace(by_path[target], path=entry.path)  # noqa: PLW2901
        if entry.kind is Kind.VIEW:
            needed.add(str(entry.attrs["storage"]))
        path = entry.path
        while path:
            path = parent_of(path)
            needed.add(path)
        selected.append(entry)
    have = {entry.path for entry in selected}
    selected += [by_path[path] for path in needed - have if path in by_path]
    order = {path: index for index, path in enumerate(by_path)}
    return sorted(selected, key=lambda entry: order[entry.path])
