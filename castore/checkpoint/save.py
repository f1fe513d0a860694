"""Save a state: plan, write packs, publish the snapshot, check, move the branch.

The order of writes is the product (ARCHITECTURE.md draws it):

    lease → list packs → hash → write packs (durable) → index → snapshot file (durable) → check → branch → check →
    report

The commit is the move of the branch. A crash before it leaves every earlier snapshot and the branch as they were; what
it leaves besides is garbage for gc. "Check" reads the condemned set and the pack listing again, after the root is
visible: a chunk that this save did not write because a pack had it, and whose pack is gone or condemned by now, is
written again.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from castore.checkpoint.plan import HashedState, Source, Write, hash_state, plan_manifest, plan_writes, written_bytes
from castore.chunk_writer import ChunkWriter
from castore.errors import ConflictError, UsageError
from castore.format.identity import state_id
from castore.format.layout import check_ref_name
from castore.format.snapshot import SnapshotRecord
from castore.ids import ChunkId, PackId, SnapshotId
from castore.leases import condemned_packs, writer_lease
from castore.refs import check_free, check_tag_free, create_tag, move_branch, read_branch, resolve
from castore.repository import Handle
from castore.snapshots import Snapshot, leaf_table, make_snapshot, write_record
from castore.store import list_packs
from castore.tensors import flatten

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all); from the saving thread, so it must be quick."""

NONCE_BYTES = 8


@dataclass(frozen=True, slots=True)
class SaveRequest:
    """Everything about a save but the state itself; checked by `check_request`."""

    branch: str = "main"
    step: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    message: str = ""
    tags: Sequence[str] = ()
    parent: str | None = None
    """A ref to continue from; None: the head that this handle last saw."""
    allow_pickle: bool = False


def check_request(request: SaveRequest) -> SaveRequest:
    """The request with plain values; raises UsageError or InvalidNameError before anything is read or written."""
    check_ref_name(request.branch)
    if isinstance(request.tags, str):
        raise UsageError(
            f"tags: expected a sequence of names, found the text {request.tags!r}; write tags=({request.tags!r},)"
        )
    for tag in request.tags:
        check_ref_name(tag)
        if tag == request.branch:
            raise UsageError(f"tag {tag!r} has the name of the branch; choose another name")
    step = request.step
    if step is not None and (
        isinstance(step, bool) or not hasattr(step, "__index__") or not -(2**63) <= int(step) < 2**63
    ):
        raise UsageError(f"step: expected an int of 64 bits or None, found {step!r}")
    if not isinstance(request.message, str):
        raise UsageError(f"message: expected str, found {type(request.message).__name__}")
    return SaveRequest(
        request.branch,
        None if step is None else int(step),
        {_name(key, "metrics"): _number(value, key) for key, value in request.metrics.items()},
        {_name(key, "metadata"): _json_value(value, f"metadata[{key!r}]") for key, value in request.metadata.items()},
        request.message,
        tuple(request.tags),
        request.parent,
        request.allow_pickle,
    )


def save(handle: Handle, state: Any, request: SaveRequest, *, progress: Progress | None = None) -> Snapshot:
    """Save `state` and move the branch; returns when all of it is durable.

    Reads the state's memory without copying it: nobody may change it meanwhile. Raises UnsupportedLeafError,
    UsageError, ConflictError, NoSpaceError or StorageError; whatever it raises, the branch is where it was.
    """
    request = check_request(request)
    handle.config.check_features("write", where=handle.backend.location)
    flat = flatten(state, allow_pickle=request.allow_pickle)
    now_ns = handle.clock()
    with writer_lease(handle.backend, purpose="save", now_ns=now_ns):
        parent = _expected_head(handle, request)
        for tag in request.tags:
            check_tag_free(handle.backend, tag)
        meter = _Meter(progress, total_bytes=2 * sum(payload.raw_bytes for payload in flat.payloads if payload))
        hashed = hash_state(flat, handle.hasher, progress=meter.advance)
        session = _Session(handle, now_ns)
        try:
            record = _write_chunks(session, hashed, request, parent, meter)
        except BaseException:
            session.abort()
            raise
        snapshot_id = write_record(handle.backend, record, handle.hasher)
        session.heal()
        if not move_branch(handle.backend, request.branch, expected_id=parent.head, new_id=snapshot_id, now_ns=now_ns):
            found = read_branch(handle.backend, request.branch)
            raise ConflictError(request.branch, snapshot_id=snapshot_id, expected_id=parent.head, found_id=found)
        handle.note_head(request.branch, snapshot_id)
        for tag in request.tags:
            create_tag(handle.backend, tag, snapshot_id, now_ns=now_ns)
        session.heal()
    meter.finish()
    return make_snapshot(snapshot_id, record, lambda _: leaf_table(hashed.entries, handle.hasher))


