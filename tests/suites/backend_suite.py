"""The conformance suite of castore.backend.base.Backend: subclass it with a fixture `backend`."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from castore.backend.base import Backend, FileInfo, PackSink
from castore.errors import FormatError, LeaseError, NotFoundError, StorageError, UsageError

BAD_NAMES = (
    "",
    "/",
    "/etc/passwd",
    "..",
    "../x",
    "packs/../../x",
    "packs/./x",
    "packs//x",
    "packs/",
    ".hidden",
    ".lock",
    ".tmp-1",
    "packs/.tmp-1",
    "a\0b",
    "\ud800",
    "x" * 256,
)


def names(backend: Backend, prefix: str = "") -> list[str]:
    return [info.name for info in backend.list(prefix)]


class BackendSuite:
    """Reads as the contract does, method by method."""

    # ---- put_if_absent, read, stat -------------------------------------------------------------------------

    @pytest.mark.parametrize("data", [b"", b"x", b"0123456789" * 100_000])
    def test_what_was_put_is_read(self, backend: Backend, data: bytes) -> None:
        assert backend.put_if_absent("packs/ab/x.pack", data) is True
        assert backend.read("packs/ab/x.pack", max_bytes=len(data)) == data

    def test_a_name_is_put_once(self, backend: Backend) -> None:
        assert backend.put_if_absent("snapshots/a", b"first") is True
        assert backend.put_if_absent("snapshots/a", b"second") is False
        assert backend.read("snapshots/a", max_bytes=100) == b"first"

    def test_any_contiguous_buffer_is_taken(self, backend: Backend) -> None:
        grid = memoryview(bytearray(range(24))).cast("B", (4, 6))
        for name, data in (("a", bytearray(b"abc")), ("b", memoryview(b"abcdef")[1:3]), ("c", grid)):
            assert backend.put_if_absent(name, data) is True
        assert backend.read("a", max_bytes=9) == b"abc"
        assert backend.read("b", max_bytes=9) == b"bc"
        assert backend.read("c", max_bytes=24) == bytes(range(24))

    def test_put_copies_what_it_was_given(self, backend: Backend) -> None:
        data = bytearray(b"abc")
        backend.put_if_absent("a", data)
        data[0] = 0
        assert backend.read("a", max_bytes=9) == b"abc"

    def test_of_many_writers_of_a_name_one_wins(self, backend: Backend) -> None:
        start = threading.Barrier(8)

        def put(number: int) -> bool:
            start.wait()
            return backend.put_if_absent("refs/one", b"%d" % number)

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(put, range(8)))
        assert won.count(True) == 1
        assert backend.read("refs/one", max_bytes=9) == b"%d" % won.index(True)

    def test_a_file_larger_than_asked_for_is_refused(self, backend: Backend) -> None:
        backend.put_if_absent("config", b"x" * 11)
        with pytest.raises(FormatError, match=r"config: expected at most 10 bytes, found 11"):
            backend.read("config", max_bytes=10)

    def test_what_is_absent_is_a_file_not_found_error_too(self, backend: Backend) -> None:
        backend.put_if_absent("packs/x", b"")
        for name in ("config", "nowhere/config", "packs", "packs/x/y"):
            with pytest.raises(NotFoundError, match=name):
                backend.read(name, max_bytes=1)
            with pytest.raises(FileNotFoundError, match=name):
                backend.open_reader(name)

    def test_stat_tells_the_size_or_none(self, backend: Backend) -> None:
        backend.put_if_absent("packs/x", b"abc")
        info = backend.stat("packs/x")
        assert info is not None
        assert info.size_bytes == 3
        assert info.modified_ns > 0
        for name in ("packs/y", "packs", "packs/x/y", "nowhere/x"):
            assert backend.stat(name) is None

    @pytest.mark.parametrize("name", BAD_NAMES)
    def test_no_method_takes_a_name_that_is_none(self, backend: Backend, name: str) -> None:
        for call in (
            lambda: backend.put_if_absent(name, b""),
            lambda: backend.create_stream(name),
            lambda: backend.read(name, max_bytes=1),
            lambda: backend.open_reader(name),
            lambda: backend.stat(name),
            lambda: backend.compare_and_swap(name, expected=None, new=b""),
            lambda: backend.claim(name, b""),
            lambda: backend.move(name, "free"),
            lambda: backend.move("free", name),
            lambda: backend.local_path(name),
        ):
            with pytest.raises(UsageError, match="no name for a file"):
                call()
        assert names(backend) == []

    # ---- create_stream -------------------------------------------------------------------------------------

    def test_a_stream_is_seen_whole_or_not_at_all(self, backend: Backend) -> None:
        sink = backend.create_stream("packs/ab/x.pack")
        sink.write(b"abc", b"", bytearray(b"de"))
        sink.flush_hint()
        sink.write(memoryview(b"xfx")[1:2])
        sink.write()
        assert backend.stat("packs/ab/x.pack") is None
        assert names(backend) == []
        sink.commit()
        assert backend.read("packs/ab/x.pack", max_bytes=100) == b"abcdef"
        assert names(backend) == ["packs/ab/x.pack"]

    def test_a_stream_takes_more_buffers_than_the_system(self, backend: Backend) -> None:
        parts = [bytes([number % 251]) * (number % 7) for number in range(5000)]
        sink = backend.create_stream("x")
        sink.write(*parts)
        sink.commit()
        assert backend.read("x", max_bytes=100_000) == b"".join(parts)

    def test_a_buffer_may_be_reused_after_write(self, backend: Backend) -> None:
        sink, buffer = backend.create_stream("x"), bytearray(3)
        for letter in b"abc":
            buffer[:] = bytes([letter]) * 3
            sink.write(buffer)
        sink.commit()
        assert backend.read("x", max_bytes=100) == b"aaabbbccc"

    def test_an_empty_stream_makes_an_empty_file(self, backend: Backend) -> None:
        backend.create_stream("x").commit()
        assert backend.read("x", max_bytes=0) == b""

    def test_an_aborted_stream_leaves_nothing(self, backend: Backend) -> None:
        sink = backend.create_stream("x")
        sink.write(b"abc")
        sink.abort()
        sink.abort()
        assert_closed(sink)
        assert names(backend) == []
        assert list(backend.temporaries(modified_before_ns=1 << 62)) == []

    def test_abort_after_commit_does_nothing(self, backend: Backend) -> None:
        sink = backend.create_stream("x")
        sink.write(b"abc")
        sink.commit()
        sink.abort()
        assert_closed(sink)
        assert backend.read("x", max_bytes=3) == b"abc"

    def test_a_stream_never_replaces_a_file(self, backend: Backend) -> None:
        sink = backend.create_stream("x")
        sink.write(b"second")
        backend.put_if_absent("x", b"first")
        with pytest.raises(StorageError, match="x: cannot commit: the name is taken"):
            sink.commit()
        assert_closed(sink)
        assert backend.read("x", max_bytes=9) == b"first"
        assert list(backend.temporaries(modified_before_ns=1 << 62)) == []

    # ---- open_reader ---------------------------------------------------------------------------------------

    def test_a_reader_fills_the_callers_memory(self, backend: Backend) -> None:
        backend.put_if_absent("x", bytes(range(100)))
        reader = backend.open_reader("x")
        memory = bytearray(20)
        reader.read_into(10, memoryview(memory)[5:15])
        assert memory == bytes(5) + bytes(range(10, 20)) + bytes(5)
        grid = memoryview(bytearray(24)).cast("B", (4, 6))
        reader.read_into(76, grid)
        assert grid.tobytes() == bytes(range(76, 100))
        assert reader.size_bytes == 100
        assert reader.read(0, 100) == bytes(range(100))
        assert reader.read(98, 2) == b"\x62\x63"
        assert reader.read(100, 0) == b""
        reader.close()

    @pytest.mark.parametrize(("offset", "size", "found"), [(7, 4, 3), (10, 1, 0), (2**63, 1, 0), (0, 2**62, 10)])
    def test_a_range_beyond_the_end_is_damage(self, backend: Backend, offset: int, size: int, found: int) -> None:
        backend.put_if_absent("packs/x", b"0123456789")
        reader = backend.open_reader("packs/x")
        message = f"packs/x: read at offset {offset}: expected {size} bytes, found {found}"
        with pytest.raises(FormatError, match=message):
            reader.read(offset, size)
        if size < 100:
            with pytest.raises(FormatError, match=message):
                reader.read_into(offset, memoryview(bytearray(size)))
        reader.close()

    def test_a_reader_outlives_the_name(self, backend: Backend) -> None:
        backend.put_if_absent("x", b"abc")
        reader = backend.open_reader("x")
        backend.delete("x")
        assert reader.read(0, 3) == b"abc"
        reader.close()
        reader.close()
        with pytest.raises(StorageError, match="the reader is closed"):
            reader.read(0, 1)

    def test_threads_share_a_reader(self, backend: Backend) -> None:
        data = b"".join(number.to_bytes(4, "little") for number in range(10_000))
        backend.put_if_absent("x", data)
        reader = backend.open_reader("x")

        def read(offset: int) -> bool:
            memory = bytearray(400)
            reader.read_into(offset, memoryview(memory))
            return bytes(memory) == data[offset : offset + 400]

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(read, range(0, 39_600, 100)))
        reader.close()

    # ---- list, delete --------------------------------------------------------------------------------------

    def test_a_listing_is_recursive_and_sorted(self, backend: Backend) -> None:
        for name in ("packs/b/2", "packs/a/1", "packs-x", "packs/b.c", "refs/main", "config"):
            backend.put_if_absent(name, name.encode())
        assert names(backend) == ["config", "packs-x", "packs/a/1", "packs/b.c", "packs/b/2", "refs/main"]
        assert names(backend, "packs/") == ["packs/a/1", "packs/b.c", "packs/b/2"]
        assert names(backend, "packs/b") == ["packs/b.c", "packs/b/2"]
        assert names(backend, "packs/b/") == ["packs/b/2"]
        assert names(backend, "pa") == ["packs-x", "packs/a/1", "packs/b.c", "packs/b/2"]
        assert names(backend, "nowhere/") == names(backend, "nowhere/at/all") == []
        assert [info.size_bytes for info in backend.list("packs/a/")] == [9]
        assert list(backend.list("config")) == [backend.stat("config")]
        assert all(isinstance(info, FileInfo) for info in backend.list(""))

    @pytest.mark.parametrize("prefix", ["/", "..", "../", "packs/../", "packs//", "/etc/"])
    def test_a_prefix_does_not_escape(self, backend: Backend, prefix: str) -> None:
        with pytest.raises(UsageError, match="is no"):
            backend.list(prefix)

    def test_a_listing_stands_while_files_come_and_go(self, backend: Backend) -> None:
        for number in range(10):
            backend.put_if_absent(f"x/{number}", b"")
        listing = backend.list("x/")
        for number in range(10):
            backend.delete(f"x/{number}")
        assert len(list(listing)) == 10
        assert names(backend) == []

    def test_a_file_is_deleted_once(self, backend: Backend) -> None:
        backend.put_if_absent("x/y", b"")
        assert backend.delete("x/y") is True
        assert backend.delete("x/y") is False
        assert backend.delete("nowhere/y") is False
        assert backend.put_if_absent("x/y", b"again") is True

    def test_a_file_moves_whole_and_replaces_nothing(self, backend: Backend) -> None:
        backend.put_if_absent("packs/ab/x", b"content")
        assert backend.move("packs/ab/x", "quarantine/1/packs/ab/x") is True
        assert backend.move("packs/ab/x", "quarantine/2/x") is False
        assert names(backend) == ["quarantine/1/packs/ab/x"]
        assert backend.read("quarantine/1/packs/ab/x", max_bytes=99) == b"content"
        backend.put_if_absent("other", b"other")
        with pytest.raises(StorageError):
            backend.move("other", "quarantine/1/packs/ab/x")
        assert names(backend) == ["other", "quarantine/1/packs/ab/x"]
        assert list(backend.temporaries(modified_before_ns=1 << 62)) == []

    # ---- compare_and_swap ----------------------------------------------------------------------------------

    def test_a_swap_needs_the_expected_content(self, backend: Backend) -> None:
        swap = backend.compare_and_swap
        assert swap("refs/main", expected=b"a", new=b"b") is False
        assert swap("refs/main", expected=None, new=b"a") is True
        assert swap("refs/main", expected=None, new=b"b") is False
        assert swap("refs/main", expected=b"", new=b"b") is False
        assert swap("refs/main", expected=b"ab", new=b"b") is False
        assert backend.read("refs/main", max_bytes=9) == b"a"
        assert swap("refs/main", expected=b"a", new=b"longer") is True
        assert backend.read("refs/main", max_bytes=9) == b"longer"
        assert swap("refs/main", expected=b"a", new=None) is False
        assert swap("refs/main", expected=b"longer", new=None) is True
        assert backend.stat("refs/main") is None
        assert swap("refs/main", expected=None, new=None) is True
        assert swap("refs/main", expected=None, new=b"") is True
        assert swap("refs/main", expected=b"", new=b"x") is True
        assert names(backend) == ["refs/main"]
        assert list(backend.temporaries(modified_before_ns=1 << 62)) == []

    def test_no_swap_is_lost_between_threads(self, backend: Backend) -> None:
        backend.put_if_absent("counter", b"0")

        def count(_: int) -> None:
            for _ in range(5):
                while True:
                    old = backend.read("counter", max_bytes=99)
                    if backend.compare_and_swap("counter", expected=old, new=b"%d" % (int(old) + 1)):
                        break

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(count, range(4)))
        assert backend.read("counter", max_bytes=99) == b"20"

    # ---- claim ---------------------------------------------------------------------------------------------

    def test_a_claim_is_held_until_released(self, backend: Backend) -> None:
        claim = backend.claim("leases/a.lease", b"who")
        assert claim.name == "leases/a.lease"
        for _ in range(2):  # looking does not take it
            assert [(c.name, c.data, c.held) for c in backend.claims("leases/")] == [("leases/a.lease", b"who", True)]
        claim.release()
        claim.release()
        assert backend.claims("leases/") == []
        assert names(backend) == []

    def test_a_claimed_name_is_not_claimed_again(self, backend: Backend) -> None:
        claim = backend.claim("leases/a", b"first")
        with pytest.raises(LeaseError, match="leases/a: already claimed"):
            backend.claim("leases/a", b"second")
        assert [c.data for c in backend.claims("leases/")] == [b"first"]
        assert list(backend.temporaries(modified_before_ns=1 << 62)) == []
        claim.release()
        backend.claim("leases/a", b"third").release()

    def test_claims_are_listed_by_name_with_dead_ones(self, backend: Backend) -> None:
        backend.put_if_absent("leases/b", b"dead")
        held = [backend.claim(name, name.encode()) for name in ("leases/c", "leases/a", "other/a")]
        assert [(c.name, c.held) for c in backend.claims("leases/")] == [
            ("leases/a", True),
            ("leases/b", False),
            ("leases/c", True),
        ]
        assert backend.claims("nowhere/") == []
        for claim in held:
            claim.release()

    def test_a_released_claim_leaves_a_successor_alone(self, backend: Backend) -> None:
        first = backend.claim("leases/a", b"1")
        first.release()
        second = backend.claim("leases/a", b"2")
        first.release()
        assert [c.data for c in backend.claims("leases/")] == [b"2"]
        second.release()

    # ---- the rest ------------------------------------------------------------------------------------------

    def test_errors_name_the_place(self, backend: Backend) -> None:
        assert backend.location
        with pytest.raises(NotFoundError) as caught:
            backend.read("config", max_bytes=1)
        assert backend.location in str(caught.value)

    def test_free_bytes_is_a_number_or_none(self, backend: Backend) -> None:
        free = backend.free_bytes()
        assert free is None or free >= 0

    def test_a_local_path_has_the_content(self, backend: Backend) -> None:
        backend.put_if_absent("packs/x", b"abc")
        path = backend.local_path("packs/x")
        assert path is None or path.read_bytes() == b"abc"


def assert_closed(sink: PackSink) -> None:
    with pytest.raises(StorageError, match="the stream is closed"):
        sink.write(b"x")
    with pytest.raises(StorageError, match="the stream is closed"):
        sink.commit()
