"""The layers drawn in ARCHITECTURE.md are those of the contract that import-linter checks."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_picture_of_the_layers_is_the_contract() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    (layers,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    architecture = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    picture = architecture.partition("## Layers")[2].split("```")[1].strip("\n")
    drawn = [line.split("  ")[0] for line in picture.splitlines()]
    # Modules of one layer may share a line or stand on lines of their own.
    expected = [set(re.split(r" [|:] ", layer)) for layer in layers]
    found = [set(re.split(r" \| |, ", names)) for names in drawn]
    merged: list[set[str]] = []
    for names in found:
        if merged and any(merged[-1] | names <= layer for layer in expected):
            merged[-1] |= names
        else:
            merged.append(names)
    assert merged == expected
