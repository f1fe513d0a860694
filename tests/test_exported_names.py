"""The front door: what `import castore` offers is stated once, complete, documented; nothing leaks."""

from __future__ import annotations

import inspect

import pytest

import castore
import castore.errors

PROMISED = {"CastoreError", "Repository", "Snapshot", "__version__", "init", "load", "open", "save"}
"""The names that README and the docs use; they never go away without a major release."""


def test_the_promised_names_are_exported() -> None:
    assert PROMISED - set(castore.__all__) == set()


def test_all_is_sorted_and_complete() -> None:
    public = {
        name
        for name, value in vars(castore).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("castore")
    }
    assert list(castore.__all__) == sorted(castore.__all__)
    assert public - set(castore.__all__) == set()


@pytest.mark.parametrize("name", sorted(set(castore.__all__) - {"__version__"}))
def test_an_exported_name_exists_and_is_documented(name: str) -> None:
    value = getattr(castore, name)
    if inspect.isclass(value) or inspect.isroutine(value):
        assert inspect.getdoc(value)


def test_every_error_is_exported_and_derives_from_castore_error() -> None:
    errors = {
        name: value
        for name, value in vars(castore.errors).items()
        if inspect.isclass(value) and value.__module__ == "castore.errors" and not name.startswith("_")
    }
    assert set(errors) - set(castore.__all__) == set()
    roots = (castore.CastoreError, castore.CastoreWarning)
    assert all(issubclass(error, roots) for error in errors.values())


def test_the_error_tree_in_the_docstring_names_every_error_once() -> None:
    drawn = [line.split("─ ")[-1].split()[0] for line in (castore.errors.__doc__ or "").splitlines() if "── " in line]
    defined = [
        name
        for name, value in vars(castore.errors).items()
        if inspect.isclass(value)
        and value.__module__ == "castore.errors"
        and name not in {"CastoreError", "CastoreWarning"}
    ]
    assert sorted(drawn) == sorted(defined)