@dataclass(frozen=True, slots=True)
class _Parent:
    head: SnapshotId | None
    """Where the branch must be for the move to succeed."""
    parents: tuple[SnapshotId, ...]


def _expected_head(handle: Handle, request: SaveRequest) -> _Parent:
    """The head that the branch must have: what this handle last saw, else what it finds now."""
    if request.parent is not None:
        given = resolve(handle.backend, request.parent)
        return _Parent(read_branch(handle.backend, request.branch), (given,))
    seen = handle.seen_head(request.branch)
    if seen is None:
        head = read_branch(handle.backend, request.branch)
        if head is None:
            check_free(handle.backend, request.branch, as_tag=False)
        handle.note_head(request.branch, head)
    else:
        head = seen.snapshot_id
    return _Parent(head, (head,) if head is not None else ())


def _write_chunks(
    session: _Session, hashed: HashedState, request: SaveRequest, parent: _Parent, meter: _Meter
) -> SnapshotRecord:
    """Write what is missing and describe the snapshot; nothing is visible yet but packs that nobody refers to."""
    handle = session.handle
    manifest = plan_manifest(hashed.entries, handle.hasher)
    sources: dict[ChunkId, Source] = {}
    for leaf in hashed.leaves:
        sources.update(zip(leaf.ids, leaf.sources, strict=True))
    present = session.find_present(sources.keys() | manifest.sources.keys(), {**sources, **manifest.sources})
    writes = plan_writes(hashed.leaves, present, compression=handle.config.options.compression)
    parts = [
        Write(((part_id, source),), as_run=False)
        for part_id, source in manifest.sources.items()
        if part_id not in present
    ]
    new_bytes = written_bytes(writes)
    meter.skip(hashed.raw_bytes - new_bytes)
    stored_bytes = session.write([*writes, *parts], progress=meter.advance)
    return SnapshotRecord(
        state_id(handle.hasher, hashed.entries),
        parent.parents,
        request.branch,
        request.step,
        session.now_ns,
        request.metrics,
        request.metadata,
        request.message,
        hashed.raw_bytes,
        new_bytes,
        stored_bytes,
        sum(not entry.is_container for entry in hashed.entries),
        manifest.part_ids,
        software(),
        os.urandom(NONCE_BYTES),
    )


