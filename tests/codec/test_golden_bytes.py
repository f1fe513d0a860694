"""The worked examples of docs/FORMAT.md are what the code reads and writes: the document is the golden file.

An example is a fenced block that begins with `example`. Its bytes are hex, blanks are for the eye, and `00*16` is
sixteen times 00.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from castore.codec.base import Elements
from castore.codec.chooser import encode_as_rounding
from castore.codec.delta import Choice, encode_delta
from castore.codec.registry import DELTA, DERIVED, NAMES, ORDERED, base_lengths, codec_numbered, decode_chain
from castore.codec.rounding import Rule
from castore.codec.transform import Mode
from castore.errors import CodecError
from castore.hashing import hasher_for
from castore.ids import Buffer

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "FORMAT.md"
HASHER = hasher_for("xxh3-128")
_BLOCK = re.compile(r"```text\n(example .*?)```", re.DOTALL)
_TIMES = re.compile(r"(\w+)\*(\d+)")


@dataclass(frozen=True, slots=True)
class Example:
    """One block of the document."""

    name: str
    codec: int
    elements: Elements
    chunk: bytes
    base: bytes | None
    payload: bytes


def examples() -> list[Example]:
    return [parsed(block) for block in _BLOCK.findall(DOCUMENT.read_text(encoding="utf-8"))]


def parsed(block: str) -> Example:
    fields: dict[str, str] = {}
    key = ""
    for line in block.splitlines():
        key = line[:10].strip() or key
        fields[key] = f"{fields.get(key, '')} {line[10:]}".strip()
    width, kind = fields["elements"].split()
    base = unhex(fields["base"]) if "base" in fields else None
    chunk, payload = unhex(fields["chunk"]), unhex(fields["payload"])
    return Example(
        fields["example"], int(fields["codec"]), Elements(int(width), is_float=kind == "float"), chunk, base, payload
    )


def unhex(text: str) -> bytes:
    return bytes.fromhex(_TIMES.sub(lambda match: match[1] * int(match[2]), text))


EXAMPLES = examples()
each_example = pytest.mark.parametrize("example", EXAMPLES, ids=[example.name for example in EXAMPLES])


def encoders() -> dict[int, Callable[[Example], Buffer | None]]:
    """How each codec is asked for a payload."""

    def delta(example: Example) -> Buffer | None:
        assert example.base is not None
        _, mode, _, alpha = struct.unpack_from("<BBHf", example.payload)
        choice = Choice(Mode(mode), alpha, 0.0, ordered=example.codec == ORDERED)
        return encode_delta(example.chunk, example.base, example.elements, choice)

    def derived(example: Example) -> Buffer | None:
        assert example.base is not None
        masters = [(HASHER.chunk_id(example.base), example.base)]
        rule, chunk_id = Rule(example.payload[0]), HASHER.chunk_id(example.chunk)
        found = encode_as_rounding(example.chunk, example.elements, rule, masters, chunk_id=chunk_id, hasher=HASHER)
        return found.payload if found is not None else None

    def alone(example: Example) -> Buffer | None:
        return codec_numbered(example.codec).encode(example.chunk, example.elements)

    special: dict[int, Callable[[Example], Buffer | None]] = {
        0: lambda example: example.chunk,
        DELTA: delta,
        ORDERED: delta,
        DERIVED: derived,
    }
    return {number: special.get(number, alone) for number in (0, *NAMES)}


def chain(example: Example) -> tuple[int, ...]:
    return (example.codec,) if example.codec else ()


@each_example
def test_the_payload_of_an_example_decodes_to_its_chunk(example: Example) -> None:
    out = bytearray(len(example.chunk))
    if example.base is not None:
        assert sum(base_lengths(chain(example), len(out))) == len(example.base)
    decode_chain(chain(example), memoryview(example.payload), memoryview(out), base=example.base)
    assert bytes(out) == example.chunk


@each_example
def test_the_code_writes_the_payload_of_an_example(example: Example) -> None:
    found = encoders()[example.codec](example)
    assert found is not None
    assert bytes(found).hex() == example.payload.hex()


@each_example
def test_a_payload_cut_short_is_refused(example: Example) -> None:
    with pytest.raises(CodecError):
        decode_chain(
            chain(example),
            memoryview(example.payload[:-1]),
            memoryview(bytearray(len(example.chunk))),
            base=example.base,
        )


def test_every_codec_and_every_mode_has_an_example() -> None:
    assert {example.codec for example in EXAMPLES} == {0, *NAMES}
    modes = {example.payload[1] for example in EXAMPLES if example.codec in (3, DELTA)}
    assert modes == set(Mode)
    assert {example.payload[0] for example in EXAMPLES if example.codec == DERIVED} == set(Rule)
