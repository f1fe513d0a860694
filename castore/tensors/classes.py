"""Named tuples and dataclasses: recognised when saving, found and filled when loading.

A manifest names a class as "module:qualname" and its fields. Loading never imports: the class must be given,
or must be loaded in this process already. It must be a namedtuple or dataclass with the same fields, and is
filled without running its constructor, so a manifest from a stranger can neither load code nor call any.
"""

from __future__ import annotations

import dataclasses
import enum
import sys
from collections.abc import Mapping
from typing import Any

from castore.errors import FormatError, UnknownClassError, UnsupportedLeafError
from castore.format.manifest import Entry, Kind
from castore.tensors.lazy import loaded_torch

_HEAP_TYPE = 1 << 9
"""CPython's flag of classes that a class statement made; the first base without it decides the memory layout.
"""


def class_name(cls: type) -> str:
    """How a manifest names a class."""
    return f"{cls.__module__}:{cls.__qualname__}"


def is_namedtuple(value: object) -> bool:
    """Whether the value is an instance of a class made by `collections.namedtuple` or `typing.NamedTuple`."""
    fields: tuple[str, ...] = getattr(type(value), "_fields", ())
    return isinstance(value, tuple) and _is_namedtuple_class(type(value)) and len(value) == len(fields)


def is_dataclass(value: object) -> bool:
    """Whether the value is an instance, not the class itself, of a dataclass that stands on plain objects."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type) and _is_plain_dataclass(type(value))


def is_record(value: object) -> bool:
    """Whether the value is a namedtuple or a dataclass that is taken apart: no member of an enumeration, no module."""
    if not (is_namedtuple(value) or is_dataclass(value)) or isinstance(value, enum.Enum):
        return False
    torch = loaded_torch()
    return torch is None or not isinstance(value, torch.nn.Module)


def namedtuple_fields(value: Any, path: str) -> dict[str, Any]:
    """Field names → values. Raises UnsupportedLeafError when the instance holds more than its fields."""
    _refuse_extra(value, frozenset(), path)
    return dict(zip(type(value)._fields, value, strict=True))


def dataclass_fields(value: Any, path: str) -> dict[str, Any]:
    """Field names → values. Raises UnsupportedLeafError for an instance with more or less than its fields."""
    names = [field.name for field in dataclasses.fields(value)]
    _refuse_extra(value, frozenset(names), path)
    absent = [name for name in names if not hasattr(value, name)]
    if absent:
        raise UnsupportedLeafError(
            path, class_name(type(value)), f"its field {absent[0]!r} has no value: set it before saving"
        )
    return {name: getattr(value, name) for name in names}


def _refuse_extra(value: Any, known: frozenset[str], path: str) -> None:
    extra = sorted(getattr(value, "__dict__", {}).keys() - known)
    if extra:
        raise UnsupportedLeafError(
            path,
            class_name(type(value)),
            f"its attribute {extra[0]!r} is no field and would be lost: save a dict instead",
        )


def _is_namedtuple_class(cls: type) -> bool:
    fields = getattr(cls, "_fields", None)
    return (
        issubclass(cls, tuple)
        and isinstance(fields, tuple)
        and all(isinstance(name, str) for name in fields)
        and tuple.__itemsize__ == cls.__itemsize__
    )


def _is_plain_dataclass(cls: type) -> bool:
    """Whether `object.__new__` makes its instances: false for a dataclass that is also a dict, a str, an
    exception.
    """
    return next(base for base in cls.__mro__ if not base.__flags__ & _HEAP_TYPE) is object


# ---- back --------------------------------------------------------------------------------------------------


def find_class(entry: Entry, classes: Mapping[str, type] | None) -> type:
    """The class of a NAMEDTUPLE or DATACLASS entry. Raises UnknownClassError, which says what to do."""
    name, fields = entry.attrs.get("class"), entry.attrs.get("fields")
    where = f"leaf {entry.path!r}"
    if not isinstance(name, str) or not isinstance(fields, list) or not all(isinstance(field, str) for field in fields):
        raise FormatError(f"{where}: expected a class and its fields, found {str(dict(entry.attrs))[:80]}")
    advice = f'pass classes={{"{name}": YourClass}}, or missing_classes="dict" to get a dict'
    cls = classes[name] if classes is not None and name in classes else _loaded_class(name)
    if cls is None:
        module = name.partition(":")[0]
        raise UnknownClassError(f"{where}: class {name} is not loaded here; import {module} first, or {advice}")
    found = _fields_of(cls, entry.kind)
    if found is None:
        kind = "namedtuple" if entry.kind is Kind.NAMEDTUPLE else "dataclass"
        raise UnknownClassError(f"{where}: {name} is not a {kind} here; {advice}")
    same = found == fields if entry.kind is Kind.NAMEDTUPLE else sorted(found) == sorted(fields)
    if not same:
        raise UnknownClassError(f"{where}: {name} was saved with fields {fields} and has {found} here; {advice}")
    return cls


def _loaded_class(name: str) -> type | None:
    """The class if its module is imported. Looks into namespaces: a module's `__getattr__` may import."""
    module_name, _, qualname = name.partition(":")
    module = sys.modules.get(module_name)
    found: Any = module
    for part in qualname.split("."):
        try:
            found = vars(found).get(part)
        except TypeError:
            return None
    return found if isinstance(found, type) else None


def _fields_of(cls: type, kind: Kind) -> list[str] | None:
    if kind is Kind.NAMEDTUPLE:
        return list(cls._fields) if _is_namedtuple_class(cls) else None  # type: ignore[attr-defined]
    if not dataclasses.is_dataclass(cls) or not _is_plain_dataclass(cls):
        return None
    return [field.name for field in dataclasses.fields(cls)]


def build_namedtuple(cls: type, values: Mapping[str, Any]) -> Any:
    """An instance with these fields; the class's `__new__` does not run."""
    return tuple.__new__(cls, [values[name] for name in cls._fields])  # type: ignore[attr-defined]


def build_dataclass(cls: type, values: Mapping[str, Any]) -> Any:
    """An instance with these fields; neither `__init__` nor `__post_init__` nor `__setattr__` of the class
    runs.
    """
    made: Any = object.__new__(cls)
    for name, value in values.items():
        object.__setattr__(made, name, value)
    return made
