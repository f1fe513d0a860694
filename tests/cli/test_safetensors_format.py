"""The .safetensors header, both ways, and against the reference implementation."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from castore.cli import safetensors_format as safetensors
from castore.cli.safetensors_format import DTYPES
from castore.errors import FormatError


def read(head: bytes, file_bytes: int) -> safetensors.Header:
    length = safetensors.header_length(head[:8], file_bytes=file_bytes, where="x")
    return safetensors.decode_header(head[8 : 8 + length], file_bytes=file_bytes, where="x")


@given(
    st.dictionaries(
        st.text(max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=3)),
        max_size=6,
    ),
    st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2),
)
def test_a_header_reads_back(tensors: dict[str, tuple[str, list[int]]], metadata: dict[str, str]) -> None:
    head, places = safetensors.encode_header([(name, *rest) for name, rest in tensors.items()], metadata)
    end = places[-1].stop if places else 0
    header = read(head, len(head) + end)
    assert {place.name: (place.code, list(place.shape)) for place in header.tensors} == tensors
    assert header.metadata == metadata
    assert header.data_offset == len(head)
    assert len(head) % 8 == 0
    assert all(place.start % DTYPES[place.code][1] == 0 for place in places)


def test_a_file_is_the_same_as_the_reference_writes_it() -> None:
    torch = pytest.importorskip("torch")
    reference = pytest.importorskip("safetensors.torch")
    tensors = {"b": torch.arange(3), "a": torch.ones(2, 2).bfloat16(), "c": torch.zeros(1), "aa": torch.zeros(0, 5)}
    expected = reference.save(tensors, metadata={"format": "pt"})
    described = [("b", "I64", (3,)), ("a", "BF16", (2, 2)), ("c", "F32", (1,)), ("aa", "F32", (0, 5))]
    head, places = safetensors.encode_header(described, {"format": "pt"})
    assert expected.startswith(head)
    assert places[-1].stop == len(expected) - len(head)


def head_of(fields: object) -> bytes:
    text = json.dumps(fields).encode()
    return len(text).to_bytes(8, "little") + text


def tensor(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


@pytest.mark.parametrize(
    "fields",
    [
        [],
        {"a": 1},
        {"a": {"dtype": "F32"}},
        {"a": tensor(dtype="F4")},
        {"a": tensor(dtype=["F32"])},
        {"a": tensor(shape=[-2])},
        {"a": tensor(shape="2")},
        {"a": tensor(shape=[True, 2])},
        {"a": tensor(shape=[2**40, 2**40])},
        {"a": tensor(data_offsets=[8, 0])},
        {"a": tensor(data_offsets=[0, 8, 8])},
        {"a": tensor(data_offsets=[0.0, 8.0])},
        {"a": tensor(), "b": tensor()},
        {"a": tensor(data_offsets=[8, 16])},
        {"__metadata__": {"a": 1}},
        {"__metadata__": "text"},
    ],
)
def test_a_hostile_header_is_a_format_error(fields: object) -> None:
    head = head_of(fields)
    with pytest.raises(FormatError):
        read(head, len(head) + 8)


@pytest.mark.parametrize(
    "prefix", [b"", b"\1", b"\xff" * 8, (101).to_bytes(8, "little"), (10**9).to_bytes(8, "little")]
)
def test_a_length_that_does_not_fit_is_a_format_error(prefix: bytes) -> None:
    with pytest.raises(FormatError, match=r"not a \.safetensors file, or cut short"):
        safetensors.header_length(prefix, file_bytes=108, where="x")


@pytest.mark.parametrize("text", [b"\xff\xfe", b"{", b"{}x", b'{"a":1,"a":1}', b"[" * 100_000, b"NaN"])
def test_a_header_that_is_no_json_object_is_a_format_error(text: bytes) -> None:
    with pytest.raises(FormatError):
        safetensors.decode_header(text, file_bytes=8 + len(text), where="x")


@given(st.binary(max_size=200), st.integers(0, 300))
def test_any_bytes_give_a_header_or_a_format_error(data: bytes, file_bytes: int) -> None:
    try:
        header = safetensors.decode_header(data, file_bytes=file_bytes, where="x")
    except FormatError:
        return
    assert all(place.stop - place.start == math.prod(place.shape) * DTYPES[place.code][1] for place in header.tensors)


def test_bytes_after_the_data_are_refused() -> None:
    head = head_of({"a": tensor()})
    assert read(head, len(head) + 8).tensors[0].stop == 8
    with pytest.raises(FormatError, match="cut short or has a tail"):
        read(head, len(head) + 9)
