"""Hypothesis strategies for states: every kind of leaf, every dtype, odd layouts, shared memory.

states()     whole states, as training code nests them
tensors()    one strided tensor of any dtype and layout, with any bits in it
ndarrays()   one ndarray
scalars()    everything that is no array and no container
"""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict, namedtuple
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st

from tests.tensors import quiet  # noqa: F401  importing it is what it is for

Plain = namedtuple("Plain", ["first", "second"])  # noqa: PYI024  the untyped way is what is tested


class Typed(NamedTuple):
    step: Any
    value: Any


@dataclasses.dataclass
class Mutable:
    name: Any
    values: Any


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    name: Any
    values: Any


def torch_dtypes() -> list[torch.dtype]:
    """Every dtype of this torch but the quantized ones."""
    found = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    plain = [dtype for dtype in found if not str(dtype).startswith(("torch.quint", "torch.qint"))]
    return sorted(plain, key=str)


TORCH_DTYPES = torch_dtypes()
NUMPY_DTYPES = [
    *("|b1", "|i1", "|u1", "<i2", ">i2", "<u4", "<i8", ">u8", "<f2", "<f4", ">f4", "<f8", ">f8", "<c8", ">c16"),
    *("|S1", "|S5", "<U3", ">U2", "|V3", "|V16", "<M8[ns]", "<m8[s]", "<f16"),
]
STRUCTURED_DTYPES = [
    np.dtype([("a", "<i4"), ("b", ">f8")]),
    np.dtype([("a", "|u1"), ("b", "<f8"), ("c", "<i2", (2, 3))], align=True),
    np.dtype({"names": ["y", "x"], "formats": ["<i2", "|S3"], "offsets": [4, 0], "itemsize": 9}),
    np.dtype([("outer", [("inner", "<f4"), ("flag", "|b1")]), (("a title", "n"), "<i8")]),
]


def tensor_of(
    dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...], offset: int, data: bytes
) -> torch.Tensor:
    """A tensor over a storage that holds exactly these bytes."""
    storage = torch.frombuffer(bytearray(data), dtype=torch.uint8).clone().untyped_storage()
    return torch.empty(0, dtype=dtype).set_(storage, offset, shape, stride)


@st.composite
def tensors(draw: st.DrawFn, dtypes: list[torch.dtype] = TORCH_DTYPES, max_dims: int = 4) -> torch.Tensor:
    """A strided tensor: contiguous, permuted, channels-last, sliced, expanded, lazily conjugated or negated."""
    dtype = draw(st.sampled_from(dtypes))
    shape = tuple(draw(st.lists(st.integers(0, 4) | st.integers(1, 3), max_size=max_dims)))
    order = draw(st.permutations(range(len(shape))))
    gaps = [draw(st.sampled_from([1, 1, 1, 2])) for _ in shape]
    expanded = (
        draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
        if draw(st.booleans())
        else [False] * len(shape)
    )
    stride, step = [0] * len(shape), 1
    for axis in reversed(order):
        if not expanded[axis]:
            stride[axis] = step * gaps[axis]
            step *= gaps[axis] * max(1, shape[axis])
    offset = draw(st.integers(0, 3))
    items = offset + step + 1
    data = draw(st.binary(min_size=items * dtype.itemsize, max_size=items * dtype.itemsize))
    tensor = tensor_of(dtype, shape, tuple(stride), offset, data)
    if dtype in (torch.complex64, torch.complex128) and draw(st.booleans()):
        tensor = tensor.conj()
    if dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64) and draw(st.integers(0, 3)) == 0:
        return torch._neg_view(tensor)
    if (dtype.is_floating_point or dtype.is_complex) and draw(st.booleans()):
        tensor.requires_grad_()
        if draw(st.booleans()):
            return torch.nn.Parameter(tensor.detach(), requires_grad=draw(st.booleans()))
    return tensor


