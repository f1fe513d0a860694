"""Values and their bytes, as docs/FORMAT.md pins them."""

from __future__ import annotations

import enum
import math
import pickle
import random
import struct
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from castore.errors import FormatError, PickleRefusedError, UnknownClassError, UnsupportedLeafError
from castore.format.manifest import Entry, Kind
from castore.tensors import decode_value, flatten
from castore.tensors.scalars import PACKED_ITEMS_MIN, VALUE_KINDS, encode_value
from tests.tensors.round_trip import Saved, round_trip


class Color(enum.Enum):
    RED = 1


class Local:
    """Picklable by name, with no typed encoding."""

    def __init__(self, value: int) -> None:
        self.value = value


def encoded(value: Any) -> tuple[Kind, bytes]:
    found = encode_value(value, "x")
    assert found is not None
    return found.kind, found.data


@pytest.mark.parametrize(
    ("value", "kind", "data"),
    [
        (None, Kind.NONE, ""),
        (False, Kind.BOOL, "00"),
        (True, Kind.BOOL, "01"),
        (0, Kind.INT, "00"),
        (1, Kind.INT, "01"),
        (-1, Kind.INT, "ff"),
        (127, Kind.INT, "7f"),
        (128, Kind.INT, "8000"),
        (-128, Kind.INT, "80"),
        (-129, Kind.INT, "7fff"),
        (2**64, Kind.INT, "000000000000000001"),
        (1.0, Kind.FLOAT, "000000000000f03f"),
        (-0.0, Kind.FLOAT, "0000000000000080"),
        (1 - 2j, Kind.COMPLEX, "000000000000f03f00000000000000c0"),
        ("", Kind.STR, ""),
        ("é", Kind.STR, "c3a9"),
        ("\ud800", Kind.STR, "eda080"),
        (b"ab", Kind.BYTES, "6162"),
        (bytearray(b"ab"), Kind.BYTES, "6162"),
        (torch.bfloat16, Kind.TORCH_DTYPE, b"bfloat16".hex()),
        (torch.device("cuda", 1), Kind.TORCH_DEVICE, b"cuda:1".hex()),
        (torch.Size([2, 3]), Kind.TORCH_SIZE, "02000000000000000300000000000000"),
        (np.float32(1), Kind.NUMPY_SCALAR, "0000803f"),
        (np.str_("a"), Kind.NUMPY_SCALAR, "61000000"),
        ([1] * 32, Kind.INT_LIST, "0100000000000000" * 32),
        ((1,) * 32, Kind.INT_TUPLE, "0100000000000000" * 32),
        ([1.0] * 32, Kind.FLOAT_LIST, "000000000000f03f" * 32),
        ((1.0,) * 32, Kind.FLOAT_TUPLE, "000000000000f03f" * 32),
    ],
)
def test_bytes_are_as_pinned(value: Any, kind: Kind, data: str) -> None:
    assert encoded(value) == (kind, bytes.fromhex(data))


@pytest.mark.parametrize(
    "value",
    [
        [1] * (PACKED_ITEMS_MIN - 1),
        [True] * 40,
        [1] * 39 + [True],
        [1] * 39 + [1.0],
        [2**63] + [1] * 39,
        [np.float64(1)] * 40,
    ],
)
def test_other_lists_stay_containers(value: Any) -> None:
    assert encode_value(value, "x") is None
    assert [type(item) for item in round_trip(value)] == [type(item) for item in value]


def test_random_states_come_back() -> None:
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}  # noqa: NPY002
    state["generator"] = np.random.default_rng(1).bit_generator.state
    loaded = round_trip(state)
    assert loaded["python"] == random.getstate()
    random.setstate(loaded["python"])
    np.random.set_state(loaded["numpy"])  # noqa: NPY002
    torch.set_rng_state(loaded["torch"])
    generator = np.random.default_rng(0)
    generator.bit_generator.state = loaded["generator"]
    assert generator.random() == np.random.default_rng(1).random()


def test_pythons_random_state_is_three_leaves() -> None:
    kinds = [entry.kind for entry in flatten(random.getstate()).entries]
    assert kinds == [Kind.TUPLE, Kind.INT, Kind.INT_TUPLE, Kind.NONE]


@pytest.mark.parametrize("bits", [0x7FF0000000000001, 0x7FF8000000000123, 0xFFF8000000000000, 1])
def test_nan_payloads_and_subnormals_survive(bits: int) -> None:
    (value,) = struct.unpack("<d", bits.to_bytes(8, "little"))
    for loaded in (round_trip(value), round_trip([value] * 40)[7], round_trip(complex(value, value)).imag):
        assert struct.pack("<d", loaded) == bits.to_bytes(8, "little")


def test_a_bytearray_comes_back_as_one_and_is_writable() -> None:
    loaded = round_trip(bytearray(b"abc"))
    loaded[0] = 0
    assert loaded == bytearray(b"\0bc")


def test_long_double_scalars_have_no_garbage_in_their_padding() -> None:
    assert {encoded(np.longdouble(1.5))[1] for _ in range(50)} == {encoded(np.longdouble(1.5))[1]}


