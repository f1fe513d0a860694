"""Paths of leaves: keys of any type joined by "/", escaped so that different keys never collide.

    key                 component               example
    int                 decimal                 12, -3
    str                 text, escaped           model, encoder.layer.0, a%2Fb
    str, reserved       ~s: + escaped text      "12" -> ~s:12     "" -> ~s:     "~x" -> ~s:~x
    bool                ~b:true  ~b:false
    None                ~n
    float               ~f: + float.hex()       ~f:0x1.8000000000000p+0
    bytes               ~y: + hex
    tuple               ~t: + components joined by ",", with % and , inside each written %25 and %2C

    escaped in text     / % control characters (below 0x20, 0x7f) and the glob signs * ? [ ]  as %XX of their UTF-8
    bytes;
                        a lone surrogate as %uXXXX; the whole components "." and ".." as %2E and %2E%2E
    reserved            a str that is empty, reads as an int, or begins with "~"

So a path is always a glob that matches itself.
In a glob, * and ? and [..] match within one level and ** matches any number of levels, none included.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from functools import lru_cache
from urllib.parse import unquote_to_bytes

from castore.errors import FormatError, UnsupportedLeafError

_ESCAPE = re.compile(r"[\x00-\x1f\x7f%/*?\[\]\ud800-\udfff]")
_INTEGER_KEY_END = 10**1000
"""Python refuses to read integers of some thousands of digits, so such keys are refused when they are written."""
_INTEGER = re.compile(r"(0|-?[1-9][0-9]*)\Z")
_CACHED_KEY_MAX = 100
_CLASS_ITEM = re.compile(r"(.)(?:-(.))?", re.DOTALL)
_ENCODED_SURROGATE = re.compile(r"%u([0-9A-F]{4})")

Key = Hashable


def encode_key(key: Key, *, parent: str = "") -> str:
    """One path component for a dict key; `parent` is for the message of UnsupportedLeafError."""
    if type(key) is str:
        return _encode_text(key) if len(key) <= _CACHED_KEY_MAX else _encode_text.__wrapped__(key)
    if type(key) is bool:
        return "~b:true" if key else "~b:false"
    if type(key) is int:
        if abs(key) >= _INTEGER_KEY_END:
            raise UnsupportedLeafError(parent, "int of more than 1000 digits (as a dict key)", "use shorter keys")
        return str(key)
    if key is None:
        return "~n"
    if type(key) is float:
        return "~f:" + key.hex()
    if type(key) is bytes:
        return "~y:" + key.hex()
    if type(key) is tuple:
        return "~t:" + ",".join(_escape_item(encode_key(item, parent=parent)) for item in key)
    raise UnsupportedLeafError(
        parent,
        f"{type(key).__name__} (as a dict key)",
        "use str, int, bool, float, bytes, None or tuples of them as keys",
    )


@lru_cache(maxsize=16 * 1024)
def _encode_text(key: str) -> str:
    text = _escape(key)
    reserved = not key or key.startswith("~") or _INTEGER.match(key) is not None
    return "~s:" + text if reserved else text


def decode_key(component: str) -> Key:
    """The key behind a component; raises FormatError when encode_key cannot have made it."""
    try:
        key = _decode(component)
        if encode_key(key) == component:
            return key
    except (ValueError, OverflowError, UnsupportedLeafError, RecursionError):
        pass
    raise FormatError(f"path component {component[:80]!r} is not an escaped key")


def _decode(component: str) -> Key:
    if not component.startswith("~"):
        return int(component) if _INTEGER.match(component) else _unescape(component)
    if component == "~n":
        return None
    kind, text = component[:3], component[3:]
    if kind == "~s:":
        return _unescape(text)
    if kind == "~b:":
        return text == "true"
    if kind == "~f:":
        return float.fromhex(text)
    if kind == "~y:":
        return bytes.fromhex(text)
    if kind == "~t:":
        return tuple(_decode(_unescape_item(item)) for item in text.split(",")) if text else ()
    raise ValueError(component)


def _escape_item(component: str) -> str:
    return component.replace("%", "%25").replace(",", "%2C")


def _unescape_item(item: str) -> str:
    return item.replace("%2C", ",").replace("%25", "%")


def _escape(text: str) -> str:
    if text in (".", ".."):
        return text.replace(".", "%2E")
    return _ESCAPE.sub(_escape_character, text)


def _escape_character(match: re.Match[str]) -> str:
    character = match.group()
    if "\ud800" <= character <= "\udfff":
        return f"%u{ord(character):04X}"
    return "".join(f"%{byte:02X}" for byte in character.encode())


def _unescape(text: str) -> str:
    pieces = _ENCODED_SURROGATE.split(text)
    return "".join(
        chr(int(piece, 16)) if index % 2 else unquote_to_bytes(piece).decode() for index, piece in enumerate(pieces)
    )


def join(parent: str, component: str) -> str:
    """The path of a child; the root's path is the empty string."""
    return f"{parent}/{component}" if parent else component


def parent_of(path: str) -> str:
    """The path of the container; the root is its own parent."""
    return path.rpartition("/")[0]


def last_component(path: str) -> str:
    """The component after the last "/"."""
    return path.rpartition("/")[2]


@lru_cache(maxsize=256)
def compile_glob(pattern: str) -> Callable[[str], bool]:
    """A predicate over escaped paths. A pattern that names a container matches all below it (`model` = `model/**`)."""
    components = pattern.strip("/").split("/")
    while len(components) > 1 and components[-1] == "**":
        components.pop()  # said already by the rule that what matches a container matches all below it
    regex = "/".join(_glob_component(component) for component in components)
    # "**" stands for whole levels: it swallows the slash beside it.
    regex = regex.replace("(?:.*)/", "(?:.*/)?")
    matcher = re.compile(rf"(?:{regex})(?:/.*)?\Z", re.DOTALL)
    return lambda path: matcher.match(path) is not None


def _glob_component(component: str) -> str:
    if component == "**":
        return "(?:.*)"
    out = []
    position = 0
    while position < len(component):
        character = component[position]
        close = _class_end(component, position) if character == "[" else -1
        if character == "*":
            out.append("[^/]*")
        elif character == "?":
            out.append("[^/]")
        elif close > 0:
            out.append(_glob_class(component[position + 1 : close]))
            position = close
        else:
            out.append(re.escape(character))
        position += 1
    return "".join(out)


def _class_end(component: str, start: int) -> int:
    """Where the class that begins at `start` ends, -1 when it does not: its first character is never its end."""
    first = start + 2 if component.startswith(("!", "^"), start + 1) else start + 1
    return component.find("]", first + 1)


def _glob_class(body: str) -> str:
    """A class as in fnmatch: `!` or `^` negates, `a-z` is a range; like `*` it never matches the slash between
    levels.
    """
    negated = body[0] in "!^"
    ranges = ((low, high or low) for low, high in _CLASS_ITEM.findall(body[1:] if negated else body))
    # A range that runs backwards holds nothing.
    items = "".join(f"{re.escape(low)}-{re.escape(high)}" for low, high in ranges if low <= high)
    if not items:
        return "[^/]" if negated else "(?!)"
    return f"(?!/)[{'^' * negated}{items}]"
