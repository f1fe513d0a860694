"""What a collector does in the end, at its plainest: sweep what is not live. For tests of everything but gc."""

from __future__ import annotations

from castore.api import Repository
from castore.chunk_writer import ChunkWriter
from castore.codec.base import Elements
from castore.format.layout import pack_name, snapshot_name
from castore.format.pack import RecordKind
from castore.ids import ChunkId
from castore.marks import kept_entries, replace_forgotten
from castore.roots import live_roots
from castore.snapshots import split_ids
from castore.store import list_packs

LATER_NS = 1 << 62


def collect(repository: Repository, *, grace_ns: int = LATER_NS) -> None:
    """Delete dead snapshot files, write every needed chunk anew and delete all other packs. Nobody may be writing."""
    handle = repository.handle
    backend = handle.backend
    roots = live_roots(backend, now_ns=LATER_NS, grace_ns=grace_ns)
    assert not roots.damaged
    assert not roots.missing
    needed: dict[ChunkId, RecordKind] = {}
    id_bytes = handle.hasher.digest_bytes
    for snapshot_id, record in roots.live.items():
        entries = handle.manifests.entries(record)
        for entry in kept_entries(entries, roots.thinnings.get(snapshot_id)):
            needed |= dict.fromkeys(entry.chunk_ids(id_bytes), RecordKind.LEAF)
        for entry in entries:
            needed |= dict.fromkeys(split_ids(entry.id_lists or b"", id_bytes), RecordKind.ID_LIST)
        needed |= dict.fromkeys(record.part_ids, RecordKind.PART)
    for snapshot_id in roots.dead:
        backend.delete(snapshot_name(snapshot_id))
    old = list_packs(backend)
    writer = ChunkWriter(backend, handle.hasher, handle.config.repository_id, compression="none", now_ns=1)
    for chunk_id, kind in needed.items():
        writer.put_bytes(chunk_id, bytes(handle.store.get(chunk_id)), kind=kind, elements=Elements())
    sealed = writer.finish()
    handle.store.add({pack.pack_id: pack.rows for pack in sealed})
    for pack_id in old:
        backend.delete(pack_name(pack_id))
    for before, after in roots.contracted.values():
        assert replace_forgotten(backend, after, expected=before)
    for name in roots.stale_marks:
        backend.delete(name)
    handle.store.rebuild()
