"""Exact bytes of small inputs, so that no change of a format goes unnoticed."""

from __future__ import annotations

from castore.ids import Buffer


def assert_golden(found: Buffer, golden_hex: str) -> None:
    """Compare with pinned bytes; blanks and line ends in `golden_hex` are for the reader's eye."""
    expected = "".join(golden_hex.split())
    assert bytes(found).hex() == expected, (
        "the format changed: bump the version, say so in docs/FORMAT.md and CHANGELOG, then pin the new bytes"
    )
