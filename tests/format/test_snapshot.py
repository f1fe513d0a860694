"""The snapshot file: pinned bytes, every field checked, no damage unseen."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from castore.errors import CastoreError, ChecksumError, DamageError, FormatError, UnsupportedFormatError
from castore.format.snapshot import SnapshotRecord, decode_snapshot, encode_snapshot
from castore.hashing import hasher_for
from castore.ids import ChunkId, SnapshotId, StateId
from castore.options import SNAPSHOT_BYTES_MAX
from tests.suites.golden import assert_golden

XXH3 = hasher_for("xxh3-128")
RECORD = SnapshotRecord(
    StateId("ab" * 16),
    (SnapshotId("cd" * 16), SnapshotId("ef" * 16)),
    "main",
    1200,
    1_700_000_000_000_000_000,
    {"loss": 1.5, "tokens": 7},
    {"lr": 2e-5, "tags": ["a", None, True], "ö": {"x": -1}},
    "half way",
    1000,
    900,
    800,
    5,
    (ChunkId(b"p" * 16), ChunkId(b"q" * 16)),
    "castore 0.1.0",
    bytes(8),
)


def sealed(body: bytes, *, algorithm: int = 1, version: int = 1) -> bytes:
    """A file around any body, with the right lengths and digest."""
    prefix = (
        b"CASTSNAP" + version.to_bytes(2, "little") + bytes([algorithm]) + bytes(5) + len(body).to_bytes(8, "little")
    )
    return prefix + body + XXH3.tagged(b"castore.snapshot", (body,))


def changed(**fields: Any) -> bytes:
    """The record's file with other fields."""
    body = msgpack.unpackb(encode_snapshot(RECORD, XXH3)[1][24:-16])
    return sealed(msgpack.packb({**body, **fields}))


def decode(data: bytes, expected_id: SnapshotId | None = None) -> SnapshotRecord:
    return decode_snapshot(data, where="snapshots/x", expected_id=expected_id)


def test_the_bytes_and_the_id_are_pinned() -> None:
    snapshot_id, data = encode_snapshot(RECORD, XXH3)
    assert_golden(
        data,
        """
        43415354534e415001000100000000007f01000000000000de0010a57374617465d92061626162616261626162616261
        62616261626162616261626162616261626162a7706172656e747392d920636463646364636463646364636463646364
        6364636463646364636463646364d9206566656665666566656665666566656665666566656665666566656665666566
        a66272616e6368a46d61696ea473746570cd04b0a774696d655f6e73cf17979cfe362a0000a76d65747269637382a46c
        6f7373cb3ff8000000000000a6746f6b656e7307a86d6574616461746183a26c72cb3ef4f8b588e368f1a47461677393
        a161c0c3a2c3b681a178ffa76d657373616765a868616c6620776179a97261775f6279746573cd03e8a96e65775f6279
        746573cd0384ac73746f7265645f6279746573cd0320a66c656176657305a869645f627974657310a57061727473c420
        7070707070707070707070707070707071717171717171717171717171717171a8736f667477617265ad636173746f72
        6520302e312e30a56e6f6e6365c40800000000000000006d5f8c663eba427f4861e947188107c2
        """,
    )
    assert snapshot_id == "6d5f8c663eba427f4861e947188107c2"
    assert data[-16:].hex() == snapshot_id


@pytest.mark.parametrize("name", ["xxh3-128", "blake3"])
def test_a_record_comes_back(name: str) -> None:
    hasher = hasher_for(name)
    width = hasher.digest_bytes
    record = replace(
        RECORD,
        state_id=StateId("ab" * width),
        parents=(SnapshotId("cd" * width),),
        part_ids=(ChunkId(b"p" * width), ChunkId(b"q" * width)),
    )
    snapshot_id, data = encode_snapshot(record, hasher)
    assert decode(data, snapshot_id) == record
    assert len(snapshot_id) == 2 * width


def test_what_may_be_empty_comes_back_empty() -> None:
    record = replace(RECORD, step=None, parents=(), part_ids=(), metrics={}, metadata={}, message="", branch="")
    snapshot_id, data = encode_snapshot(record, XXH3)
    assert decode(data, snapshot_id) == record


def test_metrics_keep_their_type_and_their_odd_values() -> None:
    metrics = {"a": 1, "b": 1.0, "c": float("inf"), "d": -0.0, "e": float("nan"), "f": 5e-324, "g": -(2**63)}
    found = decode(encode_snapshot(replace(RECORD, metrics=metrics), XXH3)[1]).metrics
    assert {key: repr(value) for key, value in found.items()} == {key: repr(value) for key, value in metrics.items()}


def test_the_nonce_gives_every_snapshot_a_name_of_its_own() -> None:
    assert encode_snapshot(RECORD, XXH3)[0] != encode_snapshot(replace(RECORD, nonce=b"12345678"), XXH3)[0]


def test_every_flipped_bit_is_seen() -> None:
    snapshot_id, data = encode_snapshot(RECORD, XXH3)
    for position in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            if 11 <= position < 16:
                continue  # five bytes without a meaning yet
            with pytest.raises((DamageError, UnsupportedFormatError), match=r"snapshots/x|algorithm"):
                decode(bytes(damaged), snapshot_id)


