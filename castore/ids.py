"""The names of stored things, each with a type of its own so that mypy keeps them apart.

A chunk id stays raw bytes (thousands are handled per save); the ids that people see are lower-case hex.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NewType

Buffer = bytes | bytearray | memoryview
"""Contiguous bytes of any owner; a memoryview is never copied on the way."""

ChunkId = NewType("ChunkId", bytes)
"""Digest of a chunk's raw bytes: 16 bytes with xxh3-128, 32 with blake3."""
PackId = NewType("PackId", str)
"""32 hex digits, random, never reused: a collector that slept can only delete what nobody may use."""
SnapshotId = NewType("SnapshotId", str)
"""Hex digest of the snapshot's body: 32 digits with xxh3-128, 64 with blake3."""
StateId = NewType("StateId", str)
"""Hex digest of the content of a state, the same for any encoding, packing and sharding."""

PACK_ID_BYTES = 16
SNAPSHOT_ID_DIGITS = (32, 64)
"""Hex digits of a snapshot id, by hash."""
PREFIX_HEX_MIN = 4
"""Shorter prefixes of a snapshot id are refused: they stop being unique in a few dozen saves."""

RandomBytes = Callable[[int], bytes]


def new_pack_id(random_bytes: RandomBytes = os.urandom) -> PackId:
    """A fresh random pack id (128 bits: no two packs ever share one)."""
    return PackId(random_bytes(PACK_ID_BYTES).hex())


def is_hex(text: str) -> bool:
    """Whether the text is lower-case hex and not empty."""
    return bool(text) and all(character in "0123456789abcdef" for character in text)
