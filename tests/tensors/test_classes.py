"""Named tuples and dataclasses: never imported, never constructed by their own code."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections import namedtuple
from typing import Any, NamedTuple

import pytest
import torch

from castore.errors import FormatError, UnknownClassError, UnsupportedLeafError
from castore.format.manifest import Entry, Kind
from castore.tensors import flatten, unflatten
from tests.tensors.round_trip import Saved, round_trip
from tests.tensors.strategies import Frozen, Mutable, Plain, Typed


@dataclasses.dataclass
class Guarded:
    value: int

    def __post_init__(self) -> None:
        raise AssertionError("ran")


@dataclasses.dataclass
class Computed:
    given: int
    derived: int = dataclasses.field(init=False, default=0)


class Outer:
    @dataclasses.dataclass
    class Inner:
        value: int


class Refusing(NamedTuple):
    value: int

    def __add__(self, other: object) -> Any:
        return NotImplemented


def test_instances_come_back_as_their_classes() -> None:
    state = [Plain(1, 2), Typed("s", [1]), Mutable("m", {}), Frozen("f", (1,)), Outer.Inner(3), Refusing(4)]
    loaded = round_trip(state)
    assert loaded == state
    assert [type(item) for item in loaded] == [type(item) for item in state]


def test_no_code_of_the_class_runs() -> None:
    guarded = object.__new__(Guarded)
    guarded.value = 5
    assert round_trip(guarded).value == 5
    computed = Computed(1)
    computed.derived = 9
    assert round_trip(computed) == computed


def test_a_frozen_dataclass_with_slots_comes_back() -> None:
    loaded = round_trip(Frozen("a", torch.ones(2)))
    assert loaded.values.tolist() == [1, 1]


def test_a_class_that_is_not_loaded_is_named_with_the_ways_out() -> None:
    module = types.ModuleType("some_training_script")
    sys.modules[module.__name__] = module
    try:
        exec("import dataclasses\n@dataclasses.dataclass\nclass Config:\n    lr: float", module.__dict__)
        saved = Saved({"cfg": module.Config(0.1)})
        assert type(saved.load()["cfg"]) is module.Config
    finally:
        del sys.modules[module.__name__]
    with pytest.raises(UnknownClassError) as caught:
        saved.load()
    for word in ("'cfg'", "some_training_script:Config", "import some_training_script", "classes=", "missing_classes"):
        assert word in str(caught.value)
    assert saved.load(missing_classes="dict") == {"cfg": {"lr": 0.1}}
    assert saved.load(classes={"some_training_script:Config": module.Config})["cfg"].lr == 0.1
    assert "some_training_script" not in sys.modules


def test_a_lazy_module_is_not_made_to_import() -> None:
    module = types.ModuleType("lazy_module")

    def refuse(name: str) -> Any:
        raise AssertionError(f"imported {name}")

    module.__getattr__ = refuse  # type: ignore[method-assign]
    sys.modules["lazy_module"] = module
    try:
        with pytest.raises(UnknownClassError):
            unflatten([Entry("", Kind.DATACLASS, shape=(0,), attrs={"class": "lazy_module:X", "fields": []})], {})
    finally:
        del sys.modules["lazy_module"]


@pytest.mark.parametrize(
    "cls",
    [
        namedtuple("Plain", ["first", "other"]),  # noqa: PYI024
        namedtuple("Plain", ["second", "first"]),  # noqa: PYI024
        tuple,
        Mutable,
        int,
    ],
)
def test_a_class_with_other_fields_is_refused(cls: type) -> None:
    saved = Saved(Plain(1, 2))
    with pytest.raises(UnknownClassError, match="missing_classes"):
        saved.load(classes={"tests.tensors.strategies:Plain": cls})


def test_a_manifest_cannot_name_something_that_is_no_plain_class() -> None:
    for kind, name in [
        (Kind.NAMEDTUPLE, "builtins:tuple"),
        (Kind.NAMEDTUPLE, "time:struct_time"),
        (Kind.DATACLASS, "os:system"),
        (Kind.DATACLASS, "builtins:object"),
        (Kind.DATACLASS, "subprocess:Popen"),
        (Kind.DATACLASS, ""),
        (Kind.DATACLASS, "sys:modules.os"),
    ]:
        with pytest.raises(UnknownClassError):
            unflatten([Entry("", kind, shape=(0,), attrs={"class": name, "fields": []})], {})
    for attrs in ({}, {"class": 3, "fields": []}, {"class": "a:b", "fields": "x"}, {"class": "a:b", "fields": [1]}):
        with pytest.raises(FormatError):
            unflatten([Entry("", Kind.DATACLASS, shape=(0,), attrs=attrs)], {})


def test_an_instance_with_more_than_its_fields_is_refused() -> None:
    extended = Mutable("a", 1)
    extended.note = "x"  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedLeafError, match="'note' is no field"):
        flatten(extended)


def test_an_instance_with_a_field_unset_is_refused() -> None:
    unset = object.__new__(Mutable)
    unset.name = "a"
    with pytest.raises(UnsupportedLeafError, match="'values' has no value"):
        flatten(unset)


def test_dataclasses_on_other_types_are_refused() -> None:
    @dataclasses.dataclass
    class Mapped(dict):  # type: ignore[type-arg]
        value: int = 0

    @dataclasses.dataclass(eq=False)
    class Layer(torch.nn.Module):
        value: int = 0

        def __post_init__(self) -> None:
            super().__init__()

    with pytest.raises(UnsupportedLeafError):
        flatten(Mapped())
    with pytest.raises(UnsupportedLeafError, match="state_dict"):
        flatten(Layer())


def test_a_part_of_an_instance_is_a_dict() -> None:
    saved = Saved({"cfg": Frozen("a", 1), "point": Plain(1, 2)})
    assert saved.load(keep=lambda path: path in ("cfg/name", "point/second")) == {
        "cfg": {"name": "a"},
        "point": {"second": 2},
    }