class _Session:
    """One save's dealings with the store: which chunks it found, in which packs, and how to write them again."""

    def __init__(self, handle: Handle, now_ns: int) -> None:
        self.handle = handle
        self.now_ns = now_ns
        self._sources: Mapping[ChunkId, Source] = {}
        self._relied_on: dict[ChunkId, PackId] = {}
        """Chunks that were not written because this pack holds them."""
        self._writer: ChunkWriter | None = None

    def find_present(self, ids: Collection[ChunkId], sources: Mapping[ChunkId, Source]) -> frozenset[ChunkId]:
        """The chunks that a pack holds which stands in a listing taken under our lease and is not condemned."""
        self._sources = sources
        self.handle.store.refresh()
        condemned = condemned_packs(self.handle.backend)
        wanted = list(ids)
        for chunk_id, hits in zip(wanted, self.handle.store.find(wanted), strict=True):
            usable = [hit.pack_id for hit in hits if hit.pack_id not in condemned]
            if usable:
                self._relied_on[chunk_id] = usable[0]
        return frozenset(self._relied_on)

    def write(self, writes: Iterable[Write], *, progress: Callable[[int], None]) -> int:
        """Write chunks into new packs, durably, and add them to the index; returns the bytes of the packs."""
        handle = self.handle
        self._writer = ChunkWriter(
            handle.backend,
            handle.hasher,
            handle.config.repository_id,
            compression=handle.config.options.compression,
            now_ns=self.now_ns,
        )
        for write in writes:
            if write.as_run:
                chunks = [(chunk_id, source.read) for chunk_id, source in write.chunks]
                payload_bytes = sum(source.raw_bytes for _, source in write.chunks)
                self._writer.put_run(chunks, kind=write.chunks[0][1].kind, payload_bytes=payload_bytes)
            else:
                for chunk_id, source in write.chunks:
                    self._writer.put(
                        chunk_id, source.read, raw_bytes=source.raw_bytes, elements=source.elements, kind=source.kind
                    )
            progress(sum(source.raw_bytes for _, source in write.chunks))
        sealed = self._writer.finish()
        if sealed:
            handle.store.add({pack.pack_id: pack.rows for pack in sealed})
        for pack in sealed:
            self._relied_on.update((row.chunk_id, pack.pack_id) for row in pack.rows)
        return sum(pack.pack_bytes for pack in sealed)

    def heal(self) -> None:
        """Publish, then check: write again what was collected between our look-up and our publication, until all is
        there.
        """
        while True:
            backend = self.handle.backend
            usable = list_packs(backend) - condemned_packs(backend)
            lost = [chunk_id for chunk_id, pack_id in self._relied_on.items() if pack_id not in usable]
            if not lost:
                return
            writes = [Write(((chunk_id, self._sources[chunk_id]),), as_run=False) for chunk_id in lost]
            self.write(writes, progress=lambda _: None)

    def abort(self) -> None:
        """Leave no half-written pack behind."""
        if self._writer is not None:
            self._writer.abort()


class _Meter:
    """Turns bytes hashed and bytes written into one progress figure."""

    def __init__(self, progress: Progress | None, *, total_bytes: int) -> None:
        self._progress = progress
        self._total = total_bytes
        self._done = 0

    def advance(self, count_bytes: int) -> None:
        self._done = min(self._total, self._done + count_bytes)
        if self._progress is not None:
            self._progress(self._done, self._total)

    def skip(self, count_bytes: int) -> None:
        """Bytes that need no writing."""
        self.advance(max(0, count_bytes))

    def finish(self) -> None:
        self.advance(self._total)


def software() -> str:
    """What wrote a snapshot, for its record."""
    with suppress(PackageNotFoundError):
        return f"castore {version('castore')}"
    return "castore (source tree)"


def _name(key: object, what: str) -> str:
    if not isinstance(key, str):
        raise UsageError(f"{what}: expected str keys, found {key!r}")
    return key


def _number(value: Any, key: str) -> float:
    """A plain int or float; 0-dim tensors and numpy scalars are converted exactly."""
    if isinstance(value, bool) or not (hasattr(value, "__float__") or hasattr(value, "__index__")):
        raise UsageError(f"metrics[{key!r}]: expected a number, found {type(value).__name__}")
    if type(value) is int and -(2**63) <= value < 2**63:
        return value
    return float(value)


def _json_value(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int) and -(2**63) <= value < 2**64:
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise UsageError(f"{where}: {value} is no JSON value; give it as text or as a metric")
        return float(value)
    if isinstance(value, list | tuple):
        return [_json_value(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {_name(key, where): _json_value(item, f"{where}[{key!r}]") for key, item in value.items()}
    raise UsageError(
        f"{where}: expected a JSON value, found {type(value).__name__}; convert it, or save it as part of the state"
    )
