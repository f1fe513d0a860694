"""Ids are random where they must be, and hex where people see them."""

from __future__ import annotations

import pytest

from castore.ids import PACK_ID_BYTES, is_hex, new_pack_id


def test_pack_ids_come_from_the_randomness_that_is_given() -> None:
    assert new_pack_id(lambda count: bytes(range(count))) == "000102030405060708090a0b0c0d0e0f"


def test_pack_ids_do_not_repeat() -> None:
    ids = {new_pack_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(is_hex(pack_id) and len(pack_id) == 2 * PACK_ID_BYTES for pack_id in ids)


@pytest.mark.parametrize("text", ["0", "abcdef0123456789", "a" * 1000])
def test_lower_case_hex_is_hex(text: str) -> None:
    assert is_hex(text)


@pytest.mark.parametrize("text", ["", "A", "g", "0x1", " a", "a\n", "-1", "\u0661", "a b", "\uff11"])
def test_anything_else_is_not(text: str) -> None:
    assert not is_hex(text)
