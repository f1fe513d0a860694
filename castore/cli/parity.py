"""`castore parity add`, `castore parity status` and `castore parity remove`."""

from __future__ import annotations

import click

from castore.cli.command import App, command
from castore.cli.exits import Exit
from castore.cli.render import ID_DIGITS, Table, clean, plural, share, size
from castore.errors import UsageError


@command(
    "parity",
    examples="""
castore parity add                    protect every pack that is not yet
castore parity add --overhead 25      so that a quarter of a pack may be lost
castore parity add --data             and make anew what of the parity is rotten
castore parity status --data          read everything; exits with 3 when something is lost
castore parity remove
""",
)
@click.argument("action", type=click.Choice(["add", "status", "remove"]))
@click.option(
    "--overhead",
    type=click.IntRange(1, 100),
    metavar="PERCENT",
    help="add: share of a pack that may be lost, and that its parity takes. Default: 10.",
)
@click.option("--data", is_flag=True, help="Read every byte: add, of the parity; status, of packs too.")
def parity_command(app: App, action: str, overhead: int | None, data: bool) -> int | None:
    """Protect packs against lost and rotten stretches: bad sectors, a cut file, a torn copy.

    Parity is added to the packs that are there; later saves need it added again. It restores a pack bit for bit
    as long as no more than PERCENT of it is lost at one place. `castore repair` uses it. Needs castore[parity].
    """
    if overhead is not None and action != "add":
        raise UsageError("--overhead goes with `castore parity add`")
    if data and action == "remove":
        raise UsageError("--data goes with `castore parity add` and `castore parity status`")
    return {
        "add": lambda: _add(app, overhead, data),
        "status": lambda: _status(app, data),
        "remove": lambda: _remove(app),
    }[action]()


def _add(app: App, overhead: int | None, data: bool) -> int | None:
    from castore.maintenance.parity import OVERHEAD_PERCENT, add_parity

    with app.open() as repository, app.progress("computing parity") as progress:
        report = add_parity(
            repository.handle,
            overhead_percent=OVERHEAD_PERCENT if overhead is None else overhead,
            data=data,
            progress=progress,
        )
    if app.as_json:
        app.document(report.to_json())
    else:
        for pack_id, why in report.refused:
            app.line(f"{app.style('damaged', fg='red')} pack {pack_id[:ID_DIGITS]}: {clean(why)}; no parity was made")
        kept = f"; {report.kept_count} had it before" if report.kept_count else ""
        anew = f", to {len(report.renewed)} of them anew: theirs was rotten" if report.renewed else ""
        app.line(f"added parity to {plural(len(report.added), 'pack')}, {size(report.added_bytes)}{anew}{kept}")
    return Exit.DAMAGE if report.refused else None


def _status(app: App, data: bool) -> int | None:
    from castore.maintenance.parity import PackParity, parity_status

    def verdict(pack: PackParity) -> str:
        if pack.error:
            return f"parity damaged: {pack.error}"
        if not pack.parity_bytes:
            return "no parity"
        if not pack.lost_cells:
            return "whole" if data else ""
        return f"{plural(pack.lost_cells, 'cell')} lost, {'can be restored' if pack.can_restore else 'TOO MANY'}"

    with app.open() as repository, app.progress("reading") as progress:
        status = parity_status(repository.handle, data=data, progress=progress)
    if app.as_json:
        app.document(status.to_json())
        return None if status.ok else Exit.DAMAGE
    table = Table(("PACK", ">BYTES", ">PARITY", ">SHARE", ">RESTORES", "STATE"))
    for pack in status.packs:
        restores = f"{pack.parity_count} of {pack.data_count + pack.parity_count}" if pack.data_count else "-"
        overhead = share(pack.parity_bytes, pack.pack_bytes)
        table.add(
            pack.pack_id[:ID_DIGITS], size(pack.pack_bytes), size(pack.parity_bytes), overhead, restores, verdict(pack)
        )
    app.table(table)
    covered = [pack for pack in status.packs if pack.parity_bytes]
    app.line(f"{len(covered)} of {plural(len(status.packs), 'pack')} protected")
    if status.orphans:
        app.line(f"note: {plural(len(status.orphans), 'parity file')} of packs that are gone; gc removes them")
    return None if status.ok else Exit.DAMAGE


def _remove(app: App) -> int | None:
    from castore.maintenance.parity import remove_parity

    with app.open() as repository:
        count, removed_bytes = remove_parity(repository.handle)
    if app.as_json:
        app.document({"removed": count, "removed_bytes": removed_bytes})
    else:
        app.line(f"removed {plural(count, 'parity file')}, {size(removed_bytes)}")
    return None
