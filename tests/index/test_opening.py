"""The cache lies on a local disk that can be written, or nowhere; opening it never fails."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from castore.index import FallbackIndex, cache_directory_for, open_index
from castore.index.opening import file_system_type, is_network, user_cache_directory
from tests.suites.index_suite import find_one, pack, table

REPOSITORY_ID = bytes(range(16))

MOUNTS = r"""22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
40 27 0:40 / /home rw,relatime shared:1 master:2 - nfs4 server:/home rw,vers=4.2
41 40 0:41 / /home/me/local rw - xfs /dev/sdb1 rw
42 27 0:42 / /mnt/with\040space rw - cifs //server/share rw
43 27 0:43 / /mnt/twice rw - nfs server:/a rw
44 27 0:44 / /mnt/twice rw - btrfs /dev/sdc rw
45 27 0:45 / /mnt/ssh rw - fuse.sshfs me@host: rw
46 27 0:46 / /scratch rw - lustre mgs@tcp:/fs rw
a line that is none
"""


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/data/run", "ext4"),
        ("/home", "nfs4"),
        ("/home/me/run", "nfs4"),
        ("/homestead/run", "ext4"),
        ("/home/me/local/run", "xfs"),
        ("/mnt/with space/run", "cifs"),
        ("/mnt/twice/run", "btrfs"),
        ("/mnt/ssh/../ssh/run", "fuse.sshfs"),
        ("/scratch/me", "lustre"),
    ],
)
def test_the_file_system_of_a_path_is_that_of_the_longest_last_mount(path: str, expected: str) -> None:
    assert file_system_type(Path(path), MOUNTS) == expected


def test_without_a_mount_table_everything_is_local() -> None:
    assert file_system_type(Path("/x"), "") == ""
    assert not is_network("")


def test_a_link_is_followed_to_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/scratch/me")
    assert file_system_type(tmp_path / "link" / "x", MOUNTS) == "lustre"


@pytest.mark.parametrize("name", ["nfs", "nfs4", "cifs", "smb3", "9p", "fuse", "fuse.sshfs", "fuse.s3fs", "lustre"])
def test_network_file_systems(name: str) -> None:
    assert is_network(name)


@pytest.mark.parametrize("name", ["ext4", "xfs", "btrfs", "zfs", "tmpfs", "overlay", "fuseblk", "virtiofs"])
def test_local_file_systems(name: str) -> None:
    assert not is_network(name)


def test_the_users_cache_directory() -> None:
    name = REPOSITORY_ID.hex()
    assert user_cache_directory(REPOSITORY_ID, {"XDG_CACHE_HOME": "/c", "HOME": "/h"}) == Path("/c/castore", name)
    assert user_cache_directory(REPOSITORY_ID, {"XDG_CACHE_HOME": "c", "HOME": "/h"}) == Path("/h/.cache/castore", name)
    assert user_cache_directory(REPOSITORY_ID, {"HOME": "/h"}) == Path("/h/.cache/castore", name)
    assert user_cache_directory(REPOSITORY_ID, {}) is None


class TestChoice:
    @pytest.fixture
    def user(self, tmp_path: Path) -> Path:
        return tmp_path / "user"

    def choose(self, repository: Path, user: Path, *network: Path) -> Path | None:
        mounts = "1 0 0:1 / / rw - ext4 /dev/vda rw\n" + "".join(
            f"9 1 0:9 / {path} rw - nfs4 server:/ rw\n" for path in network
        )
        return cache_directory_for(repository, REPOSITORY_ID, mount_table=mounts, environ={"XDG_CACHE_HOME": str(user)})

    def test_beside_the_repository(self, tmp_path: Path, user: Path) -> None:
        assert self.choose(tmp_path / "repo", user) == tmp_path / "repo" / "cache"
        assert not user.exists()

    def test_in_the_users_cache_when_the_repository_is_on_the_network(self, tmp_path: Path, user: Path) -> None:
        found = self.choose(tmp_path / "repo", user, tmp_path / "repo")
        assert found == user / "castore" / REPOSITORY_ID.hex()
        assert found.is_dir()
        assert not (tmp_path / "repo").exists()

    def test_nowhere_when_both_are_on_the_network(self, tmp_path: Path, user: Path) -> None:
        assert self.choose(tmp_path / "repo", user, tmp_path) is None

    def test_in_the_users_cache_when_a_file_lies_in_the_place(self, tmp_path: Path, user: Path) -> None:
        (tmp_path / "cache").write_bytes(b"")
        assert self.choose(tmp_path, user) == user / "castore" / REPOSITORY_ID.hex()

    def test_in_the_users_cache_when_the_repository_cannot_be_written(
        self, tmp_path: Path, user: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        refused = tmp_path / "repo" / "cache"
        access = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != refused and access(path, mode))
        assert self.choose(tmp_path / "repo", user) == user / "castore" / REPOSITORY_ID.hex()


class TestOpenIndex:
    def test_the_cache_is_kept_between_openings(self, tmp_path: Path) -> None:
        index = open_index(tmp_path, repository_id=REPOSITORY_ID, id_bytes=16)
        index.add({pack(1): table([1])})
        index.close()
        assert (tmp_path / "cache" / "index.lmdb").is_file()
        again = open_index(tmp_path, repository_id=REPOSITORY_ID, id_bytes=16)
        assert again.packs() == {pack(1)}
        again.close()

    def test_memory_takes_its_place_when_no_directory_can_be_used(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "cache").write_bytes(b"a file")
        (tmp_path / "user").write_bytes(b"a file")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
        index = open_index(tmp_path, repository_id=REPOSITORY_ID, id_bytes=16)
        assert isinstance(index, FallbackIndex)
        assert "no cache directory" in str(index.reason)
        index.add({pack(1): table([1])})
        assert [hit.pack_id for hit in find_one(index, 1)] == [pack(1)]

    def test_a_full_disk_costs_the_cache_and_nothing_else(self, full_disk: Path) -> None:
        index = open_index(full_disk, repository_id=REPOSITORY_ID, id_bytes=16)
        assert isinstance(index, FallbackIndex)
        for number in range(40):
            index.add({pack(number): table(range(1000 * number, 1000 * number + 1000))})
        assert index.reason is not None  # LMDB calls it an input/output error
        assert index.packs() == {pack(number) for number in range(40)}
        assert [find_one(index, 1000 * number + 7)[0].pack_id for number in range(40)] == [
            pack(number) for number in range(40)
        ]
        index.close()

    def test_a_disk_that_is_full_from_the_start_is_no_error(self, full_disk: Path) -> None:
        with (full_disk / "ballast").open("wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(4096)):
                pass
        index = open_index(full_disk, repository_id=REPOSITORY_ID, id_bytes=16)
        index.add({pack(1): table([1])})
        assert index.packs() == {pack(1)}
        index.close()


@pytest.fixture
def full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file system of one MiB."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
    (tmp_path / "none").write_bytes(b"")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], check=False, capture_output=True)
    if mounted.returncode:
        pytest.skip("this user may not mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize("module", ["lmdb", "numpy", "torch"])
def test_importing_the_index_does_not_import(module: str) -> None:
    command = f"import sys, castore.index; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0