def test_every_cut_is_seen() -> None:
    _, data = encode_snapshot(RECORD, XXH3)
    for length in range(len(data)):
        with pytest.raises(FormatError):
            decode(data[:length])
    with pytest.raises(FormatError, match="cut short or padded"):
        decode(data + b"\0")


def test_swapped_files_are_seen() -> None:
    _, data = encode_snapshot(RECORD, XXH3)
    with pytest.raises(ChecksumError, match=f"expected snapshot {'0' * 32}, found .*: the files were swapped"):
        decode(data, SnapshotId("0" * 32))


def test_a_newer_version_and_an_unknown_hash_say_so() -> None:
    with pytest.raises(UnsupportedFormatError, match="snapshot version 3; this castore reads version 1"):
        decode(sealed(b"", version=3))
    with pytest.raises(UnsupportedFormatError, match="hash algorithm number 9"):
        decode(sealed(b"", algorithm=9))


@pytest.mark.parametrize("data", [b"", b"CASTSNAP", b"\0" * 100, b"PK\3\4" + bytes(100), b"CASTPACK" + bytes(100)])
def test_foreign_files_are_format_errors(data: bytes) -> None:
    with pytest.raises(FormatError, match="snapshots/x"):
        decode(data)


def test_a_huge_length_allocates_nothing() -> None:
    data = bytearray(encode_snapshot(RECORD, XXH3)[1])
    data[16:24] = b"\xff" * 8
    with pytest.raises(FormatError, match="cut short or padded"):
        decode(bytes(data))
    with pytest.raises(FormatError, match=f"24 to {SNAPSHOT_BYTES_MAX} bytes"):
        decode(bytes(SNAPSHOT_BYTES_MAX + 1))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\xc0",
        b"\x80",
        b"\x90",
        msgpack.packb({"state": "x"}),
        msgpack.packb({1: 2}),
        msgpack.packb("text") + b"\0",
        b"\xdf\xff\xff\xff\xff",
        b"\x91" * 900 + b"\xc0",
        b"\x91" * 1010 + b"\xc0",
        b"\x91" * 100_000,
        b"\x81\xa1x" * 500 + b"\xc0",
    ],
)
def test_a_body_that_is_none_is_a_format_error(body: bytes) -> None:
    with pytest.raises(FormatError, match="snapshots/x") as caught:
        decode(sealed(body))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"extra": 1}, "expected the fields"),
        ({"state": None}, "field 'state' is a NoneType"),
        ({"state": "xyz"}, "state or parents are not ids"),
        ({"state": "AB" * 16}, "not ids"),
        ({"state": "ab" * 32}, "not ids"),
        ({"parents": "cd"}, "field 'parents'"),
        ({"parents": ["cd"]}, "not ids"),
        ({"parents": [None]}, "not ids"),
        ({"branch": 1}, "field 'branch'"),
        ({"step": "1"}, "field 'step'"),
        ({"step": 1.0}, "field 'step'"),
        ({"time_ns": None}, "field 'time_ns'"),
        ({"time_ns": -1}, "no time before the year 10000"),
        ({"metrics": []}, "field 'metrics'"),
        ({"metrics": {"loss": "low"}}, "metrics are not numbers by name"),
        ({"metadata": None}, "field 'metadata'"),
        ({"message": b"x"}, "field 'message'"),
        ({"raw_bytes": 1.5}, "field 'raw_bytes'"),
        ({"leaves": None}, "field 'leaves'"),
        ({"id_bytes": 32}, "expected part ids of 16 bytes"),
        ({"parts": "x"}, "field 'parts'"),
        ({"parts": bytes(17)}, "expected part ids of 16 bytes, found 17 bytes of 16"),
        ({"software": None}, "field 'software'"),
        ({"nonce": "12345678"}, "field 'nonce'"),
    ],
)
def test_a_field_that_cannot_be_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        decode(changed(**fields))
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"parents": ["lists in lists"]}, "not ids|nested deeper"),
        ({"metrics": {"loss": "lists in lists"}}, "not numbers by name|nested deeper"),
    ],
)
def test_a_field_of_lists_in_lists_is_named(fields: dict[str, Any], message: str) -> None:
    body, shallow = changed(**fields)[24:-16], msgpack.packb("lists in lists")
    assert body.count(shallow) == 1
    deep = body.replace(shallow, b"\x91" * 950 + b"\x90")  # most versions of msgpack read it but do not write it
    with pytest.raises(FormatError, match=message) as caught:
        decode(sealed(deep))
    assert len(str(caught.value)) < 600


@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=3))
def test_a_damaged_body_with_the_right_digest_is_a_record_or_a_typed_error(at: int, data: bytes) -> None:
    body = bytearray(encode_snapshot(RECORD, XXH3)[1][24:-16])
    at %= len(body)
    body[at : at + len(data)] = data
    with contextlib.suppress(CastoreError):
        assert isinstance(decode(sealed(bytes(body))), SnapshotRecord)


@given(st.binary(max_size=120))
def test_garbage_is_a_typed_error(data: bytes) -> None:
    for garbage in (data, b"CASTSNAP" + data, sealed(data)):
        with pytest.raises((DamageError, UnsupportedFormatError)):
            decode(garbage)
