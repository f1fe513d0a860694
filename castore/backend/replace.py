"""Replace a small file whatever it holds: compare-and-swap against what was found, until nobody comes between."""

from __future__ import annotations

from collections.abc import Callable

from castore.backend.base import Backend
from castore.errors import DamageError, NotFoundError
from castore.options import TEXT_FILE_BYTES_MAX

_FOUND_BYTES_MAX = 64 * TEXT_FILE_BYTES_MAX
"""Of what lies there: a damaged file must be replaceable, were it longer than such a file may be."""


def replace_file(backend: Backend, name: str, new: bytes | None, *, keep: Callable[[], object] | None = None) -> bool:
    """Put `new` in the place of what is there, durably; None removes it. Whether anything was changed.

    `keep` is asked when a file is there, and says whether that is as good; one that it finds damaged never is. Raises
    FormatError for a file of more than 64 MiB, StorageError.
    """
    while True:
        try:
            old: bytes | None = backend.read(name, max_bytes=_FOUND_BYTES_MAX)
        except NotFoundError:
            old = None
        if old is None and new is None:
            return False
        if old is not None and keep is not None and _is_kept(keep):
            return False
        if backend.compare_and_swap(name, expected=old, new=new):
            return True


def _is_kept(keep: Callable[[], object]) -> bool:
    try:
        return bool(keep())
    except DamageError:
        return False
