"""An operation that does not know a feature of the repository refuses before it changes anything; the others go on."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import castore
from castore.codec.registry import DELTA, ORDERED
from castore.errors import UnsupportedFormatError
from castore.format.pack import RecordKind
from castore.format.textfile import decode_text_file, encode_text_file
from castore.maintenance.parity import remove_parity
from castore.pack.reader import read_table
from castore.store import list_packs

READ: dict[str, Callable[[castore.Repository], object]] = {
    "load": lambda repo: repo.load(),
    "load_latest_valid": lambda repo: repo.load_latest_valid(),
    "read": lambda repo: repo.read("main", "weight"),
    "snapshot": lambda repo: repo.snapshot(),
    "log": lambda repo: list(repo.log()),
    "snapshots": lambda repo: list(repo.snapshots()),
    "orphans": lambda repo: repo.orphans(),
    "forgotten": lambda repo: repo.forgotten(),
    "diff": lambda repo: repo.diff("main~1", "main"),
    "branches": lambda repo: repo.branches(),
    "tags": lambda repo: repo.tags(),
    "policy": lambda repo: repo.policy(),
    "verify": lambda repo: repo.verify(data=True),
    "usage": lambda repo: repo.usage(),
    "reindex": lambda repo: repo.reindex(),
    "forget dry": lambda repo: repo.forget(castore.Keep(last=1), dry_run=True),
    "thin dry": lambda repo: repo.thin(["weight"], older_than=1, dry_run=True),
    "apply_policy dry": lambda repo: repo.apply_policy(dry_run=True),
    "push": lambda repo: repo.push(neighbour(repo)),
}


def neighbour(repo: castore.Repository) -> Path:
    """Another repository, with a snapshot of its own on `other`."""
    path = repo.path.with_name("neighbour")
    if not path.exists():
        with castore.init(path) as other:
            other.save(state(50), branch="other")
    return path


def push_into(repo: castore.Repository) -> None:
    with castore.open(neighbour(repo)) as other:
        other.push(repo)


def save_in_worker(repo: castore.Repository) -> None:
    with castore.open(repo.path, worker_process=True) as other:
        other.save_async(state(9)).result()


WRITE: dict[str, Callable[[castore.Repository], object]] = {
    "save": lambda repo: repo.save(state(9)),
    "save_async": lambda repo: repo.save_async(state(9)).result(),
    "save_async in a worker": save_in_worker,
    "branch": lambda repo: repo.branch("new"),
    "branch move": lambda repo: repo.branch("side", at="main", move=True),
    "tag": lambda repo: repo.tag("new"),
    "delete_branch": lambda repo: repo.delete_branch("side"),
    "delete_tag": lambda repo: repo.delete_tag("v1"),
    "forget": lambda repo: repo.forget(castore.Keep(last=1)),
    "forget named": lambda repo: repo.forget(ids=["main~2"]),
    "thin": lambda repo: repo.thin(["weight"], older_than=1),
    "thin named": lambda repo: repo.thin(["weight"], ids=["main~2"]),
    "undelete": lambda repo: repo.undelete([repo.forgotten()[0].id]),
    "set_policy": lambda repo: repo.set_policy(castore.Keep(last=2)),
    "clear_policy": lambda repo: repo.clear_policy(),
    "apply_policy": lambda repo: repo.apply_policy(),
    "repack": lambda repo: repo.repack(flatten=True),
    "add_parity": lambda repo: repo.add_parity(),
    "pull": lambda repo: repo.pull(neighbour(repo)),
    "push into": push_into,
}
COLLECT: dict[str, Callable[[castore.Repository], object]] = {
    "gc": lambda repo: repo.gc(),
    "gc dry": lambda repo: repo.gc(dry_run=True),
    "gc auto": lambda repo: repo.gc(auto=True),
    "gc target": lambda repo: repo.gc(target_bytes=1),
    "repair": lambda repo: repo.repair(),
    "remove_parity": lambda repo: remove_parity(repo.handle),
}
NO_METHOD = {"remove_parity"}
"""Operations of the command line alone."""
NO_OPERATION = {"close", "handle", "limit_async", "options", "path", "wait"}


def state(step: int) -> dict[str, Any]:
    return {"weight": np.arange(5000, dtype=np.float32) + step, "step": step}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Something to do for every operation."""
    root = tmp_path_factory.mktemp("flags") / "made"
    with castore.init(root) as repo:
        for step in (1, 2, 3, 4):
            repo.save(state(step), step=step)
        repo.branch("side", at="main~1")
        repo.tag("v1", at="main~3")
        repo.save(state(7), branch="gone")
        gone = repo.snapshot("gone").id
        repo.delete_branch("gone")
        repo.forget(ids=[gone])
        repo.set_policy(castore.Keep(last=1), every_saves=1000)
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "repository"))


def need(root: Path, *, read: str = "", write: str = "", gc: str = "") -> None:
    """Put flags into the config, as a later castore would at creation."""
    fields = decode_text_file((root / "config").read_bytes(), name="config")
    names = {"read": read.split(), "write": write.split(), "gc": gc.split()}
    (root / "config").write_bytes(encode_text_file(fields | {"features": names}))


