"""`castore verify`, `castore du`, `castore dump` and `castore reindex`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from castore.cli.command import App, command
from castore.cli.exits import Exit
from castore.cli.render import clean, plural, size

if TYPE_CHECKING:
    from castore.maintenance.report import Problem, VerifyReport

ID_DIGITS = 10
_LEAVES_SHOWN_MAX = 5


# ---- verify --------------------------------------------------------------------------------------------------------


@command(
    "verify",
    examples="""
castore verify            structure: every file, every reference
castore verify --data     and every byte
castore verify --json | jq '.damaged_snapshots'
""",
)
@click.option("--data", is_flag=True, help="Read, decode and hash every chunk.")
def verify_command(app: App, data: bool) -> int | None:
    """Check the repository and name every damaged snapshot and leaf. Exits with 3 when there is damage."""
    with app.open() as repository, app.progress("verifying") as progress:
        report: VerifyReport = repository.verify(data=data, progress=progress)
    if app.as_json:
        app.document(report.to_json())
    else:
        _draw_report(app, report)
    return None if report.ok else Exit.DAMAGE


def _draw_report(app: App, report: VerifyReport) -> None:
    for problem in report.problems:
        _draw_problem(app, problem)
    if report.damaged_snapshots:
        app.line("damaged snapshots:")
        for snapshot_id, leaves in report.damaged_snapshots.items():
            app.line(f"  {snapshot_id[:ID_DIGITS]}  {_leaves_text(leaves)}")
    for note in report.notes:
        app.line(f"note: {clean(note)}")
    if report.orphans:
        app.line(f"note: {plural(len(report.orphans), 'orphan')}; `castore log --orphans` lists them")
    checked = f"{size(report.checked_bytes)} read" if report.with_data else "structure only; --data reads every byte"
    counts = f"{plural(report.snapshot_count, 'snapshot')}, {plural(report.pack_count, 'pack')}, {plural(report.chunk_count, 'chunk')}"
    verdict = app.style("ok", fg="green") if report.ok else app.style(plural(len(report.problems), "problem"), fg="red")
    app.line(f"{verdict}: {counts} ({checked})")


def _draw_problem(app: App, problem: Problem) -> None:
    app.line(f"{app.style('damaged', fg='red')} {problem.kind} {clean(problem.where)}: {clean(problem.message)}")
    if problem.snapshots:
        touched = ", ".join(snapshot_id[:ID_DIGITS] for snapshot_id in problem.snapshots[:_LEAVES_SHOWN_MAX])
        more = len(problem.snapshots) - _LEAVES_SHOWN_MAX
        app.line(f"  touches {touched}{f' and {more} more' if more > 0 else ''}: {_leaves_text(problem.leaves)}")


def _leaves_text(leaves: tuple[str, ...]) -> str:
    if not leaves:
        return "all of it, as far as can be told"
    more = f" and {len(leaves) - _LEAVES_SHOWN_MAX} more" if len(leaves) > _LEAVES_SHOWN_MAX else ""
    return ", ".join(clean(path) or "(root)" for path in leaves[:_LEAVES_SHOWN_MAX]) + more
