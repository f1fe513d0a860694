"""Repositories on any backend, and what tests do to them from outside: condemn packs, delete them, damage them."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from castore.api import Repository
from castore.backend import LocalBackend, MemoryBackend
from castore.backend.base import Backend
from castore.format.config import Config, decode_config, encode_config, new_features
from castore.format.layout import CONFIG, pack_name
from castore.format.textfile import encode_text_file
from castore.ids import PackId
from castore.leases import list_leases
from castore.options import TEXT_FILE_BYTES_MAX, RepositoryOptions
from castore.repository import Handle
from castore.store import list_packs

Hook = Callable[[str, str], None]
"""Called with (operation, file name) before a backend call."""


def create_on(backend: Backend, options: RepositoryOptions | None = None) -> Repository:
    """A new repository on any backend."""
    config = Config(os.urandom(16), options or RepositoryOptions(), 0, new_features())
    backend.put_if_absent(CONFIG, encode_config(config))
    return open_on(backend)


def open_on(backend: Backend) -> Repository:
    """A fresh handle to the repository on a backend, as another process would have it.

    The config is read past a fault or hook, so that call 0 is the first of the operation.
    """
    inner: Backend = getattr(backend, "inner", backend)
    config = decode_config(inner.read(CONFIG, max_bytes=TEXT_FILE_BYTES_MAX), where=CONFIG)
    return Repository(backend.location, Handle(backend, config))


def copied(backend: Backend) -> MemoryBackend:
    """The same files in memory, to be spoiled."""
    copy = MemoryBackend()
    for name, data in files_of(backend).items():
        copy.put_if_absent(name, data)
    return copy


def files_of(backend: Backend, prefix: str = "") -> dict[str, bytes]:
    """Every file but those of the cache."""
    return {
        info.name: backend.read(info.name, max_bytes=info.size_bytes)
        for info in backend.list(prefix)
        if not info.name.startswith("cache/")
    }


def held_leases(backend: Backend) -> list[str]:
    """Names of the leases that look alive."""
    return [lease.name for lease in list_leases(backend) if lease.held]


# ---- what a collector does ---------------------------------------------------------------------------------------


def condemn(backend: Backend, packs: Iterable[PackId]) -> str:
    """Publish a condemned set as a collector does; returns the name of its file."""
    name = f"gc/{secrets.token_hex(16)}.condemned"
    assert backend.put_if_absent(name, encode_text_file({"condemned_ns": 1, "packs": sorted(packs)}))
    return name


def delete_packs(backend: Backend, packs: Iterable[PackId]) -> None:
    """What a collector does in the end."""
    for pack_id in packs:
        backend.delete(pack_name(pack_id))


class Collector:
    """Condemns all packs that stand when it begins; deletes them, and then its own file, when it ends."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._packs: frozenset[PackId] = frozenset()
        self._file = ""

    def begin(self) -> None:
        self._packs = packs_of(open_on(self._backend))
        self._file = condemn(self._backend, self._packs)

    def end(self) -> None:
        """Once; nothing where it has not begun."""
        if self._file:
            delete_packs(self._backend, self._packs)
            self._backend.delete(self._file)
        self._file = ""


def packs_of(repository: Repository) -> frozenset[PackId]:
    """The packs that stand now."""
    return list_packs(repository.handle.backend)


# ---- backends with a hook ----------------------------------------------------------------------------------------


class HookedBackend:
    """A backend that calls a hook before each of its calls; the hook may do to the inner backend what it likes."""

    def __init__(self, inner: Backend, hook: Hook = lambda operation, name: None) -> None:
        self.inner = inner
        self.hook = hook
        self.calls: list[tuple[str, str]] = []
        self._muted = False

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(self.inner, attribute)
        if not callable(value) or attribute == "local_path":
            return value

        def call(*args: Any, **options: Any) -> Any:
            name = args[0] if args else ""
            if not self._muted:
                self.calls.append((attribute, name))
                with self._quiet():
                    self.hook(attribute, name)
            return value(*args, **options)

        return call

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """What the hook does is not counted."""
        self._muted = True
        try:
            yield
        finally:
            self._muted = False


def at_call(number: int, action: Callable[[], object], *, operation: str = "") -> Hook:
    """A hook that acts once, before call `number` (of that operation, if one is given)."""
    seen = 0

    def hook(found: str, name: str) -> None:
        nonlocal seen
        if not operation or found == operation:
            seen += 1
            if seen == number + 1:
                action()

    return hook


def local(repository: Repository) -> LocalBackend:
    """The repository's backend, known to be local."""
    backend = repository.handle.backend
    assert isinstance(backend, LocalBackend)
    return backend
