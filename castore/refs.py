"""Refs: branches move by compare-and-swap, tags never move; and what people may write to mean a snapshot.

    main            a branch, else a tag        heads/main, tags/v1   when a branch and a tag share a name
    3f2a81          a snapshot id or a unique prefix of at least 4 hex digits
    main~3          three snapshots back along first parents
    main@1200       the newest snapshot of step 1200 in the history of main; may be followed by ~N

Ref file (textfile.py): {"name": str, "snapshot": snapshot id, "time_ns": int}. The name inside shows when files were
swapped.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass

from castore.backend.base import Backend
from castore.backend.replace import replace_file
from castore.errors import (
    AmbiguousRefError,
    DamageError,
    FormatError,
    NotFoundError,
    RefExistsError,
    UnknownRefError,
    UsageError,
)
from castore.format.layout import BRANCHES, TAGS, branch_name, check_ref_name, decode_ref_name, tag_name
from castore.format.textfile import decode_text_file, encode_text_file, text_field
from castore.ids import PREFIX_HEX_MIN, SNAPSHOT_ID_DIGITS, SnapshotId, is_hex
from castore.options import TEXT_FILE_BYTES_MAX
from castore.snapshots import Snapshot, ancestry, list_snapshot_ids

_STEPS_BACK = re.compile(r"~([0-9]{0,19})\Z")
_AT_STEP = re.compile(r"@(-?[0-9]{1,19})\Z")
"""19 digits hold every step of 64 bits; Python refuses to read numbers of thousands of digits."""
_NEAR_MAX = 5


@dataclass(frozen=True, slots=True)
class Ref:
    """A branch or tag and the snapshot it names."""

    name: str
    snapshot_id: SnapshotId
    time_ns: int
    """When it was last moved or made."""


def list_branches(backend: Backend) -> list[Ref]:
    """All branches by name. Raises DamageError for one that cannot be read."""
    return _list(backend, BRANCHES)


def list_tags(backend: Backend) -> list[Ref]:
    """All tags by name. Raises DamageError for one that cannot be read."""
    return _list(backend, TAGS)


def damaged_refs(backend: Backend) -> dict[str, DamageError]:
    """File name → why it cannot be read, for every ref that cannot."""
    damaged: dict[str, DamageError] = {}
    for prefix in (BRANCHES, TAGS):
        for info in backend.list(prefix):
            try:
                _read(backend, info.name, expected_name=decode_ref_name(info.name.removeprefix(prefix)))
            except DamageError as error:
                damaged[info.name] = error
    return damaged


def read_branch(backend: Backend, name: str) -> SnapshotId | None:
    """The head of a branch, None when there is no such branch. Raises DamageError."""
    ref = _read(backend, branch_name(name), expected_name=name)
    return ref.snapshot_id if ref else None


def read_tag(backend: Backend, name: str) -> SnapshotId | None:
    """The snapshot of a tag, None when there is no such tag. Raises DamageError."""
    ref = _read(backend, tag_name(name), expected_name=name)
    return ref.snapshot_id if ref else None


def move_branch(
    backend: Backend, name: str, *, expected_id: SnapshotId | None, new_id: SnapshotId | None, now_ns: int
) -> bool:
    """Move a branch from one head to another, durably; None stands for "no branch". False when the head was another."""
    return _swap(backend, branch_name(name), name, expected_id=expected_id, new_id=new_id, now_ns=now_ns)


def create_tag(backend: Backend, name: str, snapshot_id: SnapshotId, *, now_ns: int) -> None:
    """Make a tag. Raises RefExistsError when the name is taken."""
    if not _swap(backend, tag_name(name), name, expected_id=None, new_id=snapshot_id, now_ns=now_ns):
        raise _tag_exists(name, read_tag(backend, name))


def delete_ref_file(backend: Backend, file_name: str) -> bool:
    """Remove a ref file whatever it holds (a damaged one too); False when there was none."""
    return replace_file(backend, file_name, None)


def encode_ref(ref: Ref) -> bytes:
    """The file of a branch or tag."""
    return encode_text_file({"name": ref.name, "snapshot": ref.snapshot_id, "time_ns": ref.time_ns})


def check_free(backend: Backend, name: str, *, as_tag: bool) -> None:
    """A new branch must not share its name with a tag, nor a new tag with a branch. Raises RefExistsError."""
    check_ref_name(name)
    other = read_branch(backend, name) if as_tag else read_tag(backend, name)
    if other is not None:
        kind = "branch" if as_tag else "tag"
        raise RefExistsError(f"{name!r} is already a {kind} (snapshot {other[:12]}); choose another name")


def check_tag_free(backend: Backend, name: str) -> None:
    """Raises RefExistsError when a tag or branch has the name."""
    check_free(backend, name, as_tag=True)
    found = read_tag(backend, name)
    if found is not None:
        raise _tag_exists(name, found)


def ref_text(ref: str | Snapshot) -> str:
    """What people pass as a ref: text, or a snapshot itself. Raises UsageError for anything else."""
    if isinstance(ref, Snapshot):
        return ref.id
    if not isinstance(ref, str):
        raise UsageError(f"ref: expected text or a Snapshot, found {type(ref).__name__}")
    return ref


def resolve(backend: Backend, ref: str | Snapshot) -> SnapshotId:
    """The snapshot that a ref means. Raises UnknownRefError or AmbiguousRefError with near matches, or DamageError."""
    text = ref_text(ref)
    base, operators = _take_apart(text)
    current = _resolve_base(backend, base)
    for operator in operators:
        current = operator(backend, current, text)
    return current


def branch_of(backend: Backend, ref: str | Snapshot) -> str | None:
    """The branch that the text names directly, if it does: following `main` follows its moves, `main~1` does not."""
    name = ref_text(ref).removeprefix("heads/")
    try:
        check_ref_name(name)
    except UsageError:
        return None
    return name if read_branch(backend, name) is not None else None


Operator = Callable[[Backend, SnapshotId, str], SnapshotId]


def _take_apart(text: str) -> tuple[str, list[Operator]]:
    """`main@1200~2` → ("main", [at step 1200, back 2])."""
    operators: list[Operator] = []
    while True:
        if match := _STEPS_BACK.search(text):
            operators.insert(0, _back(int(match.group(1) or 1)))
        elif match := _AT_STEP.search(text):
            operators.insert(0, _at_step(int(match.group(1))))
        else:
            return text, operators
        text = text[: match.start()]


def _back(count: int) -> Operator:
    def operator(backend: Backend, start: SnapshotId, text: str) -> SnapshotId:
        found = 0
        for position, (snapshot_id, _) in enumerate(ancestry(backend, start)):
            if position == count:
                return snapshot_id
            found = position
        raise UnknownRefError(f"{text!r}: expected {count} snapshots before {start[:12]}, found {found}")

    return operator


def _at_step(step: int) -> Operator:
    def operator(backend: Backend, start: SnapshotId, text: str) -> SnapshotId:
        steps: set[int] = set()
        for snapshot_id, record in ancestry(backend, start):
            if record.step == step:
                return snapshot_id
            if record.step is not None:
                steps.add(record.step)
        near = [str(found) for found in sorted(steps, key=lambda found: abs(found - step))[:_NEAR_MAX]]
        raise UnknownRefError(f"{text!r}: no snapshot of step {step}; nearest steps: {', '.join(near) or 'none'}", near)

    return operator


def _resolve_base(backend: Backend, text: str) -> SnapshotId:
    kind, _, rest = text.partition("/")
    name = rest if kind in ("heads", "tags") and rest else text
    branch = tag = None
    if _is_ref_name(name):
        branch = read_branch(backend, name) if kind != "tags" or name == text else None
        tag = read_tag(backend, name) if kind != "heads" or name == text else None
    if branch is not None and tag is not None and branch != tag:
        near = (f"heads/{name}", f"tags/{name}")
        raise AmbiguousRefError(f"{text!r} is a branch and a tag: write {near[0]} or {near[1]}", near)
    found = branch if branch is not None else tag
    return found if found is not None else _resolve_prefix(backend, text)


def _resolve_prefix(backend: Backend, text: str) -> SnapshotId:
    prefix = text.lower()
    matches: list[SnapshotId] = []
    if is_hex(prefix) and len(prefix) >= PREFIX_HEX_MIN:
        matches = list(list_snapshot_ids(backend, prefix=prefix))
    if len(matches) == 1:
        return matches[0]
    if matches:
        near = [snapshot_id[: len(prefix) + 8] for snapshot_id in matches[:_NEAR_MAX]]
        raise AmbiguousRefError(f"{text!r} is the beginning of {len(matches)} snapshot ids: {', '.join(near)}", near)
    names = [ref_name for prefix in (BRANCHES, TAGS) for ref_name in _names(backend, prefix)]
    near = difflib.get_close_matches(text, names, n=_NEAR_MAX, cutoff=0.4)
    if not names:
        advice = f"{backend.location} has no branch yet: save something first"
    else:
        advice = f"did you mean {', '.join(near)}?" if near else f"there are: {', '.join(names[:_NEAR_MAX])}"
    short = (
        f" (an id prefix needs at least {PREFIX_HEX_MIN} digits)"
        if is_hex(prefix) and len(prefix) < PREFIX_HEX_MIN
        else ""
    )
    raise UnknownRefError(f"nothing is called {text!r}{short}; {advice}", near or names[:_NEAR_MAX])


def _tag_exists(name: str, found: SnapshotId | None) -> RefExistsError:
    return RefExistsError(f"tag {name!r} exists and names snapshot {str(found)[:12]}; tags never move: delete it first")


def _is_ref_name(name: str) -> bool:
    try:
        check_ref_name(name)
    except UsageError:
        return False
    return True


def _names(backend: Backend, prefix: str) -> list[str]:
    names = []
    for info in backend.list(prefix):
        try:
            names.append(decode_ref_name(info.name.removeprefix(prefix)))
        except FormatError:
            continue  # a stray file: verify reports it
    return names


def _list(backend: Backend, prefix: str) -> list[Ref]:
    files = (info.name for info in backend.list(prefix))
    refs = (_read(backend, name, expected_name=decode_ref_name(name.removeprefix(prefix))) for name in files)
    return sorted((ref for ref in refs if ref is not None), key=lambda ref: ref.name)


def _read(backend: Backend, file_name: str, *, expected_name: str) -> Ref | None:
    try:
        data = backend.read(file_name, max_bytes=TEXT_FILE_BYTES_MAX)
    except NotFoundError:
        return None
    return _decode(data, file_name, expected_name)


def _decode(data: bytes, file_name: str, expected_name: str) -> Ref:
    fields = decode_text_file(data, name=file_name)
    name = text_field(fields, "name", str, name=file_name)
    snapshot = text_field(fields, "snapshot", str, name=file_name)
    if name != expected_name:
        raise FormatError(f"{file_name}: expected ref {expected_name!r}, found {name!r}: the files were swapped")
    if not is_hex(snapshot) or len(snapshot) not in SNAPSHOT_ID_DIGITS:
        raise FormatError(f"{file_name}: expected a snapshot id, found {snapshot!r}")
    return Ref(name, SnapshotId(snapshot), text_field(fields, "time_ns", int, name=file_name))


def _swap(
    backend: Backend,
    file_name: str,
    name: str,
    *,
    expected_id: SnapshotId | None,
    new_id: SnapshotId | None,
    now_ns: int,
) -> bool:
    try:
        old: bytes | None = backend.read(file_name, max_bytes=TEXT_FILE_BYTES_MAX)
    except NotFoundError:
        old = None
    found = _decode(old, file_name, name).snapshot_id if old is not None else None
    if found != expected_id:
        return False
    new = None
    if new_id is not None:
        new = encode_ref(Ref(name, new_id, now_ns))
    return backend.compare_and_swap(file_name, expected=old, new=new)
