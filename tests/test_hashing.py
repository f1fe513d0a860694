"""The digests are the published ones: known answers, algorithm numbers, domains."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from castore import hashing
from castore.errors import MissingExtraError, UnsupportedFormatError, UsageError
from castore.hashing import checksum, hasher_for, hasher_numbered

ALGORITHMS = pytest.mark.parametrize("name", ["xxh3-128", "blake3"])


def xxhash_input(length: int) -> bytes:
    """The bytes of xxHash's own test vectors (XSUM_fillTestBuffer)."""
    state, out = 2654435761, bytearray()
    for _ in range(length):
        out.append(state >> 56)
        state = state * 11400714785074694797 % 2**64
    return bytes(out)


# From xxHash's sanity check (XXH128, seed 0), as canonical hex: the high half first.
XXH3_128 = {
    0: "99aa06d3014798d86001c324468d497f",
    1: "a6cd5e9392000f6ac44bdff4074eecdb",
    6: "082afe0b8162d12a3e7039bdda43cfc6",
    12: "6e3efd8fc7802b18061a192713f69ad9",
    24: "0ce966e4678d37611e7044d28b1b901d",
    48: "a002ac4e5478227ef942219aed80f67b",
    81: "4952f58181ab00425e8bafb9f95fb803",
    222: "337e09641b948717f1aebd597cec6b3a",
    403: "1b6de21e332dd73dcdeb804d65c6dea4",
    512: "18d2d110dcc9bca1617e49599013cb6b",
    2048: "f736557fd47073a5dd59e2c3a5f038e0",
    2240: "ccb134fbfa7ce49d6e73a90539cf2948",
    2367: "e89c0f6ff369b427cb37aeb9e5d361ed",
}
# From BLAKE3's test_vectors.json: the input repeats 0, 1, … 250.
BLAKE3 = {
    0: "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
    1: "2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213",
    1023: "10108970eeda3eb932baac1428c7a2163b0e924c9a9e25b35bba72b28f70bd11",
    1024: "42214739f095a406f3fc83deb889744ac00df831c10daa55189b5d121c855af7",
}


@pytest.mark.parametrize(("length", "expected"), XXH3_128.items())
def test_xxh3_128_gives_the_known_answers(length: int, expected: str) -> None:
    assert hasher_for("xxh3-128").digest(xxhash_input(length)).hex() == expected


@pytest.mark.parametrize(("length", "expected"), BLAKE3.items())
def test_blake3_gives_the_known_answers(length: int, expected: str) -> None:
    data = bytes(index % 251 for index in range(length))
    assert hasher_for("blake3").digest(data).hex() == expected


def test_the_checksum_is_xxh3_64_with_seed_0() -> None:
    assert checksum(b"") == 0x2D06800538D394C2
    assert checksum(memoryview(bytearray(b"abc"))) == checksum(b"abc") == 0x78AF5F94892F3950


def test_names_numbers_and_widths_are_permanent() -> None:
    for name, number, digest_bytes in (("xxh3-128", 1, 16), ("blake3", 2, 32)):
        hasher = hasher_for(name)
        assert (hasher.name, hasher.number, hasher.digest_bytes) == (name, number, digest_bytes)
        assert len(hasher.digest(b"x")) == digest_bytes
        assert hasher_numbered(number).name == name


@ALGORITHMS
def test_any_contiguous_buffer_gives_the_digest_of_its_bytes(name: str) -> None:
    digest = hasher_for(name).digest
    data = bytes(range(200))
    wide = memoryview(b"x" + data + b"x")[1:-1]
    assert digest(bytearray(data)) == digest(memoryview(data)) == digest(wide) == digest(data)


@ALGORITHMS
def test_a_chunk_id_is_the_digest_of_the_raw_bytes(name: str) -> None:
    hasher = hasher_for(name)
    assert hasher.chunk_id(b"raw") == hasher.digest(b"raw")


@ALGORITHMS
def test_domains_are_apart(name: str) -> None:
    hasher = hasher_for(name)
    assert hasher.tagged(b"castore.leaf", (b"a", b"bc")) == hasher.digest(b"castore.leaf\0abc")
    assert hasher.tagged(b"castore.leaf", ()) == hasher.digest(b"castore.leaf\0")
    assert hasher.tagged(b"castore.leaf", (b"x",)) != hasher.tagged(b"castore.state", (b"x",))


@ALGORITHMS
def test_threads_hash_independently(name: str) -> None:
    digest = hasher_for(name).digest
    buffers = [bytes([number]) * 300_000 for number in range(16)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(digest, buffers)) == [digest(buffer) for buffer in buffers]


def test_unknown_names_and_numbers_say_so() -> None:
    for name in ("sha256", "", "XXH3-128"):
        with pytest.raises(UsageError, match=f"unknown hash '{name}'; expected one of xxh3-128, blake3"):
            hasher_for(name)
    for number in (0, 3, 255):
        with pytest.raises(UnsupportedFormatError, match=f"algorithm number {number} is unknown"):
            hasher_numbered(number)


def test_without_the_extra_blake3_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "blake3", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'castore\[blake3\]'") as caught:
        hasher_for("blake3")
    assert isinstance(caught.value, ImportError)


def test_blake3_is_not_imported_until_it_is_asked_for() -> None:
    code = f"import sys, {hashing.__name__} as h; h.hasher_for('xxh3-128'); sys.exit('blake3' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
