"""What to tell somebody whose state holds a value that has no typed encoding."""

from __future__ import annotations

import collections
import datetime as dt
import enum
import os
import random
import types
from typing import Any

import numpy as np

from castore.errors import UnsupportedLeafError
from castore.tensors.lazy import loaded_torch

_BUILTIN_ADVICE: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (enum.Enum, "save its .name or .value"),
    (collections.Counter, "save dict(counter)"),
    (collections.defaultdict, "save dict(mapping): a default factory is code"),
    (collections.deque, "save list(deque), and its maxlen beside it"),
    (dict, "save dict(mapping): only dict and OrderedDict come back as they were"),
    ((set, frozenset), "save sorted(values), a list has an order that can be compared"),
    ((range, memoryview), "save list(range) or bytes(view)"),
    (os.PathLike, "save str(path)"),
    ((dt.date, dt.time), "save its .isoformat()"),
    (dt.timedelta, "save its .total_seconds()"),
    (random.Random, "save its .getstate()"),
    (np.random.Generator, "save generator.bit_generator.state"),
    (np.random.BitGenerator, "save its .state"),
    (np.random.RandomState, "save its .get_state()"),
    (
        (types.FunctionType, types.MethodType, types.BuiltinFunctionType, type),
        "code is no state: save its name",
    ),
    ((types.GeneratorType, types.ModuleType), "it has no state that can be written down"),
    ((str, bytes), "a subclass would come back as its base: convert it to str or bytes"),
    ((int, float, complex), "a subclass would come back as its base: convert it to int, float or complex"),
    (np.ma.MaskedArray, "save .data and .mask"),
    (np.ndarray, "save numpy.asarray(value)"),
    (tuple, "save tuple(value)"),
    (list, "save list(value)"),
)


def unsupported(value: Any, path: str) -> UnsupportedLeafError:
    """The error for a value, with the way out that fits its type."""
    kind = type(value)
    return UnsupportedLeafError(path, f"{kind.__module__}.{kind.__qualname__}", _advice(value))


def _advice(value: Any) -> str:
    torch_advice = _torch_advice(value)
    if torch_advice:
        return torch_advice
    for types_, advice in _BUILTIN_ADVICE:
        if isinstance(value, types_):
            return advice
    if not isinstance(value, type) and callable(getattr(value, "state_dict", None)):
        return "save its .state_dict()"
    return ""


def _torch_advice(value: Any) -> str:
    torch = loaded_torch()
    if torch is None:
        return ""
    if isinstance(value, torch.nn.Module):
        return "save module.state_dict()"
    if isinstance(value, torch.optim.Optimizer):
        return "save optimizer.state_dict()"
    if isinstance(value, torch.Generator):
        return "save generator.get_state()"
    if isinstance(value, torch.nn.parameter.UninitializedTensorMixin):
        return "it is not initialized yet: run the module once before saving"
    if isinstance(value, torch.Tensor):
        return "save the plain tensors inside it (DTensor: .to_local() or .full_tensor())"
    if isinstance(value, torch.storage.UntypedStorage | torch.storage.TypedStorage):
        return "save a tensor over the storage"
    if type(value).__module__ == "torch.return_types":
        return "save tuple(value)"
    return ""
