"""Every encoding gives back every bit: any element type, odd values and lengths, flush-to-zero off and on.

Each codec and mode is made to try, whatever the chooser would take, and what it makes must decode to the same bits,
also in the other state of flush-to-zero, as when a repository is read by another program.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from castore.codec.base import Elements
from castore.codec.chooser import encode_as_rounding, encode_chunk
from castore.codec.delta import Choice, encode_delta
from castore.codec.registry import DELTA, NAMES, ORDERED, codec_numbered, decode_chain
from castore.codec.rounding import Rule
from castore.codec.transform import ALPHA_MAX, ALPHA_MIN, BASE_MODES, Mode, kernel
from castore.hashing import hasher_for
from castore.ids import Buffer
from tests.suites.flushed import flushed_denormals
from tests.suites.odd_words import odd_words

HASHER = hasher_for("xxh3-128")
ELEMENTS = [Elements(width, is_float) for width in (1, 2, 4, 8) for is_float in (False, True)]


@st.composite
def chunks(draw: st.DrawFn, elements: Elements) -> bytes:
    """Runs of odd and of any values, and bytes that fill no element."""
    width = elements.item_bytes
    word = st.sampled_from(odd_words(width)) | st.integers(0, (1 << (8 * width)) - 1)
    runs = draw(st.lists(st.tuples(word, st.integers(1, 70)), max_size=12))
    whole = b"".join(value.to_bytes(width, "little") * count for value, count in runs)
    return whole + draw(st.binary(max_size=width - 1))


def decodes(number: int, payload: Buffer, raw: bytes, base: bytes | None) -> None:
    for flush in (False, True):
        out = bytearray(len(raw))
        with flushed_denormals(on=flush):
            decode_chain((number,), memoryview(payload), memoryview(out), base=base)
        assert bytes(out) == raw, (NAMES[number], flush)


flush_settings = pytest.mark.parametrize("flush", [False, True], ids=["denormals kept", "denormals flushed"])
each_elements = pytest.mark.parametrize("elements", ELEMENTS, ids=str)


@flush_settings
@each_elements
@settings(max_examples=20)
@given(data=st.data())
def test_codecs_without_a_base(elements: Elements, flush: bool, data: st.DataObject) -> None:
    raw = data.draw(chunks(elements))
    for number in (1, 2, 3, 4):
        with flushed_denormals(on=flush):
            payload = codec_numbered(number).encode(raw, elements)
        if payload is not None:
            decodes(number, payload, raw, None)


@flush_settings
@each_elements
@settings(max_examples=20)
@given(data=st.data())
def test_differences_in_every_mode(elements: Elements, flush: bool, data: st.DataObject) -> None:
    raw = data.draw(chunks(elements))
    base = (data.draw(chunks(elements)) + raw[::-1])[: len(raw)]
    alpha = float(np.float32(data.draw(st.floats(ALPHA_MIN, ALPHA_MAX, width=32))))
    for mode in BASE_MODES - ({Mode.SCALED} if elements.item_bytes != 4 else set()):
        for ordered in (False, True) if elements.item_bytes > 1 else (False,):
            choice = Choice(mode, alpha if mode is Mode.SCALED else 1.0, 0.0, ordered)
            with flushed_denormals(on=flush):
                payload = encode_delta(raw, base, elements, choice)
            if payload is not None:
                decodes(ORDERED if ordered else DELTA, payload, raw, base)


@flush_settings
@pytest.mark.parametrize("rule", Rule)
@settings(max_examples=20)
@given(data=st.data())
def test_roundings_by_every_rule(rule: Rule, flush: bool, data: st.DataObject) -> None:
    elements = Elements(4, is_float=True)
    master = data.draw(chunks(elements))
    master = master[: len(master) // 4 * 4]
    copy = bytearray(len(master) // 2)
    with flushed_denormals(on=flush):
        kernel.derive(master, copy, rule)
        raw = bytes(copy)
        found = encode_as_rounding(
            raw,
            Elements(2, is_float=True),
            rule,
            [(HASHER.chunk_id(master), master)],
            chunk_id=HASHER.chunk_id(raw),
            hasher=HASHER,
        )
    if found is not None:
        decodes(found.chain[0], found.payload, raw, master)


@flush_settings
@each_elements
@settings(max_examples=15)
@given(data=st.data())
def test_what_the_chooser_takes_in_a_hurry_or_thoroughly(elements: Elements, flush: bool, data: st.DataObject) -> None:
    raw = data.draw(chunks(elements))
    base = data.draw(st.none() | st.just((raw[1:] + raw)[: len(raw)]))
    for thorough in (False, True):
        with flushed_denormals(on=flush):
            encoded = encode_chunk(
                raw, elements, "auto", chunk_id=HASHER.chunk_id(raw), hasher=HASHER, base=base, thorough=thorough
            )
        assert len(encoded.payload) <= len(raw)
        if encoded.chain:
            decodes(encoded.chain[0], encoded.payload, raw, base if encoded.rests_on_base else None)
        else:
            assert bytes(encoded.payload) == raw
