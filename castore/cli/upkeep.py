"""`castore verify`, `castore du`, `castore dump` and `castore reindex`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from castore.cli.command import App, command
from castore.cli.exits import Exit
from castore.cli.render import ID_DIGITS, Table, clean, plural, share, size
from castore.errors import NotFoundError, RepositoryNotFoundError

if TYPE_CHECKING:
    from castore.maintenance.reindex import ReindexReport
    from castore.maintenance.report import Problem, ScrubCount, VerifyReport
    from castore.maintenance.usage import Usage

_LEAVES_SHOWN_MAX = 5


# ---- verify ------------------------------------------------------------------------------------------------


@command(
    "verify",
    examples="""
castore verify            structure: every file, every reference
castore verify --data     and every byte
castore verify --max-duration 10m --max-age 30d    a slice of it, for a nightly job
castore verify --json | jq '.damaged_snapshots'
""",
)
@click.option("--data", is_flag=True, help="Read, decode and hash every chunk.")
@click.option("--max-duration", metavar="TIME", help="Read packs for so long (10m, 2h), the longest unread first.")
@click.option("--max-age", metavar="TIME", help="Leave out packs that were read and found whole within it (30d).")
def verify_command(app: App, data: bool, max_duration: str | None, max_age: str | None) -> int | None:
    """Check the repository and name every damaged snapshot and leaf. Exits with 3 when there is damage.

    With --max-duration or --max-age every byte is read over many runs; what was read when is remembered. Leaves
    that a repair has marked as lost are told and are no new damage. What is damaged, `castore repair` mends.
    """
    with app.open() as repository, app.progress("verifying") as progress:
        report: VerifyReport = repository.verify(
            data=data, max_duration=max_duration, max_age=max_age, progress=progress
        )
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
    if report.lost_snapshots:
        app.line("known to be lost, as repairs have found:")
        for snapshot_id, leaves in report.lost_snapshots.items():
            app.line(f"  {snapshot_id[:ID_DIGITS]}  {_leaves_text(leaves)}")
    for note in report.notes:
        app.line(f"note: {clean(note)}")
    if report.orphans:
        app.line(f"note: {plural(len(report.orphans), 'orphan')}; `castore log --orphans` lists them")
    checked = f"{size(report.checked_bytes)} read" if report.with_data else "structure only; --data reads every byte"
    if report.scrub is not None:
        app.line(_scrub_text(report.scrub))
    if report.problems:
        app.line("`castore repair` shows what can be mended")
    numbers = {"snapshot": report.snapshot_count, "pack": report.pack_count, "chunk": report.chunk_count}
    counts = ", ".join(plural(count, noun) for noun, count in numbers.items())
    verdict = app.style("ok", fg="green") if report.ok else app.style(plural(len(report.problems), "problem"), fg="red")
    app.line(f"{verdict}: {counts} ({checked})")


def _scrub_text(scrub: ScrubCount) -> str:
    waiting = f"{scrub.recent_count} read lately, {scrub.pending_count} to come"
    text = f"scrub: {plural(scrub.read_count, 'pack')} read, {waiting}"
    if scrub.oldest_ns is None:
        return text
    return f"{text}; all were read since {datetime.fromtimestamp(scrub.oldest_ns / 1e9, UTC):%Y-%m-%d %H:%M} UTC"


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


# ---- du ----------------------------------------------------------------------------------------------------


@command(
    "du",
    examples="""
