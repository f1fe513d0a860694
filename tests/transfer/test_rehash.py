"""Another hash: all ids change, the meaning does not, and the same snapshot always becomes the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from castore.api import Repository
from castore.errors import FormatError
from castore.format.manifest import Entry, Kind
from castore.snapshots import read_record
from castore.transfer.moved import derived_nonce
from castore.transfer.rehash import view_bytes
from tests.checkpoint.states import assert_same
from tests.transfer.pairs import assert_holds_history, refs_of, repository, source_with_history, state_of


@pytest.fixture(scope="module")
def source() -> Repository:
    return source_with_history()


def test_state_ids_are_those_that_a_save_under_that_hash_gives(source) -> None:
    target, saved = repository(hash_name="blake3"), repository(hash_name="blake3")
    source.push(target)
    for snapshot in source.log("main"):
        own = saved.save(state_of(snapshot.step or 0), branch=f"b{snapshot.step}")
        moved = target.snapshot(f"main@{snapshot.step}")
        assert moved.state_id == own.state_id
        facts = (
            "branch",
            "step",
            "created_at",
            "metrics",
            "metadata",
            "message",
            "raw_bytes",
            "leaf_count",
            "software",
        )
        assert [getattr(moved, fact) for fact in facts] == [getattr(snapshot, fact) for fact in facts]


def test_there_and_back_again_gives_equal_state_ids(source) -> None:
    there, back = repository(hash_name="blake3"), repository()
    source.push(there)
    there.push(back)
    assert [found.state_id for found in back.log()] == [found.state_id for found in source.log()]
    assert_holds_history(back)


def test_a_snapshot_becomes_the_same_wherever_and_however_often_it_is_pushed(source) -> None:
    first, second = repository(hash_name="blake3"), repository(hash_name="blake3", compression="lz4")
    report = source.push(first)
    source.push(second, ["fork"])
    source.push(second, ["main"], depth=4)
    source.push(second)
    assert refs_of(first) == refs_of(second)
    assert {snapshot.id for snapshot in first.snapshots()} == {snapshot.id for snapshot in second.snapshots()}
    assert source.push(first).sent == {}
    assert len(set(report.sent.values())) == len(report.sent)


def test_chunks_that_the_target_is_known_to_have_are_not_even_read(source, monkeypatch) -> None:
    copy = source_with_history()
    target = repository(hash_name="blake3")
    copy.push(target)
    copy.save(state_of(4), step=4)
    read: list[bytes] = []
    store = copy.handle.store
    real = store.read_record
    monkeypatch.setattr(store, "read_record", lambda location: read.append(location.row.chunk_id) or real(location))
    report = copy.push(target)
    assert len(report.sent) == 1
    record = read_record(copy.handle.backend, copy.snapshot("main").id)
    needed = {id_ for entry in copy.handle.manifests.entries(record) for id_ in entry.chunk_ids(16)}
    assert 0 < len(set(read) & needed) < len(needed)


def test_a_manifest_that_does_not_have_its_state_id_is_refused() -> None:
    from castore.format.snapshot import encode_snapshot
    from castore.refs import move_branch

    repo = repository()
    snapshot = repo.save({"a": np.arange(100)})
    record = read_record(repo.handle.backend, snapshot.id)
    from dataclasses import replace

    from castore.ids import StateId

    forged_id, data = encode_snapshot(replace(record, state_id=StateId("0" * 32)), repo.handle.hasher)
    repo.handle.backend.put_if_absent(f"snapshots/{forged_id}", data)
    assert move_branch(repo.handle.backend, "main", expected_id=snapshot.id, new_id=forged_id, now_ns=1)
    with pytest.raises(FormatError, match="state id"):
        repo.push(repository(hash_name="blake3"))


def test_the_nonce_tells_the_origin_and_is_pinned() -> None:
    from castore.ids import SnapshotId

    assert derived_nonce(SnapshotId("00" * 16)) != derived_nonce(SnapshotId("00" * 15 + "01"))
    assert derived_nonce(SnapshotId("ab" * 16)).hex() == "38380be8a24519e8"


# ---- views ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4), (), (0, 3)])
@pytest.mark.parametrize("code", ["<f4", "<i8", "|u1", "<c16"])
def test_a_view_reads_from_its_storage_what_numpy_reads(shape, code) -> None:
    memory = np.random.default_rng(0).integers(0, 255, 4000, np.uint8)
    dtype = np.dtype(code)
    stride = tuple(dtype.itemsize * step for step in (7, 3, 2)[: len(shape)])
    view = np.ndarray(shape, dtype, buffer=memory, offset=48, strides=stride)
    entry = view_entry(view, offset=48)
    assert bytes(view_bytes(entry, bytearray(memory))) == view.tobytes()


def view_entry(view: np.ndarray[Any, Any], *, offset: int) -> Entry:
    attrs = {"storage": "~storage/0", "offset_bytes": offset, "stride_bytes": list(view.strides)}
    return Entry("v", Kind.VIEW, view.dtype.str, view.shape, attrs, raw_bytes=view.nbytes, digest=bytes(16))


@pytest.mark.parametrize(
    "change", [{"offset_bytes": 3990}, {"offset_bytes": -4}, {"stride_bytes": [4, 4]}, {"offset_bytes": "x"}]
)
def test_a_view_that_does_not_lie_in_its_storage_is_damage(change) -> None:
    from dataclasses import replace

    entry = view_entry(np.zeros(5, np.float32), offset=0)
    with pytest.raises(FormatError, match="leaf 'v'"):
        view_bytes(replace(entry, attrs={**entry.attrs, **change}), bytearray(4000))


def test_conjugates_negatives_and_views_of_tensors_keep_their_identity() -> None:
    torch = pytest.importorskip("torch")
    memory = torch.randn(60, 50, dtype=torch.complex64)
    memory[0, :3] = torch.tensor([complex("nan"), complex(0.0, -0.0), complex(float("inf"), float("-inf"))])
    halves = torch.randn(200, 30).to(torch.bfloat16)
    state = {
        "memory": memory,
        "conjugate": memory.conj(),
        "imaginary": memory.conj().imag,
        "turned": memory.t(),
        "halves": halves,
        "column": halves[:, 3],
        "odd": halves[::3, 1::2],
    }
    source, target, saved = repository(), repository(hash_name="blake3"), repository(hash_name="blake3")
    source.save(state)
    source.push(target)
    assert target.snapshot("main").state_id == saved.save(state).state_id
    assert target.verify(data=True).ok
    loaded = target.load("main")
    for key, value in state.items():
        found = loaded[key].resolve_conj().resolve_neg().contiguous()
        expected = value.resolve_conj().resolve_neg().contiguous()
        assert_same(
            found.view(torch.uint8).numpy() if found.dtype != torch.complex64 else found.numpy(),
            expected.view(torch.uint8).numpy() if expected.dtype != torch.complex64 else expected.numpy(),
        )
