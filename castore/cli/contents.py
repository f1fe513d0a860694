"""`castore show` and `castore diff`: what a snapshot holds, and how two of them differ."""

from __future__ import annotations

import difflib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

import click

from castore.cli.command import App, command, snapshot_fields
from castore.cli.history import read_refs
from castore.cli.render import (
    ID_DIGITS,
    Table,
    age,
    clean,
    cost_text,
    jsonable,
    local_time,
    metrics_text,
    number,
    plural,
    shape_text,
    share,
    size,
)
from castore.errors import PathNotFoundError, UsageError
from castore.format.paths import compile_glob

if TYPE_CHECKING:
    from castore.api import Repository
    from castore.checkpoint.diff import Diff, LeafDiff
    from castore.cli.leaf import LeafDetail, StoredChunk
    from castore.snapshots import Leaf, Snapshot

_NEAR_MAX = 5

Order = Literal["path", "l2", "max", "bytes"]


# ---- show --------------------------------------------------------------------------------------------------


@command(
    "show",
    examples="""
castore show                                the newest snapshot of main
castore show main~1 'model/**'              some of its leaves
castore show best model/embeddings.weight   one leaf, and how its chunks are stored
""",
)
@click.argument("ref", default="main")
@click.argument("path", required=False)
def show_command(app: App, ref: str, path: str | None) -> None:
    """Show the snapshot REF (default: main) and its leaves, or only the leaf or the leaves that PATH names.

    PATH is the path of a leaf, or a glob: * within a level, ** across levels. A single leaf is shown with its
    value, or a summary of its numbers, and how each of its chunks is stored.
    """
    from castore.cli.leaf import describe_leaf, find_entry

    with app.open() as repository:
        snapshot = repository.snapshot(ref)
        entry = find_entry(repository, snapshot.id, path) if path is not None else None
        if entry is not None:
            _show_leaf(app, snapshot, describe_leaf(repository, snapshot.id, entry))
        else:
            _show_snapshot(app, repository, snapshot, path)


def _show_snapshot(app: App, repository: Repository, snapshot: Snapshot, path: str | None) -> None:
    leaves = choose_leaves(snapshot, path)
    if app.as_json:
        refs = read_refs(repository)
        app.document(
            snapshot_fields(snapshot)
            | {"refs": refs.names_of(snapshot.id), "leaves": [asdict(leaf) for leaf in leaves]}
        )
        return
    if path is None:
        _show_facts(app, repository, snapshot)
        app.line()
    table = Table(("PATH", "KIND", "DTYPE", "SHAPE", ">BYTES", ">CHUNKS"))
    for leaf in leaves:
        shape = shape_text(leaf.shape) if leaf.dtype else ""
        table.add(
            leaf.path or "(root)",
            leaf.kind,
            leaf.dtype,
            shape,
            size(leaf.raw_bytes),
            "dropped" if leaf.dropped else str(leaf.chunk_count or "-"),
        )
    app.table(table)


def choose_leaves(snapshot: Snapshot, path: str | None) -> list[Leaf]:
    """The leaves that a glob matches. Raises PathNotFoundError with near matches."""
    leaves = snapshot.leaves
    if path is None:
        return list(leaves)
    match = compile_glob(path)
    chosen = [leaf for leaf in leaves if match(leaf.path)]
    if chosen:
        return chosen
    near = difflib.get_close_matches(path, [leaf.path for leaf in leaves], n=_NEAR_MAX, cutoff=0.4)
    advice = f"did you mean {', '.join(near)}?" if near else f"`castore show {snapshot.id[:ID_DIGITS]}` lists the paths"
    raise PathNotFoundError(f"snapshot {snapshot.id[:ID_DIGITS]} has no leaf {path!r}; {advice}", near)


def _show_facts(app: App, repository: Repository, snapshot: Snapshot) -> None:
    names = read_refs(repository).names_of(snapshot.id)
    facts = {
        "snapshot": snapshot.id,
        "state": snapshot.state_id,
        "parents": " ".join(snapshot.parents) or "none",
        "saved to": snapshot.branch,
        "refs": ", ".join(names),
        "step": "" if snapshot.step is None else str(snapshot.step),
        "time": f"{local_time(snapshot.created_at)} ({age(snapshot.created_at, time.time())})",
        "metrics": metrics_text(snapshot.metrics),
        "bytes": cost_text(snapshot),
        "leaves": str(snapshot.leaf_count),
        "thinned": ", ".join(snapshot.dropped),
        "software": snapshot.software,
    }
    for name, text in facts.items():
        if text:
            app.line(f"{name:<9} {clean(text)}")
    for key, value in snapshot.metadata.items():
        app.line(f"{'metadata':<9} {clean(key)}={clean(_json_text(value))}")
    for number_of_line, line in enumerate(snapshot.message.splitlines()):
        app.line(f"{'' if number_of_line else 'message':<9} {clean(line)}")


