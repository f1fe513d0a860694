"""A disk that is full: a small tmpfs where this process may mount one, and a backend with a quota anywhere."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from castore.backend import MemoryBackend
from castore.backend.base import Claim, PackSink, byte_view, os_error
from castore.ids import Buffer

PAGE_BYTES = 4096


@contextmanager
def tmpfs(directory: Path, size_bytes: int) -> Iterator[Path]:
    """Mount a tmpfs of that size. Raises PermissionError or FileNotFoundError where that is not possible."""
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        raise PermissionError("only root mounts a tmpfs")
    directory.mkdir()
    done = subprocess.run(
        [mount, "-t", "tmpfs", "-o", f"size={size_bytes}", "none", str(directory)], capture_output=True, check=False
    )
    if done.returncode:
        raise PermissionError(f"mount: {done.stderr.decode().strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


@contextmanager
def filled(directory: Path, *, free_bytes: int) -> Iterator[None]:
    """A ballast file leaves just so many bytes of the file system, rounded down to pages."""
    ballast = directory / "ballast"
    status = os.statvfs(directory)
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, status.f_bavail * status.f_frsize - free_bytes))
    try:
        yield
    finally:
        ballast.unlink()


class QuotaBackend(MemoryBackend):
    """A memory backend that holds at most `quota_bytes`: of files, and of what is being written."""

    def __init__(self, quota_bytes: int | None = None) -> None:
        super().__init__("quota:")
        self.quota_bytes = quota_bytes
        self.writing_bytes = 0

    def used_bytes(self) -> int:
        """Of all files, each rounded up as a file system does."""
        return sum(_rounded(len(file.data)) for file in self._files.values()) + _rounded(self.writing_bytes)

    def free_bytes(self) -> int | None:
        return None if self.quota_bytes is None else max(0, self.quota_bytes - self.used_bytes())

    def put_if_absent(self, name: str, data: Buffer) -> bool:
        self._take(name, len(byte_view(data)))
        return super().put_if_absent(name, data)

    def compare_and_swap(self, name: str, *, expected: bytes | None, new: bytes | None) -> bool:
        self._take(name, len(new or b""))  # beside the old content: that goes only when the new is whole
        return super().compare_and_swap(name, expected=expected, new=new)

    def claim(self, name: str, data: bytes) -> Claim:
        self._take(name, len(data))
        return super().claim(name, data)

    def create_stream(self, name: str) -> PackSink:
        return _QuotaSink(self, name, super().create_stream(name))

    def _take(self, name: str, size_bytes: int) -> None:
        if self.quota_bytes is not None and size_bytes and self.used_bytes() + _rounded(size_bytes) > self.quota_bytes:
            error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise os_error(error, f"{self.location}/{name}", "write") from error


class _QuotaSink:
    """See castore.backend.base.PackSink."""

    def __init__(self, backend: QuotaBackend, name: str, inner: PackSink) -> None:
        self._backend = backend
        self._name = name
        self._inner = inner
        self._written_bytes = 0

    def write(self, *buffers: Buffer) -> None:
        size_bytes = sum(len(byte_view(buffer)) for buffer in buffers)
        try:
            self._backend._take(self._name, size_bytes)
            self._inner.write(*buffers)
        except BaseException:
            self.abort()
            raise
        self._written_bytes += size_bytes
        self._backend.writing_bytes += size_bytes

    def flush_hint(self) -> None:
        self._inner.flush_hint()

    def commit(self) -> None:
        self._let_go()
        self._inner.commit()

    def abort(self) -> None:
        self._let_go()
        self._inner.abort()

    def _let_go(self) -> None:
        self._backend.writing_bytes -= self._written_bytes
        self._written_bytes = 0


def _rounded(size_bytes: int) -> int:
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES
