"""Codec 17: a 16-bit copy that is nothing but the rounding of its float32 master.

Mixed-precision training keeps float32 weights and a bfloat16 or float16 copy of them. The copy holds nothing that the
master does not, so what is stored is only the rule. A chunk of the copy covers two chunks of the master:

    copy      |        chunk k        |           bases of its record: the master's chunks 2k and 2k+1, of which the
    master    | chunk 2k | chunk 2k+1 |           second is missing where the copy's chunk has at most 512 KiB

    0  1  rule                                    rounding.py
"""

from __future__ import annotations

from castore.codec import transform
from castore.codec.rounding import Rule
from castore.errors import CodecError
from castore.ids import Buffer
from castore.options import GRID_BYTES

MASTER_ITEM_BYTES, COPY_ITEM_BYTES = 4, 2


def master_lengths(copy_bytes: int) -> tuple[int, ...]:
    """Lengths of the master's chunks that one chunk of the copy covers."""
    total = copy_bytes // COPY_ITEM_BYTES * MASTER_ITEM_BYTES
    return (GRID_BYTES, total - GRID_BYTES) if total > GRID_BYTES else (total,)


def encode_derived(rule: Rule) -> bytes:
    """The payload. Whether it holds is for the caller to prove."""
    return bytes([rule])


def decode_derived(stored: memoryview, out: memoryview, master: Buffer) -> None:
    """Fill `out` from a payload and the master's bytes, twice as long. Raises CodecError."""
    if len(stored) != 1 or stored[0] not in Rule.__members__.values():
        raise CodecError(f"derived: expected one of {len(Rule)} rules in one byte, found {bytes(stored[:8]).hex()!r}")
    if 2 * len(out) != len(master) or len(out) % COPY_ITEM_BYTES:
        raise CodecError(f"derived: expected a master of {2 * len(out)} bytes, found {len(master)}")
    transform.kernel.derive(master, out, stored[0])