@st.composite
def ndarrays(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    """An ndarray: any dtype with fixed bytes, C and F order, sliced, reversed, read-only."""
    dtype = (
        np.dtype(draw(st.sampled_from(NUMPY_DTYPES)))
        if draw(st.integers(0, 3))
        else draw(st.sampled_from(STRUCTURED_DTYPES))
    )
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    length = math.prod(shape) * dtype.itemsize
    data = draw(st.binary(min_size=length, max_size=length))
    if dtype.kind == "U":
        data = (np.frombuffer(data, dtype.str[0] + "u4") % 0xD800).astype(dtype.str[0] + "u4").tobytes()
    array = np.frombuffer(bytearray(data), dtype).reshape(shape) if length else np.zeros(shape, dtype)
    change = draw(st.integers(0, 5))
    if change == 1:
        array = np.asfortranarray(array)
    elif change == 2 and shape:
        array = array[::-1]
    elif change == 3 and shape:
        array = array[..., ::2]
    elif change == 4:
        array = array.T
    elif change == 5:
        array.flags.writeable = False
    return array


def _special_floats() -> st.SearchStrategy[float]:
    return st.sampled_from([0.0, -0.0, 5e-324, float("inf"), float("-inf")]) | st.binary(min_size=8, max_size=8).map(
        lambda raw: np.frombuffer(raw, "<f8").tolist()[0]
    )


def numpy_scalars() -> st.SearchStrategy[np.generic]:
    """Scalars of every numpy type."""
    plain = st.sampled_from([code for code in NUMPY_DTYPES if code[1] in "biufcmM" and code[0] != ">"]).flatmap(
        lambda code: st.binary(min_size=16, max_size=32).map(
            lambda raw: np.frombuffer(raw[: np.dtype(code).itemsize].ljust(np.dtype(code).itemsize, b"\0"), code)[0]
        )
    )
    text = (
        st.text(max_size=5).map(np.str_)
        | st.binary(max_size=5).map(np.bytes_)
        | st.binary(min_size=1, max_size=5).map(np.void)
    )
    record = st.sampled_from(STRUCTURED_DTYPES).map(lambda dtype: np.zeros((), dtype)[()])
    return plain | text | record


@st.composite
def scalars(draw: st.DrawFn) -> Any:
    """Values that are neither arrays nor containers."""
    return draw(_SCALARS)


def _scalars() -> st.SearchStrategy[Any]:
    return st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.integers(-(2**200), 2**200),
        _special_floats(),
        st.builds(complex, _special_floats(), _special_floats()),
        st.text(),
        st.text(st.characters(categories=["Cs"]), max_size=3),
        st.binary(max_size=300),
        st.binary(max_size=8).map(bytearray),
        st.sampled_from(TORCH_DTYPES),
        st.sampled_from(["cpu", "cuda", "cuda:1", "meta"]).map(torch.device),
        st.lists(st.integers(0, 2**62), max_size=4).map(torch.Size),
        numpy_scalars(),
    )


_SCALARS = _scalars()
# Strategies are wrapped in composites: hypothesis prints the others in full, which takes longer than the test.


@st.composite
def packed(draw: st.DrawFn) -> Any:
    """Long lists and tuples of plain numbers, and some that only nearly are."""
    return draw(_PACKED)


def _packed() -> st.SearchStrategy[Any]:
    numbers = st.lists(st.integers(-(2**63), 2**63 - 1), min_size=30, max_size=40) | st.lists(
        _special_floats(), min_size=30, max_size=40
    )
    nearly = st.lists(st.integers(2**62, 2**64) | st.booleans(), min_size=32, max_size=33)
    return numbers | numbers.map(tuple) | nearly


_PACKED = _packed()


@st.composite
def keys(draw: st.DrawFn) -> Any:
    """Dict keys of every kind that has a path component."""
    return draw(_KEYS)


def _keys() -> st.SearchStrategy[Any]:
    plain = st.one_of(
        st.text(max_size=6),
        st.sampled_from(["1", "-3", "", "~n", "~s:", "a/b", "*", "..", ".", "%2F", "a,b", "~indices"]),
        st.integers(-5, 5),
        st.integers(),
        st.booleans(),
        st.none(),
        st.floats(allow_nan=False),
        st.binary(max_size=4),
    )
    return plain | st.tuples(plain, plain) | st.just(())


_KEYS = _keys()


