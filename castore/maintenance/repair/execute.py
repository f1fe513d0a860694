"""Carry a repair out, in an order that loses nothing wherever it is cut off.

    new packs (salvaged records, healed chunks), durable → index → `why` → damaged packs and files to quarantine
    → marks of what is lost → marks that are stale → refs, on request → index, where it was at fault

Every record that reads right is in a new pack before its old one moves, needed or not, so no saver that relied on the
old one can lose by it: its own check after publishing finds the pack gone, and writes again from memory. Collectors
are kept out: two copies of a chunk, the older to be moved by us and the newer to be deleted by them, would be none.
Nothing is deleted; a repair that was cut off is simply run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from castore.chunk_writer import ChunkWriter
from castore.codec.base import Elements
from castore.errors import ChecksumError, NoSpaceError, NotFoundError, UnsupportedFormatError
from castore.format.layout import new_quarantine, pack_name, snapshot_name
from castore.format.snapshot import rebuild_snapshot
from castore.format.textfile import encode_text_file
from castore.ids import PackId, SnapshotId
from castore.leases import writer_lease
from castore.losses import delete_loss, write_loss
from castore.maintenance.gc.claim import collector_claim
from castore.maintenance.gc.writers import Watch
from castore.maintenance.parity import parity_sizes
from castore.maintenance.repair.files import RefOffer, Restore, SetAside
from castore.maintenance.repair.plan import RepairPlan, plan_repair
from castore.maintenance.repair.salvage import write_salvage
from castore.maintenance.repair.sources import ChunkSource, RepositorySource
from castore.maintenance.restoring import restoring_handle
from castore.maintenance.verify import Examination, examine, settled
from castore.options import SNAPSHOT_BYTES_MAX, TEXT_FILE_BYTES_MAX
from castore.refs import Ref, encode_ref
from castore.repository import Handle

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) of the packs that are examined."""
Beat = Callable[[], None]
"""A sign of life for other hosts, at every step of long work."""

_ROUNDS_MAX = 3
"""A healed manifest part names chunks that nobody could know of; a healed id list more of them; then all is known."""
_KEPT_BYTES_MAX = 64 * TEXT_FILE_BYTES_MAX
"""Of a ref or mark: whatever lies there is kept, were it not what it claims to be."""
_WHY_FILES_MAX = 100
_REASON_CHARS_MAX = 1000
"""So many reasons in one `why`: were every character escaped, it stays below the limit of a text file."""
_HEALED = Elements(4, is_float=True)
"""The element type of a lost chunk is not known here, and nearly all state is fp32."""


@dataclass(frozen=True, slots=True)
class RepairReport:
    """What a repair planned, and what it did."""

    plan: RepairPlan
    """Of the first round; of a dry run, all there is."""
    acted: bool
    quarantine: str
    """The folder that took what was damaged, a name within the repository; empty when nothing had to move. The first of
    several, when what was healed showed more damage, or refs were moved."""
    new_packs: tuple[PackId, ...]
    healed_count: int
    """Chunks that were written again."""
    losses: Mapping[SnapshotId, tuple[str, ...]]
    """Every snapshot that is marked as lossy, with the leaves that are lost; none: a part of its manifest is."""
    moved_refs: Mapping[str, SnapshotId | None]
    """File of a ref → where it points now; None: the tag went to quarantine."""

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "acted": self.acted,
            "plan": self.plan.to_json(),
            "quarantine": self.quarantine,
            "new_packs": list(self.new_packs),
            "healed_count": self.healed_count,
            "losses": {snapshot_id: list(leaves) for snapshot_id, leaves in self.losses.items()},
            "moved_refs": dict(self.moved_refs),
        }