def _json_text(value: Any) -> str:
    import json

    return json.dumps(jsonable(value), ensure_ascii=False)


def _show_leaf(app: App, snapshot: Snapshot, leaf: LeafDetail) -> None:
    if app.as_json:
        fields = asdict(leaf) | {"snapshot": snapshot.id, "stored_bytes": leaf.stored_bytes}
        if not fields.pop("has_value"):
            fields.pop("value")
        app.document(fields)
        return
    from castore.cli.leaf import value_text

    facts = {
        "path": leaf.path or "(root)",
        "kind": leaf.kind,
        "refers to": leaf.target,
        "dtype": leaf.dtype,
        "shape": shape_text(leaf.shape) if leaf.dtype else "",
        "bytes": f"raw {size(leaf.raw_bytes)}, {_whereabouts(leaf)}",
        "digest": leaf.digest,
        "value": value_text(leaf.value) if leaf.has_value else "",
        "numbers": _summary_text(leaf.summary),
        "first": " ".join(
            number(value) if isinstance(value, int | float) else str(value) for value in leaf.summary.get("first", ())
        ),
        "problem": leaf.problem,
    }
    for name, text in facts.items():
        if text:
            app.line(f"{name:<9} {clean(text)}")
    if leaf.chunks:
        app.line()
        app.table(_chunk_table(leaf.chunks))


def _whereabouts(leaf: LeafDetail) -> str:
    if leaf.dropped:
        return "dropped"
    return f"stored {size(leaf.stored_bytes)}" if leaf.chunks else "in the manifest"


def _summary_text(summary: Mapping[str, Any]) -> str:
    always = ("min", "max", "mean", "std")
    return " ".join(
        f"{key}={number(value)}" for key, value in summary.items() if key in always or (key != "first" and value)
    )


def _chunk_table(chunks: Sequence[StoredChunk]) -> Table:
    table = Table((">#", "CHUNK", ">RAW", ">STORED", "CODEC", "BASE", ">DEPTH", "PACK", ">OFFSET", ">COPIES"))
    for index, chunk in enumerate(chunks):
        table.add(
            str(index),
            chunk.chunk_id[:ID_DIGITS],
            size(chunk.raw_bytes),
            size(chunk.stored_bytes),
            chunk.codec + (" (run)" if chunk.in_run else ""),
            (chunk.base or "-")[:ID_DIGITS],
            str(chunk.depth),
            chunk.pack[:ID_DIGITS],
            str(chunk.offset),
            str(chunk.copies),
        )
    return table


# ---- diff --------------------------------------------------------------------------------------------------


@command(
    "diff",
    examples="""
castore diff                          the newest snapshot of main against its parent
castore diff main~5 main --stat       totals only
castore diff a1b2 c3d4 --sort l2 --path 'model/**'
castore diff main --no-values         compare ids only: fast, needs neither numpy nor torch
""",
)
@click.argument("refs", nargs=-1, metavar="[A] [B]")
@click.option("--stat", is_flag=True, help="Totals only.")
@click.option("--values/--no-values", default=True, help="Read the changed leaves and compare their numbers (default).")
@click.option("-p", "--path", "paths", multiple=True, metavar="GLOB", help="Only leaves that match.")
@click.option(
    "--sort",
    "order",
    type=click.Choice(["path", "l2", "max", "bytes"]),
    default="path",
    show_default=True,
    help="Largest first.",
)
@click.option("--all", "-a", "everything", is_flag=True, help="List leaves that are the same, too.")
def diff_command(
    app: App,
    *,
    refs: Sequence[str],
    stat: bool,
    values: bool,
    paths: Sequence[str],
    order: Order,
    everything: bool,
) -> None:
    """Say what changed from snapshot A to snapshot B (default: main); A is B's parent unless it is given.

    The table lists leaves added (+), removed (-) and changed (~), how many of their chunks changed, the
    largest absolute difference, the relative L2 difference ||B-A||/||A||, and the cosine. Exits with 0 in
    either case.
    """
    if len(refs) > 2:
        raise UsageError(f"expected at most two refs, found {len(refs)}")
    with app.open() as repository:
        b = repository.snapshot(refs[-1] if refs else "main")
        a = repository.snapshot(refs[0]) if len(refs) == 2 else repository.snapshot(_parent_of(b))
        with app.progress("comparing") as progress:
            diff: Diff = repository.diff(
                a.id, b.id, paths=list(paths) or None, values=values and not stat, progress=progress
            )
    statuses = ("added", "removed", "changed", "same") if everything else ("added", "removed", "changed")
    leaves = sorted((leaf for leaf in diff.leaves if leaf.status in statuses), key=_ORDERS[order])
    if app.as_json:
        fields = diff.to_json()
        rows = {row["path"]: row for row in fields.pop("leaves")}
        app.document(
            fields | {"totals": _totals(diff)} | ({} if stat else {"leaves": [rows[leaf.path] for leaf in leaves]})
        )
        return
    if leaves and not stat:
        app.table(_diff_table(leaves, values=values))
        app.line()
    _draw_totals(app, diff, a, b)


