"""A first look at a state: where its arrays lie, found in a fraction of the time that taking it apart needs.

An asynchronous save copies what lies there while `flatten` does the rest. Nothing is decided here: what is not found is
found by `flatten`, and what is wrong with the state is said by it.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from castore.errors import UnsupportedLeafError
from castore.tensors.arrays import Array, numpy_array, torch_array
from castore.tensors.lazy import loaded_torch

KnownArrays = Mapping[int, Array]
"""Identity of an array's object → description, which keeps the object alive."""


def find_arrays(state: Any) -> KnownArrays:
    """The arrays in containers of a state, wherever they lie, but for those inside sparse and quantized tensors."""
    torch = loaded_torch()
    tensors = () if torch is None else (torch.Tensor, torch.nn.Parameter)
    found: dict[int, Array] = {}
    opened: set[int] = set()
    waiting = [state]
    while waiting:
        value = waiting.pop()
        kind = type(value)
        if kind in tensors:
            if id(value) not in found and is_plain(value, torch):
                with suppress(UnsupportedLeafError):
                    found[id(value)] = torch_array(value, "")
        elif kind is np.ndarray or kind is np.memmap:
            with suppress(UnsupportedLeafError):
                found[id(value)] = numpy_array(value, "")
        elif id(value) not in opened:
            children = _children(value)
            if children:
                opened.add(id(value))
                waiting.extend(children)
    return found


def is_plain(tensor: Any, torch: Any) -> bool:
    """Whether a torch.Tensor or Parameter has elements in strided memory: is not sparse, quantized, nested or meta."""
    return tensor.layout is torch.strided and not (tensor.is_quantized or tensor.is_nested or tensor.is_meta)


def _children(value: Any) -> Any:
    """What a container of a known type holds; nothing for other values, and for lists of plain numbers."""
    kind = type(value)
    if kind is dict or kind is OrderedDict:
        return value.values()
    if isinstance(value, list | tuple):
        return () if value and type(value[0]) in (int, float) else value
    if dataclasses.is_dataclass(value) and kind is not type:
        return [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    return ()
