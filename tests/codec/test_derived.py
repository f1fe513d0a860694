"""A 16-bit copy stored as the rounding of its master: what is proved, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from castore.codec.base import Elements
from castore.codec.chooser import Encoded, encode_as_rounding
from castore.codec.derived import decode_derived, encode_derived, master_lengths
from castore.codec.registry import DERIVED, base_lengths, codec_numbered, decode_chain
from castore.codec.rounding import Rule
from castore.codec.transform import kernel
from castore.errors import CodecError
from castore.hashing import hasher_for
from castore.options import GRID_BYTES

HASHER = hasher_for("xxh3-128")
HALF = Elements(2, is_float=True)


def copy_of(master: bytes, rule: Rule) -> bytes:
    out = bytearray(len(master) // 2)
    kernel.derive(master, out, rule)
    return bytes(out)


def encoded(raw: bytes, rule: Rule, *parts: bytes) -> Encoded | None:
    masters = [(HASHER.chunk_id(part), part) for part in parts]
    return encode_as_rounding(raw, HALF, rule, masters, chunk_id=HASHER.chunk_id(raw), hasher=HASHER)


@given(st.binary(min_size=8, max_size=400), st.sampled_from(Rule))
def test_any_bits_come_back_from_their_master(master: bytes, rule: Rule) -> None:
    master = master[: len(master) // 4 * 4]
    raw = copy_of(master, rule)
    found = encoded(raw, rule, master)
    if found is None:
        assert codec_numbered(4).encode(raw, HALF) is not None, "what repeats one unit is shorter without a base"
        return
    out = bytearray(len(raw))
    decode_chain(found.chain, memoryview(found.payload), memoryview(out), base=master)
    assert (found.chain, bytes(found.payload), bytes(out)) == ((DERIVED,), bytes([rule]), raw)


def test_a_chunk_covers_two_of_its_master() -> None:
    master = np.random.default_rng(0).standard_normal(GRID_BYTES // 2, np.float32).tobytes()
    raw = copy_of(master, Rule.FLOAT16_NEAREST)
    assert len(raw) == GRID_BYTES
    assert master_lengths(len(raw)) == base_lengths((DERIVED,), len(raw)) == (GRID_BYTES, GRID_BYTES)
    assert encoded(raw, Rule.FLOAT16_NEAREST, master[:GRID_BYTES], master[GRID_BYTES:]) is not None
    assert encoded(raw, Rule.FLOAT16_CUT, master[:GRID_BYTES], master[GRID_BYTES:]) is None
    assert encoded(raw, Rule.FLOAT16_NEAREST, master[GRID_BYTES:], master[:GRID_BYTES]) is None


def test_the_lengths_of_masters_are_those_of_the_grid() -> None:
    half = GRID_BYTES // 2
    lengths = {300: (600,), half: (GRID_BYTES,), half + 2: (GRID_BYTES, 4), GRID_BYTES: (GRID_BYTES, GRID_BYTES)}
    assert {copy: master_lengths(copy) for copy in lengths} == lengths


def test_one_element_that_differs_is_no_rounding() -> None:
    master = np.arange(1, 200, dtype=np.float32).tobytes()
    raw = bytearray(copy_of(master, Rule.BFLOAT16_NEAREST))
    assert encoded(bytes(raw), Rule.BFLOAT16_NEAREST, master) is not None
    raw[100] ^= 1
    assert encoded(bytes(raw), Rule.BFLOAT16_NEAREST, master) is None


def test_a_master_that_is_not_what_its_id_says_is_no_proof() -> None:
    """A state that another thread changes during the save: the copy would rest on bytes that were never stored."""
    master = np.arange(1, 200, dtype=np.float32)
    raw = copy_of(master.tobytes(), Rule.BFLOAT16_NEAREST)
    changed = master.view(np.uint32) + np.uint32(1)  # rounds to the same
    assert copy_of(changed.tobytes(), Rule.BFLOAT16_NEAREST) == raw
    lying = [(HASHER.chunk_id(master.tobytes()), changed.tobytes())]
    found = encode_as_rounding(raw, HALF, Rule.BFLOAT16_NEAREST, lying, chunk_id=HASHER.chunk_id(raw), hasher=HASHER)
    assert found is None


def test_what_repeats_one_unit_is_left_to_the_constant_codec() -> None:
    master = np.ones(500, np.float32).tobytes()
    assert encoded(copy_of(master, Rule.BFLOAT16_NEAREST), Rule.BFLOAT16_NEAREST, master) is None


@pytest.mark.parametrize("payload", [b"", b"\0", b"\5", b"\1\1", b"\xff"])
def test_a_payload_that_is_no_rule_is_refused(payload: bytes) -> None:
    with pytest.raises(CodecError, match="one of 4 rules"):
        decode_derived(memoryview(payload), memoryview(bytearray(10)), bytes(20))


@pytest.mark.parametrize(("out_bytes", "master_bytes"), [(10, 18), (10, 22), (10, 0), (9, 18)])
def test_a_master_of_another_length_is_refused(out_bytes: int, master_bytes: int) -> None:
    payload = memoryview(encode_derived(Rule.BFLOAT16_CUT))
    with pytest.raises(CodecError, match=f"a master of {2 * out_bytes} bytes, found {master_bytes}"):
        decode_derived(payload, memoryview(bytearray(out_bytes)), bytes(master_bytes))
