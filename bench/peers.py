"""The contestants: one small class each, with the best use of its own interface that we know of.

    castore            this project, as it comes: xxh3-128, compression auto
    castore_async      the same through save_async: the call returns when the state is staged
    castore_blake3     the same with blake3 as hash
    castore_none       the same with compression="none", loaded by mapping
    torch_save         torch.save, fsync of file and directory
    torch_save_zstd    torch.save through zstandard level 3, all cores, fsync of file and directory
    safetensors        save_file of all tensors, the rest of the state as JSON in its metadata, fsync of both
    dcp                torch.distributed.checkpoint, one process without a group; syncs its files itself
    moonclip           moonclip in its default mode: lossless deltas, asynchronous; durable after flush()

A state counts as stored only with everything in it (optimizer, scheduler, rng, step), and as durable only
after fsync. `save` returns as early as the contestant lets it, `wait` when the state is durable. States are
numbered from 0 in the order in which they were saved. `close` and `open` forget everything held in memory,
as a new process would have to.
"""

from __future__ import annotations

import io
import json
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch

from bench.states import LeafPath, State, map_leaves, same_memory

ZSTD_LEVEL = 3


class Contestant(ABC):
    """A store of training states in one directory."""

    name: ClassVar[str]
    package: ClassVar[str]
    """The distribution whose version is reported."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @classmethod
    def missing(cls) -> str | None:
        """Why it cannot take part here; None when it can."""
        return None if find_spec(cls.package) else f"{cls.package} is not installed (see the `bench` extra)"

    @classmethod
    def versions(cls) -> dict[str, str]:
        return {cls.package: version(cls.package)}

    def open(self) -> None:  # noqa: B027  # plain files need no opening
        """Open the store, made on the first call."""

    def close(self) -> None:  # noqa: B027  # plain files need no closing
        """Release the store and everything held in memory for it."""

    @abstractmethod
    def save(self, state: State, *, step: int) -> None: ...

    def wait(self) -> None:  # noqa: B027  # most are durable when save returns
        """Block until everything saved is durable."""

    @abstractmethod
    def load(self, index: int) -> State: ...

    @abstractmethod
    def load_leaf(self, index: int, path: LeafPath) -> torch.Tensor: ...

    def fork(self, index: int) -> None:  # noqa: B027  # without branches there is nothing to do
        """Make the next save continue from state `index`."""


class _Files(Contestant):
    """One file per state."""

    suffix: ClassVar[str]

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._count = 0

    def save(self, state: State, *, step: int) -> None:  # noqa: ARG002  # files are numbered
        path = self.path(self._count)
        self._count += 1
        unfinished = path.with_suffix(".part")
        self.write(state, unfinished)
        _sync(unfinished)
        unfinished.rename(path)
        _sync(self.directory)

    def path(self, index: int) -> Path:
        return self.directory / f"{index:04d}{self.suffix}"

    @abstractmethod
    def write(self, state: State, path: Path) -> None: ...


class TorchSave(_Files):
    name = "torch_save"
    package = "torch"
    suffix = ".pt"

    def write(self, state: State, path: Path) -> None:
        torch.save(state, path)

    def load(self, index: int) -> State:
        state: State = torch.load(self.path(index), weights_only=True)
        return state

    def load_leaf(self, index: int, path: LeafPath) -> torch.Tensor:
        mapped = torch.load(self.path(index), weights_only=True, mmap=True)
        return _tensor_at(mapped, path).clone()


class TorchSaveZstd(_Files):
    name = "torch_save_zstd"
    package = "zstandard"
    suffix = ".pt.zst"

    def write(self, state: State, path: Path) -> None:
        import zstandard

        compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL, threads=-1)
        with path.open("wb") as file, compressor.stream_writer(file, closefd=False) as stream:
            torch.save(state, stream)

    def load(self, index: int) -> State:
        import zstandard

        with self.path(index).open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
            state: State = torch.load(io.BytesIO(stream.read()), weights_only=True)
        return state

    def load_leaf(self, index: int, path: LeafPath) -> torch.Tensor:
        return _tensor_at(self.load(index), path)


class Safetensors(_Files):
    name = "safetensors"
    package = "safetensors"
    suffix = ".safetensors"

    def write(self, state: State, path: Path) -> None:
        from safetensors.torch import save_file

        flat: dict[str, torch.Tensor] = {}
        skeleton = _to_skeleton(state, (), flat, {})
        save_file(flat, path, metadata={"state": json.dumps(skeleton)})

    def load(self, index: int) -> State:
        from safetensors import safe_open
        from safetensors.torch import load_file

        with safe_open(self.path(index), framework="pt") as file:
            skeleton = json.loads(file.metadata()["state"])
        state: State = _from_skeleton(skeleton, load_file(self.path(index)))
        return state

    def load_leaf(self, index: int, path: LeafPath) -> torch.Tensor:
        from safetensors import safe_open

        with safe_open(self.path(index), framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor("/".join(map(str, path)))
        return tensor


class Dcp(Contestant):
    name = "dcp"
    package = "torch"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._shapes: list[State] = []

    def save(self, state: State, *, step: int) -> None:  # noqa: ARG002  # directories are numbered
        from torch.distributed.checkpoint.state_dict_saver import save

        path = self._path(len(self._shapes))
        self._shapes.append(map_leaves(_on_meta, state))
        with _single_process():
            save(state, checkpoint_id=path, no_dist=True)
        _sync(path)
        _sync(self.directory)

    def load(self, index: int) -> State:
        return self._load(index, self._shapes[index])

    def load_leaf(self, index: int, path: LeafPath) -> torch.Tensor:
        wanted: Any = _at(self._shapes[index], path)
        for key in reversed(path):
            wanted = {key: wanted}
        return _tensor_at(self._load(index, wanted), path)

    def _load(self, index: int, shapes: State) -> State:
        """DCP fills tensors that exist: their allocation is part of what a load costs."""
        from torch.distributed.checkpoint.state_dict_loader import load

        target: State = map_leaves(_allocate, shapes)
        with _single_process():
            load(target, checkpoint_id=self._path(index), no_dist=True)
        return target

    def _path(self, index: int) -> Path:
        return self.directory / f"{index:04d}"


class Moonclip(Contestant):
    name = "moonclip"
    package = "moonclip"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._ids: list[str] = []
        self._manager: Any = None

    def open(self) -> None:
        from moonclip import CheckpointManager

        self._manager = CheckpointManager(str(self.directory))

    def close(self) -> None:
        self._manager = None

    def save(self, state: State, *, step: int) -> None:
        rest = {key: value for key, value in state.items() if key not in ("model", "optimizer")}
        self._ids.append(
            self._manager.save(step=step, model=_HasStateDict(state["model"]), optimizer=state["optimizer"], extra=rest)
        )

    def wait(self) -> None:
        self._manager.flush()

    def load(self, index: int) -> State:
        loaded = self._manager.load(self._ids[index])
        return {key.removeprefix("extra/"): value for key, value in loaded.items()}

    def load_leaf(self, index: int, path: LeafPath) -> torch.Tensor:
        """Names and dtypes come from the snapshot's description, which reads nothing."""
        name = "/".join(map(str, path))
        described = {t["name"]: t for t in self._manager.describe(self._ids[index])["tensors"]}[name]
        raw = self._manager.load_tensors(self._ids[index], [name])[name]
        return torch.frombuffer(raw, dtype=getattr(torch, described["dtype"])).reshape(described["shape"])


