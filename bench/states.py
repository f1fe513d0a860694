"""Training states as trees of dict, list and tuple: leaves, sizes, and whether two are bit-equal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import torch

State = dict[str, Any]
LeafPath = tuple[Any, ...]
Equality = Literal["yes", "tensors only", "no"]
EQUALITIES: tuple[Equality, ...] = get_args(Equality)
"""From best to worst."""


def leaves(tree: Any, path: LeafPath = ()) -> Iterator[tuple[LeafPath, Any]]:
    """Every leaf with the keys that lead to it; an empty container is a leaf."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from leaves(value, (*path, key))
    elif isinstance(tree, list | tuple) and tree:
        for index, value in enumerate(tree):
            yield from leaves(value, (*path, index))
    else:
        yield path, tree


def map_leaves(change: Callable[[Any], Any], tree: Any) -> Any:
    """The same nesting with every leaf changed."""
    if isinstance(tree, dict):
        return {key: map_leaves(change, value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map_leaves(change, value) for value in tree)
    return change(tree)


def tensors(state: State) -> list[torch.Tensor]:
    return [leaf for _, leaf in leaves(state) if torch.is_tensor(leaf)]


def same_memory(tensor: torch.Tensor) -> tuple[Any, ...] | None:
    """A key under which exact aliases meet; None for empty tensors, which own no memory."""
    return (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else None


def raw_bytes(state: State) -> int:
    """Bytes of all tensors, exact aliases counted once: what every share is a share of."""
    distinct = {same_memory(t): t.nbytes for t in tensors(state)}
    return sum(distinct.values())


def compare(found: State, expected: State) -> Equality:
    """`yes` when every tensor has the same bytes and all else is equal; lists and tuples are one here."""
    found_leaves, expected_leaves = dict(leaves(found)), dict(leaves(expected))
    tensors_equal = all(
        _same_bytes(found_leaves.get(path), leaf) for path, leaf in expected_leaves.items() if torch.is_tensor(leaf)
    )
    if not tensors_equal:
        return "no"
    others_equal = found_leaves.keys() == expected_leaves.keys() and all(
        torch.is_tensor(leaf) or found_leaves[path] == leaf for path, leaf in expected_leaves.items()
    )
    return "yes" if others_equal else "tensors only"


def _same_bytes(found: Any, expected: torch.Tensor) -> bool:
    if not torch.is_tensor(found) or found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    return torch.equal(_byte_view(found), _byte_view(expected))


def _byte_view(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
