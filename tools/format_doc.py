"""Keep docs/FORMAT.md and the layouts drawn in the code the same: they live in module docstrings and are copied.

    python tools/format_doc.py            check, exit 1 when they differ
    python tools/format_doc.py --write    copy the docstrings into the document

In the document a block is a line `<!-- from castore/….py -->` followed by a fenced block, which is replaced.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "FORMAT.md"
_BLOCK = re.compile(r"(<!-- from (?P<module>[\w/.]+) -->\n+```text\n)(?P<body>.*?)(?P<end>```\n)", re.DOTALL)


def docstring_of(module: str) -> str:
    """The module docstring, as it reads in the source."""
    docstring = ast.get_docstring(ast.parse((ROOT / module).read_text(encoding="utf-8")))
    if docstring is None:
        raise SystemExit(f"{module} has no docstring")
    return docstring


def filled(document: str) -> str:
    """The document with every block replaced by its module's docstring."""
    return _BLOCK.sub(lambda match: match[1] + docstring_of(match["module"]) + "\n" + match["end"], document)


def modules_in(document: str) -> list[str]:
    """The modules that the document copies."""
    return [match["module"] for match in _BLOCK.finditer(document)]


def main() -> int:
    """Check or write."""
    document = DOCUMENT.read_text(encoding="utf-8")
    expected = filled(document)
    if document == expected:
        return 0
    if "--write" in sys.argv[1:]:
        DOCUMENT.write_text(expected, encoding="utf-8")
        return 0
    sys.stderr.write("docs/FORMAT.md differs from the layouts in the code; run: python tools/format_doc.py --write\n")
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
