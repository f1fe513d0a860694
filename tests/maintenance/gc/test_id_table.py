"""The table of ids against a dict."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from castore.format.pack_columns import as_words
from castore.maintenance.gc.id_table import IdTable

SMALL_IDS = st.lists(st.integers(0, 40).map(lambda number: number.to_bytes(16, "big")), max_size=60)


@given(st.lists(SMALL_IDS, max_size=6))
def test_ids_are_numbered_like_by_a_dict(batches: list[list[bytes]]) -> None:
    table, model = IdTable(16), dict[bytes, int]()
    for batch in batches:
        numbers = table.intern(as_words(b"".join(batch), 16)).tolist()
        for one, number in zip(batch, numbers, strict=True):
            assert 0 <= number < len(table)
            assert model.setdefault(one, number) == number
            assert table.id_of(number) == one
    assert sorted(model.values()) == list(range(len(table)))
    unseen = [number.to_bytes(16, "big") for number in range(60)]
    assert table.find(as_words(b"".join(unseen), 16)).tolist() == [model.get(one, -1) for one in unseen]


@pytest.mark.parametrize("id_bytes", [16, 32])
def test_many_ids_keep_their_numbers_while_the_table_grows(id_bytes: int) -> None:
    generator = np.random.default_rng(0)
    ids = generator.bytes(200_000 * id_bytes)
    table = IdTable(id_bytes)
    first = table.intern(as_words(ids[: 1000 * id_bytes], id_bytes))
    every = table.intern(as_words(ids, id_bytes))
    assert sorted(first.tolist()) == list(range(1000))
    assert every[:1000].tolist() == first.tolist()
    assert sorted(every.tolist()) == list(range(200_000))
    assert (table.find(as_words(ids, id_bytes)) == every).all()
    assert (table.find(as_words(generator.bytes(1000 * id_bytes), id_bytes)) == -1).all()
    assert table.nbytes <= 200_000 * (id_bytes * 1.25 + 21)


def test_ids_that_differ_in_one_half_only_stay_apart() -> None:
    """Somebody who makes ids up may let all of them begin alike; only time may suffer."""
    ids = [bytes(8) + number.to_bytes(8, "little") for number in range(3000)]
    ids += [number.to_bytes(8, "little") + bytes(8) for number in range(1, 3000)]
    table = IdTable(16)
    assert len(set(table.intern(as_words(b"".join(ids), 16)).tolist())) == len(ids)


def test_nothing_is_found_in_an_empty_table_and_nothing_for_no_ids() -> None:
    table = IdTable(16)
    assert table.find(as_words(bytes(16), 16)).tolist() == [-1]
    assert table.find(as_words(b"", 16)).tolist() == []
    assert table.intern(as_words(b"", 16)).tolist() == []
