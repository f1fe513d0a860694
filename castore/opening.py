"""Find a repository on disk, or make one: its backend and its config, before any chunk is looked at.

History (refs and snapshot files) needs no more than this.
"""

from __future__ import annotations

import os
from pathlib import Path

from castore.backend.local import LocalBackend
from castore.errors import (
    FormatError,
    NotFoundError,
    RepositoryAccessError,
    RepositoryExistsError,
    RepositoryNotFoundError,
    UsageError,
)
from castore.format.config import Config, decode_config, encode_config, new_features
from castore.format.layout import CACHE, CONFIG, LEASES, PACKS, SNAPSHOTS
from castore.hashing import hasher_for
from castore.options import COMPRESSIONS, TEXT_FILE_BYTES_MAX, RepositoryOptions


def create_at(path: str | Path, options: RepositoryOptions, *, now_ns: int) -> tuple[LocalBackend, Config]:
    """Create a repository in a directory that is absent or empty; its parents are made.

    Raises RepositoryExistsError, UsageError (options; a directory with other files in it) or RepositoryAccessError.
    """
    hasher_for(options.hash)
    if options.compression not in COMPRESSIONS:
        raise UsageError(f"unknown compression {options.compression!r}; expected one of {', '.join(COMPRESSIONS)}")
    if not options.lease_s > 0 or not options.orphan_grace_s > 0:
        raise UsageError(
            f"lease_s and orphan_grace_s must be above 0 s, found {options.lease_s} and {options.orphan_grace_s}"
        )
    root = Path(path)
    _check_empty(root)
    backend = LocalBackend(root)
    config = Config(os.urandom(16), options, now_ns, new_features())
    if not backend.put_if_absent(CONFIG, encode_config(config)):
        raise RepositoryExistsError(f"{root} already holds a repository; open it with castore.open({str(root)!r})")
    return backend, config


def open_at(path: str | Path) -> tuple[LocalBackend, Config]:
    """The backend and the config of an existing repository.

    Raises RepositoryNotFoundError, RepositoryAccessError, UnsupportedFormatError or DamageError (of the config).
    """
    root = Path(path)
    backend = LocalBackend(root)
    where = f"{root}/{CONFIG}"
    try:
        data = backend.read(CONFIG, max_bytes=TEXT_FILE_BYTES_MAX)
    except NotFoundError as error:
        raise _not_found(root) from error
    config = decode_config(data, where=where)
    config.check_features("read", where=where)
    return backend, config


def _not_found(root: Path) -> Exception:
    if root.is_file():
        return RepositoryNotFoundError(f"{root} is a file, not a repository; give the directory that holds `config`")
    if _looks_like_repository(root):
        return FormatError(
            f"{root} has packs or snapshots but no config file; restore it from a copy (`castore dump` shows the "
            "other files)"
        )
    return RepositoryNotFoundError(f"no repository at {root}; create one with `castore init {root}` or castore.init()")


def _looks_like_repository(root: Path) -> bool:
    return any((root / name.strip("/")).is_dir() for name in (PACKS, SNAPSHOTS))


def _check_empty(root: Path) -> None:
    """Refuse to mix a repository with other files: gc owns everything below its root."""
    try:
        found = sorted(entry.name for entry in root.iterdir()) if root.exists() else []
    except NotADirectoryError as error:
        raise UsageError(f"{root} is a file; a repository needs a directory") from error
    except PermissionError as error:
        raise RepositoryAccessError(f"{root}: cannot list: {error.strerror}; check owner and permissions") from error
    if CONFIG in found:
        raise RepositoryExistsError(f"{root} already holds a repository; open it with castore.open({str(root)!r})")
    own = {name.split("/")[0] for name in (CACHE, LEASES)}
    others = [name for name in found if not name.startswith(".") and name not in own]
    if others:
        raise UsageError(f"{root} is not empty (it holds {others[0]!r}); give a directory of its own to the repository")
