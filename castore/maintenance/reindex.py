"""Build the index again from the packs, which are the truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from castore.format.layout import PACKS, pack_name, parse_pack_name
from castore.ids import ChunkId
from castore.maintenance.tables import open_rows
from castore.repository import Handle

Progress = Callable[[int, int], None]
"""Called with (packs read, packs in all)."""


@dataclass(frozen=True, slots=True)
class ReindexReport:
    """What the new index holds."""

    pack_count: int
    chunk_count: int
    """Distinct chunks."""
    damaged_packs: tuple[tuple[str, str], ...]
    """(pack file, why its table cannot be read); what a scan found of them is in the index."""

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "pack_count": self.pack_count,
            "chunk_count": self.chunk_count,
            "damaged_packs": dict(self.damaged_packs),
        }


def reindex(handle: Handle, *, progress: Progress | None = None) -> ReindexReport:
    """Throw the index away and read the tables of all packs.

    Damaged packs are salvaged and reported. Raises StorageError when a pack cannot be read at all.
    """
    # Counted first: rebuilding finds the tables in the page cache then, and there is progress to show.
    names = (parse_pack_name(info.name) for info in handle.backend.list(PACKS))
    pack_ids = sorted(pack_id for pack_id in names if pack_id is not None)
    chunks: set[ChunkId] = set()
    damaged: list[tuple[str, str]] = []
    for number, pack_id in enumerate(pack_ids):
        if progress is not None:
            progress(number, len(pack_ids))
        rows, error = open_rows(handle.backend, pack_id, handle.hasher)
        chunks.update(row.chunk_id for row in rows)
        if error:
            damaged.append((pack_name(pack_id), error))
    pack_count = handle.store.rebuild()
    if progress is not None:
        progress(len(pack_ids), len(pack_ids))
    return ReindexReport(pack_count, len(chunks), tuple(damaged))
