"""Text files: two lines, pinned; anything else is damage."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from castore.errors import ChecksumError, DamageError, FormatError
from castore.format.textfile import decode_text_file, encode_text_file, text_field
from castore.options import TEXT_FILE_BYTES_MAX
from tests.suites.golden import assert_golden
from tests.suites.sealed import sealed_text

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def test_the_two_lines_are_pinned() -> None:
    data = encode_text_file({"snapshot": "ab", "name": "größe", "n": 1})
    assert data.splitlines()[0] == rb'{"n":1,"name":"gr\u00f6\u00dfe","snapshot":"ab"}'
    assert_golden(
        data,
        b'{"n":1,"name":"gr\\u00f6\\u00dfe","snapshot":"ab"}\nxxh3-128:175b4bcd6e7be7d9e89a6f7abd065cb1\n'.hex(),
    )


@given(st.dictionaries(st.text(), json_values, max_size=5))
def test_fields_come_back(fields: dict[str, Any]) -> None:
    data = encode_text_file(fields)
    assert decode_text_file(data, name="x") == fields
    assert data.count(b"\n") == 2


def test_values_that_are_not_json_are_refused_by_the_writer() -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            encode_text_file({"x": value})


def test_every_flipped_bit_is_seen() -> None:
    data = encode_text_file({"name": "main", "snapshot": "ab" * 16, "time_ns": 12})
    for position in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            with pytest.raises(DamageError, match="refs/x"):
                decode_text_file(bytes(damaged), name="refs/x")


def test_every_cut_is_seen() -> None:
    data = encode_text_file({"name": "main"})
    for length in range(len(data)):
        with pytest.raises(DamageError):
            decode_text_file(data[:length], name="x")
    for longer in (data + b"\n", data + b"x", b"\n" + data, data * 2):
        with pytest.raises(DamageError):
            decode_text_file(longer, name="x")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "a JSON line and a digest line"),
        (b"\0" * 100, "a JSON line and a digest line"),
        (b"{}\n", "a JSON line and a digest line"),
        (sealed_text(b"{"), "is not JSON"),
        (sealed_text(b""), "is not JSON"),
        (sealed_text(b"\xff\xfe"), "is not JSON"),
        (sealed_text(b"[" * 100_000), "is not JSON"),
        (sealed_text(b"9" * 10_000), "is not JSON"),
        (sealed_text(b"[]"), "expected a JSON object, found list"),
        (sealed_text(b"null"), "expected a JSON object, found NoneType"),
        (b"x" * (TEXT_FILE_BYTES_MAX + 1), "at most"),
    ],
)
def test_any_other_shape_is_a_format_error(data: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        decode_text_file(data, name="x")


def test_a_digest_that_does_not_fit_is_a_checksum_error() -> None:
    data = encode_text_file({"a": 1})
    with pytest.raises(ChecksumError, match="the file changed"):
        decode_text_file(data.replace(b'"a":1', b'"a":2'), name="x")


@given(st.binary(max_size=200))
def test_garbage_is_a_typed_error(data: bytes) -> None:
    with pytest.raises(DamageError):
        decode_text_file(data, name="x")


@given(st.binary(max_size=60))
def test_garbage_with_the_right_digest_is_an_object_or_a_typed_error(line: bytes) -> None:
    with contextlib.suppress(FormatError):
        assert isinstance(decode_text_file(sealed_text(line.replace(b"\n", b"")), name="x"), dict)


def test_a_field_has_its_type_or_is_named() -> None:
    fields = {"a": 1, "b": True, "c": "x", "d": 1.0}
    assert text_field(fields, "a", int, name="x") == 1
    assert text_field(fields, "b", bool, name="x") is True
    for key, kind in (("a", str), ("b", int), ("c", int), ("d", int), ("missing", str)):
        with pytest.raises(FormatError, match=f"x: field '{key}': expected {kind.__name__}, found"):
            text_field(fields, key, kind, name="x")
