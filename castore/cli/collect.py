"""`castore gc`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from castore.cli.command import App, command
from castore.cli.render import ID_DIGITS, clean, plural, size
from castore.options import MIB, REPACK_BELOW, REPACK_BYTES_MAX

if TYPE_CHECKING:
    from castore.maintenance.gc.report import GcReport, Pending

_SNAPSHOTS_SHOWN_MAX = 20


@command(
    "gc",
    examples="""
castore gc --dry-run            say what would be freed
castore gc                      free it, beside running saves
castore gc --auto               apply the stored policy, then free what there is: for cron
castore gc --target-bytes 50000000000
castore gc --wait 0             do not wait for saves: the next gc goes on
castore gc --repack-below 1     rewrite every pack that holds a dead byte
castore gc --json | jq .pending
""",
)
@click.option("--dry-run", "-n", is_flag=True, help="Say what would be done, and change nothing.")
@click.option("--auto", is_flag=True, help="Apply the stored policy first; stop at once when nothing can be freed.")
@click.option(
    "--repack-below",
    type=click.FloatRange(0, 1),
    default=REPACK_BELOW,
    show_default="two thirds",
    metavar="SHARE",
    help="Rewrite packs of which a smaller share is live. 0 only deletes packs in which nothing is.",
)
@click.option(
    "--max-repack-bytes",
    type=click.IntRange(min=0),
    default=REPACK_BYTES_MAX,
    show_default=f"{REPACK_BYTES_MAX // MIB} MiB",
    metavar="BYTES",
    help="Copy at most this much; the next gc goes on.",
)
@click.option(
    "--target-bytes",
    type=click.IntRange(min=0),
    metavar="BYTES",
    help="Forget what the stored policy does not keep, oldest first, until the packs take no more than this.",
)
@click.option(
    "--wait",
    "wait_s",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="How long to wait for saves that began before. Default: the lease length of the repository.",
)
def gc_command(
    app: App,
    *,
    dry_run: bool,
    auto: bool,
    repack_below: float,
    max_repack_bytes: int,
    target_bytes: int | None,
    wait_s: float | None,
) -> int | None:
    """Free what no branch, tag or young orphan needs any more: snapshots that were forgotten or lost their refs, and
    the chunks that only they held.

    Saves and loads go on meanwhile. What cannot be freed yet is listed with the reason. Interrupted at any point, gc is
    simply run again.
    """
    with app.open() as repository, app.phases() as progress:
        report: GcReport | None = repository.gc(
            dry_run,
            auto=auto,
            repack_below=repack_below,
            repack_bytes_max=max_repack_bytes,
            target_bytes=target_bytes,
            wait_s=wait_s,
            progress=progress,
        )
    if app.as_json:
        app.document(report.to_json() if report is not None else {"nothing_to_do": True})
    elif report is None:
        app.line("nothing to free")
    else:
        _draw(app, report)
    return None


def _draw(app: App, report: GcReport) -> None:
    verb = "would remove" if report.dry_run else "removed"
    for snapshot_id, why in list(report.snapshots.items())[:_SNAPSHOTS_SHOWN_MAX]:
        app.line(f"{verb} snapshot {snapshot_id[:ID_DIGITS]}: {clean(why)}")
    if len(report.snapshots) > _SNAPSHOTS_SHOWN_MAX:
        app.line(f"… and {len(report.snapshots) - _SNAPSHOTS_SHOWN_MAX} more")
    packs = f"{plural(len(report.packs_deleted), 'pack')} deleted"
    rewritten = f"{len(report.packs_rewritten)} rewritten ({size(report.copied_bytes)} copied)"
    freed = app.style(size(report.freed_bytes), fg="green")
    app.line(f"{'would free' if report.dry_run else 'freed'} {freed}: {packs}, {rewritten}")
    for pending in report.pending:
        if pending.kind != "grace":
            app.line(f"{app.style('pending', fg='yellow')} {_pending_text(pending)}")
    graced = [pending for pending in report.pending if pending.kind == "grace"]
    if graced:
        last = max(pending.until_ns or 0 for pending in graced)
        app.line(f"pending {plural(len(graced), 'orphan')}, kept until {_day(last)} at the latest")
    if report.pinned_bytes:
        of = ", ".join(f"{snapshot_id[:ID_DIGITS]} ({size(count)})" for snapshot_id, count in report.pinned_by.items())
        app.line(f"pinned {size(report.pinned_bytes)} that only differences need: of {of}")
    for note in report.notes:
        app.line(f"note: {clean(note)}")
    after = "would stay" if report.dry_run else "in packs"
    live = f"{plural(report.snapshot_count, 'snapshot')}, {plural(report.chunk_count, 'chunk')}"
    app.line(f"{size(report.total_bytes)} {after}: {live}, {size(report.wasted_bytes)} wasted inside packs")


def _pending_text(pending: Pending) -> str:
    until = f", until {_day(pending.until_ns)}" if pending.until_ns is not None else ""
    return f"{size(pending.bytes)}: {clean(pending.message)}{until}"


def _day(time_ns: int) -> str:
    return datetime.fromtimestamp(time_ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M UTC")
