"""Checks of one manifest: that its entries form a state. Pure: entries in, complaints out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from castore.errors import FormatError
from castore.format.identity import state_id
from castore.format.manifest import Entry, Kind
from castore.format.paths import decode_key, last_component, parent_of
from castore.format.snapshot import SnapshotRecord
from castore.hashing import Hasher

_COMPOSITE_KINDS = frozenset({Kind.SPARSE, Kind.QUANTIZED})
"""Their children are parts of one tensor, named `~indices`, `~values`, …"""

Complaint = tuple[str, str]
"""(path, what is wrong with it)"""


def check_manifest(entries: Sequence[Entry], record: SnapshotRecord, hasher: Hasher) -> list[Complaint]:
    """Everything wrong with a whole manifest; nothing when a load can rebuild the state that was saved."""
    by_path = {entry.path: entry for entry in entries}
    return [
        *_check_paths(entries, by_path),
        *_check_references(entries, by_path),
        *_check_record(entries, record, hasher),
    ]


def _check_paths(entries: Sequence[Entry], by_path: Mapping[str, Entry]) -> Iterator[Complaint]:
    if "" not in by_path:
        yield "", "expected an entry for the root, found none"
    children = Counter(parent_of(path) for path in by_path if path and by_path[path].kind is not Kind.STORAGE)
    seen: set[str] = set()
    for entry in entries:
        path = entry.path
        if path in seen:
            yield path, "the path appears twice"
        seen.add(path)
        if entry.is_container and entry.shape != (children[path],):
            yield path, f"expected {entry.shape} children, found {children[path]}"
        if not path or entry.kind is Kind.STORAGE:
            continue
        parent = by_path.get(parent_of(path))
        if parent is None or not parent.is_container:
            yield path, f"its parent {parent_of(path)!r} is no container of this manifest"
        elif not _is_component(last_component(path), parent):
            yield path, "its last component is not an escaped key"


def _is_component(component: str, parent: Entry) -> bool:
    if parent.kind in _COMPOSITE_KINDS:
        return component.startswith("~")
    try:
        decode_key(component)
    except FormatError:
        return False
    return True


def _check_references(entries: Sequence[Entry], by_path: Mapping[str, Entry]) -> Iterator[Complaint]:
    for entry in entries:
        if entry.kind is Kind.ALIAS:
            target = by_path.get(str(entry.attrs.get("target")))
            if target is None or target.kind in (Kind.ALIAS, Kind.STORAGE):
                yield (
                    entry.path,
                    f"alias of {entry.attrs.get('target')!r}, which is no value of this manifest",
                )
        elif entry.kind is Kind.VIEW:
            storage = by_path.get(str(entry.attrs.get("storage")))
            if storage is None or storage.kind is not Kind.STORAGE:
                yield (
                    entry.path,
                    f"view of {entry.attrs.get('storage')!r}, which is no storage of this manifest",
                )


def _check_record(entries: Sequence[Entry], record: SnapshotRecord, hasher: Hasher) -> Iterator[Complaint]:
    """What the snapshot says of the whole state, against the entries."""
    raw_bytes = sum(entry.raw_bytes for entry in entries if entry.has_bytes)
    leaf_count = sum(not entry.is_container for entry in entries)
    if (raw_bytes, leaf_count) != (record.raw_bytes, record.leaf_count):
        yield (
            "",
            (
                f"expected {record.leaf_count} leaves of {record.raw_bytes} bytes, "
                f"found {leaf_count} of {raw_bytes} bytes"
            ),
        )
    try:
        found = state_id(hasher, entries)
    except FormatError as error:
        yield "", f"no state id can be computed: {error}"
        return
    if found != record.state_id:
        yield "", f"expected state {record.state_id}, found {found}"
