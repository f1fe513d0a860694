"""Every file name of a repository, built and parsed here and nowhere else.

    config                          what the repository is
    packs/ab/<pack id>.pack         ab: the first two hex digits of the id
    parity/ab/<pack id>.parity      optional: restores lost stretches of that pack; garbage without it
    snapshots/<snapshot id>
    forgotten/<snapshot id>         marker: dropped by policy; stays as a tombstone while history reaches through it
    thin/<snapshot id>              overlay: leaves dropped from a kept snapshot
    orphans/<snapshot id>           when a ref last left the snapshot: its grace period starts then
    policy                          what to forget and to thin automatically
    policy-applied                  when that was done last
    policy-collected                when gc --auto last looked for what can be freed
    refs/branches/<encoded name>
    refs/tags/<encoded name>
    leases/<random>.lease
    gc/<random>.condemned           packs and snapshots that a collector will remove
    gc/<random>.drain               the leases that were older than that, which it waits for
    gc/<random>.collector           the claim of a collector at work
    gc/reserve                      space that a collector needs when the disk is full; may be missing
    damaged/<pack id>.<random>      records that did not read right: writers store their chunks again
    lost/<snapshot id>              what a repair found to be lost of a snapshot
    quarantine/<random>/<name>      what a repair took out of the way, under the name it had, and `why`
    cache/                          the index; may be deleted at any time
    .lock                           empty; locked while a branch or tag moves (local file systems)

Names given by people are encoded: every byte of their UTF-8 outside a-z 0-9 _ - becomes %XX (upper-case letters and
dots too, so that names stay apart on file systems that fold case, and none is hidden or has a meaning of its own).
"""

from __future__ import annotations

import os
from urllib.parse import unquote_to_bytes

from castore.errors import FormatError, InvalidNameError
from castore.ids import PACK_ID_BYTES, SNAPSHOT_ID_DIGITS, PackId, RandomBytes, SnapshotId, is_hex

CONFIG = "config"
PACKS = "packs/"
PARITY = "parity/"
SNAPSHOTS = "snapshots/"
FORGOTTEN = "forgotten/"
THIN = "thin/"
ORPHANS = "orphans/"
POLICY = "policy"
POLICY_APPLIED = "policy-applied"
POLICY_COLLECTED = "policy-collected"
BRANCHES = "refs/branches/"
TAGS = "refs/tags/"
LEASES = "leases/"
GC = "gc/"
DAMAGED = "damaged/"
LOST = "lost/"
QUARANTINE = "quarantine/"
RESERVE = "gc/reserve"
CONDEMNED_SUFFIX, DRAIN_SUFFIX, COLLECTOR_SUFFIX = ".condemned", ".drain", ".collector"
CACHE = "cache/"

_PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789_-")
_ENCODED_BYTES_MAX = 240
"""File systems allow 255 bytes; the rest is for temporary names."""


def pack_name(pack_id: PackId) -> str:
    """`packs/ab/<id>.pack`."""
    return f"{PACKS}{pack_id[:2]}/{pack_id}.pack"


def parse_pack_name(name: str) -> PackId | None:
    """The pack id, or None when the name is not a pack's (a stray file is ignored, never an error)."""
    stem = name.rsplit("/", 1)[-1].removesuffix(".pack")
    if is_hex(stem) and len(stem) == 2 * PACK_ID_BYTES and name == pack_name(PackId(stem)):
        return PackId(stem)
    return None


def parity_name(pack_id: PackId) -> str:
    """`parity/ab/<id>.parity`."""
    return f"{PARITY}{pack_id[:2]}/{pack_id}.parity"


def parse_parity_name(name: str) -> PackId | None:
    """The id of the pack that the file protects, or None when the name is not a parity file's."""
    stem = name.rsplit("/", 1)[-1].removesuffix(".parity")
    if is_hex(stem) and len(stem) == 2 * PACK_ID_BYTES and name == parity_name(PackId(stem)):
        return PackId(stem)
    return None


def snapshot_name(snapshot_id: SnapshotId) -> str:
    """`snapshots/<id>`."""
    return f"{SNAPSHOTS}{snapshot_id}"


def parse_snapshot_name(name: str) -> SnapshotId | None:
    """The snapshot id, or None when the name is not a snapshot's."""
    return _parse_id(name, SNAPSHOTS)


def forgotten_name(snapshot_id: SnapshotId) -> str:
    """`forgotten/<id>`."""
    return f"{FORGOTTEN}{snapshot_id}"


def parse_forgotten_name(name: str) -> SnapshotId | None:
    """The id of the snapshot, or None when the name is not a marker's."""
    return _parse_id(name, FORGOTTEN)


def thin_name(snapshot_id: SnapshotId) -> str:
    """`thin/<id>`."""
    return f"{THIN}{snapshot_id}"


def parse_thin_name(name: str) -> SnapshotId | None:
    """The id of the snapshot, or None when the name is not an overlay's."""
    return _parse_id(name, THIN)


