"""The policy stored in a repository: what to forget and to thin, and after how many saves it is applied by itself.

    policy           {"every_saves": int or null, "keep": {rule: value} or null, "set_ns": int,
                      "thin": {"globs": [glob, …], "older_than": int or text} or null}
    policy-applied   {"applied_ns": int}: when it was applied last. Saves since then are the snapshot files written
                     after this one, by the backend's clock, so that writers in several processes count together.
    policy-collected {"collected_ns": int}: when `gc --auto` last looked for what can be freed.

They are textfile.py files, moved by compare-and-swap. Applying writes marks and frees nothing; gc does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from castore.backend.base import Backend
from castore.backend.replace import replace_file
from castore.errors import DamageError, FormatError, NotFoundError, UsageError
from castore.format.layout import ORPHANS, POLICY, POLICY_APPLIED, POLICY_COLLECTED, SNAPSHOTS, THIN
from castore.format.textfile import decode_text_file, encode_text_file, text_field
from castore.leases import read_condemned
from castore.maintenance.forget import ForgetReport, Progress, forget_by_policy
from castore.maintenance.retention import Keep, duration_text
from castore.maintenance.thin import Age, ThinReport, check_age, check_globs, thin_old
from castore.marks import forgotten_ids
from castore.options import TEXT_FILE_BYTES_MAX
from castore.repository import Handle
from castore.snapshots import list_snapshot_ids
from castore.store import pack_sizes

_COLLECT_EVERY_NS = 24 * 3600 * 10**9


@dataclass(frozen=True, slots=True)
class Policy:
    """What is applied by `castore gc --auto`, by `apply_policy`, and after every so many saves."""

    keep: Keep | None = None
    """What to keep; None: nothing is forgotten."""
    thin: tuple[str, ...] = ()
    """Globs of leaves to drop from old snapshots; empty: nothing is thinned."""
    older_than: Age | None = None
    """How old a snapshot is thinned: a count of snapshots, or a duration."""
    every_saves: int | None = None
    """After how many saves it is applied by itself; None: only when asked for."""

    def to_json(self) -> dict[str, Any]:
        """For `--json` and for the file."""
        thin = {"globs": list(self.thin), "older_than": self.older_than} if self.thin else None
        return {"keep": self.keep.to_json() if self.keep else None, "thin": thin, "every_saves": self.every_saves}


@dataclass(frozen=True, slots=True)
class PolicyReport:
    """What applying the policy did, or would do."""

    forget: ForgetReport | None
    thin: ThinReport | None

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "forget": self.forget.to_json() if self.forget else None,
            "thin": self.thin.to_json() if self.thin else None,
        }


def make_policy(keep: Keep | None, *, thin: Sequence[str], older_than: Age | None, every_saves: int | None) -> Policy:
    """A policy that can be stored. Raises UsageError for an empty one, or one that can mean nothing."""
    if keep is None and not thin:
        raise UsageError("the policy does nothing: give rules of what to keep, or globs of what to thin")
    if bool(thin) != (older_than is not None):
        raise UsageError("thin and older_than go together: which leaves to drop, and from how old a snapshot on")
    if every_saves is not None and every_saves < 1:
        raise UsageError(f"every_saves: expected 1 or more, found {every_saves}")
    if older_than is not None:
        check_age(older_than)
        if isinstance(older_than, float | timedelta):
            older_than = duration_text(older_than)
    return Policy(keep, check_globs(thin) if thin else (), older_than, every_saves)


def read_policy(backend: Backend) -> Policy | None:
    """The stored policy, None when there is none. Raises DamageError: set or clear it again."""
    try:
        data = backend.read(POLICY, max_bytes=TEXT_FILE_BYTES_MAX)
    except NotFoundError:
        return None
    fields = decode_text_file(data, name=POLICY)
    keep, thin = fields.get("keep"), fields.get("thin")
    every_saves = None if fields.get("every_saves") is None else text_field(fields, "every_saves", int, name=POLICY)
    try:
        return make_policy(
            None if keep is None else Keep.from_json(keep, where=POLICY),
            thin=thin["globs"] if thin else (),
            older_than=thin["older_than"] if thin else None,
            every_saves=every_saves,
        )
    except (UsageError, TypeError, KeyError, AttributeError) as error:
        raise FormatError(f"{POLICY}: it is no policy: {error}; set it again or clear it") from error


def write_policy(handle: Handle, policy: Policy) -> None:
    """Store a policy in the place of the one before. It is first due after `every_saves` more saves."""
    handle.config.check_features("write", where=handle.backend.location)
    now_ns = handle.clock()
    replace_file(handle.backend, POLICY_APPLIED, encode_text_file({"applied_ns": now_ns}))
    replace_file(handle.backend, POLICY, encode_text_file({**policy.to_json(), "set_ns": now_ns}))


def clear_policy(handle: Handle) -> bool:
    """Remove the stored policy, a damaged one too; False when there was none."""
    handle.config.check_features("write", where=handle.backend.location)
    found = replace_file(handle.backend, POLICY, None)
    replace_file(handle.backend, POLICY_APPLIED, None)
    return found


def apply_policy(handle: Handle, *, dry_run: bool = False, progress: Progress | None = None) -> PolicyReport | None:
    """Forget and thin by the stored policy; None when there is none."""
    policy = read_policy(handle.backend)
    if policy is None:
        return None
    if not dry_run:
        handle.config.check_features("write", where=handle.backend.location)
        # First, so that of several writers who find it due most leave it to one.
        replace_file(handle.backend, POLICY_APPLIED, encode_text_file({"applied_ns": handle.clock()}))
    forget = thin = None
    if policy.keep is not None:
        forget = forget_by_policy(handle, policy.keep, dry_run=dry_run, progress=progress)
    if policy.older_than is not None:
        would_go = {choice.snapshot_id for choice in forget.dropped} if forget is not None else frozenset()
        thin = thin_old(
            handle,
            policy.thin,
            older_than=policy.older_than,
            must_match=False,
            leave_out=would_go,
            dry_run=dry_run,
        )
    return PolicyReport(forget, thin)


# ---- gc --auto -------------------------------------------------------------------------------------------------


def collection_is_due(handle: Handle, *, target_bytes: int | None = None) -> bool:
    """Whether an automatic collection has something to do, as far as listings tell.

    It has while a forgotten snapshot or a condemned file is there, while the packs are larger than a target, and when
    something was thinned or a ref was taken away since it last looked; else once a day, for what crashed saves left and
    for orphans whose grace is over.
    """
    backend = handle.backend
    if forgotten_ids(backend) & frozenset(list_snapshot_ids(backend)) or read_condemned(backend):
        return True
    if target_bytes is not None and sum(pack_sizes(backend).values()) > target_bytes:
        return True
    last = backend.stat(POLICY_COLLECTED)
    if last is None or handle.clock() - _collected_ns(backend) >= _COLLECT_EVERY_NS:
        return True
    return any(info.modified_ns > last.modified_ns for prefix in (THIN, ORPHANS) for info in backend.list(prefix))


def note_collected(handle: Handle) -> None:
    """Write down that an automatic collection has looked."""
    replace_file(handle.backend, POLICY_COLLECTED, encode_text_file({"collected_ns": handle.clock()}))


def _collected_ns(backend: Backend) -> int:
    """0 when it cannot be read: to look once more harms nobody."""
    try:
        fields = decode_text_file(backend.read(POLICY_COLLECTED, max_bytes=TEXT_FILE_BYTES_MAX), name=POLICY_COLLECTED)
        return int(text_field(fields, "collected_ns", int, name=POLICY_COLLECTED))
    except (DamageError, NotFoundError):
        return 0


# ---- after saves -----------------------------------------------------------------------------------------------


class PolicyCounter:
    """Counts saves, and says when the policy is due. Threads may share it: at worst it is applied once too often.

    A save costs one look at the policy file. The snapshots of other processes are counted, in one listing, only when
    this process has made as many saves as were left at the last count.
    """

    def __init__(self) -> None:
        self._stamp: tuple[int, int] | None = None
        """Of the policy file that was counted for: when it was written, and its length."""
        self._left = 0

    def is_due(self, backend: Backend) -> bool:
        """Note one save; whether the policy is to be applied now. Raises DamageError (of the policy)."""
        info = backend.stat(POLICY)
        if info is None:
            return False
        stamp = (info.modified_ns, info.size_bytes)
        if stamp == self._stamp:
            self._left -= 1
            if self._left > 0:
                return False
        policy = read_policy(backend)
        self._stamp = stamp
        if policy is None or policy.every_saves is None:
            self._left = _NEVER
            return False
        self._left = policy.every_saves - _saves_since_applied(backend)
        return self._left <= 0


_NEVER = 1 << 62


def _saves_since_applied(backend: Backend) -> int:
    applied = backend.stat(POLICY_APPLIED)
    since_ns = applied.modified_ns if applied is not None else 0
    return sum(info.modified_ns > since_ns for info in backend.list(SNAPSHOTS))
