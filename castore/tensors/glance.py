"""A first look at a state: where its arrays lie, and an outline of all the rest, in a fraction of the time that taking
it apart needs.

An asynchronous save makes room for the arrays and copies them. The outline is the state as it is now, in containers of
its own and with a description in the place of each array, so that `flatten_outline` can take it apart while the state
already changes. Only the usual classes have one: of a state that holds anything else there is none, and `flatten` takes
it apart at once. Nothing is decided here: containers are opened as `flatten` opens them, what is not found is found by
it, and what is wrong with the state is said by it.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from castore.errors import UnsupportedLeafError
from castore.options import SKELETON_DEPTH_MAX
from castore.tensors.arrays import Array, numpy_array, torch_array
from castore.tensors.classes import is_record
from castore.tensors.composites import take_apart
from castore.tensors.lazy import loaded_torch
from castore.tensors.scalars import encode_value
from castore.tensors.state_dict import metadata_of

_NUMBERS = frozenset({int, float, bool})
_VALUES = frozenset({*_NUMBERS, complex, type(None)})
"""Never change, and are always encoded."""
_KEYS = frozenset({str, int})
_INT_KEY_END = 2**63
"""Integers below are keys whatever their sign; `encode_key` decides about others."""


@dataclass(slots=True)
class Glance:
    """What a first look finds."""

    arrays: dict[int, Array] = field(default_factory=dict)
    """Identity of an array's object → description, which keeps the object alive."""
    text_bytes: int = 0
    """Length of all bytes and texts (of a text at least)."""
    outline: Any = None
    """See above; shares its descriptions with `arrays`."""
    has_outline: bool = False


def glance(state: Any) -> Glance:
    """The arrays in the containers of a state, wherever they lie; sparse and quantized tensors as their parts."""
    look = _Look()
    outline = look.at(state, 0)
    return Glance(look.arrays, look.text_bytes, outline if look.is_whole else None, look.is_whole)


def is_plain(tensor: Any, torch: Any) -> bool:
    """Whether a torch.Tensor or Parameter has elements in strided memory: is not sparse, quantized, nested or meta."""
    return tensor.layout is torch.strided and not (tensor.is_quantized or tensor.is_nested or tensor.is_meta)


class _Look:
    def __init__(self) -> None:
        self.arrays: dict[int, Array] = {}
        self.text_bytes = 0
        self.is_whole = True
        """Whether the outline has all of the state so far."""
        self._open: set[int] = set()
        """Identities of the containers around the current value."""
        self._opened: set[int] = set()
        """Those of containers that were opened since `is_whole` became false."""
        self._torch = torch = loaded_torch()
        self._tensors = () if torch is None else (torch.Tensor, torch.nn.Parameter)

    def at(self, value: Any, depth: int) -> Any:
        """The outline of a value; something else where `is_whole` has become false."""
        kind = type(value)
        if kind in self._tensors:
            return self.arrays.get(id(value)) or self._at_tensor(value, depth)
        if kind in _VALUES:
            return value
        if kind is str or kind is bytes:
            self.text_bytes += len(value)
            return value
        if kind is np.ndarray or kind is np.memmap:
            return self.arrays.get(id(value)) or self._at_ndarray(value)
        if depth >= SKELETON_DEPTH_MAX or not self._may_open(value):
            return self._give_up()
        self._open.add(id(value))
        outline = self._at_container(value, depth + 1)
        self._open.discard(id(value))
        return outline

    def _may_open(self, value: Any) -> bool:
        """No container inside of itself; and where there will be no outline, each only once."""
        if id(value) in self._open or id(value) in self._opened:
            return False
        if not self.is_whole:
            self._opened.add(id(value))
        return True

    def _at_container(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if kind is dict:
            self._check_keys(value)
            return {key: self.at(child, depth) for key, child in value.items()}
        if kind is list or kind is tuple:
            if _NUMBERS.issuperset(map(type, value)):
                return kind(value)
            return kind([self.at(child, depth) for child in value])
        if kind is OrderedDict:
            return self._at_ordered_dict(value, depth)
        if is_record(value):
            for child in _children(value):
                self.at(child, depth)
            return self._give_up()
        return self._at_scalar(value)

    def _at_tensor(self, tensor: Any, depth: int) -> Any:
        """A tensor that is plain; the parts of one that is not."""
        try:
            if is_plain(tensor, self._torch):
                array = self.arrays[id(tensor)] = torch_array(tensor, "")
                return array
            if not tensor.is_nested and not tensor.is_meta:
                for child in take_apart(tensor, "").children.values():
                    self.at(child, depth)
        except UnsupportedLeafError:
            pass  # `flatten` says it
        return self._give_up()

    def _at_ndarray(self, value: Any) -> Any:
        try:
            array = self.arrays[id(value)] = numpy_array(value, "")
        except UnsupportedLeafError:
            return self._give_up()
        return array

    def _at_ordered_dict(self, value: OrderedDict[Any, Any], depth: int) -> Any:
        self._check_keys(value)
        outline: Any = OrderedDict([(key, self.at(child, depth)) for key, child in value.items()])
        try:
            metadata = metadata_of(value, "")
        except UnsupportedLeafError:
            return self._give_up()
        if metadata is not None:
            outline._metadata = metadata
        return outline

    def _at_scalar(self, value: Any) -> Any:
        """Encoded, for it may change: a bytearray, for instance."""
        try:
            encoded = encode_value(value, "")
        except UnsupportedLeafError:
            return self._give_up()
        if encoded is None:
            return self._give_up()
        self.text_bytes += len(encoded.data)
        return encoded

    def _check_keys(self, value: Mapping[Any, Any]) -> None:
        """`flatten` may refuse unusual keys, or find that two are the same once written down."""
        kinds = set(map(type, value))
        if not kinds <= _KEYS or (
            int in kinds and not all(type(key) is str or -_INT_KEY_END < key < _INT_KEY_END for key in value)
        ):
            self._give_up()

    def _give_up(self) -> None:
        self.is_whole = False


def _children(value: Any) -> Iterable[Any]:
    """What a namedtuple or a dataclass holds."""
    if isinstance(value, tuple):
        return tuple.__iter__(value)
    return [getattr(value, part.name, None) for part in dataclasses.fields(value)]