def _parent_of(snapshot: Snapshot) -> str:
    """Its parent, or what came before that when it was forgotten."""
    if not snapshot.parents:
        raise UsageError(f"snapshot {snapshot.id[:ID_DIGITS]} has no parent; name the two snapshots to compare")
    return f"{snapshot.id}~1"


def _descending(value: float | None) -> float:
    """Sort key: the largest first, what was not computed last."""
    return math.inf if value is None or math.isnan(value) else -value


_ORDERS: Mapping[Order, Callable[[LeafDiff], Any]] = {
    "path": lambda leaf: leaf.path,
    "l2": lambda leaf: (_descending(leaf.relative_l2), leaf.path),
    "max": lambda leaf: (_descending(leaf.max_abs), leaf.path),
    "bytes": lambda leaf: (-max(leaf.raw_bytes_a, leaf.raw_bytes_b), leaf.path),
}

_SIGNS = {"added": "+", "removed": "-", "changed": "~", "same": "="}


def _diff_table(leaves: Sequence[LeafDiff], *, values: bool) -> Table:
    columns = (
        "",
        "PATH",
        "DTYPE",
        "SHAPE",
        ">BYTES",
        ">CHUNKS",
        ">MAX ABS",
        ">REL L2",
        ">COSINE",
        ">NONFINITE",
    )
    any_nonfinite = any(leaf.nonfinite_count for leaf in leaves)
    shown = len(columns) - (0 if any_nonfinite else 1) if values else 6
    table = Table(columns[:shown])
    for leaf in leaves:
        cells = (
            _SIGNS[leaf.status],
            leaf.path or "(root)",
            _change(leaf.dtype_a or leaf.kind, leaf.dtype_b or leaf.kind, leaf),
            _change(shape_text(leaf.shape_a), shape_text(leaf.shape_b), leaf) if leaf.dtype_a or leaf.dtype_b else "",
            size(leaf.raw_bytes_b if leaf.status != "removed" else leaf.raw_bytes_a),
            f"{leaf.chunks_changed}/{leaf.chunk_count}" if leaf.chunk_count else "-",
            "dropped" if leaf.dropped else number(leaf.max_abs),
            number(leaf.relative_l2),
            number(leaf.cosine),
            str(leaf.nonfinite_count),
        )
        table.add(*cells[:shown])
    return table


def _change(a: str, b: str, leaf: LeafDiff) -> str:
    if leaf.status == "added":
        return b
    return a if leaf.status == "removed" or a == b else f"{a} -> {b}"


def _totals(diff: Diff) -> dict[str, int]:
    counts = {status: len(diff.with_status(status)) for status in ("added", "removed", "changed", "same")}
    chunks = sum(leaf.chunk_count for leaf in diff.leaves)
    return counts | {
        "chunk_count": chunks,
        "chunks_changed": sum(leaf.chunks_changed for leaf in diff.leaves),
    }


def _draw_totals(app: App, diff: Diff, a: Snapshot, b: Snapshot) -> None:
    totals = _totals(diff)
    counts = ", ".join(f"{totals[status]} {status}" for status in ("changed", "added", "removed", "same"))
    app.line(f"{_named(a)} -> {_named(b)}: {'no difference' if diff.identical else counts}")
    changed, chunks = totals["chunks_changed"], totals["chunk_count"]
    if chunks:
        app.line(f"{changed} of {plural(chunks, 'chunk')} changed ({share(changed, chunks)})")
    app.line(
        f"bytes shared {size(diff.bytes_shared)}, only in A {size(diff.bytes_only_a)}, "
        f"only in B {size(diff.bytes_only_b)}, which take {size(diff.stored_only_b)} in packs"
    )


def _named(snapshot: Snapshot) -> str:
    step = f" (step {snapshot.step})" if snapshot.step is not None else ""
    return f"{snapshot.id[:ID_DIGITS]}{step}"
