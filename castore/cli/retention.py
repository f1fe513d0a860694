"""`castore forget`, `castore undelete` and `castore policy`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from castore.cli.command import App, command
from castore.cli.exits import Exit
from castore.cli.render import ID_DIGITS, Table, age, clean, local_time, plural, size
from castore.errors import UsageError

if TYPE_CHECKING:
    from castore.api import Repository
    from castore.checkpoint.undelete import ForgottenSnapshot
    from castore.maintenance.forget import ForgetReport
    from castore.maintenance.policy import Policy
    from castore.maintenance.retention import Keep
    from castore.maintenance.thin import ThinReport

AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class KeepOptions:
    """The --keep-… options as they were given."""

    last: int | None
    every: int | None
    within: str | None
    hourly: int | None
    daily: int | None
    weekly: int | None
    best: Sequence[str]
    branches: Sequence[str]

    @staticmethod
    def take(arguments: dict[str, Any]) -> KeepOptions:
        """Take the options out of a command's arguments."""
        names = ("last", "every", "within", "hourly", "daily", "weekly", "best", "branch")
        return KeepOptions(*(arguments.pop(f"keep_{name}") for name in names))

    def keep(self) -> Keep | None:
        """The rules; None when no option was given."""
        given = (self.last, self.every, self.within, self.hourly, self.daily, self.weekly, self.best, self.branches)
        if not any(given):
            return None
        from castore.maintenance.retention import Keep

        return Keep(
            last=self.last or 0,
            every=self.every or 0,
            within=self.within,
            hourly=self.hourly or 0,
            daily=self.daily or 0,
            weekly=self.weekly or 0,
            best=tuple(_best_rule(text) for text in self.best),
            branches=tuple(self.branches),
        )


def _best_rule(text: str) -> tuple[str, Literal["min", "max"], int]:
    """`val_loss:min:2` → ("val_loss", "min", 2); a metric may contain colons."""
    rest, _, count = text.rpartition(":")
    metric, _, end = rest.rpartition(":")
    if not metric or end not in ("min", "max") or not count.isdecimal():
        raise UsageError(f"--keep-best: expected METRIC:min:N or METRIC:max:N, found {text!r}")
    return metric, "min" if end == "min" else "max", int(count)


