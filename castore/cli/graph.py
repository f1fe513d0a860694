r"""The branch graph of `castore log`, drawn with plain characters, as pure functions.

    *     newest of a branch
    | *   newest of another
    |/
    *     both continue this one

Every line under way is a lane: a column that waits for one snapshot. A snapshot stands in the first lane that
waits for it; other lanes that wait for the same one join it before it is drawn. A lane that ends leaves a
hole, which the next new line takes, so that no lane ever moves.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Node:
    """One snapshot of the graph."""

    id: str
    parents: tuple[str, ...]
    time_ns: int


def newest_first(nodes: Mapping[str, Node]) -> list[Node]:
    """All nodes, children before their parents, else by time: the clocks of several hosts may differ."""
    waiting = dict.fromkeys(nodes, 0)
    for node in nodes.values():
        for parent in set(node.parents):
            if parent in waiting:
                waiting[parent] += 1
    ready = [(-node.time_ns, node.id) for node in nodes.values() if not waiting[node.id]]
    heapq.heapify(ready)
    order: list[Node] = []
    while ready:
        node = nodes[heapq.heappop(ready)[1]]
        order.append(node)
        for parent in set(node.parents):
            if parent in waiting:
                waiting[parent] -= 1
                if not waiting[parent]:
                    heapq.heappush(ready, (-nodes[parent].time_ns, parent))
    return order


def draw(order: Sequence[Node]) -> Iterator[tuple[list[str], str]]:
    """For each node: the lines before it, and the prefix of its line."""
    lanes: list[str | None] = []
    for node in order:
        before = []
        mine = [lane for lane, expected in enumerate(lanes) if expected == node.id]
        if not mine:
            mine = [_new_lane(lanes, node.id)]
        first = mine[0]
        for lane in reversed(mine[1:]):
            before.append(_join(lanes, first, lane))
            lanes[lane] = None
        own = _lanes(lanes, mark=first)
        lanes[first] = node.parents[0] if node.parents else None
        yield before, own
        for parent in node.parents[1:]:
            if parent not in lanes:
                _new_lane(lanes, parent)
        while lanes and lanes[-1] is None:
            lanes.pop()


def _new_lane(lanes: list[str | None], expected: str) -> int:
    if None in lanes:
        lane = lanes.index(None)
        lanes[lane] = expected
        return lane
    lanes.append(expected)
    return len(lanes) - 1


def _lanes(lanes: Sequence[str | None], *, mark: int | None = None) -> str:
    return " ".join("*" if lane == mark else "|" if expected else " " for lane, expected in enumerate(lanes)).rstrip()


def _join(lanes: Sequence[str | None], target: int, source: int) -> str:
    """The line on which one lane runs into another: "|/", or "|_|/" across those between."""
    line = [" "] * (2 * len(lanes))
    for lane, expected in enumerate(lanes):
        if expected and lane != source:
            line[2 * lane] = "|"
    for position in range(2 * target + 1, 2 * source - 1):
        if line[position] == " ":
            line[position] = "_"
    line[2 * source - 1] = "/"
    return "".join(line).rstrip()
