"""`castore repack`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import click

from castore.cli.command import App, command
from castore.cli.render import plural, size

if TYPE_CHECKING:
    from castore.maintenance.repack import RepackReport


@command(
    "repack",
    examples="""
castore repack --flatten best            loads of it read no bases any more
castore repack --level max               archive everything: 1 to 4 % less
castore repack --level max main~100 v1   only these two snapshots
castore repack --flatten best --dry-run
""",
)
@click.argument("refs", nargs=-1, metavar="[REF]...")
@click.option("--flatten", is_flag=True, help="Store deltas and rounded copies by themselves.")
@click.option(
    "--level",
    type=click.Choice(["usual", "max"]),
    default="usual",
    show_default=True,
    help="max searches long for the shortest encoding.",
)
@click.option("--dry-run", is_flag=True, help="Only say how much would be looked at.")
def repack_command(
    app: App, *, refs: Sequence[str], flatten: bool, level: Literal["usual", "max"], dry_run: bool
) -> None:
    """Write chunks of the snapshots REF (default: all) again in another encoding.

    Snapshots, their ids and their values stay as they are. New records are written beside the old ones and are
    read from then on; gc frees the old ones.
    """
    with app.open() as repository, app.progress("repacking") as progress:
        report: RepackReport = repository.repack(
            list(refs) or None, level=level, flatten=flatten, dry_run=dry_run, progress=progress
        )
    if app.as_json:
        app.document(report.to_json())
        return
    chunks = plural(report.chunk_count, "chunk")
    looked_at = f"{chunks} of {size(report.raw_bytes)}, stored in {size(report.stored_bytes)}"
    if dry_run:
        app.line(f"would look at {looked_at}; nothing was written")
        return
    app.line(f"looked at {looked_at}")
    app.line(
        f"wrote {plural(report.rewritten_count, 'chunk')} again in {size(report.new_bytes)} instead of "
        f"{size(report.old_bytes)}; gc frees what they replace"
    )