def orphan_name(snapshot_id: SnapshotId) -> str:
    """`orphans/<id>`."""
    return f"{ORPHANS}{snapshot_id}"


def parse_orphan_name(name: str) -> SnapshotId | None:
    """The id of the snapshot, or None when the name is not a note's."""
    return _parse_id(name, ORPHANS)


def _parse_id(name: str, prefix: str) -> SnapshotId | None:
    stem = name.removeprefix(prefix)
    is_id = is_hex(stem) and len(stem) in SNAPSHOT_ID_DIGITS and name == f"{prefix}{stem}"
    return SnapshotId(stem) if is_id else None


def new_lease_name(random_bytes: RandomBytes = os.urandom) -> str:
    """A fresh `leases/<random>.lease`."""
    return f"{LEASES}{random_bytes(16).hex()}.lease"


def new_mark_name(pack_id: PackId, random_bytes: RandomBytes = os.urandom) -> str:
    """A fresh `damaged/<pack id>.<random>`."""
    return f"{DAMAGED}{pack_id}.{random_bytes(8).hex()}"


def lost_name(snapshot_id: SnapshotId) -> str:
    """`lost/<id>`."""
    return f"{LOST}{snapshot_id}"


def parse_lost_name(name: str) -> SnapshotId | None:
    """The snapshot id, or None when the name is not that of such a mark."""
    return _parse_id(name, LOST)


def new_quarantine(random_bytes: RandomBytes = os.urandom) -> str:
    """A fresh folder `quarantine/<random>/` for one repair."""
    return f"{QUARANTINE}{random_bytes(8).hex()}/"


def new_condemned_name(random_bytes: RandomBytes = os.urandom) -> str:
    """A fresh `gc/<random>.condemned`."""
    return f"{GC}{random_bytes(16).hex()}{CONDEMNED_SUFFIX}"


def is_condemned_name(name: str) -> bool:
    """Whether the file is a condemned set."""
    return name.startswith(GC) and name.endswith(CONDEMNED_SUFFIX)


def drain_name(condemned_name: str) -> str:
    """`gc/<random>.drain`, beside the condemned file."""
    return condemned_name.removesuffix(CONDEMNED_SUFFIX) + DRAIN_SUFFIX


def new_collector_name(random_bytes: RandomBytes = os.urandom) -> str:
    """A fresh `gc/<random>.collector`."""
    return f"{GC}{random_bytes(16).hex()}{COLLECTOR_SUFFIX}"


def branch_name(name: str) -> str:
    """`refs/branches/<encoded>`."""
    return BRANCHES + encode_ref_name(name)


def tag_name(name: str) -> str:
    """`refs/tags/<encoded>`."""
    return TAGS + encode_ref_name(name)


def encode_ref_name(name: str) -> str:
    """The file name of a branch or tag; raises InvalidNameError when it would be too long for a file system."""
    encoded = "".join(chr(byte) if byte in _PLAIN else f"%{byte:02X}" for byte in name.encode())
    if len(encoded) > _ENCODED_BYTES_MAX:
        raise InvalidNameError(
            f"name {name[:40]!r}…: expected at most {_ENCODED_BYTES_MAX} encoded bytes, found {len(encoded)}"
        )
    return encoded


def decode_ref_name(encoded: str) -> str:
    """The name behind an encoded file name; raises FormatError when it is not one that encode_ref_name makes."""
    try:
        name = unquote_to_bytes(encoded).decode()
        if encode_ref_name(name) == encoded:
            return name
    except (UnicodeError, InvalidNameError):
        pass
    raise FormatError(f"refs: {encoded!r} is not an encoded ref name; move the file out of the repository")


def check_ref_name(name: str) -> None:
    """Git's rules for branch and tag names (`git check-ref-format`), and the words that castore's refs use.

    Raises InvalidNameError.
    """
    parts = name.split("/")
    bad_characters = sorted({c for c in name if ord(c) < 0x20 or ord(c) == 0x7F or c in " ~^:?*[\\"})
    if not name:
        problem = "it is empty"
    elif bad_characters:
        problem = f"it contains {bad_characters[0]!r}"
    elif any(0xD800 <= ord(c) <= 0xDFFF for c in name):
        problem = "it is not valid Unicode"
    elif any(not part or part.startswith(".") or part.endswith(".lock") for part in parts):
        problem = "a component is empty, begins with '.' or ends with '.lock'"
    elif ".." in name or "@" in name:
        problem = "it contains '..' or '@' ('@' separates a branch from a step)"
    elif name.endswith(".") or name.startswith("-"):
        problem = "it ends with '.' or begins with '-'"
    elif parts[0] in ("heads", "tags") and len(parts) > 1:
        problem = "'heads/' and 'tags/' say which kind of ref is meant"
    else:
        encode_ref_name(name)
        return
    raise InvalidNameError(f"{name!r} is not a valid branch or tag name: {problem}")
