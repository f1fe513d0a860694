"""What is asked of a push or pull: which refs of the source go to which names of the target.

main                a branch, else a tag, of the same name at the target
heads/main          a branch            tags/v1             a tag
main:backup/main    under another name  main@1200:tags/best a snapshot under a tag
(none)              every branch and tag
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from castore.backend.base import Backend
from castore.errors import AmbiguousRefError, InvalidNameError, UsageError
from castore.format.layout import check_ref_name
from castore.ids import SnapshotId
from castore.refs import list_branches, list_tags, read_branch, read_tag, resolve

RefKind = Literal["branch", "tag"]


@dataclass(frozen=True, slots=True)
class TransferRequest:
    """Everything about a push or pull but the two repositories."""

    refs: Sequence[str] | None = None
    depth: int | None = None
    """Snapshots of each ref, counted from its head; None: all of its history."""
    force: bool = False
    """Move branches of the target that hold what the source lacks."""
    check: bool = False
    """Read what the target has already, and send again what is rotten there."""
    reencode: bool = False
    """Encode every chunk anew by the target's options instead of copying stored bytes."""


@dataclass(frozen=True, slots=True)
class WantedRef:
    """One ref of the target, and the snapshot of the source that it is to name."""

    kind: RefKind
    name: str
    snapshot_id: SnapshotId
    """At the source."""


def check_request(request: TransferRequest) -> None:
    """Raises UsageError before anything is read."""
    if isinstance(request.refs, str):
        raise UsageError(
            f"refs: expected a sequence of refs, found the text {request.refs!r}; write [{request.refs!r}]"
        )
    if request.depth is not None and request.depth < 1:
        raise UsageError(f"depth: expected at least 1 snapshot, found {request.depth}")


def wanted_refs(source: Backend, request: TransferRequest) -> list[WantedRef]:
    """The refs of the target that the request names. Raises RefError, InvalidNameError, UsageError or DamageError."""
    if request.refs is None:
        branches = [WantedRef("branch", ref.name, ref.snapshot_id) for ref in list_branches(source)]
        return [*branches, *(WantedRef("tag", ref.name, ref.snapshot_id) for ref in list_tags(source))]
    wanted: dict[tuple[RefKind, str], WantedRef] = {}
    for text in request.refs:
        ref = _wanted(source, text)
        other = wanted.setdefault((ref.kind, ref.name), ref)
        if other != ref:
            raise UsageError(f"{ref.kind} {ref.name!r} of the target is asked for twice, with different snapshots")
    return list(wanted.values())


def _wanted(source: Backend, text: str) -> WantedRef:
    expression, colon, goal = text.partition(":")
    if colon:
        kind: RefKind = "tag" if goal.startswith("tags/") else "branch"
        name = goal.removeprefix("tags/").removeprefix("heads/")
        check_ref_name(name)
        return WantedRef(kind, name, resolve(source, expression))
    named = _named(source, expression)
    if named is None:
        snapshot_id = resolve(source, expression)  # says so when there is nothing of that name
        raise UsageError(
            f"{text!r} means snapshot {snapshot_id[:12]}, which needs a name at the target: write {text}:BRANCH or "
            f"{text}:tags/TAG"
        )
    return named


def _named(source: Backend, text: str) -> WantedRef | None:
    """The branch or tag that the text names directly."""
    prefix, _, rest = text.partition("/")
    name = rest if prefix in ("heads", "tags") and rest else text
    try:
        check_ref_name(name)
    except InvalidNameError:
        return None
    branch = read_branch(source, name) if prefix != "tags" else None
    tag = read_tag(source, name) if prefix != "heads" else None
    if branch is not None and tag is not None:
        near = (f"heads/{name}", f"tags/{name}")
        raise AmbiguousRefError(f"{text!r} is a branch and a tag: write {near[0]} or {near[1]}", near)
    if branch is not None:
        return WantedRef("branch", name, branch)
    return WantedRef("tag", name, tag) if tag is not None else None
