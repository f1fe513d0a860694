"""docs/FORMAT.md shows the layouts as the code draws them, all of them."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / "tools" / "format_doc.py"
_DRAWN_LINE = re.compile(r"^ {4,}\S.*\S {2,}\S", re.MULTILINE)
"""A layout is drawn as an indented line of columns."""


@pytest.fixture
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("format_doc", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def draws_a_layout(path: Path) -> bool:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")), clean=False) or ""
    return _DRAWN_LINE.search(docstring) is not None


def test_the_document_equals_the_docstrings() -> None:
    found = subprocess.run([sys.executable, str(TOOL)], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")


def test_every_module_that_draws_a_layout_is_in_the_document(tool: ModuleType) -> None:
    package = ROOT / "castore"
    candidates = [
        *(package / "format").glob("*.py"),
        *(package / "codec").glob("*.py"),
        package / "marks.py",
    ]
    not_on_disk = {"castore/codec/chooser.py"}  # draws choices, which may change without a new format
    drawing = {str(path.relative_to(ROOT)) for path in candidates if draws_a_layout(path)} - not_on_disk
    assert drawing == set(tool.modules_in(tool.DOCUMENT.read_text(encoding="utf-8")))
    assert {"castore/format/pack.py", "castore/codec/registry.py", "castore/codec/byte_planes.py"} <= drawing


def test_a_document_that_differs_is_filled_again(tool: ModuleType) -> None:
    document = "# Title\n\n<!-- from castore/format/textfile.py -->\n\n```text\nold\n```\n\nafter\n"
    filled = tool.filled(document)
    assert "Small files that a person may read" in filled
    assert "old" not in filled
    assert filled.endswith("```\n\nafter\n")
    assert tool.filled(filled) == filled


def test_the_document_says_which_version_it_describes() -> None:
    text = (ROOT / "docs" / "FORMAT.md").read_text(encoding="utf-8")
    for module, name in (
        ("config", "FORMAT_VERSION"),
        ("pack", "PACK_VERSION"),
        ("manifest", "PART_VERSION"),
        ("snapshot", "SNAPSHOT_VERSION"),
        ("parity", "PARITY_VERSION"),
    ):
        version = getattr(importlib.import_module(f"castore.format.{module}"), name)
        assert version == 1
    assert "**Version 1.**" in text
