"""Codec 18: elements sorted by the exponents of their base, by both kernels and against a plain definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from castore.codec import transform
from castore.codec.base import Elements
from castore.codec.byte_planes import decode_planes
from castore.codec.chooser import encode_chunk
from castore.codec.delta import Choice, choose, decode_delta, encode_delta
from castore.codec.registry import DELTA, ORDERED
from castore.codec.transform import GROUP_ITEMS, SEGMENT_ITEMS_MIN, Kernel, Mode, NumpyKernel, segment_ends
from castore.errors import CodecError
from castore.hashing import hasher_for

COMPILED = transform.kernel if not isinstance(transform.kernel, NumpyKernel) else None
KERNELS = pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(NumpyKernel(), id="numpy"),
        pytest.param(COMPILED, id="compiled", marks=pytest.mark.skipif(COMPILED is None, reason="no compiled kernel")),
    ],
)
FLOAT = Elements(4, is_float=True)
HASHER = hasher_for("xxh3-128")


def trained(items: int = 100_000, *, seed: int = 1) -> tuple[bytes, bytes]:
    """Weights of all sizes that a step moved by about as much, and what they were."""
    rng = np.random.default_rng(seed)
    old = (rng.standard_normal(items) * 0.05).astype("<f4")
    return (old + rng.standard_normal(items).astype("<f4") * np.float32(1e-4)).astype("<f4").tobytes(), old.tobytes()


def plainly_ordered(raw: bytes, base: bytes, width: int) -> list[list[int]]:
    """The kept differences, sorted by class one at a time: (class, zigzag)."""
    bits = 8 * width
    found = []
    words = [
        tuple(int.from_bytes(data[at : at + width], "little") for data in (raw, base))
        for at in range(0, len(raw) // width * width, width)
    ]
    for start in range(0, len(words), GROUP_ITEMS):
        group = words[start : start + GROUP_ITEMS]
        if any(new != old for new, old in group):
            for new, old in group:
                step = (new - old) % 2**bits
                zigzag = (step << 1) % 2**bits ^ (2**bits - 1 if step >> bits - 1 else 0)
                found.append((((old << 1 | old >> bits - 1) % 2**bits) >> bits - 8, zigzag))
    return [[zigzag for of, zigzag in found if of == class_] for class_ in range(256)]


def order(kernel: Kernel, raw: bytes, base: bytes, width: int) -> tuple[list[bytes], list[int], bytes]:
    items = len(raw) // width
    planes, kept, counts = bytearray(width * items), bytearray(transform.kept_bytes(items)), np.zeros(256, np.uint32)
    count = kernel.split(raw, base, planes, kept, width, Mode.DIFFERENCE, 1.0, counts.data)
    return [bytes(planes[k * items : k * items + count]) for k in range(width)], counts.tolist(), bytes(kept)


@KERNELS
@pytest.mark.parametrize("width", [2, 4, 8])
@given(data=st.data())
def test_elements_lie_by_class_and_in_their_order_within_one(kernel: Kernel, width: int, data: st.DataObject) -> None:
    raw = data.draw(st.binary(max_size=90 * width))
    base = bytearray(raw)
    for at in data.draw(st.lists(st.integers(0, max(0, len(raw) - 1)), max_size=40)):
        if at < len(base):
            base[at] ^= data.draw(st.integers(1, 255))
    rows, counts, kept = order(kernel, raw, bytes(base), width)
    expected = plainly_ordered(raw, bytes(base), width)
    assert counts == [len(found) for found in expected]
    flat = [zigzag for found in expected for zigzag in found]
    assert rows == [bytes(zigzag >> 8 * k & 255 for zigzag in flat) for k in range(width)]
    out = bytearray(len(raw) // width * width)
    kernel.merge(tuple(rows), kept, bytes(base), out, width, Mode.DIFFERENCE, 1.0, True)
    assert bytes(out) == raw[: len(out)]


@pytest.mark.skipif(COMPILED is None, reason="no compiled kernel")
@pytest.mark.parametrize("width", [2, 4, 8])
def test_the_kernels_agree_on_whole_chunks(width: int) -> None:
    assert COMPILED is not None
    raw, base = trained(50_001)
    raw, base = raw[: -width + 1], base[: -width + 1]
    assert order(COMPILED, raw, base, width) == order(NumpyKernel(), raw, base, width)


@pytest.mark.parametrize("use", ["best", "numpy"])
@pytest.mark.parametrize("elements", [FLOAT, Elements(2, is_float=True), Elements(8, is_float=True)], ids=str)
@pytest.mark.parametrize("mode", [Mode.DIFFERENCE, Mode.XOR])
def test_a_payload_comes_back(monkeypatch: pytest.MonkeyPatch, use: str, elements: Elements, mode: Mode) -> None:
    if use == "numpy":
        monkeypatch.setattr(transform, "kernel", NumpyKernel())
    for raw, base in (trained(), (bytes(4000), b"\1" * 4000), (trained(9)[0][:-3], trained(9)[1][:-3])):
        payload = encode_delta(raw, base, elements, Choice(mode, 1.0, 0.0, ordered=True))
        if payload is not None:
            out = memoryview(bytearray(len(raw)))
            decode_delta(memoryview(payload), out, base, ordered=True)
            assert out == raw


def test_weights_of_all_sizes_get_smaller_and_the_payloads_of_both_kernels_are_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raw, base = trained()
    choice = choose(raw, base, FLOAT, may_order=True)
    assert (choice.mode, choice.ordered) == (Mode.DIFFERENCE, True)
    ordered = encode_delta(raw, base, FLOAT, choice)
    plain = encode_delta(raw, base, FLOAT, choose(raw, base, FLOAT))
    assert ordered is not None
    assert plain is not None
    assert len(ordered) < 0.97 * len(plain)
    monkeypatch.setattr(transform, "kernel", NumpyKernel())
    assert choose(raw, base, FLOAT, may_order=True) == choice
    assert encode_delta(raw, base, FLOAT, choice) == ordered


def test_what_moves_in_proportion_is_not_sorted() -> None:
    _, base = trained()
    factors = 1 + np.random.default_rng(5).standard_normal(100_000).astype("<f4") * np.float32(1e-3)
    raw = (np.frombuffer(base, "<f4") * factors).astype("<f4").tobytes()
    assert not choose(raw, base, FLOAT, may_order=True).ordered


def test_integers_and_single_bytes_are_not_sorted() -> None:
    raw, base = trained()
    for elements in (Elements(4, is_float=False), Elements(1, is_float=True)):
        assert not choose(raw, base, elements, may_order=True).ordered
    with pytest.raises(CodecError, match="one byte"):
        decode_planes(
            memoryview(bytes([1, 2, 0, 0, 0, 0, 128, 63, 0, 2, 0, 0, 0]) + b"ab"),
            memoryview(bytearray(2)),
            base=b"ab",
            ordered=True,
        )


def test_it_is_only_written_where_it_is_allowed() -> None:
    raw, base = trained()
    for may_order, chain in ((True, (ORDERED,)), (False, (DELTA,))):
        encoded = encode_chunk(
            raw, FLOAT, "auto", chunk_id=HASHER.chunk_id(raw), hasher=HASHER, base=base, may_order=may_order
        )
        assert encoded.chain == chain


def test_segments_are_whole_classes_of_enough_elements() -> None:
    assert list(segment_ends([0, 5, 3, 0, 9, 1], 8)) == [8, 17, 18]
    assert list(segment_ends([0, 0], 8)) == []
    assert list(segment_ends([1], 8)) == [1]
    planes = transform.split(*trained()[:1], 4, mode=Mode.DIFFERENCE, base=trained()[1], ordered=True)
    assert planes.cuts[-1] == planes.array.shape[1]
    assert all(
        end - start >= SEGMENT_ITEMS_MIN for start, end in zip((0, *planes.cuts), planes.cuts[:-1], strict=False)
    )


@pytest.mark.skipif(COMPILED is None, reason="no compiled kernel")
def test_arguments_that_do_not_fit_are_refused() -> None:
    assert COMPILED is not None
    raw, planes, counts = bytes(64), bytearray(64), bytearray(1024)
    for call in (
        lambda: COMPILED.split(raw, raw, planes, None, 1, Mode.XOR, 1.0, counts),
        lambda: COMPILED.split(raw, None, planes, None, 4, Mode.PLAIN, 1.0, counts),
        lambda: COMPILED.split(raw, raw, planes, None, 4, Mode.XOR, 1.0, counts[:-1]),
        lambda: COMPILED.split(raw, raw[:-1], planes, None, 4, Mode.XOR, 1.0, counts),
        lambda: COMPILED.split(raw, raw, planes[:-1], None, 4, Mode.XOR, 1.0, counts),
        lambda: COMPILED.merge((bytes(16),) * 4, None, None, bytearray(64), 4, Mode.PLAIN, 1.0, True),
        lambda: COMPILED.merge((bytes(64),), None, raw, bytearray(64), 1, Mode.XOR, 1.0, True),
    ):
        with pytest.raises(ValueError, match=r"."):
            call()


@pytest.mark.parametrize("ordered", [False, True])
def test_a_base_of_another_length_is_refused(ordered: bool) -> None:
    raw, base = trained(5000)
    payload = encode_delta(raw, base, FLOAT, Choice(Mode.DIFFERENCE, 1.0, 0.0, ordered=ordered))
    assert payload is not None
    for other in (base[:-4], base + bytes(4)):
        with pytest.raises(CodecError, match="expected a base of 20000 bytes"):
            decode_delta(memoryview(payload), memoryview(bytearray(len(raw))), other, ordered=ordered)
