"""What a repair does with files that are no packs: quarantine, restore, and offers for refs that name nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from castore.errors import CastoreError, DamageError, UnsupportedFormatError
from castore.format.layout import BRANCHES, GC, TAGS, check_ref_name, decode_ref_name, is_condemned_name, snapshot_name
from castore.format.snapshot import rebuild_snapshot
from castore.format.textfile import decode_text_file
from castore.ids import SnapshotId
from castore.losses import Loss
from castore.maintenance.verify import Examination
from castore.options import SNAPSHOT_BYTES_MAX, TEXT_FILE_BYTES_MAX
from castore.repository import Handle
from castore.snapshots import read_record


@dataclass(frozen=True, slots=True)
class SetAside:
    """A file that goes to quarantine as it is."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Restore:
    """A snapshot whose body is whole, in a file that is damaged around it or has the name of another."""

    name: str
    """Where it lies."""
    named: SnapshotId
    """What the file is called after."""
    snapshot_id: SnapshotId
    """What it is, by its digest."""


@dataclass(frozen=True, slots=True)
class RefOffer:
    """A branch or tag that names nothing that can be read, and where it could point instead."""

    file_name: str
    name: str
    is_branch: bool
    reason: str
    offered: SnapshotId | None
    """The newest whole snapshot that was saved to that branch; None: there is none, or it is a tag."""


def unreadable_snapshots(
    handle: Handle, found: Examination, left: list[str]
) -> tuple[list[SetAside], dict[SnapshotId, Restore]]:
    """Files to set aside, and the snapshots that they hold after all: their bodies are whole."""
    aside: list[SetAside] = []
    restores: dict[SnapshotId, Restore] = {}
    for snapshot_id in sorted(found.unreadable):
        name = snapshot_name(snapshot_id)
        try:
            read_record(handle.backend, snapshot_id)
        except (DamageError, UnsupportedFormatError) as error:
            restore = _restore(handle, name, snapshot_id)
            if restore is None and isinstance(error, UnsupportedFormatError):
                left.append(str(error))
                continue
            aside.append(SetAside(name, str(error)))
            if restore is not None and restore.snapshot_id not in found.records:
                restores[restore.snapshot_id] = restore
        except CastoreError as error:
            left.append(f"{name}: {error}")
    return aside, restores


def _restore(handle: Handle, name: str, snapshot_id: SnapshotId) -> Restore | None:
    try:
        data = handle.backend.read(name, max_bytes=SNAPSHOT_BYTES_MAX)
    except CastoreError:
        return None
    rebuilt = rebuild_snapshot(data, handle.hasher, named=snapshot_id)
    return Restore(name, snapshot_id, rebuilt[0]) if rebuilt is not None else None


def unreadable_condemned(handle: Handle) -> list[SetAside]:
    """Condemned sets that nobody can read. Whoever wrote one is dead: the repair holds the claim of collectors."""
    aside = []
    for info in handle.backend.list(GC):
        if is_condemned_name(info.name):
            try:
                fields = decode_text_file(handle.backend.read(info.name, max_bytes=TEXT_FILE_BYTES_MAX), name=info.name)
                if all(isinstance(name, str) for name in fields.get("packs", [None])):
                    continue
                aside.append(SetAside(info.name, f"{info.name}: expected pack ids"))
            except DamageError as error:
                aside.append(SetAside(info.name, str(error)))
            except CastoreError:
                continue
    return aside


def ref_offers(found: Examination, losses: Mapping[SnapshotId, Loss]) -> list[RefOffer]:
    """An offer for each ref that names nothing readable."""
    readable = {name: ref for name, ref in found.refs.items() if ref.snapshot_id in found.records}
    offers = []
    for problem in found.findings.problems:
        if problem.kind != "ref" or problem.where in readable:
            continue
        prefix = BRANCHES if problem.where.startswith(BRANCHES) else TAGS
        try:
            name = decode_ref_name(problem.where.removeprefix(prefix))
            check_ref_name(name)
        except CastoreError:
            continue  # no name of a ref: the finding says what to do with the file
        offers.append(_offer(found, losses, problem.where, name, problem.message, is_branch=prefix == BRANCHES))
    named = {offer.file_name for offer in offers}
    for file_name, ref in found.refs.items():
        if ref.snapshot_id in found.unreadable and file_name not in named:
            reason = f"{ref.name!r} names snapshot {ref.snapshot_id}, which cannot be read"
            is_branch = file_name.startswith(BRANCHES)
            offers.append(_offer(found, losses, file_name, ref.name, reason, is_branch=is_branch))
    return offers


def _offer(
    found: Examination,
    losses: Mapping[SnapshotId, Loss],
    file_name: str,
    name: str,
    reason: str,
    *,
    is_branch: bool,
) -> RefOffer:
    whole = (
        snapshot_id
        for snapshot_id, record in found.records.items()
        if is_branch and record.branch == name and snapshot_id not in losses
    )
    return RefOffer(file_name, name, is_branch, reason, next(whole, None))
