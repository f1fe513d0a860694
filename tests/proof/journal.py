"""A journal of everything that castore asks of the file system, and every disk that a crash can leave of it.

`Recorder` stands in for the module `os` inside the local backend. Calls reach the real file system; beside it each one
that changes anything is written down. `Disk` replays a prefix of the journal and knows what of it is certain:

    write                      of a file        pending until that file is synced
    create, link, mkdir        of a directory   pending until that directory is synced
    unlink, rename             of a directory   the same; a rename within one directory happens or not, as a whole
    fsync of a file            its bytes are certain
    fsync of a directory       the names in it are certain, not what they name
    commit of the index        LMDB is a cache: any commit so far may be what is left of it, or none, or rubbish

After SIGKILL everything is there (nothing pending is lost). After power loss anything pending may be there or not, each
by itself: a later name may have survived an earlier one, data may be lost, cut anywhere, or zeros of the right length.
Whatever lies in a directory whose own name was lost is lost with it.
"""

# It takes the place of system calls on strings.
# ruff: noqa: PTH102, PTH104, PTH106, PTH108, PTH119, PTH120

from __future__ import annotations

import itertools
import os
import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from unittest import mock

from castore import repository
from castore.backend import local, syscalls, tree
from castore.backend.base import byte_view
from castore.ids import Buffer, PackId
from castore.index import Index, open_index

ROOT = 0
"""The node of the directory that the journal is about."""


@dataclass(frozen=True, slots=True)
class Enter:
    """A name appears in a directory: create, link, mkdir."""

    directory: int
    name: str
    node: int
    is_directory: bool = False


@dataclass(frozen=True, slots=True)
class Leave:
    """A name goes."""

    directory: int
    name: str


@dataclass(frozen=True, slots=True)
class Move:
    """A rename within one directory."""

    directory: int
    source: str
    target: str
    node: int


@dataclass(frozen=True, slots=True)
class Write:
    """Bytes are appended to a file."""

    node: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Sync:
    """An fsync of a file or directory."""

    node: int


@dataclass(frozen=True, slots=True)
class Rot:
    """A byte on the disk changes by itself."""

    node: int
    offset: int


@dataclass(frozen=True, slots=True)
class IndexCommit:
    """The index of one repository was changed."""

    repository: str
    packs: frozenset[PackId]
    """Those that it knows from now on."""
    files: Mapping[str, bytes]
    """The cache directory as it is now; empty unless the recorder keeps it."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment between two operations; the value is the caller's."""

    value: Any


Operation = Enter | Leave | Move | Write | Sync | Rot | IndexCommit | Mark
EntryOperation = Enter | Leave | Move


