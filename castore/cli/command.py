"""What every command shares: -R and --json, the repository, and the three ways to speak.

Results go to stdout: text, or with `--json` exactly one JSON document. Remarks and progress go to stderr,
progress only when stderr is a terminal and the work takes long enough to be seen.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from castore.api import Repository
    from castore.backend.base import Backend
    from castore.cli.render import Table
    from castore.snapshots import Snapshot

AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])
Progress = Callable[[int, int], None]
Phases = Callable[[str, int, int], None]
"""Called with (what is being done, done, in all)."""

REPOSITORY_VARIABLE = "CASTORE_REPO"


@dataclass(frozen=True, slots=True)
class App:
    """What the shared options said, and the means to act on it."""

    repo: str | None
    as_json: bool

    def repository_path(self) -> Path:
        """-R, else CASTORE_REPO, else the current directory when it is a repository."""
        given = self.repo or os.environ.get(REPOSITORY_VARIABLE)
        if given:
            return Path(given)
        if _is_repository(Path()):
            return Path()
        from castore.errors import RepositoryNotFoundError

        raise RepositoryNotFoundError(
            f"no repository given: use -R DIR, set {REPOSITORY_VARIABLE}, or run castore inside one; "
            "`castore init DIR` creates one"
        )

    def open(self) -> Repository:
        """The repository, a context manager. Raises what `castore.open` raises."""
        from castore.api import open_

        return open_(self.repository_path())

    def backend(self) -> Backend:
        """The files of the repository, for commands that read refs and snapshots and no chunk: it starts sooner."""
        from castore.opening import open_at

        return open_at(self.repository_path())[0]

    def line(self, text: str = "") -> None:
        """One line of the result."""
        sys.stdout.write(text + "\n")

    def note(self, text: str) -> None:
        """A remark that is no part of the result."""
        click.echo(text, err=True)

    def document(self, fields: Mapping[str, Any]) -> None:
        """The result for `--json`: numbers that JSON lacks become text ("nan", "inf"), bytes become hex."""
        import json

        from castore.cli.render import jsonable

        sys.stdout.write(json.dumps(jsonable(fields), indent=2) + "\n")

    def table(self, table: Table) -> None:
        """A table of the result: plain columns, or on a terminal drawn by rich."""
        from castore.cli.render import draw_table

        draw_table(table, sys.stdout)

    def style(self, text: str, **style: Any) -> str:
        """Coloured text on a terminal, else the text."""
        return click.style(text, **style) if colours(sys.stdout) else text

    @contextmanager
    def progress(self, label: str) -> Iterator[Progress | None]:
        """A callback that draws a bar on stderr; None when stderr is no terminal."""
        if not sys.stderr.isatty():
            yield None
            return
        from castore.cli.render import ProgressBar

        bar = ProgressBar(label)
        try:
            yield bar.update
        finally:
            bar.close()

    @contextmanager
    def phases(self) -> Iterator[Phases | None]:
        """As `progress`, for work that says itself what it is doing: a bar for each phase, one after the other."""
        if not sys.stderr.isatty():
            yield None
            return
        from castore.cli.render import ProgressBar

        bars: dict[str, ProgressBar] = {}

        def close() -> None:
            for bar in bars.values():
                bar.close()
            bars.clear()

        def update(phase: str, done: int, total: int) -> None:
            if phase not in bars:
                close()
                bars[phase] = ProgressBar(phase)
            bars[phase].update(done, total)

        try:
            yield update
        finally:
            close()


def colours(stream: Any) -> bool:
    """Whether to colour text on the stream: a terminal, and the user did not object (no-color.org)."""
    return bool(stream.isatty()) and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def shared_options(function: AnyFunction) -> AnyFunction:
    """-R and --json, for the group and for every command: both places are where people write them."""
    repo = click.option(
        "-R",
        "--repo",
        metavar="DIR",
        help=f"The repository. Default: {REPOSITORY_VARIABLE}, or the current directory.",
    )
    as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document, errors too.")
    return repo(as_json(function))


def command(name: str, *, examples: str) -> Callable[[Callable[..., int | None]], click.Command]:
    """A command that takes an App first and its own arguments after; returns its exit code or None.

    `examples` are the lines of the help's end.
    """
    epilog = "\b\nExamples:\n" + "\n".join(f"  {line}" for line in examples.strip().splitlines())

    def decorate(function: Callable[..., int | None]) -> click.Command:
        @click.pass_context
        def wrapper(context: click.Context, /, repo: str | None, as_json: bool, **arguments: Any) -> int | None:
            outer = context.find_object(App) or App(None, False)
            return function(App(repo or outer.repo, as_json or outer.as_json), **arguments)

        functools.update_wrapper(wrapper, function)
        return click.command(name, epilog=epilog)(shared_options(wrapper))

    return decorate


def snapshot_fields(snapshot: Snapshot) -> dict[str, Any]:
    """A snapshot for `--json`."""
    return {
        "id": snapshot.id,
        "state_id": snapshot.state_id,
        "parents": list(snapshot.parents),
        "branch": snapshot.branch,
        "step": snapshot.step,
        "created_at": snapshot.created_at.isoformat(),
        "metrics": dict(snapshot.metrics),
        "metadata": dict(snapshot.metadata),
        "message": snapshot.message,
        "raw_bytes": snapshot.raw_bytes,
        "new_bytes": snapshot.new_bytes,
        "stored_bytes": snapshot.stored_bytes,
        "leaf_count": snapshot.leaf_count,
        "software": snapshot.software,
        "dropped": list(snapshot.dropped),
    }


def _is_repository(directory: Path) -> bool:
    """Cheap look: a config file that begins as castore's do. Opening it checks the rest."""
    try:
        with (directory / "config").open("rb") as file:
            return file.read(1) == b"{"
    except OSError:
        return False