def repair(
    handle: Handle,
    sources: Sequence[ChunkSource] = (),
    *,
    dry_run: bool = False,
    fix_refs: bool = False,
    progress: Progress | None = None,
) -> RepairReport:
    """Examine every byte, plan, and unless `dry_run` act. Blocks for as long as `verify(data=True)` takes, and more.

    What parity brings back is taken before any other source. `fix_refs` moves branches that name nothing readable to
    the snapshot that the plan offers, and puts such tags into quarantine. Raises LeaseError when a collector is at
    work, NoSpaceError before anything is written when what must be copied does not fit, StorageError.
    """
    with _parity_of(handle) as parity:
        sources = (*parity, *sources)
        if dry_run:
            # Collectors may be at work now, as they cannot when it acts.
            found = settled(handle, lambda: examine(handle, data=True, progress=progress))
            plan = plan_repair(handle, found, sources)
            return _report(plan, plan, _Done(), acted=False)
        return _act(handle, sources, fix_refs=fix_refs, progress=progress)


@contextmanager
def _parity_of(handle: Handle) -> Iterator[Sequence[ChunkSource]]:
    """The repository as its parity shows it, where there is any."""
    if not parity_sizes(handle.backend):
        yield ()
        return
    restoring = restoring_handle(handle)
    try:
        yield (RepositorySource(restoring, handle.hasher),)
    finally:
        restoring.close()


def _act(handle: Handle, sources: Sequence[ChunkSource], *, fix_refs: bool, progress: Progress | None) -> RepairReport:
    handle.config.check_features("write", "gc", where=handle.backend.location)  # it takes files out of the way
    with _alone(handle) as beat:
        done = _Done()
        first = plan = plan_repair(handle, _examined(handle, beat, progress), sources, beat=beat)
        _execute(handle, plan, done, beat)
        for _ in range(_ROUNDS_MAX - 1):
            if not plan.heals and not plan.restores:
                break
            plan = plan_repair(handle, _examined(handle, beat), sources, beat=beat)
            _execute(handle, plan, done, beat)
        if fix_refs:
            _fix_refs(handle, plan.refs, done)
    return _report(first, plan, done, acted=True)


@contextmanager
def _alone(handle: Handle) -> Iterator[Beat]:
    """A writer lease, and the claim of a collector: until the end nobody else collects. Yields their sign of life."""
    backend, now_ns, lease_s = handle.backend, handle.clock(), handle.config.options.lease_s
    with (
        collector_claim(backend, Watch(lease_s=lease_s), now_ns=now_ns) as claim,
        writer_lease(backend, purpose="repair", now_ns=now_ns, lease_s=lease_s) as lease,
    ):

        def beat() -> None:
            claim.beat()
            lease.beat()

        yield beat


def _examined(handle: Handle, beat: Beat, progress: Progress | None = None) -> Examination:
    def shown(done: int, total: int) -> None:
        beat()
        if progress is not None:
            progress(done, total)

    return examine(handle, data=True, progress=shown)


class _Done:
    """What was done so far."""

    def __init__(self) -> None:
        self.quarantine = ""
        self.new_packs: list[PackId] = []
        self.healed_count = 0
        self.moved_refs: dict[str, SnapshotId | None] = {}


def _report(first: RepairPlan, last: RepairPlan, done: _Done, *, acted: bool) -> RepairReport:
    losses = {loss.snapshot_id: loss.leaves for loss in last.losses}
    new_packs = tuple(done.new_packs)
    return RepairReport(first, acted, done.quarantine, new_packs, done.healed_count, losses, done.moved_refs)


def _execute(handle: Handle, plan: RepairPlan, done: _Done, beat: Beat) -> None:
    _check_space(handle, plan)
    _heal(handle, plan, done, beat)
    aside = list(plan.set_aside)
    for salvage in plan.salvages:
        sealed = write_salvage(handle, salvage, beat=beat)
        if sealed is not None:
            handle.store.add({sealed.pack_id: sealed.rows})
            done.new_packs.append(sealed.pack_id)
        aside.append(SetAside(pack_name(salvage.pack_id), salvage.reason))
    restored = [_rebuilt(handle, file) for file in plan.restores]
    folder = _open_quarantine(handle, (*aside, *plan.unmarked), done)
    for file in aside:
        handle.backend.move(file.name, folder + file.name)
    if aside:
        handle.store.refresh()
    for rebuilt in restored:
        if rebuilt is not None:
            handle.backend.put_if_absent(snapshot_name(rebuilt[0]), rebuilt[1])
    for mark in plan.unmarked:
        _replace_file(handle, mark.name, None, folder)
    for loss in plan.new_losses:
        write_loss(handle.backend, loss)
    for snapshot_id in plan.healed:
        delete_loss(handle.backend, snapshot_id)
    for name in plan.stale_marks:
        handle.backend.delete(name)
    if plan.rebuild_index:
        with suppress(UnsupportedFormatError):  # a pack of a newer castore, which the plan has named
            handle.store.rebuild()
    handle.store.forget_damage()


