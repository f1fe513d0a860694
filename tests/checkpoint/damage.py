"""Spoil stored chunks in the ways that disks and copies do."""

from __future__ import annotations

from castore.api import Repository
from castore.backend.base import Backend
from castore.format.layout import pack_name
from castore.format.pack import PackHeader, Row
from castore.ids import PackId, new_pack_id
from castore.pack.reader import read_table
from castore.pack.writer import PackWriter
from tests.checkpoint.repositories import packs_of


def rows_of(repo: Repository, pack_id: PackId) -> list[Row]:
    """The table of a pack."""
    reader = repo.handle.backend.open_reader(pack_name(pack_id))
    try:
        return read_table(reader, where=pack_id, expected_id=pack_id, hasher=repo.handle.hasher)
    finally:
        reader.close()


def places_of(repo: Repository, ref: str, path: str) -> list[tuple[PackId, Row]]:
    """Where the chunks of a leaf are stored, in grid order, each in one pack."""
    record = repo.snapshot(ref)
    entries = repo.handle.manifests.entries(_record(repo, record.id))
    (entry,) = [entry for entry in entries if entry.path == path]
    found = {row.chunk_id: (pack_id, row) for pack_id in packs_of(repo) for row in rows_of(repo, pack_id)}
    return [found[chunk_id] for chunk_id in entry.chunk_ids(repo.handle.hasher.digest_bytes)]


def flip_bit(backend: Backend, name: str, offset: int) -> None:
    """One bit rots."""
    data = bytearray(backend.read(name, max_bytes=1 << 30))
    data[offset] ^= 1
    replace_file(backend, name, bytes(data))


def replace_file(backend: Backend, name: str, data: bytes) -> None:
    """Other bytes under the same name."""
    assert backend.delete(name)
    assert backend.put_if_absent(name, data)


def damage_leaf(repo: Repository, ref: str, path: str, *, chunk: int = 0) -> None:
    """One bit of a stored chunk of a leaf rots."""
    pack_id, row = places_of(repo, ref, path)[chunk]
    flip_bit(repo.handle.backend, pack_name(pack_id), row.offset + row.stored_bytes // 2)


def forge_leaf(repo: Repository, ref: str, path: str, raw: bytes) -> None:
    """Other bytes under the id of a leaf's only chunk, the checksum right: bad memory, or a hostile writer."""
    backend, hasher = repo.handle.backend, repo.handle.hasher
    ((old_id, forged),) = places_of(repo, ref, path)
    pack_id = new_pack_id()
    header = PackHeader(pack_id, repo.handle.config.repository_id, hasher, 0)
    writer = PackWriter(backend.create_stream(pack_name(pack_id)), header)
    reader = backend.open_reader(pack_name(old_id))
    for row in rows_of(repo, old_id):
        stored = reader.read(row.offset, row.stored_bytes)
        changed = row.chunk_id == forged.chunk_id
        writer.append(
            row.chunk_id,
            raw if changed else stored,
            kind=row.kind,
            raw_bytes=row.raw_bytes,
            chain=() if changed else row.chain,
            base_ids=() if changed else row.base_ids,
            depth=0 if changed else row.depth,
        )
    reader.close()
    writer.seal()
    backend.delete(pack_name(old_id))


def _record(repo: Repository, snapshot_id: str) -> object:
    from castore.ids import SnapshotId
    from castore.snapshots import read_record

    return read_record(repo.handle.backend, SnapshotId(snapshot_id))