def files_of(root: Path) -> dict[str, str]:
    """Every file that is not the index."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file() and "cache" not in path.relative_to(root).parts
    }


def refused(root: Path, operation: Callable[[castore.Repository], object], message: str) -> None:
    before = files_of(root)
    with (
        castore.open(root) as repo,
        pytest.raises(UnsupportedFormatError, match=rf"{message} this repository needs telepathy, which .*newer one"),
    ):
        operation(repo)
    assert files_of(root) == before


def test_every_method_of_a_repository_is_in_one_of_the_tables() -> None:
    methods = {name for name in dir(castore.Repository) if not name.startswith("_")}
    tested = {name.split()[0] for name in (*READ, *WRITE, *COLLECT)}
    assert methods - NO_OPERATION == tested - NO_METHOD


def test_a_flag_of_reading_keeps_a_repository_shut(root: Path) -> None:
    need(root, read="telepathy")
    with pytest.raises(
        UnsupportedFormatError, match="to read this repository needs telepathy, which this castore lacks"
    ):
        castore.open(root)
    with castore.init(root.with_name("target")) as other, pytest.raises(UnsupportedFormatError, match="telepathy"):
        other.pull(root)


@pytest.mark.parametrize("name", READ)
def test_readers_pass_over_flags_of_writing_and_collecting(root: Path, name: str) -> None:
    need(root, write="telepathy", gc="telepathy")
    with castore.open(root) as repo:
        READ[name](repo)


@pytest.mark.parametrize("name", WRITE)
def test_writers_refuse_a_flag_of_writing(root: Path, name: str) -> None:
    need(root, write="telepathy")
    refused(root, WRITE[name], "to write")


@pytest.mark.parametrize("name", WRITE)
def test_writers_pass_over_a_flag_of_collecting(root: Path, name: str) -> None:
    need(root, gc="telepathy")
    with castore.open(root) as repo:
        WRITE[name](repo)


@pytest.mark.parametrize("flag", ["write", "gc"])
@pytest.mark.parametrize("name", COLLECT)
def test_collectors_refuse_flags_of_writing_and_of_collecting(root: Path, name: str, flag: str) -> None:
    need(root, **{flag: "telepathy"})
    refused(root, COLLECT[name], f"to {flag}")


@pytest.mark.parametrize("name", [*READ, *WRITE, *COLLECT])
def test_without_flags_every_operation_goes_on(root: Path, name: str) -> None:
    with castore.open(root) as repo:
        {**READ, **WRITE, **COLLECT}[name](repo)


# ---- flags that this castore knows -----------------------------------------------------------------------------------


def chains_in(root: Path) -> set[tuple[int, ...]]:
    """Chains of the records of leaves."""
    with castore.open(root) as repo:
        store = repo.handle.store
        tables = (
            read_table(store.open_pack(pack_id), where=pack_id, expected_id=pack_id, hasher=store.hasher)
            for pack_id in list_packs(repo.handle.backend)
        )
        return {row.chain for table in tables for row in table if row.kind is RecordKind.LEAF}


def trained(step: int) -> dict[str, Any]:
    """Weights of all sizes that each step moves by about as much."""
    weights = np.random.default_rng(0).standard_normal(30_000).astype(np.float32) * np.float32(0.05)
    moved = np.random.default_rng(step).standard_normal(30_000).astype(np.float32) * np.float32(1e-4)
    return {"weights": weights + moved, "step": step}


@pytest.fixture
def ordered(tmp_path: Path) -> Path:
    """A repository as they are made now."""
    with castore.init(tmp_path / "ordered") as repo:
        for step in (1, 2, 3):
            repo.save(trained(step), step=step)
    assert (ORDERED,) in chains_in(tmp_path / "ordered")
    return tmp_path / "ordered"


def test_a_new_repository_says_that_its_differences_may_be_sorted(ordered: Path) -> None:
    fields = decode_text_file((ordered / "config").read_bytes(), name="config")
    assert fields["features"] == {"read": [], "write": ["ordered"], "gc": []}


@pytest.mark.parametrize("way", ["save", "push", "pull", "push beside", "repair", "repack", "gc"])
def test_a_repository_without_the_flag_gets_no_sorted_difference(ordered: Path, tmp_path: Path, way: str) -> None:
    """Whatever brings it there: a castore that froze version 1 could not rest on it."""
    plain = tmp_path / "plain"
    castore.init(plain).close()
    need(plain)
    with castore.open(plain) as repo:
        if way == "push":
            with castore.open(ordered) as source:
                source.push(repo)
        elif way == "pull":
            repo.pull(ordered)
        else:
            for step in (1, 2, 3):
                repo.save(trained(step), step=step)
        if way == "push beside":
            with castore.open(ordered) as source:
                source.branch("other")
                source.push(repo, ["other"])
        elif way == "repair":
            damaged = max(plain.glob("packs/*/*.pack"), key=lambda path: path.stat().st_size)
            with damaged.open("r+b") as file:
                file.seek(5000)
                file.write(b"x" * 100)
            repo.repair(sources=[ordered])
        elif way == "repack":
            repo.repack(level="max")
        elif way == "gc":
            repo.forget(castore.Keep(last=1))
            repo.gc(repack_below=1.0)
    chains = chains_in(plain)
    assert (ORDERED,) not in chains
    assert ((DELTA,) in chains) is (way != "gc"), "differences stay differences, unless nothing is left to rest on"
    with castore.open(plain) as repo:
        assert repo.verify(data=True).ok
        assert np.array_equal(repo.load("main")["weights"], trained(3)["weights"])


def test_a_repository_of_a_pre_release_says_what_to_do(root: Path) -> None:
    fields = decode_text_file((root / "config").read_bytes(), name="config")
    (root / "config").write_bytes(encode_text_file(fields | {"format": 0}))
    message = "format 0, made by a pre-release.*reads format 1: load the states with that pre-release and save them"
    with pytest.raises(UnsupportedFormatError, match=message):
        castore.open(root)
    with castore.init(root.with_name("source")) as other, pytest.raises(UnsupportedFormatError, match=message):
        other.push(root)
