"""`castore push` and `castore pull`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

from castore.cli.command import App, command
from castore.cli.render import ID_DIGITS, Table, clean, plural, size

if TYPE_CHECKING:
    from castore.transfer.execute import TransferReport

AnyFunction = TypeVar("AnyFunction", bound=Callable[..., int | None])
_SHOWN_SNAPSHOTS_MAX = 20

_ACTIONS = {"create": "new", "forward": "moved forward", "force": "moved by force", "same": "up to date"}


def _shared(function: AnyFunction) -> AnyFunction:
    """What push and pull have in common."""
    decorators = (
        click.argument("other", type=click.Path(path_type=Path)),
        click.argument("refs", nargs=-1),
        click.option(
            "--depth", type=click.IntRange(min=1), metavar="N", help="Only the newest N snapshots of each ref."
        ),
        click.option("--force", is_flag=True, help="Move branches that hold there what is not here. Tags never move."),
        click.option("--check", is_flag=True, help="Read what is there already; send again what is rotten."),
        click.option("--reencode", is_flag=True, help="Encode every chunk anew by the options of the receiving side."),
        click.option("--dry-run", is_flag=True, help="Say what would be sent, and send nothing."),
    )
    for decorate in reversed(decorators):
        function = decorate(function)
    return function


@command(
    "push",
    examples="""
castore push /backup/store                        every branch and tag
castore push /backup/store main --depth 5         the newest five snapshots
castore push /backup/store main:runs/7 best       main under another name, and a tag
castore push /backup/store main@1200:tags/paper
castore init /shared/store --hash blake3 && castore push /shared/store
""",
)
@_shared
def push_command(app: App, other: Path, refs: tuple[str, ...], **options: Any) -> int | None:
    """Send the snapshots of REFS, with their history, to the repository OTHER: only chunks that it lacks.

    REFS are branches and tags, NAME or NAME:OTHER_NAME; all of them unless given. What arrived before an
    interruption is not sent again. OTHER may have another hash: snapshots get new ids there, the same ones each
    time.
    """
    with app.open() as repository, app.progress("sending") as progress:
        report: TransferReport = repository.push(other, refs or None, progress=progress, **options)
    _show(app, report, _Words("sent", "would send", "here", "there"), at=str(other))
    return None


@command(
    "pull",
    examples="""
castore pull /backup/store
castore pull /colleague/store exp/lr:theirs/lr --depth 1
castore pull /backup/store --dry-run --json
""",
)
@_shared
def pull_command(app: App, other: Path, refs: tuple[str, ...], **options: Any) -> int | None:
    """Fetch the snapshots of REFS of the repository OTHER, with their history: `push`, the other way round."""
    with app.open() as repository, app.progress("fetching") as progress:
        report: TransferReport = repository.pull(other, refs or None, progress=progress, **options)
    _show(app, report, _Words("fetched", "would fetch", "there", "here"), at=str(app.repository_path()))
    return None


class _Words(NamedTuple):
    """A transfer as the person sees it who asked for it."""

    done: str
    would: str
    source: str
    target: str


def _show(app: App, report: TransferReport, words: _Words, *, at: str) -> None:
    if app.as_json:
        app.document(report.to_json())
        return
    plan = report.plan
    if plan.moves:
        table = Table(("REF", "SNAPSHOT", "AT " + clean(at)))
        for move in plan.moves:
            kind = "tags" if move.kind == "tag" else "heads"
            head = report.heads.get(f"{kind}/{move.name}", move.source_id)
            table.add(f"{kind}/{move.name}", head[:ID_DIGITS], _ACTIONS[move.action])
        app.table(table)
    renamed = [(old, new) for old, new in report.sent.items() if old != new]
    for old, new in renamed[:_SHOWN_SNAPSHOTS_MAX]:
        app.line(f"{old[:ID_DIGITS]} is {new[:ID_DIGITS]} {words.target}")
    if len(renamed) > _SHOWN_SNAPSHOTS_MAX:
        app.line(f"… and {len(renamed) - _SHOWN_SNAPSHOTS_MAX} more; --json lists all")
    if plan.gaps:
        app.note(
            f"note: {plural(len(plan.gaps), 'parent')} of these snapshots are gone {words.source}: history ends so"
        )
    if plan.left_out:
        app.note(
            f"note: {plural(len(plan.left_out), 'thinned snapshot')} left out: what was dropped of them cannot be "
            "hashed again"
        )
    if report.is_dry_run:
        bound = "" if plan.is_exact else "at most "
        app.line(
            f"{words.would} {plural(len(plan.missing), 'snapshot')}, {bound}{plural(plan.chunk_count, 'chunk')} of "
            f"{size(plan.raw_bytes)}, stored {size(plan.stored_bytes)} {words.source}"
        )
        return
    app.line(
        f"{words.done} {plural(len(report.sent), 'snapshot')}, {plural(report.sent_chunk_count, 'chunk')} of "
        f"{size(report.sent_raw_bytes)}, written {size(report.stored_bytes)}"
    )
