"""Small packs in any backend, and ways to damage them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from castore.backend.base import Backend
from castore.codec.base import PLAIN, Elements
from castore.codec.chooser import encode_chunk
from castore.format.layout import pack_name
from castore.format.pack import PackHeader, RecordKind
from castore.hashing import Hasher, hasher_for
from castore.ids import ChunkId, PackId
from castore.options import Compression
from castore.pack.writer import PackWriter, SealedPack

HASHER = hasher_for("xxh3-128")
REPOSITORY_ID = bytes(range(16))
CREATED_NS = 1_700_000_000_000_000_000


def pack_id(number: int) -> PackId:
    return PackId(f"{number:032x}")


def new_writer(backend: Backend, number: int = 1, *, hasher: Hasher = HASHER) -> PackWriter:
    header = PackHeader(pack_id(number), REPOSITORY_ID, hasher, CREATED_NS)
    return PackWriter(backend.create_stream(pack_name(header.pack_id)), header)


def write_pack(
    backend: Backend,
    chunks: Sequence[bytes],
    *,
    number: int = 1,
    hasher: Hasher = HASHER,
    compression: Compression = "none",
    elements: Elements = PLAIN,
    kind: RecordKind = RecordKind.LEAF,
) -> SealedPack:
    """One record for each chunk, in order."""
    writer = new_writer(backend, number, hasher=hasher)
    for raw in chunks:
        chunk_id = hasher.chunk_id(raw)
        encoded = encode_chunk(raw, elements, compression, chunk_id=chunk_id, hasher=hasher)
        writer.append(chunk_id, encoded.payload, kind=kind, raw_bytes=len(raw), chain=encoded.chain)
    return writer.seal()


def ids_of(chunks: Sequence[bytes], *, hasher: Hasher = HASHER) -> list[ChunkId]:
    return [hasher.chunk_id(raw) for raw in chunks]


def rewrite(backend: Backend, name: str, change: Callable[[bytearray], object]) -> None:
    """Do to a file what a bad disk does: `change` gets its bytes."""
    data = bytearray(backend.read(name, max_bytes=1 << 30))
    change(data)
    backend.delete(name)
    assert backend.put_if_absent(name, data)


def flip(position: int) -> Callable[[bytearray], None]:
    """One bit of the byte at `position`, which may count from the end."""

    def change(data: bytearray) -> None:
        data[position] ^= 0x10

    return change
