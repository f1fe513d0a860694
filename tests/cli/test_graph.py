"""The branch graph, drawn."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from castore.cli.graph import Node, draw, newest_first


def picture(*nodes: Node) -> list[str]:
    lines = []
    order = newest_first({node.id: node for node in nodes})
    for node, (before, prefix) in zip(order, draw(order), strict=True):
        lines += [*before, f"{prefix} {node.id}"]
    return lines


def test_a_line_is_a_column_of_stars() -> None:
    assert picture(Node("c", ("b",), 3), Node("b", ("a",), 2), Node("a", (), 1)) == ["* c", "* b", "* a"]


def test_a_fork_joins_below_its_branches() -> None:
    nodes = [Node("main2", ("main1",), 4), Node("exp", ("root",), 3), Node("main1", ("root",), 2), Node("root", (), 1)]
    assert picture(*nodes) == ["* main2", "| * exp", "* | main1", "|/", "* root"]


def test_three_branches_join_from_the_right() -> None:
    nodes = [Node(name, ("root",), time) for name, time in (("a", 4), ("b", 3), ("c", 2))]
    assert picture(*nodes, Node("root", (), 1)) == ["* a", "| * b", "| | * c", "|_|/", "|/", "* root"]


def test_an_ended_line_leaves_its_lane_to_the_next_new_one() -> None:
    nodes = [Node("a2", ("a1",), 5), Node("lone", (), 4), Node("late", ("a1",), 3), Node("a1", (), 1)]
    assert picture(*nodes) == ["* a2", "| * lone", "| * late", "|/", "* a1"]


def test_a_line_between_two_others_keeps_its_lane_when_one_ends() -> None:
    nodes = [Node("a", ("r",), 9), Node("x", (), 8), Node("b", ("r",), 7), Node("y", (), 6), Node("r", (), 1)]
    assert picture(*nodes) == ["* a", "| * x", "| * b", "| | * y", "|/", "* r"]


def test_children_stand_above_parents_even_when_clocks_disagree() -> None:
    assert picture(Node("child", ("parent",), 1), Node("parent", (), 2)) == ["* child", "* parent"]


def test_a_parent_outside_of_the_graph_is_waited_for_and_never_drawn() -> None:
    assert picture(Node("b", ("gone",), 2), Node("a", ("gone",), 1)) == ["* b", "| * a"]


@st.composite
def histories(draw_: st.DrawFn) -> list[Node]:
    count = draw_(st.integers(1, 12))
    nodes = []
    for index in range(count):
        parents = draw_(st.lists(st.integers(0, index - 1), max_size=2, unique=True)) if index else []
        nodes.append(Node(str(index), tuple(map(str, parents)), draw_(st.integers(0, 5))))
    return nodes


@given(histories())
def test_every_snapshot_is_drawn_once_with_one_star_and_after_its_children(nodes: list[Node]) -> None:
    order = newest_first({node.id: node for node in nodes})
    drawn = list(draw(order))
    assert sorted(node.id for node in order) == sorted(node.id for node in nodes)
    place = {node.id: position for position, node in enumerate(order)}
    assert all(place[parent] > place[node.id] for node in nodes for parent in node.parents)
    for before, prefix in drawn:
        assert prefix.count("*") == 1
        assert set(prefix) <= set("*| ")
        assert all(set(line) <= set("|/_ ") for line in before)
