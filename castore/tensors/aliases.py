"""Which arrays of a state share memory, so that they are stored once and share memory again after a load.

    the same elements of the same memory        ALIAS of the first of them
    different views with elements in common     VIEWs of one hidden STORAGE, the hull of their memory
    views without an element in common          nothing: each is stored by itself, even out of one buffer

The memory counts, not the storage object: two tensors made from one numpy buffer share it too. A small view
of a huge buffer never drags the buffer along. Empty arrays share nothing. Torch and numpy are kept apart: a
tensor and an array over one buffer come back separate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from castore.errors import UnsupportedLeafError
from castore.tensors.arrays import Array
from castore.tensors.strided import memory_array

_OVERLAP_WORK_MAX = 100_000
"""Candidate solutions that numpy may try per pair (deciding overlap exactly is NP-hard in the number of
axes); beyond it the pair counts as overlapping, which is always safe. A pair takes 2 µs as a rule."""


@dataclass(frozen=True, slots=True)
class Shared:
    """Views with elements in common, and the piece of memory that they span."""

    members: tuple[int, ...]
    """Leaf numbers, ascending; all different views."""
    low: int
    """Address of the hull's first byte; low enough that every view is aligned relative to it."""
    high: int


@dataclass(frozen=True, slots=True)
class Sharing:
    """What shares memory, by leaf number."""

    aliases: dict[int, int]
    """Leaf → the first leaf that is the same elements of the same memory."""
    shared: tuple[Shared, ...]
    """Ordered by their first member."""


def find_sharing(arrays: Sequence[tuple[int, Array]]) -> Sharing:
    """Find what shares memory among (leaf number, array) pairs, given in the order of the state."""
    first_with: dict[tuple[object, ...], int] = {}
    aliases: dict[int, int] = {}
    spaces: dict[tuple[str, str], list[tuple[int, Array]]] = {}
    for number, array in arrays:
        if array.raw_bytes == 0:
            continue
        first = first_with.setdefault(array.key, number)
        if first != number:
            aliases[number] = first
        else:
            spaces.setdefault((array.family, array.device), []).append((number, array))
    shared = [group for members in spaces.values() for group in _overlapping_groups(members)]
    return Sharing(aliases, tuple(sorted(shared, key=lambda group: group.members[0])))


def share_elements(arrays: Iterable[Array]) -> bool:
    """Whether different views among them have elements in common, so that they are to be stored as VIEWs."""
    arrays = [array for array in arrays if array.raw_bytes]
    hulls = {array.hull for array in arrays}
    if len(hulls) == len(arrays) and not _meet(sorted(hulls)):
        return False  # so it is in most states
    return bool(find_sharing(list(enumerate(arrays))).shared)


def _overlapping_groups(members: Sequence[tuple[int, Array]]) -> Iterable[Shared]:
    """Connected groups of at least two views with elements in common: a sweep over their hulls by address."""
    if not _meet(sorted(array.hull for _, array in members)):
        return
    spans = sorted((_Span(number, array) for number, array in members), key=lambda span: (span.low, -span.high))
    groups = _Groups(len(spans))
    active: list[int] = []
    for at, span in enumerate(spans):
        active = [other for other in active if spans[other].high > span.low]
        for other in active:
            # A pair that others connect already needs no look: a buffer and its thousand views stay linear.
            if groups.find(other) != groups.find(at) and spans[other].overlaps(span):
                groups.join(other, at)
        active.append(at)
    for group in groups.of_several():
        yield _shared([spans[at] for at in group])


def _meet(hulls: Sequence[tuple[int, int]]) -> bool:
    """Whether two of these hulls have a byte in common, the hulls being sorted."""
    return any(high > low for (_, high), (low, _) in pairwise(hulls))


def _shared(spans: Sequence[_Span]) -> Shared:
    low = min(span.low for span in spans)
    high = max(span.high for span in spans)
    torch_items = [span.array.item_bytes for span in spans if span.array.family == "torch"]
    low -= low % math.lcm(*torch_items) if torch_items else 0
    return Shared(tuple(sorted(span.number for span in spans)), low, high)


def check_aligned(array: Array, low: int, path: str) -> None:
    """Torch counts offsets in elements: refuse a view that lies between them. numpy has no such limit."""
    if array.family == "torch" and (array.address - low) % array.item_bytes:
        name = f"{array.element.name} tensor"
        raise UnsupportedLeafError(
            path, name, "it overlaps another tensor at a fraction of an element: clone one of them"
        )


class _Span:
    """An array's hull, and the exact question of whether it shares an element with another."""

    __slots__ = ("_probe", "array", "dense", "high", "low", "number")

    def __init__(self, number: int, array: Array) -> None:
        self.number = number
        self.array = array
        self.low, self.high = array.hull
        self.dense = array.is_dense
        self._probe: np.ndarray[tuple[int, ...], np.dtype[np.void]] | None = None

    def overlaps(self, other: _Span) -> bool:
        """Whether they share a byte; their hulls are known to."""
        if self.dense and other.dense:
            return True
        if (self.dense and self.low <= other.low and other.high <= self.high) or (
            other.dense and other.low <= self.low and self.high <= other.high
        ):
            return True
        try:
            return np.shares_memory(self.probe(), other.probe(), max_work=_OVERLAP_WORK_MAX)  # type: ignore[arg-type]  # stubs know only two of its values
        except np.exceptions.TooHardError:
            return True

    def probe(self) -> np.ndarray[tuple[int, ...], np.dtype[np.void]]:
        """An array with the same addresses, never read, so that device memory can be asked about too."""
        if self._probe is None:
            array = self.array
            self._probe = memory_array(array.address, array.shape, array.stride, f"|V{array.item_bytes}", owner=None)
        return self._probe


class _Groups:
    """Union-find over 0..count."""

    __slots__ = ("_parent",)

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def find(self, item: int) -> int:
        while self._parent[item] != item:
            self._parent[item] = self._parent[self._parent[item]]
            item = self._parent[item]
        return item

    def join(self, one: int, other: int) -> None:
        self._parent[self.find(other)] = self.find(one)

    def of_several(self) -> list[list[int]]:
        members: dict[int, list[int]] = {}
        for item in range(len(self._parent)):
            members.setdefault(self.find(item), []).append(item)
        return [group for group in members.values() if len(group) > 1]