@pytest.mark.parametrize(
    ("value", "advice"),
    [
        ({1, 2}, "sorted"),
        (Color.RED, ".name"),
        (Local(1), "allow_pickle"),
        (Fraction(1, 2), "allow_pickle"),
        (torch.Generator(), "get_state"),
        (random.Random(1), "getstate"),
        (np.random.default_rng(), "bit_generator.state"),
        (torch.nn.Linear(1, 1), "module.state_dict()"),
        (torch.optim.SGD([torch.zeros(1)]), "optimizer.state_dict()"),
        (print, "name"),
        (int, "name"),
        (range(3), "list(range)"),
        (torch.zeros(3).max(0), "tuple"),
        (np.ma.masked_array([1]), ".mask"),
        (np.array([object()]), "Python objects"),
        (torch.zeros(2).untyped_storage(), "tensor over"),
        (torch.nn.LazyLinear(1).weight, "run the module once"),
    ],
)
def test_what_has_no_encoding_is_refused_with_advice(value: Any, advice: str) -> None:
    with pytest.raises(UnsupportedLeafError, match="no typed encoding") as caught:
        flatten({"a": [value]})
    assert caught.value.path == "a/0"
    assert advice in str(caught.value)


def test_subclasses_of_plain_types_are_refused() -> None:
    class Text(str):
        __slots__ = ()

    class Number(int):
        __slots__ = ()

    class Items(list):  # type: ignore[type-arg]
        pass

    class Mapped(dict):  # type: ignore[type-arg]
        pass

    for value in (Text("a"), Number(1), Items(), Mapped()):
        with pytest.raises(UnsupportedLeafError):
            flatten(value)


def test_a_pickle_is_read_only_when_both_sides_allow_it() -> None:
    saved = Saved({"a": Local(3), "b": 1}, allow_pickle=True)
    assert saved.entries[1].kind is Kind.PICKLE
    assert saved.entries[1].attrs["type"].endswith("Local")
    with pytest.raises(PickleRefusedError, match="leaf 'a'"):
        saved.load()
    assert saved.load(allow_pickle=True)["a"].value == 3
    assert saved.load(keep=lambda path: path == "b") == {"b": 1}


def test_a_value_that_does_not_pickle_says_so() -> None:
    with pytest.raises(UnsupportedLeafError, match="does not pickle"):
        flatten([lambda: None], allow_pickle=True)


def test_a_pickle_of_a_missing_class_says_so() -> None:
    entry = Entry("a", Kind.PICKLE, attrs={"type": "nowhere.Gone"}, raw_bytes=14)
    with pytest.raises(UnknownClassError):
        decode_value(entry, b"cnowhere\nGone\n", allow_pickle=True)
    raw = pickle.dumps(1)[:-1]
    with pytest.raises(FormatError):
        decode_value(Entry("a", Kind.PICKLE, raw_bytes=len(raw)), raw, allow_pickle=True)


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (Kind.NONE, b"x"),
        (Kind.BOOL, b"\2"),
        (Kind.BOOL, b""),
        (Kind.INT, b""),
        (Kind.INT, b"\0\0"),
        (Kind.INT, b"\xff\xff"),
        (Kind.FLOAT, b"1234567"),
        (Kind.STR, b"\xff"),
        (Kind.INT_LIST, b"123"),
        (Kind.TORCH_DTYPE, b"float"),
        (Kind.TORCH_DTYPE, b"nn"),
        (Kind.TORCH_DEVICE, b"nowhere:1"),
        (Kind.TORCH_DEVICE, b"cuda:01"),
        (Kind.TORCH_SIZE, b"1"),
    ],
)
def test_bytes_that_encoding_cannot_have_written_are_refused(kind: Kind, data: bytes) -> None:
    with pytest.raises(FormatError, match="leaf 'a'"):
        decode_value(Entry("a", kind, raw_bytes=len(data)), data, allow_pickle=False)


@given(st.sampled_from(sorted(VALUE_KINDS - {Kind.PICKLE})), st.binary(max_size=40), st.text(max_size=8))
def test_decoding_anything_gives_a_value_or_a_format_error(kind: Kind, data: bytes, dtype: str) -> None:
    for name in (dtype, "<f4", "|O", "<U4", "|S3", "i4,i4", "|V8"):
        entry = Entry("a", kind, dtype=name, raw_bytes=len(data))
        try:
            value = decode_value(entry, data, allow_pickle=False)
        except FormatError:
            continue
        again = encode_value(value, "a")
        if again is not None and kind is not Kind.NUMPY_SCALAR:
            assert again.data == data


def test_a_length_that_is_not_the_entrys_is_refused() -> None:
    with pytest.raises(FormatError, match="expected 8 bytes"):
        decode_value(Entry("a", Kind.FLOAT, raw_bytes=8), b"1234", allow_pickle=False)


def test_floats_keep_their_sign_and_infinity() -> None:
    assert math.copysign(1, round_trip(-0.0)) == -1
    assert round_trip([math.inf, -math.inf]) == [math.inf, -math.inf]
