"""A snapshot record to write or to vary."""

from __future__ import annotations

from castore.format.snapshot import SnapshotRecord
from castore.ids import ChunkId, StateId

NOW_NS = 1_700_000_000_123_456_789
RECORD = SnapshotRecord(
    StateId("ab" * 16),
    (),
    "main",
    7,
    NOW_NS,
    {"loss": 1.5},
    {"lr": 1e-4},
    "half way",
    1000,
    900,
    800,
    5,
    (ChunkId(b"p" * 16),),
    "castore 0.1.0",
    b"12345678",
)
