"""Format constants and tunables, each with its unit and its reason.

Constants of the format are permanent: changing one makes equal tensors give different chunks. Options are stored in
the repository's config and chosen when it is created.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

KIB = 1024
MIB = 1024 * KIB

# ---- constants of the format -----------------------------------------------------------------------------------

GRID_BYTES = 1 * MIB
"""Chunks are cut every GRID_BYTES of a leaf's logical row-major bytes; the last one is shorter.

Measured on two real runs with grids of 256 KiB to 4 MiB (bench/RESULTS.md, "chunk grid"): what is stored moves by
less than 0.1 points, 256 KiB costs half as much processor time again, and more than 1 MiB only makes buffers larger."""

INLINE_BYTES_MAX = 256
"""A leaf of at most this many raw bytes lives in the manifest: a record header and a table row (128 bytes together)
would outweigh it, and optimizers keep one 4-byte step counter per parameter."""

PAGE_BYTES = 4 * KIB
"""Run payloads start on a page so that they can be mapped."""

PART_ENTRIES_MIN, PART_ENTRIES_MAX = 16, 256
"""Entries of one manifest part: enough to amortise a record, few enough that one changed leaf rewrites little."""
PART_CHUNKS_MAX = 1024
"""Chunk ids in one part, and in one id list of a very long leaf (1 GiB)."""

# ---- limits against hostile input: checked before anything is allocated ------------------------------------------

RECORD_STORED_BYTES_MAX = GRID_BYTES + 64 * KIB
"""No encoding grows past raw; the slack is for containers of nearly incompressible planes."""
PART_BYTES_MAX = 16 * MIB
SNAPSHOT_BYTES_MAX = 64 * MIB
TEXT_FILE_BYTES_MAX = 1 * MIB
TABLE_ROWS_MAX = 4_000_000
TWO_BASES_DEPTH_MAX = 8
"""Depth of a record that rests on two bases: each level may double what is read. Copies are written at up to 3."""
SKELETON_DEPTH_MAX = 200
"""Nesting of a state; deeper than any real state and well inside the interpreter's recursion limit."""

# ---- tunables ------------------------------------------------------------------------------------------------

PACK_BYTES_MAX = 256 * MIB
"""A pack is sealed when it reaches this: one fsync per 256 MiB costs nothing, and gc rewrites at most this much."""
RUN_BYTES_MIN = 64 * KIB
"""A raw leaf from this size on is stored as one run: its header page and alignment cost at most 12 %."""
RUN_SHARED_SHARE_MAX = 1 / 8
"""Of the chunks of such a leaf, how many may lie in packs already and are written once more, so that it need not be
copied on every load: two moments of an optimizer share the zeros of rows that were never touched."""
ENCODE_AHEAD_CHUNKS = 16
"""Chunks being encoded or waiting to be written: bounds the memory of a save to 20 MiB raw plus as much encoded."""

DELTA_DEPTH_MAX = 2
"""Bases that may have to be read before a chunk decodes. Each level costs a load one more chunk. 2: the first save
after an anchor becomes the reference of all later ones, which are nearer to it than to the anchor."""
REFERENCE_MOVES_EVERY = 4
"""Saves after which a reference is replaced, on average. Over 100 real saves (bench/RESULTS.md, "Depth of
differences"): 37.4 % of raw without, 34.1 % with 8, 33.6 % with 4."""
BASE_BUDGET_SHARE = 0.25
"""Of the available memory, what copies of delta bases may occupy. A state that is a modest part of the memory fits; for
a larger one the rest of the bases is read from the repository."""

ASYNC_IN_FLIGHT_MAX = 2
"""Saves that may wait or be written at a time: one being written, one staged."""
ASYNC_NICENESS = 10
"""How far the threads that write an asynchronous save stand back behind those that train."""
WORKER_NICENESS = 19
"""The same of a worker process."""
STAGED_BUDGET_SHARE = 0.5
"""Of the available memory, what staged states may occupy."""

GC_RESERVE_BYTES = 256 * KIB
"""What a collector may spend on a full disk: its claim and its condemned file, and what the index needs to forget."""
REPACK_BELOW = 2 / 3
"""Packs of which a smaller share is live are rewritten: at most 2 bytes are copied for each one freed, and what is
wasted inside packs stays below a third of them."""
REPACK_BYTES_MAX = 2048 * MIB
"""Copied by one collection at most: a minute of a plain disk. The next one goes on."""
COLLECT_SPACE_BYTES_MIN = 64 * MIB
"""Left free by copying: a collection beside a save must not be what fills the disk."""

HashName = Literal["xxh3-128", "blake3"]
Compression = Literal["auto", "lz4", "none"]
HASH_NAMES: tuple[HashName, ...] = get_args(HashName)
COMPRESSIONS: tuple[Compression, ...] = get_args(Compression)


@dataclass(frozen=True, slots=True)
class RepositoryOptions:
    """What is chosen when a repository is created and stored in its config."""

    hash: HashName = "xxh3-128"
    """Digest of chunks and snapshots. blake3 where weights of strangers are stored or the repository is shared."""
    compression: Compression = "auto"
    """auto: differences, byte planes + zstd, or raw, by a sample of each chunk; lz4: lz4 or raw; none: raw,
    mappable."""
    lease_s: float = 60.0
    """How long a lease of another host counts as alive without a sign of life."""
    orphan_grace_s: float = 14 * 24 * 3600.0
    """How long a snapshot without a ref is kept: long enough to adopt the loser of a conflict after a holiday."""
