"""Any state comes back through the real API as it was: whole, in part, into a live state, and after other saves."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import castore
from castore.api import Repository
from castore.backend import MemoryBackend
from castore.errors import StateMismatchError
from castore.options import RepositoryOptions
from tests.checkpoint.repositories import create_on, open_on
from tests.tensors.equality import assert_states_equal
from tests.tensors.strategies import ndarrays, quantized_tensors, scalars, sparse_tensors, states, tensors

EXAMPLES = settings.default.max_examples if settings.default else 100
LEAVES = st.one_of(scalars(), tensors(), ndarrays(), sparse_tensors(), quantized_tensors())


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Repository]]:
    """One for each way to store a chunk; shared by all examples, so that they meet each other's chunks."""
    on_disk = castore.init(tmp_path_factory.mktemp("roundtrip") / "store")
    memory = [create_on(MemoryBackend(), RepositoryOptions(compression=name)) for name in ("lz4", "none")]
    yield [on_disk, *memory]
    on_disk.close()


@given(state=states())
def test_any_state_comes_back(repositories: list[Repository], state: Any) -> None:
    ids = set()
    for repo in repositories:
        snapshot = repo.save(state)
        ids.add(snapshot.state_id)
        assert_states_equal(repo.load(snapshot.id), state)
    assert len(ids) == 1, "the state id depends on how it is stored"


@given(state=states())
def test_what_was_loaded_has_the_same_state_id(repositories: list[Repository], state: Any) -> None:
    repo = repositories[0]
    snapshot = repo.save(state)
    assert repo.save(repo.load(snapshot.id), branch="again", parent=None).state_id == snapshot.state_id


@given(value=LEAVES, other=LEAVES)
def test_any_leaf_is_read_alone(repositories: list[Repository], value: Any, other: Any) -> None:
    repo = repositories[1]
    snapshot = repo.save({"a": {"x": value}, "b": other})
    assert_states_equal(repo.read(snapshot.id, "a/x"), value)
    assert_states_equal(repo.load(snapshot.id, paths=["a"]), {"a": {"x": value}})


@given(array=tensors() | ndarrays(), start=st.integers(-1, 8), stop=st.integers(-1, 8))
def test_any_rows_are_read_alone(repositories: list[Repository], array: Any, start: int, stop: int) -> None:
    repo = repositories[2]
    if not array.shape:
        return
    snapshot = repo.save({"x": array})
    found = repo.read(snapshot.id, "x", rows=slice(start, stop))
    assert_states_equal(_plain(found), _plain(array[start:stop]), strides=False)


def _plain(array: Any) -> Any:
    """The values alone: rows of a parameter are a tensor."""
    return array.detach() if isinstance(array, torch.Tensor) else array


