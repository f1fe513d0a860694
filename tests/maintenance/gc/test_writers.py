"""Who is alive: told by the operating system here, by signs of life elsewhere, and never by anybody's wall clock."""

from __future__ import annotations

import os
from dataclasses import replace

from castore.backend import MemoryBackend
from castore.errors import NoSpaceError
from castore.leases import LeaseInfo, boot_id, claim_text, list_leases, writer_lease
from castore.maintenance.gc.writers import Watch, older_leases
from tests.maintenance.gc.histories import Timepiece

LEASE_S = 60.0
FOREIGN = LeaseInfo("leases/x.lease", False, "save", "elsewhere", 7, 1, "another boot", b"first")


def watch(time: Timepiece) -> Watch:
    return Watch(lease_s=LEASE_S, monotonic_s=time.monotonic_s, sleep=time.sleep)


def test_a_writer_of_this_host_is_alive_as_long_as_its_lock_is_held() -> None:
    time = Timepiece()
    here = replace(FOREIGN, boot=boot_id(), held=True)
    found = watch(time)
    for _ in range(3):
        time.sleep(10 * LEASE_S)  # stopped for however long
        assert found.is_alive(here)
    assert not found.is_alive(replace(here, held=False))


def test_a_writer_of_another_host_is_dead_when_it_gave_no_sign_for_the_lease_length() -> None:
    time = Timepiece()
    found = watch(time)
    assert found.is_alive(FOREIGN)
    time.sleep(LEASE_S - 1)
    assert found.is_alive(FOREIGN)
    time.sleep(2)
    assert not found.is_alive(FOREIGN)


def test_any_change_of_its_file_is_a_sign_of_life() -> None:
    time = Timepiece()
    found = watch(time)
    for beat in range(5):
        assert found.is_alive(replace(FOREIGN, data=b"%d" % beat))
        time.sleep(LEASE_S - 1)
    time.sleep(2)
    assert not found.is_alive(replace(FOREIGN, data=b"4"))


def test_a_lease_from_before_a_restart_of_this_host_is_watched_like_a_foreign_one() -> None:
    """Another machine may have our name."""
    time = Timepiece()
    found = watch(time)
    assert found.is_alive(replace(FOREIGN, host=os.uname().nodename))


def test_waiting_ends_when_the_writers_have_or_when_the_time_is_up() -> None:
    backend = MemoryBackend()
    time = Timepiece()
    with writer_lease(backend, purpose="save", now_ns=1):
        names = [lease.name for lease in list_leases(backend)]
        heard: list[int] = []
        alive = watch(time).wait_for(backend, names, wait_s=5.0, notice=lambda leases: heard.append(leases[0].pid))
        assert [lease.pid for lease in alive] == [os.getpid()]
        assert 5 <= time.now_s < 7
        assert set(heard) == {os.getpid()}
    assert watch(time).wait_for(backend, names, wait_s=5.0) == []


def test_the_leases_to_wait_for_are_those_of_the_first_look() -> None:
    backend = MemoryBackend()
    with writer_lease(backend, purpose="save", now_ns=1):
        first = older_leases(backend, "gc/1.condemned")
        assert len(first) == 1
        with writer_lease(backend, purpose="save", now_ns=2):
            assert older_leases(backend, "gc/1.condemned") == first
    backend.delete("gc/1.drain")
    backend.put_if_absent("gc/1.drain", b"torn")
    assert older_leases(backend, "gc/1.condemned") == frozenset()


def test_a_full_disk_only_costs_that_the_next_collection_looks_itself() -> None:
    class Full(MemoryBackend):
        def put_if_absent(self, name: str, data: object) -> bool:
            raise NoSpaceError(name)

    backend = Full()
    with writer_lease(backend, purpose="save", now_ns=1):
        assert len(older_leases(backend, "gc/1.condemned")) == 1


def test_a_working_writer_gives_a_sign_of_life_every_quarter_of_a_lease() -> None:
    backend, time = MemoryBackend(), Timepiece()
    with writer_lease(backend, purpose="save", now_ns=1, lease_s=LEASE_S, monotonic_s=time.monotonic_s) as lease:
        seen = {list_leases(backend)[0].data}
        for _ in range(60):
            time.sleep(2)
            lease.beat()
            seen.add(list_leases(backend)[0].data)
        assert len(seen) == 1 + 120 // 16  # every 15 s, noticed every 2 s
        (found,) = list_leases(backend)
        assert (found.held, found.pid, found.purpose) == (True, os.getpid(), "save")
    assert list_leases(backend) == []


def test_a_claim_that_gives_no_sign_is_outlived_and_one_that_does_is_not() -> None:
    time = Timepiece()
    assert not watch(time).outlives_waiting(lambda: FOREIGN)
    assert time.now_s >= LEASE_S
    beats = iter(range(100))
    assert watch(time).outlives_waiting(lambda: replace(FOREIGN, data=b"%d" % next(beats)))
    here = LeaseInfo("gc/x.collector", True, "gc", "here", 1, 1, boot_id(), claim_text("gc", 1))
    assert watch(time).outlives_waiting(lambda: here)
    assert not watch(time).outlives_waiting(lambda: replace(here, held=False))
    assert not watch(time).outlives_waiting(lambda: None)
