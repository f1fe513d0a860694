"""Keys and path components are inverse, different keys never collide, and globs mean what they say."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from castore.errors import FormatError, UnsupportedLeafError
from castore.format.paths import compile_glob, decode_key, encode_key, join, last_component, parent_of

# Signs that mean something to the escape, to globs, or to a file system; digits that make a text read as a number.
TRICKY = "~%/,*?[]!^-.:\\ 012aAuDd8sbntfy\x00\x1f\x7f\n\ud800\udfffé🙂"
texts = st.one_of(
    st.text(max_size=8),
    st.text(st.sampled_from(TRICKY), max_size=8),
    st.text(st.characters(exclude_categories=()), max_size=4),
    st.integers(-50, 50).map(str),
)
scalars = st.one_of(
    texts, st.integers(), st.booleans(), st.none(), st.floats(), st.binary(max_size=6), st.integers(-9, 9)
)
keys = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=5)


def same(a: Any, b: Any) -> bool:
    """Equal in type too: True, 1 and 1.0 are one key of a dict and three of a manifest."""
    if type(a) is not type(b):
        return False
    if isinstance(a, tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a.hex() == b.hex() if isinstance(a, float) else bool(a == b)


# ---- keys --------------------------------------------------------------------------------------------------

PINNED: tuple[tuple[Any, str], ...] = (
    (12, "12"),
    (-3, "-3"),
    (0, "0"),
    ("model", "model"),
    ("encoder.layer.0", "encoder.layer.0"),
    ("a/b", "a%2Fb"),
    ("100%", "100%25"),
    ("a*?[b]", "a%2A%3F%5Bb%5D"),
    ("a\nb\x7f", "a%0Ab%7F"),
    ("Größe 🙂", "Größe 🙂"),
    ("\ud800x", "%uD800x"),
    ("%uD800", "%25uD800"),
    (".", "%2E"),
    ("..", "%2E%2E"),
    ("...", "..."),
    ("", "~s:"),
    ("12", "~s:12"),
    ("-3", "~s:-3"),
    ("-0", "-0"),
    ("007", "007"),
    ("1_000", "1_000"),
    ("\u0661", "\u0661"),
    ("~x", "~s:~x"),
    ("~", "~s:~"),
    (True, "~b:true"),
    (False, "~b:false"),
    (None, "~n"),
    (1.5, "~f:0x1.8000000000000p+0"),
    (-0.0, "~f:-0x0.0p+0"),
    (float("inf"), "~f:inf"),
    (float("nan"), "~f:nan"),
    (b"\x00\xff", "~y:00ff"),
    (b"", "~y:"),
    ((), "~t:"),
    ((1, "a"), "~t:1,a"),
    (("",), "~t:~s:"),
    ((None,), "~t:~n"),
    (("a,b", "c%"), "~t:a%2Cb,c%2525"),
    ((("x", "y"), "z"), "~t:~t:x%2Cy,z"),
    (((),), "~t:~t:"),
)


@pytest.mark.parametrize(("key", "component"), PINNED)
def test_the_escape_is_pinned(key: Any, component: str) -> None:
    assert encode_key(key) == component, "the format changed: bump the version"
    assert same(decode_key(component), key)


@given(keys)
@example(("a,b", ("%2C", "%25")))
@example((("",), ()))
def test_decoding_is_the_inverse_of_encoding(key: Any) -> None:
    component = encode_key(key)
    assert same(decode_key(component), key)
    assert "/" not in component
    assert component not in {"", ".", ".."}
    assert component.isprintable() or not any(ord(c) < 0x20 or ord(c) == 0x7F for c in component)
    component.encode()  # what stands in a manifest is valid Unicode


@given(keys, keys)
def test_different_keys_never_collide(a: Any, b: Any) -> None:
    assert (encode_key(a) == encode_key(b)) == same(a, b)


@given(st.lists(keys, min_size=1, max_size=4), st.lists(keys, min_size=1, max_size=4))
def test_different_nestings_never_collide(a: list[Any], b: list[Any]) -> None:
    paths = []
    for nesting in (a, b):
        path = ""
        for key in nesting:
            path = join(path, encode_key(key))
        paths.append(path)
    assert (paths[0] == paths[1]) == same(tuple(a), tuple(b))


@given(st.one_of(st.text(st.sampled_from(TRICKY), max_size=12), st.text(max_size=12)))
@example("~t:" * 2000)
@example("9" * 5000)
@example("~s:" + "9" * 5000)
@example("~f:0x1p999999999")
@example("%u0041")
def test_what_no_key_encodes_to_is_a_format_error(component: str) -> None:
    try:
        key = decode_key(component)
    except FormatError:
        pass
    else:
        assert encode_key(key) == component


@pytest.mark.parametrize(
    "component",
    [
        *("", "~", "~x", "~s:a", "~b:yes", "~b:", "~f:1.5", "~f:0x1.8p+0", "~y:0", "~y:FF", "~y:0 0", "~n:", "00%"),
        *("%2f", "%41", "%C3%A9", "%FF", "a/b", ".", "..", "*", "a\n", "~t:1,", "~t:1%2c2", "~t:~t", "\ud800"),
    ],
)
def test_other_spellings_are_refused(component: str) -> None:
    with pytest.raises(FormatError, match="is not an escaped key"):
        decode_key(component)


class Colour(IntEnum):
    RED = 1


class Name(str):
    __slots__ = ()


@pytest.mark.parametrize("key", [frozenset(), 1j, Colour.RED, Name("a"), object(), (1, Colour.RED), range(3)])
def test_other_types_of_keys_are_unsupported_and_the_container_is_named(key: Any) -> None:
    with pytest.raises(UnsupportedLeafError, match=r"leaf 'model/x': type \w+ \(as a dict key\)"):
        encode_key(key, parent="model/x")


def test_an_int_that_python_would_not_read_back_is_refused_at_once() -> None:
    assert same(decode_key(encode_key(10**999)), 10**999)
    for key in (10**5000, -(10**1000)):
        with pytest.raises(UnsupportedLeafError, match="more than 1000 digits"):
            encode_key(key)


# ---- paths -------------------------------------------------------------------------------------------------


def test_paths_are_joined_and_taken_apart() -> None:
    assert join("", "model") == "model"
    assert join("model", "0") == "model/0"
    assert [parent_of("a/b/c"), parent_of("a"), parent_of("")] == ["a/b", "", ""]
    assert [last_component("a/b/c"), last_component("a"), last_component("")] == ["c", "a", ""]


# ---- globs -------------------------------------------------------------------------------------------------


@given(st.lists(keys, min_size=1, max_size=3), st.lists(keys, min_size=1, max_size=3))
def test_a_literal_path_is_a_glob_of_itself_and_what_is_below_and_of_nothing_else(a: list[Any], b: list[Any]) -> None:
    path, other = ("/".join(map(encode_key, nesting)) for nesting in (a, b))
    match = compile_glob(path)
    assert match(path)
    assert match(join(path, "below"))
    assert match(other) == (other == path or other.startswith(path + "/"))


GLOBS: tuple[tuple[str, str, str], ...] = (
    # pattern, paths that it matches, paths that it does not
    ("model", "model model/a model/a/b", "models optimizer/model mode"),
    ("model/", "model model/a", "models"),
    ("model/**", "model model/a model/a/b", "models a/model"),
    ("**", "a a/b a/b/c", ""),
    ("*", "a a/b a/b/c", ""),
    ("*/weight", "a/weight a/weight/~values", "weight a/b/weight a/weights"),
    ("**/weight", "weight a/weight a/b/weight", "weights a/xweight"),
    ("model/**/bias", "model/bias model/a/bias model/a/b/bias", "bias model/a/biases xmodel/bias"),
    ("model/**/**/bias", "model/bias model/a/b/bias", "bias"),
    ("**/a/**/b", "a/b x/a/b x/a/y/z/b", "b a x/b"),
    ("model/encoder.*/**", "model/encoder.1 model/encoder.1/w", "model/decoder.1 model/encoder"),
    ("model/encoder.*/**/w", "model/encoder.1/w model/encoder.1/a/w", "model/w"),
    ("layer.?", "layer.1 layer.x", "layer. layer.10"),
    ("layer.[0-3]", "layer.0 layer.3", "layer.4 layer.- layer.03"),
    ("layer.[!0-3]", "layer.4 layer.x", "layer.0 layer./x"),
    ("layer.[^0-3]", "layer.4", "layer.0"),
    ("a[]x]", "a] ax", "a ay"),
    ("a[!]]", "ax", "a]"),
    ("a[x-]", "ax a-", "ay"),
    ("a[-x]", "ax a-", "ay"),
    ("a[\\d]", "a\\ ad", "a1"),
    ("a[&&b--c||d~~e]", "a& a| a~ ac", "ab ax"),
    ("a[+-9]b", "a+b a9b a.b", "a/b ab"),
    ("a[!x]b", "ayb", "a/b axb"),
    ("a[z-a]", "", "az aa a- az-a"),
    ("a[!z-a]", "ax", "a"),
    ("a[bc", "a[bc", "ab"),
    ("a[]", "a[]", "a"),
    ("a.b", "a.b", "axb"),
    ("a(b|c)+$^{2}", "a(b|c)+$^{2}", "ab ac"),
    ("a\\*", "a\\ a\\b", "a*"),
    ("**x", "x ax a**x", "a/x"),
    ("", "", "a"),
)


@pytest.mark.parametrize(("pattern", "matching", "others"), GLOBS)
def test_a_glob_matches_these_and_not_those(pattern: str, matching: str, others: str) -> None:
    match = compile_glob(pattern)
    assert [path for path in matching.split() if not match(path)] == []
    assert [path for path in others.split() if match(path)] == []


def plainly(pattern: list[str], path: list[str]) -> bool:
    """The rules of globs, level by level."""
    if not pattern:
        return True  # a container, and everything below it
    if pattern[0] == "**":
        return plainly(pattern[1:], path) or (bool(path) and plainly(pattern, path[1:]))
    return bool(path) and level(pattern[0], path[0]) and plainly(pattern[1:], path[1:])


def level(pattern: str, text: str) -> bool:
    if not pattern:
        return not text
    if pattern[0] == "*":
        return level(pattern[1:], text) or (bool(text) and level(pattern, text[1:]))
    return bool(text) and pattern[0] in ("?", text[0]) and level(pattern[1:], text[1:])


levels = st.text("ab", min_size=1, max_size=3)
patterns = st.lists(st.one_of(st.just("**"), st.text("ab*?", min_size=1, max_size=3)), min_size=1, max_size=4)


@given(patterns, st.lists(levels, min_size=1, max_size=4))
def test_globs_follow_the_rules_level_by_level(pattern: list[str], path: list[str]) -> None:
    expected = plainly(pattern, path)
    assert compile_glob("/".join(pattern))("/".join(path)) == expected


@given(st.text(st.sampled_from("ab[]!^-*?\\&|~."), max_size=10), st.text("ab/-]", max_size=6))
def test_any_text_is_a_glob(pattern: str, path: str) -> None:
    assert compile_glob(pattern)(path) in (True, False)
