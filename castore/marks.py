"""Marks: small files beside snapshots that say what became of them. The snapshot itself never changes.

    forgotten/<id>   {"branch": str, "count": int, "forgotten_ns": int, "parents": [snapshot id, …], "reason": str,
                      "step": int or null, "time_ns": int}
        The snapshot is no root any more. When gc has removed the snapshot file, the marker stays as a tombstone as
        long as a snapshot names it as its parent, so that history goes on behind the gap; gc draws tombstones in a row
        together into one, whose count says how many snapshots it stands for.
    thin/<id>        {"dropped": [glob, …], "thinned_ns": int}
        The leaves whose paths match a glob are dropped from a snapshot that is kept. Its manifest stays whole, with all
        of its id lists: the digest of every dropped leaf can still be proven against the state id.
    orphans/<id>     {"since_ns": int}
        A branch or tag was taken away from the snapshot at that time: from then on its grace period counts.

Each is a textfile.py file, written and removed by compare-and-swap. A ref that names a snapshot outweighs its marker.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from castore.backend.base import Backend
from castore.backend.replace import replace_file
from castore.errors import DamageError, FormatError, NotFoundError, UsageError
from castore.format.layout import (
    FORGOTTEN,
    ORPHANS,
    THIN,
    forgotten_name,
    orphan_name,
    parse_forgotten_name,
    parse_orphan_name,
    parse_thin_name,
    thin_name,
)
from castore.format.manifest import Entry, Kind
from castore.format.paths import compile_glob, last_component, parent_of
from castore.format.snapshot import TIME_NS_MAX
from castore.format.textfile import decode_text_file, encode_text_file, text_field
from castore.ids import SNAPSHOT_ID_DIGITS, SnapshotId, is_hex
from castore.options import TEXT_FILE_BYTES_MAX

Mark = TypeVar("Mark")


@dataclass(frozen=True, slots=True)
class Forgotten:
    """A snapshot that was dropped, and what history still needs to know of it."""

    snapshot_id: SnapshotId
    parents: tuple[SnapshotId, ...]
    branch: str
    step: int | None
    time_ns: int
    """When it was saved; 0 when its record could not be read."""
    forgotten_ns: int
    reason: str
    count: int = 1
    """How many forgotten snapshots it stands for."""


@dataclass(frozen=True, slots=True)
class Thinning:
    """Which leaves were dropped from a kept snapshot."""

    snapshot_id: SnapshotId
    dropped: tuple[str, ...]
    """Globs of leaf paths."""
    thinned_ns: int

    def drops(self, path: str) -> bool:
        """Whether the leaf at the path is dropped. A tensor made of parts (sparse, quantized) is dropped as a whole, by
        its own path, or not at all.
        """
        name = last_component(path)
        while name.startswith("~") and ":" not in name and name != "~n":  # no escaped key, so a part: ~indices, ~scales
            path = parent_of(path)
            name = last_component(path)
        return any(compile_glob(glob)(path) for glob in self.dropped)


# ---- forgotten -------------------------------------------------------------------------------------------------


def forgotten_ids(backend: Backend) -> frozenset[SnapshotId]:
    """Every snapshot that has a marker; one listing, no file is read."""
    return frozenset(_ids(backend, FORGOTTEN, parse_forgotten_name))


def forgotten(backend: Backend) -> dict[SnapshotId, Forgotten]:
    """Every marker. Raises DamageError when one cannot be read: forget or undelete that snapshot again."""
    return _read_all(backend, FORGOTTEN, parse_forgotten_name, read_forgotten)


def across(
    parents: Iterable[SnapshotId], marks: Mapping[SnapshotId, Forgotten]
) -> tuple[list[SnapshotId], set[SnapshotId]]:
    """Parents, in the place of each marked one the parents of that, first parents first; and the marked ones that were
    passed over.
    """
    kept: dict[SnapshotId, None] = {}
    passed: set[SnapshotId] = set()
    pending = list(reversed([*parents]))
    while pending:
        parent = pending.pop()
        if parent not in marks:
            kept[parent] = None
        elif parent not in passed:
            passed.add(parent)
            pending.extend(reversed(marks[parent].parents))
    return list(kept), passed


def read_forgotten(backend: Backend, snapshot_id: SnapshotId) -> Forgotten | None:
    """The marker of one snapshot, None when it was not forgotten. Raises DamageError."""
    name = forgotten_name(snapshot_id)
    fields = _read(backend, name)
    if fields is None:
        return None
    parents = text_field(fields, "parents", list, name=name)
    if not all(isinstance(parent, str) and len(parent) in SNAPSHOT_ID_DIGITS and is_hex(parent) for parent in parents):
        raise FormatError(f"{name}: expected snapshot ids as parents, found {parents!r:.80}")
    count = text_field(fields, "count", int, name=name)
    if count < 1:
        raise FormatError(f"{name}: expected a count of 1 or more, found {count}")
    return Forgotten(
        snapshot_id,
        tuple(SnapshotId(parent) for parent in parents),
        text_field(fields, "branch", str, name=name),
        None if fields.get("step") is None else text_field(fields, "step", int, name=name),
        _time_ns(fields, "time_ns", name),
        _time_ns(fields, "forgotten_ns", name),
        text_field(fields, "reason", str, name=name),
        count,
    )


def forget_snapshot(backend: Backend, mark: Forgotten) -> bool:
    """Make the marker durable; False when the snapshot has a readable one already, which stays."""
    keep = functools.partial(read_forgotten, backend, mark.snapshot_id)
    return _put(backend, forgotten_name(mark.snapshot_id), _encode(mark), keep=keep)


def replace_forgotten(backend: Backend, mark: Forgotten, *, expected: Forgotten) -> bool:
    """Put one marker in the place of another, durably; False when another one is there than expected."""
    if read_forgotten(backend, mark.snapshot_id) != expected:
        return False
    return backend.compare_and_swap(forgotten_name(mark.snapshot_id), expected=_encode(expected), new=_encode(mark))


def _encode(mark: Forgotten) -> bytes:
    fields = {
        "parents": list(mark.parents),
        "branch": mark.branch,
        "step": mark.step,
        "time_ns": mark.time_ns,
        "forgotten_ns": mark.forgotten_ns,
        "reason": mark.reason,
        "count": mark.count,
    }
    return encode_text_file(fields)


def unforget_snapshot(backend: Backend, snapshot_id: SnapshotId) -> bool:
    """Remove the marker durably, a damaged one too; False when there was none."""
    return replace_file(backend, forgotten_name(snapshot_id), None)


# ---- thinned ---------------------------------------------------------------------------------------------------


def thinned_ids(backend: Backend) -> frozenset[SnapshotId]:
    """Every snapshot that has an overlay; one listing, no file is read."""
    return frozenset(_ids(backend, THIN, parse_thin_name))


def thinnings(backend: Backend) -> dict[SnapshotId, Thinning]:
    """Every overlay. Raises DamageError when one cannot be read: thin or undelete that snapshot again."""
    return _read_all(backend, THIN, parse_thin_name, read_thinning)


def read_thinning(backend: Backend, snapshot_id: SnapshotId) -> Thinning | None:
    """The overlay of one snapshot, None when it is whole. Raises DamageError."""
    name = thin_name(snapshot_id)
    fields = _read(backend, name)
    if fields is None:
        return None
    dropped = text_field(fields, "dropped", list, name=name)
    if not dropped or not all(isinstance(glob, str) for glob in dropped):
        raise FormatError(f"{name}: expected globs, found {dropped!r:.80}")
    return Thinning(snapshot_id, tuple(dropped), _time_ns(fields, "thinned_ns", name))


def thin_snapshot(backend: Backend, mark: Thinning) -> bool:
    """Make the overlay durable; it takes the place of an earlier one. False when it drops the same globs already."""
    if not mark.dropped:
        raise UsageError("thin: expected at least one glob of leaf paths")

    def same() -> bool:
        found = read_thinning(backend, mark.snapshot_id)
        return found is not None and found.dropped == mark.dropped

    data = encode_text_file({"dropped": list(mark.dropped), "thinned_ns": mark.thinned_ns})
    return _put(backend, thin_name(mark.snapshot_id), data, keep=same)


def unthin_snapshot(backend: Backend, snapshot_id: SnapshotId) -> bool:
    """Remove the overlay durably, a damaged one too; False when there was none."""
    return replace_file(backend, thin_name(snapshot_id), None)


def kept_entries(entries: Iterable[Entry], thinning: Thinning | None) -> list[Entry]:
    """The entries whose leaf chunks must stay; containers and other entries without chunks are among them or not.

    A dropped leaf's bytes stay while a kept alias of it, or a kept view of the same hidden storage, needs them; a
    storage goes when all of its views are dropped. Manifest parts and id lists stay in any case.
    """
    entries = list(entries)
    if thinning is None:
        return entries
    needed = needed_paths(entries, thinning)
    return [entry for entry in entries if keeps_chunks(entry, thinning, needed)]


def needed_paths(entries: Iterable[Entry], thinning: Thinning) -> frozenset[str]:
    """Targets of kept aliases and storages of kept views, of one whole manifest; only these entries tie parts of a
    manifest together, so that each part can be judged alone once they are known.
    """
    references = [entry for entry in entries if entry.kind in (Kind.ALIAS, Kind.VIEW)]
    targets = {
        str(entry.attrs.get("target"))
        for entry in references
        if entry.kind is Kind.ALIAS and not thinning.drops(entry.path)
    }
    storages = {
        str(entry.attrs.get("storage"))
        for entry in references
        if entry.kind is Kind.VIEW
        and (entry.path in targets or parent_of(entry.path) in targets or not thinning.drops(entry.path))
    }
    return frozenset(targets | storages)


def keeps_chunks(entry: Entry, thinning: Thinning, needed: frozenset[str]) -> bool:
    """Whether the chunks of one entry must stay; `needed` is what `needed_paths` says of its manifest."""
    if entry.kind is Kind.STORAGE:
        return entry.path in needed
    # An alias may stand for a tensor made of parts, whose chunks are those of its children.
    return not thinning.drops(entry.path) or entry.path in needed or parent_of(entry.path) in needed


# ---- orphans ---------------------------------------------------------------------------------------------------


def orphan_notes(backend: Backend) -> dict[SnapshotId, int]:
    """Snapshot → when a ref last left it, ns since 1970. A note that cannot be read counts from its file's time."""
    notes: dict[SnapshotId, int] = {}
    for info in backend.list(ORPHANS):
        snapshot_id = parse_orphan_name(info.name)
        if snapshot_id is None:
            continue
        try:
            since_ns = _orphan_since(backend, snapshot_id)
        except DamageError:
            since_ns = info.modified_ns
        if since_ns is not None:
            notes[snapshot_id] = since_ns
    return notes


