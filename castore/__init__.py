"""castore: git for training state.

A content-addressed, incremental checkpoint store. Names are loaded on first use, so that `import castore` costs little
and never imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from castore.api import Repository, init, load, save
    from castore.api import open_ as open
    from castore.checkpoint.background import PendingSave
    from castore.errors import (
        AmbiguousRefError,
        CastoreError,
        CastoreWarning,
        ChecksumError,
        ChunkMissingError,
        CodecError,
        ConflictError,
        DamageError,
        DivergedError,
        FormatError,
        InvalidNameError,
        LeaseError,
        LostLeavesError,
        LowSpaceWarning,
        MissingExtraError,
        NoSpaceError,
        NotFoundError,
        NoValidSnapshotError,
        ParityExceededError,
        PartialLoadError,
        PathNotFoundError,
        PickleRefusedError,
        PolicyWarning,
        RefError,
        RefExistsError,
        RepositoryAccessError,
        RepositoryError,
        RepositoryExistsError,
        RepositoryNotFoundError,
        SkippedSnapshotWarning,
        SlowSaveWarning,
        SnapshotGoneError,
        StaleSaveWarning,
        StateMismatchError,
        StorageError,
        ThinnedError,
        UnknownClassError,
        UnknownRefError,
        UnsupportedFormatError,
        UnsupportedLeafError,
        UsageError,
        WorkerError,
    )
    from castore.maintenance.retention import Keep
    from castore.refs import Ref
    from castore.snapshots import Leaf, Snapshot

__version__ = "0.1.0"

_HOMES = {
    "Keep": "castore.maintenance.retention",
    "Leaf": "castore.snapshots",
    "Ref": "castore.refs",
    "PendingSave": "castore.checkpoint.background",
    "Repository": "castore.api",
    "Snapshot": "castore.snapshots",
    "init": "castore.api",
    "load": "castore.api",
    "open": "castore.api",
    "save": "castore.api",
}

__all__ = [
    "AmbiguousRefError",
    "CastoreError",
    "CastoreWarning",
    "ChecksumError",
    "ChunkMissingError",
    "CodecError",
    "ConflictError",
    "DamageError",
    "DivergedError",
    "FormatError",
    "InvalidNameError",
    "Keep",
    "Leaf",
    "LeaseError",
    "LostLeavesError",
    "LowSpaceWarning",
    "MissingExtraError",
    "NoSpaceError",
    "NoValidSnapshotError",
    "NotFoundError",
    "ParityExceededError",
    "PartialLoadError",
    "PathNotFoundError",
    "PendingSave",
    "PickleRefusedError",
    "PolicyWarning",
    "Ref",
    "RefError",
    "RefExistsError",
    "Repository",
    "RepositoryAccessError",
    "RepositoryError",
    "RepositoryExistsError",
    "RepositoryNotFoundError",
    "SkippedSnapshotWarning",
    "SlowSaveWarning",
    "Snapshot",
    "SnapshotGoneError",
    "StaleSaveWarning",
    "StateMismatchError",
    "StorageError",
    "ThinnedError",
    "UnknownClassError",
    "UnknownRefError",
    "UnsupportedFormatError",
    "UnsupportedLeafError",
    "UsageError",
    "WorkerError",
    "__version__",
    "init",
    "load",
    "open",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'castore' has no attribute {name!r}")
    home = import_module(_HOMES.get(name, "castore.errors"))
    value = getattr(home, "open_" if name == "open" else name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
