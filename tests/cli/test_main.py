"""The group: help, exit codes, errors as text and as JSON, and what a command may import."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from castore import __version__, errors
from castore.cli import exits, main
from castore.cli.exits import Exit, exit_of

PROJECT = Path(__file__).resolve().parent.parent.parent

LISTING_MODULES = """
import sys
from castore.cli.main import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("MODULES", *sys.modules, file=sys.stderr)
"""


def run_process(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "castore", *map(str, arguments)]
    environment = dict(os.environ) | options.pop("env", {})
    return subprocess.run(
        command,
        cwd=options.pop("cwd", PROJECT),
        env=environment,
        text=True,
        check=False,
        capture_output=True,
        **options,
    )


# ---- help ---------------------------------------------------------------------------------------------------


def test_help_names_every_command_once(castore_command) -> None:
    shown = castore_command("-h")
    assert shown.code == 0
    assert shown.out == castore_command("--help").out
    for name in main.COMMANDS:
        assert len(re.findall(rf"^  {name} ", shown.out, re.MULTILINE)) == 1


@pytest.mark.parametrize("name", main.COMMANDS)
def test_each_command_has_help_with_examples_and_the_shared_options(castore_command, name: str) -> None:
    shown = castore_command(name, "-h")
    assert shown.code == 0
    assert f"castore {name}" in shown.out.partition("Examples:")[2]
    assert "--json" in shown.out
    assert "-R, --repo" in shown.out
    assert all(len(line) <= 100 for line in shown.lines)


def test_the_version_is_the_package_s(castore_command) -> None:
    assert castore_command("--version").out == f"castore {__version__}\n"


def test_no_command_shows_the_help_and_is_wrong_usage(castore_command) -> None:
    shown = castore_command()
    assert (shown.code, shown.out) == (2, "")
    assert "Upkeep:" in shown.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["lgo"], "no command is called 'lgo'; did you mean log?"),
        (["frobnicate"], "no command is called 'frobnicate'; there are: init, save,"),
        (["log", "--nope"], "No such option"),
        (["save"], "Missing argument 'FILE'"),
        (["log", "-n", "0"], "Invalid value for '-n'"),
    ],
)
def test_wrong_usage_is_two_lines(castore_command, arguments: list[str], said: str) -> None:
    shown = castore_command(*arguments)
    assert (shown.code, shown.out) == (2, "")
    assert shown.err.startswith("error: ")
    assert said in shown.err
    assert len(shown.err.splitlines()) == 2
    document = castore_command("--json", *arguments)
    assert (document.code, document.err) == (2, "")
    assert said in document.json["error"]["message"]


# ---- errors -------------------------------------------------------------------------------------------------


def conflict() -> errors.ConflictError:
    return errors.ConflictError("main", snapshot_id="a" * 32, expected_id=None, found_id="b" * 32)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.CastoreError("x"), 1),
        (errors.UsageError("x"), 2),
        (errors.InvalidNameError("x"), 2),
        (errors.UnsupportedLeafError("a", "b"), 2),
        (errors.MissingExtraError("x"), 1),
        (errors.ChecksumError("x"), 3),
        (errors.SnapshotGoneError("x"), 3),
        (errors.RepositoryNotFoundError("x"), 4),
        (errors.AmbiguousRefError("x"), 4),
        (errors.PathNotFoundError("x"), 4),
        (errors.NotFoundError("x"), 4),
        (errors.RepositoryExistsError("x"), 5),
        (errors.RefExistsError("x"), 5),
        (conflict(), 5),
        (FileExistsError(errno.EEXIST, "x"), 5),
        (errors.RepositoryAccessError("x"), 6),
        (PermissionError(errno.EACCES, "x"), 6),
        (OSError(errno.EROFS, "x"), 6),
        (errors.NoSpaceError("x"), 7),
        (OSError(errno.ENOSPC, "x"), 7),
        (OSError(errno.EFBIG, "x"), 7),
        (OSError(errno.EIO, "x"), 1),
        (errors.UnsupportedFormatError("x"), 8),
        (errors.PickleRefusedError("x"), 1),
        (RuntimeError("x"), 1),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_kind_of_error_has_its_exit_code(error: BaseException, code: int) -> None:
    assert exit_of(error) == code
    fields = json.loads(exits.error_document(error))["error"]
    assert (fields["type"], fields["exit_code"]) == (type(error).__name__, code)


def test_a_conflict_document_says_what_to_adopt() -> None:
    fields = json.loads(exits.error_document(conflict()))["error"]
    assert (fields["snapshot"], fields["expected"], fields["found"]) == ("a" * 32, None, "b" * 32)


def test_the_documentation_has_the_same_table_of_exit_codes() -> None:
    assert exits.__doc__ is not None
    rows = [line.strip() for line in exits.__doc__.splitlines() if re.match(r"    \d+ ", line)]
    assert [int(row.split()[0]) for row in rows] == [int(code) for code in Exit]
    text = (PROJECT / "docs" / "CLI.md").read_text()
    for row in rows:
        code, _, meaning = row.partition(" ")
        assert f"| {code} | {meaning.strip()} |" in text


def test_the_documentation_shows_every_command_and_option(castore_command) -> None:
    text = (PROJECT / "docs" / "CLI.md").read_text()
    for name in main.COMMANDS:
        assert f"## castore {name}" in text
        options = re.findall(r"--[a-z][a-z-]+", castore_command(name, "-h").out.partition("Examples:")[0])
        section = text.partition(f"## castore {name}")[2].partition("\n## ")[0]
        for option in set(options) - {"--repo", "--json", "--help"}:
            assert option in section, (name, option)


def test_an_error_is_one_line_on_stderr_or_one_document_on_stdout(run) -> None:
    plain = run("log", "mian")
    assert (plain.code, plain.out) == (4, "")
    assert plain.err == "error: nothing is called 'mian'; did you mean main?\n"
    document = run("log", "mian", "--json")
    assert (document.code, document.err) == (4, "")
    assert document.json["error"]["near"] == ["main"]
    assert document.json["error"]["type"] == "UnknownRefError"


def test_an_unforeseen_error_is_one_line_and_a_traceback_only_on_request(run, monkeypatch) -> None:
    monkeypatch.setattr("castore.api.Repository.usage", lambda *_, **__: 1 / 0)
    shown = run("du")
    assert shown.code == 1
    assert shown.err == "error: unexpected ZeroDivisionError: division by zero; CASTORE_TRACEBACK=1 shows where\n"
    monkeypatch.setenv("CASTORE_TRACEBACK", "1")
    assert "Traceback (most recent call last)" in run("du").err


def test_ctrl_c_says_so_and_exits_with_130(run, monkeypatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("castore.api.Repository.usage", interrupted)
    assert run("du").code == 130
    assert run("du").err.strip() == "error: interrupted"
    assert run("du", "--json").json["error"]["exit_code"] == 130


def test_a_message_cannot_steer_the_terminal(castore_command) -> None:
    shown = castore_command("-R", "/nowhere/\x1b[2J", "log")
    assert "\x1b" not in shown.err
    assert r"\x1b[2J" in shown.err


# ---- the repository -----------------------------------------------------------------------------------------


def test_the_repository_comes_from_the_option_the_variable_or_the_current_directory(
    castore_command, store: Path, tmp_path: Path, monkeypatch
) -> None:
    expected = castore_command("-R", store, "branch").out
    assert castore_command("branch", "-R", store).out == expected
    monkeypatch.setenv("CASTORE_REPO", str(store))
    assert castore_command("branch").out == expected
    assert castore_command("branch", "-R", tmp_path / "other").code == 4
    monkeypatch.delenv("CASTORE_REPO")
    monkeypatch.chdir(store)
    assert castore_command("branch").out == expected
    monkeypatch.chdir(tmp_path)
    shown = castore_command("branch")
    assert shown.code == 4
    assert "use -R DIR, set CASTORE_REPO" in shown.err


def test_json_may_stand_before_or_after_the_command(run) -> None:
    assert run("--json", "tag").json == run("tag", "--json").json


# ---- as a process -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["log"],
        ["log", "--all", "--json"],
        ["show"],
        ["branch"],
        ["tag"],
        ["branch", "new"],
        ["verify"],
        ["du"],
        ["reindex"],
        ["diff", "main~1", "main", "--no-values"],
        ["dump", "config"],
        ["init", "fresh"],
    ],
    ids=" ".join,
)
def test_commands_that_need_no_tensors_import_neither_torch_nor_numpy_nor_rich(
    store: Path, tmp_path: Path, arguments: list[str]
) -> None:
    environment = dict(os.environ) | {"CASTORE_REPO": str(store), "PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-c", LISTING_MODULES, *arguments]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    modules = set(result.stderr.splitlines()[-1].split()[1:])
    assert modules & {"torch", "numpy", "rich", "safetensors"} == set()


@pytest.mark.parametrize("arguments", [["--version"], ["--help"]], ids=" ".join)
def test_help_loads_no_command(arguments: list[str]) -> None:
    command = [sys.executable, "-c", LISTING_MODULES, *arguments]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    loaded = {name for name in result.stderr.splitlines()[-1].split() if name.startswith("castore")}
    assert loaded == {"castore", "castore.cli", "castore.cli.main", "castore.cli.command"}


@pytest.mark.parametrize("arguments", [["log"], ["-h"], ["log", "nothing", "--json"]], ids=" ".join)
def test_a_reader_that_goes_away_is_no_error_message(store: Path, arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "castore", "-R", str(store), *arguments]
    result = subprocess.run(command, cwd=PROJECT, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert result.stderr == ""
    assert result.returncode in (Exit.PIPE_CLOSED, Exit.NOT_FOUND)


def test_interrupting_a_process_exits_with_130(store: Path, tmp_path: Path) -> None:
    code = (
        # A shell that starts the tests in the background has them ignore the signal.
        "import signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from castore.api import Repository\nfrom castore.cli.main import main\n"
        "def usage(*_, **__):\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "Repository.usage = usage\nmain()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "-R", str(store), "du"],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == Exit.INTERRUPTED
    assert stderr.strip() == "error: interrupted"


def test_exit_codes_reach_the_shell(store: Path) -> None:
    assert run_process("-R", store, "log").returncode == 0
    missing = run_process("-R", store, "log", "nothing")
    assert missing.returncode == Exit.NOT_FOUND
    assert missing.stderr.startswith("error: nothing is called 'nothing'")
    assert "Traceback" not in missing.stderr


def test_text_that_the_terminal_s_encoding_lacks_is_escaped(store: Path) -> None:
    import castore

    with castore.open(store) as repo:
        repo.save({"x": 1}, message="größer")
    result = run_process("-R", store, "log", "-n", "1", env={"PYTHONIOENCODING": "ascii", "LC_ALL": "C"})
    assert result.returncode == 0, result.stderr
    assert r"gr\xf6\xdfer" in result.stdout
