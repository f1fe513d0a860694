"""A repository as its parity shows it: packs that lost stretches are read as they were.

For repair, which takes from it what the repository itself has lost:

    RepositorySource(restoring_handle(handle), handle.hasher)

Read-only: nothing here writes, and the packs themselves stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from castore.backend.base import Backend, FileInfo, RangeReader
from castore.errors import CastoreError, DamageError, NotFoundError, RepositoryAccessError
from castore.format.layout import PACKS, pack_name, parity_name, parse_pack_name
from castore.ids import Buffer, PackId
from castore.maintenance.parity import parity_sizes
from castore.parity.restore import ParityFile, find_losses, open_parity, restore_pack
from castore.repository import Handle


def restoring_handle(handle: Handle) -> Handle:
    """A second handle to the same repository that reads packs through their parity; close it after use.

    A pack that has parity is read once, whole, when it is opened. One that lost more than its parity restores is read
    as it is. Raises MissingExtraError when a pack needs to be restored and `castore[parity]` is not there.
    """
    return Handle(cast("Backend", _RestoringBackend(handle.backend)), handle.config, clock=handle.clock)


class _RestoringBackend:
    """The backend of a repository, its packs restored. What is not named here is the inner backend's."""

    def __init__(self, inner: Backend) -> None:
        self._inner = inner
        self._covered = parity_sizes(inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    @property
    def location(self) -> str:
        return f"the parity of {self._inner.location}"

    def put_if_absent(self, name: str, data: Buffer) -> bool:
        """Refused, so that no damage is marked here: it may be of a pack that is only restored, and in quarantine."""
        del data
        raise RepositoryAccessError(f"{self.location}: {name} cannot be written: this view is only read")

    def local_path(self, name: str) -> Path | None:
        """None: neither mapped files nor the index beside the repository show what was restored."""
        del name
        return None

    def list(self, prefix: str) -> Iterator[FileInfo]:
        """With the packs that are gone and have parity: enough of it brings them back."""
        files = list(self._inner.list(prefix))
        yield from files
        if prefix == PACKS:
            present = {info.name for info in files}
            for pack_id in sorted(self._covered):
                if pack_name(pack_id) not in present:
                    with_parity = self._restored(pack_id, None)
                    if with_parity is not None:
                        yield FileInfo(pack_name(pack_id), with_parity.size_bytes, 0)

    def open_reader(self, name: str) -> RangeReader:
        pack_id = parse_pack_name(name)
        if pack_id is None or pack_id not in self._covered:
            return self._inner.open_reader(name)
        try:
            pack = self._inner.open_reader(name)
        except CastoreError:
            restored = self._restored(pack_id, None)
            if restored is None:
                raise
            return restored
        return self._restored(pack_id, pack) or pack

    def _restored(self, pack_id: PackId, pack: RangeReader | None) -> RangeReader | None:
        """The pack as it was; None where its parity cannot bring it back, or need not."""
        try:
            reader = self._inner.open_reader(parity_name(pack_id))
        except CastoreError:
            return None
        try:
            parity: ParityFile = open_parity(reader, pack_id, where=parity_name(pack_id))
            losses = find_losses(pack, parity)
            if pack is not None and not losses.cells and pack.size_bytes == parity.layout.pack_bytes:
                return None
            return restore_pack(pack, parity, losses, where=parity_name(pack_id))
        except (DamageError, NotFoundError):
            return None
        finally:
            reader.close()
