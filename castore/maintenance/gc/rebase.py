"""Rebase: free bases that nothing but differences needs, by storing what rests on them anew.

    before                              after
    A  pinned                           C  by itself
    └─ B  pinned                        └─ D  a difference from C
       ├─ C
       └─ D

New records are only better copies, durable in new packs; the collection then relies on them, and what they replace dies
like anything else. So rebasing needs no protocol of its own, and interrupted it leaves nothing but second copies.

A tree is rebased when that frees at least half as many bytes as it writes, the bound that holds for rewriting packs
too, by what the ledger knows; and in the end only if the encoded records really take less than what they replace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from castore.codec.base import PLAIN, Elements
from castore.codec.chooser import Encoded, encode_chunk
from castore.codec.registry import DERIVED, DIFFERENCES
from castore.codec.transform import WIDTHS
from castore.errors import DamageError, NoSpaceError, StorageError
from castore.format.pack import Row
from castore.ids import Buffer
from castore.maintenance.chunks import ChunkReader
from castore.maintenance.gc.copying import Copier
from castore.maintenance.gc.ledger import Ledger, Tree
from castore.options import PACK_BYTES_MAX
from castore.repository import Handle

_FREED_SHARE_MIN = 0.5
"""Of the bytes written."""
_PLANES = 3


@dataclass(frozen=True, slots=True)
class RebasePlan:
    """Which trees are stored anew."""

    trees: tuple[Tree, ...]
    freed_bytes: int
    """What is expected to become free, less what is written."""


def plan_rebase(trees: Iterable[Tree], *, written_bytes_max: int) -> RebasePlan:
    """The trees that free most for what they write, while it fits the limit."""
    worthy = [tree for tree in trees if tree.freed_bytes >= _FREED_SHARE_MIN * tree.written_bytes]
    worthy.sort(key=lambda tree: tree.freed_bytes / max(1, tree.written_bytes), reverse=True)
    chosen: list[Tree] = []
    for tree in worthy:
        if tree.written_bytes <= written_bytes_max:
            written_bytes_max -= tree.written_bytes
            chosen.append(tree)
    return RebasePlan(tuple(chosen), sum(tree.freed_bytes for tree in chosen))


def rebase(
    handle: Handle, ledger: Ledger, plan: RebasePlan, *, advance: Callable[[int], object] = lambda _: None
) -> int:
    """Store the trees of the plan anew, durably; returns the bytes of the new packs. `advance` gets how many are done.

    A tree that cannot be read, or gains nothing, is passed over; at a full disk the rest is. Raises StorageError.
    """
    copier, chunks = Copier(handle), ChunkReader(handle)
    written_bytes = 0
    try:
        for number, tree in enumerate(plan.trees, 1):
            _rebase_tree(handle, ledger, tree, chunks, copier)
            if copier.pack_bytes >= PACK_BYTES_MAX or number == len(plan.trees):
                sealed = copier.seal()
                written_bytes += sealed.pack_bytes if sealed is not None else 0
            advance(number)
    except NoSpaceError:
        return written_bytes
    finally:
        copier.abort()
    return written_bytes


def _rebase_tree(handle: Handle, ledger: Ledger, tree: Tree, chunks: ChunkReader, copier: Copier) -> None:
    """Encode all of the tree, and append it when it is smaller."""
    hasher, compression = handle.hasher, handle.config.options.compression
    base_id = ledger.id_of(ledger.chunk_of(tree.reference))
    fresh: list[tuple[Row, Encoded]] = []
    try:
        base = chunks.get(base_id)
        for row in tree.rewritten:
            chunk_id = ledger.id_of(ledger.chunk_of(row))
            location = handle.store.locate([chunk_id])[chunk_id][0]
            if location.row.chain == (DERIVED,):
                return  # a rounded copy costs a byte where its masters are
            raw = base if chunk_id == base_id else chunks.get(chunk_id)
            other = base if chunk_id != base_id and len(base) == len(raw) else None
            elements = _elements_of(location.row, handle.store.peek(location, 1))
            encoded = encode_chunk(
                raw,
                elements,
                compression,
                chunk_id=chunk_id,
                hasher=hasher,
                base=other,
                base_id=base_id,
                may_order=handle.config.may_order,
            )
            fresh.append((location.row, encoded))
    except (DamageError, StorageError, IndexError):
        return  # also when a sector cannot be read: the rest is collected all the same
    if sum(len(encoded.payload) for _, encoded in fresh) >= tree.replaced_bytes:
        return
    for old, encoded in fresh:
        rests_on = (base_id,) if encoded.rests_on_base else ()
        copier.append(
            replace(old, chain=encoded.chain, base_ids=rests_on, depth=int(encoded.rests_on_base)), encoded.payload
        )


def _elements_of(row: Row, payload: Buffer) -> Elements:
    """What the payload of a record says of its elements: an unverified hint. That wide ones are floats is a guess,
    which costs a little where it is wrong.
    """
    width = payload[0] if row.chain in (*DIFFERENCES, (_PLANES,)) and len(payload) else 1
    return Elements(width, is_float=width > 1) if width in WIDTHS else PLAIN
