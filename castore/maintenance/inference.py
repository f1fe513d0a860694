"""What came before a snapshot that cannot be read: its marker needs parents, or its ancestors would be lost with it.

In this order:

1. the parents as the damaged file still spells them, when each is a snapshot that is there or was forgotten: an id of
   128 bits does not occur by chance;
2. every older snapshot of the same branch that nothing on the branch continues, the newest first: one of them is the
   end that was cut off. The branch is that of the oldest snapshot that names the unreadable one as its parent.

The second is a guess that keeps too much rather than too little: among the others may be losers of conflicts and ends
that the branch was moved away from.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgpack

from castore.backend.base import Backend
from castore.errors import CastoreError, DamageError, NotFoundError, UnknownRefError
from castore.format.layout import snapshot_name
from castore.ids import SNAPSHOT_ID_DIGITS, SnapshotId, is_hex
from castore.marks import Forgotten, forgotten_ids, read_forgotten
from castore.options import SNAPSHOT_BYTES_MAX
from castore.snapshots import list_snapshot_ids, read_record

_PARENTS_KEY = b"\xa7parents"
"""How msgpack writes the key in a snapshot file."""


def infer_mark(backend: Backend, snapshot_id: SnapshotId, *, why: CastoreError, now_ns: int) -> Forgotten:
    """The marker of a snapshot that is damaged or gone. `why` is the error that reading it raised.

    Raises that error when it is gone and no snapshot names it: then there is nothing to forget.
    """
    known = _Known(backend)
    children = [child for child, found in known.snapshots.items() if snapshot_id in found.parents]
    gone = isinstance(why, UnknownRefError)
    if gone and not children:
        raise why
    spelled = _spelled_parents(backend, snapshot_id)
    branch = min((known.snapshots[child] for child in children), key=_age).branch if children else ""
    if spelled and all(parent in known.snapshots or parent in known.present for parent in spelled):
        parents, how = spelled, "as its file still spells them"
    else:
        parents, how = known.ends(snapshot_id, children, branch), "inferred from what was cut off"
    what = "gone" if gone else f"damaged ({type(why).__name__})"
    return Forgotten(snapshot_id, parents, branch, None, 0, now_ns, f"by name: {what}; parents {how}")


def _spelled_parents(backend: Backend, snapshot_id: SnapshotId) -> tuple[SnapshotId, ...]:
    """The parents that stand in a damaged file; empty when the place cannot be read as a list of ids."""
    try:
        data = backend.read(snapshot_name(snapshot_id), max_bytes=SNAPSHOT_BYTES_MAX)
    except (NotFoundError, DamageError):
        return ()
    at = data.find(_PARENTS_KEY)
    if at < 0:
        return ()
    unpacker = msgpack.Unpacker(raw=False, strict_map_key=True)
    unpacker.feed(data[at + len(_PARENTS_KEY) : at + len(_PARENTS_KEY) + (1 << 16)])
    try:
        parents = unpacker.unpack()
    except (ValueError, TypeError, msgpack.UnpackException):
        return ()
    if not isinstance(parents, list) or not all(isinstance(parent, str) and _is_id(parent) for parent in parents):
        return ()
    return tuple(SnapshotId(parent) for parent in parents)


def _is_id(text: str) -> bool:
    return len(text) in SNAPSHOT_ID_DIGITS and is_hex(text)


class _Known:
    """Every snapshot that is there or forgotten, as far as it can be read."""

    def __init__(self, backend: Backend) -> None:
        self.present = frozenset(list_snapshot_ids(backend))
        self.snapshots: dict[SnapshotId, Forgotten] = {}
        """Present snapshots too, in the form of a marker: it has what is needed of both."""
        for snapshot_id in self.present | forgotten_ids(backend):
            found = _read(backend, snapshot_id)
            if found is not None:
                self.snapshots[snapshot_id] = found

    def ends(self, snapshot_id: SnapshotId, children: Sequence[SnapshotId], branch: str) -> tuple[SnapshotId, ...]:
        """Snapshots of the branch, older than all children, that nothing on the branch continues; newest first."""
        before_ns = min((self.snapshots[child].time_ns for child in children), default=-1)
        on_branch = [mark for mark in self.snapshots.values() if mark.branch == branch]
        continued = {parent for mark in on_branch for parent in mark.parents}
        ends = [
            mark
            for mark in on_branch
            if mark.time_ns <= before_ns and mark.snapshot_id not in continued | {snapshot_id, *children}
        ]
        return tuple(mark.snapshot_id for mark in sorted(ends, key=_age, reverse=True))


def _read(backend: Backend, snapshot_id: SnapshotId) -> Forgotten | None:
    try:
        record = read_record(backend, snapshot_id)
        return Forgotten(snapshot_id, record.parents, record.branch, record.step, record.time_ns, 0, "")
    except (UnknownRefError, DamageError):
        pass
    try:
        return read_forgotten(backend, snapshot_id)
    except DamageError:
        return None


def _age(mark: Forgotten) -> int:
    return mark.time_ns
