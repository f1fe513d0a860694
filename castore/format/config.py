"""The config file: what a repository is.

It is a text file (textfile.py) with these fields:

    format          int     format version, 1
    id              str     32 hex digits, random: two repositories are never mistaken for each other
    hash            str     "xxh3-128" or "blake3"
    compression     str     "auto", "lz4" or "none"
    lease_s         number  how long another host's lease counts as alive without a sign of life
    orphan_grace_s  number  how long a snapshot without a ref is kept
    created_ns      int     ns since 1970
    features        object  {"read": [..], "write": [..], "gc": [..]}: names of what castores later than the first
                            added, and what must know it: whoever reads; adds, moves or marks; takes away

Fields that a reader does not know are passed over.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal

from castore.errors import FormatError, UnsupportedFormatError
from castore.format.textfile import decode_text_file, encode_text_file, text_field
from castore.ids import is_hex
from castore.options import COMPRESSIONS, HASH_NAMES, RepositoryOptions

FORMAT_VERSION = 1
PRE_RELEASE_VERSION = 0
"""What pre-releases wrote, each in its own way: no castore reads it."""

Operation = Literal["read", "write", "gc"]
OPERATIONS: tuple[Operation, ...] = ("read", "write", "gc")

ORDERED = "ordered"
"""Feature flag of `write`: records may be of codec 18."""
KNOWN_FEATURES: dict[Operation, frozenset[str]] = {
    "read": frozenset(),
    "write": frozenset({ORDERED}),
    "gc": frozenset(),
}
"""Feature flags that this castore understands."""


@dataclass(frozen=True, slots=True)
class Config:
    """The decoded config file."""

    repository_id: bytes
    options: RepositoryOptions
    created_ns: int
    features: dict[Operation, frozenset[str]]

    @property
    def may_order(self) -> bool:
        """Whether records of codec 18 may be written."""
        return ORDERED in self.features["write"]

    def check_features(self, *operations: Operation, where: str) -> None:
        """Raise UnsupportedFormatError when one of the operations needs a feature that this castore lacks."""
        for operation in operations:
            unknown = sorted(self.features[operation] - KNOWN_FEATURES[operation])
            if unknown:
                raise UnsupportedFormatError(
                    f"{where}: to {operation} this repository needs {', '.join(unknown)}, which this castore lacks; "
                    "install a newer one"
                )


def new_features() -> dict[Operation, frozenset[str]]:
    """The feature flags of a repository that is created now."""
    return {"read": frozenset(), "write": frozenset({ORDERED}), "gc": frozenset()}


def encode_config(config: Config) -> bytes:
    """The bytes of the config file."""
    return encode_text_file(
        {
            "format": FORMAT_VERSION,
            "id": config.repository_id.hex(),
            "hash": config.options.hash,
            "compression": config.options.compression,
            "lease_s": config.options.lease_s,
            "orphan_grace_s": config.options.orphan_grace_s,
            "created_ns": config.created_ns,
            "features": {operation: sorted(config.features[operation]) for operation in OPERATIONS},
        }
    )


def decode_config(data: bytes, *, where: str) -> Config:
    """Raises FormatError, ChecksumError or UnsupportedFormatError."""
    fields = decode_text_file(data, name=where)
    version = text_field(fields, "format", int, name=where)
    if version == PRE_RELEASE_VERSION:
        raise UnsupportedFormatError(
            f"{where}: repository format {PRE_RELEASE_VERSION}, made by a pre-release of castore; this one reads "
            f"format {FORMAT_VERSION}: load the states with that pre-release and save them into a new repository"
        )
    if version != FORMAT_VERSION:
        raise UnsupportedFormatError(
            f"{where}: repository format {version}; this castore reads format {FORMAT_VERSION}: install a newer castore"
        )
    repository_id = text_field(fields, "id", str, name=where)
    if not is_hex(repository_id) or len(repository_id) != 32:
        raise FormatError(f"{where}: expected a repository id of 32 hex digits, found {repository_id!r}")
    if fields.get("hash") not in HASH_NAMES:
        raise UnsupportedFormatError(
            f"{where}: hash {fields.get('hash')!r} is unknown; expected {', '.join(HASH_NAMES)}"
        )
    if fields.get("compression") not in COMPRESSIONS:
        raise UnsupportedFormatError(
            f"{where}: compression {fields.get('compression')!r} is unknown; expected {', '.join(COMPRESSIONS)}"
        )
    options = RepositoryOptions(
        hash=fields["hash"],
        compression=fields["compression"],
        lease_s=_seconds(fields, "lease_s", where),
        orphan_grace_s=_seconds(fields, "orphan_grace_s", where),
    )
    created_ns = text_field(fields, "created_ns", int, name=where)
    return Config(bytes.fromhex(repository_id), options, created_ns, _features(fields, where))


def _seconds(fields: dict[str, Any], key: str, where: str) -> float:
    value = fields.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        raise FormatError(f"{where}: field {key!r}: expected seconds above 0, found {str(value)[:40]}")
    return float(value)


def _features(fields: dict[str, Any], where: str) -> dict[Operation, frozenset[str]]:
    features = text_field(fields, "features", dict, name=where)
    result: dict[Operation, frozenset[str]] = {}
    for operation in OPERATIONS:
        names = features.get(operation)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise FormatError(f"{where}: features.{operation}: expected a list of names, found {names!r}")
        result[operation] = frozenset(names)
    return result