@st.composite
def sparse_tensors(draw: st.DrawFn) -> torch.Tensor:
    """COO, CSR, CSC, BSR or BSC, with any bits as values."""
    dense = torch.tensor(draw(st.lists(st.integers(0, 2), min_size=16, max_size=16)), dtype=torch.float32).reshape(4, 4)
    layout = draw(st.integers(0, 5))
    if layout == 0:
        return dense.to_sparse()
    if layout == 1:
        index = torch.tensor(draw(st.lists(st.integers(0, 3), min_size=3, max_size=3)))
        return torch.sparse_coo_tensor(index[None], dense[:3], (4, 4), check_invariants=True)
    if layout in (2, 3):
        return dense.to_sparse_csr() if layout == 2 else dense.to_sparse_csc()
    return dense.to_sparse_bsr((2, 2)) if layout == 4 else dense.to_sparse_bsc((2, 2))


@st.composite
def quantized_tensors(draw: st.DrawFn) -> torch.Tensor:
    """Per tensor and per channel, in every quantized type."""
    values = torch.tensor(draw(st.lists(st.floats(-4, 4, width=32), min_size=24, max_size=24))).reshape(2, 3, 2, 2)
    if draw(st.booleans()):
        dtype = draw(st.sampled_from([torch.quint8, torch.qint8, torch.qint32]))
        if draw(st.booleans()):
            values = values.contiguous(memory_format=torch.channels_last)
        return torch.quantize_per_tensor(values, draw(st.floats(0.001, 1)), draw(st.integers(0, 20)), dtype)
    scales = torch.tensor([0.1, 0.25, 3.0])
    if draw(st.booleans()):
        dtype = draw(st.sampled_from([torch.qint8, torch.quint8]))
        return torch.quantize_per_channel(values, scales, torch.tensor([1, 2, 3]), 1, dtype)
    zero_points = torch.tensor([0.5, -1.0, 0.0])
    return torch.quantize_per_channel(values.transpose(0, 1).contiguous(), scales, zero_points, 0, torch.quint4x2)


def leaves() -> st.SearchStrategy[Any]:
    """Anything that is no container."""
    return st.one_of(scalars(), tensors(), ndarrays(), packed(), sparse_tensors(), quantized_tensors())


@st.composite
def sharing_tensors(draw: st.DrawFn) -> list[Any]:
    """Views of one buffer: the same ones, overlapping ones, others apart, of another type, and all of it."""
    base = (
        torch.frombuffer(bytearray(draw(st.binary(min_size=96, max_size=96))), dtype=torch.float32)
        .clone()
        .reshape(4, 6)
    )
    views = [
        base,
        base.detach(),
        base.t(),
        base[1:3],
        base[:, 1:4],
        base[:, ::2],
        base[:, 1::2],
        base.view(torch.int32),
        base.view(torch.uint8)[:, 4:12],
        base[0].expand(3, 6),
        base.view(torch.complex64),
        base.view(torch.complex64).conj(),
        torch._neg_view(base),
        torch.nn.Parameter(base),
        base[:0],
    ]
    return draw(st.lists(st.sampled_from(views), min_size=1, max_size=6))


@st.composite
def sharing_ndarrays(draw: st.DrawFn) -> list[Any]:
    """The same for numpy, with reversed views and single fields of records."""
    base = np.frombuffer(
        bytearray(draw(st.binary(min_size=90, max_size=90))), np.dtype([("a", "|u1"), ("b", "<f4")])
    ).reshape(3, 6)
    views = [base, base[:], base.T, base[::-1], base[1:], base["a"], base["b"], base["b"][:, ::-2], base[:, :0]]
    return draw(st.lists(st.sampled_from(views), min_size=1, max_size=6))


def containers(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """One level of nesting."""
    return st.one_of(
        st.dictionaries(keys(), children, max_size=4),
        st.dictionaries(keys(), children, max_size=3).map(OrderedDict),
        st.lists(children, max_size=4),
        st.lists(children, max_size=4).map(tuple),
        st.builds(Plain, children, children),
        st.builds(Typed, children, children),
        st.builds(Mutable, children, children),
        st.builds(Frozen, children, children),
        sharing_tensors(),
        sharing_ndarrays(),
    )


def states(max_leaves: int = 12) -> st.SearchStrategy[Any]:
    """Whole states."""
    return st.recursive(leaves(), containers, max_leaves=max_leaves)
