"""`castore log`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from castore.cli.command import App, command, snapshot_fields
from castore.cli.exits import Exit
from castore.cli.graph import Node, draw, newest_first
from castore.cli.history import EntryReader, LogEntry, Refs, read_refs
from castore.cli.render import ID_DIGITS, age, clean, local_time, metrics_text, plural, size
from castore.errors import UsageError
from castore.ids import SnapshotId
from castore.marks import Forgotten
from castore.refs import resolve
from castore.snapshots import list_snapshot_ids

if TYPE_CHECKING:
    from castore.backend.base import Backend


@command(
    "log",
    examples="""
castore log                    the history of main
castore log exp/lr@1200 -n 5   five snapshots back from step 1200
castore log --all              every branch and tag, as a graph
castore log --orphans          what no branch or tag reaches
castore log --json | jq -r '.snapshots[].id'
""",
)
@click.argument("ref", required=False)
@click.option("--all", "-a", "everything", is_flag=True, help="All branches and tags, as a graph.")
@click.option("--orphans", is_flag=True, help="Only snapshots that no ref reaches; with --all, those too.")
@click.option("-n", "--limit", type=click.IntRange(min=1), metavar="COUNT", help="Show at most COUNT snapshots.")
def log_command(app: App, ref: str | None, everything: bool, orphans: bool, limit: int | None) -> int | None:
    """List snapshots, newest first, from REF (default: main) along first parents.

    A line shows the id, the step, the time, the raw bytes that were new and what they took in packs, the
    metrics, the branches and tags, and the message. Forgotten snapshots are counted and passed over; a parent
    that is gone and was not forgotten is shown as gone.
    """
    if ref is not None and (everything or orphans):
        raise UsageError("give either REF, or --all and --orphans, which look at every ref")
    backend = app.backend()
    refs = read_refs(backend)
    if everything or orphans:
        reached, unreached = _everything(backend, refs)
        chosen = (reached if everything else {}) | (unreached if orphans else {})
        entries = iter(_ordered(chosen))
    else:
        start = resolve(backend, "main" if ref is None else ref)
        entries = _line_of(EntryReader(backend, refs, start=start), start)
    if app.as_json:
        return _log_json(app, entries, refs, limit)
    for name, problem in refs.damaged.items():
        app.note(f"damaged ref {name}: {clean(problem)}")
    damaged = _log_text(app, entries, refs, limit, graph=everything or orphans)
    return Exit.DAMAGE if damaged or refs.damaged else None


def _log_json(app: App, entries: Iterator[LogEntry], refs: Refs, limit: int | None) -> int | None:
    snapshots: list[dict[str, Any]] = []
    gone: list[str] = []
    forgotten: list[str] = []
    damaged: dict[str, str] = {}
    for entry in entries:
        if entry.snapshot is not None:
            if len(snapshots) == limit:
                break
            snapshots.append(snapshot_fields(entry.snapshot) | {"refs": refs.here(entry.id)})
        elif entry.is_gap:
            forgotten.append(entry.id)
        elif entry.damage:
            damaged[entry.id] = entry.damage
        else:
            gone.append(entry.id)
    app.document(
        {
            "snapshots": snapshots,
            "forgotten": forgotten,
            "gone": gone,
            "damaged": damaged,
            "damaged_refs": refs.damaged,
        }
    )
    return Exit.DAMAGE if damaged or refs.damaged else None


def _log_text(app: App, entries: Iterable[LogEntry], refs: Refs, limit: int | None, *, graph: bool) -> bool:
    """Print the lines; whether anything was damaged."""
    now_s = time.time()
    shown, any_damage = 0, False
    gap: list[Forgotten] = []
    for before, prefix, entry in _with_graph(entries) if graph else (([], "*", entry) for entry in entries):
        if shown == limit:
            break
        if entry.mark is not None and entry.is_gap:
            gap.append(entry.mark)
            continue
        _log_gap(app, gap)
        shown += entry.snapshot is not None
        any_damage |= bool(entry.damage)
        for line in before:
            app.line(line)
        app.line(f"{prefix} {_log_line(app, entry, refs, now_s)}".rstrip())
    _log_gap(app, gap)
    if not shown and not any_damage:
        app.note("no snapshots")
    return any_damage


def _log_gap(app: App, gap: list[Forgotten]) -> None:
    """One line for snapshots that were forgotten one after another."""
    if not gap:
        return
    count = sum(mark.count for mark in gap)
    steps = sorted(mark.step for mark in gap if mark.step is not None and count == len(gap))
    named = "" if not steps else f" (step {steps[0]})" if len(steps) == 1 else f" (steps {steps[0]} to {steps[-1]})"
    app.line(f": {plural(count, 'snapshot')} forgotten{named}")
    gap.clear()


def _with_graph(entries: Iterable[LogEntry]) -> Iterator[tuple[list[str], str, LogEntry]]:
    """Lines of history are drawn past forgotten snapshots, which come last, to be counted."""
    everything = {entry.id: entry for entry in entries}
    by_id = {
        str(entry.id): replace(entry, parents=_kept_parents(entry, everything))
        for entry in everything.values()
        if not entry.is_gap
    }
    nodes = [_node(entry) for entry in by_id.values()]
    for node, (before, prefix) in zip(nodes, draw(nodes), strict=True):
        yield before, prefix, by_id[node.id]
    for entry in everything.values():
        if entry.is_gap:
            yield [], "", entry


def _kept_parents(entry: LogEntry, everything: Mapping[SnapshotId, LogEntry]) -> tuple[SnapshotId, ...]:
    """Its parents; in the place of forgotten ones, what came before those."""
    kept: dict[SnapshotId, None] = {}
    pending, passed = list(reversed(entry.parents)), set[SnapshotId]()
    while pending:
        parent = pending.pop()
        found = everything.get(parent)
        if found is None or not found.is_gap:
            kept[parent] = None
        elif parent not in passed:
            passed.add(parent)
            pending.extend(reversed(found.parents))
    return tuple(kept)


def _log_line(app: App, entry: LogEntry, refs: Refs, now_s: float) -> str:
    short = app.style(entry.id[:ID_DIGITS], fg="yellow")
    names = refs.names_of(entry.id)
    decoration = app.style(f"({clean(', '.join(names))})", fg="green") if names else ""
    snapshot = entry.snapshot
    if snapshot is None:
        what = app.style(f"damaged: {clean(entry.damage)}", fg="red") if entry.damage else "gone"
        return "  ".join(filter(None, (short, decoration, what)))
    step = "-" if snapshot.step is None else str(snapshot.step)
    when = f"{local_time(snapshot.created_at)} ({age(snapshot.created_at, now_s)})"
    cost = f"new {size(snapshot.new_bytes):>9}, stored {size(snapshot.stored_bytes):>9}"
    pieces = (
        short,
        f"step {step:<6}",
        f"{when:<28}",
        cost,
        metrics_text(snapshot.metrics),
        decoration,
        f"thinned of {clean(', '.join(snapshot.dropped))}" if snapshot.dropped else "",
        "forgotten" if entry.mark is not None and not names else "",
        clean(snapshot.message.partition("\n")[0]),
    )
    return "  ".join(piece for piece in pieces if piece)


def _line_of(reader: EntryReader, start: SnapshotId) -> Iterator[LogEntry]:
    """A snapshot and its first parents, read as they are asked for."""
    current: SnapshotId | None = start
    seen: set[SnapshotId] = set()
    while current is not None and current not in seen:
        seen.add(current)  # markers, unlike snapshots, could name each other
        entry = reader.read(current)
        yield entry
        current = entry.parents[0] if entry.parents else None


def _everything(backend: Backend, refs: Refs) -> tuple[dict[str, LogEntry], dict[str, LogEntry]]:
    """What the refs reach, and the rest but for what was forgotten; parents that are gone go with the first."""
    reader = EntryReader(backend, refs)
    reached: dict[str, LogEntry] = {}
    pending = [ref.snapshot_id for ref in (*refs.branches, *refs.tags)]
    while pending:
        snapshot_id = pending.pop()
        if snapshot_id not in reached:
            reached[snapshot_id] = reader.read(snapshot_id)
            pending.extend(reached[snapshot_id].parents)
    others = [found for found in list_snapshot_ids(backend) if found not in reached]
    unreached = {found: reader.read(found) for found in others}
    return reached, {found: entry for found, entry in unreached.items() if not entry.is_gap}


def _ordered(entries: dict[str, LogEntry]) -> list[LogEntry]:
    return [entries[node.id] for node in newest_first({key: _node(entry) for key, entry in entries.items()})]


def _node(entry: LogEntry) -> Node:
    # What cannot be read has no time: it comes after whatever names it.
    time_ns = entry.mark.time_ns if entry.mark else 0
    if entry.snapshot:
        time_ns = int(entry.snapshot.created_at.timestamp() * 1e9)
    return Node(entry.id, entry.parents, time_ns)
