"""A first look at a state: where its arrays lie, found in a fraction of the time that taking it apart needs.

An asynchronous save makes room for what is found, and copies what lies plainly in memory while `flatten` does the rest.
Nothing is decided here: containers are opened as `flatten` opens them, what is not found is found by it, and what is
wrong with the state is said by it.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from castore.errors import UnsupportedLeafError
from castore.tensors.arrays import Array, numpy_array, torch_array
from castore.tensors.classes import is_record
from castore.tensors.composites import take_apart
from castore.tensors.lazy import loaded_torch

_NUMBERS = frozenset({int, float, bool})


@dataclass(slots=True)
class Glance:
    """What a first look finds."""

    arrays: dict[int, Array] = field(default_factory=dict)
    """Identity of an array's object → description, which keeps the object alive."""
    text_bytes: int = 0
    """Length of all bytes and texts (of a text at least)."""


def glance(state: Any) -> Glance:
    """The arrays in the containers of a state, wherever they lie; sparse and quantized tensors as their parts."""
    torch = loaded_torch()
    tensors = () if torch is None else (torch.Tensor, torch.nn.Parameter)
    found = Glance()
    opened: set[int] = set()
    waiting = [state]
    while waiting:
        value = waiting.pop()
        kind = type(value)
        if kind in tensors:
            if id(value) not in found.arrays:
                waiting.extend(_look_at(value, torch, found))
        elif kind is np.ndarray or kind is np.memmap:
            with suppress(UnsupportedLeafError):
                found.arrays[id(value)] = numpy_array(value, "")
        elif kind is bytes or kind is bytearray or kind is str:
            found.text_bytes += len(value)
        elif id(value) not in opened:
            children = _children(value)
            if children:
                opened.add(id(value))
                waiting.extend(children)
    return found


def is_plain(tensor: Any, torch: Any) -> bool:
    """Whether a torch.Tensor or Parameter has elements in strided memory: is not sparse, quantized, nested or meta."""
    return tensor.layout is torch.strided and not (tensor.is_quantized or tensor.is_nested or tensor.is_meta)


def _look_at(tensor: Any, torch: Any, found: Glance) -> Iterable[Any]:
    """Note a tensor that is plain; the parts of one that is not."""
    with suppress(UnsupportedLeafError):
        if is_plain(tensor, torch):
            found.arrays[id(tensor)] = torch_array(tensor, "")
        elif not tensor.is_nested and not tensor.is_meta:
            return take_apart(tensor, "").children.values()
    return ()


def _children(value: Any) -> Iterable[Any]:
    """What a container holds; nothing for other values, and for lists of nothing but numbers."""
    kind = type(value)
    if kind is dict or kind is OrderedDict:
        children: Iterable[Any] = value.values()
        return children
    if kind is list or kind is tuple:
        return () if _NUMBERS.issuperset(map(type, value)) else value
    if not is_record(value):
        return ()
    if isinstance(value, tuple):
        return tuple.__iter__(value)
    return [getattr(value, part.name, None) for part in dataclasses.fields(value)]
