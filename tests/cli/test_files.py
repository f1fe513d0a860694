"""Tensor files outside of a repository: hostile ones, damaged ones, and files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import pytest

from castore.cli import files
from castore.cli.files import atomic_file, read_file, write_pt, write_safetensors
from castore.errors import ChecksumError, FormatError, NotFoundError, PickleRefusedError, UsageError

torch = pytest.importorskip("torch")


class Payload:
    """Unpickling it leaves a mark."""

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (os.environ["MARK"],))


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)


@pytest.mark.parametrize("archive", [True, False], ids=["zip", "legacy"])
def test_code_in_a_pt_file_does_not_run(tmp_path: Path, monkeypatch, archive: bool) -> None:
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    torch.save({"x": Payload()}, tmp_path / "evil.pt", _use_new_zipfile_serialization=archive)
    with pytest.raises(PickleRefusedError, match=r"posix\.mkdir.*--allow-pickle"):
        read_file(tmp_path / "evil.pt", allow_pickle=False)
    assert not (tmp_path / "mark").exists()
    read_file(tmp_path / "evil.pt", allow_pickle=True)
    assert (tmp_path / "mark").exists()


def test_a_plain_pickle_does_not_run_either(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    (tmp_path / "evil.bin").write_bytes(pickle.dumps(Payload()))
    with pytest.raises((PickleRefusedError, FormatError)):
        read_file(tmp_path / "evil.bin", allow_pickle=False)
    assert not (tmp_path / "mark").exists()


def test_a_whole_module_is_refused_by_its_class_name(tmp_path: Path) -> None:
    torch.save(Model(), tmp_path / "model.pt")
    with pytest.raises(PickleRefusedError, match="Model"):
        read_file(tmp_path / "model.pt", allow_pickle=False)


@pytest.mark.parametrize("archive", [True, False], ids=["zip", "legacy"])
def test_both_formats_of_torch_are_read(tmp_path: Path, archive: bool) -> None:
    state = {"a": torch.arange(5), "n": 1}
    torch.save(state, tmp_path / "s.pt", _use_new_zipfile_serialization=archive)
    contents = read_file(tmp_path / "s.pt", allow_pickle=False)
    assert torch.equal(contents.state["a"], state["a"])
    assert contents.metadata == {}


def test_a_flipped_byte_is_found_although_torch_does_not_look(tmp_path: Path) -> None:
    path = tmp_path / "s.pt"
    torch.save({"a": torch.zeros(10_000)}, path)
    data = bytearray(path.read_bytes())
    data[20_000] ^= 1
    path.write_bytes(data)
    assert torch.load(path, weights_only=True)["a"].any()
    with pytest.raises(ChecksumError, match=r"s/data/0: expected CRC"):
        read_file(path, allow_pickle=False)


def test_a_file_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(1000)}, tmp_path / "s.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_file(tmp_path / "s.pt", allow_pickle=False).state["a"].sum() == 1000


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".safetensors"])
def test_any_cut_of_a_file_is_one_typed_error(tmp_path: Path, suffix: str) -> None:
    whole, cut = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    if suffix == ".safetensors":
        write_safetensors(whole, {"a": torch.ones(100)}, {}, force=False)
    else:
        torch.save({"a": torch.ones(100)}, whole, _use_new_zipfile_serialization=suffix == ".pt")
    data = whole.read_bytes()
    for length in [*range(0, len(data), max(1, len(data) // 40)), len(data) - 1]:
        cut.write_bytes(data[:length])
        with pytest.raises((FormatError, PickleRefusedError)) as caught:
            read_file(cut, allow_pickle=False)
        assert len(str(caught.value)) < 400
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"hello\n" * 100, b"\x80\x04N.", b"PK\x03\x04" + b"\0" * 100, b"\x7fELF" * 50])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_foreign_file_is_a_format_error(tmp_path: Path, suffix: str, data: bytes) -> None:
    path = tmp_path / f"foreign{suffix}"
    path.write_bytes(data)
    with pytest.raises(FormatError, match="foreign"):
        read_file(path, allow_pickle=False)


def test_what_is_no_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "folder.pt").mkdir()
    os.mkfifo(tmp_path / "fifo.pt")
    with pytest.raises(NotFoundError):
        read_file(tmp_path / "absent.pt", allow_pickle=False)
    for name in ("folder.pt", "fifo.pt"):
        with pytest.raises(UsageError, match="is not a file"):
            read_file(tmp_path / name, allow_pickle=False)
    with pytest.raises(UsageError, match=r"unknown kind of file '\.npz'"):
        read_file(tmp_path / "x.npz", allow_pickle=False)


def test_tensors_of_a_safetensors_file_do_not_write_to_it(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    write_safetensors(path, {"a": torch.ones(4)}, {}, force=False)
    before = path.read_bytes()
    read_file(path, allow_pickle=False).state["a"].zero_()
    assert path.read_bytes() == before


# ---- writing ------------------------------------------------------------------------------------------------


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def write_half() -> None:
        with atomic_file(tmp_path / "x", force=False) as file:
            file.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert list(tmp_path.iterdir()) == []
    with atomic_file(tmp_path / "x", force=False) as file:
        file.write(b"whole")
        assert not (tmp_path / "x").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_name_that_was_taken_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    def write_late() -> None:
        with atomic_file(tmp_path / "x", force=False) as file:
            file.write(b"mine")
            (tmp_path / "x").write_text("theirs")

    with pytest.raises(FileExistsError):
        write_late()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "theirs"


def test_a_file_system_without_links_is_written_to(tmp_path: Path, monkeypatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(files.os, "link", no_links)
    with atomic_file(tmp_path / "x", force=False) as file:
        file.write(b"whole")
    assert (tmp_path / "x").read_bytes() == b"whole"


@pytest.mark.parametrize(
    "write", [write_pt, lambda path, state, force: write_safetensors(path, state, {}, force=force)]
)
def test_a_full_disk_is_that_error_and_leaves_nothing(tmp_path: Path, monkeypatch, write) -> None:
    class FullFile(files._FileThatRemembers):
        def write(self, data: object) -> int:
            self.failure = OSError(errno.ENOSPC, "No space left on device")
            raise self.failure

    monkeypatch.setattr(files, "_FileThatRemembers", FullFile)
    with pytest.raises(OSError, match="No space left") as caught:
        write(tmp_path / "x.pt", {"a": torch.ones(1000)}, force=False)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "x.pt"))
    assert list(tmp_path.iterdir()) == []


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_file(tmp_path / "x", force=False):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640
