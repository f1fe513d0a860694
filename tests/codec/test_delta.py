"""Differences from a base: exact for any two chunks, and only where a sample says that they pay."""

from __future__ import annotations

import tracemalloc
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from castore.codec.base import PLAIN, Elements
from castore.codec.delta import Choice, choose, decode_delta, encode_delta
from castore.codec.transform import BASE_MODES, Mode
from castore.errors import CodecError, UnsupportedFormatError
from tests.suites.codec_suite import ALL_ELEMENTS, any_bytes, bombs, build
from tests.suites.golden import assert_golden

FLOAT = Elements(4, is_float=True)
RNG = np.random.default_rng(7)
WEIGHTS = (RNG.standard_normal(30_000) * 0.02).astype("<f4")
STEP = (WEIGHTS + RNG.standard_normal(30_000).astype("<f4") * np.float32(1e-6)).astype("<f4")
DECAYED = (WEIGHTS * np.float32(0.999)).astype("<f4")
FEW = WEIGHTS.copy()
FEW[::400] += 1


def decode(stored: bytes, base: bytes, raw_bytes: int) -> bytes:
    memory = bytearray(b"\xa5" * (raw_bytes + 64))
    try:
        decode_delta(memoryview(stored), memoryview(memory)[32 : 32 + raw_bytes], base)
    finally:
        assert memory[:32] == memory[32 + raw_bytes :] == b"\xa5" * 32, "wrote outside of `out`"
    return bytes(memory[32 : 32 + raw_bytes])


def encoded(raw: bytes, base: bytes, elements: Elements = FLOAT) -> tuple[Choice, bytes]:
    choice = choose(raw, base, elements)
    assert choice.mode in BASE_MODES
    stored = encode_delta(raw, base, elements, choice)
    assert stored is not None
    assert decode(stored, base, len(raw)) == raw
    return choice, stored


# ---- exactness ---------------------------------------------------------------------------------------------


@given(any_bytes, st.integers(0, 99), st.sampled_from(ALL_ELEMENTS), st.floats(0.5, 2.0, width=32))
def test_any_bytes_come_back_from_any_base(raw: bytes, seed: int, elements: Elements, alpha: float) -> None:
    near = bytearray(raw)
    near[seed % 7 :: 11] = bytes(len(near[seed % 7 :: 11]))
    for base in (build("noise", seed, len(raw)), bytes(near), bytes(len(raw))):
        for mode in BASE_MODES - (set() if elements.item_bytes == 4 else {Mode.SCALED}):
            stored = encode_delta(raw, base, elements, Choice(mode, alpha if mode == Mode.SCALED else 1.0, 0.5))
            if stored is not None:
                assert len(stored) < len(raw)
                assert decode(stored, base, len(raw)) == raw


@given(any_bytes, st.integers(0, 99), st.sampled_from(ALL_ELEMENTS))
def test_a_choice_is_made_for_any_two_chunks(raw: bytes, seed: int, elements: Elements) -> None:
    for base in (raw, build("float32", seed, len(raw))):
        choice = choose(raw, base, elements)
        assert choice.mode is not Mode.SCALED or (elements == FLOAT and 0.5 <= choice.alpha <= 2)


def test_odd_floats_come_back() -> None:
    words = [0, 1 << 31, 1, 0x7F800000, 0xFF800001, 0x7FC00001, 0x7F7FFFFF, 0x00800000, 0x3F800000]
    raw = np.tile(np.array(words, "<u4"), 4000).tobytes()
    base = np.repeat(np.array(words, "<u4"), 4000).tobytes()
    for mode in BASE_MODES:
        stored = encode_delta(raw, base, FLOAT, Choice(mode, 0.999 if mode == Mode.SCALED else 1.0, 0.5))
        assert stored is not None
        assert decode(stored, base, len(raw)) == raw


# ---- choices -----------------------------------------------------------------------------------------------


def test_a_small_step_of_all_floats_is_a_small_difference() -> None:
    choice, stored = encoded(STEP.tobytes(), WEIGHTS.tobytes())
    assert choice.mode is not Mode.XOR
    assert len(stored) < 0.6 * STEP.nbytes
    assert len(stored) == pytest.approx(choice.share * STEP.nbytes, rel=0.1)