class Castore(Contestant):
    name = "castore"
    package = "castore"
    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, directory: Path) -> None:
        super().__init__(directory / "store")
        self._ids: list[str] = []
        self._branch = "main"
        self._repo: Any = None

    def open(self) -> None:
        import castore

        existing = self.directory.exists()
        self._repo = castore.open(self.directory) if existing else castore.init(self.directory, **self.options)

    def close(self) -> None:
        self._repo.close()

    @classmethod
    def versions(cls) -> dict[str, str]:
        import castore

        return {"castore": str(getattr(castore, "__version__", "unknown"))}

    def save(self, state: State, *, step: int) -> None:
        self._ids.append(self._repo.save(state, step=step, branch=self._branch).id)

    def load(self, index: int) -> State:
        state: State = self._repo.load(self._ids[index])
        return state

    def load_leaf(self, index: int, path: LeafPath) -> torch.Tensor:
        tensor: torch.Tensor = self._repo.read(self._ids[index], "/".join(map(str, path)))
        return tensor

    def fork(self, index: int) -> None:
        self._branch = "fork"
        self._repo.branch(self._branch, at=self._ids[index])


class CastoreAsync(Castore):
    name = "castore_async"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._pending: list[Any] = []

    @classmethod
    def missing(cls) -> str | None:
        reason = super().missing()
        if reason:
            return reason
        import castore

        return None if hasattr(castore.Repository, "save_async") else "it has no asynchronous saves yet"

    def save(self, state: State, *, step: int) -> None:
        self._pending.append(self._repo.save_async(state, step=step, branch=self._branch))

    def wait(self) -> None:
        self._ids.extend(handle.result().id for handle in self._pending)
        self._pending.clear()


