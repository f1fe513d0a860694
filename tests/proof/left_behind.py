"""A repository in memory as a crash left it: temporary files, leases of the dead, an index that is behind or ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from castore.api import Repository
from castore.backend import MemoryBackend
from castore.backend.base import TEMPORARY_PREFIX, FileInfo
from castore.errors import CastoreError
from castore.format.config import decode_config
from castore.format.layout import CONFIG, pack_name
from castore.format.pack import Row
from castore.hashing import Hasher, hasher_for
from castore.ids import PackId
from castore.index import MemoryIndex
from castore.pack.reader import read_table
from castore.repository import Handle
from castore.store import ChunkStore


class LeftBackend(MemoryBackend):
    """A memory backend that also holds files whose writers died."""

    def __init__(self, files: Mapping[str, bytes], *, now_ns: Callable[[], int]) -> None:
        super().__init__(now_ns=now_ns)
        for name, data in files.items():
            if name == ".lock":
                continue  # the backend's own: no name of the contract
            with self._lock:
                self._add(name, data)

    def list(self, prefix: str) -> Iterator[FileInfo]:
        return (info for info in super().list(prefix) if not _is_temporary(info.name))

    def temporaries(self, *, modified_before_ns: int) -> Iterator[FileInfo]:
        found = [info for info in super().list("") if _is_temporary(info.name)]
        return iter([info for info in found if info.modified_ns < modified_before_ns])


class Tables:
    """The tables of packs, each read once however many disks hold it."""

    def __init__(self) -> None:
        self._rows: dict[PackId, list[Row]] = {}

    def learn(self, backend: MemoryBackend, pack_id: PackId, hasher: Hasher) -> None:
        """Keep the table of a pack that is whole here; one that is not is looked at another time."""
        if pack_id in self._rows or backend.stat(pack_name(pack_id)) is None:
            return
        try:
            name = pack_name(pack_id)
            self._rows[pack_id] = read_table(backend.open_reader(name), where=name, expected_id=pack_id, hasher=hasher)
        except CastoreError:
            return

    def index_of(self, packs: Iterable[PackId]) -> MemoryIndex:
        """An index that knows these packs, be they there or not."""
        index = MemoryIndex()
        index.add({pack_id: self._rows[pack_id] for pack_id in packs if pack_id in self._rows})
        return index


def open_left(backend: MemoryBackend, index: MemoryIndex, *, clock: Callable[[], int]) -> Repository:
    """A fresh handle on the backend, whose index is the given one."""
    config = decode_config(backend.read(CONFIG, max_bytes=1 << 20), where=CONFIG)
    handle = Handle(backend, config, clock=clock)
    handle._store = ChunkStore(backend, index, hasher_for(config.options.hash))
    return Repository(backend.location, handle)


def _is_temporary(name: str) -> bool:
    return name.rpartition("/")[2].startswith(TEMPORARY_PREFIX)