def test_decay_by_one_factor_is_predicted() -> None:
    choice, stored = encoded(DECAYED.tobytes(), WEIGHTS.tobytes())
    assert choice.mode is Mode.SCALED
    assert choice.alpha == pytest.approx(0.999, rel=1e-6)
    assert len(stored) < 0.3 * DECAYED.nbytes


def test_few_changed_elements_cost_little() -> None:
    _, stored = encoded(FEW.tobytes(), WEIGHTS.tobytes())
    assert len(stored) < 0.12 * FEW.nbytes


def test_what_did_not_change_costs_next_to_nothing() -> None:
    _, stored = encoded(WEIGHTS.tobytes(), WEIGHTS.tobytes())
    assert len(stored) < 200


@pytest.mark.parametrize("base", [build("noise", 3, WEIGHTS.nbytes), np.roll(WEIGHTS, 1).tobytes()])
def test_a_base_that_has_nothing_to_do_with_the_chunk_is_left_alone(base: bytes) -> None:
    assert choose(WEIGHTS.tobytes(), base, FLOAT).mode is Mode.ROTATE


def test_integers_may_rest_on_a_base_too() -> None:
    counters = RNG.integers(0, 2**40, 5000)
    choice, stored = encoded((counters + 1).astype("<i8").tobytes(), counters.astype("<i8").tobytes(), Elements(8))
    assert choice.mode is Mode.DIFFERENCE
    assert len(stored) < 300


def test_a_difference_that_does_not_shrink_is_none() -> None:
    noise, base = build("noise", 1, 50_000), build("noise", 2, 50_000)
    for mode in (Mode.DIFFERENCE, Mode.XOR):
        assert encode_delta(noise, base, FLOAT, Choice(mode, 1.0, 1.0)) is None


# ---- bytes -------------------------------------------------------------------------------------------------


def test_the_payload_is_pinned() -> None:
    base = np.arange(1, 41, dtype="<u4") * 0x01010101
    raw = base + np.arange(-20, 20).astype("<u4")
    stored = encode_delta(raw.tobytes(), base.tobytes(), Elements(4), Choice(Mode.DIFFERENCE, 1.0, 0.5))
    assert stored is not None
    assert_golden(
        stored,
        """
        04 02 0000 0000803f
        00 28000000
        02 01000000
        02 01000000
        02 01000000
        272523211f1d1b19171513110f0d0b090705030100020406080a0c0e10121416181a1c1e20222426
        00 00 00
        """,
    )


def test_a_pinned_scaled_payload_decodes_for_ever() -> None:
    base = np.linspace(-2, 2, 9, dtype="<f4")
    stored = bytes.fromhex("04 04 0100 77be7f3f" + "00 00000000" * 4 + "00")
    assert decode(stored, base.tobytes(), 36) == (base * np.float32(0.999)).astype("<f4").tobytes()


# ---- what cannot be ----------------------------------------------------------------------------------------


def test_a_payload_without_a_base_is_no_delta() -> None:
    plain = bytes.fromhex("01 00 0000 0000803f 00 04000000 31323334")
    with pytest.raises(CodecError, match="takes no base"):
        decode(plain, b"base", 4)


@given(st.binary(max_size=100), st.integers(0, 200))
def test_garbage_is_refused_by_a_typed_error(stored: bytes, raw_bytes: int) -> None:
    for garbage in (stored, b"\x04\x04\x00\x00\x77\xbe\x7f\x3f" + stored, b"\x02\x02\x01\x00\x00\x00\x80\x3f" + stored):
        with suppress(CodecError, UnsupportedFormatError):
            decode(garbage, bytes(raw_bytes), raw_bytes)


def test_decoding_never_takes_more_memory_than_was_asked_for() -> None:
    for name, frame in bombs().items():
        stored = b"\x01\x03\x00\x00\x00\x00\x80\x3f" + b"\x01" + len(frame).to_bytes(4, "little") + frame
        tracemalloc.start()
        try:
            with pytest.raises(CodecError):
                decode(stored, bytes(1000), 1000)
            assert tracemalloc.get_traced_memory()[1] < len(stored) + 1_000_000, name
        finally:
            tracemalloc.stop()


def test_plain_bytes_are_elements_of_one_byte() -> None:
    raw, base = build("text", 1, 5000), build("text", 2, 5000)
    _, stored = encoded(raw, base, PLAIN)
    assert len(stored) < len(raw)
