"""One leaf of a snapshot in detail: its value or a summary of its numbers, and how each chunk is stored.

Bytes are read from the store chunk by chunk and looked at with numpy, so that a tensor of any size is
summarised without torch. Only a view of a shared storage is loaded as a tensor. A pickle is never read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from castore.checkpoint.thinned import refuse_dropped
from castore.codec.registry import chain_name
from castore.errors import CastoreError, PathNotFoundError, ThinnedError
from castore.format.manifest import Entry, Kind, chunk_bytes
from castore.ids import ChunkId, SnapshotId
from castore.snapshots import leaf_table, read_record

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from castore.api import Repository

FIRST_VALUES_MAX = 8
VALUE_CHARACTERS_MAX = 2000

_ARRAY_KINDS = frozenset({Kind.TENSOR, Kind.NDARRAY, Kind.VIEW, Kind.STORAGE})
_TORCH_TO_NUMPY = {
    "float64": "<f8",
    "float32": "<f4",
    "float16": "<f2",
    "bfloat16": "<u2",
    "complex128": "<c16",
    "complex64": "<c8",
    "int8": "<i1",
    "int16": "<i2",
    "int32": "<i4",
    "int64": "<i8",
    "uint8": "<u1",
    "uint16": "<u2",
    "uint32": "<u4",
    "uint64": "<u8",
    "bool": "|b1",
}


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """Where one chunk is and how it is encoded; codec "missing" when no pack holds it."""

    chunk_id: str
    raw_bytes: int
    stored_bytes: int
    codec: str
    pack: str
    offset: int
    in_run: bool
    base: str | None
    """Chunk id of the delta base."""
    depth: int
    """How many bases must be read first."""
    copies: int
    """How many packs hold it."""


@dataclass(frozen=True, slots=True)
class LeafDetail:
    """Everything that `castore show REF PATH` says."""

    path: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    raw_bytes: int
    digest: str
    target: str
    """Of an alias: the path of the leaf that it is; of a view: the hidden storage."""
    value: Any
    """Of what is no array; text for a pickle, which is not read."""
    has_value: bool
    summary: dict[str, Any]
    """Of arrays of numbers: min, max, mean, std, zeros, nan, inf, first values; empty where there is none."""
    problem: str
    """Why the value or the summary could not be read."""
    chunks: tuple[StoredChunk, ...]
    dropped: bool
    """Whether thinning took it: then there is no value and there are no chunks, though gc may not have run yet."""

    @property
    def stored_bytes(self) -> int:
        """Stored bytes of all its chunks; 0 for a leaf that lives in the manifest."""
        return sum(chunk.stored_bytes for chunk in self.chunks)


def find_entry(repository: Repository, snapshot_id: SnapshotId, path: str) -> Entry | None:
    """The leaf with exactly that path; None when there is none, or a container."""
    entries = _entries(repository, snapshot_id)
    found = next((entry for entry in entries if entry.path == path), None)
    return None if found is None or found.is_container else found


def describe_leaf(repository: Repository, snapshot_id: SnapshotId, entry: Entry) -> LeafDetail:
    """Read one leaf. Damage of its bytes is noted in `problem` and not raised."""
    handle = repository.handle
    bytes_of, target = _own_bytes(repository, snapshot_id, entry)
    value, has_value, summary, problem, dropped = None, False, {}, "", False
    try:
        refuse_dropped(handle.backend, snapshot_id, _entries(repository, snapshot_id), (entry.path,))
        if bytes_of.kind in _ARRAY_KINDS:
            summary = _summary(repository, snapshot_id, entry if entry.kind is Kind.VIEW else bytes_of)
        else:
            value, has_value = _value(repository, bytes_of), True
    except CastoreError as error:
        problem = str(error)
        dropped = isinstance(error, ThinnedError)
    facts = bytes_of if entry.kind is Kind.ALIAS else entry
    row = leaf_table([facts], handle.hasher)
    return LeafDetail(
        entry.path,
        entry.kind.name.lower(),
        facts.dtype,
        facts.shape,
        facts.raw_bytes,
        row[0].digest if row else "",
        target,
        value,
        has_value,
        summary,
        problem,
        () if dropped else _chunks(repository, bytes_of),
        dropped,
    )


def _entries(repository: Repository, snapshot_id: SnapshotId) -> list[Entry]:
    handle = repository.handle
    return handle.manifests.entries(read_record(handle.backend, snapshot_id))


def _own_bytes(repository: Repository, snapshot_id: SnapshotId, entry: Entry) -> tuple[Entry, str]:
    """The entry that holds the bytes: itself, or what an alias or a view refers to; and the path of that."""
    if entry.kind not in (Kind.ALIAS, Kind.VIEW):
        return entry, ""
    target = str(entry.attrs.get("target" if entry.kind is Kind.ALIAS else "storage"))
    found = next((other for other in _entries(repository, snapshot_id) if other.path == target), None)
    if found is None:
        raise PathNotFoundError(
            f"leaf {entry.path!r} refers to {target!r}, which the manifest lacks; run `castore verify`"
        )
    return found, target


def _chunks(repository: Repository, entry: Entry) -> tuple[StoredChunk, ...]:
    handle = repository.handle
    ids = entry.chunk_ids(handle.hasher.digest_bytes)
    locations = handle.store.locate(set(ids)) if ids else {}
    chunks = []
    for index, chunk_id in enumerate(ids):
        hits, raw_bytes = locations[chunk_id], chunk_bytes(entry.raw_bytes, index)
        if not hits:
            chunks.append(StoredChunk(chunk_id.hex(), raw_bytes, 0, "missing", "", 0, False, None, 0, 0))
            continue
        row = hits[0].row
        chunks.append(
            StoredChunk(
                chunk_id.hex(),
                raw_bytes,
                row.stored_bytes,
                chain_name(row.chain),
                hits[0].pack_id,
                row.offset,
                row.in_run,
                row.base_id.hex() if row.base_id else None,
                row.depth,
                len(hits),
            )
        )
    return tuple(chunks)


def _raw(repository: Repository, entry: Entry) -> Iterator[bytes | bytearray]:
    """The bytes of the entry by chunk, each verified."""
    if entry.inline is not None:
        yield entry.inline
        return
    store = repository.handle.store
    for chunk_id in entry.chunk_ids(repository.handle.hasher.digest_bytes):
        yield store.get(ChunkId(chunk_id))


def _value(repository: Repository, entry: Entry) -> Any:
    raw = b"".join(_raw(repository, entry))
    if entry.kind is Kind.PICKLE:
        return f"a pickle of {entry.attrs.get('type')}, {len(raw)} bytes, not read"
    if entry.kind in (Kind.TORCH_DTYPE, Kind.TORCH_DEVICE):
        # As text: torch need not be here to say which one it was.
        return ("torch." if entry.kind is Kind.TORCH_DTYPE else "") + raw.decode("utf-8", "replace")
    if entry.kind is Kind.TORCH_SIZE:
        return [int.from_bytes(raw[at : at + 8], "little", signed=True) for at in range(0, len(raw), 8)]
    from castore.tensors import decode_value

    return decode_value(entry, raw, allow_pickle=False)


# ---- numbers -----------------------------------------------------------------------------------------------


def _summary(repository: Repository, snapshot_id: SnapshotId, entry: Entry) -> dict[str, Any]:
    """Numbers about the elements; empty for types that are no numbers."""
    if entry.raw_bytes == 0:
        return {}
    if entry.kind is Kind.VIEW:
        blocks: Iterator[npt.NDArray[Any]] | None = iter([_loaded(repository.read(snapshot_id, entry.path))])
    else:
        blocks = _blocks(repository, entry)
    return _Numbers().collect(blocks) if blocks is not None else {}


def _blocks(repository: Repository, entry: Entry) -> Iterator[npt.NDArray[Any]] | None:
    """The elements by chunk; None for a type that is no number."""
    import numpy as np

    code = _TORCH_TO_NUMPY.get(entry.dtype) if entry.kind is Kind.TENSOR else entry.dtype
    try:
        dtype = np.dtype(code or "V1")
    except (TypeError, ValueError):
        return None
    if dtype.kind not in "biufc":
        return None
    widen = _from_bfloat16 if entry.dtype == "bfloat16" else None
    arrays = (np.frombuffer(raw, dtype) for raw in _raw(repository, entry))
    return (widen(array) for array in arrays) if widen else arrays


def _from_bfloat16(array: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """A bfloat16 is the upper half of a float32."""
    return (array.astype("<u4") << 16).view("<f4")


def _loaded(value: Any) -> npt.NDArray[Any]:
    """A loaded tensor or array as one flat array of numbers that numpy knows."""
    import numpy as np

    if isinstance(value, np.ndarray):
        return value.reshape(-1)
    tensor = value.detach().cpu().resolve_conj().resolve_neg().reshape(-1)
    if tensor.is_floating_point():
        tensor = tensor.double()
    array: npt.NDArray[Any] = tensor.numpy()
    return array


class _Numbers:
    """Sums over blocks, in float64; minima and maxima exact. NaN and infinity are counted and left out."""

    def __init__(self) -> None:
        self.count = self.finite = self.nan = self.inf = self.zeros = 0
        self.total = self.squares = 0.0
        self.low: Any = None
        self.high: Any = None
        self.first: list[Any] = []

    def collect(self, blocks: Iterator[npt.NDArray[Any]]) -> dict[str, Any]:
        """The summary of all blocks."""
        complex_numbers = False
        for block in blocks:
            complex_numbers |= block.dtype.kind == "c"
            self._add(block)
        mean = self.total / self.finite if self.finite else None
        spread = max(0.0, self.squares / self.finite - mean * mean) ** 0.5 if mean is not None else None
        counts = {"count": self.count, "zeros": self.zeros, "nan": self.nan, "inf": self.inf}
        first = {"first": [str(value) if complex_numbers else value for value in self.first]}
        if complex_numbers:
            return counts | first
        return {"min": self.low, "max": self.high, "mean": mean, "std": spread} | counts | first

    def _add(self, block: npt.NDArray[Any]) -> None:
        import numpy as np

        self.count += block.size
        self.zeros += int(block.size - np.count_nonzero(block))
        self.first += block[: FIRST_VALUES_MAX - len(self.first)].tolist() if len(self.first) < FIRST_VALUES_MAX else []
        if block.dtype.kind in "fc":
            self.nan += int(np.isnan(block).sum())
            self.inf += int(np.isinf(block).sum())
            block = block[np.isfinite(block)]
        self.finite += block.size
        if not block.size or block.dtype.kind == "c":
            return
        low, high = block.min().item(), block.max().item()
        self.low = low if self.low is None else min(self.low, low)
        self.high = high if self.high is None else max(self.high, high)
        with np.errstate(over="ignore", invalid="ignore"):
            wide = block.astype(np.float64)
            self.total += float(wide.sum())
            self.squares += float(wide @ wide)


def value_text(value: Any) -> str:
    """A value for people, cut when it is very long."""
    text = repr(value) if not isinstance(value, list | tuple) or len(value) <= 1000 else repr(list(islice(value, 1000)))
    return text if len(text) <= VALUE_CHARACTERS_MAX else f"{text[:VALUE_CHARACTERS_MAX]}… ({len(text)} characters)"
