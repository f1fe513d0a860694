"""File names are built and parsed in one place; names of people never become paths."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from castore.backend.base import is_name
from castore.errors import FormatError, InvalidNameError
from castore.format.layout import (
    POLICY,
    branch_name,
    check_ref_name,
    decode_ref_name,
    encode_ref_name,
    forgotten_name,
    new_lease_name,
    orphan_name,
    pack_name,
    parse_forgotten_name,
    parse_orphan_name,
    parse_pack_name,
    parse_snapshot_name,
    parse_thin_name,
    snapshot_name,
    tag_name,
    thin_name,
)
from castore.ids import PackId, SnapshotId

PACK = PackId("3f2a" + "0" * 28)


def test_file_names_are_pinned() -> None:
    assert pack_name(PACK) == f"packs/3f/{PACK}.pack"
    assert snapshot_name(SnapshotId("ab" * 16)) == "snapshots/" + "ab" * 16
    assert branch_name("main") == "refs/branches/main"
    assert forgotten_name(SnapshotId("ab" * 16)) == "forgotten/" + "ab" * 16
    assert thin_name(SnapshotId("ab" * 16)) == "thin/" + "ab" * 16
    assert orphan_name(SnapshotId("ab" * 16)) == "orphans/" + "ab" * 16
    assert POLICY == "policy"
    assert tag_name("v1.0") == "refs/tags/v1%2E0"
    assert new_lease_name(lambda count: bytes(range(count))) == "leases/000102030405060708090a0b0c0d0e0f.lease"


def test_names_of_packs_are_parsed_and_strangers_are_none() -> None:
    assert parse_pack_name(pack_name(PACK)) == PACK
    for name in (
        "",
        PACK,
        f"{PACK}.pack",
        f"packs/{PACK}.pack",
        f"packs/00/{PACK}.pack",
        f"packs/3f/{PACK}",
        f"packs/3f/{PACK}.pack.pack",
        f"packs/3f/x/{PACK}.pack",
        f"packs/3F/{PACK.upper()}.pack",
        f"packs/3f/{PACK[:-1]}.pack",
        f"packs/3f/{PACK}0.pack",
        f"snapshots/3f/{PACK}.pack",
        "packs/3f/README",
    ):
        assert parse_pack_name(name) is None, name


@pytest.mark.parametrize(
    ("directory", "parse"),
    [
        ("snapshots", parse_snapshot_name),
        ("forgotten", parse_forgotten_name),
        ("thin", parse_thin_name),
        ("orphans", parse_orphan_name),
    ],
)
def test_names_of_snapshots_and_their_marks_are_parsed_and_strangers_are_none(directory, parse) -> None:
    for digits in (32, 64):
        assert parse(f"{directory}/" + "a" * digits) == "a" * digits
    for name in (
        "",
        "a" * 32,
        f"{directory}/",
        f"{directory}/" + "a" * 33,
        f"{directory}/x/" + "a" * 32,
        f"{directory}/" + "A" * 32,
        "refs/" + "a" * 32,
    ):
        assert parse(name) is None, name


@pytest.mark.parametrize(
    ("name", "encoded"),
    [
        ("main", "main"),
        ("feature/lr-2e_5", "feature%2Flr-2e_5"),
        ("Main", "%4Dain"),
        (".hidden", "%2Ehidden"),
        ("v1.0", "v1%2E0"),
        ("größe", "gr%C3%B6%C3%9Fe"),
        ("100%", "100%25"),
        ("🙂", "%F0%9F%99%82"),
    ],
)
def test_the_encoding_of_ref_names_is_pinned(name: str, encoded: str) -> None:
    assert encode_ref_name(name) == encoded, "the format changed: bump the version"
    assert decode_ref_name(encoded) == name


@given(st.text(max_size=20))
def test_any_name_comes_back_and_is_a_plain_file_name(name: str) -> None:
    encoded = encode_ref_name(name)
    assert decode_ref_name(encoded) == name
    assert set(encoded) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-%ABCDEF")
    assert encoded == "" or is_name("refs/branches/" + encoded)


@given(st.text(max_size=12), st.text(max_size=12))
def test_names_stay_apart_where_case_is_folded(a: str, b: str) -> None:
    folded = [encode_ref_name(name).lower() for name in (a, b)]
    assert (folded[0] == folded[1]) == (a == b)


@given(st.one_of(st.text(max_size=12), st.text("%0aAfF_.Main", max_size=12)))
def test_file_names_that_no_ref_has_are_format_errors(encoded: str) -> None:
    try:
        name = decode_ref_name(encoded)
    except FormatError:
        pass
    else:
        assert encode_ref_name(name) == encoded


@pytest.mark.parametrize(
    "encoded", ["Main", "%4dain", "%6D", "%", "%4", "%ZZ", "%FF", "a.b", "a b", "é", "\ud800", "a" * 241]
)
def test_other_spellings_are_refused(encoded: str) -> None:
    with pytest.raises(FormatError, match="is not an encoded ref name"):
        decode_ref_name(encoded)


def test_a_name_too_long_for_a_file_system_is_refused() -> None:
    check_ref_name("a" * 240)
    for name in ("a" * 241, "A" * 81, "🙂" * 21):
        with pytest.raises(InvalidNameError, match="at most 240 encoded bytes"):
            check_ref_name(name)
