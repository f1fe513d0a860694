"""A manifest under another hash: the same leaves, with every digest computed again.

Chunk ids come from the chunks as they arrive. The digest of a view is that of its own bytes, which its storage holds,
so these are put together once more; storages with views are held in memory one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from castore.errors import FormatError
from castore.format.identity import leaf_digest, state_id
from castore.format.manifest import Entry, Kind
from castore.format.snapshot import SnapshotRecord
from castore.hashing import Hasher
from castore.ids import ChunkId, SnapshotId
from castore.options import GRID_BYTES
from castore.transfer.moved import derived_nonce

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Digests = dict[tuple[bytes, int], bytes]
"""(leaf digest under the old hash, raw bytes) → leaf digest under the new one. A digest names bytes, so it may be
remembered across snapshots."""


def rehashed_entries(
    entries: Sequence[Entry],
    ids: Mapping[ChunkId, ChunkId],
    digests: Digests,
    *,
    read_leaf: Callable[[Entry], bytearray],
    old: Hasher,
    new: Hasher,
) -> tuple[Entry, ...]:
    """The entries with new ids and digests. `read_leaf` gives the verified bytes of a storage; `digests` is added to.

    Raises FormatError for a view that does not lie in its storage, or what `read_leaf` raises.
    """
    storages = {entry.path: entry for entry in entries if entry.kind is Kind.STORAGE}
    views: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.digest is not None and (entry.digest, entry.raw_bytes) not in digests:
            views.setdefault(str(entry.attrs.get("storage")), []).append(entry)
    for path, members in views.items():
        if path not in storages:
            raise FormatError(f"leaf {members[0].path!r}: view of {path!r}, which is no storage of this manifest")
        storage = read_leaf(storages[path])
        for view in members:
            assert view.digest is not None
            raw = view_bytes(view, storage)
            if _digest(raw, old) != view.digest:
                raise FormatError(f"leaf {view.path!r}: its bytes do not have the digest that the manifest gives")
            digests[view.digest, view.raw_bytes] = _digest(raw, new)
    return tuple(_rehashed(entry, ids, digests, old.digest_bytes) for entry in entries)


def _rehashed(entry: Entry, ids: Mapping[ChunkId, ChunkId], digests: Digests, id_bytes: int) -> Entry:
    if entry.digest is not None:
        return replace(entry, digest=digests[entry.digest, entry.raw_bytes])
    if entry.chunks is None:
        return entry
    return replace(entry, chunks=b"".join(ids[old] for old in entry.chunk_ids(id_bytes)), id_lists=None)


def _digest(raw: memoryview, hasher: Hasher) -> bytes:
    ids = b"".join(hasher.digest(raw[start : start + GRID_BYTES]) for start in range(0, len(raw), GRID_BYTES))
    return leaf_digest(hasher, len(raw), ids)


def rehashed_record(
    record: SnapshotRecord,
    source_id: SnapshotId,
    entries: Sequence[Entry],
    *,
    parents: Iterable[SnapshotId],
    part_ids: tuple[ChunkId, ...],
    hasher: Hasher,
) -> SnapshotRecord:
    """The record under the new hash: what was said of the save stays, ids change, and the nonce names the origin."""
    return replace(
        record,
        state_id=state_id(hasher, entries),
        parents=tuple(parents),
        part_ids=part_ids,
        nonce=derived_nonce(source_id),
    )


def learn_pairs(
    old: Iterable[Entry],
    new: Iterable[Entry],
    ids: dict[ChunkId, ChunkId],
    digests: Digests,
    *,
    widths: tuple[int, int],
) -> None:
    """Add what two manifests of one state say: which chunk, and which view's digest, became which."""
    by_path = {entry.path: entry for entry in new}
    for entry in old:
        other = by_path.get(entry.path)
        if other is None or (other.kind, other.raw_bytes) != (entry.kind, entry.raw_bytes):
            continue
        if entry.digest is not None and other.digest is not None:
            digests[entry.digest, entry.raw_bytes] = other.digest
        ids.update(zip(entry.chunk_ids(widths[0]), other.chunk_ids(widths[1]), strict=False))


def view_bytes(view: Entry, storage: bytearray) -> memoryview:
    """The logical bytes of a view: gathered from its storage, conjugated and negated as it says.

    Needs no torch: both flip signs. Raises FormatError for a view that reaches beyond the storage.
    """
    import numpy as np

    from castore.tensors.strided import extent, gather, host_words

    where = f"leaf {view.path!r}"
    count = int(np.prod(view.shape, dtype=object)) if view.shape else 1
    if count == 0 or view.raw_bytes == 0:
        return memoryview(b"")
    offset, stride = view.attrs.get("offset_bytes"), view.attrs.get("stride_bytes")
    if (
        view.raw_bytes % count
        or not isinstance(offset, int)
        or not isinstance(stride, list)
        or len(stride) != len(view.shape)
        or not all(isinstance(step, int) for step in stride)
    ):
        raise FormatError(f"{where}: expected an offset and strides, found {str(dict(view.attrs))[:80]}")
    item_bytes = view.raw_bytes // count
    low, high = extent(view.shape, stride, item_bytes)
    if offset + low < 0 or offset + high > len(storage):
        raise FormatError(f"{where}: reaches to byte {offset + high} of a storage of {len(storage)}")
    memory = np.frombuffer(storage, np.uint8)
    words = host_words(memory.ctypes.data + offset, view.shape, stride, item_bytes, owner=memory)
    raw = gather(words, 0, view.raw_bytes)
    _flip_signs(raw, view.attrs, view.dtype, item_bytes)
    return raw.data


def _flip_signs(raw: npt.NDArray[np.uint8], attrs: Mapping[str, Any], dtype: str, item_bytes: int) -> None:
    """Undo torch's lazy conjugate and negative, in place: the sign is the top bit of each little-endian number."""
    width = item_bytes // 2 if dtype.startswith("complex") else item_bytes
    if attrs.get("neg"):
        raw.reshape(-1, width)[:, -1] ^= 0x80
    if attrs.get("conj"):
        raw.reshape(-1, 2, width)[:, 1, -1] ^= 0x80
