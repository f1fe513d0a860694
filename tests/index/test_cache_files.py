"""Locks end with their holders and are waited for only so long; nothing that lies around is followed or deleted."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from castore.errors import DamageError, StorageError
from castore.index import cache_files
from castore.index.cache_files import clear_away, open_regular, take_lock
from tests.suites.forked import in_child, running_child

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # 3.12: our children are tame


@pytest.fixture(autouse=True)
def short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_files, "LOCK_WAIT_S", 0.1)


def test_an_exclusive_lock_keeps_everybody_out(tmp_path: Path) -> None:
    held = take_lock(tmp_path / "lock", shared=False)
    for shared in (False, True):
        with pytest.raises(StorageError, match="another process has held it"):
            take_lock(tmp_path / "lock", shared=shared)
    held.close()
    take_lock(tmp_path / "lock", shared=False).close()


def test_shared_locks_keep_only_writers_out(tmp_path: Path) -> None:
    first, second = take_lock(tmp_path / "lock", shared=True), take_lock(tmp_path / "lock", shared=True)
    first.close()
    with pytest.raises(StorageError):
        take_lock(tmp_path / "lock", shared=False)
    second.close()
    take_lock(tmp_path / "lock", shared=False).close()


def test_a_killed_holder_frees_its_lock(tmp_path: Path) -> None:
    with running_child(lambda say: (take_lock(tmp_path / "lock", shared=False), say(b"!"), time.sleep(100))) as (
        _,
        heard,
    ):
        assert os.read(heard, 1) == b"!"
        with pytest.raises(StorageError):
            take_lock(tmp_path / "lock", shared=True)
    take_lock(tmp_path / "lock", shared=False).close()


def test_a_forked_child_does_not_keep_its_parents_lock(tmp_path: Path) -> None:
    held = take_lock(tmp_path / "lock", shared=False)
    with running_child(lambda say: (say(b"!"), time.sleep(100))) as (_, heard):
        assert os.read(heard, 1) == b"!"
        held.close()
        in_child(lambda: take_lock(tmp_path / "lock", shared=False).close())


def test_a_deleted_lock_file_is_not_waited_for(tmp_path: Path) -> None:
    held = take_lock(tmp_path / "cache" / "lock", shared=False)
    shutil.rmtree(tmp_path / "cache")
    take_lock(tmp_path / "cache" / "lock", shared=False).close()
    held.close()


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "target").write_bytes(b"precious")
    for name in ("directory", "pipe", "link"):
        for flags in (os.O_RDONLY, os.O_RDWR | os.O_CREAT):
            with pytest.raises(DamageError, match="not a regular file"):
                open_regular(tmp_path / name, flags)
    os.close(open_regular(tmp_path / "target", os.O_RDWR))
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "absent", os.O_RDONLY)


def test_clearing_away_deletes_files_and_links_and_moves_directories(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    link, directory = tmp_path / "link", tmp_path / "directory"
    link.symlink_to(target)
    directory.mkdir()
    (directory / "file").write_bytes(b"precious")
    for path in (link, directory, tmp_path / "absent"):
        clear_away(path)
        assert not os.path.lexists(path)
    assert target.read_bytes() == b"precious"
    (moved,) = tmp_path.glob("directory.*.foreign")
    assert (moved / "file").read_bytes() == b"precious"
