"""Save and load in memory: what the checkpoint layer does with this package, without a repository."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from castore.format.identity import leaf_digest
from castore.format.manifest import Entry, Kind, decode_part, encode_part
from castore.hashing import hasher_for
from castore.options import INLINE_BYTES_MAX
from castore.tensors import (
    ARRAY_KINDS,
    FlatState,
    Payload,
    Target,
    allocate,
    assign,
    decode_value,
    flatten,
    live_target,
    match,
    select,
    unflatten,
)
from tests.tensors import quiet  # noqa: F401  importing it is what it is for

PIECE_BYTES = 48
"""Pieces in which payloads are read and targets written: small and a multiple of 16, as the grid is."""


def read_pieces(payload: Payload, piece_bytes: int = PIECE_BYTES) -> bytes:
    """All bytes of a payload, read range by range, backwards."""
    starts = range(0, payload.raw_bytes, piece_bytes)
    pieces = [bytes(payload.read(start, min(start + piece_bytes, payload.raw_bytes))) for start in reversed(starts)]
    return b"".join(reversed(pieces))


def write_pieces(target: Target, data: bytes, piece_bytes: int = PIECE_BYTES) -> None:
    """Fill a target range by range, backwards, or directly where it can be."""
    if target.direct:
        target.memory()[:] = data
    else:
        for start in reversed(range(0, len(data), piece_bytes)):
            target.write(start, data[start : start + piece_bytes])
    target.finish()


class Saved:
    """The entries of a state as a repository keeps them, and the bytes of its leaves by path."""

    def __init__(self, state: Any, *, allow_pickle: bool = False) -> None:
        flat = flatten(state, allow_pickle=allow_pickle)
        self.bytes = {
            entry.path: read_pieces(payload)
            for entry, payload in zip(flat.entries, flat.payloads, strict=True)
            if payload is not None
        }
        self.entries = _through_manifest(flat, self.bytes)

    def load(
        self,
        *,
        keep: Callable[[str], bool] | None = None,
        allow_pickle: bool = False,
        device: Any = None,
        classes: Mapping[str, type] | None = None,
        missing_classes: Any = "error",
    ) -> Any:
        """The state, or the part of it whose paths `keep` accepts."""
        entries = select(self.entries, keep) if keep else self.entries
        values = self.values(entries, allow_pickle=allow_pickle, device=device)
        return unflatten(entries, values, classes=classes, missing_classes=missing_classes)

    def values(self, entries: Iterable[Entry], *, allow_pickle: bool = False, device: Any = None) -> dict[str, Any]:
        """Loaded values of the entries that have bytes."""
        values: dict[str, Any] = {}
        for entry in entries:
            if entry.kind in ARRAY_KINDS:
                values[entry.path], target = allocate(entry, device=device)
                write_pieces(target, self.bytes_of(entry))
            elif entry.has_bytes:
                values[entry.path] = decode_value(entry, self.bytes_of(entry), allow_pickle=allow_pickle)
        return values

    def bytes_of(self, entry: Entry) -> bytes:
        """By content, as a repository has them: an entry that took an alias's path has its target's chunks."""
        if entry.inline is not None:
            return entry.inline
        return next(data for data in self.bytes.values() if len(data) == entry.raw_bytes and _ids(data) == entry.chunks)

    def load_into(self, live: Any, *, strict: bool = True) -> Any:
        """Fill a live state."""
        matched = match(flatten(live), self.entries)
        if strict:
            assert matched.is_exact, matched
        for pair in matched.pairs:
            write_pieces(live_target(pair.value, pair.entry), self.bytes_of(pair.entry))
        return assign(live, matched, self.values(matched.fresh))


def _ids(data: bytes) -> bytes:
    return hasher_for("xxh3-128").digest(data)


def _digest(data: bytes) -> bytes:
    return leaf_digest(hasher_for("xxh3-128"), len(data), _ids(data) if data else b"")


def _through_manifest(flat: FlatState, data: Mapping[str, bytes]) -> tuple[Entry, ...]:
    """Entries with bytes and ids filled in, encoded and decoded again (leaves here are shorter than a chunk)."""
    filled = []
    for entry in flat.entries:
        if entry.kind is Kind.VIEW:
            entry = replace(entry, digest=_digest(data[entry.path]))
        elif entry.has_bytes and entry.raw_bytes <= INLINE_BYTES_MAX:
            entry = replace(entry, inline=data[entry.path])
        elif entry.has_bytes:
            entry = replace(entry, chunks=_ids(data[entry.path]))
        filled.append(entry)
    return tuple(decode_part(encode_part(filled), id_bytes=16, where="test"))


def round_trip(state: Any, **options: Any) -> Any:
    """Save and load a state."""
    return Saved(state).load(**options)
