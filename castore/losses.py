"""What is lost of snapshots for good, as a repair found it: so that it is told as a fact and not found again each time.

A mark hides nothing and forbids nothing: a load tries all the same, and what came back (a chunk that was saved again)
is loaded. It explains what is missing, keeps `verify` quiet about it, and lets a collector go on where a manifest part
is lost and with it the knowledge of which chunks that snapshot needed.

Mark file, lost/<snapshot id> (textfile.py):
    {"leaf_count": int, "leaves": [path, …], "parts": [chunk id in hex, …], "snapshot": snapshot id, "time_ns": int}

`leaves` holds the first paths of `leaf_count`; leaves of lost manifest parts are not known and not among them. `parts`
are lost manifest parts and id lists.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from castore.backend.base import Backend
from castore.backend.replace import replace_file
from castore.errors import CastoreError, ChecksumError, NotFoundError
from castore.format.layout import LOST, lost_name, parse_lost_name
from castore.format.textfile import decode_text_file, encode_text_file, text_field
from castore.ids import ChunkId, SnapshotId
from castore.options import TEXT_FILE_BYTES_MAX

_LEAVES_NAMED_BYTES_MAX = TEXT_FILE_BYTES_MAX // 4
"""Of all paths together, so that the file stays readable whatever is lost."""
_PARTS_MAX = 4000


@dataclass(frozen=True, slots=True)
class Loss:
    """What is lost of one snapshot."""

    snapshot_id: SnapshotId
    leaves: tuple[str, ...]
    """Paths of leaves that cannot be read whole, the first of them when they are very many."""
    leaf_count: int
    parts: tuple[ChunkId, ...]
    """Manifest parts and id lists that cannot be read: of a part it is not known what leaves it named."""
    time_ns: int

    def covers(self, paths: Collection[str]) -> bool:
        """Whether a finding is no more than what this says: those leaves, or for no paths a lost part."""
        if not paths:
            return bool(self.parts)
        if len(self.leaves) < self.leaf_count:
            return len(paths) <= self.leaf_count
        return set(self.leaves).issuperset(paths)


def make_loss(snapshot_id: SnapshotId, leaves: Collection[str], parts: Collection[ChunkId], *, time_ns: int) -> Loss:
    """The value, with as many paths as a mark can hold."""
    kept: list[str] = []
    room = _LEAVES_NAMED_BYTES_MAX
    for path in sorted(leaves):
        room -= len(path.encode()) + 3
        if room < 0:
            break
        kept.append(path)
    return Loss(snapshot_id, tuple(kept), len(leaves), tuple(parts)[:_PARTS_MAX], time_ns)


def read_loss(backend: Backend, snapshot_id: SnapshotId) -> Loss | None:
    """The mark of one snapshot, None when there is none. Raises DamageError."""
    name = lost_name(snapshot_id)
    try:
        data = backend.read(name, max_bytes=TEXT_FILE_BYTES_MAX)
    except NotFoundError:
        return None
    return _decode(data, snapshot_id, name)


def read_losses(backend: Backend) -> tuple[dict[SnapshotId, Loss], dict[str, CastoreError]]:
    """All marks by snapshot, and of the mark files that cannot be read why."""
    losses: dict[SnapshotId, Loss] = {}
    damaged: dict[str, CastoreError] = {}
    for info in backend.list(LOST):
        snapshot_id = parse_lost_name(info.name)
        if snapshot_id is None:
            continue
        try:
            found = read_loss(backend, snapshot_id)
        except CastoreError as error:
            damaged[info.name] = error
            continue
        if found is not None:
            losses[snapshot_id] = found
    return losses, damaged


def write_loss(backend: Backend, loss: Loss) -> None:
    """Make a mark durable, in place of an older one, damaged or not. Raises StorageError."""
    fields = {
        "snapshot": loss.snapshot_id,
        "leaves": list(loss.leaves),
        "leaf_count": loss.leaf_count,
        "parts": [part_id.hex() for part_id in loss.parts],
        "time_ns": loss.time_ns,
    }
    replace_file(backend, lost_name(loss.snapshot_id), encode_text_file(fields))


def delete_loss(backend: Backend, snapshot_id: SnapshotId) -> None:
    """Take a mark away: the snapshot is whole again, or gone."""
    replace_file(backend, lost_name(snapshot_id), None)


def _decode(data: bytes, snapshot_id: SnapshotId, name: str) -> Loss:
    fields = decode_text_file(data, name=name)
    found = text_field(fields, "snapshot", str, name=name)
    if found != snapshot_id:
        raise ChecksumError(f"{name}: expected what is lost of {snapshot_id}, found {found}: the files were swapped")
    leaves = [path for path in text_field(fields, "leaves", list, name=name) if isinstance(path, str)]
    texts = [text for text in text_field(fields, "parts", list, name=name) if isinstance(text, str)]
    try:
        parts = tuple(ChunkId(bytes.fromhex(text)) for text in texts)
    except ValueError as error:
        raise ChecksumError(f"{name}: expected chunk ids, found {texts!r:.80}") from error
    return Loss(
        snapshot_id,
        tuple(leaves),
        text_field(fields, "leaf_count", int, name=name),
        parts,
        text_field(fields, "time_ns", int, name=name),
    )
