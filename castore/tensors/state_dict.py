"""What torch hangs on the OrderedDict of a module's state_dict: `_metadata`, the version of each module."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from castore.errors import UnsupportedLeafError

_INT64 = range(-(2**63), 2**63)


def metadata_of(value: OrderedDict[Any, Any], path: str) -> dict[str, Any] | None:
    """A copy of it that msgpack can hold; None without. Raises UnsupportedLeafError for any other attribute, which
    would be lost.
    """
    attributes = vars(value)
    if not attributes:
        return None
    metadata = attributes.get("_metadata")
    if attributes.keys() != {"_metadata"} or not isinstance(metadata, Mapping) or not _is_plain(metadata):
        names = ", ".join(sorted(attributes))
        raise UnsupportedLeafError(
            path,
            "OrderedDict with attributes",
            f"{names} would be lost: delete it, or save OrderedDict(mapping)",
        )
    plain: dict[str, Any] = _plain(metadata)
    return plain


def _is_plain(value: Any, depth: int = 0) -> bool:
    """Whether msgpack can hold the value and give it back."""
    if value is None or type(value) in (bool, float, str, bytes):
        return True
    if type(value) is int:
        return value in _INT64
    if depth > 8:
        return False
    if isinstance(value, Mapping):
        return all(type(key) is str and _is_plain(item, depth + 1) for key, item in value.items())
    return type(value) is list and all(_is_plain(item, depth + 1) for item in value)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if type(value) is list else value
