"""Text that is found on every machine: the Python standard library, in an order that does not change.

`passages` gives its docstrings as paragraphs, for the sentence encoder; `corpus` gives its sources as bytes,
for the models from scratch. Both depend on the Python version only, which is part of every cache key.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__", "lib2to3"})
"""Packages of other people, and what distributions leave out of their Python."""

WORDS_MIN = 12
"""A paragraph of fewer words is a heading or a signature."""


def source_files() -> Iterator[Path]:
    """Every Python source of the standard library, sorted by its path."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if not LEFT_OUT.intersection(path.relative_to(root).parts):
            yield path


def sources() -> Iterator[str]:
    for path in source_files():
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def passages() -> list[tuple[str, str]]:
    """Pairs of neighbouring paragraphs: two that stand in one docstring are about one thing."""
    pairs: list[tuple[str, str]] = []
    for source in sources():
        for docstring in _docstrings(source):
            paragraphs = [_plain(p) for p in docstring.split("\n\n") if len(p.split()) >= WORDS_MIN]
            pairs.extend(pairwise(paragraphs))
    return pairs


def corpus(size_bytes: int) -> bytes:
    """The first `size_bytes` of all sources, one after another."""
    parts: list[bytes] = []
    total = 0
    for source in sources():
        parts.append(source.encode())
        total += len(parts[-1])
        if total >= size_bytes:
            break
    return b"".join(parts)[:size_bytes]


def words(size_bytes: int) -> list[str]:
    """The lower-case words of `corpus(size_bytes)`, in order; names like `read_text` count as two."""
    return re.findall(r"[a-z]{2,}", corpus(size_bytes).decode(errors="ignore").lower())


def _docstrings(source: str) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in old modules
            tree = ast.parse(source)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


def _plain(paragraph: str) -> str:
    return " ".join(paragraph.split())
