"""Tensor files outside of a repository: .pt and .safetensors, read with suspicion and written atomically.

torch is imported when a file is really read or written, never before.
"""

from __future__ import annotations

import errno
import importlib
import mmap
import os
import re
import secrets
import stat
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, Literal, cast

from castore.cli import safetensors_format as safetensors
from castore.errors import (
    ChecksumError,
    FormatError,
    MissingExtraError,
    NotFoundError,
    PickleRefusedError,
    StorageError,
    UsageError,
)

FileFormat = Literal["pt", "safetensors"]

SUFFIXES: Mapping[str, FileFormat] = {
    ".pt": "pt",
    ".pth": "pt",
    ".ckpt": "pt",
    ".bin": "pt",
    ".safetensors": "safetensors",
}

_ZIP_MAGIC = b"PK\x03\x04"
_CRC_READ_BYTES = 1024 * 1024
_FORBIDDEN_GLOBAL = re.compile(r"[Uu]nsupported (?:global: )?GLOBAL ([\w.]+)")
_BOILERPLATE = re.compile(r"Weights only load failed|\(\d\)|Check the documentation|Please")
"""Lines of torch's messages that say nothing about the file."""


def format_of(path: Path) -> FileFormat:
    """The format that the file's name ends in. Raises UsageError."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(f"{path}: unknown kind of file {suffix!r}; castore reads and writes {', '.join(SUFFIXES)}")
    return SUFFIXES[suffix]


@dataclass(frozen=True, slots=True)
class Contents:
    """What a file held."""

    state: Any
    metadata: Mapping[str, str] = field(default_factory=dict)
    """`__metadata__` of a .safetensors file."""


# ---- reading -----------------------------------------------------------------------------------------------


def read_file(path: Path, *, allow_pickle: bool) -> Contents:
    """The state in a file; tensors on the CPU, those of .safetensors mapped from the file and not copied.

    Raises UsageError (unknown suffix), FormatError or ChecksumError (foreign, cut short, damaged),
    PickleRefusedError, MissingExtraError, or OSError.
    """
    kind = format_of(path)
    _check_regular(path)
    if kind == "safetensors":
        return _read_safetensors(path)
    return Contents(_read_pt(path, allow_pickle=allow_pickle))


def _check_regular(path: Path) -> None:
    if not path.exists():
        raise NotFoundError(f"{path}: no such file")
    if not stat.S_ISREG(path.stat().st_mode):
        raise UsageError(f"{path} is not a file; give a file of the kind {', '.join(SUFFIXES)}")


def _read_safetensors(path: Path) -> Contents:
    where = str(path)
    with path.open("rb") as file:
        file_bytes = os.fstat(file.fileno()).st_size
        length = safetensors.header_length(file.read(8), file_bytes=file_bytes, where=where)
        header = safetensors.decode_header(file.read(length), file_bytes=file_bytes, where=where)
        # Copy on write: torch wants writable memory, and the file must stay as it is.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    torch = _torch(f"reading {path.name}")
    state: dict[str, Any] = {}
    for place in header.tensors:
        name, item_bytes = safetensors.DTYPES[place.code]
        dtype = getattr(torch, name, None)
        if dtype is None:
            raise MissingExtraError(
                f"{path}: tensor {place.name!r}: torch {torch.__version__} has no {name}; install a newer one"
            )
        count = (place.stop - place.start) // item_bytes
        if count:
            flat = torch.frombuffer(mapped, dtype=dtype, count=count, offset=header.data_offset + place.start)
        else:
            flat = torch.empty(0, dtype=dtype)
        state[place.name] = flat.reshape(place.shape)
    return Contents(state, header.metadata)


def _read_pt(path: Path, *, allow_pickle: bool) -> Any:
    archive = _check_archive(path)
    torch = _torch(f"reading {path.name}")
    try:
        return torch.load(path, map_location="cpu", weights_only=not allow_pickle)
    except (MemoryError, OSError):
        raise
    except Exception as error:
        text = str(error)
        doubt = "" if archive else " (unless it is cut short)"
        if refused := _FORBIDDEN_GLOBAL.search(text):
            raise PickleRefusedError(
                f"{path} holds a {refused.group(1)}{doubt}, not only tensors and plain values; reading that can run "
                "any code of whoever wrote the file: give --allow-pickle if you trust them"
            ) from error
        if isinstance(error, ImportError | AttributeError):
            raise FormatError(f"{path} needs a class that is not here{doubt}: {text}") from error
        what = "torch cannot read it" if archive else "not a file of torch.save, or cut short"
        raise FormatError(f"{path}: {what} ({type(error).__name__}: {_reason(text)})") from error


def _reason(text: str) -> str:
    """The line of one of torch's messages that says something, without what it says each time."""
    lines = (line.strip() for line in text.splitlines())
    return next((line[:160] for line in lines if line and not _BOILERPLATE.match(line)), "no reason given")


