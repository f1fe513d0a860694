"""The fault backend is a backend until its fault strikes, and then forgets what was not synced."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from castore.backend import LocalBackend, MemoryBackend
from castore.errors import NoSpaceError, NotFoundError, StorageError
from tests.suites.backend_suite import BackendSuite, names
from tests.suites.fault_backend import (
    MOMENTS,
    UNSYNCED,
    Fault,
    FaultBackend,
    Moment,
    SimulatedCrash,
    Unsynced,
    torn,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from castore.backend.base import Backend


class TestFaultBackend(BackendSuite):
    @pytest.fixture
    def backend(self, tmp_path: Path) -> Backend:
        return FaultBackend(LocalBackend(tmp_path))


class TestFaultBackendInMemory(BackendSuite):
    @pytest.fixture
    def backend(self) -> Backend:
        return FaultBackend(MemoryBackend())


def save(backend: Backend) -> None:
    claim = backend.claim("leases/a", b"lease")
    sink = backend.create_stream("packs/x")
    sink.write(b"pack")
    sink.commit()
    backend.put_if_absent("snapshots/x", b"snapshot")
    backend.compare_and_swap("refs/main", expected=b"old", new=b"new")
    backend.delete("refs/other")
    claim.release()


OLD = {"refs/main": b"old", "refs/other": b"other"}
OPERATIONS = [
    "claim",
    "create_stream",
    "write",
    "commit",
    "put_if_absent",
    "compare_and_swap",
    "delete",
    "release",
]


def crashed(at: int, moment: Moment) -> FaultBackend:
    inner = MemoryBackend()
    for name, data in OLD.items():
        inner.put_if_absent(name, data)
    backend = FaultBackend(inner, Fault(at, moment))
    with pytest.raises(SimulatedCrash, match=rf"{moment} call {at}: {OPERATIONS[at]} "):
        save(backend)
    return backend


def test_every_call_is_counted() -> None:
    backend = FaultBackend(MemoryBackend())
    save(backend)
    assert [call.operation for call in backend.calls] == OPERATIONS
    assert all(call.writes for call in backend.calls)
    assert backend.calls[3] == ("commit", "packs/x")
    reader = backend.open_reader("packs/x")
    reader.read(0, 1)
    reader.read_into(0, memoryview(bytearray(1)))
    assert [call.operation for call in backend.calls[8:]] == ["open_reader", "read_range", "read_into"]
    assert not any(call.writes for call in backend.calls[8:])


@pytest.mark.parametrize("unsynced", UNSYNCED)
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("at", range(len(OPERATIONS)))
def test_what_returned_is_durable_and_what_did_not_is_there_or_not(at: int, moment: Moment, unsynced: Unsynced) -> None:
    changes: list[Callable[[dict[str, bytes]], object]] = [
        lambda files: files.update({"packs/x": b"pack"}),
        lambda files: files.update({"snapshots/x": b"snapshot"}),
        lambda files: files.update({"refs/main": b"new"}),
        lambda files: files.pop("refs/other"),
    ]
    finished = max(0, min(at - 3, 4))
    if moment == "after" or (moment == "during" and unsynced != "lost"):
        finished = max(0, min(at - 2, 4))
    expected = dict(OLD)
    for change in changes[:finished]:
        change(expected)
    left = crashed(at, moment).survivors(unsynced=unsynced)
    assert {n: d for n, d in left.items() if not n.startswith("leases/") and ".tmp-" not in n} == expected


def test_a_dead_process_does_nothing_more() -> None:
    backend = crashed(2, "after")
    with pytest.raises(SimulatedCrash, match="dead already"):
        backend.put_if_absent("x", b"")
    with pytest.raises(SimulatedCrash, match="dead already"):
        list(backend.list(""))


def test_claims_and_open_streams_survive_in_any_state(tmp_path: Path) -> None:
    backend = crashed(2, "after")
    temporary = f"packs/.tmp-{2:016x}"
    assert backend.survivors(unsynced="kept") == OLD | {"leases/a": b"lease", temporary: b"pack"}
    assert backend.survivors(unsynced="lost") == OLD
    assert backend.survivors(unsynced="torn") == OLD | {"leases/a": b"le\0\0\0", temporary: b"pa\0\0"}
    assert crashed(2, "during").survivors(unsynced="kept")[temporary] == b"pa"
    assert crashed(7, "after").survivors(unsynced="torn")["leases/a"] == torn(b"lease")
    assert "leases/a" not in crashed(7, "after").survivors(unsynced="kept")

    restored = backend.restore(tmp_path, unsynced="kept")
    assert names(restored) == ["leases/a", "refs/main", "refs/other"]
    assert [info.name for info in restored.temporaries(modified_before_ns=1 << 62)] == [temporary]
    assert [claim.held for claim in restored.claims("leases/")] == [False]
    assert names(backend.restore_in_memory(unsynced="kept")) == names(restored)


def test_an_injected_error_is_the_one_that_the_contract_promises(tmp_path: Path) -> None:
    backend = FaultBackend(LocalBackend(tmp_path), Fault(1, errno=errno.ENOSPC, lasting=True))
    sink = backend.create_stream("packs/x")
    with pytest.raises(NoSpaceError, match="packs/x: cannot write: No space left"):
        sink.write(b"abc")
    with pytest.raises(StorageError, match="No space left"):
        sink.commit()
    sink.abort()
    with pytest.raises(NotFoundError):
        backend.read("packs/x", max_bytes=1)  # reading goes on
    with pytest.raises(NoSpaceError):
        backend.put_if_absent("x", b"")
    assert names(backend) == []
    assert list(backend.temporaries(modified_before_ns=1 << 62)) == []


def test_an_error_strikes_once_unless_it_lasts(tmp_path: Path) -> None:
    backend = FaultBackend(LocalBackend(tmp_path), Fault(0, errno=errno.EIO))
    with pytest.raises(StorageError, match="x: cannot put_if_absent: Input/output error"):
        backend.put_if_absent("x", b"")
    assert backend.put_if_absent("x", b"") is True


def test_an_error_after_the_effect_leaves_it_unsynced() -> None:
    """The sync of the directory failed: the file is there now, and may be gone after a power cut."""
    backend = FaultBackend(MemoryBackend(), Fault(0, "during", errno=errno.EIO))
    with pytest.raises(StorageError):
        backend.put_if_absent("x", b"abc")
    assert backend.survivors(unsynced="kept") == {"x": b"abc"}
    assert backend.survivors(unsynced="lost") == {}
