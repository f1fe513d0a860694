"""`castore repair`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from castore.cli.command import App, command
from castore.cli.exits import Exit
from castore.cli.render import ID_DIGITS, clean, plural, size
from castore.errors import NotFoundError

if TYPE_CHECKING:
    from castore.maintenance.repair.execute import RepairReport
    from castore.maintenance.repair.plan import RepairPlan

_SHOWN_MAX = 10


@command(
    "repair",
    examples="""
castore repair                                  say what is damaged and what would be done
castore repair --yes                            do it
castore repair --from /backup/store --yes       and take lost content from another repository
castore repair --from model.pt --yes            or from a checkpoint file that holds it
castore repair --fix-refs --yes                 and move branches that name nothing readable
""",
)
@click.option("--yes", is_flag=True, help="Act. Without it the plan is shown and nothing is changed.")
@click.option(
    "--from",
    "origins",
    multiple=True,
    metavar="DIR|FILE",
    type=click.Path(path_type=Path),
    help="Another repository, or a .pt or .safetensors file, that may hold what is lost. May be repeated.",
)
@click.option("--fix-refs", is_flag=True, help="Move branches that name nothing readable to what the plan offers.")
def repair_command(app: App, yes: bool, origins: Sequence[Path], fix_refs: bool) -> int | None:
    """Mend a damaged repository: nothing that can still be read is lost, and nothing is deleted.

    Records that read right are copied out of damaged packs; what is damaged moves to quarantine/; lost chunks are
    written again where their content is found; snapshots that lost leaves all the same are marked, so that the rest
    of them can be loaded and gc goes on. Reads every byte. Exits with 3 when something is lost or needs a hand.
    """
    sources = [_source(origin) for origin in origins]
    with app.open() as repository, app.progress("reading every byte") as progress:
        report: RepairReport = repository.repair(sources=sources, dry_run=not yes, fix_refs=fix_refs, progress=progress)
    if app.as_json:
        app.document(report.to_json())
    else:
        _draw_plan(app, report.plan)
        _draw_outcome(app, report, fix_refs=fix_refs)
    refs_left = [ref for ref in report.plan.refs if ref.file_name not in report.moved_refs]
    needs_hand = bool(refs_left or report.plan.left or report.losses)
    return Exit.DAMAGE if needs_hand or (not report.acted and not report.plan.is_empty) else None


def _source(origin: Path) -> Any:
    """A directory is a repository, a file is read whole. Raises what reading it raises."""
    if origin.is_dir():
        return origin
    if not origin.exists():
        raise NotFoundError(f"{origin}: no such file or directory")
    from castore.cli.files import read_file

    return read_file(origin, allow_pickle=False).state


def _draw_plan(app: App, plan: RepairPlan) -> None:
    for salvage in plan.salvages:
        app.line(f"pack {salvage.pack_id}: {clean(salvage.reason)}")
        kept = f"{plural(len(salvage.kept), 'record')} ({size(salvage.kept_bytes)})"
        app.line(f"  copy {kept} into a new pack, leave {len(salvage.dropped)}, quarantine the pack")
    for file in (*plan.set_aside, *plan.unmarked):
        app.line(f"quarantine {clean(file.name)}: {clean(file.reason)}")
    for restore in plan.restores:
        app.line(f"restore snapshot {restore.snapshot_id[:ID_DIGITS]}, which lies in {clean(restore.name)}")
    for number, name in enumerate(plan.source_names):
        count = sum(heal.source == number for heal in plan.heals)
        if count:
            app.line(f"write {plural(count, 'lost chunk')} again from {clean(name)}")
    for loss in plan.losses:
        app.line(f"{app.style('lost', fg='red')} of snapshot {loss.snapshot_id[:ID_DIGITS]}: {_leaves_text(loss)}")
    for snapshot_id in plan.healed:
        app.line(f"unmark snapshot {snapshot_id[:ID_DIGITS]}: nothing of it is lost any more")
    if plan.stale_marks:
        app.line(f"take away {plural(len(plan.stale_marks), 'mark')} of damage that is mended by then")
    if plan.rebuild_index:
        app.line("build the index again")
    for text in plan.left:
        app.line(f"{app.style('left', fg='yellow')}: {clean(text)}")


def _leaves_text(loss: Any) -> str:
    if loss.parts and not loss.leaves:
        return f"{plural(len(loss.parts), 'manifest part')}, so not all of its leaves are known"
    more = f" and {loss.leaf_count - _SHOWN_MAX} more" if loss.leaf_count > _SHOWN_MAX else ""
    return ", ".join(clean(path) or "(root)" for path in loss.leaves[:_SHOWN_MAX]) + more


def _draw_outcome(app: App, report: RepairReport, *, fix_refs: bool) -> None:
    for ref in report.plan.refs:
        if ref.file_name in report.moved_refs:
            target = report.moved_refs[ref.file_name]
            app.line(f"{clean(ref.file_name)}: {'moved to ' + target[:ID_DIGITS] if target else 'quarantined'}")
            continue
        app.line(f"{app.style('ref', fg='yellow')} {clean(ref.file_name)}: {clean(ref.reason)}")
        if ref.offered is not None:
            app.line(
                f"  the newest whole snapshot saved to it is {ref.offered[:ID_DIGITS]}: --fix-refs moves it there, or "
                f"`castore branch --move {clean(ref.name)} {ref.offered[:ID_DIGITS]}`"
            )
        elif ref.is_branch or not fix_refs:
            app.line("  no whole snapshot is known to belong to it")
    if not report.acted:
        app.line("nothing to mend" if report.plan.is_empty else "nothing was changed; --yes does what is said above")
        return
    if report.quarantine:
        app.line(f"what was damaged is in {report.quarantine}, with the reasons in `why`; it is yours to delete")
    if report.healed_count:
        app.line(f"{plural(report.healed_count, 'chunk')} written again")
    losses = f"losses in {plural(len(report.losses), 'snapshot')}" if report.losses else "nothing is lost"
    app.line(f"done; {losses}")
