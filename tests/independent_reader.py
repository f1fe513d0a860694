"""A reader of repositories that uses nothing of castore: written from docs/FORMAT.md alone, as proof that it suffices.

    found = Repository(path)
    found.branches, found.tags              name → snapshot id
    found.snapshot(snapshot_id)             the body, its digest checked
    found.leaves(snapshot_id)               path → (kind, dtype, shape, bytes); bytes None where they were dropped
    found.state_id(snapshot_id)             computed from the manifest

Every checksum and digest on the way is compared; whatever is odd is an AssertionError.
"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import blake3
import lz4.block
import msgpack
import numpy as np
import xxhash
import zstandard

GRID = 1 << 20
KINDS = {
    1: "DICT", 2: "ORDERED_DICT", 3: "LIST", 4: "TUPLE", 5: "NAMEDTUPLE", 6: "DATACLASS", 7: "SPARSE", 8: "QUANTIZED",
    16: "NONE", 17: "BOOL", 18: "INT", 19: "FLOAT", 20: "COMPLEX", 21: "STR", 22: "BYTES",
    23: "INT_LIST", 24: "INT_TUPLE", 25: "FLOAT_LIST", 26: "FLOAT_TUPLE",
    32: "TORCH_DTYPE", 33: "TORCH_DEVICE", 34: "TORCH_SIZE", 35: "NUMPY_SCALAR",
    48: "TENSOR", 49: "NDARRAY", 50: "STORAGE", 56: "ALIAS", 57: "VIEW", 62: "PICKLE",
}  # fmt: skip
ALIAS, VIEW, STORAGE = 56, 57, 50


def u64(data: bytes) -> int:
    return xxhash.xxh3_64_intdigest(data)


def text_file(path: Path) -> dict[str, Any]:
    line, digest, end = path.read_bytes().split(b"\n")
    assert (digest.decode(), end) == ("xxh3-128:" + xxhash.xxh3_128_hexdigest(line + b"\n"), b"")
    fields: dict[str, Any] = json.loads(line)
    return fields


class Repository:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = text_file(root / "config")
        assert self.config["format"] == 1
        assert self.config["features"]["read"] == []
        self.hash = {"xxh3-128": xxhash.xxh3_128_digest, "blake3": lambda data: blake3.blake3(data).digest()}[
            self.config["hash"]
        ]
        self.n = {"xxh3-128": 16, "blake3": 32}[self.config["hash"]]
        self.algorithm = {"xxh3-128": 1, "blake3": 2}[self.config["hash"]]
        self.places: dict[bytes, list[tuple[Any, ...]]] = {}
        self.read: dict[bytes, bytes] = {}
        self.seen: set[tuple[int, ...]] = set()
        """Of every chunk read: kind of record, codecs, mode or rule of the last one, count of bases."""
        for path in sorted(root.glob("packs/*/*.pack")):
            self._read_pack(path)
        self.branches, self.tags = self._refs("branches"), self._refs("tags")

    def _refs(self, folder: str) -> dict[str, str]:
        refs = {}
        for path in (self.root / "refs" / folder).glob("[!.]*"):
            fields = text_file(path)
            assert fields["name"] == unquote(path.name)
            refs[fields["name"]] = fields["snapshot"]
        return refs

    # ---- packs -------------------------------------------------------------------------------------------------------

    def _read_pack(self, path: Path) -> None:
        data, n = path.read_bytes(), self.n
        magic, version, algorithm, width, _, pack_id, repository_id, found = struct.unpack_from(
            "<8sHBB4xQ16s16sQ", data
        )
        assert (magic, version, algorithm, width) == (b"CASTPACK", 1, self.algorithm, n)
        assert (pack_id.hex(), repository_id.hex()) == (path.stem, self.config["id"])
        assert found == u64(data[:56])
        magic, at, count, table_sum, trailer_id, seconds, found = struct.unpack("<8sQQQ16sQQ", data[-64:])
        assert (magic, trailer_id, found) == (b"CASTTAIL", pack_id, u64(data[-64:-8]))
        table = data[at:-64]
        assert len(table) == count * (32 + 2 * n) + seconds * n
        assert u64(table) == table_sum
        extra = iter(table[start : start + n] for start in range(count * (32 + 2 * n), len(table), n))
        for index in range(count):
            chunk_id, base, offset, stored, raw, checksum, chain, kind, depth, flags = struct.unpack_from(
                f"<{n}s{n}sQIIQ4sBBH", table, index * (32 + 2 * n)
            )
            bases = [base] if any(base) else []
            if flags & 2:
                bases.append(next(extra))
            place = (depth, stored, raw, checksum, chain.rstrip(b"\0"), bases, kind, data[offset : offset + stored])
            self.places.setdefault(chunk_id, []).append(place)

    def chunk(self, chunk_id: bytes, *, below: int = 17) -> bytes:
        """The raw bytes, from the place that is least deep."""
        if chunk_id in self.read:
            return self.read[chunk_id]
        depth, _, raw_bytes, checksum, chain, bases, kind, stored = min(
            self.places[chunk_id], key=lambda place: place[:2]
        )
        assert depth < below
        assert checksum == u64(stored)
        base = b"".join(self.chunk(base_id, below=depth) for base_id in bases)
        detail = {3: 1, 16: 1, 17: 0, 18: 1}.get(chain[-1] if chain else 0)
        self.seen.add((kind, *chain, *([stored[detail]] if detail is not None else []), len(bases)))
        raw = stored
        for number in reversed(chain):
            raw = decode(number, raw, raw_bytes, base)
        assert (len(raw), self.hash(raw)) == (raw_bytes, chunk_id)
        self.read[chunk_id] = raw
        return raw

    # ---- snapshots ---------------------------------------------------------------------------------------------------

    def snapshot(self, snapshot_id: str) -> dict[str, Any]:
        data = (self.root / "snapshots" / snapshot_id).read_bytes()
        magic, version, algorithm, zero, length = struct.unpack_from("<8sHB5sQ", data)
        assert (magic, version, algorithm, zero) == (b"CASTSNAP", 1, self.algorithm, bytes(5))
        body = data[24 : 24 + length]
        digest = self.hash(b"castore.snapshot\0" + body)
        assert data[24 + length :] == digest == bytes.fromhex(snapshot_id)
        fields: dict[str, Any] = msgpack.unpackb(body)
        return fields

    def entries(self, snapshot_id: str) -> dict[str, list[Any]]:
        parts = self._ids(self.snapshot(snapshot_id)["parts"])
        entries = {}
        for part in parts:
            version, found = msgpack.unpackb(self.chunk(part))
            assert version == 1
            entries |= {entry[0]: entry for entry in found}
        return entries

    def _ids(self, packed: bytes) -> list[bytes]:
        return [packed[start : start + self.n] for start in range(0, len(packed), self.n)]

    def _chunk_ids(self, entry: list[Any]) -> bytes:
        """Concatenated, from the entry or from its id lists; of an inline leaf the id that its bytes have."""
        data = entry[7]
        if isinstance(data, bytes):
            return self.hash(data) if data else b""
        if len(data) == 2:
            return b"".join(self.chunk(id_list) for id_list in self._ids(data[0]))
        packed: bytes = data[0]
        return packed

    def leaves(self, snapshot_id: str) -> dict[str, tuple[str, str, list[int], bytes | None]]:
        entries = self.entries(snapshot_id)
        found = {}
        for path, entry in entries.items():
            while entry[1] == ALIAS:
                entry = entries[entry[4]["target"]]
            kind, dtype, shape = KINDS[entry[1]], entry[2], entry[3]
            if entry[1] == VIEW:
                kind = "NDARRAY" if dtype[0] in "<>|" else "TENSOR"
                found[path] = (kind, dtype, shape, self._view(entry, entries))
            elif entry[1] != STORAGE:
                found[path] = (kind, dtype, shape, b"" if entry[1] <= 8 else self._bytes(entry))
        return found

    def _bytes(self, entry: list[Any]) -> bytes | None:
        if isinstance(entry[7], bytes):
            return entry[7]
        ids = self._ids(self._chunk_ids(entry))
        if any(chunk_id not in self.places for chunk_id in ids):
            return None
        data = b"".join(map(self.chunk, ids))
        assert len(data) == entry[6]
        return data

    def _view(self, entry: list[Any], entries: dict[str, list[Any]]) -> bytes | None:
        """Gathered from the shared storage; a strided copy by numpy, of items as opaque bytes."""
        attrs, shape = entry[4], entry[3]
        storage = self._bytes(entries[attrs["storage"]])
        count = int(np.prod(shape, dtype=np.int64))
        if storage is None or count == 0:
            return storage and b""
        item = entry[6] // count
        opaque = np.frombuffer(storage, np.uint8)
        strides = (*attrs["stride_bytes"], 1)
        view = np.ndarray((*shape, item), np.uint8, opaque.data, attrs["offset_bytes"], strides)
        data = view.tobytes()
        if attrs.get("conj") or attrs.get("neg"):
            floats = np.frombuffer(data, f"<f{item // 2}").reshape(-1, 2) if "complex" in entry[2] else None
            assert floats is not None, "a negated view of real numbers is not in the golden repositories"
            signs = np.array([-1 if attrs.get("neg") else 1, -1], floats.dtype)
            if attrs.get("neg") and attrs.get("conj"):
                signs[1] = 1
            data = (floats * signs).tobytes()
        return data

    def state_id(self, snapshot_id: str) -> str:
        entries = self.entries(snapshot_id)
        packed = [self._identity_row(path, entries) for path in sorted(entries) if entries[path][1] != STORAGE]
        return self.hash(b"castore.state\0" + b"".join(packed)).hex()

    def _identity_row(self, path: str, entries: dict[str, list[Any]]) -> bytes:
        entry = entries[path]
        if entry[1] == ALIAS:
            entry = entries[entry[4]["target"]]
        _, kind, dtype, shape, attrs, _, raw_bytes, _, digest = entry
        attrs = attrs or {}
        if kind == VIEW:
            kind = 49 if dtype[0] in "<>|" else 48
            attrs = {"descr": attrs["descr"]} if "descr" in attrs else {}
        elif kind <= 8:
            digest = b""
        else:
            digest = self.hash(b"castore.leaf\0" + struct.pack("<Q", raw_bytes) + self._chunk_ids(entry))
        row = [path, kind, dtype, shape, dict(sorted(attrs.items())), raw_bytes, digest]
        result: bytes = msgpack.packb(row)
        return result

    def drops(self, snapshot_id: str) -> list[re.Pattern[str]]:
        path = self.root / "thin" / snapshot_id
        globs = text_file(path)["dropped"] if path.exists() else []
        return [re.compile(re.escape(glob).replace(r"\*\*", ".*").replace(r"\*", "[^/]*") + r"\Z") for glob in globs]


# ---- codecs ----------------------------------------------------------------------------------------------------------


def decode(number: int, stored: bytes, raw_bytes: int, base: bytes) -> bytes:
    if number == 1:
        return lz4.block.decompress(stored, uncompressed_size=raw_bytes)
    if number == 2:
        return zstandard.ZstdDecompressor().decompress(stored, max_output_size=raw_bytes)
    if number == 4:
        return stored * (raw_bytes // len(stored))
    if number == 17:
        return rounded(stored[0], base)
    assert number in (3, 16, 18)
    return planes(stored, raw_bytes, base, ordered=number == 18)


def planes(stored: bytes, raw_bytes: int, base: bytes, *, ordered: bool) -> bytes:
    width, mode, flags, alpha = struct.unpack_from("<BBHf", stored)
    items, at = raw_bytes // width, 8 + 5 * width
    kept = np.ones(items, bool)
    if flags & 1:
        groups = -(-items // 32)
        bitmap = np.frombuffer(stored, np.uint8, -(-groups // 8), at)
        kept = np.repeat(np.unpackbits(bitmap, bitorder="little")[:groups].astype(bool), 32)[:items]
        at += len(bitmap)
    count = int(kept.sum())
    split = np.zeros((items, width), np.uint8)
    places = np.flatnonzero(kept)
    if ordered:
        bases = np.frombuffer(base, f"<u{width}", items)[places]
        exponents = ((bases << bases.dtype.type(1)) >> bases.dtype.type(8 * width - 8)).astype(np.uint8)
        places = places[np.argsort(exponents, kind="stable")]
    for plane in range(width):
        method, length = struct.unpack_from("<BI", stored, 8 + 5 * plane)
        body, at = stored[at : at + length], at + length
        if method == 1:
            body = zstandard.ZstdDecompressor().decompress(body, max_output_size=count)
        split[places, plane] = np.frombuffer(body * count if method == 2 else body, np.uint8)
    dtype = np.dtype(f"<u{width}")
    values, one = split.reshape(-1).view(dtype), dtype.type(1)
    if mode == 1:
        values = (values >> one) | (values << dtype.type(8 * width - 1))
    elif mode == 3:
        values = values ^ np.frombuffer(base, dtype, items)
    elif mode in (2, 4):
        prediction = np.frombuffer(base, dtype, items)
        if mode == 4:
            exponent = (prediction >> 23) & 0xFF
            scaled = (np.frombuffer(base, "<f4", items) * np.float32(alpha)).view(dtype)
            prediction = np.where((exponent >= 8) & (exponent <= 246), scaled, prediction)
        values = ((values >> one) ^ (~(values & one) + one)) + prediction
    return values.astype(dtype).tobytes() + stored[at:]


def rounded(rule: int, base: bytes) -> bytes:
    bits = np.frombuffer(base, "<u4")
    if rule == 2:
        return (bits >> 16).astype("<u2").tobytes()
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    if rule == 1:
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(is_nan, (bits >> 16) | 0x40, nearest).astype("<u2").tobytes()
    assert rule in (3, 4)
    values = bits.view("<f4")
    with np.errstate(over="ignore", invalid="ignore"):
        halves = values.astype("<f2").view("<u2")
    if rule == 4:
        halves = halves - (np.abs(halves.view("<f2").astype("<f4")) > np.abs(values))
    nan = ((bits >> 16) & 0x8000) | 0x7E00 | ((bits >> 13) & 0x3FF)
    return np.where(is_nan, nan, halves).astype("<u2").tobytes()
