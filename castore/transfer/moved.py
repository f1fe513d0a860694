"""Which snapshot of the target stands for one of the source.

With one hash a snapshot keeps its id, and its file is copied as it is. With another hash every id changes: the new
record is a pure function of the old one, its nonce is derived from the old id, and so a second push finds what the
first one made, wherever it ran. Nothing is stored for this: the records of the target are read once.
"""

from __future__ import annotations

from contextlib import suppress

from castore.errors import CastoreError
from castore.format.snapshot import SnapshotRecord
from castore.hashing import checksum
from castore.ids import SnapshotId
from castore.repository import Handle
from castore.snapshots import list_snapshot_ids, read_record

_TAG = b"castore.moved\0"


def derived_nonce(source_id: SnapshotId) -> bytes:
    """8 bytes that say which snapshot, of another hash, a record was made from."""
    return checksum(_TAG + bytes.fromhex(source_id)).to_bytes(8, "little")


class MovedSnapshots:
    """Source id → target id. Snapshots of the target that cannot be read count as absent."""

    def __init__(self, source: Handle, target: Handle) -> None:
        self.same_hash = source.hasher.number == target.hasher.number
        self._source = source
        self._made: dict[SnapshotId, SnapshotId] = {}
        self._by_nonce: dict[bytes, list[tuple[SnapshotId, SnapshotRecord]]] = {}
        self._present = frozenset(list_snapshot_ids(target.backend))
        if not self.same_hash:
            for snapshot_id in self._present:
                with suppress(CastoreError):
                    record = read_record(target.backend, snapshot_id)
                    self._by_nonce.setdefault(record.nonce, []).append((snapshot_id, record))

    def find(self, source_id: SnapshotId) -> SnapshotId | None:
        """The snapshot at the target, None when it is not there yet."""
        if source_id in self._made:
            return self._made[source_id]
        if self.same_hash:
            return source_id if source_id in self._present else None
        candidates = self._by_nonce.get(derived_nonce(source_id))
        if not candidates:
            return None
        with suppress(CastoreError):
            record = read_record(self._source.backend, source_id)
            for target_id, found in candidates:
                if _facts(found) == _facts(record):
                    self._made[source_id] = target_id
                    return target_id
        return None

    def note(self, source_id: SnapshotId, target_id: SnapshotId) -> None:
        """Remember what was made."""
        self._made[source_id] = target_id


def _facts(record: SnapshotRecord) -> tuple[object, ...]:
    """What a change of hash leaves as it is: 64 bits of nonce alone are not taken for a proof."""
    return (record.time_ns, record.step, record.branch, record.message, record.raw_bytes, record.leaf_count)
