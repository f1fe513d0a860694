"""A model of a disk under the local backend: what a power cut leaves at each system call.

PowerLossOs stands in for the module `os` inside castore.backend.local, .tree and .syscalls. Calls reach the
real file system; beside it the model keeps, for every file and directory, what the program sees and what it
has synced. POSIX promises no more than this:

    fsync of a file         its bytes
    fsync of a directory    the names in it (made, removed, renamed), not what they name
    everything else         may be written back at any time, in any order, or never
"""

# It takes the place of system calls on strings.
# ruff: noqa: PTH102, PTH104, PTH108, PTH119, PTH120

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest import mock

from castore.backend import local, syscalls, tree
from castore.backend.base import byte_view
from tests.suites.fault_backend import SimulatedCrash, Unsynced

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from castore.ids import Buffer


@dataclass(eq=False, slots=True)
class _File:
    seen: bytearray = field(default_factory=bytearray)
    synced: bytes = b""


@dataclass(eq=False, slots=True)
class _Directory:
    seen: dict[str, _File | _Directory] = field(default_factory=dict)
    synced: dict[str, _File | _Directory] = field(default_factory=dict)


class PowerLossOs:
    """The changing system calls are numbered; at `at` comes the crash, or the error if `errno` is given."""

    def __init__(self, base: Path, *, at: int | None = None, errno: int | None = None) -> None:
        self.base = base
        self.at = at
        self.errno = errno
        self.calls: list[str] = []
        self.crashed = False
        self._root = _Directory()
        self._open: dict[int, _File | _Directory] = {}

    def __getattr__(self, name: str) -> Any:  # whatever changes nothing
        return getattr(os, name)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The local backend runs on this disk inside the block."""
        with ExitStack() as stack:
            for module in (local, syscalls, tree):
                stack.enter_context(mock.patch.object(module, "os", self))
            yield

    def survivors(self, *, unsynced: Unsynced) -> dict[str, bytes]:
        """Every file left, by its path under the base. Torn: all names, with zeros for bytes not synced."""
        return dict(_walk(self._root, "", unsynced))

    # ---- the system calls ----------------------------------------------------------------------------------

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        known = isinstance(self._find(os.path.dirname(path)), _Directory)
        creates = known and bool(flags & os.O_CREAT) and not os.path.lexists(path)
        if creates:
            self._count(f"create {path}")
        fd = os.open(path, flags, mode)
        if creates:
            self._directory_of(path).seen[os.path.basename(path)] = _File()
        node = self._find(path)
        if node is not None:
            self._open[fd] = node
        return fd

    def close(self, fd: int) -> None:
        self._open.pop(fd, None)
        os.close(fd)

    def writev(self, fd: int, buffers: Sequence[Buffer]) -> int:
        data = b"".join(map(byte_view, buffers))
        file = self._open.get(fd)
        if file is None:
            return os.writev(fd, buffers)
        assert isinstance(file, _File)
        self._count("write, first half")
        half = os.write(fd, data[: (len(data) + 1) // 2])
        file.seen += data[:half]
        return half  # a short write: the rest is another call

    def fsync(self, fd: int) -> None:
        self._count("fsync")  # of the model alone: the real disk does not lose power
        node = self._open.get(fd)
        if isinstance(node, _File):
            node.synced = bytes(node.seen)
        elif node is not None:
            node.synced = dict(node.seen)

    def mkdir(self, path: str) -> None:
        self._count(f"mkdir {path}")
        os.mkdir(path)
        self._directory_of(path).seen[os.path.basename(path)] = _Directory()

    def link(self, source: str, target: str) -> None:
        self._count(f"link {target}")
        os.link(source, target)
        node = self._find(source)
        assert node is not None
        self._directory_of(target).seen[os.path.basename(target)] = node

    def unlink(self, path: str) -> None:
        self._count(f"unlink {path}")
        os.unlink(path)
        del self._directory_of(path).seen[os.path.basename(path)]

    def rename(self, source: str, target: str) -> None:
        self._count(f"rename {target}")
        os.rename(source, target)
        node = self._directory_of(source).seen.pop(os.path.basename(source))
        self._directory_of(target).seen[os.path.basename(target)] = node

    def _count(self, call: str) -> None:
        if self.crashed:
            raise SimulatedCrash("the process is dead already")
        self.calls.append(call)
        if len(self.calls) - 1 == self.at:
            if self.errno is not None:
                raise OSError(self.errno, os.strerror(self.errno))
            self.crashed = True
            raise SimulatedCrash(f"before system call {self.at}: {call}")

    def _find(self, path: str) -> _File | _Directory | None:
        """The node of a path, None outside of the base and where others than the backend write (the index)."""
        relative = os.path.relpath(path, self.base)
        if relative == ".":
            return self._root
        if relative.startswith(".."):
            return None
        directory = self._find(os.path.dirname(path))
        return directory.seen.get(os.path.basename(path)) if isinstance(directory, _Directory) else None

    def _directory_of(self, path: str) -> _Directory:
        node = self._find(os.path.dirname(path))
        assert isinstance(node, _Directory)
        return node


def _walk(directory: _Directory, path: str, unsynced: Unsynced) -> Iterator[tuple[str, bytes]]:
    for name, node in (directory.synced if unsynced == "lost" else directory.seen).items():
        if isinstance(node, _Directory):
            yield from _walk(node, f"{path}{name}/", unsynced)
        elif unsynced == "kept":
            yield path + name, bytes(node.seen)
        elif unsynced == "torn":
            yield path + name, node.synced + bytes(len(node.seen) - len(node.synced))
        else:
            yield path + name, node.synced
