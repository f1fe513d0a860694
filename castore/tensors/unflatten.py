"""Entries and leaf values → state; the inverse of flatten.

What the caller brings: for each entry of ARRAY_KINDS the filled value from `allocate`, for every other entry
that has bytes the value from `decode_value`. What is done here: containers, aliases, views, sparse and
quantized tensors, and the hints that belong to the object (Parameter, requires_grad, nn.Buffer).

The entries may be a subset (`select`). Then a container is made of what is there: a list, tuple, namedtuple
or dataclass that lost a child becomes a dict keyed by index or field name, and ancestors that were left out
become dicts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from castore.errors import FormatError, UnknownClassError, UsageError
from castore.format.manifest import Entry, Kind
from castore.format.paths import decode_key, join
from castore.tensors.classes import build_dataclass, build_namedtuple, find_class
from castore.tensors.composites import child_names, put_together
from castore.tensors.dtypes import checked_raw_bytes, element_bytes, is_numpy_name, numpy_dtype, torch_dtype
from castore.tensors.lazy import require_torch
from castore.tensors.strided import extent
from castore.tensors.tree import SEQUENCE_KINDS, Node, Tree, build_tree

MissingClasses = Literal["error", "dict"]


def unflatten(
    entries: Iterable[Entry],
    values: Mapping[str, Any],
    *,
    classes: Mapping[str, type] | None = None,
    missing_classes: MissingClasses = "error",
) -> Any:
    """The state that the entries describe.

    `values` maps the path of every entry that has bytes, STORAGE entries included, to its value. Arrays are
    used, not copied: aliases and views of them share memory. `classes` maps "module:qualname" to namedtuples
    and dataclasses.

    Raises FormatError for entries that contradict each other, UnknownClassError, UsageError for a missing
    value.
    """
    builder = Builder(build_tree(entries), values, classes=classes, missing_classes=missing_classes)
    return builder.build(builder.tree.root)


class Builder:
    """Builds the values of a tree's nodes; a node that is built twice gives the same array object."""

    def __init__(
        self,
        tree: Tree,
        values: Mapping[str, Any],
        *,
        classes: Mapping[str, type] | None,
        missing_classes: MissingClasses,
    ) -> None:
        self.tree = tree
        self._values = values
        self._classes = classes
        self._missing_classes = missing_classes
        self._arrays: dict[str, Any] = {}
        """Finished arrays by path, and other objects over their memory by target and object key."""
        self._open: set[str] = set()
        """Composites being built: a part that is an alias of its own whole would never end."""

    def build(self, node: Node) -> Any:
        """The value of a node."""
        entry = node.entry
        if entry is None:
            return self._keyed(node)
        if node.is_composite:
            return self._array(node) if set(node.children) >= set(child_names(entry)) else self._parts(node)
        if entry.is_container:
            return self._container(node, entry)
        if entry.kind in _ARRAY_LIKE:
            return self._array(node)
        return self._value(entry.path)

    def _value(self, path: str) -> Any:
        try:
            return self._values[path]
        except KeyError as error:
            raise UsageError(f"leaf {path!r}: its value was not given") from error

    # ---- containers ----------------------------------------------------------------------------------------

    def _container(self, node: Node, entry: Entry) -> Any:
        if entry.kind in (Kind.DICT, Kind.ORDERED_DICT):
            keyed = self._keyed(node)
            return keyed if entry.kind is Kind.DICT else _ordered(keyed, entry)
        if not node.is_complete:
            return self._keyed(node)
        if entry.kind in SEQUENCE_KINDS:
            if list(node.children) != [str(index) for index in range(len(node.children))]:
                raise FormatError(f"leaf {entry.path!r}: the items of a {entry.kind.name} are not numbered from 0")
            items = [self.build(child) for child in node.children.values()]
            return items if entry.kind is Kind.LIST else tuple(items)
        return self._instance(node, entry)

    def _keyed(self, node: Node) -> dict[Any, Any]:
        made: dict[Any, Any] = {}
        for component, child in node.children.items():
            key: Hashable = decode_key(component)
            if key in made:
                raise FormatError(f"leaf {child.path!r}: its key equals that of a sibling")
            made[key] = self.build(child)
        return made

    def _instance(self, node: Node, entry: Entry) -> Any:
        try:
            cls = find_class(entry, self._classes)
        except UnknownClassError:
            if self._missing_classes == "dict":
                return self._keyed(node)
            raise
        fields = self._keyed(node)
        if sorted(fields, key=str) != sorted(entry.attrs["fields"]):
            raise FormatError(f"leaf {entry.path!r}: expected the fields {entry.attrs['fields']}, found {list(fields)}")
        return build_namedtuple(cls, fields) if entry.kind is Kind.NAMEDTUPLE else build_dataclass(cls, fields)

    # ---- arrays --------------------------------------------------------------------------------------------

    def _array(self, node: Node) -> Any:
        if node.path not in self._arrays:
            if node.path in self._open:
                raise FormatError(f"leaf {node.path!r}: is part of itself")
            self._open.add(node.path)
            self._arrays[node.path] = self._make_array(node)
            self._open.discard(node.path)
        return self._arrays[node.path]

    def _make_array(self, node: Node) -> Any:
        entry = node.entry
        assert entry is not None
        if entry.kind is Kind.ALIAS:
            return self._alias(entry, self.tree.resolve(node))
        if node.is_composite:
            missing = [name for name in child_names(entry) if name not in node.children]
            if missing:
                raise FormatError(f"leaf {node.path!r}: {', '.join(missing)} is missing")
            parts = {name: self._part(node.children[name]) for name in child_names(entry)}
            return with_object_hints(put_together(entry, parts), entry)
        if entry.kind is Kind.VIEW:
            storage = self.tree.storage_of(entry)
            return with_object_hints(make_view(entry, self._value(storage.path)), entry)
        return with_object_hints(self._value(entry.path), entry)

    def _alias(self, entry: Entry, target: Node) -> Any:
        value, key = self._array(target), entry.hints.get("object")
        if key is None:
            return value
        place = f"{target.path}\0{key}"
        if place not in self._arrays:
            self._arrays[place] = with_object_hints(_another_object(value), entry)
        return self._arrays[place]

    def _part(self, node: Node) -> Any:
        if node.entry is None or node.entry.kind not in _ARRAY_LIKE:
            raise FormatError(f"leaf {node.path!r}: a part of a tensor must be an array")
        return self._array(node)

    def _parts(self, node: Node) -> dict[str, Any]:
        """What is there of a composite that lost parts, by the parts' names."""
        return {component: self.build(child) for component, child in node.children.items()}


_ARRAY_LIKE = frozenset({Kind.TENSOR, Kind.NDARRAY, Kind.ALIAS, Kind.VIEW})


def _ordered(keyed: dict[Any, Any], entry: Entry) -> OrderedDict[Any, Any]:
    made = OrderedDict(keyed)
    metadata = entry.hints.get("state_dict_metadata")
    if isinstance(metadata, dict):
        # As torch makes it: load_state_dict reads the modules' versions from here.
        made._metadata = OrderedDict(metadata)  # type: ignore[attr-defined]
    return made


def _another_object(array: Any) -> Any:
    """A different tensor or ndarray over the same elements."""
    return array.view() if isinstance(array, np.ndarray) else array.detach()


def with_object_hints(value: Any, entry: Entry) -> Any:
    """The tensor as the kind of object that it was: Parameter, nn.Buffer, requiring grad."""
    hints = entry.hints
    if isinstance(value, np.ndarray) or not hints:
        return value
    requires_grad = bool(hints.get("requires_grad"))
    torch = require_torch(f"leaf {entry.path!r}")
    try:
        if hints.get("parameter"):
            return torch.nn.Parameter(value, requires_grad=requires_grad)
        # No bound of ours holds for the torch that a user brings: an old one has none, and its buffers are tensors.
        if "buffer" in hints and hasattr(torch.nn, "Buffer"):
            value = torch.nn.Buffer(value, persistent=bool(hints["buffer"]))
        return value.requires_grad_() if requires_grad else value
    except RuntimeError as error:
        raise FormatError(f"leaf {entry.path!r}: {value.dtype} cannot require a gradient: {error}") from error