def keep_options(function: AnyFunction) -> AnyFunction:
    """The rules of retention, for `forget` and `policy`."""
    count = click.IntRange(min=1)
    options = (
        click.option("--keep-last", type=count, metavar="N", help="The newest N of each branch."),
        click.option("--keep-every", type=count, metavar="K", help="Every step that is a multiple of K."),
        click.option("--keep-within", metavar="TIME", help="Up to TIME (7d, 12h) before the newest of the branch."),
        click.option("--keep-hourly", type=count, metavar="N", help="The newest of each of N hours (UTC)."),
        click.option("--keep-daily", type=count, metavar="N", help="The same by day."),
        click.option("--keep-weekly", type=count, metavar="N", help="The same by week, from Monday."),
        click.option(
            "--keep-best", multiple=True, metavar="METRIC:min|max:N", help="The N best by a metric; may be repeated."
        ),
        click.option(
            "--keep-branch", multiple=True, metavar="PATTERN", help="All on the branches that match; may be repeated."
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


def thin_options(function: AnyFunction) -> AnyFunction:
    """What to drop from snapshots that are kept."""
    thin = click.option("--thin", multiple=True, metavar="GLOB", help="Keep snapshots but drop these leaves.")
    older = click.option(
        "--older-than", metavar="AGE", help="Thin what is behind the newest AGE of each branch (20), or older (7d)."
    )
    return thin(older(function))


def _age(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.isdecimal() else text


# ---- forget ------------------------------------------------------------------------------------------------


@command(
    "forget",
    examples="""
castore forget --keep-last 3 --keep-every 1000 --keep-best val_loss:min:2 --dry-run
castore forget --keep-within 7d --keep-daily 30
castore forget --thin 'optimizer/**' --older-than 20   full state for 20, weights for the rest
castore forget 3f2a81c0 main@1200                      these, damaged or not
castore forget --thin 'optimizer/**' main~3            thin just this one
""",
)
@click.argument("refs", nargs=-1, metavar="[REF]...")
@keep_options
@thin_options
@click.option("-n", "--dry-run", is_flag=True, help="Say what would be forgotten, and why, and change nothing.")
def forget_command(
    app: App, *, refs: Sequence[str], thin: Sequence[str], older_than: str | None, dry_run: bool, **keep: Any
) -> int | None:
    """Forget snapshots: those that no --keep rule keeps, or the REFs. Frees nothing; `castore gc` does.

    Rules are united and looked at for each branch. The head of a branch and every tagged snapshot stay. With
    --thin, snapshots stay and lose leaves. Until gc runs, `castore undelete` brings everything back.
    """
    rules = KeepOptions.take(keep).keep()
    if refs and (rules is not None or older_than is not None):
        raise UsageError("give either REFs, or rules for all snapshots")
    if bool(thin) != bool(older_than) and not refs:
        raise UsageError("--thin GLOB and --older-than AGE go together; or name the REFs to thin")
    if not refs and rules is None and not thin:
        raise UsageError("say what to keep (--keep-last 3), what to thin, or which REFs to forget; -h shows the rules")
    forgotten: ForgetReport | None = None
    thinned: ThinReport | None = None
    with app.open() as repository:
        if refs and thin:
            thinned = repository.thin(thin, ids=refs, dry_run=dry_run)
        elif refs:
            forgotten = repository.forget(ids=refs, dry_run=dry_run)
        if rules is not None:
            with app.progress("forgetting") as progress:
                forgotten = repository.forget(rules, dry_run=dry_run, progress=progress)
        if thin and not refs:
            with app.progress("thinning") as progress:
                thinned = repository.thin(thin, older_than=_age(older_than), dry_run=dry_run, progress=progress)
    if app.as_json:
        app.document(
            {
                "dry_run": dry_run,
                "forget": forgotten.to_json() if forgotten else None,
                "thin": thinned.to_json() if thinned else None,
            }
        )
    else:
        draw_retention(app, forgotten, thinned)
    return Exit.DAMAGE if forgotten is not None and forgotten.unreadable else None


def draw_retention(app: App, forgotten: ForgetReport | None, thinned: ThinReport | None) -> None:
    """What was forgotten and thinned, as tables and a line each."""
    if forgotten is not None:
        _draw_forgotten(app, forgotten)
    if thinned is not None:
        _draw_thinned(app, thinned)


def _draw_forgotten(app: App, report: ForgetReport) -> None:
    table = Table(("", "SNAPSHOT", ">STEP", "SAVED", "ON", "WHY"))
    drop = "drop" if report.dry_run else "forgotten"
    for what, choices in (("keep", report.kept), (drop, report.dropped)):
        for choice in choices:
            table.add(
                what,
                choice.snapshot_id[:ID_DIGITS],
                "" if choice.step is None else str(choice.step),
                local_time(choice.created_at) if choice.created_at.timestamp() else "",
                ", ".join(choice.lines),
                ", ".join(choice.reasons),
            )
    if table.rows:
        app.table(table)
    for snapshot_id, why in report.unreadable:
        app.note(f"{snapshot_id[:ID_DIGITS]} cannot be read, and what lies behind it was not looked at: {clean(why)}")
    verb = "would forget" if report.dry_run else "forgot"
    kept = f", kept {len(report.kept)}" if report.kept else ""
    app.line(f"{verb} {plural(len(report.dropped), 'snapshot')}{kept}")


def _draw_thinned(app: App, report: ThinReport) -> None:
    table = Table(("", "SNAPSHOT", ">STEP", "BRANCH", ">LEAVES", ">BYTES", "DROPPED"))
    for choice in report.thinned:
        table.add(
            "thin" if report.dry_run else "thinned",
            choice.snapshot_id[:ID_DIGITS],
            "" if choice.step is None else str(choice.step),
            choice.branch,
            str(choice.leaf_count),
            size(choice.raw_bytes),
            ", ".join(choice.dropped),
        )
    if table.rows:
        app.table(table)
    if report.skipped:
        app.note(f"{plural(len(report.skipped), 'snapshot')} stayed: {clean(_reasons(report.skipped))}")
    verb = "would thin" if report.dry_run else "thinned"
    raw_bytes = sum(choice.raw_bytes for choice in report.thinned)
    app.line(f"{verb} {plural(len(report.thinned), 'snapshot')} by {size(raw_bytes)} raw")


def _reasons(skipped: Iterable[tuple[str, str]]) -> str:
    counts: dict[str, int] = {}
    for _, why in skipped:
        counts[why] = counts.get(why, 0) + 1
    return ", ".join(f"{why} ({count})" for why, count in counts.items())


# ---- undelete ----------------------------------------------------------------------------------------------


@command(
    "undelete",
    examples="""
castore undelete                list what can be brought back
castore undelete 3f2a81c0       a forgotten snapshot, or the dropped leaves of a thinned one
castore undelete --all
""",
)
@click.argument("ids", nargs=-1, metavar="[ID]...")
@click.option("--all", "-a", "everything", is_flag=True, help="Every forgotten snapshot that is still there.")
def undelete_command(app: App, ids: Sequence[str], everything: bool) -> int | None:
    """Bring back snapshots that were forgotten, or make thinned ones whole, while gc has not freed them.

    Without arguments: list what was forgotten or thinned. Exits with 3 when something cannot come back.
    """
    if ids and everything:
        raise UsageError("give either IDs or --all")
    with app.open() as repository:
        if not ids and not everything:
            _list_undeletable(app, repository)
            return None
        report = repository.undelete(None if everything else ids)
    if app.as_json:
        app.document(report.to_json())
    else:
        for snapshot_id, was in report.restored:
            app.line(f"{snapshot_id[:ID_DIGITS]} is {'back' if was == 'forgotten' else 'whole again'}")
        for snapshot_id, why in report.lost:
            app.line(f"{snapshot_id[:ID_DIGITS]} {app.style('is lost', fg='red')}: {clean(why)}")
        if not report.restored and not report.lost:
            app.note("nothing was forgotten")
    return Exit.DAMAGE if report.lost else None


def _list_undeletable(app: App, repository: Repository) -> None:
    from castore.marks import thinnings

    forgotten = repository.forgotten()
    overlays = thinnings(repository.handle.backend)
    if app.as_json:
        thinned = [
            {"id": mark.snapshot_id, "dropped": list(mark.dropped), "thinned_ns": mark.thinned_ns}
            for mark in overlays.values()
        ]
        app.document({"forgotten": [found.to_json() for found in forgotten], "thinned": thinned})
        return
    there = [found for found in forgotten if found.is_there]
    if there:
        app.table(_forgotten_table(there))
    for mark in overlays.values():
        app.line(f"{mark.snapshot_id[:ID_DIGITS]} thinned of {clean(', '.join(mark.dropped))}")
    gone = len(forgotten) - len(there)
    if gone:
        app.note(f"{plural(gone, 'forgotten snapshot')} more: gc has freed them")
    if not forgotten and not overlays:
        app.note("nothing was forgotten or thinned")


def _forgotten_table(forgotten: Iterable[ForgottenSnapshot]) -> Table:
    table = Table(("SNAPSHOT", ">STEP", "BRANCH", "SAVED", "FORGOTTEN", "WHY"))
    for found in forgotten:
        table.add(
            found.id[:ID_DIGITS],
            "" if found.step is None else str(found.step),
            found.branch,
            local_time(found.created_at) if found.created_at.timestamp() else "",
            f"{age(found.forgotten_at, time.time())} ago",
            found.reason,
        )
    return table


# ---- policy ------------------------------------------------------------------------------------------------


@command(
    "policy",
    examples="""
castore policy                                              show it
castore policy set --keep-last 5 --keep-every 1000 --every-saves 50
castore policy set --keep-within 30d --thin 'optimizer/**' --older-than 20
castore policy apply --dry-run
castore policy clear
""",
)
@click.argument("action", type=click.Choice(["show", "set", "apply", "clear"]), default="show")
@keep_options
@thin_options
@click.option(
    "--every-saves", type=click.IntRange(min=1), metavar="N", help="Apply it after every N saves, whoever makes them."
)
@click.option("-n", "--dry-run", is_flag=True, help="With apply: change nothing.")
def policy_command(
    app: App,
    *,
    action: Literal["show", "set", "apply", "clear"],
    thin: Sequence[str],
    older_than: str | None,
    every_saves: int | None,
    dry_run: bool,
    **keep: Any,
) -> None:
    """Show, set, apply or clear the policy stored in the repository.

    `castore gc --auto` applies it, and with --every-saves so does every N-th save. Applying it forgets and
    thins as `castore forget` does; gc frees.
    """
    rules = KeepOptions.take(keep).keep()
    if action != "set" and (rules is not None or thin or older_than or every_saves):
        raise UsageError(f"`castore policy {action}` takes no rules; did you mean `castore policy set`?")
    if dry_run and action != "apply":
        raise UsageError("--dry-run goes with `castore policy apply`")
    with app.open() as repository:
        if action == "apply":
            _apply(app, repository, dry_run=dry_run)
        elif action == "clear":
            _cleared(app, found=repository.clear_policy())
        elif action == "set":
            _draw_policy(
                app, repository.set_policy(rules, thin=thin, older_than=_age(older_than), every_saves=every_saves)
            )
        else:
            _draw_policy(app, repository.policy())


def _apply(app: App, repository: Repository, *, dry_run: bool) -> None:
    with app.progress("applying the policy") as progress:
        report = repository.apply_policy(dry_run=dry_run, progress=progress)
    if app.as_json:
        app.document({"dry_run": dry_run, **(report.to_json() if report else {"forget": None, "thin": None})})
    elif report is None:
        app.note("no policy is stored")
    else:
        draw_retention(app, report.forget, report.thin)


def _cleared(app: App, *, found: bool) -> None:
    if app.as_json:
        app.document({"cleared": found})
    else:
        app.line("policy cleared" if found else "no policy was stored")


def _draw_policy(app: App, policy: Policy | None) -> None:
    if app.as_json:
        app.document({"policy": policy.to_json() if policy else None})
        return
    if policy is None:
        app.note("no policy is stored; `castore policy set` stores one")
        return
    if policy.keep is not None:
        app.line(f"keep    {clean(policy.keep.text())}")
    if policy.thin:
        behind = "the newest " if isinstance(policy.older_than, int) else ""
        app.line(f"thin    {clean(', '.join(policy.thin))} of what is older than {behind}{policy.older_than}")
    when = f"after every {plural(policy.every_saves, 'save')}" if policy.every_saves else "when asked for"
    app.line(f"applied {when}, and by `castore gc --auto`")
