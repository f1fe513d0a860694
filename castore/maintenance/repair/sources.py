"""Where the content of lost chunks may still be found: another repository, or anything that the caller has read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Protocol

from castore.errors import CastoreError
from castore.hashing import Hasher
from castore.ids import Buffer, ChunkId
from castore.maintenance.chunks import ChunkReader
from castore.maintenance.tables import open_rows
from castore.repository import Handle
from castore.store import list_packs

ReadRaw = Callable[[], Buffer]


class ChunkSource(Protocol):
    """Something that may hold the content of chunks."""

    @property
    def name(self) -> str:
        """For people."""

    def find(
        self, wanted: Collection[ChunkId], *, beat: Callable[[], None] = lambda: None
    ) -> Mapping[ChunkId, ReadRaw]:
        """How to read the raw bytes of those chunks that it holds. Never raises for damage. `beat` is called at every
        step.
        """


class RepositorySource:
    """Another repository; also one of another hash, whose chunks are then all read and hashed anew."""

    def __init__(self, other: Handle, hasher: Hasher) -> None:
        self._other = other
        self._chunks = ChunkReader(other)
        self._hasher = hasher

    @property
    def name(self) -> str:
        return self._other.backend.location

    def find(
        self, wanted: Collection[ChunkId], *, beat: Callable[[], None] = lambda: None
    ) -> Mapping[ChunkId, ReadRaw]:
        missing = set(wanted)
        found: dict[ChunkId, ReadRaw] = {}
        for theirs in self._candidates(missing):
            if not missing:
                break
            beat()
            try:
                ours = self._hasher.chunk_id(self._chunks.get(theirs))
            except CastoreError:
                continue
            if ours in missing:
                missing.discard(ours)
                found[ours] = partial(self._chunks.get, theirs)
        return found

    def _candidates(self, wanted: Collection[ChunkId]) -> Iterator[ChunkId]:
        if self._other.hasher.number == self._hasher.number:
            located = self._other.store.locate(wanted)
            return (chunk_id for chunk_id, locations in located.items() if locations)
        return self._all_chunks()

    def _all_chunks(self) -> Iterator[ChunkId]:
        seen: set[ChunkId] = set()
        for pack_id in sorted(list_packs(self._other.backend)):
            rows, _ = open_rows(self._other.backend, pack_id, self._other.hasher)
            for row in rows:
                if row.chunk_id not in seen:
                    seen.add(row.chunk_id)
                    yield row.chunk_id


class MappedSource:
    """Content that the caller has: chunk id → how to read it."""

    def __init__(self, name: str, chunks: Mapping[ChunkId, ReadRaw]) -> None:
        self._name = name
        self._chunks = chunks

    @property
    def name(self) -> str:
        return self._name

    def find(
        self, wanted: Collection[ChunkId], *, beat: Callable[[], None] = lambda: None
    ) -> Mapping[ChunkId, ReadRaw]:
        beat()
        return {chunk_id: self._chunks[chunk_id] for chunk_id in wanted if chunk_id in self._chunks}
