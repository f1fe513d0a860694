"""Codec numbers → codecs, and chains of them.

    0    raw: the empty chain, never written as a number
    1    lz4       lz4_block.py
    2    zstd      zstd_frame.py
    3    planes    byte_planes.py
    4    constant  constant.py
    16   delta     delta.py: the difference from the record's base
    17   derived   derived.py: the record's bases rounded to 16 bits
    18   ordered   delta.py: as 16, elements sorted by the exponents of the base; in repositories with the feature flag
                   "ordered" only

Numbers are permanent. numpy is only imported when a chain names `planes`: history and manifests are read without it.
"""

from __future__ import annotations

from functools import cache

from castore.codec.base import Codec
from castore.codec.constant import Constant
from castore.codec.lz4_block import Lz4Block
from castore.codec.zstd_frame import ZstdFrame
from castore.errors import CodecError, UnsupportedFormatError
from castore.format.pack import Chain
from castore.ids import Buffer

NAMES = {1: "lz4", 2: "zstd", 3: "planes", 4: "constant", 16: "delta", 17: "derived", 18: "ordered"}
CONSTANT, DELTA, DERIVED, ORDERED = 4, 16, 17, 18
DIFFERENCES: frozenset[Chain] = frozenset({(DELTA,), (ORDERED,)})
"""Chains of records that are differences from one base."""
_WITH_BASES = DIFFERENCES | {(DERIVED,)}


@cache
def codec_numbered(number: int) -> Codec:
    """The codec of a number; raises UnsupportedFormatError for one that this castore does not know."""
    if number == Lz4Block.number:
        return Lz4Block()
    if number == ZstdFrame.number:
        return ZstdFrame()
    if number == Constant.number:
        return Constant()
    if number == 3:
        from castore.codec.byte_planes import BytePlanes

        return BytePlanes()
    raise UnsupportedFormatError(f"codec {number} is unknown to this castore; install a newer one")


def chain_name(chain: Chain) -> str:
    """For people: "raw", "planes", "delta+planes"."""
    return "+".join(NAMES.get(number, f"codec-{number}") for number in chain) or "raw"


def base_lengths(chain: Chain, raw_bytes: int) -> tuple[int, ...]:
    """Raw lengths of the bases that a record of this chain and length rests on."""
    if chain in DIFFERENCES:
        return (raw_bytes,)
    if chain == (DERIVED,):
        from castore.codec.derived import master_lengths  # numpy costs 80 ms of start-up

        return master_lengths(raw_bytes)
    return ()


def decode_chain(chain: Chain, stored: memoryview, out: memoryview, *, base: Buffer | None = None) -> None:
    """Undo a chain into `out`; `base` is the raw bytes of the record's bases, one after the other. Raises CodecError or
    UnsupportedFormatError.
    """
    if (chain in _WITH_BASES) is not (base is not None):
        raise CodecError(f"{chain_name(chain)}: {'has no' if base is None else 'takes no'} base")
    if not chain:
        if len(stored) != len(out):
            raise CodecError(f"raw: expected {len(out)} bytes, found {len(stored)}")
        out[:] = stored
        return
    if len(chain) > 1:
        raise UnsupportedFormatError(f"codec chain {chain_name(chain)} is unknown to this castore; install a newer one")
    if base is not None:
        # numpy costs 80 ms of start-up
        from castore.codec.delta import decode_delta
        from castore.codec.derived import decode_derived

        if chain == (DERIVED,):
            decode_derived(stored, out, base)
        else:
            decode_delta(stored, out, base, ordered=chain == (ORDERED,))
        return
    codec_numbered(chain[0]).decode(stored, out)
