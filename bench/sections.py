"""RESULTS.md: the table of `python -m bench`, and one section of each smaller measurement between marks of its own."""

from __future__ import annotations

import re
from pathlib import Path

RESULTS = Path(__file__).with_name("RESULTS.md")
_SECTION = re.compile(r"<!-- (?!end of )([^>]+) -->.*?<!-- end of \1 -->\n?", re.DOTALL)


def write_section(name: str, title: str, body: str) -> None:
    """Put a section in its place, at the end when it is new."""
    text = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else "# Benchmark results\n"
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, found, rest = text.partition(begin)
    after = rest.partition(end)[2] if found else "\n"
    section = f"{begin}\n\n## {title}\n\n{body.strip()}\n\n{end}"
    RESULTS.write_text(f"{before.rstrip()}\n\n{section}{after}", encoding="utf-8")


def replace_table(text: str) -> None:
    """Write the table anew and keep every section."""
    old = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else ""
    sections = [match.group(0).rstrip() for match in _SECTION.finditer(old)]
    RESULTS.write_text("\n\n".join([text.rstrip(), *sections]) + "\n", encoding="utf-8")
