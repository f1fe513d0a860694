"""Chunk id → location: a rebuildable cache of the pack tables. `lmdb` is imported on first use."""

from castore.index.base import Index, Location
from castore.index.fallback import FallbackIndex
from castore.index.memory import MemoryIndex
from castore.index.opening import cache_directory_for, open_index, open_lmdb_index

__all__ = [
    "FallbackIndex",
    "Index",
    "Location",
    "MemoryIndex",
    "cache_directory_for",
    "open_index",
    "open_lmdb_index",
]