class CastoreBlake3(Castore):
    name = "castore_blake3"
    options: ClassVar[dict[str, Any]] = {"hash": "blake3"}


class CastoreNone(Castore):
    name = "castore_none"
    options: ClassVar[dict[str, Any]] = {"compression": "none"}

    def load(self, index: int) -> State:
        state: State = self._repo.load(self._ids[index], mmap=True)
        return state


CONTESTANTS: dict[str, type[Contestant]] = {
    cls.name: cls
    for cls in (
        Castore,
        CastoreAsync,
        CastoreBlake3,
        CastoreNone,
        TorchSave,
        TorchSaveZstd,
        Safetensors,
        Dcp,
        Moonclip,
    )
}


class _HasStateDict:
    """A model as moonclip wants it: something with a state_dict."""

    def __init__(self, state: dict[str, Any]) -> None:
        self._state = state

    def state_dict(self) -> dict[str, Any]:
        return self._state


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _at(tree: Any, path: LeafPath) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _tensor_at(tree: Any, path: LeafPath) -> torch.Tensor:
    tensor: torch.Tensor = _at(tree, path)
    return tensor


def _on_meta(leaf: Any) -> Any:
    """A tensor without memory; other leaves as None, so that a load which skips them is noticed."""
    return leaf.to("meta") if torch.is_tensor(leaf) else None


def _allocate(leaf: Any) -> Any:
    return torch.empty_like(leaf, device="cpu") if torch.is_tensor(leaf) else leaf


@contextmanager
def _single_process() -> Iterator[None]:
    """DCP warns that it assumes one process, which is what is wanted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _to_skeleton(
    value: Any, path: LeafPath, flat: dict[str, torch.Tensor], seen: dict[tuple[Any, ...], str]
) -> dict[str, Any]:
    """The nesting as JSON; tensors go to `flat`, exact aliases once (safetensors refuses shared memory)."""
    if torch.is_tensor(value):
        name = "/".join(map(str, path))
        memory = same_memory(value)
        if memory is not None:
            name = seen.setdefault(memory, name)
        flat[name] = value.contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _to_skeleton(item, (*path, key), flat, seen)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_to_skeleton(item, (*path, index), flat, seen) for index, item in enumerate(value)]}
    return {"value": value}


def _from_skeleton(node: dict[str, Any], flat: dict[str, torch.Tensor]) -> Any:
    [(kind, value)] = node.items()
    if kind == "tensor":
        return flat[value]
    if kind == "dict":
        return {key: _from_skeleton(item, flat) for key, item in value}
    if kind == "value":
        return value
    items = [_from_skeleton(item, flat) for item in value]
    return items if kind == "list" else tuple(items)
