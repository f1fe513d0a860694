"""Bit-exact comparison of states: types, key order, dtypes, strides and every byte."""

from __future__ import annotations

import dataclasses
import struct
from typing import Any

import numpy as np
import torch

from castore.tensors.flatten import flatten


def assert_states_equal(found: Any, expected: Any, *, strides: bool = True, where: str = "state") -> None:
    """Fail with the place where two states differ in type, structure, dtype, layout or any byte."""
    assert type(found) is type(expected), f"{where}: {type(found)} is not {type(expected)}"
    if isinstance(expected, torch.Tensor):
        _assert_tensors_equal(found, expected, strides=strides, where=where)
    elif isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype, f"{where}: {found.dtype} is not {expected.dtype}"
        assert found.shape == expected.shape, f"{where}: {found.shape} is not {expected.shape}"
        assert array_bytes(found) == array_bytes(expected), f"{where}: bytes differ"
    elif isinstance(expected, dict):
        assert [(type(key), key) for key in found] == [(type(key), key) for key in expected], f"{where}: keys"
        for key, child in expected.items():
            assert_states_equal(found[key], child, strides=strides, where=f"{where}[{key!r}]")
    elif isinstance(expected, list | tuple) and not isinstance(expected, torch.Size):
        assert len(found) == len(expected), f"{where}: {len(found)} items are not {len(expected)}"
        for index, child in enumerate(expected):
            assert_states_equal(found[index], child, strides=strides, where=f"{where}[{index}]")
    elif dataclasses.is_dataclass(expected):
        for spec in dataclasses.fields(expected):
            child = getattr(expected, spec.name)
            assert_states_equal(getattr(found, spec.name), child, strides=strides, where=f"{where}.{spec.name}")
    else:
        assert scalar_bytes(found) == scalar_bytes(expected), f"{where}: {found!r} is not {expected!r}"


def _assert_tensors_equal(found: torch.Tensor, expected: torch.Tensor, *, strides: bool, where: str) -> None:
    assert found.dtype is expected.dtype, f"{where}: {found.dtype} is not {expected.dtype}"
    assert found.shape == expected.shape, f"{where}: {found.shape} is not {expected.shape}"
    assert found.layout is expected.layout, f"{where}: {found.layout} is not {expected.layout}"
    assert found.requires_grad == expected.requires_grad, f"{where}: requires_grad"
    if expected.is_quantized or expected.layout is not torch.strided:
        assert leaf_table(found) == leaf_table(expected), f"{where}: parts differ"
        return
    if strides:
        # A view of a storage has its own strides again, whatever they are.
        assert found.stride() in {expected.stride(), restored_stride(expected)}, f"{where}: {found.stride()}"
    assert array_bytes(found) == array_bytes(expected), f"{where}: bytes differ"


def leaf_table(state: Any) -> list[tuple[Any, ...]]:
    """Every entry of a state with its bytes, without hints."""
    flat = flatten(state)
    return [
        (e.path, e.kind, e.dtype, e.shape, dict(e.attrs), bytes(p.read(0, p.raw_bytes)) if p else b"")
        for e, p in zip(flat.entries, flat.payloads, strict=True)
    ]


def restored_stride(tensor: torch.Tensor) -> tuple[int, ...]:
    """The strides that a tensor has after a round trip: its own if dense, else row-major."""
    shape, stride = tuple(tensor.shape), tensor.stride()
    if tensor.numel() and not tensor.is_conj() and not tensor.is_neg():
        expected = 1
        for step, size in sorted((step, size) for size, step in zip(shape, stride, strict=True) if size > 1):
            if step != expected:
                break
            expected *= size
        else:
            return stride
    return torch.empty(shape, device="meta").stride()


def array_bytes(array: Any) -> bytes:
    """The logical row-major bytes of an array, by a way of its own: element by element."""
    if isinstance(array, np.ndarray):
        # As opaque bytes: numpy copies records field by field and leaves out what lies between.
        return array.view(np.dtype((np.void, array.dtype.itemsize))).tobytes() if array.dtype.itemsize else b""
    array = array.detach().cpu()
    if array.is_conj() or array.is_neg():
        array = array.resolve_conj().resolve_neg()
    size = array.dtype.itemsize
    memory = torch.empty(0, dtype=torch.uint8).set_(array.untyped_storage()).numpy().tobytes()
    base = array.storage_offset()
    starts = [
        (base + sum(i * s for i, s in zip(index, array.stride(), strict=True))) * size
        for index in np.ndindex(*array.shape)
    ]
    return b"".join(memory[start : start + size] for start in starts)


def scalar_bytes(value: Any) -> Any:
    """Something that is equal only for values of the same bits."""
    if isinstance(value, np.generic):
        text = str(value) if isinstance(value, np.str_) else value.tobytes()[: 10 if value.dtype.char == "g" else None]
        return value.dtype, text
    if type(value) is float:
        return struct.pack("<d", value)
    if type(value) is complex:
        return struct.pack("<2d", value.real, value.imag)
    return value
