"""What is asked of a save, besides the state: checked and made plain before anything is read or written."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from castore.errors import UsageError
from castore.format.layout import check_ref_name
from castore.snapshots import Snapshot

METADATA_DEPTH_MAX = 100
"""Well inside of what msgpack packs (511 levels) and the interpreter recurses."""


@dataclass(frozen=True, slots=True)
class SaveRequest:
    """Everything about a save but the state itself; checked by `check_request`."""

    branch: str = "main"
    step: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    message: str = ""
    tags: Sequence[str] = ()
    parent: str | Snapshot | None = None
    """A ref to continue from; None: the head that this handle last saw."""
    allow_pickle: bool = False


def check_request(request: SaveRequest) -> SaveRequest:
    """The request with values of built-in types only.

    Raises UsageError or InvalidNameError before anything is read or written.
    """
    check_ref_name(request.branch)
    if isinstance(request.tags, str):
        raise UsageError(
            f"tags: expected a sequence of names, found the text {request.tags!r}; write tags=({request.tags!r},)"
        )
    tags = tuple(request.tags)
    for tag in tags:
        check_ref_name(tag)
        if tag == request.branch:
            raise UsageError(f"tag {tag!r} has the name of the branch; choose another name")
        if tags.count(tag) > 1:
            raise UsageError(f"tag {tag!r} is given twice")
    for name, given in (("metrics", request.metrics), ("metadata", request.metadata)):
        if not isinstance(given, Mapping):
            raise UsageError(f"{name}: expected a mapping, found {type(given).__name__}")
    return SaveRequest(
        _plain(request.branch),
        None if request.step is None else _step(request.step),
        {_text(key, "a key of metrics"): _number(value, key) for key, value in request.metrics.items()},
        _json_value(request.metadata, "metadata"),
        _text(request.message, "message"),
        tuple(map(_plain, tags)),
        _plain(request.parent) if isinstance(request.parent, str) else request.parent,
        request.allow_pickle,
    )


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{where}: expected str, found {value!r:.80}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{where}: {value!r:.80} is no valid Unicode: {error}") from error
    return _plain(value)


def _plain(text: str) -> str:
    """Without the class of an enumeration or of another subclass, which a worker process may not know."""
    return str.__str__(text)


def _step(value: Any) -> int:
    try:
        step = operator.index(value)
    except (TypeError, ValueError):  # a tensor of floats has __index__ and refuses
        step = None
    if step is None or isinstance(value, bool) or not -(2**63) <= step < 2**63:
        raise UsageError(f"step: expected an int of 64 bits or None, found {value!r:.80}")
    return step


def _number(value: Any, key: str) -> float:
    """A plain int or float; 0-dim tensors and numpy scalars are converted exactly."""
    if type(value) is int and -(2**63) <= value < 2**63:
        return value
    try:
        if isinstance(value, bool | str | bytes | bytearray):
            raise TypeError("no number")
        # A loss still hangs on its graph, and torch warns when such a tensor is made a number.
        return float(value.detach() if hasattr(value, "detach") else value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise UsageError(f"metrics[{key!r}]: expected a number, found {type(value).__name__}: {error}") from error


def _json_value(value: Any, where: str, *, depth: int = 0) -> Any:
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()  # numpy's scalars and 0-dim tensors
    if depth > METADATA_DEPTH_MAX:
        raise UsageError(f"{where[:200]}…: expected at most {METADATA_DEPTH_MAX} levels")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(value, where)
    if isinstance(value, int) and -(2**63) <= value < 2**64:
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise UsageError(f"{where}: {value} is no JSON value; give it as text or as a metric")
        return float(value)
    if isinstance(value, list | tuple):
        return [_json_value(item, f"{where}[{index}]", depth=depth + 1) for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {
            _text(key, f"a key of {where}"): _json_value(item, f"{where}[{key!r}]", depth=depth + 1)
            for key, item in value.items()
        }
    raise UsageError(
        f"{where}: expected a JSON value, found {type(value).__name__}; convert it, or save it as part of the state"
    )