def note_orphan(backend: Backend, snapshot_id: SnapshotId, *, now_ns: int) -> None:
    """Say, before a ref is taken away from a snapshot, that its grace period starts now."""

    def later() -> bool:
        since_ns = _orphan_since(backend, snapshot_id)
        return since_ns is not None and since_ns >= now_ns

    _put(backend, orphan_name(snapshot_id), encode_text_file({"since_ns": now_ns}), keep=later)


def _orphan_since(backend: Backend, snapshot_id: SnapshotId) -> int | None:
    name = orphan_name(snapshot_id)
    fields = _read(backend, name)
    return None if fields is None else _time_ns(fields, "since_ns", name)


# ---- files -----------------------------------------------------------------------------------------------------


def damaged_marks(backend: Backend) -> dict[str, DamageError]:
    """File name → why it cannot be read, for every mark that cannot."""
    damaged: dict[str, DamageError] = {}
    readers: tuple[tuple[str, Callable[[str], SnapshotId | None], Callable[[Backend, SnapshotId], object]], ...] = (
        (FORGOTTEN, parse_forgotten_name, read_forgotten),
        (THIN, parse_thin_name, read_thinning),
        (ORPHANS, parse_orphan_name, _orphan_since),
    )
    for prefix, parse, read in readers:
        for info in backend.list(prefix):
            snapshot_id = parse(info.name)
            try:
                if snapshot_id is not None:
                    read(backend, snapshot_id)
            except DamageError as error:
                damaged[info.name] = error
    return damaged


