"""Write chunks again in another encoding: without a base, or as short as can be. No manifest changes.

    lease → look up → plan (pure) → read, verified → encode, proved → packs (durable) → index → check → report

A chunk id is the hash of raw bytes, so a chunk may lie in several places in several encodings; readers prefer the least
deep one, then the shortest (`castore.store.preference`). What repack writes is preferred to what it replaces, which a
collection then frees. "Check" is that of a save: what a new record rests on may have been condemned meanwhile; the
chunk is then written once more, by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, get_args

from castore.chunk_writer import ChunkWriter, Coded
from castore.closure import closure
from castore.codec.base import Elements
from castore.codec.chooser import encode_chunk
from castore.codec.registry import CONSTANT, DERIVED, DIFFERENCES
from castore.errors import ChunkMissingError, DamageError, NotFoundError, UsageError
from castore.format.pack import RecordKind
from castore.ids import ChunkId, SnapshotId
from castore.leases import condemned_packs, writer_lease
from castore.losses import read_losses
from castore.maintenance.parts import PartReader
from castore.manifests import elements_of
from castore.marks import read_thinning
from castore.pack.writer import SealedPack
from castore.progress import Meter
from castore.repository import Handle
from castore.roots import live_roots
from castore.snapshots import read_record
from castore.store import Locations

Level = Literal["usual", "max"]
LEVELS: tuple[Level, ...] = get_args(Level)
Progress = Callable[[int, int], None]
"""Called with (raw bytes done, raw bytes in all)."""


@dataclass(frozen=True, slots=True)
class Rewrite:
    """One chunk to be written again."""

    chunk_id: ChunkId
    elements: Elements
    location: Locations
    """Where it lies now, then all that it rests on."""

    @property
    def raw_bytes(self) -> int:
        """Of the chunk."""
        return self.location[0].row.raw_bytes

    @property
    def stored_bytes(self) -> int:
        """Of the record that is read now."""
        return self.location[0].row.stored_bytes


@dataclass(frozen=True, slots=True)
class RepackReport:
    """What was done, or with `dry_run` what would be tried."""

    chunk_count: int
    """Chunks that were looked at."""
    raw_bytes: int
    """Of those."""
    stored_bytes: int
    """Of the records that were read for them."""
    rewritten_count: int
    """Chunks that have a new record; without `flatten` only where that is shorter."""
    old_bytes: int
    """Stored bytes of the records that were replaced; a collection frees them."""
    new_bytes: int
    """Stored bytes of the new ones."""
    pack_bytes: int
    """Of the packs that were written."""
    dry_run: bool

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def repack(
    handle: Handle,
    snapshots: Collection[SnapshotId] | None,
    *,
    level: Level,
    flatten: bool,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> RepackReport:
    """See `Repository.repack`."""
    if level not in LEVELS:
        raise UsageError(f"unknown level {level!r}; expected one of {', '.join(LEVELS)}")
    if level == "usual" and not flatten:
        raise UsageError("nothing to do: ask for flatten, or for level max, or both")
    handle.config.check_features("write", where=handle.backend.location)
    lease_s = handle.config.options.lease_s
    with writer_lease(handle.backend, purpose="repack", now_ns=handle.clock(), lease_s=lease_s) as lease:
        handle.store.refresh()
        wanted, doubtful = _chunks_of(handle, _live_snapshots(handle) if snapshots is None else snapshots)
        # Condemned packs may be read as long as they stand; whether new records may rest on them is checked at the end.
        resting = closure(wanted, handle.store, frozenset())
        lost = sorted(wanted.keys() - resting.keys() - doubtful)
        if lost:
            raise ChunkMissingError(
                f"{len(lost)} chunks of these snapshots, {lost[0].hex()} among them, cannot be read; nothing was "
                "written; run `castore verify`"
            )
        plan = plan_repack(wanted, resting, flatten=flatten, thorough=level == "max")
        if dry_run:
            return _report(plan, (), dry_run=True)
        work = _Repack(handle, thorough=level == "max", flatten=flatten, progress=progress, beat=lease.beat)
        sealed = work.execute(plan)
    return _report(plan, sealed, dry_run=False)


def plan_repack(
    wanted: Mapping[ChunkId, Elements], resting: Mapping[ChunkId, Locations], *, flatten: bool, thorough: bool
) -> list[Rewrite]:
    """What is worth trying, in the order of packs and offsets."""
    plan = []
    for chunk_id, elements in wanted.items():
        if chunk_id not in resting:
            continue  # a repair has marked it as lost
        row = resting[chunk_id][0].row
        rests = bool(row.base_ids)
        # A byte or two cannot become shorter, only stand by themselves.
        longer = thorough and row.chain not in ((CONSTANT,), (DERIVED,))
        if (flatten and rests) or longer:
            plan.append(Rewrite(chunk_id, elements, resting[chunk_id]))
    return sorted(plan, key=lambda rewrite: (rewrite.location[0].pack_id, rewrite.location[0].row.offset))


class _Repack:
    """Carries a plan out."""

    def __init__(
        self, handle: Handle, *, thorough: bool, flatten: bool, progress: Progress | None, beat: Callable[[], None]
    ) -> None:
        self._handle = handle
        self._thorough = thorough
        self._flatten = flatten
        self._progress = progress
        self._beat = beat

    def execute(self, plan: Sequence[Rewrite]) -> list[SealedPack]:
        """Write, durably, then check; the packs."""
        sealed = self._write(plan, flatten=self._flatten)
        written = {row.chunk_id for pack in sealed for row in pack.rows}
        while True:
            condemned = condemned_packs(self._handle.backend)
            self._handle.store.refresh()
            lost = written - closure(written, self._handle.store, condemned).keys()
            if not lost:
                return sealed
            again = [rewrite for rewrite in plan if rewrite.chunk_id in lost]
            sealed += self._write(again, flatten=True)

    def _write(self, plan: Sequence[Rewrite], *, flatten: bool) -> list[SealedPack]:
        handle = self._handle
        writer = ChunkWriter(
            handle.backend,
            handle.hasher,
            handle.config.repository_id,
            compression="auto",
            now_ns=handle.clock(),
        )
        meter = Meter(self._progress, sum(rewrite.raw_bytes for rewrite in plan), beat=self._beat)
        try:
            for rewrite in plan:
                encode = partial(self._encode, rewrite, flatten=flatten)
                writer.put_coded(rewrite.chunk_id, encode, raw_bytes=rewrite.raw_bytes, kind=RecordKind.LEAF)
                meter.advance(rewrite.raw_bytes)
            sealed = writer.finish()
        except BaseException:
            writer.abort()
            raise
        if sealed:
            handle.store.add({pack.pack_id: pack.rows for pack in sealed})
        return sealed

    def _encode(self, rewrite: Rewrite, *, flatten: bool) -> Coded | None:
        """The new record; None when it would not be shorter or is needed no more. Called by any thread."""
        store, location = self._handle.store, rewrite.location[0]
        row = location.row
        raw = bytearray(rewrite.raw_bytes)
        base = None
        try:
            store.read_into(rewrite.chunk_id, store.find([rewrite.chunk_id])[0], memoryview(raw))
            if row.chain in DIFFERENCES and not flatten:
                base = store.read_base(row, where=f"pack {location.pack_id}, record at {row.offset}", verify=True)
        except (ChunkMissingError, NotFoundError):
            return None  # it was there when we looked: forgotten or thinned, then collected, or copied to other packs
        encoded = encode_chunk(
            raw,
            rewrite.elements,
            "auto",
            chunk_id=rewrite.chunk_id,
            hasher=store.hasher,
            base=base,
            base_id=row.base_ids[0] if base is not None else None,
            may_order=self._handle.config.may_order,
            thorough=self._thorough,
        )
        if len(encoded.payload) >= row.stored_bytes and not (flatten and row.base_ids):
            return None
        return Coded(encoded, row.base_ids, row.depth) if encoded.rests_on_base else Coded(encoded)


def _report(plan: Sequence[Rewrite], sealed: Iterable[SealedPack], *, dry_run: bool) -> RepackReport:
    packs = tuple(sealed)
    new = {row.chunk_id: row.stored_bytes for pack in packs for row in pack.rows}
    return RepackReport(
        chunk_count=len(plan),
        raw_bytes=sum(rewrite.raw_bytes for rewrite in plan),
        stored_bytes=sum(rewrite.stored_bytes for rewrite in plan),
        rewritten_count=len(new),
        old_bytes=sum(rewrite.stored_bytes for rewrite in plan if rewrite.chunk_id in new),
        new_bytes=sum(new.values()),
        pack_bytes=sum(pack.pack_bytes for pack in packs),
        dry_run=dry_run,
    )


# ---- chunks of snapshots -----------------------------------------------------------------------------------------


def _live_snapshots(handle: Handle) -> list[SnapshotId]:
    """What is kept; one that cannot be read is among them, to be told."""
    grace_ns = int(handle.config.options.orphan_grace_s * 1e9)
    roots = live_roots(handle.backend, now_ns=handle.clock(), grace_ns=grace_ns)
    return [*roots.live, *roots.damaged]


def _chunks_of(handle: Handle, snapshots: Iterable[SnapshotId]) -> tuple[dict[ChunkId, Elements], frozenset[ChunkId]]:
    """The chunks of leaves that were not dropped, with what their elements are; and those of them that may be missing,
    because a repair has marked every snapshot that needs them as lossy. Raises DamageError for a manifest that cannot
    be read.
    """
    parts, losses = PartReader(handle), read_losses(handle.backend)[0]
    found: dict[ChunkId, Elements] = {}
    certain: set[ChunkId] = set()
    walked: set[Hashable] = set()
    for snapshot_id in snapshots:
        record, thinning = read_record(handle.backend, snapshot_id), read_thinning(handle.backend, snapshot_id)
        is_lossy = snapshot_id in losses
        for key, part in parts.kept(record.part_ids, thinning):
            if (key, is_lossy) in walked:
                continue
            walked.add((key, is_lossy))
            if (part.error or part.unresolved) and not is_lossy:
                why = part.error or next(iter((part.unresolved or {}).values()))
                raise DamageError(f"snapshot {snapshot_id[:12]}: {why}; run `castore verify`")
            for entry in part.entries:
                chunk_ids = entry.chunk_ids(handle.hasher.digest_bytes) if entry.chunks else ()
                elements = elements_of(entry)
                for chunk_id in chunk_ids:
                    found.setdefault(chunk_id, elements)
                if not is_lossy:
                    certain.update(chunk_ids)
    return found, frozenset(found.keys() - certain)
