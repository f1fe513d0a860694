"""`castore branch` and `castore tag`."""

from __future__ import annotations

from typing import Any, Literal

import click

from castore.cli.command import App, command
from castore.cli.exits import Exit
from castore.cli.history import EntryReader, LogEntry, read_refs
from castore.cli.render import ID_DIGITS, Table, clean, local_time
from castore.errors import FormatError, UsageError
from castore.format.layout import BRANCHES, TAGS, decode_ref_name
from castore.refs import Ref

RefKind = Literal["branch", "tag"]
_PLURALS: dict[RefKind, str] = {"branch": "branches", "tag": "tags"}


@command(
    "branch",
    examples="""
castore branch                         list them
castore branch exp/lr main@1200        fork at step 1200; costs no bytes
castore branch --move main 3f2a81c0    put main back to an earlier snapshot
castore branch --delete exp/lr
""",
)
@click.argument("name", required=False)
@click.argument("ref", required=False)
@click.option("-d", "--delete", is_flag=True, help="Delete branch NAME; its snapshots stay as orphans for a while.")
@click.option("--move", is_flag=True, help="Move branch NAME, which may exist, to REF.")
def branch_command(app: App, name: str | None, ref: str | None, delete: bool, move: bool) -> int | None:
    """List branches, or make branch NAME at REF (default: main)."""
    if name is None and (delete or move):
        raise UsageError("give the NAME of the branch")
    if delete and (move or ref):
        raise UsageError("--delete takes the NAME of a branch and nothing else")
    if move and ref is None:
        raise UsageError("--move takes the NAME of a branch and the REF it shall be at")
    if name is None:
        return _list_refs(app, "branch")
    with app.open() as repository:
        if delete:
            repository.delete_branch(name)
            _deleted(app, "branch", name)
        else:
            _made(app, "branch", repository.branch(name, at="main" if ref is None else ref, move=move))
    return None


@command(
    "tag",
    examples="""
castore tag                  list them
castore tag best             name the newest snapshot of main
castore tag v1 main@1200
castore tag --delete v1
""",
)
@click.argument("name", required=False)
@click.argument("ref", required=False)
@click.option("-d", "--delete", is_flag=True, help="Delete tag NAME.")
def tag_command(app: App, name: str | None, ref: str | None, delete: bool) -> int | None:
    """List tags, or name the snapshot at REF (default: main) for good: tags never move."""
    if name is None and delete:
        raise UsageError("give the NAME of the tag")
    if delete and ref:
        raise UsageError("--delete takes the NAME of a tag and nothing else")
    if name is None:
        return _list_refs(app, "tag")
    with app.open() as repository:
        if delete:
            repository.delete_tag(name)
            _deleted(app, "tag", name)
        else:
            _made(app, "tag", repository.tag(name, at="main" if ref is None else ref))
    return None


def _made(app: App, kind: RefKind, ref: Ref) -> None:
    if app.as_json:
        app.document({"kind": kind, "name": ref.name, "snapshot": ref.snapshot_id})
    else:
        app.line(f"{kind} {clean(ref.name)} is at {ref.snapshot_id[:ID_DIGITS]}")


def _deleted(app: App, kind: RefKind, name: str) -> None:
    if app.as_json:
        app.document({"kind": kind, "deleted": name})
    else:
        app.line(f"{kind} {clean(name)} deleted")


def _list_refs(app: App, kind: RefKind) -> int | None:
    backend = app.backend()
    refs = read_refs(backend)
    found = refs.branches if kind == "branch" else refs.tags
    prefix = BRANCHES if kind == "branch" else TAGS
    damaged = {name: problem for name, problem in refs.damaged.items() if name.startswith(prefix)}
    reader = EntryReader(backend, refs)
    entries = [(ref, reader.read(ref.snapshot_id)) for ref in found]
    if app.as_json:
        rows = [_ref_fields(ref, entry) for ref, entry in entries]
        app.document({_PLURALS[kind]: rows, "damaged_refs": damaged})
    elif not entries and not damaged:
        app.note(f"no {_PLURALS[kind]}")
    else:
        _draw_refs(app, entries, damaged)
    return Exit.DAMAGE if damaged or any(entry.damage for _, entry in entries) else None


def _ref_fields(ref: Ref, entry: LogEntry) -> dict[str, Any]:
    snapshot = entry.snapshot
    return {
        "name": ref.name,
        "snapshot": ref.snapshot_id,
        "step": snapshot.step if snapshot else None,
        "state": "ok" if snapshot else "damaged" if entry.damage else "gone",
    }


def _draw_refs(app: App, entries: list[tuple[Ref, LogEntry]], damaged: dict[str, str]) -> None:
    table = Table(("NAME", "SNAPSHOT", ">STEP", "SAVED", "MESSAGE"))
    for ref, entry in entries:
        snapshot = entry.snapshot
        if snapshot is None:
            table.add(
                ref.name,
                ref.snapshot_id[:ID_DIGITS],
                "",
                "",
                f"damaged: {entry.damage}" if entry.damage else "gone",
            )
            continue
        step = "" if snapshot.step is None else str(snapshot.step)
        message = snapshot.message.partition("\n")[0]
        table.add(ref.name, ref.snapshot_id[:ID_DIGITS], step, local_time(snapshot.created_at), message)
    for file_name, problem in damaged.items():
        try:
            name = decode_ref_name(file_name.rpartition("/")[2])
        except FormatError:
            name = file_name
        table.add(name, "", "", "", f"damaged: {problem}")
    app.table(table)