class Recorder:
    """Numbers nodes and writes down what happens below `base`, caches left out (those are C code's business)."""

    def __init__(self, base: Path, *, keeps_caches: bool = False) -> None:
        self.base = base
        self.journal: list[Operation] = []
        self._keeps_caches = keeps_caches
        self._names: dict[str, int] = {".": ROOT}
        self._open: dict[int, int] = {}
        self._count = itertools.count(ROOT + 1)
        self._lock = threading.RLock()

    def __getattr__(self, name: str) -> Any:  # whatever changes nothing
        return getattr(os, name)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The local backend is recorded inside the block."""
        with ExitStack() as stack:
            for module in (local, syscalls, tree):
                stack.enter_context(mock.patch.object(module, "os", self))
            stack.enter_context(mock.patch.object(repository, "open_index", self.open_index))
            yield

    def mark(self, value: Any) -> None:
        """Write down that everything so far was reported, and what must hold now."""
        with self._lock:
            self.journal.append(Mark(value))

    def rot(self, path: Path, offset: int) -> None:
        """Let a byte of a synced file rot."""
        with self._lock:
            data = path.read_bytes()
            path.write_bytes(_rotten(data, offset))
            self.journal.append(Rot(self._names[self._known(str(path))], offset))

    # ---- the system calls ----------------------------------------------------------------------------------

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        with self._lock:
            creates = bool(flags & os.O_CREAT) and not os.path.lexists(path)
            fd = os.open(path, flags, mode)
            name = self._relative(path)
            if name is not None:
                if creates:
                    self._enter(name, next(self._count))
                if name in self._names:
                    self._open[fd] = self._names[name]
            return fd

    def close(self, fd: int) -> None:
        with self._lock:
            self._open.pop(fd, None)
            os.close(fd)

    def writev(self, fd: int, buffers: Sequence[Buffer]) -> int:
        with self._lock:
            written = os.writev(fd, buffers)
            if fd in self._open:
                data = b"".join(map(byte_view, buffers))[:written]
                self.journal.append(Write(self._open[fd], data))
            return written

    def write(self, fd: int, data: Buffer) -> int:
        return self.writev(fd, [data])

    def fsync(self, fd: int) -> None:
        with self._lock:  # of the journal alone: the real disk does not lose power
            if fd in self._open:
                self.journal.append(Sync(self._open[fd]))

    def mkdir(self, path: str, mode: int = 0o777) -> None:
        with self._lock:
            os.mkdir(path, mode)
            name = self._relative(path)
            if name is not None:
                self._enter(name, next(self._count), is_directory=True)

    def link(self, source: str, target: str) -> None:
        with self._lock:
            os.link(source, target)
            if self._relative(target) is None:
                return
            self._enter(self._known(target), self._names[self._known(source)])

    def unlink(self, path: str) -> None:
        with self._lock:
            os.unlink(path)
            name = self._relative(path)
            if name is not None:
                del self._names[name]
                self.journal.append(Leave(*self._place(name)))

    remove = unlink

    def rename(self, source: str, target: str) -> None:
        with self._lock:
            os.rename(source, target)
            if self._relative(target) is None:
                return
            old, new = self._known(source), self._known(target)
            node = self._names.pop(old)
            self._names[new] = node
            (directory, name), (other, other_name) = self._place(old), self._place(new)
            if directory == other:
                self.journal.append(Move(directory, name, other_name, node))
            else:  # nothing promises that both directories are written back together
                self.journal += [Enter(other, other_name, node), Leave(directory, name)]

    replace = rename

    def rmdir(self, path: str) -> None:
        with self._lock:
            os.rmdir(path)
            name = self._known(path)
            del self._names[name]
            self.journal.append(Leave(*self._place(name)))

    # ---- names ---------------------------------------------------------------------------------------------

    def _enter(self, name: str, node: int, *, is_directory: bool = False) -> None:
        self._names[name] = node
        self.journal.append(Enter(*self._place(name), node, is_directory))

    def _place(self, name: str) -> tuple[int, str]:
        return self._names[os.path.dirname(name) or "."], os.path.basename(name)

    def _known(self, path: str) -> str:
        name = self._relative(path)
        assert name is not None, f"{path} is not below {self.base}"
        return name

    def _relative(self, path: str) -> str | None:
        """The path below the base; None outside of it, in a cache, and for what was there before."""
        name = os.path.relpath(path, self.base)
        if name.startswith("..") or "cache" in name.split("/"):
            return None
        if name != "." and (os.path.dirname(name) or ".") not in self._names:
            return None
        return name

    def open_index(self, path: Path, **options: Any) -> Index:
        """The real index of a repository, with every change of it written down."""
        return _NotedIndex(open_index(path, **options), path, self)

    def note_index(self, path: Path, packs: frozenset[PackId]) -> None:
        """Write down what the index knows now."""
        with self._lock:
            if not path.is_relative_to(self.base):
                return
            cache = path / "cache"
            files = {str(file.relative_to(path)): file.read_bytes() for file in cache.rglob("*") if file.is_file()}
            repository = str(path.relative_to(self.base))
            self.journal.append(IndexCommit(repository, packs, files if self._keeps_caches else {}))


class _NotedIndex:
    """See castore.index.base.Index."""

    def __init__(self, inner: Index, path: Path, recorder: Recorder) -> None:
        self._inner = inner
        self._path = path
        self._recorder = recorder
        self.find, self.packs, self.close = inner.find, inner.packs, inner.close

    def add(self, tables: Any) -> None:
        self._inner.add(tables)
        self._recorder.note_index(self._path, self._inner.packs())

    def forget(self, packs: Any) -> None:
        self._inner.forget(packs)
        if packs:
            self._recorder.note_index(self._path, self._inner.packs())

    def clear(self) -> None:
        self._inner.clear()
        self._recorder.note_index(self._path, self._inner.packs())


# ---- what is left ----------------------------------------------------------------------------------------------------

Variant = Literal["whole", "lost", "half", "zeros", "torn"]
VARIANTS: tuple[Variant, ...] = ("whole", "lost", "half", "zeros", "torn")


@dataclass(slots=True)
class _File:
    certain: bytes = b""
    pending: list[bytes] = field(default_factory=list)

    def content(self, variant: Variant) -> bytes:
        if not self.pending:
            return self.certain
        fresh = b"".join(self.pending)
        half = len(fresh) // 2
        survived = {
            "whole": fresh,
            "lost": b"",
            "half": fresh[:half],
            "zeros": bytes(len(fresh)),
            "torn": bytes(half) + fresh[half:],
        }
        return self.certain + survived[variant]


@dataclass(slots=True)
class _Directory:
    certain: dict[str, int] = field(default_factory=dict)
    pending: list[int] = field(default_factory=list)
    """Numbers of the entry operations since the last sync, in order."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of everything that was pending."""

    lost: frozenset[int]
    """Numbers of the entry operations that did not reach the disk."""
    variants: Mapping[int, Variant]
    """Of files with pending bytes; the others are whole."""


