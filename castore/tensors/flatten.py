"""State → entries and payloads, in depth-first order.

    container     its entry, then its children; dict order is kept
    value         an entry and its bytes (scalars.py)
    array         an entry and a payload over its memory; what shares memory is found afterwards (aliases.py)
    composite     a sparse or quantized tensor: a container whose children are plain tensors (composites.py)

    hints of arrays     stride         strides in elements, if the memory is dense and not row-major
                        device         where it lay, if not on the CPU
                        requires_grad, parameter      true
                        buffer         whether an nn.Buffer is persistent
                        object         of an ALIAS that was another object over the same memory: the
                                       path under which that object first occurs
    hint of ORDERED_DICT   state_dict_metadata   the `_metadata` that torch hangs on a module's state_dict

    VIEW attrs     storage        path of its STORAGE
                   offset_bytes   of its first element in that
                   stride_bytes   of its axes; negative ones occur for numpy only
                   conj, neg      true if the storage holds the conjugate or negative
                   descr          as in an ndarray entry

    STORAGE        path "~storage/<n>", behind the root's entries; dtype "uint8" (torch) or "|u1" (numpy)

The state is read, never changed. Nothing here reads the bytes of arrays.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from castore.errors import UnsupportedLeafError, UsageError
from castore.format.manifest import Entry, Kind
from castore.format.paths import encode_key, join
from castore.options import SKELETON_DEPTH_MAX
from castore.tensors.aliases import Shared, check_aligned, find_sharing
from castore.tensors.arrays import CPU, Array, numpy_array, object_hints, torch_array
from castore.tensors.classes import (
    class_name,
    dataclass_fields,
    is_namedtuple,
    is_record,
    namedtuple_fields,
)
from castore.tensors.composites import Composite, take_apart
from castore.tensors.glance import is_plain
from castore.tensors.lazy import loaded_torch
from castore.tensors.payloads import ArrayPayload, HullPayload, Payload
from castore.tensors.scalars import Encoded, encode_pickle, encode_value, opaque_value
from castore.tensors.state_dict import metadata_of

STORAGE_PREFIX = "~storage/"
"""No key is escaped to this, so a hidden entry never has the path of a value."""


@dataclass(frozen=True, slots=True)
class FlatState:
    """A state as parallel sequences."""

    entries: tuple[Entry, ...]
    """Depth first, without inline bytes and chunk ids; STORAGE entries last."""
    payloads: tuple[Payload | None, ...]
    """None for containers and aliases. A VIEW has one too: its own bytes, which are only hashed."""


def flatten(
    state: Any, *, allow_pickle: bool = False, is_target: bool = False, known: Mapping[int, Array] | None = None
) -> FlatState:
    """Take a state apart. Copies no array; the payloads keep the state's values alive and read their memory
    later.

    Raises UnsupportedLeafError, which names the path, for a value without a typed encoding
    (`allow_pickle=True` pickles it instead), and UsageError for containers that hold themselves or are nested
    deeper than SKELETON_DEPTH_MAX. `is_target` describes a state that is to be loaded into: what has no typed encoding
    is named and never pickled. `known` are the arrays that a first look has found (glance.py).
    """
    walk = _Walk(allow_pickle=allow_pickle, is_target=is_target, known=known or {})
    walk.visit(state, "")
    return _with_sharing(walk)


def flatten_outline(outline: Any) -> FlatState:
    """Take a state apart from its outline (glance.py). The arrays of its payloads may have let go of their memory.
    Raises nothing that the state is to blame for.
    """
    walk = _OutlineWalk(allow_pickle=False, is_target=False, known={})
    walk.visit(outline, "")
    return _with_sharing(walk)


class _Walk:
    """The entries of a state so far."""

    def __init__(self, *, allow_pickle: bool, is_target: bool, known: Mapping[int, Array]) -> None:
        self.allow_pickle = allow_pickle
        self.is_target = is_target
        self.known = known
        self.entries: list[Entry] = []
        self.payloads: list[Payload | None] = []
        self.arrays: list[tuple[int, Array]] = []
        """Entry number and description of every array."""
        self._open: dict[int, str] = {}
        """Identity → path of the containers around the current value."""
        self._composites: dict[int, tuple[str, Any]] = {}
        """Identity → path of sparse and quantized tensors, which are kept so that no identity is used again.
        """

    def visit(self, value: Any, path: str) -> None:
        part = self._part(value, path)
        if isinstance(part, Encoded):
            self._add(part.entry(path), part.payload())
        elif isinstance(part, Array):
            kind = Kind.TENSOR if part.family == "torch" else Kind.NDARRAY
            entry = Entry(
                path,
                kind,
                part.element.name,
                part.shape,
                _array_attrs(part),
                _array_hints(part),
                part.raw_bytes,
            )
            self.arrays.append((self._add(entry, ArrayPayload(part)), part))
        elif isinstance(part, Composite):
            self._visit_composite(value, part, path)
        else:
            self._visit_container(value, path)

    def _part(self, value: Any, path: str) -> Encoded | Array | Composite | None:
        """What the value is; None for a container."""
        return self.known.get(id(value)) or self._examine(value, path)

    def _examine(self, value: Any, path: str) -> Encoded | Array | Composite | None:
        """What the value is; None for a container. A pickle of it where that is allowed and nothing else
        fits.
        """
        try:
            return _examine(value, path)
        except UnsupportedLeafError:
            if self.is_target:
                return opaque_value(value)
            if not self.allow_pickle:
                raise
            return encode_pickle(value, path)

    def _add(self, entry: Entry, payload: Payload | None) -> int:
        self.entries.append(entry)
        self.payloads.append(payload)
        return len(self.entries) - 1

    def _visit_composite(self, tensor: Any, composite: Composite, path: str) -> None:
        seen = self._composites.get(id(tensor))
        if seen is not None:
            self._add(Entry(path, Kind.ALIAS, attrs={"target": seen[0]}), None)
            return
        self._composites[id(tensor)] = path, tensor
        self._add(
            Entry(path, composite.kind, "", (len(composite.children),), composite.attrs, object_hints(tensor)),
            None,
        )
        for component, child in composite.children.items():
            self.visit(child, join(path, component))

    # ---- containers ----------------------------------------------------------------------------------------

    def _visit_container(self, value: Any, path: str) -> None:
        around = self._open.get(id(value))
        if around is not None:
            name = type(value).__name__
            raise UsageError(f"leaf {path!r}: the {name} contains itself (it is {around!r} too); a state is a tree")
        if len(self._open) >= SKELETON_DEPTH_MAX:
            raise UsageError(f"leaf {path!r}: nested deeper than {SKELETON_DEPTH_MAX} levels; flatten the state")
        self._open[id(value)] = path
        kind, attrs, hints, children = _open_container(value, path)
        self._add(Entry(path, kind, "", (len(children),), attrs, hints), None)
        for component, child in children:
            self.visit(child, join(path, component))
        del self._open[id(value)]


class _OutlineWalk(_Walk):
    """The entries of an outline: what is no container and can change has been looked at already."""

    def _part(self, value: Any, path: str) -> Encoded | Array | Composite | None:
        return value if type(value) is Array or type(value) is Encoded else self._examine(value, path)


def _examine(value: Any, path: str) -> Encoded | Array | Composite | None:
    """What the value is; None for a container. Raises UnsupportedLeafError, which says why and what to do."""
    kind = type(value)
    torch = loaded_torch()
    if torch is not None and (kind is torch.Tensor or kind is torch.nn.Parameter):
        return torch_array(value, path) if is_plain(value, torch) else _examine_tensor(value, path)
    if kind is dict or kind is OrderedDict:
        return None
    encoded = encode_value(value, path)
    if encoded is not None:
        return encoded
    if kind is list or kind is tuple:
        return None
    if kind is np.ndarray or kind is np.memmap:
        return numpy_array(value, path)
    if not is_record(value):
        from castore.tensors.unsupported import unsupported  # names classes of numpy that take 0.1 s to import

        raise unsupported(value, path)
    return None


def _examine_tensor(value: Any, path: str) -> Composite:
    if value.is_meta:
        raise UnsupportedLeafError(
            path, "torch.Tensor on the meta device", "it has no data: materialize it before saving"
        )
    if value.is_nested:
        raise UnsupportedLeafError(path, "nested torch.Tensor", "save list(tensor.unbind())")
    return take_apart(value, path)


def _open_container(value: Any, path: str) -> tuple[Kind, dict[str, Any], dict[str, Any], list[tuple[str, Any]]]:
    """Kind, attributes, hints and (component, child) pairs of a container."""
    if type(value) is dict:
        return Kind.DICT, {}, {}, _dict_children(value, path)
    if type(value) is OrderedDict:
        return Kind.ORDERED_DICT, {}, _ordered_dict_hints(value, path), _dict_children(value, path)
    if type(value) is list:
        return Kind.LIST, {}, {}, [(str(index), item) for index, item in enumerate(value)]
    if type(value) is tuple:
        return Kind.TUPLE, {}, {}, [(str(index), item) for index, item in enumerate(value)]
    if is_namedtuple(value):
        kind, fields = Kind.NAMEDTUPLE, namedtuple_fields(value, path)
    else:
        kind, fields = Kind.DATACLASS, dataclass_fields(value, path)
    attrs = {"class": class_name(type(value)), "fields": list(fields)}
    return kind, attrs, {}, [(encode_key(name), child) for name, child in fields.items()]


def _dict_children(value: Mapping[Any, Any], path: str) -> list[tuple[str, Any]]:
    children = [(encode_key(key, parent=path), child) for key, child in value.items()]
    if len({component for component, _ in children}) != len(children):
        raise UsageError(f"leaf {path!r}: two keys of the dict are the same once written down (NaN, for instance)")
    return children


def _ordered_dict_hints(value: OrderedDict[Any, Any], path: str) -> dict[str, Any]:
    metadata = metadata_of(value, path)
    return {} if metadata is None else {"state_dict_metadata": metadata}


# ---- what an array's entry says ----------------------------------------------------------------------------


def _array_attrs(array: Array) -> dict[str, Any]:
    return {} if array.element.descr is None else {"descr": array.element.descr}


def _array_hints(array: Array) -> dict[str, Any]:
    hints = array.object_hints.copy()
    stride = array.stride_hint()
    if stride is not None:
        hints["stride"] = stride
    if array.device != CPU:
        hints["device"] = array.device
    return hints


# ---- shared memory -----------------------------------------------------------------------------------------


def _with_sharing(walk: _Walk) -> FlatState:
    """Turn arrays that share memory into ALIAS and VIEW entries, and append the STORAGE entries."""
    entries, payloads = walk.entries, walk.payloads
    array_of = dict(walk.arrays)
    sharing = find_sharing(walk.arrays)
    first_path: dict[int, str] = {}
    for number, first in sharing.aliases.items():
        hints = {}
        value = array_of[number].value
        if value is not array_of[first].value:
            hints = {**array_of[number].object_hints, "object": first_path.setdefault(id(value), entries[number].path)}
        entries[number] = Entry(entries[number].path, Kind.ALIAS, attrs={"target": entries[first].path}, hints=hints)
        payloads[number] = None
    for index, shared in enumerate(sharing.shared):
        path = f"{STORAGE_PREFIX}{index}"
        members = [array_of[number] for number in shared.members]
        for number, array in zip(shared.members, members, strict=True):
            entries[number] = _view_entry(entries[number], array, path, shared)
        storage = _storage_entry(path, members, shared)
        entries.append(storage)
        payloads.append(HullPayload(members, shared.low, shared.high))
    return FlatState(tuple(entries), tuple(payloads))


def _view_entry(entry: Entry, array: Array, storage: str, shared: Shared) -> Entry:
    check_aligned(array, shared.low, entry.path)
    attrs: dict[str, Any] = {
        **entry.attrs,
        "storage": storage,
        "offset_bytes": array.address - shared.low,
        "stride_bytes": list(array.stride),
    }
    attrs.update({name: True for name, lazy in (("conj", array.conj), ("neg", array.neg)) if lazy})
    hints = {name: hint for name, hint in entry.hints.items() if name != "stride"}
    return replace(entry, kind=Kind.VIEW, attrs=attrs, hints=hints)


def _storage_entry(path: str, members: Iterable[Array], shared: Shared) -> Entry:
    first = next(iter(members))
    dtype = "uint8" if first.family == "torch" else "|u1"
    hints = {} if first.on_host else {"device": first.device}
    length = shared.high - shared.low
    return Entry(path, Kind.STORAGE, dtype, (length,), {}, hints, length)
