r"""A live state against a snapshot: what fits, what does not, and how the one takes the other's values.

    live \ snapshot   array                   composite           value       container
    array             filled, if types and    mismatch            mismatch    mismatch
                      shapes are the same
    composite         mismatch                same form: copy_    mismatch    mismatch
    value             mismatch                mismatch            replaced    mismatch
    container         mismatch                mismatch            mismatch    same family: children

A value is a number, text, None, …, or a list or tuple made of nothing else: a loss history may have grown
since. An array is never cast. A Parameter and a tensor are alike; a tensor and an ndarray are not. Live
arrays that share memory must get the same content, or filling one would change the other.

Planning (`match`) is pure; `assign` carries out what the loader did not fill itself.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from castore.format.manifest import Entry, Kind
from castore.format.paths import encode_key, join
from castore.tensors.arrays import describe
from castore.tensors.classes import build_dataclass, build_namedtuple, is_dataclass, is_namedtuple
from castore.tensors.composites import copy_composite, same_form
from castore.tensors.dtypes import is_numpy_name
from castore.tensors.flatten import FlatState
from castore.tensors.lazy import is_torch_tensor
from castore.tensors.payloads import ArrayPayload
from castore.tensors.scalars import VALUE_KINDS
from castore.tensors.targets import live_target, not_writable
from castore.tensors.tree import SEQUENCE_KINDS, Node, Tree, build_tree
from castore.tensors.unflatten import Builder, MissingClasses, checked_place, select

COPY_BYTES = 16 * 1024 * 1024
"""A view is copied into a live array in pieces of this size."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A live array and the entry whose bytes it takes."""

    path: str
    """Of the live array."""
    value: Any
    entry: Entry
    """TENSOR or NDARRAY, under the live path; an alias has been resolved."""


@dataclass(frozen=True, slots=True)
class Match:
    """How a live state and a snapshot fit together."""

    missing: tuple[str, ...]
    """Paths that the live state has and the snapshot lacks."""
    unexpected: tuple[str, ...]
    """Paths that the snapshot has and the live state lacks."""
    mismatched: tuple[str, ...]
    """Paths that both have and that do not fit, each with what was expected and found."""
    pairs: tuple[Pair, ...]
    """Arrays to fill in place, through `live_target(pair.value, pair.entry)`."""
    fresh: tuple[Entry, ...]
    """Entries whose values are to be loaded anew, as for `unflatten`, and handed to `assign`."""
    replaced: tuple[str, ...]
    """Live paths that `assign` gives a new value."""

    @property
    def is_exact(self) -> bool:
        """Whether every path of either side has its counterpart."""
        return not (self.missing or self.unexpected or self.mismatched)


def match(live: FlatState, entries: Iterable[Entry], *, selected: Callable[[str], bool] | None = None) -> Match:
    """Compare a live state with the entries of a snapshot. Pure: neither is touched.

    `selected` says which live paths the caller asked for, when `entries` is a subset: others are not missing.
    """
    entries = tuple(entries)
    comparison = _Comparison(build_tree(live.entries), build_tree(entries), _live_values(live))
    comparison.aliased = frozenset(str(entry.attrs["target"]) for entry in live.entries if entry.kind is Kind.ALIAS)
    comparison.compare(comparison.live.root, comparison.saved.root)
    comparison.check_shared_memory()
    replaced = tuple(comparison.replaced)
    return Match(
        tuple(path for path in comparison.missing if selected is None or selected(path)),
        tuple(comparison.unexpected),
        tuple(comparison.mismatched),
        tuple(comparison.pairs.values()),
        select(entries, set(replaced).__contains__) if replaced else (),
        replaced,
    )


def _live_values(live: FlatState) -> dict[str, Any]:
    return {
        entry.path: payload.array.value
        for entry, payload in zip(live.entries, live.payloads, strict=True)
        if isinstance(payload, ArrayPayload)
    }


