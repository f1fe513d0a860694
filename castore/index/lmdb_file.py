"""An LMDB data file read as plain bytes: its two meta pages, and the list of its free pages.

LMDB maps the file and trusts it: a file that is shorter than its meta pages say kills the process with
SIGBUS, and a flipped bit inside a page can fail an assertion or lead a pointer astray. So everything here
uses `pread`, checks what it reads, and raises DamageError; nothing is mapped. Only LMDB's data version 1
(LMDB 0.9, 64 bit) is known; integers are in the machine's own order, for LMDB files do not travel.

    page (the first 16 bytes)
        0   8  page number
        8   2  pad
       10   2  flags                        1 branch, 2 leaf, 4 overflow, 8 meta
       12   2  end of the node offsets      or 4 bytes: pages of an overflow run
       14   2  start of the nodes
       16      node offsets (2 each); in an overflow page: the value

    meta, from byte 16 of pages 0 and 1; the one with the higher transaction counts
        0   4  magic 0xBEEFC0DE
        4   4  data version
        8   8  address
       16   8  map bytes 24  48  database of free pages       its first 4 bytes: the page size; its last 8:
       the root, or all ones 72  48  main database
      120   8  last page number
      128   8  transaction

    node
        0   4  leaf: value bytes            branch: the low 32 bits of the child's page number,
        4   2  flags, 1: value in overflow  and its high 16 bits
        6   2  key bytes
        8      key, then the value or (8 bytes) the number of its overflow page

    value of the database of free pages, one or more for each transaction that freed any
        0   8  c
        8  8c  page numbers
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from castore.errors import DamageError

META_PAGES = 2
_MAGIC = 0xBEEFC0DE
_DATA_VERSION = 1
_PAGE_BYTES_MAX = 0x8000
_NO_PAGE = (1 << 64) - 1
_BRANCH, _LEAF, _OVERFLOW = 1, 2, 4
_VALUE_IN_OVERFLOW = 1

_PAGE = struct.Struct("=QHHHH")
_META = struct.Struct("=IIQQ I36xQ 48x QQ")
_NODE = struct.Struct("=HHHH")
_NUMBER = struct.Struct("=Q")
_HEAD_BYTES = _PAGE.size + _META.size


FreeLists = dict[bytes, bytes]
"""Key of a record in the database of free pages → its page numbers."""


@dataclass(frozen=True, slots=True)
class Meta:
    """What the newer of the two meta pages says."""

    transaction: int
    page_bytes: int
    page_count: int
    """Pages in use or free: the file is at least this long, and what lies behind is nothing."""
    free_root: int

    @property
    def used_bytes(self) -> int:
        """Length that the file must have for LMDB to map it."""
        return self.page_count * self.page_bytes


def read_meta(fd: int) -> Meta:
    """The newer meta; both must be sound. Raises DamageError."""
    first = _decode_meta(os.pread(fd, _HEAD_BYTES, 0), page=0)
    second = _decode_meta(os.pread(fd, _HEAD_BYTES, first.page_bytes), page=1)
    if second.page_bytes != first.page_bytes:
        raise DamageError(f"meta pages disagree on the page size: {first.page_bytes} and {second.page_bytes} bytes")
    return max(first, second, key=lambda meta: meta.transaction)


def _decode_meta(data: bytes, *, page: int) -> Meta:
    if len(data) != _HEAD_BYTES:
        raise DamageError(f"meta page {page}: expected {_HEAD_BYTES} bytes, found {len(data)}")
    magic, version, _, _, page_bytes, free_root, last_page, transaction = _META.unpack_from(data, _PAGE.size)
    if (magic, version) != (_MAGIC, _DATA_VERSION):
        raise DamageError(f"meta page {page}: magic {magic:x} version {version} is no LMDB 0.9 file")
    if not 512 <= page_bytes <= _PAGE_BYTES_MAX or page_bytes & (page_bytes - 1) or last_page < META_PAGES - 1:
        raise DamageError(f"meta page {page}: {page_bytes} bytes a page and last page {last_page} cannot be")
    return Meta(transaction, page_bytes, last_page + 1, free_root)


def read_free_lists(fd: int, meta: Meta) -> FreeLists:
    """Which pages the transaction of `meta` does not use. Raises DamageError.

    LMDB is copy-on-write: the next transaction writes to these, to pages behind the last one, and to the metas.
    """
    lists: FreeLists = {}
    try:
        for key, value in _free_records(fd, meta):
            (count,) = _NUMBER.unpack_from(value)
            lists[key] = value[8 : 8 + 8 * count]
            if len(lists[key]) != 8 * count:
                raise DamageError(f"a list of {count} free pages is cut short")
    except struct.error as error:
        raise DamageError(f"the database of free pages does not parse: {error}") from error
    return lists


def changed_pages(before: FreeLists, after: FreeLists) -> tuple[set[int], set[int]]:
    """(pages that became used, pages that became free); costs as much as the lists that changed are long."""
    free_before = _pages(value for key, value in before.items() if after.get(key) != value)
    free_after = _pages(value for key, value in after.items() if before.get(key) != value)
    return free_before - free_after, free_after - free_before


def _pages(lists: Iterable[bytes]) -> set[int]:
    return set(array("Q", b"".join(lists)))


def _free_records(fd: int, meta: Meta) -> Iterator[tuple[bytes, bytes]]:
    pending, visited = [] if meta.free_root == _NO_PAGE else [meta.free_root], 0
    while pending:
        number = pending.pop()
        page, flags, nodes = _read_tree_page(fd, meta, number)
        visited += 1
        if visited > meta.page_count:
            raise DamageError("the database of free pages is no tree")
        for node in nodes:
            low, high, node_flags, key_bytes = _NODE.unpack_from(page, node)
            start = node + _NODE.size + key_bytes
            key = page[node + _NODE.size : start]
            if flags & _BRANCH:
                pending.append(low | high << 16 | node_flags << 32)
            elif node_flags & _VALUE_IN_OVERFLOW:
                yield key, _read_overflow(fd, meta, *_NUMBER.unpack_from(page, start), value_bytes=low | high << 16)
            else:
                yield key, page[start : start + (low | high << 16)]


def _read_tree_page(fd: int, meta: Meta, number: int) -> tuple[bytes, int, tuple[int, ...]]:
    """(page, flags, offsets of its nodes)."""
    page = _read(fd, meta, number, meta.page_bytes)
    found, _, flags, nodes_end, _ = _PAGE.unpack_from(page)
    if found != number or flags & (_BRANCH | _LEAF) not in (_BRANCH, _LEAF) or not _PAGE.size <= nodes_end <= len(page):
        raise DamageError(f"page {number} of the database of free pages claims to be page {found} with flags {flags:x}")
    return page, flags, struct.unpack_from(f"={(nodes_end - _PAGE.size) // 2}H", page, _PAGE.size)


def _read_overflow(fd: int, meta: Meta, number: int, *, value_bytes: int) -> bytes:
    data = _read(fd, meta, number, _PAGE.size + value_bytes)
    found, _, flags, _, _ = _PAGE.unpack_from(data)
    if found != number or not flags & _OVERFLOW:
        raise DamageError(f"page {number} claims to be page {found} with flags {flags:x}, expected an overflow page")
    return data[_PAGE.size :]


def _read(fd: int, meta: Meta, number: int, length: int) -> bytes:
    if not META_PAGES <= number < meta.page_count or number * meta.page_bytes + length > meta.used_bytes:
        raise DamageError(f"{length} bytes from page {number} lie outside the file's {meta.page_count} pages")
    data = os.pread(fd, length, number * meta.page_bytes)
    if len(data) != length:
        raise DamageError(f"page {number}: expected {length} bytes, found {len(data)}")
    return data
