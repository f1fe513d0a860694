"""Load a state or one leaf: choose entries, compare with the live state, fetch chunks, put the nesting back.

ref → snapshot file → manifest parts → choose → (compare with `into`) → (map what can be mapped) → fetch the rest in
pack order, verified → unflatten
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from castore.checkpoint.fetch import Destination, FetchJob, fetch_all
from castore.checkpoint.lost import entries_left, explain
from castore.checkpoint.mapping import map_leaves
from castore.checkpoint.select import any_of, no_such_path, select_entries
from castore.checkpoint.thinned import leaf_paths, refuse_dropped
from castore.errors import (
    CastoreError,
    ChunkMissingError,
    DamageError,
    LostLeavesError,
    PartialLoadError,
    PickleRefusedError,
    SnapshotGoneError,
    StateMismatchError,
    UnknownRefError,
    UsageError,
    some,
)
from castore.format.manifest import Entry, Kind, chunk_bytes
from castore.ids import ChunkId, SnapshotId
from castore.manifests import check_paths
from castore.options import GRID_BYTES
from castore.repository import Handle
from castore.snapshots import read_record
from castore.store import Locations
from castore.tensors import (
    ARRAY_KINDS,
    Match,
    Target,
    allocate,
    assign,
    can_adopt,
    decode_value,
    flatten,
    live_target,
    match,
    slice_rows,
    unflatten,
)

Progress = Callable[[int, int], None]
MissingClasses = Literal["error", "dict"]

_SHOWN_PATHS_MAX = 5


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """How to load; see `Repository.load`."""

    paths: Sequence[str] | None = None
    strict: bool = True
    device: Any = None
    verify: bool | None = None
    """None: whatever is copied. True: mapped leaves too."""
    allow_pickle: bool = False
    classes: Mapping[str, type] | None = None
    missing_classes: MissingClasses = "error"
    mmap: bool = False


def load(handle: Handle, snapshot_id: SnapshotId, request: LoadRequest, *, into: Any, progress: Progress | None) -> Any:
    """Load a state. See `Repository.load`."""
    if request.mmap and into is not None:
        raise UsageError("into= fills tensors that exist and mmap=True makes new ones: choose one of them")
    where = f"snapshot {snapshot_id[:12]}"
    entries = read_entries(handle, snapshot_id, request.paths)
    selected = select_entries(entries, request.paths, where=where)
    refuse_dropped(handle.backend, snapshot_id, entries, leaf_paths(selected))
    fetch = _Fetch(handle, snapshot_id, request, progress)
    if into is None:
        values = fetch.fresh(selected)
        fetch.run()
        return unflatten(selected, values(), classes=request.classes, missing_classes=request.missing_classes)
    matched = _matched(selected, into, request, where=where)
    fetch.live(matched)
    values = fetch.fresh(matched.fresh)
    fetch.run()
    with fetch.midway():
        return assign(into, matched, values(), classes=request.classes, missing_classes=request.missing_classes)


def prove(handle: Handle, snapshot_id: SnapshotId, paths: Sequence[str] | None) -> None:
    """Read all that a load would read, verified, and keep nothing of it. Raises what the load would for damage."""
    entries = read_entries(handle, snapshot_id, paths)
    selected = select_entries(entries, paths, where=f"snapshot {snapshot_id[:12]}")
    refuse_dropped(handle.backend, snapshot_id, entries, leaf_paths(selected))
    fetch = _Fetch(handle, snapshot_id, LoadRequest(paths), None)
    for entry in selected:
        fetch._want(entry, _Nowhere())
    fetch.run()


def read_leaf(
    handle: Handle, snapshot_id: SnapshotId, path: str, *, rows: slice | None, verify: bool, allow_pickle: bool
) -> Any:
    """One leaf, or some of its rows. See `Repository.read`."""
    where = f"snapshot {snapshot_id[:12]}"
    entries = read_entries(handle, snapshot_id, (path,))
    entry = _leaf_at(entries, path, where)
    refuse_dropped(handle.backend, snapshot_id, entries, (path,))
    fetch = _Fetch(handle, snapshot_id, LoadRequest(verify=verify, allow_pickle=allow_pickle), None)
    if rows is not None and entry.kind in (Kind.TENSOR, Kind.NDARRAY):
        value = fetch.rows(entry, rows)
        fetch.run()
        return value
    selected = select_entries(entries, (path,), where=where)
    values = fetch.fresh(selected)
    fetch.run()
    state = unflatten(selected, values(), missing_classes="dict")
    value = _only_leaf(state, selected)
    if rows is None:
        return value
    if not hasattr(value, "shape") or not value.shape:
        raise UsageError(f"leaf {path!r} is a {entry.kind.name.lower()} without axes; rows need an array")
    start, stop = _row_range(rows, int(value.shape[0]), path)
    return value[start:stop]


def read_entries(handle: Handle, snapshot_id: SnapshotId, paths: Sequence[str] | None = None) -> list[Entry]:
    """All entries of a snapshot; of one that lost parts of its manifest those that are left, when `paths` are leaves
    among them.

    Raises UnknownRefError, SnapshotGoneError, LostLeavesError or another DamageError.
    """
    record = read_record(handle.backend, snapshot_id)
    try:
        entries = handle.manifests.entries(record)
    except DamageError as error:
        if isinstance(error, ChunkMissingError):
            error = _gone_or(handle, snapshot_id, error)
        entries = entries_left(handle, snapshot_id, record, paths, error)
    check_paths(entries, where=f"snapshot {snapshot_id[:12]}")
    return entries


def _leaf_at(entries: Sequence[Entry], path: str, where: str) -> Entry:
    by_path = {entry.path: entry for entry in entries if entry.kind is not Kind.STORAGE}
    entry = by_path.get(path)
    if entry is not None and entry.kind is Kind.ALIAS:
        entry = by_path.get(str(entry.attrs["target"]))
    composite = entry is not None and entry.kind in (Kind.SPARSE, Kind.QUANTIZED)
    if entry is None or (entry.is_container and not composite):
        raise no_such_path(path, entries, where=where)
    return entry


def _only_leaf(state: Any, selected: Iterable[Entry]) -> Any:
    """Walk down the containers of a state that holds one leaf."""
    for entry in selected:
        if not entry.is_container or entry.kind in (Kind.SPARSE, Kind.QUANTIZED):
            return state
        state = next(iter(state.values() if isinstance(state, Mapping) else state))
    return state


def _row_range(rows: slice, count: int, path: str) -> tuple[int, int]:
    try:
        start, stop, step = rows.indices(count)
    except (AttributeError, TypeError) as error:
        raise UsageError(f"leaf {path!r}: rows: expected a slice of ints, found {rows!r}") from error
    if step != 1:
        raise UsageError(f"leaf {path!r}: rows: expected a step of 1, found {step}")
    return start, max(start, stop)


def _matched(entries: Sequence[Entry], into: Any, request: LoadRequest, *, where: str) -> Match:
    """Compare with the live state; raises StateMismatchError with everything that does not fit, before anything is
    touched.
    """
    matched = match(
        flatten(into, is_target=True), entries, selected=any_of(request.paths) if request.paths is not None else None
    )
    if matched.mismatched or (request.strict and not matched.is_exact):
        facts = [
            *_listed("missing in the snapshot", matched.missing if request.strict else ()),
            *_listed("unexpected in the snapshot", matched.unexpected if request.strict else ()),
            *_listed("mismatched", matched.mismatched),
        ]
        advice = "nothing was touched"
        if not matched.mismatched:
            advice += "; strict=False loads what both have"
        raise StateMismatchError(
            f"{where} does not fit the live state: {'; '.join(facts)}; {advice}",
            missing=matched.missing,
            unexpected=matched.unexpected,
            mismatched=matched.mismatched,
        )
    return matched


def _listed(what: str, paths: Sequence[str]) -> list[str]:
    return [f"{len(paths)} {what}: {some(paths, count=_SHOWN_PATHS_MAX)}"] if paths else []


class _Fetch:
    """The bytes that one load needs: planned first, then looked up and fetched together."""

    def __init__(
        self, handle: Handle, snapshot_id: SnapshotId, request: LoadRequest, progress: Progress | None
    ) -> None:
        self._handle = handle
        self._snapshot_id = snapshot_id
        self._request = request
        self._wanted: list[_Wanted] = []
        self._inline: list[tuple[Entry, Target]] = []
        self._finish: list[Target] = []
        self._live: set[str] = set()
        self._overwritten: dict[str, None] = {}
        self._progress = progress
        self._lock = threading.Lock()
        self._done_bytes = self._total_bytes = 0

    def fresh(self, entries: Sequence[Entry]) -> Callable[[], dict[str, Any]]:
        """Plan new values for all entries that have bytes; call the result after `run` to get them by path.

        Raises PickleRefusedError before anything is read.
        """
        self._refuse_pickles(entries)
        arrays = self._mapped(entries) if self._request.mmap else {}
        buffers: dict[str, tuple[Entry, bytes | bytearray]] = {}
        for entry in entries:
            if not entry.has_bytes or entry.path in arrays:
                continue
            if entry.kind in ARRAY_KINDS:
                arrays[entry.path], target = allocate(entry, device=self._request.device)
                self._fill(entry, target)
                continue
            if entry.inline is not None:
                buffers[entry.path] = (entry, entry.inline)
            else:
                buffer = bytearray(entry.raw_bytes)
                buffers[entry.path] = (entry, buffer)
                self._want(entry, _Buffer(memoryview(buffer)))

        def values() -> dict[str, Any]:
            allow_pickle = self._request.allow_pickle
            decoded = {
                path: decode_value(entry, raw, allow_pickle=allow_pickle) for path, (entry, raw) in buffers.items()
            }
            return {**arrays, **decoded}

        return values

    def _refuse_pickles(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            if entry.kind is Kind.PICKLE and not self._request.allow_pickle:
                raise PickleRefusedError(
                    f"leaf {entry.path!r} is a pickle of {entry.attrs.get('type', 'unknown type')}, which can run any "
                    "code; "
                    "give allow_pickle=True if you trust whoever wrote this repository, or leave it out with paths="
                )

    def _mapped(self, entries: Sequence[Entry]) -> dict[str, Any]:
        """Values of the entries that can be mapped."""
        mappable = [entry for entry in entries if can_adopt(entry, device=self._request.device)]
        self._total_bytes = sum(entry.raw_bytes for entry in entries if entry.chunks is not None)
        return map_leaves(self._handle.store, mappable, verify=self._request.verify is True, progress=self._advance)

    def live(self, matched: Match) -> None:
        """Plan to fill live arrays in place: they only receive verified bytes."""
        for pair in matched.pairs:
            self._live.add(pair.entry.path)
            self._fill(pair.entry, _Live(live_target(pair.value, pair.entry)))

    def rows(self, entry: Entry, rows: slice) -> Any:
        """Plan some rows of an array; returns the array that `run` fills."""
        if not entry.shape:
            raise UsageError(f"leaf {entry.path!r} has no axes, so it has no rows")
        start, stop = _row_range(rows, entry.shape[0], entry.path)
        part, first_byte = slice_rows(entry, start, stop)
        value, target = allocate(part, device=self._request.device)
        last_byte = first_byte + part.raw_bytes
        if entry.inline is not None:
            target.write(0, entry.inline[first_byte:last_byte])
        elif part.raw_bytes:
            for index in range(first_byte // GRID_BYTES, -(-last_byte // GRID_BYTES)):
                begin = index * GRID_BYTES
                low, high = max(first_byte, begin), min(last_byte, begin + chunk_bytes(entry.raw_bytes, index))
                self._wanted.append(_Wanted(entry, index, target, low - first_byte, low - begin, high - low))
        self._finish.append(target)
        return value

    def run(self) -> None:
        """Look all chunks up, then fetch them. Raises ChunkMissingError before anything is read, PartialLoadError
        after.
        """
        jobs = self._jobs()
        self._total_bytes = self._done_bytes + sum(job.chunk_bytes for job in jobs)
        with self.midway():
            fetch_all(
                self._handle.store,
                jobs,
                verify=self._request.verify is not False,
                touched=self._note_touched,
                progress=self._advance,
            )
            for entry, target in self._inline:
                # Inline bytes were verified with their manifest part.
                self._note_touched(entry.path)
                target.write(0, entry.inline or b"")
            for target in self._finish:
                target.finish()

    def _advance(self, count_bytes: int) -> None:
        with self._lock:  # several threads fetch; the figure must not go back
            self._done_bytes += count_bytes
            if self._progress is not None:
                self._progress(self._done_bytes, self._total_bytes)

    @contextmanager
    def midway(self) -> Iterator[None]:
        """An error inside the block says which live leaves were overwritten before it, if any were."""
        try:
            yield
        except CastoreError as error:
            explained = self._explained(error)
            if self._overwritten:
                raise self._partial(explained) from error
            if explained is not error:
                raise explained from error
            raise

    def _fill(self, entry: Entry, target: Target) -> None:
        self._finish.append(target)
        if entry.inline is not None:
            self._inline.append((entry, target))
        else:
            self._want(entry, target)

    def _want(self, entry: Entry, destination: Destination) -> None:
        count = len(entry.chunks or b"") // self._handle.hasher.digest_bytes
        self._wanted.extend(_Wanted(entry, index, destination, index * GRID_BYTES) for index in range(count))

    def _jobs(self) -> list[FetchJob]:
        n = self._handle.hasher.digest_bytes
        ids = [wanted.chunk_id(n) for wanted in self._wanted]
        locations = self._handle.store.locate(set(ids))
        missing = sorted(
            {wanted.entry.path for wanted, key in zip(self._wanted, ids, strict=True) if not locations[key]}
        )
        if missing:
            count = sum(not hits for hits in locations.values())
            error = ChunkMissingError(
                f"snapshot {self._snapshot_id[:12]}: {count} chunks are in no pack; "
                f"leaves: {some(missing, count=_SHOWN_PATHS_MAX)}; run `castore verify`, or load the "
                "other leaves with paths="
            )
            error = _gone_or(self._handle, self._snapshot_id, error)
            if not isinstance(error, SnapshotGoneError):  # thinned and collected since the look at the beginning?
                entries = read_entries(self._handle, self._snapshot_id, self._request.paths)
                refuse_dropped(self._handle.backend, self._snapshot_id, entries, missing)
            raise self._explained(error)
        return [wanted.job(key, locations[key]) for wanted, key in zip(self._wanted, ids, strict=True)]

    def _explained(self, error: CastoreError) -> CastoreError:
        """The error that a collection meanwhile or a repair's mark explains, else the given one."""
        if not isinstance(error, ChunkMissingError) or isinstance(error, SnapshotGoneError | LostLeavesError):
            return error
        error = _gone_or(self._handle, self._snapshot_id, error)
        if isinstance(error, SnapshotGoneError):
            return error
        try:
            entries = read_entries(self._handle, self._snapshot_id, self._request.paths)
        except CastoreError:
            return error
        return explain(self._handle, self._snapshot_id, error, entries)

    def _note_touched(self, path: str) -> None:
        if path in self._live:
            self._overwritten[path] = None

    def _partial(self, error: CastoreError) -> PartialLoadError:
        paths = list(self._overwritten)
        return PartialLoadError(
            f"{error}; {len(paths)} live leaves already hold bytes of snapshot {self._snapshot_id[:12]}: "
            f"{some(paths, count=_SHOWN_PATHS_MAX)}; load another snapshot into the state before using it",
            overwritten=paths,
        )


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A chunk of a leaf, or a part of it, and where it goes."""

    entry: Entry
    index: int
    destination: Destination
    start: int
    skip: int = 0
    take: int | None = None

    def chunk_id(self, id_bytes: int) -> ChunkId:
        return ChunkId((self.entry.chunks or b"")[self.index * id_bytes : (self.index + 1) * id_bytes])

    def job(self, chunk_id: ChunkId, locations: Locations) -> FetchJob:
        length = chunk_bytes(self.entry.raw_bytes, self.index)
        return FetchJob(
            self.entry.path, chunk_id, length, locations, self.destination, self.start, self.skip, self.take
        )


@dataclass(frozen=True, slots=True)
class _Buffer:
    """Plain memory as a destination."""

    view: memoryview
    direct: bool = True

    def memory(self) -> memoryview:
        return self.view

    def write(self, start: int, data: memoryview) -> None:
        self.view[start : start + len(data)] = data


class _Nowhere:
    """A destination for bytes that are only to be verified."""

    direct = False

    def memory(self) -> memoryview:
        raise UsageError("nothing is kept here")

    def write(self, start: int, data: memoryview) -> None:
        pass


class _Live:
    """A live target: never direct, so that it only receives verified bytes."""

    direct = False

    def __init__(self, target: Target) -> None:
        self._target = target
        self.raw_bytes = target.raw_bytes

    def memory(self) -> memoryview:
        raise UsageError("live memory is only written to after verification")

    def write(self, start: int, data: Any) -> None:
        self._target.write(start, data)

    def finish(self) -> None:
        self._target.finish()


def _gone_or(handle: Handle, snapshot_id: SnapshotId, error: ChunkMissingError) -> ChunkMissingError:
    """The error for a snapshot that was collected while it was being read, or the given one when it still stands."""
    try:
        read_record(handle.backend, snapshot_id)
    except UnknownRefError:
        return SnapshotGoneError(f"snapshot {snapshot_id[:12]} was collected while it was being read; load another one")
    return error
