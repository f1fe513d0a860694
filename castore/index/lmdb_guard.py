"""The guard: a digest of every page that LMDB uses, beside its data file, so that LMDB never maps a damaged
one.

    index.guard (64 bytes, then 8 for each page; in the machine's own order, as the data file is)
        0   8  magic "CASTGARD"
        8   2  format version               of the guard and of the entries in the data file
       10   2  n, width of a chunk id
       12   4  page bytes
       16  16  repository id
       32   8  LMDB's transaction
       40   8  page count, c
       48   8  zero
       56   8  xxh3-64 of bytes 0-55 and of the digests
       64  8c  xxh3-64 of each page; 0: free, its bytes mean nothing

Why a digest per page and not one of the whole file. LMDB is copy-on-write: a transaction writes only to pages
that were free before it, to pages behind the last one, and to the metas. So after a save the digests of exactly
those pages are taken, and the cost follows the change, not the index: 2 ms for 300 chunks among 300 thousand,
3 ms among 3 million, where to hash the whole file costs 5 and 75 ms (measured; files of 52 and 745 MB, two
thirds of it free pages left by the rebuild). And a page is digested only when LMDB has just written it, so that
rot between two saves stays visible; a fresh digest of the whole file would bless it. Opening still reads every
used page: 12 ms and 120 ms.

A process killed between LMDB's commit and the guard's write (a millisecond in each save) leaves the guard
behind, which looks like damage and costs a rebuild: no transaction is trusted that no guard vouches for.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from castore.backend.syscalls import start_writeback
from castore.errors import DamageError, StorageError
from castore.index.cache_files import open_regular
from castore.index.lmdb_file import META_PAGES, FreeLists, Meta, changed_pages

GUARD_VERSION = 0
_MAGIC = b"CASTGARD"
_HEADER = struct.Struct("=8sHHI16sQQ8xQ")
_READ_BYTES = 1 << 16
"""Read at a time: free pages lie in runs, which larger pieces would not skip; smaller ones cost calls."""
_FREE, _USED = 0, 1
"""A free page has no digest; a used one has another than 0, or 1 in its place."""


@dataclass(slots=True)
class Guard:
    """What the data file must look like. Mutable: it follows the file from transaction to transaction."""

    repository_id: bytes
    id_bytes: int
    page_bytes: int = 0
    transaction: int = -1
    digests: array[int] = field(default_factory=lambda: array("Q"))

    def encode(self) -> bytes:
        """The bytes of the guard file."""
        header = _HEADER.pack(
            _MAGIC,
            GUARD_VERSION,
            self.id_bytes,
            self.page_bytes,
            self.repository_id,
            self.transaction,
            len(self.digests),
            0,
        )[:-8]
        digests = self.digests.tobytes()
        return b"".join((header, _sum(header, digests), digests))

    def update(self, fd: int, meta: Meta, *, before: FreeLists, after: FreeLists) -> None:
        """Follow the file to the transaction of `meta`: digest what became used, drop what became free.

        `before` are the free lists of `self.transaction`. Raises DamageError when they contradict the file.
        """
        count_before = len(self.digests)
        if count_before == 0:
            self.page_bytes = meta.page_bytes
        if meta.page_count < count_before or meta.page_bytes != self.page_bytes:
            raise DamageError(f"the file shrank from {count_before} to {meta.page_count} pages")
        self.transaction = -1  # until all digests are in place
        self.digests.extend(array("Q", bytes(8 * (meta.page_count - count_before))))
        became_used, became_free = changed_pages(before, after)
        if max(became_used | became_free, default=0) >= meta.page_count:
            raise DamageError(f"the free lists name pages that lie outside the file's {meta.page_count}")
        for page in became_free:
            self.digests[page] = _FREE
        added = set(range(count_before, meta.page_count)) - became_free
        for start, stop in _runs(became_used | added | set(range(META_PAGES)), _READ_BYTES // self.page_bytes):
            expected = array("Q", [_USED]) * (stop - start)
            self.digests[start:stop] = _digest_pages(fd, start, expected, page_bytes=self.page_bytes)
        self.transaction = meta.transaction

    def check(self, fd: int, meta: Meta) -> None:
        """Read every used page and compare. Raises DamageError."""
        if (self.transaction, len(self.digests)) != (meta.transaction, meta.page_count):
            raise DamageError(
                f"expected transaction {self.transaction} with {len(self.digests)} pages, "
                f"found {meta.transaction} with {meta.page_count}"
            )
        if self.page_bytes != meta.page_bytes:
            raise DamageError(f"expected pages of {self.page_bytes} bytes, found {meta.page_bytes}")
        step = _READ_BYTES // self.page_bytes
        for start in range(0, len(self.digests), step):
            expected = self.digests[start : start + step]
            if any(expected) and _digest_pages(fd, start, expected, page_bytes=self.page_bytes) != expected:
                raise DamageError(f"a page from {start} to {start + len(expected) - 1} has changed")


def decode_guard(data: bytes, *, repository_id: bytes, id_bytes: int) -> Guard:
    """The guard, its claims checked. Raises DamageError when it is damaged, or guards an index of something
    else.
    """
    if len(data) < _HEADER.size:
        raise DamageError(f"guard: expected at least {_HEADER.size} bytes, found {len(data)}")
    magic, version, width, page_bytes, found_id, transaction, count, _ = _HEADER.unpack_from(data)
    digests = data[_HEADER.size :]
    if (magic, version) != (_MAGIC, GUARD_VERSION):
        raise DamageError(
            f"guard: expected magic {_MAGIC!r} version {GUARD_VERSION}, found {magic!r} version {version}"
        )
    if _sum(data[: _HEADER.size - 8], digests) != data[_HEADER.size - 8 : _HEADER.size] or len(digests) != 8 * count:
        raise DamageError("guard: the bytes changed after they were written")
    if (found_id, width) != (repository_id, id_bytes):
        expected, found = f"{repository_id.hex()}/{id_bytes}", f"{found_id.hex()}/{width}"
        raise DamageError(f"guard: expected repository and width of ids {expected}, found {found}")
    return Guard(found_id, width, page_bytes, transaction, array("Q", digests))


def read_guard(path: Path, *, repository_id: bytes, id_bytes: int) -> Guard:
    """The guard in the file. Raises DamageError, also when there is none."""
    try:
        fd = open_regular(path, os.O_RDONLY)
    except FileNotFoundError as error:
        raise DamageError("guard: the file is missing") from error
    with os.fdopen(fd, "rb") as file:
        return decode_guard(file.read(), repository_id=repository_id, id_bytes=id_bytes)


def write_guard(path: Path, guard: Guard) -> None:
    """Write the guard in place: a torn one does not decode, which is what a missing one would mean as
    well.
    """
    data = guard.encode()
    fd = open_regular(path, os.O_RDWR | os.O_CREAT)
    with os.fdopen(fd, "r+b", buffering=0) as file:
        if file.write(data) != len(data):
            raise StorageError(f"{path}: the file system took only a part of {len(data)} bytes")
        file.truncate(len(data))
        start_writeback(fd, 0, 0)


def _digest_pages(fd: int, start: int, expected: array[int], *, page_bytes: int) -> array[int]:
    """Digests of the pages from `start` on, of free ones _FREE.

    Uses pread: a short file is an error here, but SIGBUS if it is mapped.
    """
    wanted = len(expected) * page_bytes
    view = memoryview(os.pread(fd, wanted, start * page_bytes))
    if len(view) != wanted:
        raise DamageError(f"expected {wanted} bytes from page {start} on, found {len(view)}")
    digest = xxhash.xxh3_64_intdigest
    ends = range(page_bytes, wanted + 1, page_bytes)
    return array(
        "Q",
        [
            digest(view[end - page_bytes : end]) or _USED if is_used else _FREE
            for end, is_used in zip(ends, expected, strict=True)
        ],
    )


def _runs(pages: Iterable[int], length_max: int) -> Iterable[tuple[int, int]]:
    """Neighbouring pages as (start, stop), none longer than length_max."""
    start = stop = -1
    for page in sorted(pages):
        if page == stop and stop - start < length_max:
            stop += 1
        else:
            if stop > start:
                yield start, stop
            start, stop = page, page + 1
    if stop > start:
        yield start, stop


def _sum(header: bytes, digests: bytes) -> bytes:
    state = xxhash.xxh3_64(header)
    state.update(digests)
    return state.intdigest().to_bytes(8, "little")