@dataclass(slots=True)
class _Comparison:
    live: Tree
    saved: Tree
    values: Mapping[str, Any]
    """Live arrays by path."""
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    pairs: dict[str, Pair] = field(default_factory=dict)
    replaced: list[str] = field(default_factory=list)
    shared: dict[str, list[tuple[Node, Node]]] = field(default_factory=dict)
    """Live arrays with their counterparts, by what they share: the path of a target or of a storage."""
    aliased: frozenset[str] = frozenset()
    """Live paths that an alias refers to."""

    def compare(self, live: Node, saved: Node) -> None:
        mine, theirs = _form(self.live, live), _form(self.saved, saved)
        if mine == theirs == "array":
            self._compare_arrays(live, saved)
        elif mine == theirs == "composite":
            self._compare_composites(live, saved)
        elif _is_value(live) and _is_value(saved):
            self.replaced.append(live.path)
        elif live.is_container and saved.is_container and (mine == theirs or "implied" in {mine, theirs}):
            self._compare_children(live, saved)
        else:
            self._mismatch(live, saved)

    def _compare_children(self, live: Node, saved: Node) -> None:
        for component, child in live.children.items():
            counterpart = saved.children.get(component)
            if counterpart is None:
                self.missing.extend(_leaf_paths(child))
            else:
                self.compare(child, counterpart)
        for component, child in saved.children.items():
            if component not in live.children:
                self.unexpected.extend(_leaf_paths(child))

    def _mismatch(self, live: Node, saved: Node) -> None:
        mine, theirs = _describe(self.live, live), _describe(self.saved, saved)
        self._refuse(live.path, f"the live state has {mine}, the snapshot {theirs}")

    def _refuse(self, path: str, reason: str) -> None:
        self.mismatched.append(f"{path or '(root)'}: {reason}")

    def _compare_arrays(self, live: Node, saved: Node) -> None:
        mine, theirs = self.live.resolved(live), self.saved.resolved(saved)
        if _array_type(mine) != _array_type(theirs):
            self._mismatch(live, saved)
            return
        value = self.values[mine.path]
        reason = not_writable(describe(value, live.path))
        if reason:
            self._refuse(live.path, f"the live array {reason}")
            return
        shares_with = str(mine.attrs["storage"]) if mine.kind is Kind.VIEW else mine.path
        self.shared.setdefault(shares_with, []).append((live, saved))
        if theirs.kind is Kind.VIEW:
            # Now, before anything is written: the view itself is made only after the other arrays have been filled.
            checked_place(theirs, self.saved.storage_of(theirs).raw_bytes)
            self.replaced.append(live.path)
        else:
            self.pairs[live.path] = Pair(live.path, value, dataclasses.replace(theirs, path=live.path))

    def _compare_composites(self, live: Node, saved: Node) -> None:
        mine, theirs = self.live.resolve(live), self.saved.resolve(saved)
        same = same_form(self.live.resolved(live), self.saved.resolved(saved))
        if not same or not _same_parts(self.live, mine, self.saved, theirs):
            self._mismatch(live, saved)
        elif any(part.path in self.aliased or part.is_reference for part in mine.children.values()):
            self._refuse(live.path, "parts of the live tensor share memory with other leaves")
        else:
            self.replaced.append(live.path)
            self.shared.setdefault(mine.path, []).append((live, saved))

    def check_shared_memory(self) -> None:
        """Live arrays over the same memory: keep one of those that get the same content, refuse others."""
        for (first_live, first_saved), *others in self.shared.values():
            for live, saved in others:
                if not self._agree(first_live, first_saved, live, saved):
                    self._drop(live.path)
                    shared_with = f"shares its memory with {first_live.path!r}"
                    self._refuse(live.path, f"the live array {shared_with}, the snapshot has two values")
                elif self.live.resolve(live) is self.live.resolve(first_live):
                    # Its memory is filled under the first path.
                    self._drop(live.path)

    def _drop(self, path: str) -> None:
        self.pairs.pop(path, None)
        if path in self.replaced:
            self.replaced.remove(path)

    def _agree(self, live_a: Node, saved_a: Node, live_b: Node, saved_b: Node) -> bool:
        """Whether two live arrays that share memory get content that fits in all they share."""
        a, b = self.live.resolved(live_a), self.live.resolved(live_b)
        x, y = self.saved.resolved(saved_a), self.saved.resolved(saved_b)
        if a is b:
            return x is y or _same_content(x, y)
        if x.kind is not Kind.VIEW or y.kind is not Kind.VIEW or x.attrs["storage"] != y.attrs["storage"]:
            return False
        if [_look(a), _look(b)] != [_look(x), _look(y)]:
            return False
        moved_a = x.attrs["offset_bytes"] - a.attrs["offset_bytes"]
        moved_b = y.attrs["offset_bytes"] - b.attrs["offset_bytes"]
        return bool(moved_a == moved_b)


