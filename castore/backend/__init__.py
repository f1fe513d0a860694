"""Named byte strings: the one seam between castore and where the bytes lie.

`base` is the contract, `local` a directory, `memory` a dict with the same contract.
"""

from castore.backend.base import Backend, Claim, ClaimInfo, FileInfo, PackSink, RangeReader
from castore.backend.local import LocalBackend
from castore.backend.memory import MemoryBackend

__all__ = [
    "Backend",
    "Claim",
    "ClaimInfo",
    "FileInfo",
    "LocalBackend",
    "MemoryBackend",
    "PackSink",
    "RangeReader",
]
