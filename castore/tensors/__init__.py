"""Training state ↔ entries and bytes. The only low layer that knows torch, and it never imports it unasked.

save   flatten(state) → FlatState: entries, and a Payload of bytes for each leaf
load   allocate(entry) → value and Target, or decode_value(entry, bytes)
       or adopt(entry, memory) → value over memory that holds its bytes already
       then unflatten(entries, values) → state
part   select(entries, keep), slice_rows(entry, start, stop)
into   match(flatten(live), entries) → Match: fill its pairs through live_target
       then assign(live, match, values)
"""

from castore.tensors.aliases import share_elements
from castore.tensors.arrays import Array
from castore.tensors.flatten import FlatState, flatten, flatten_outline
from castore.tensors.glance import Glance, glance
from castore.tensors.mapped import adopt, can_adopt
from castore.tensors.matching import Match, Pair, assign, assign_scalars, match
from castore.tensors.payloads import ArrayPayload, BytesPayload, Payload
from castore.tensors.scalars import decode_value
from castore.tensors.staging import DeviceCopies, HostCopies, Piece, pin, pinned_slab
from castore.tensors.targets import ARRAY_KINDS, Target, allocate, live_target
from castore.tensors.unflatten import make_view, select, slice_rows, unflatten

__all__ = [
    "ARRAY_KINDS",
    "Array",
    "ArrayPayload",
    "BytesPayload",
    "DeviceCopies",
    "FlatState",
    "Glance",
    "HostCopies",
    "Match",
    "Pair",
    "Payload",
    "Piece",
    "Target",
    "adopt",
    "allocate",
    "assign",
    "assign_scalars",
    "can_adopt",
    "decode_value",
    "flatten",
    "flatten_outline",
    "glance",
    "live_target",
    "make_view",
    "match",
    "pin",
    "pinned_slab",
    "select",
    "share_elements",
    "slice_rows",
    "unflatten",
]