@given(saved=states(), live=states())
@settings(max_examples=EXAMPLES * 2 // 5)
def test_a_load_into_any_state_succeeds_or_touches_nothing(
    repositories: list[Repository], saved: Any, live: Any
) -> None:
    repo = repositories[0]
    snapshot = repo.save(saved)
    before = repo.save(live, branch="live").state_id
    try:
        found = repo.load(snapshot.id, into=live)
    except StateMismatchError:
        assert repo.save(live, branch="live").state_id == before
    else:
        now, then = contents(repo.save(found, branch="live")), contents(snapshot)
        # Which of two is the alias depends on the live state.
        assert {path: now[path] for path in now.keys() & then.keys()} == {
            path: then[path] for path in now.keys() & then.keys()
        }


def contents(snapshot: castore.Snapshot) -> dict[str, str]:
    """Path → digest, of all leaves but aliases."""
    return {leaf.path: leaf.digest for leaf in snapshot.leaves if leaf.digest}


def views_of(base: torch.Tensor) -> list[torch.Tensor]:
    """Different looks at one storage."""
    numbers = base.view(torch.complex64)
    return [base, base.t(), torch._neg_view(base), numbers, numbers.conj(), base[1:3]]


def test_live_tensors_that_share_memory_get_the_saved_values_or_are_refused() -> None:
    """Filling a lazily negated view changed what was filled through another one, and nobody was told."""
    repo = create_on(MemoryBackend())
    pairs = list(itertools.product(range(len(views_of(torch.zeros(4, 6)))), repeat=2))
    refused = 0
    for saved in pairs:
        source = views_of(torch.arange(24.0).reshape(4, 6))
        snapshot = repo.save([source[index] for index in saved])
        expected = [tensor.resolve_conj().resolve_neg().clone() for tensor in repo.load(snapshot.id)]
        for live in pairs:
            target = views_of(torch.zeros(4, 6))
            try:
                found = repo.load(snapshot.id, into=[target[index] for index in live])
            except StateMismatchError:
                refused += 1
                assert not any(tensor.resolve_conj().any() for tensor in target)
            else:
                assert all(map(torch.equal, found, expected)), (saved, live)
    assert 0 < refused < len(pairs) ** 2


@given(state=states())
@settings(max_examples=EXAMPLES * 3 // 5)
def test_a_state_is_filled_into_a_copy_of_itself(repositories: list[Repository], state: Any) -> None:
    repo = repositories[0]
    snapshot = repo.save(state)
    live = repo.load(snapshot.id)
    mismatched: tuple[str, ...] = ()
    try:
        assert_states_equal(repo.load(snapshot.id, into=live), state)
    except StateMismatchError as error:
        mismatched = (*error.mismatched, *error.missing, *error.unexpected)
    # What torch cannot write to: expanded and overlapping tensors, and two of four bits in one byte.
    assert all(any(why in text for why in ("expanded", "share", "quint4x2")) for text in mismatched), mismatched


# ---- torch through the real API ----------------------------------------------------------------------------------


def training_state(steps: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 60), torch.nn.BatchNorm1d(60), torch.nn.Linear(60, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = model(torch.randn(16, 40)).square().mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model, optimizer


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": {"torch": torch.get_rng_state()},
    }


def test_training_goes_on_bit_for_bit_after_a_load(tmp_path: Path) -> None:
    model, optimizer = training_state(3)
    with castore.init(tmp_path / "store") as repo:
        repo.save(state_of(model, optimizer), step=3)
        torch.manual_seed(1)
        straight, _ = training_state(3)
        other_model, other_optimizer = training_state(0)
        state = repo.load("main")
        other_model.load_state_dict(state["model"])
        other_optimizer.load_state_dict(state["optimizer"])
        assert_states_equal(state_of(other_model, other_optimizer)["model"], straight.state_dict())
        for each, each_optimizer in ((model, optimizer), (other_model, other_optimizer)):
            torch.set_rng_state(state["rng"]["torch"])
            for _ in range(3):
                loss = each(torch.randn(16, 40)).square().mean()
                each_optimizer.zero_grad()
                loss.backward()
                each_optimizer.step()
        ids = [
            repo.save(state_of(*pair), branch=name).state_id
            for name, pair in (("a", (model, optimizer)), ("b", (other_model, other_optimizer)))
        ]
        assert ids[0] == ids[1]


def test_a_live_model_is_filled_in_place(tmp_path: Path) -> None:
    model, optimizer = training_state(2)
    with castore.init(tmp_path / "store") as repo:
        repo.save(state_of(model, optimizer))
        other, _ = training_state(0)
        parameters = {name: (parameter, parameter.data_ptr()) for name, parameter in other.named_parameters()}
        live = other.state_dict()
        repo.load("main", into={"model": live}, paths=["model"])
        for name, (parameter, address) in parameters.items():
            assert parameter.data_ptr() == address
            assert torch.equal(parameter, dict(model.named_parameters())[name])
        # Autograd knows that the values changed.
        x = torch.randn(4, 40)
        loss = other(x).square().mean()
        repo.load("main", into={"model": other.state_dict()}, paths=["model"])
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    embedding = torch.nn.Embedding(50, 20)
    head = torch.nn.Linear(20, 50, bias=False)
    head.weight = embedding.weight
    state = {"embedding": embedding.weight, "head": head.weight, "slice": embedding.weight.detach()[3:7]}
    with castore.init(tmp_path / "store") as repo:
        snapshot = repo.save(state)
        assert snapshot.raw_bytes == 50 * 20 * 4
        found = repo.load("main")
        assert found["head"] is found["embedding"] or found["head"].data_ptr() == found["embedding"].data_ptr()
        assert found["slice"].data_ptr() == found["embedding"][3].data_ptr()
        assert isinstance(found["embedding"], torch.nn.Parameter)


def test_a_device_is_where_tensors_go(tmp_path: Path) -> None:
    with castore.init(tmp_path / "store") as repo:
        repo.save({"t": torch.arange(10_000), "n": 1})
        assert repo.load("main", device="cpu")["t"].device.type == "cpu"
        assert repo.load("main", device=torch.device("cpu"))["n"] == 1


def test_dtypes_and_special_bits_survive_every_codec() -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (70_000,), generator=generator, dtype=torch.int64).to(torch.int32)
    state = {
        "any bits": bits.view(torch.float32),
        "nan payloads": (bits | 0x7F800000).view(torch.float32),
        "subnormal": (bits & 0x807FFFFF).view(torch.float32),
        "bf16": bits.view(torch.bfloat16),
        "fp16": bits.view(torch.float16),
        "fp8": bits.view(torch.float8_e4m3fn),
        "double": bits.view(torch.float64),
        "complex": bits.view(torch.complex64),
        "zeros": torch.zeros(70_000),
        "minus zeros": -torch.zeros(70_000),
        "odd tail": bits.view(torch.uint8)[: 4 * 65_000 + 3].clone(),
        "bool": bits > 0,
    }
    for compression in ("auto", "lz4", "none"):
        repo = create_on(MemoryBackend(), RepositoryOptions(compression=compression))
        repo.save(state)
        drifted = {name: value.clone() for name, value in state.items()}
        for value in drifted.values():
            value.view(torch.uint8).view(-1)[::1000] ^= 1
        repo.save(drifted)
        for flush in (False, True):
            torch.set_flush_denormal(flush)
            try:
                fresh = open_on(repo.handle.backend)
                for ref, expected in (("main", drifted), ("main~1", state)):
                    found = fresh.load(ref)
                    for name, value in expected.items():
                        assert found[name].dtype is value.dtype
                        assert torch.equal(found[name].view(torch.uint8), value.view(torch.uint8)), (name, flush)
            finally:
                torch.set_flush_denormal(False)