def _look(view: Entry) -> tuple[object, ...]:
    """How a view sees its storage: strided otherwise, conjugated or negated, the same bytes are other values."""
    return view.attrs["stride_bytes"], view.attrs.get("conj", False), view.attrs.get("neg", False)


def _array_type(entry: Entry) -> tuple[object, ...]:
    return entry.dtype, entry.shape, entry.attrs.get("descr")


def _form(tree: Tree, node: Node) -> str:
    """What a node can be compared with: nodes of one form fit together."""
    entry = tree.resolve(node).entry
    if entry is None:
        return "implied"
    if entry.kind in VALUE_KINDS:
        return "value"
    if entry.kind in {Kind.TENSOR, Kind.NDARRAY, Kind.VIEW}:
        return "array"
    return _FORMS.get(entry.kind, "composite")


_FORMS = {
    Kind.DICT: "dict",
    Kind.ORDERED_DICT: "dict",
    Kind.LIST: "sequence",
    Kind.TUPLE: "sequence",
    Kind.NAMEDTUPLE: "namedtuple",
    Kind.DATACLASS: "dataclass",
}


def _is_value(node: Node) -> bool:
    """Whether the node is a value, or a complete list or tuple of nothing but values."""
    if node.entry is None:
        return False
    if node.entry.kind in SEQUENCE_KINDS:
        return node.is_complete and all(_is_value(child) for child in node.children.values())
    return node.entry.kind in VALUE_KINDS


def _leaf_paths(node: Node) -> list[str]:
    """The paths to report for a subtree that the other side lacks."""
    if not node.is_container or not node.children:
        return [node.path]
    return [path for child in node.children.values() for path in _leaf_paths(child)]


def _describe(tree: Tree, node: Node) -> str:
    entry = tree.resolve(node).entry
    form = _form(tree, node)
    if entry is None:
        return "a container"
    if form == "array":
        family = "ndarray" if is_numpy_name(entry.dtype) else "tensor"
        return f"{family} {entry.dtype} {list(entry.shape)}"
    if form == "composite":
        what = entry.attrs.get("layout") or entry.attrs.get("dtype")
        return f"tensor {what} {entry.attrs.get('shape')}"
    if form == "value":
        return f"a value ({entry.kind.name.lower()})"
    return f"{entry.kind.name.lower()} of {entry.shape[0] if entry.shape else 0}"


def _same_content(a: Entry, b: Entry) -> bool:
    if a.raw_bytes != b.raw_bytes or a.kind is Kind.VIEW or b.kind is Kind.VIEW:
        return False
    if a.inline is not None:
        return a.inline == b.inline
    return (a.chunks, a.id_lists) == (b.chunks, b.id_lists) and (a.chunks is not None or a.id_lists is not None)


def _same_parts(live_tree: Tree, live: Node, saved_tree: Tree, saved: Node) -> bool:
    """Whether the parts of two composites have the same element types, and sizes where `copy_` needs that."""
    assert live.entry is not None
    any_count = live.entry.attrs.get("layout") == "sparse_coo"
    for component, part in live.children.items():
        counterpart = saved.children.get(component)
        if counterpart is None:
            return False
        mine, theirs = live_tree.resolve(part).entry, saved_tree.resolve(counterpart).entry
        if mine is None or theirs is None or mine.dtype != theirs.dtype:
            return False
        if mine.shape != theirs.shape and not any_count:
            return False
    return True


# ---- carrying it out ---------------------------------------------------------------------------------------


