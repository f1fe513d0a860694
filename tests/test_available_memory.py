"""Memory that a process may count on, read from trees like those that Linux shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from castore.available_memory import available_bytes

MIB = 1024 * 1024


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


def machine(root: Path, *, available_mib: int = 1000, groups: str = "0::/\n") -> tuple[Path, Path]:
    proc = root / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable:  {available_mib * 1024} kB\nSwapFree: 5 kB\n")
    (proc / "self" / "cgroup").write_text(groups)
    return proc, root / "cgroup"


def v2(directory: Path, *, limit: str, used_mib: int, cached_mib: int = 0) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "memory.max").write_text(f"{limit}\n")
    (directory / "memory.current").write_text(f"{used_mib * MIB}\n")
    (directory / "memory.stat").write_text(f"anon 1\ninactive_file {cached_mib * MIB}\nactive_file 0\n")


def test_without_groups_it_is_what_the_system_says(tmp_path: Path) -> None:
    assert available_bytes(*machine(tmp_path)) == 1000 * MIB


@pytest.mark.parametrize("text", ["MemTotal: 9 kB\n", "MemAvailable: lots\n", ""])
def test_a_system_that_does_not_say_has_none(tmp_path: Path, text: str) -> None:
    proc, groups = machine(tmp_path)
    (proc / "meminfo").write_text(text)
    assert available_bytes(proc, groups) == 0
    (proc / "meminfo").unlink()
    (proc / "self" / "cgroup").unlink()
    assert available_bytes(proc, groups) == 0


def test_every_group_above_the_process_counts(tmp_path: Path) -> None:
    proc, root = machine(tmp_path, groups="0::/slurm/job_7/step_0\n")
    v2(root / "slurm" / "job_7" / "step_0", limit="max", used_mib=90)
    v2(root / "slurm" / "job_7", limit=str(400 * MIB), used_mib=100)
    v2(root / "slurm", limit=str(900 * MIB), used_mib=300)
    assert available_bytes(proc, root) == 300 * MIB
    v2(root / "slurm", limit=str(900 * MIB), used_mib=800)
    assert available_bytes(proc, root) == 100 * MIB
    v2(root / "slurm", limit=str(900 * MIB), used_mib=1000)
    assert available_bytes(proc, root) == 0


def test_a_container_finds_its_limit_at_the_root(tmp_path: Path) -> None:
    proc, root = machine(tmp_path, groups="0::/../../docker/abc\n")
    v2(root, limit=str(200 * MIB), used_mib=50)
    assert available_bytes(proc, root) == 150 * MIB


def test_pages_of_files_do_not_count_as_used(tmp_path: Path) -> None:
    """Packs that were just written would otherwise leave no budget for bases."""
    proc, root = machine(tmp_path)
    v2(root, limit=str(500 * MIB), used_mib=490, cached_mib=400)
    assert available_bytes(proc, root) == 410 * MIB


def test_groups_of_the_first_version_are_read_too(tmp_path: Path) -> None:
    proc, root = machine(tmp_path, groups="9:name=systemd:/\n4:cpu,memory:/job/7\n0::/\n")
    directory = root / "memory" / "job" / "7"
    directory.mkdir(parents=True)
    (directory / "memory.limit_in_bytes").write_text(f"{300 * MIB}\n")
    (directory / "memory.usage_in_bytes").write_text(f"{250 * MIB}\n")
    (directory / "memory.stat").write_text(f"cache 5\ntotal_inactive_file {10 * MIB}\ntotal_active_file {20 * MIB}\n")
    assert available_bytes(proc, root) == 80 * MIB


def test_ranks_of_one_machine_share_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert available_bytes(*machine(tmp_path)) == 125 * MIB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "many")
    assert available_bytes(tmp_path / "proc", tmp_path / "cgroup") == 1000 * MIB


def test_this_machine_has_some() -> None:
    assert available_bytes() > 0