def _check_space(handle: Handle, plan: RepairPlan) -> None:
    free_bytes = handle.backend.free_bytes()
    if free_bytes is not None and plan.copied_bytes > free_bytes:
        raise NoSpaceError(
            f"{handle.backend.location}: repair copies {plan.copied_bytes} bytes out of damaged packs, and "
            f"{free_bytes} are free; make space (an older quarantine/ is yours to delete) and run it again"
        )


def _heal(handle: Handle, plan: RepairPlan, done: _Done, beat: Beat) -> None:
    """Write chunks again, each by itself."""
    if not plan.heals:
        return
    writer = ChunkWriter(
        handle.backend,
        handle.hasher,
        handle.config.repository_id,
        compression=handle.config.options.compression,
        now_ns=handle.clock(),
    )
    try:
        for heal in plan.heals:
            beat()
            raw = bytes(heal.read())
            found = handle.hasher.chunk_id(raw)
            if found != heal.chunk_id:
                raise ChecksumError(
                    f"{plan.source_names[heal.source]}: expected chunk {heal.chunk_id.hex()}, found {found.hex()}: it "
                    "changed since it was looked through; run the repair again"
                )
            writer.put_bytes(heal.chunk_id, raw, kind=heal.kind, elements=_HEALED)
            done.healed_count += 1
        sealed = writer.finish()
    except BaseException:
        writer.abort()
        raise
    handle.store.add({pack.pack_id: pack.rows for pack in sealed})
    done.new_packs += [pack.pack_id for pack in sealed]


def _rebuilt(handle: Handle, restore: Restore) -> tuple[SnapshotId, bytes] | None:
    data = handle.backend.read(restore.name, max_bytes=SNAPSHOT_BYTES_MAX)
    return rebuild_snapshot(data, handle.hasher, named=restore.named)


def _open_quarantine(handle: Handle, files: Sequence[SetAside], done: _Done) -> str:
    """A folder for these files, where it is written down what for before anything moves there."""
    folder = new_quarantine()  # one for each round: no name can be taken
    for number, start in enumerate(range(0, len(files), _WHY_FILES_MAX), start=1):
        why = {file.name: file.reason[:_REASON_CHARS_MAX] for file in files[start : start + _WHY_FILES_MAX]}
        name = f"{folder}why" if number == 1 else f"{folder}why-{number}"
        handle.backend.put_if_absent(name, encode_text_file({"time_ns": handle.clock(), "files": why}))
    if files:
        done.quarantine = done.quarantine or folder
    return folder


def _fix_refs(handle: Handle, offers: Sequence[RefOffer], done: _Done) -> None:
    """Point branches to what is offered; take tags away."""
    fixed = [offer for offer in offers if offer.offered is not None or not offer.is_branch]
    folder = _open_quarantine(handle, [SetAside(offer.file_name, offer.reason) for offer in fixed], done)
    for offer in fixed:
        new = None
        if offer.offered is not None:
            new = encode_ref(Ref(offer.name, offer.offered, handle.clock()))
        if _replace_file(handle, offer.file_name, new, folder):
            done.moved_refs[offer.file_name] = offer.offered
            if offer.is_branch:
                handle.note_head(offer.name, offer.offered)  # the next save of this handle goes on from there


def _replace_file(handle: Handle, name: str, new: bytes | None, folder: str) -> bool:
    """Replace or remove a file that moves by compare-and-swap, and keep a copy; whether it was still there."""
    backend = handle.backend
    try:
        old = backend.read(name, max_bytes=_KEPT_BYTES_MAX)
    except NotFoundError:
        return False
    backend.put_if_absent(folder + name, old)
    return backend.compare_and_swap(name, expected=old, new=new)