def assign(
    live_state: Any,
    matched: Match,
    values: Mapping[str, Any],
    *,
    classes: Mapping[str, type] | None = None,
    missing_classes: MissingClasses = "error",
) -> Any:
    """Give a live state the values of `matched.fresh`, and return it.

    `values` maps the paths of `matched.fresh` to loaded values, as for `unflatten`. Live arrays and
    composites are overwritten in place and keep their place in the state. Other values are replaced in the
    dict, list or dataclass that holds them; tuples, namedtuples and frozen dataclasses are made anew where
    something in them changed, so the returned state may be another object than `live_state`.
    """
    builder = Builder(build_tree(matched.fresh), values, classes=classes, missing_classes=missing_classes)
    return assign_scalars(live_state, {path: builder.build(builder.tree.nodes[path]) for path in matched.replaced})


def assign_scalars(live_state: Any, values: Mapping[str, Any]) -> Any:
    """`assign` with finished values by path. Paths that the live state lacks are ignored."""
    return _Assignment(values).visit(live_state, "")


class _Assignment:
    """One walk over a live state."""

    def __init__(self, new: Mapping[str, Any]) -> None:
        self._new = new
        self._above = {"/".join(path.split("/")[:depth]) for path in new for depth in range(path.count("/") + 1)}
        """Paths of the containers in which something changes."""

    def visit(self, live: Any, path: str) -> Any:
        """What stands at `path` from now on."""
        if path in self._new:
            return _overwritten(live, self._new[path])
        if path not in self._above:
            return live
        if type(live) in (dict, OrderedDict):
            return self._visit_dict(live, path)
        if type(live) is list:
            for index, item in enumerate(live):
                live[index] = self.visit(item, join(path, str(index)))
            return live
        if type(live) is tuple:
            items = [self.visit(item, join(path, str(index))) for index, item in enumerate(live)]
            return live if _all_same(items, live) else tuple(items)
        if is_namedtuple(live):
            named = {
                name: self.visit(item, join(path, encode_key(name)))
                for name, item in zip(live._fields, live, strict=True)
            }
            return live if _all_same(named.values(), live) else build_namedtuple(type(live), named)
        return self._visit_dataclass(live, path) if is_dataclass(live) else live

    def _visit_dict(self, live: dict[Any, Any], path: str) -> dict[Any, Any]:
        for key, item in live.items():
            # The keys stay, so the dict may be written to while it is walked over.
            live[key] = self.visit(item, join(path, encode_key(key, parent=path)))
        return live

    def _visit_dataclass(self, live: Any, path: str) -> Any:
        old = {spec.name: getattr(live, spec.name) for spec in dataclasses.fields(live)}
        new = {name: self.visit(item, join(path, encode_key(name))) for name, item in old.items()}
        changed = {name: item for name, item in new.items() if item is not old[name]}
        if not changed:
            return live
        if type(live).__dataclass_params__.frozen:
            return build_dataclass(type(live), new)
        for name, item in changed.items():
            object.__setattr__(live, name, item)
        return live


def _all_same(new: Iterable[Any], old: Iterable[Any]) -> bool:
    return all(a is b for a, b in zip(new, old, strict=True))


def _overwritten(live: Any, new: Any) -> Any:
    """The live object with the new content where it can take it, else the new object."""
    if live is new:
        return live
    if isinstance(live, np.ndarray) and isinstance(new, np.ndarray):
        _copy_array(live, new)
        return live
    if is_torch_tensor(live) and is_torch_tensor(new):
        if live.is_quantized or live.layout != new.layout or str(live.layout) != "torch.strided":
            copy_composite(live, new)
        else:
            _copy_array(live, new)
        return live
    if type(live) is list and type(new) is list:
        # Whoever else holds this list (a logger, a trainer) sees the history too.
        live[:] = new
        return live
    return new


def _copy_array(live: Any, new: Any) -> None:
    source = ArrayPayload(describe(new, "view"))
    entry = Entry("view", Kind.TENSOR, source.array.element.name, source.array.shape, raw_bytes=source.raw_bytes)
    if source.array.element.descr is not None:
        entry = dataclasses.replace(entry, attrs={"descr": source.array.element.descr})
    target = live_target(live, entry)
    for start in range(0, source.raw_bytes, COPY_BYTES):
        target.write(start, source.read(start, min(start + COPY_BYTES, source.raw_bytes)))
    target.finish()