castore du
castore du --depth 2     group leaves by two levels of their paths
castore du --json
""",
)
@click.option(
    "--depth",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="Levels of a path that make a group.",
)
def du_command(app: App, depth: int) -> int | None:
    """Say where the bytes are: by snapshot, by group of leaves, by codec, and what is no payload at all.

    EXCLUSIVE is what only that snapshot needs: what would become free without it. A delta is stored as a
    difference from another chunk, what is derived as the rounding of others; those stay as long as it does.
    """
    with app.open() as repository, app.progress("reading") as progress:
        usage: Usage = repository.usage(depth=depth, progress=progress)
    if app.as_json:
        app.document(usage.to_json())
    else:
        _draw_usage(app, usage)
    return Exit.DAMAGE if usage.unreadable else None


def _draw_usage(app: App, usage: Usage) -> None:
    app.table(_snapshot_table(usage))
    app.line()
    app.table(_group_table(usage))
    app.line()
    app.table(_codec_table(usage))
    app.line()
    files = {
        "leaves": usage.leaf_bytes,
        "manifests": usage.manifest_bytes,
        "unreferenced": usage.unreferenced_bytes,
        "overhead": usage.overhead_bytes,
    }
    parts = ", ".join(f"{name} {size(count)}" for name, count in files.items())
    app.line(f"{plural(usage.pack_count, 'pack')}: {size(usage.pack_bytes)} ({parts})")
    if usage.pinned_bytes:
        app.line(f"bases that no snapshot needs itself: {size(usage.pinned_bytes)} of the leaves")
    app.line(f"snapshot files: {size(usage.snapshot_bytes)}, index: {size(usage.cache_bytes)}")
    for name, count_bytes in (("parity", usage.parity_bytes), ("quarantine, yours to delete", usage.quarantine_bytes)):
        if count_bytes:
            app.line(f"{name}: {size(count_bytes)}")
    raw = (
        f"; {plural(len(usage.snapshots), 'snapshot')} of {size(usage.raw_bytes)} raw in all" if usage.snapshots else ""
    )
    app.line(f"total: {size(usage.total_bytes)}{raw} ({share(usage.total_bytes, usage.raw_bytes)})")
    for problem in usage.unreadable:
        app.line(f"{app.style('damaged', fg='red')} {clean(problem)}")


def _snapshot_table(usage: Usage) -> Table:
    table = Table(("SNAPSHOT", "BRANCH", ">STEP", ">RAW", ">NEW", ">STORED", ">EXCLUSIVE"))
    for row in usage.snapshots:
        table.add(
            row.snapshot_id[:ID_DIGITS],
            row.branch,
            "" if row.step is None else str(row.step),
            size(row.raw_bytes),
            size(row.new_bytes),
            size(row.stored_bytes),
            size(row.exclusive_bytes),
        )
    return table


def _group_table(usage: Usage) -> Table:
    table = Table(("LEAVES", ">RAW", ">STORED", ">SHARE"))
    for row in usage.groups:
        name = row.path or "(all)"
        table.add(name, size(row.raw_bytes), size(row.stored_bytes), share(row.stored_bytes, row.raw_bytes))
    return table


def _codec_table(usage: Usage) -> Table:
    table = Table(("CODEC", ">CHUNKS", ">RAW", ">STORED", ">SHARE"))
    for row in usage.codecs:
        stored = share(row.stored_bytes, row.raw_bytes)
        table.add(row.name, str(row.chunk_count), size(row.raw_bytes), size(row.stored_bytes), stored)
    return table


# ---- dump --------------------------------------------------------------------------------------------------


@command(
    "dump",
    examples="""
castore dump runs/store/config
castore dump runs/store/snapshots/3f2a81c0…
castore -R runs/store dump packs/ab/ab12….pack
""",
)
@click.argument("file", type=click.Path(path_type=Path))
def dump_command(app: App, file: Path) -> int | None:
    """Describe FILE, any single file of a repository, as far as it can be decoded. Never writes.

    FILE is a path, or a name within the repository given by -R or CASTORE_REPO. Exits with 3 when the file
    is damaged.
    """
    from castore.dump import dump

    description = dump(_find(app, file))
    if app.as_json:
        app.document(description)
    else:
        _draw_description(app, description, indent="")
    return Exit.DAMAGE if description.get("problems") else None


def _find(app: App, file: Path) -> Path:
    if file.exists():
        return file
    with suppress(RepositoryNotFoundError):
        inside = app.repository_path() / file
        if inside.exists():
            return inside
    raise NotFoundError(f"{file}: no such file, here or in the repository")


def _draw_description(app: App, fields: Mapping[str, Any], indent: str) -> None:
    """Names and values, indented; a list of rows as a table."""
    for name, value in fields.items():
        if isinstance(value, Mapping) and value:
            app.line(f"{indent}{clean(name)}:")
            _draw_description(app, value, indent + "  ")
        elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            app.line(f"{indent}{clean(name)} ({len(value)}):")
            app.table(_rows_table(value))
        elif isinstance(value, list) and value:
            app.line(f"{indent}{clean(name)}:")
            for item in value:
                app.line(f"{indent}  {clean(str(item))}")
        else:
            app.line(f"{indent}{clean(name)}: {clean(str(value))}")


def _rows_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(tuple(names))
    for row in rows:
        cells = (row.get(name, "") for name in names)
        table.add(*(" ".join(cell) if isinstance(cell, list) else str(cell) for cell in cells))
    return table


# ---- reindex -----------------------------------------------------------------------------------------------


@command("reindex", examples="castore reindex     after a copy, or when the cache folder was deleted or is damaged")
def reindex_command(app: App) -> int | None:
    """Build the index again from the packs.

    castore does this by itself when it finds the index missing or damaged. Exits with 3 when a pack is
    damaged; what can be read of it is in the index.
    """
    with app.open() as repository, app.progress("reading packs") as progress:
        report: ReindexReport = repository.reindex(progress=progress)
    if app.as_json:
        app.document(report.to_json())
    else:
        for name, problem in report.damaged_packs:
            app.line(f"{app.style('damaged', fg='red')} {clean(name)}: {clean(problem)}")
        app.line(f"indexed {plural(report.chunk_count, 'chunk')} in {plural(report.pack_count, 'pack')}")
    return Exit.DAMAGE if report.damaged_packs else None