KILLED = Outcome(frozenset(), {})
"""The process is gone, the system is not."""


class Disk:
    """What the disk holds after a prefix of a journal, certain and pending. Operations are applied one by one."""

    def __init__(self) -> None:
        self.files: dict[int, _File] = {}
        self.directories: dict[int, _Directory] = {ROOT: _Directory()}
        self.indexes: dict[str, list[IndexCommit]] = {}
        self._entries: list[EntryOperation] = []

    def apply(self, operation: Operation) -> None:
        """Do what the program did."""
        match operation:
            case Enter() | Leave() | Move():
                if isinstance(operation, Enter) and operation.is_directory:
                    self.directories[operation.node] = _Directory()
                elif isinstance(operation, Enter):
                    self.files.setdefault(operation.node, _File())
                self.directories[operation.directory].pending.append(len(self._entries))
                self._entries.append(operation)
            case Write():
                self.files[operation.node].pending.append(operation.data)
            case Sync() if operation.node in self.files:
                file = self.files[operation.node]
                file.certain, file.pending = file.content("whole"), []
            case Sync():
                directory = self.directories[operation.node]
                directory.certain = self._names(directory, frozenset())
                directory.pending = []
            case Rot():
                file = self.files[operation.node]
                file.certain = _rotten(file.certain, operation.offset)
            case IndexCommit():
                self.indexes.setdefault(operation.repository, []).append(operation)

    def pending_entries(self) -> list[int]:
        """Numbers of the entry operations that may be lost."""
        return sorted(number for directory in self.directories.values() for number in directory.pending)

    def dirty_files(self) -> list[int]:
        """Files with bytes that may be lost, of those that can have a name."""
        named = {
            node for directory in self.directories.values() for node in self._names(directory, frozenset()).values()
        }
        return [node for node, file in self.files.items() if file.pending and node in named]

    def outcomes(self, rng: random.Random, *, exhaustive_max: int, random_count: int) -> Iterator[Outcome]:
        """After SIGKILL, and after power loss: everything possible when that is little, else what is likely to hurt.

        That is: all of it lost, each pending name alone lost and alone kept, each state of each file with all names
        there, and a random choice.
        """
        yield KILLED
        entries, files = self.pending_entries(), self.dirty_files()
        if 2 ** len(entries) * len(VARIANTS) ** len(files) <= exhaustive_max:
            for mask in itertools.product((False, True), repeat=len(entries)):
                lost = frozenset(itertools.compress(entries, mask))
                for variants in itertools.product(VARIANTS, repeat=len(files)):
                    yield Outcome(lost, dict(zip(files, variants, strict=True)))
            return
        everything = frozenset(entries)
        yield Outcome(everything, dict.fromkeys(files, "lost"))
        yield Outcome(frozenset(), dict.fromkeys(files, "lost"))
        for number in entries:
            yield Outcome(frozenset({number}), {})
            yield Outcome(everything - {number}, dict.fromkeys(files, "lost"))
        for node, variant in itertools.product(files, VARIANTS[1:]):
            yield Outcome(frozenset(), {node: variant})
        for _ in range(random_count):
            lost = frozenset(number for number in entries if rng.random() < 0.5)
            yield Outcome(lost, {node: rng.choice(VARIANTS) for node in files})

    def survivors(self, outcome: Outcome) -> dict[str, bytes]:
        """Every file that can be found, by its path."""
        return dict(self._walk(ROOT, "", outcome))

    def _walk(self, node: int, path: str, outcome: Outcome) -> Iterator[tuple[str, bytes]]:
        for name, child in self._names(self.directories[node], outcome.lost).items():
            if child in self.directories:
                yield from self._walk(child, f"{path}{name}/", outcome)
            else:
                yield path + name, self.files[child].content(outcome.variants.get(child, "whole"))

    def _names(self, directory: _Directory, lost: frozenset[int]) -> dict[str, int]:
        names = dict(directory.certain)
        for number in directory.pending:
            if number in lost:
                continue
            match self._entries[number]:
                case Enter(_, name, node):
                    names[name] = node
                case Leave(_, name):
                    names.pop(name, None)
                case Move(_, source, target, node):
                    names.pop(source, None)
                    names[target] = node
        return names


def _rotten(data: bytes, offset: int) -> bytes:
    return data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :]
