"""Where the index of a repository lives: beside it, in the user's cache directory, or in memory.

LMDB needs memory maps and locks that network file systems do not keep, so there the cache moves to this
machine. On a cluster whose home directories are on the network as well, XDG_CACHE_HOME may name a local
directory; without one the index is rebuilt in memory each time.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from castore.format.layout import CACHE
from castore.index.base import Index
from castore.index.fallback import FallbackIndex

MOUNT_TABLE = Path("/proc/self/mountinfo")

_NETWORK_TYPES = frozenset(
    {
        "9p",
        "acfs",
        "afs",
        "beegfs",
        "ceph",
        "cifs",
        "coda",
        "davfs",
        "fhgfs",
        "gfs",
        "gfs2",
        "glusterfs",
        "gpfs",
    }
    | {
        "lustre",
        "mfs",
        "ncpfs",
        "nfs",
        "nfs4",
        "ocfs2",
        "orangefs",
        "panfs",
        "prl_fs",
        "pvfs2",
        "smb",
        "smb2",
    }
    | {"smb3", "smbfs", "vboxsf", "vmhgfs", "wekafs"}
)
"""Remote, shared between hosts, or without coherent memory maps. Everything under FUSE counts too (sshfs,
s3fs, rclone, gcsfuse, …): being wrong about a local one costs nothing but the place of the cache."""
_FUSE = re.compile(r"fuse(\..*)?")
_OCTAL = re.compile(r"\\([0-7]{3})")


def open_index(repository_path: Path, *, repository_id: bytes, id_bytes: int) -> Index:
    """The index of the repository in that directory. Never raises because of the cache: memory takes its
    place.

    Read-only mounts, a full disk, a cache that another process holds for ten seconds: all of it only costs
    reading the pack tables again. The directory is created.
    """
    try:
        directory = cache_directory_for(repository_path, repository_id)
        if directory is None:
            return FallbackIndex(None, reason=f"{repository_path}: no cache directory is local and writable")
        return FallbackIndex(open_lmdb_index(directory, repository_id=repository_id, id_bytes=id_bytes))
    except (OSError, ImportError) as error:  # ImportError: a platform without lmdb
        return FallbackIndex(None, reason=str(error))


def open_lmdb_index(cache_dir: Path, *, repository_id: bytes, id_bytes: int) -> Index:
    """See castore.index.lmdb_index.open_lmdb_index."""
    from castore.index import lmdb_index  # lmdb costs 6 ms of start-up, and history needs none

    return lmdb_index.open_lmdb_index(cache_dir, repository_id=repository_id, id_bytes=id_bytes)


def cache_directory_for(
    repository_path: Path,
    repository_id: bytes,
    *,
    mount_table: str | None = None,
    environ: Mapping[str, str] | None = None,
) -> Path | None:
    """The first of `<repository>/cache` and the user's cache directory that is local and writable; None:
    neither is.

    `mount_table` is the text of /proc/self/mountinfo and `environ` the environment; both are read when not
    given. The directory is created where that is possible.
    """
    table = _read_mount_table() if mount_table is None else mount_table
    candidates = (
        repository_path / CACHE,
        user_cache_directory(repository_id, os.environ if environ is None else environ),
    )
    for directory in candidates:
        if directory is not None and not is_network(file_system_type(directory, table)) and _is_writable(directory):
            return directory
    return None


def user_cache_directory(repository_id: bytes, environ: Mapping[str, str]) -> Path | None:
    """`$XDG_CACHE_HOME/castore/<id>` or `~/.cache/castore/<id>`; None without a home directory."""
    base = Path(environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # the specification says that relative ones are ignored
        base = Path(environ.get("HOME", ""), ".cache")
    return base / "castore" / repository_id.hex() if base.is_absolute() else None


def file_system_type(path: Path, mount_table: str) -> str:
    """The type of the file system that holds `path` (which need not exist), by a table like
    /proc/self/mountinfo.

    A line: `36 35 98:0 /root /mount/point rw,noatime shared:1 - ext3 /dev/sda1 rw` (proc(5)). Empty when
    unknown.
    """
    real = Path(os.path.realpath(path))
    best, found = -1, ""
    for line in mount_table.splitlines():
        left, separator, right = line.partition(" - ")
        fields, described = left.split(" "), right.split(" ")
        if not separator or len(fields) < 5:
            continue
        point = Path(_OCTAL.sub(lambda match: chr(int(match[1], 8)), fields[4]))
        # Of several mounts on one point the last one is seen.
        if len(point.parts) >= best and real.is_relative_to(point):
            best, found = len(point.parts), described[0]
    return found


def is_network(file_system: str) -> bool:
    """Whether LMDB must stay away from that type of file system."""
    return file_system in _NETWORK_TYPES or _FUSE.fullmatch(file_system) is not None


def _read_mount_table() -> str:
    try:
        return MOUNT_TABLE.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""  # not Linux: every directory counts as local


def _is_writable(directory: Path) -> bool:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(directory, os.W_OK | os.X_OK)
