r"""Small files that a person may read: config, refs, leases, condemned sets.

Two lines of UTF-8, so that `cat` shows them and a flipped bit cannot hide:

    {"format":1,...}\n                        one JSON object, keys sorted, no spaces
    xxh3-128:0123456789abcdef...\n            digest of the first line with its newline

A file of any other shape is damage, never an empty value.
"""

from __future__ import annotations

import json
from typing import Any

import xxhash

from castore.errors import ChecksumError, FormatError
from castore.options import TEXT_FILE_BYTES_MAX

_DIGEST_PREFIX = b"xxh3-128:"


def encode_text_file(fields: dict[str, Any]) -> bytes:
    """The two lines; values must be JSON."""
    line = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"
    return line + _DIGEST_PREFIX + xxhash.xxh3_128_hexdigest(line).encode() + b"\n"


def decode_text_file(data: bytes, *, name: str) -> dict[str, Any]:
    """The object of the first line, its digest checked; `name` is for messages.

    Raises FormatError (not two lines, not an object) or ChecksumError.
    """
    if len(data) > TEXT_FILE_BYTES_MAX:
        raise FormatError(f"{name}: expected at most {TEXT_FILE_BYTES_MAX} bytes, found {len(data)}")
    line, newline, tail = data.partition(b"\n")
    if not newline or not tail.startswith(_DIGEST_PREFIX) or not tail.endswith(b"\n"):
        raise FormatError(f"{name}: expected a JSON line and a digest line, found {data[:40]!r}")
    expected = _DIGEST_PREFIX + xxhash.xxh3_128_hexdigest(line + b"\n").encode() + b"\n"
    if tail != expected:
        raise ChecksumError(
            f"{name}: expected digest {expected[9:41].decode()}, found {tail[9:41]!r}: the file changed"
        )
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{name}: the first line is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise FormatError(f"{name}: expected a JSON object, found {type(fields).__name__}")
    return fields


def text_field(fields: dict[str, Any], key: str, kind: type, *, name: str) -> Any:
    """A field of the expected type, or a FormatError that names it."""
    value = fields.get(key)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise FormatError(f"{name}: field {key!r}: expected {kind.__name__}, found {value!r}")
    return value
