"""A lease is held from enter to exit, and never longer than its process lives."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import castore
from castore.api import Repository
from castore.backend import LocalBackend, MemoryBackend
from castore.backend.base import Backend
from castore.errors import DamageError, FormatError
from castore.format.layout import LEASES
from castore.format.textfile import decode_text_file, encode_text_file
from castore.leases import condemned_packs, list_leases, writer_lease
from castore.options import RepositoryOptions
from tests.checkpoint.repositories import create_on, packs_of

NOW_NS = 1_700_000_000_000_000_000
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture(params=["memory", "local"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    return MemoryBackend() if request.param == "memory" else LocalBackend(tmp_path)


def lease_files(backend: Backend) -> list[str]:
    return [info.name for info in backend.list(LEASES)]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited 20 s in vain"
        time.sleep(0.005)


def test_a_lease_is_held_inside_the_block_and_gone_after_it(backend: Backend) -> None:
    with writer_lease(backend, purpose="save", now_ns=NOW_NS):
        (lease,) = list_leases(backend)
        assert lease.held
        assert (lease.purpose, lease.pid, lease.host, lease.started_ns) == (
            "save",
            os.getpid(),
            socket.gethostname(),
            NOW_NS,
        )
        assert lease.name.startswith("leases/")
        assert lease.name.endswith(".lease")
    assert list_leases(backend) == []
    assert lease_files(backend) == []


def test_a_lease_is_released_when_the_block_raises(backend: Backend) -> None:
    with pytest.raises(KeyError), writer_lease(backend, purpose="save", now_ns=NOW_NS):
        raise KeyError
    assert list_leases(backend) == []


def test_leases_do_not_exclude_each_other(backend: Backend) -> None:
    with writer_lease(backend, purpose="save", now_ns=1), writer_lease(backend, purpose="tag", now_ns=2):
        assert sorted(lease.purpose for lease in list_leases(backend)) == ["save", "tag"]
        assert all(lease.held for lease in list_leases(backend))
    assert list_leases(backend) == []


def test_the_file_says_who_holds_it(backend: Backend) -> None:
    with writer_lease(backend, purpose="save", now_ns=NOW_NS):
        (name,) = lease_files(backend)
        fields = decode_text_file(backend.read(name, max_bytes=10_000), name=name)
    assert fields.keys() == {"boot", "host", "pid", "purpose", "started_ns"}
    boot = Path("/proc/sys/kernel/random/boot_id")
    assert fields["boot"] == (boot.read_text().strip() if boot.exists() else "")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"garbage",
        encode_text_file({}),
        encode_text_file({"purpose": "save", "host": "h", "pid": "12", "started_ns": 1}),
        encode_text_file({"purpose": None, "host": "h", "pid": 12, "started_ns": 1}),
    ],
)
def test_a_lease_with_a_damaged_text_counts_all_the_same(backend: Backend, data: bytes) -> None:
    claim = backend.claim("leases/x.lease", data)
    (lease,) = list_leases(backend)
    assert (lease.held, lease.purpose, lease.pid) == (True, "unknown", 0)
    claim.release()


# ---- processes ---------------------------------------------------------------------------------------------


def hold_in_child(root: Path, *, grandchild: bool = False) -> int:
    """A forked process that takes a lease and then sleeps, with a sleeping child of its own if asked for."""
    pid = os.fork()
    if pid == 0:
        try:
            with writer_lease(LocalBackend(root), purpose="save", now_ns=NOW_NS):
                if grandchild and os.fork() == 0:
                    (root / "grandchild").write_text(str(os.getpid()))
                time.sleep(60)
        finally:
            os._exit(1)
    return pid


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_lease_ends_with_its_process_however_that_ends(tmp_path: Path) -> None:
    backend = LocalBackend(tmp_path)
    pid = hold_in_child(tmp_path)
    try:
        wait_until(lambda: [(lease.held, lease.pid) for lease in list_leases(backend)] == [(True, pid)])
    finally:
        kill(pid)
    assert [lease.held for lease in list_leases(backend)] in ([], [False])


def test_a_stopped_process_still_holds_its_lease(tmp_path: Path) -> None:
    backend = LocalBackend(tmp_path)
    pid = hold_in_child(tmp_path)
    try:
        wait_until(lambda: [lease.held for lease in list_leases(backend)] == [True])
        os.kill(pid, signal.SIGSTOP)
        os.waitpid(pid, os.WUNTRACED)
        assert [(lease.held, lease.pid) for lease in list_leases(backend)] == [(True, pid)]
    finally:
        kill(pid)


def test_a_forked_child_does_not_keep_the_lease_of_its_dead_parent(tmp_path: Path) -> None:
    backend = LocalBackend(tmp_path)
    pid = hold_in_child(tmp_path, grandchild=True)
    note = tmp_path / "grandchild"
    try:
        wait_until(lambda: note.exists() and note.read_text() != "")
    finally:
        kill(pid)
    try:
        assert [lease.held for lease in list_leases(backend)] in ([], [False])
    finally:
        os.kill(int(note.read_text()), signal.SIGKILL)


def test_a_forked_child_that_leaves_the_block_does_not_release_the_lease(tmp_path: Path) -> None:
    backend = LocalBackend(tmp_path)
    with writer_lease(backend, purpose="save", now_ns=NOW_NS):
        pid = os.fork()
        if pid == 0:
            try:
                pass
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        assert [lease.held for lease in list_leases(backend)] == [True]
    assert list_leases(backend) == []


def test_a_forked_child_that_unwinds_the_block_leaves_the_lease_to_its_parent(tmp_path: Path) -> None:
    backend = LocalBackend(tmp_path)
    pid = -1
    try:
        with writer_lease(backend, purpose="save", now_ns=NOW_NS):
            pid = os.fork()
            if pid:
                os.waitpid(pid, 0)
                assert [lease.held for lease in list_leases(backend)] == [True]
    finally:
        if pid == 0:
            os._exit(0)
    assert list_leases(backend) == []


# ---- the condemned set -------------------------------------------------------------------------------------

A, B, C = "a" * 32, "b" * 32, "c" * 32


def condemn(backend: Backend, name: str, packs: object) -> None:
    backend.put_if_absent(f"gc/{name}", encode_text_file({"condemned_ns": 1, "packs": packs}))


def test_nothing_is_condemned_in_a_fresh_repository(backend: Backend) -> None:
    assert condemned_packs(backend) == frozenset()


def test_the_condemned_packs_of_all_files_count(backend: Backend) -> None:
    condemn(backend, "1.condemned", [A, B])
    condemn(backend, "2.condemned", [B, C])
    condemn(backend, "3.condemned", [])
    assert condemned_packs(backend) == {A, B, C}


def test_other_files_beside_them_are_passed_over(backend: Backend) -> None:
    backend.put_if_absent("gc/marks", b"something else")
    condemn(backend, "1.condemned", [A])
    assert condemned_packs(backend) == {A}


@pytest.mark.parametrize("packs", [None, "abc", {"a": 1}, [1], [A, None]])
def test_a_condemned_file_that_cannot_be_is_an_error_and_never_empty(backend: Backend, packs: object) -> None:
    condemn(backend, "1.condemned", packs)
    with pytest.raises(FormatError, match=r"gc/1\.condemned"):
        condemned_packs(backend)


def test_a_damaged_condemned_file_is_an_error(backend: Backend) -> None:
    data = bytearray(encode_text_file({"condemned_ns": 1, "packs": [A]}))
    data[-3] ^= 1
    backend.put_if_absent("gc/1.condemned", data)
    with pytest.raises(DamageError):
        condemned_packs(backend)


def test_a_condemned_file_that_goes_meanwhile_is_no_error() -> None:
    backend = MemoryBackend()
    condemn(backend, "1.condemned", [A])
    condemn(backend, "2.condemned", [B])

    class Vanishing(MemoryBackend):
        def list(self, prefix: str):
            return backend.list(prefix)

        def read(self, name: str, *, max_bytes: int) -> bytes:
            backend.delete("gc/1.condemned")
            return backend.read(name, max_bytes=max_bytes)

    assert condemned_packs(Vanishing()) == {B}


# ---- signs of life -------------------------------------------------------------------------------------------------


def condemn_all(repo: Repository) -> None:
    condemn(repo.handle.backend, f"{'ab' * 16}.condemned", sorted(packs_of(repo)))


class Renewals(MemoryBackend):
    """Remembers every sign of life."""

    def __init__(self) -> None:
        super().__init__()
        self.signs: list[bytes] = []

    def claim(self, name: str, data: bytes) -> Any:
        claim = super().claim(name, data)
        return SimpleNamespace(name=claim.name, renew=self.signs.append, release=claim.release)


LONG_WORK: dict[str, tuple[Callable[[Repository], object], Callable[[Repository], object]]] = {
    "forget": (lambda repo: None, lambda repo: repo.forget(castore.Keep(last=1))),
    "forget by name": (lambda repo: None, lambda repo: repo.forget(ids=["main~1", "main~2", "main~3"])),
    "thin": (lambda repo: None, lambda repo: repo.thin(["a"], older_than=1)),
    "undelete": (lambda repo: repo.forget(castore.Keep(last=1)), lambda repo: repo.undelete()),
    "branch": (condemn_all, lambda repo: repo.branch("new")),
    "tag": (condemn_all, lambda repo: repo.tag("new")),
}


@pytest.mark.parametrize("kind", LONG_WORK)
def test_long_work_gives_signs_of_life_by_the_lease_length_of_the_repository(kind: str) -> None:
    """To collectors of other hosts it looked dead after a lease."""
    before, work = LONG_WORK[kind]
    backend = Renewals()
    repo = create_on(backend, RepositoryOptions(lease_s=1e-6))
    for step in range(4):
        repo.save({"a": np.full(1000, step), "b": np.full(1000, -step)}, step=step)
    before(repo)
    backend.signs.clear()
    work(repo)
    assert len(backend.signs) > 2
    assert len(set(backend.signs)) == len(backend.signs)
