"""The config file: pinned, and refused with a reason when it is newer, foreign or damaged."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from castore.errors import DamageError, FormatError, UnsupportedFormatError
from castore.format.config import FORMAT_VERSION, OPERATIONS, Config, decode_config, encode_config
from castore.format.textfile import decode_text_file, encode_text_file
from castore.options import RepositoryOptions
from tests.suites.golden import assert_golden
from tests.suites.sealed import sealed_text

NO_FEATURES: dict[Any, frozenset[str]] = dict.fromkeys(OPERATIONS, frozenset())
CONFIG = Config(bytes(range(16)), RepositoryOptions(), 1_700_000_000_000_000_000, NO_FEATURES)


def changed(**fields: Any) -> bytes:
    """A config with other fields and the right digest; None leaves a field out."""
    merged = {**decode_text_file(encode_config(CONFIG), name="config"), **fields}
    return encode_text_file({key: value for key, value in merged.items() if value is not None})


def test_the_bytes_are_pinned() -> None:
    line = (
        b'{"compression":"auto","created_ns":1700000000000000000,"features":{"gc":[],"read":[],"write":[]},"format":1,'
        b'"hash":"xxh3-128","id":"000102030405060708090a0b0c0d0e0f","lease_s":60.0,"orphan_grace_s":1209600.0}'
    )
    assert_golden(encode_config(CONFIG), (line + b"\nxxh3-128:f1bf02b010333c497f378dd2767a684b\n").hex())


@pytest.mark.parametrize(
    "options",
    [
        RepositoryOptions(),
        RepositoryOptions(hash="blake3", compression="none", lease_s=0.5, orphan_grace_s=1.0),
        RepositoryOptions(compression="lz4", lease_s=1e9),
    ],
)
def test_a_config_comes_back(options: RepositoryOptions) -> None:
    features: dict[Any, frozenset[str]] = {"read": frozenset(), "write": frozenset({"a", "b"}), "gc": frozenset({"c"})}
    config = Config(b"\xff" * 16, options, 12, features)
    assert decode_config(encode_config(config), where="config") == config


def test_whole_seconds_may_be_written_without_a_point() -> None:
    assert decode_config(changed(lease_s=60), where="config") == CONFIG


def test_fields_that_are_not_known_are_passed_over() -> None:
    assert decode_config(changed(comment="of a newer minor version"), where="config") == CONFIG


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": FORMAT_VERSION + 1}, "repository format 2; this castore reads format 1: install a newer castore"),
        ({"hash": "sha256"}, "hash 'sha256' is unknown; expected xxh3-128, blake3"),
        ({"compression": "brotli"}, "compression 'brotli' is unknown"),
    ],
)
def test_what_a_newer_castore_wrote_says_so(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedFormatError, match=message):
        decode_config(changed(**fields), where="here/config")


@pytest.mark.parametrize(
    "fields",
    [
        {"format": None},
        {"format": True},
        {"format": "0"},
        {"id": None},
        {"id": "00"},
        {"id": "G" * 32},
        {"id": 5},
        {"lease_s": None},
        {"lease_s": 0},
        {"lease_s": -1.0},
        {"lease_s": True},
        {"lease_s": "60"},
        {"lease_s": 10**400},
        {"orphan_grace_s": None},
        {"created_ns": 1.5},
        {"features": None},
        {"features": []},
        {"features": {"read": [], "write": []}},
        {"features": {"read": [], "write": [], "gc": [1]}},
        {"features": {"read": [], "write": [], "gc": "x"}},
    ],
)
def test_fields_that_cannot_be_are_format_errors(fields: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match="here/config"):
        decode_config(changed(**fields), where="here/config")


@pytest.mark.parametrize("fields", [{"hash": None}, {"hash": ["x"]}, {"compression": None}, {"compression": {}}])
def test_an_unknown_algorithm_of_any_type_is_a_typed_error(fields: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedFormatError):
        decode_config(changed(**fields), where="config")


@pytest.mark.parametrize("text", ["NaN", "Infinity", "1e999"])
def test_seconds_that_json_does_not_know_are_refused(text: str) -> None:
    line = encode_config(CONFIG).splitlines()[0].replace(b"60.0", text.encode())

    with pytest.raises(FormatError, match="seconds above 0"):
        decode_config(sealed_text(line), where="config")


@given(
    st.dictionaries(
        st.sampled_from(["format", "id", "hash", "features", "lease_s"]), st.none() | st.integers() | st.text()
    )
)
def test_any_fields_give_a_config_or_a_typed_error(fields: dict[str, Any]) -> None:
    with contextlib.suppress(DamageError, UnsupportedFormatError):
        decode_config(changed(**fields), where="config")


def test_a_feature_that_is_not_known_refuses_only_its_operation() -> None:
    config = replace(CONFIG, features={**NO_FEATURES, "gc": frozenset({"deltas", "packs-2"})})
    config.check_features("read", where="here")
    config.check_features("write", where="here")
    with pytest.raises(UnsupportedFormatError, match=r"here: to gc this repository needs deltas, packs-2, which"):
        config.check_features("gc", where="here")