def make_view(entry: Entry, storage: Any) -> Any:
    """The tensor or ndarray of a VIEW entry over the value of its STORAGE, without a copy.

    Raises FormatError for a view that would reach beyond the storage.
    """
    where = f"leaf {entry.path!r}"
    is_numpy = isinstance(storage, np.ndarray)
    if is_numpy is not is_numpy_name(entry.dtype):
        raise FormatError(f"{where}: a {entry.dtype} cannot be a view of {type(storage).__name__}")
    storage_bytes = storage.nbytes if is_numpy else storage.numel() * storage.element_size()
    offset, stride = checked_place(entry, storage_bytes)
    if is_numpy:
        return np.ndarray(entry.shape, numpy_dtype(entry, where), buffer=storage, offset=offset, strides=stride)
    torch = require_torch(where)
    dtype = torch_dtype(entry.dtype, where)
    first = storage.storage_offset() * storage.element_size() + offset
    steps = [step // dtype.itemsize for step in stride]
    empty = torch.empty(0, dtype=dtype, device=storage.device)
    view = empty.set_(storage.untyped_storage(), first // dtype.itemsize, entry.shape, steps)
    if entry.attrs.get("conj"):
        view = view.conj()
    return torch._neg_view(view) if entry.attrs.get("neg") else view


def checked_place(entry: Entry, storage_bytes: int) -> tuple[int, list[int]]:
    """Offset and strides of a VIEW, in bytes. Raises FormatError when it does not lie inside its storage."""
    where = f"leaf {entry.path!r}"
    offset, stride = entry.attrs.get("offset_bytes"), entry.attrs.get("stride_bytes")
    if not isinstance(stride, list) or len(stride) != len(entry.shape):
        raise FormatError(f"{where}: expected {len(entry.shape)} strides, found {str(stride)[:80]}")
    if not isinstance(offset, int) or not all(isinstance(step, int) for step in stride):
        raise FormatError(f"{where}: expected an offset and strides, found {str(dict(entry.attrs))[:80]}")
    item_bytes = element_bytes(entry, where)
    checked_raw_bytes(entry, item_bytes, where)
    low, high = extent(entry.shape, stride, item_bytes)
    if offset + low < 0 or offset + high > storage_bytes:
        raise FormatError(f"{where}: reaches to byte {offset + high} of a storage of {storage_bytes}")
    if not is_numpy_name(entry.dtype) and any(step % item_bytes or step < 0 for step in (offset, *stride)):
        raise FormatError(f"{where}: offset {offset} and strides {stride} are not whole elements of {item_bytes} bytes")
    return offset, stride


# ---- subsets -----------------------------------------------------------------------------------------------


def select(entries: Iterable[Entry], keep: Callable[[str], bool]) -> tuple[Entry, ...]:
    """The entries of the values whose path `keep` accepts, complete in themselves, in their old order.

    With them come the containers around them, all of a kept container, and the storages of kept views. An
    alias whose target is left out takes its target's place; further aliases of that one then refer to it.
    """
    all_entries = tuple(entries)
    tree = build_tree(all_entries)
    kept = _kept_paths(tree, keep)
    if len(kept) == len(tree.nodes):
        return all_entries
    moved: _Moved = {}
    chosen: list[Entry] = []
    for node in tree.root.walk():
        if node.path in kept and node.entry is not None:
            chosen.extend(_selected(tree, node, node.path, kept, moved))
    storages = {str(entry.attrs.get("storage")) for entry in chosen if entry.kind is Kind.VIEW}
    chosen.extend(entry for path, entry in tree.storages.items() if path in storages)
    return tuple(chosen)


def _kept_paths(tree: Tree, keep: Callable[[str], bool]) -> set[str]:
    kept: set[str] = set()

    def visit(node: Node, *, inside: bool) -> bool:
        """Whether the node or anything below it is kept."""
        inside = inside or keep(node.path)
        # A list first, because every child must be visited.
        below = [visit(child, inside=inside) for child in node.children.values()]
        if inside or any(below):
            kept.add(node.path)
        return inside or any(below)

    visit(tree.root, inside=False)
    return kept


_Moved = dict[str, tuple[str, str]]
"""Path of a left-out target → the kept path that took its place, and the key of the object that stood there."""


def _selected(tree: Tree, node: Node, path: str, kept: set[str], moved: _Moved) -> Iterator[Entry]:
    """The entry of a kept node; for an alias whose target is left out, the target's entries under its path."""
    entry = node.entry
    assert entry is not None
    target = tree.resolve(node)
    if target.entry is None or (path == node.path and target is node):
        yield entry
        return
    if all(part.path in kept for part in target.walk()):
        yield Entry(path, Kind.ALIAS, attrs={"target": target.path}, hints=entry.hints if target is not node else {})
        return
    object_key = target.path if target is node else str(entry.hints.get("object", target.path))
    first, first_key = moved.setdefault(target.path, (path, object_key))
    own = _own_hints(target.entry if object_key == target.path else entry)
    if first != path:
        hints = {} if object_key == first_key else {**own, "object": object_key}
        yield Entry(path, Kind.ALIAS, attrs={"target": first}, hints=hints)
        return
    memory = {name: hint for name, hint in target.entry.hints.items() if name in _MEMORY_HINTS}
    yield replace(target.entry, path=path, hints={**memory, **own})
    for component, part in target.children.items():
        yield from _selected(tree, part, join(path, component), kept, moved)


_MEMORY_HINTS = frozenset({"stride", "device"})


def _own_hints(entry: Entry) -> dict[str, Any]:
    """Hints of the object, without those of its memory."""
    return {name: hint for name, hint in entry.hints.items() if name not in _MEMORY_HINTS and name != "object"}


def slice_rows(entry: Entry, start: int, stop: int) -> tuple[Entry, int]:
    """The entry of rows start..stop along the first axis of an array, and where its bytes begin in the leaf.

    For reading part of a TENSOR or NDARRAY: allocate the returned entry and fill it from that byte on. Raises
    UsageError for an array without axes or rows that it has not.
    """
    where = f"leaf {entry.path!r}"
    if not entry.shape:
        raise UsageError(f"{where}: has no axes, so it has no rows")
    if not 0 <= start <= stop <= entry.shape[0]:
        raise UsageError(f"{where}: expected rows inside 0..{entry.shape[0]}, found {start}..{stop}")
    row_bytes = entry.raw_bytes // entry.shape[0] if entry.shape[0] else 0
    hints = {name: hint for name, hint in entry.hints.items() if name != "stride"}
    part = replace(
        entry, shape=(stop - start, *entry.shape[1:]), raw_bytes=(stop - start) * row_bytes, hints=hints,
        inline=None, chunks=None, id_lists=None, digest=None,
    )  # fmt: skip
    return part, start * row_bytes
