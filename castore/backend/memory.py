"""A backend in a dict: the contract at its plainest, for tests and for what need not outlive the process."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from castore.backend.base import (
    ClaimInfo,
    FileInfo,
    byte_view,
    check_name,
    check_prefix,
    too_large,
    truncated,
)
from castore.errors import LeaseError, NotFoundError, StorageError

if TYPE_CHECKING:
    import builtins
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from castore.ids import Buffer


@dataclass(frozen=True, slots=True)
class _File:
    data: bytes
    modified_ns: int


class MemoryBackend:
    """See castore.backend.base.Backend for the contract. Durable means: as long as the object lives."""

    def __init__(self, location: str = "memory:", *, now_ns: Callable[[], int] = time.time_ns) -> None:
        self._location = location
        self._now_ns = now_ns
        self._lock = threading.Lock()
        self._files: dict[str, _File] = {}
        self._held: set[str] = set()

    @property
    def location(self) -> str:
        return self._location

    def put_if_absent(self, name: str, data: Buffer) -> bool:
        check_name(name)
        with self._lock:
            return self._add(name, bytes(byte_view(data)))

    def create_stream(self, name: str) -> MemorySink:
        check_name(name)
        return MemorySink(self._where(name), lambda data: self._commit(name, data))

    def read(self, name: str, *, max_bytes: int) -> bytes:
        data = self._get(name).data
        if len(data) > max_bytes:
            raise too_large(self._where(name), expected=max_bytes, found=len(data))
        return data

    def open_reader(self, name: str) -> MemoryReader:
        return MemoryReader(self._where(name), self._get(name).data)

    def list(self, prefix: str) -> Iterator[FileInfo]:
        check_prefix(prefix)
        with self._lock:
            files = sorted((name, file) for name, file in self._files.items() if name.startswith(prefix))
        return iter([_info(name, file) for name, file in files])

    def temporaries(self, *, modified_before_ns: int) -> Iterator[FileInfo]:
        del modified_before_ns  # a sink that is not committed has no name here
        return iter(())

    def stat(self, name: str) -> FileInfo | None:
        check_name(name)
        with self._lock:
            file = self._files.get(name)
        return _info(name, file) if file else None

    def delete(self, name: str) -> bool:
        check_name(name, temporary_allowed=True)
        with self._lock:
            self._held.discard(name)
            return self._files.pop(name, None) is not None

    def move(self, name: str, new_name: str) -> bool:
        check_name(name)
        check_name(new_name)
        with self._lock:
            if name not in self._files:
                return False
            if new_name in self._files:
                raise StorageError(f"{self._where(name)}: cannot move to {new_name}: the name is taken")
            self._files[new_name] = self._files.pop(name)
            return True

    def compare_and_swap(self, name: str, *, expected: bytes | None, new: bytes | None) -> bool:
        check_name(name)
        with self._lock:
            file = self._files.pop(name, None)
            swapped = (file.data if file else None) == expected
            if swapped and new is not None:
                self._add(name, bytes(new))
            elif file and not swapped:
                self._files[name] = file
            return swapped

    def claim(self, name: str, data: bytes) -> MemoryClaim:
        check_name(name)
        with self._lock:
            if not self._add(name, bytes(data)):
                raise LeaseError(f"{self._where(name)}: already claimed")
            self._held.add(name)
        return MemoryClaim(name, lambda data: self._renew(name, data), lambda: self._release(name))

    def claims(self, prefix: str) -> builtins.list[ClaimInfo]:
        check_prefix(prefix)
        with self._lock:
            return [
                ClaimInfo(name, file.data, held=name in self._held)
                for name, file in sorted(self._files.items())
                if name.startswith(prefix)
            ]

    def free_bytes(self) -> int | None:
        return None

    def local_path(self, name: str) -> Path | None:
        check_name(name)
        return None

    def _where(self, name: str) -> str:
        return f"{self._location}/{name}"

    def _get(self, name: str) -> _File:
        check_name(name)
        with self._lock:
            file = self._files.get(name)
        if file is None:
            raise NotFoundError(f"{self._where(name)}: cannot read: no such file")
        return file

    def _add(self, name: str, data: bytes) -> bool:
        """Under the lock."""
        if name in self._files:
            return False
        self._files[name] = _File(data, self._now_ns())
        return True

    def _commit(self, name: str, data: bytes) -> None:
        with self._lock:
            if not self._add(name, data):
                raise StorageError(f"{self._where(name)}: cannot commit: the name is taken")

    def _renew(self, name: str, data: bytes) -> None:
        with self._lock:
            if name in self._held:
                self._files[name] = _File(bytes(data), self._now_ns())

    def _release(self, name: str) -> None:
        with self._lock:
            self._held.discard(name)
            self._files.pop(name, None)


class MemorySink:
    """See castore.backend.base.PackSink."""

    def __init__(self, where: str, commit: Callable[[bytes], None]) -> None:
        self._where = where
        self._commit = commit
        self._data: bytearray | None = bytearray()

    def write(self, *buffers: Buffer) -> None:
        data = self._open_data()
        for buffer in buffers:
            data += byte_view(buffer)

    def flush_hint(self) -> None:
        pass

    def commit(self) -> None:
        data, self._data = bytes(self._open_data()), None
        self._commit(data)

    def abort(self) -> None:
        self._data = None

    def _open_data(self) -> bytearray:
        if self._data is None:
            raise StorageError(f"{self._where}: cannot write: the stream is closed")
        return self._data


class MemoryReader:
    """See castore.backend.base.RangeReader."""

    def __init__(self, where: str, data: bytes) -> None:
        self._where = where
        self._data: memoryview | None = memoryview(data)
        self.size_bytes = len(data)

    def read_into(self, offset: int, target: memoryview) -> None:
        byte_view(target)[:] = self._range(offset, target.nbytes)

    def read(self, offset: int, size_bytes: int) -> bytes:
        return bytes(self._range(offset, size_bytes))

    def close(self) -> None:
        self._data = None

    def _range(self, offset: int, size_bytes: int) -> memoryview:
        if self._data is None:
            raise StorageError(f"{self._where}: cannot read: the reader is closed")
        assert offset >= 0
        found = self._data[offset : offset + size_bytes]
        if len(found) < size_bytes:
            raise truncated(self._where, offset=offset, expected=size_bytes, found=len(found))
        return found


class MemoryClaim:
    """See castore.backend.base.Claim."""

    def __init__(self, name: str, renew: Callable[[bytes], None], release: Callable[[], None]) -> None:
        self._name = name
        self._renew = renew
        self._release = release
        self._released = False

    @property
    def name(self) -> str:
        return self._name

    def renew(self, data: bytes) -> None:
        if not self._released:
            self._renew(data)

    def release(self) -> None:
        if not self._released:
            self._released = True
            self._release()


def _info(name: str, file: _File) -> FileInfo:
    return FileInfo(name, len(file.data), file.modified_ns)
