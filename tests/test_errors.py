"""The tree in the docstring is the real one; every error derives from CastoreError, pickles, and keeps its facts."""

from __future__ import annotations

import copy
import errno
import importlib
import inspect
import pickle
import pkgutil
import re
from typing import Any

import pytest

import castore
from castore import errors
from castore.errors import CastoreError, CastoreWarning

CLASSES: dict[str, type[CastoreError]] = {
    name: value for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, CastoreError)
}
WARNINGS: dict[str, type[CastoreWarning]] = {
    name: value for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, CastoreWarning)
}
_LINE = re.compile(r"^([│├└─ ]*)(\w+(?:Error|Warning))\s*(.*)$")
_ALSO = re.compile(r"\((?:also )?an? (\w+)\)")

FACTS: dict[str, dict[str, Any]] = {
    "UnsupportedLeafError": {"path": "model/x", "type_name": "object"},
    "ConflictError": {"branch": "main", "snapshot_id": "a" * 32, "expected_id": None, "found_id": "b" * 32},
    "DivergedError": {"branch": "main", "snapshot_id": "a" * 32, "found_id": "b" * 32, "where": "/backup/store"},
    "StateMismatchError": {"message": "m", "missing": ["a"], "unexpected": ["b"], "mismatched": ["c", "d"]},
    "PartialLoadError": {"message": "m", "overwritten": ["a", "b"]},
    "UnknownRefError": {"message": "m", "near": ["main"]},
    "AmbiguousRefError": {"message": "m", "near": ["heads/x", "tags/x"]},
    "PathNotFoundError": {"message": "m", "near": ["model/w"]},
    "LostLeavesError": {"message": "m", "lost": ["model/w"], "left": ["step", "model/b"]},
    "NoValidSnapshotError": {"message": "m", "skipped": [("3f2a", "checksum")]},
    "ThinnedError": {"message": "m", "dropped": ["optimizer/m"], "left": ["model"]},
    "WorkerError": {"message": "m", "exit_status": -9},
}
"""Arguments of the errors that take more than a message; each becomes an attribute."""


def make(name: str) -> CastoreError:
    facts = dict(FACTS.get(name, {"message": "pack 3f: expected 4096 bytes, found 912"}))
    positional = [facts.pop(key) for key in ("message", "branch") if key in facts]
    return CLASSES[name](*positional, **facts)


def drawn_tree() -> dict[str, tuple[str, str]]:
    """Name → (parent, the built-in it is too), as drawn."""
    tree: dict[str, tuple[str, str]] = {}
    stack: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = _LINE.match(line)
        if match:
            depth = len(match[1]) // 4
            also = _ALSO.search(match[3])
            del stack[depth:]
            tree[match[2]] = (stack[-1] if stack else "", also[1] if also else "")
            stack.append(match[2])
    return tree


def test_the_trees_in_the_docstring_are_the_real_ones() -> None:
    real = {}
    for name, cls in {**CLASSES, **WARNINGS}.items():
        parents = [base.__name__ for base in cls.__bases__ if issubclass(base, CastoreError | CastoreWarning)]
        others = [base.__name__ for base in cls.__bases__ if not issubclass(base, CastoreError | CastoreWarning)]
        assert len(parents) <= 1, name
        real[name] = ("".join(parents), "".join(others).removeprefix("Exception"))
    assert drawn_tree() == real


def test_the_order_of_the_tree_is_the_order_of_the_file() -> None:
    assert [name for name in drawn_tree() if name in CLASSES] == list(CLASSES)


def modules() -> list[str]:
    return [info.name for info in pkgutil.walk_packages(castore.__path__, "castore.") if "__main__" not in info.name]


def test_every_error_of_the_package_derives_from_castore_error() -> None:
    strangers = {
        f"{module_name}.{value.__name__}"
        for module_name in modules()
        for value in vars(importlib.import_module(module_name)).values()
        if inspect.isclass(value) and issubclass(value, BaseException) and value.__module__ == module_name
        if not issubclass(value, CastoreError | CastoreWarning) and not value.__name__.startswith("_")
    }
    assert strangers == set(), "only private exceptions, which never leave their module, may be others"


@pytest.mark.parametrize("name", CLASSES)
def test_every_error_pickles_with_its_facts(name: str) -> None:
    error = make(name)
    error.args = (f"leaf 'w': {error}", *error.args[1:])  # as fetching does, to say which leaf
    error.add_note("a note")
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert again.args == error.args
        assert again.__notes__ == ["a note"]
        for key, value in FACTS.get(name, {}).items():
            if key != "message":
                assert getattr(again, key) == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize("name", CLASSES)
def test_every_error_is_caught_as_a_castore_error_and_reads_as_its_message(name: str) -> None:
    with pytest.raises(CastoreError) as caught:
        raise make(name)
    assert str(caught.value)
    assert "\n" not in str(caught.value)
    assert not str(caught.value).startswith(("'", '"', "(")), "a KeyError would show the repr of its message"


def test_the_number_of_the_operating_system_survives_a_pickle() -> None:
    error = errors.StorageError("disk: cannot write: no space left")
    error.errno = errno.ENOSPC
    again = pickle.loads(pickle.dumps(error))
    assert again.errno == errno.ENOSPC
    assert str(again) == str(error)


def test_messages_of_the_errors_that_make_them_say_what_to_do() -> None:
    assert str(errors.UnsupportedLeafError("model/x", "object")) == (
        "leaf 'model/x': type object has no typed encoding; convert it to a supported type, or give allow_pickle=True "
        "at save and at load"
    )
    assert str(errors.UnsupportedLeafError("", "object", "do this")).startswith("leaf the root of the state: ")
    conflict = errors.ConflictError("main", snapshot_id="a" * 32, expected_id=None, found_id="b" * 32)
    assert "expected head no branch, found bbbbbbbbbbbb;" in str(conflict)
    assert "`castore branch NAME aaaaaaaaaaaa`" in str(conflict)


def test_the_public_errors_are_all_exported() -> None:
    missing = [name for name in CLASSES if name not in castore.__all__]
    assert missing == []
    assert all(getattr(castore, name) is cls for name, cls in CLASSES.items())