def _check_archive(path: Path) -> bool:
    """Whether it is a zip archive, as torch.save writes; then its CRCs are compared: torch.load does not.

    A CRC of 0 says that it was not computed (`torch.serialization.set_crc32_options(False)`).
    """
    with path.open("rb") as file:
        if file.read(len(_ZIP_MAGIC)) != _ZIP_MAGIC:
            return False
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                _check_member(archive, member, path)
    except (zipfile.BadZipFile, NotImplementedError, zlib.error, EOFError) as error:
        raise FormatError(f"{path}: not a file of torch.save, or cut short: {error}") from error
    return True


def _check_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> None:
    expected, found = member.CRC, 0
    if not expected:
        return
    member.CRC = None  # type: ignore[assignment]  # then zipfile leaves the comparison, and its message, to us
    with archive.open(member) as file:
        while block := file.read(_CRC_READ_BYTES):
            found = zlib.crc32(block, found)
    if found != expected:
        raise ChecksumError(
            f"{path}: {member.filename}: expected CRC {expected:08x}, found {found:08x}; the file changed "
            "after it was written"
        )


# ---- writing -----------------------------------------------------------------------------------------------


def write_pt(path: Path, state: Any, *, force: bool) -> None:
    """Write a state as torch.save does."""
    torch = _torch(f"writing {path.name}")
    with atomic_file(path, force=force) as file:
        torch.save(state, file)


def write_safetensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str], *, force: bool) -> None:
    """Write tensors or arrays by name. Raises UsageError for a type of element that the format lacks."""
    described = [(name, _code(name, tensor), tuple(tensor.shape)) for name, tensor in tensors.items()]
    head, places = safetensors.encode_header(described, metadata)
    with atomic_file(path, force=force) as file:
        file.write(head)
        for place in places:
            file.write(_row_major(tensors[place.name]))


def element_name(tensor: Any) -> str:
    """The name of a tensor's or array's element type, without "torch."."""
    name: str = getattr(tensor.dtype, "name", "") or str(tensor.dtype).removeprefix("torch.")
    return name


def _code(name: str, tensor: Any) -> str:
    code = safetensors.CODES.get(element_name(tensor))
    if code is None:
        raise UsageError(f"{name!r}: .safetensors has no element type {element_name(tensor)}; export to .pt instead")
    return code


def _row_major(tensor: Any) -> memoryview:
    """The bytes of a tensor or array; copied only when they do not lie in row-major order on the CPU."""
    import numpy as np

    if isinstance(tensor, np.ndarray):
        array = np.ascontiguousarray(tensor.astype(tensor.dtype.newbyteorder("<"), copy=False))
    else:
        torch = _torch("writing tensors")
        plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        array = plain.reshape(-1).view(torch.uint8).numpy()
    return array.reshape(-1).view(np.uint8).data


@contextmanager
def atomic_file(path: Path, *, force: bool) -> Iterator[BinaryIO]:
    """A new file that appears under its name whole and durable, or not at all.

    Raises FileExistsError when the name is taken and not `force`, or OSError.
    """
    if not force:
        check_absent(path)
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(6)}.tmp")
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as plain:
            file = _FileThatRemembers(plain)
            try:
                yield cast("BinaryIO", file)
                plain.flush()
            except Exception as error:
                # torch turns a full disk into a RuntimeError about its own position in the file.
                raise file.failure or error from error
            os.fsync(plain.fileno())
        _publish(temporary, path, force=force)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and not isinstance(error, StorageError | FileExistsError):
            raise _said(error, path) from error
        raise
    _sync_directory(path.parent)


class _FileThatRemembers:
    """A file to write to that keeps the first error of the system, whatever the writer makes of it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.failure = self.failure or error
            raise

    def flush(self) -> None:
        try:
            self._file.flush()
        except OSError as error:
            self.failure = self.failure or error
            raise


def _publish(temporary: Path, path: Path, *, force: bool) -> None:
    """Give the file its name; a link refuses a name that was taken meanwhile, a rename would overwrite it."""
    if not force:
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise _exists(path) from None
        except OSError:
            if path.exists():
                raise _exists(path) from None
        else:
            temporary.unlink()
            return
    temporary.replace(path)


def check_absent(path: Path) -> None:
    """Raises FileExistsError."""
    if path.exists():
        raise _exists(path)


def _exists(path: Path) -> FileExistsError:
    return FileExistsError(errno.EEXIST, "the file exists; --force overwrites it", str(path))


def _said(error: OSError, path: Path) -> OSError:
    """The same error, about the file that the user named."""
    return type(error)(error.errno, error.strerror, str(path)) if error.errno is not None else error


def _sync_directory(directory: Path) -> None:
    """The new name is not durable before. A file system that cannot sync directories is no error."""
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _torch(why: str) -> ModuleType:
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise MissingExtraError(f"{why} needs torch, which is not installed: pip install torch") from error
