"""A small file is replaced whatever it holds, and by nobody's change in between."""

from __future__ import annotations

import pytest

from castore.backend import MemoryBackend
from castore.backend.replace import replace_file
from castore.errors import ChecksumError
from castore.options import TEXT_FILE_BYTES_MAX
from tests.checkpoint.repositories import HookedBackend, at_call

NAME = "policy"


@pytest.mark.parametrize(
    "old", [None, b"", b"old", bytes(2 * TEXT_FILE_BYTES_MAX)], ids=["none", "empty", "old", "long"]
)
def test_whatever_is_there_is_replaced_and_removed(old: bytes | None) -> None:
    """One longer than a text file may be could neither be written over nor removed."""
    backend = MemoryBackend()
    if old is not None:
        backend.put_if_absent(NAME, old)
    assert replace_file(backend, NAME, None) is (old is not None)
    assert not list(backend.list(""))
    if old is not None:
        backend.put_if_absent(NAME, old)
    assert replace_file(backend, NAME, b"new")
    assert backend.read(NAME, max_bytes=9) == b"new"


def test_what_is_as_good_is_kept_unless_it_is_damaged() -> None:
    backend = MemoryBackend()
    assert replace_file(backend, NAME, b"first", keep=lambda: pytest.fail("nothing is there"))
    assert not replace_file(backend, NAME, b"second", keep=lambda: True)
    assert replace_file(backend, NAME, b"third", keep=lambda: False)

    def damaged() -> bool:
        raise ChecksumError("rot")

    assert replace_file(backend, NAME, b"fourth", keep=damaged)
    assert backend.read(NAME, max_bytes=9) == b"fourth"


def test_a_change_in_between_is_seen() -> None:
    inner = MemoryBackend()
    inner.put_if_absent(NAME, b"old")
    backend = HookedBackend(inner)
    backend.hook = at_call(1, lambda: inner.compare_and_swap(NAME, expected=b"old", new=b"theirs"))
    seen: list[bytes] = []
    assert replace_file(backend, NAME, b"ours", keep=lambda: seen.append(inner.read(NAME, max_bytes=9)))
    assert seen == [b"old", b"theirs"]
    assert inner.read(NAME, max_bytes=9) == b"ours"