def _ids(backend: Backend, prefix: str, parse: Callable[[str], SnapshotId | None]) -> Iterator[SnapshotId]:
    for info in backend.list(prefix):
        snapshot_id = parse(info.name)
        if snapshot_id is not None:
            yield snapshot_id


def _read_all(
    backend: Backend,
    prefix: str,
    parse: Callable[[str], SnapshotId | None],
    read: Callable[[Backend, SnapshotId], Mark | None],
) -> dict[SnapshotId, Mark]:
    marks = ((snapshot_id, read(backend, snapshot_id)) for snapshot_id in _ids(backend, prefix, parse))
    return {snapshot_id: mark for snapshot_id, mark in marks if mark is not None}


def _read(backend: Backend, name: str) -> dict[str, Any] | None:
    try:
        return decode_text_file(backend.read(name, max_bytes=TEXT_FILE_BYTES_MAX), name=name)
    except NotFoundError:
        return None


def _time_ns(fields: dict[str, Any], key: str, name: str) -> int:
    found = int(text_field(fields, key, int, name=name))
    if not 0 <= found <= TIME_NS_MAX:
        raise FormatError(f"{name}: {key} {found} is no time before the year 10000")
    return found


def _put(backend: Backend, name: str, data: bytes, *, keep: Callable[[], object]) -> bool:
    """Write a mark in the place of what is there, unless `keep` says that what is there is as good; damage never is."""
    if len(data) > TEXT_FILE_BYTES_MAX:
        raise UsageError(f"{name}: expected at most {TEXT_FILE_BYTES_MAX} bytes, found {len(data)}; give fewer globs")
    return replace_file(backend, name, data, keep=keep)
