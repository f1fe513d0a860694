"""Records known to be damaged, remembered beside the packs so that every later save stores their chunks again.

Whoever meets damage leaves a mark: the process that met it may end before anybody repairs it, and the next one would
rely on the same record. A mark only ever makes writers write more, so a false one does no harm and one that cannot be
read is passed over. Repair takes marks away, with the pack or when its records read right.

Mark file, damaged/<pack id>.<random> (textfile.py):   {"offsets": [int, …], "pack": pack id, "why": str}

The offsets are those of the stored payloads in the pack.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass

from castore.backend.base import Backend
from castore.errors import CastoreError, FormatError
from castore.format.layout import DAMAGED, new_mark_name
from castore.format.textfile import decode_text_file, encode_text_file, text_field
from castore.ids import PackId
from castore.options import TEXT_FILE_BYTES_MAX

_OFFSETS_MAX = 50_000
"""Of one mark, so that the file stays readable; a pack in a worse state is for repair anyway."""
_WHY_MAX = 2000


@dataclass(frozen=True, slots=True)
class DamageMark:
    """Records of one pack that did not read right."""

    name: str
    """Of the mark file."""
    pack_id: PackId
    offsets: tuple[int, ...]
    why: str


def leave_mark(backend: Backend, pack_id: PackId, offsets: Collection[int], *, why: str) -> None:
    """Remember damaged records. Does nothing where the repository cannot be written to: readers may be guests."""
    fields = {"pack": pack_id, "offsets": sorted(offsets)[:_OFFSETS_MAX], "why": why[:_WHY_MAX]}
    with suppress(CastoreError):
        backend.put_if_absent(new_mark_name(pack_id), encode_text_file(fields))


def read_mark(backend: Backend, name: str) -> DamageMark:
    """One mark. Raises DamageError or StorageError."""
    fields = decode_text_file(backend.read(name, max_bytes=TEXT_FILE_BYTES_MAX), name=name)
    offsets = text_field(fields, "offsets", list, name=name)
    if not all(isinstance(offset, int) for offset in offsets):
        raise FormatError(f"{name}: expected offsets, found {offsets!r:.80}")
    pack_id = PackId(text_field(fields, "pack", str, name=name))
    return DamageMark(name, pack_id, tuple(offsets), text_field(fields, "why", str, name=name))


def mark_names(backend: Backend) -> list[str]:
    """The mark files that are there."""
    return [info.name for info in backend.list(DAMAGED)]


def readable_marks(backend: Backend, *, known: Collection[str] = ()) -> Iterator[DamageMark]:
    """Every mark that can be read, but for the `known` ones."""
    for name in mark_names(backend):
        if name not in known:
            with suppress(CastoreError):
                yield read_mark(backend, name)
