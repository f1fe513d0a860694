"""Entries as a tree: what loading, selecting and comparing walk over.

Entries may be a subset: a container that was left out exists as an implied node, because its children's paths
name it. STORAGE entries are no part of the tree; views refer to them by path.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from castore.errors import FormatError
from castore.format.manifest import REFERENCE_KINDS, Entry, Kind
from castore.format.paths import last_component, parent_of
from castore.options import SKELETON_DEPTH_MAX

COMPOSITE_KINDS = frozenset({Kind.SPARSE, Kind.QUANTIZED})
SEQUENCE_KINDS = frozenset({Kind.LIST, Kind.TUPLE})


@dataclass(slots=True, eq=False)
class Node:
    """One value: its entry and the nodes below it by path component, in the order of the state."""

    path: str
    entry: Entry | None = None
    """None for a container that is only implied by its children."""
    children: dict[str, Node] = field(default_factory=dict)

    @property
    def is_composite(self) -> bool:
        """Whether it is a sparse or quantized tensor, whose children are its parts."""
        return self.entry is not None and self.entry.kind in COMPOSITE_KINDS

    @property
    def is_container(self) -> bool:
        """Whether it holds values of the state; a composite does not."""
        return self.entry is None or (self.entry.is_container and not self.is_composite)

    @property
    def is_reference(self) -> bool:
        """Whether its memory belongs to another entry."""
        return self.entry is not None and self.entry.kind in REFERENCE_KINDS

    @property
    def is_complete(self) -> bool:
        """Whether all children that the container had are here."""
        return self.entry is not None and self.entry.shape == (len(self.children),)

    def walk(self) -> Iterator[Node]:
        """This node and all below it, depth first."""
        yield self
        for child in self.children.values():
            yield from child.walk()


@dataclass(frozen=True, slots=True)
class Tree:
    """The nodes of a manifest by path; the root is an implied node when there are no entries."""

    root: Node
    nodes: dict[str, Node]
    storages: dict[str, Entry]

    def resolve(self, node: Node) -> Node:
        """What an alias stands for, or the node itself. Raises FormatError for an alias of nothing."""
        entry = node.entry
        if entry is None or entry.kind is not Kind.ALIAS:
            return node
        target = self.nodes.get(str(entry.attrs.get("target")))
        if target is None or target.entry is None or target.entry.kind not in _ALIAS_TARGETS:
            raise FormatError(f"leaf {entry.path!r}: alias of {entry.attrs.get('target')!r}, which is no array here")
        return target

    def resolved(self, node: Node) -> Entry:
        """The entry of what an alias stands for, or of the node itself, which is no implied one."""
        entry = self.resolve(node).entry
        assert entry is not None
        return entry

    def storage_of(self, entry: Entry) -> Entry:
        """The STORAGE of a VIEW. Raises FormatError when there is none."""
        storage = self.storages.get(str(entry.attrs.get("storage")))
        if storage is None:
            raise FormatError(f"leaf {entry.path!r}: view of {entry.attrs.get('storage')!r}, which is no storage here")
        return storage


_ALIAS_TARGETS = frozenset({Kind.TENSOR, Kind.NDARRAY, Kind.VIEW, *COMPOSITE_KINDS})


def build_tree(entries: Iterable[Entry]) -> Tree:
    """The tree of a manifest or of any subset of it. Raises FormatError for paths that make no tree."""
    root = Node("")
    nodes = {"": root}
    storages: dict[str, Entry] = {}
    for entry in entries:
        if entry.kind is Kind.STORAGE:
            storages[entry.path] = entry
            continue
        if entry.path.count("/") >= SKELETON_DEPTH_MAX:
            raise FormatError(f"leaf {entry.path[:80]!r}: nested deeper than {SKELETON_DEPTH_MAX} levels")
        node = _node_at(nodes, entry.path)
        if node.entry is not None:
            raise FormatError(f"leaf {entry.path!r}: described twice")
        node.entry = entry
    for node in nodes.values():
        if node.children and node.entry is not None and not node.entry.is_container:
            raise FormatError(f"leaf {node.path!r}: a {node.entry.kind.name} cannot have children")
    return Tree(root, nodes, storages)


def _node_at(nodes: dict[str, Node], path: str) -> Node:
    """The node of a path; it and the containers above it are made when they are not there yet."""
    missing = []
    above = path
    while above not in nodes:
        missing.append(above)
        above = parent_of(above)
    node = nodes[above]
    for below in reversed(missing):
        child = Node(below)
        node.children[last_component(below)] = child
        nodes[below] = child
        node = child
    return node
