"""Text files with the right digest around any line: what a writer with a bug, or with bad intent, would leave."""

from __future__ import annotations

import xxhash


def sealed_text(line: bytes) -> bytes:
    """A text file whose digest is right, whatever the line says."""
    return line + b"\nxxh3-128:" + xxhash.xxh3_128_hexdigest(line + b"\n").encode() + b"\n"
