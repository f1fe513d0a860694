"""Buffer → digest. Algorithm numbers are permanent: they are written into pack headers and snapshot files."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import xxhash

from castore.errors import MissingExtraError, UnsupportedFormatError, UsageError
from castore.ids import Buffer, ChunkId
from castore.options import HASH_NAMES

CHECKSUM_BYTES = 8


@dataclass(frozen=True, slots=True)
class Hasher:
    """One digest algorithm."""

    name: str
    number: int
    """Written to disk; never reused."""
    digest_bytes: int
    digest: Callable[[Buffer], bytes]
    """Digest of a contiguous buffer; releases the GIL for large ones."""

    def chunk_id(self, raw: Buffer) -> ChunkId:
        """The identity of a chunk: the digest of its raw bytes, whatever its encoding."""
        return ChunkId(self.digest(raw))

    def tagged(self, tag: bytes, parts: Iterable[Buffer]) -> bytes:
        """Digest of tag, a zero byte and the concatenated parts: a digest of one domain never equals one of another."""
        return self.digest(b"".join((tag, b"\0", *parts)))


def checksum(stored: Buffer) -> int:
    """xxh3-64 of stored bytes, as an unsigned integer: guards against decay, never an identity."""
    return xxhash.xxh3_64_intdigest(stored)


def hasher_for(name: str) -> Hasher:
    """The hasher of that name; blake3 needs the extra `castore[blake3]`."""
    if name == "xxh3-128":
        return Hasher("xxh3-128", 1, 16, xxhash.xxh3_128_digest)
    if name == "blake3":
        return Hasher("blake3", 2, 32, _blake3_digest())
    raise UsageError(f"unknown hash {name!r}; expected one of {', '.join(HASH_NAMES)}")


def hasher_numbered(number: int) -> Hasher:
    """The hasher of an on-disk algorithm number."""
    names = {1: "xxh3-128", 2: "blake3"}
    if number not in names:
        raise UnsupportedFormatError(f"hash algorithm number {number} is unknown to this castore; expected 1 or 2")
    return hasher_for(names[number])


def _blake3_digest() -> Callable[[Buffer], bytes]:
    try:
        blake3 = importlib.import_module("blake3").blake3
    except ImportError as error:
        raise MissingExtraError("hash 'blake3' needs a package: pip install 'castore[blake3]'") from error

    def digest(raw: Buffer) -> bytes:
        result: bytes = blake3(raw).digest()
        return result

    return digest
