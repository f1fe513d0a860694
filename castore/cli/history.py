"""`castore log`, `castore branch` and `castore tag`.

History is read from ref and snapshot files alone, one by one, so that a damaged one costs its own line and no
others.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import click

from castore.cli.command import App, command, snapshot_fields
from castore.cli.exits import Exit
from castore.cli.graph import Node, draw, newest_first
from castore.cli.render import ID_DIGITS, Table, age, clean, local_time, metrics_text, plural, size
from castore.errors import DamageError, FormatError, UnknownRefError, UsageError
from castore.format.layout import BRANCHES, TAGS, decode_ref_name
from castore.ids import SnapshotId
from castore.marks import Forgotten, forgotten_ids, read_forgotten, read_thinning, thinned_ids
from castore.refs import Ref, read_branch, read_tag, resolve
from castore.snapshots import Snapshot, list_snapshot_ids, make_snapshot, read_record

if TYPE_CHECKING:
    from castore.api import Repository

RefKind = Literal["branch", "tag"]
_NOWHERE: dict[str, list[str]] = {"branches": [], "tags": []}
_PLURALS: dict[RefKind, str] = {"branch": "branches", "tag": "tags"}


@dataclass(frozen=True, slots=True)
class Refs:
    """Every ref that can be read, and the file names of those that cannot."""

    branches: list[Ref] = field(default_factory=list)
    tags: list[Ref] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)
    """File name → what is wrong."""
    at: dict[SnapshotId, dict[str, list[str]]] = field(default_factory=dict)
    """Snapshot → {"branches": names, "tags": names}: a log asks for it on every line."""

    def names_of(self, snapshot_id: SnapshotId) -> list[str]:
        """What decorates a snapshot: branches, then "tag: NAME"."""
        here = self.at.get(snapshot_id, _NOWHERE)
        return here["branches"] + [f"tag: {name}" for name in here["tags"]]


def read_refs(repository: Repository) -> Refs:
    """All branches and tags, by name; damage is noted and not raised."""
    refs = Refs()
    backend = repository.handle.backend
    kinds = (("branches", BRANCHES, refs.branches, read_branch), ("tags", TAGS, refs.tags, read_tag))
    for kind, prefix, found, read in kinds:
        for info in backend.list(prefix):
            try:
                name = decode_ref_name(info.name.removeprefix(prefix))
                snapshot_id = read(backend, name)
            except DamageError as error:
                refs.damaged[info.name] = str(error)
                continue
            if snapshot_id is not None:
                found.append(Ref(name, snapshot_id, info.modified_ns))
                refs.at.setdefault(snapshot_id, {"branches": [], "tags": []})[kind].append(name)
    return refs


# ---- log ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One snapshot that history names: there, forgotten, gone, or damaged."""

    id: SnapshotId
    snapshot: Snapshot | None
    damage: str = ""
    mark: Forgotten | None = None
    """Of a forgotten one: history goes on behind it."""
    parents: tuple[SnapshotId, ...] = ()
    """Empty when the snapshot cannot be read."""

    @property
    def is_gap(self) -> bool:
        """Whether it is passed over."""
        return self.mark is not None and self.snapshot is None


class EntryReader:
    """Reads log entries; which snapshots have marks is listed once."""

    def __init__(self, repository: Repository, refs: Refs, *, start: SnapshotId | None = None) -> None:
        self._backend = repository.handle.backend
        self._shown = {*refs.at, start}
        """What a ref names is there even when it has a marker; so is what was asked for."""
        self._forgotten = forgotten_ids(self._backend)
        self._thinned = thinned_ids(self._backend)

    def read(self, snapshot_id: SnapshotId) -> LogEntry:
        """One entry; damage is noted and not raised."""
        mark = None
        try:
            if snapshot_id in self._forgotten:
                mark = read_forgotten(self._backend, snapshot_id)
                if mark is not None and snapshot_id not in self._shown:
                    return LogEntry(snapshot_id, None, "", mark, mark.parents)
            overlay = read_thinning(self._backend, snapshot_id) if snapshot_id in self._thinned else None
            # Not repository.snapshot(id): an id that is looked up as a ref lists all snapshots.
            record = read_record(self._backend, snapshot_id)
        except UnknownRefError:
            return LogEntry(snapshot_id, None)
        except DamageError as error:
            return LogEntry(snapshot_id, None, str(error))
        snapshot = make_snapshot(snapshot_id, record, lambda _: (), overlay)
        return LogEntry(snapshot_id, snapshot, "", mark, record.parents)


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
    with app.open() as repository:
        refs = read_refs(repository)
        if everything or orphans:
            reached, unreached = _everything(repository, refs)
            chosen = (reached if everything else {}) | (unreached if orphans else {})
            entries = iter(_ordered(chosen))
        else:
            start = resolve(repository.handle.backend, "main" if ref is None else ref)
            entries = _line_of(EntryReader(repository, refs, start=start), start)
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
            snapshots.append(snapshot_fields(entry.snapshot) | {"refs": refs.at.get(entry.id, _NOWHERE)})
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


def _everything(repository: Repository, refs: Refs) -> tuple[dict[str, LogEntry], dict[str, LogEntry]]:
    """What the refs reach, and the rest but for what was forgotten; parents that are gone go with the first."""
    reader = EntryReader(repository, refs)
    reached: dict[str, LogEntry] = {}
    pending = [ref.snapshot_id for ref in (*refs.branches, *refs.tags)]
    while pending:
        snapshot_id = pending.pop()
        if snapshot_id not in reached:
            reached[snapshot_id] = reader.read(snapshot_id)
            pending.extend(reached[snapshot_id].parents)
    others = [found for found in list_snapshot_ids(repository.handle.backend) if found not in reached]
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


# ---- branch and tag ----------------------------------------------------------------------------------------


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
    with app.open() as repository:
        if name is None:
            return _list_refs(app, repository, "branch")
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
    with app.open() as repository:
        if name is None:
            return _list_refs(app, repository, "tag")
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


def _list_refs(app: App, repository: Repository, kind: RefKind) -> int | None:
    refs = read_refs(repository)
    found = refs.branches if kind == "branch" else refs.tags
    prefix = BRANCHES if kind == "branch" else TAGS
    damaged = {name: problem for name, problem in refs.damaged.items() if name.startswith(prefix)}
    reader = EntryReader(repository, refs)
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
