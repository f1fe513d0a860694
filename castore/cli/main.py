"""The `castore` command: the group, its help, and what becomes of errors.

An error is a few lines on stderr, or with `--json` one document {"error": …} on stdout, where a script reads
the result too. CASTORE_TRACEBACK=1 adds the traceback. The exit codes are in exits.py.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, NoReturn

import click

from castore import __version__
from castore.cli.command import App, shared_options

SECTIONS: dict[str, dict[str, tuple[str, str]]] = {
    "Make and save": {
        "init": ("create", "Create a repository."),
        "save": ("create", "Save a .pt or .safetensors file as a new snapshot."),
        "export": ("create", "Write a snapshot, or a part of it, to a file."),
    },
    "History": {
        "log": ("log", "List snapshots, newest first."),
        "show": ("contents", "Show a snapshot, or one leaf of it."),
        "diff": ("contents", "Say what changed between two snapshots."),
        "branch": ("refs", "List, make, move or delete branches."),
        "tag": ("refs", "List, make or delete tags."),
    },
    "Other repositories": {
        "push": ("transfer", "Send snapshots to another repository."),
        "pull": ("transfer", "Fetch snapshots from another repository."),
    },
    "Upkeep": {
        "forget": ("retention", "Forget or thin snapshots by rules or by name."),
        "undelete": ("retention", "Bring back what was forgotten or thinned."),
        "policy": ("retention", "Show, set, apply or clear the stored policy."),
        "gc": ("collect", "Free what no branch or tag needs any more."),
        "verify": ("upkeep", "Check the repository; with --data every byte."),
        "du": ("upkeep", "Say where the bytes are."),
        "repack": ("repack", "Write chunks again: without bases, or as short as can be."),
        "dump": ("upkeep", "Describe one file of a repository, damaged or not."),
        "repair": ("repair", "Mend what is damaged, and say what is lost."),
        "reindex": ("upkeep", "Build the index again from the packs."),
        "parity": ("parity", "Add, check or remove what restores lost stretches of packs."),
    },
}
"""Section → command → (file, line of help). Here, so that `castore --help` loads no command."""

COMMANDS = {name: home for section in SECTIONS.values() for name, home in section.items()}

EPILOG = """\b
Examples:
  castore init runs/store
  castore -R runs/store save model.pt --step 100 --metric loss=1.2
  export CASTORE_REPO=runs/store
  castore log
  castore diff main~1 main

\b
A REF is a branch, a tag, a snapshot id (4 hex digits or more), main~3 (three
back) or main@1200 (the newest snapshot of step 1200).
"""


class _PipeClosedError(Exception):
    """The reader of stdout went away. Not an OSError: click would end the program with its own exit code."""


class CommandGroup(click.Group):
    """Loads a command when it is asked for, and ends the program with the exit code of what happened."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  click's signature
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            if ctx.resilient_parsing:
                return None
            import difflib

            near = difflib.get_close_matches(cmd_name, COMMANDS, n=2)
            advice = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(COMMANDS)}"
            ctx.fail(f"no command is called {cmd_name!r}; {advice}")
        module = import_module(f"castore.cli.{COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, f"{cmd_name}_command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        for title, section in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, text) for name, (_, text) in section.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError as error:
            raise _PipeClosedError from error
        return result

    def main(  # type: ignore[override]  # click overloads it by what it returns; this one never does
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> NoReturn:
        given = list(sys.argv[1:] if args is None else args)
        _prepare_streams()
        _shorten_warnings()
        extra["standalone_mode"] = False
        run = super().main
        sys.exit(_guarded(lambda: run(given, prog_name or "castore", **extra), as_json="--json" in given))


def _prepare_streams() -> None:
    """Text that the terminal cannot show, or that is no valid Unicode, is written escaped: never an error."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def _shorten_warnings() -> None:
    """A warning of castore is a line for people, without the place in the sources that Python names."""
    usual = warnings.formatwarning

    def text(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if category.__module__ == "castore.errors":
            return f"warning: {message}\n"
        return usual(message, category, filename, lineno, line)

    warnings.formatwarning = text


def _guarded(run: Callable[[], Any], *, as_json: bool) -> int:
    """Run the command; report what it raises; the exit code."""
    try:
        result = run()
        return result if isinstance(result, int) else 0
    except SystemExit:
        # Only click's own end of a broken pipe comes here, while it prints help.
        return _close_stdout()
    except _PipeClosedError:
        return _close_stdout()
    except click.Abort:
        return _report(KeyboardInterrupt(), as_json=as_json)
    except click.ClickException as error:
        return _report_usage(error, as_json=as_json)
    except BaseException as error:  # noqa: BLE001  nobody is shown a traceback who did not ask for it
        return _report(error, as_json=as_json)


def _report(error: BaseException, *, as_json: bool) -> int:
    from castore.cli.exits import error_document, exit_of, message_of
    from castore.cli.render import clean_lines

    if os.environ.get("CASTORE_TRACEBACK"):
        import traceback

        traceback.print_exception(error)
    text = error_document(error) if as_json else f"error: {clean_lines(message_of(error))}"
    _print_error(text, as_json=as_json)
    return int(exit_of(error))


def _report_usage(error: click.ClickException, *, as_json: bool) -> int:
    if as_json:
        import json

        fields = {
            "type": type(error).__name__,
            "message": error.format_message(),
            "exit_code": error.exit_code,
        }
        _print_error(json.dumps({"error": fields}, indent=2), as_json=True)
        return error.exit_code
    context = getattr(error, "ctx", None)
    hint = f"\n{context.command_path} -h shows the options" if context is not None else ""
    _print_error(f"error: {error.format_message()}{hint}", as_json=False)
    return error.exit_code


def _print_error(text: str, *, as_json: bool) -> None:
    try:
        click.echo(text, err=not as_json)
    except BrokenPipeError:
        _close_stdout()


def _close_stdout() -> int:
    """Give stdout a place to flush into when the interpreter ends; otherwise it complains."""
    from castore.cli.exits import Exit

    # Suppressed: a stdout that is no real file is not flushed into a pipe either.
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return int(Exit.PIPE_CLOSED)


@click.group(
    cls=CommandGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=EPILOG,
    invoke_without_command=True,
)
@click.version_option(__version__, "--version", prog_name="castore", message="%(prog)s %(version)s")
@shared_options
@click.pass_context
def cli(context: click.Context, repo: str | None, as_json: bool) -> None:
    """Git for training state: checkpoints as a history that costs what changed."""
    context.obj = App(repo=repo, as_json=as_json)
    if context.invoked_subcommand is None:
        if as_json:
            context.fail("give a command")
        click.echo(context.get_help(), err=True)
        context.exit(2)


def main() -> NoReturn:
    """The entry point of the `castore` script."""
    cli.main()
