"""Exit codes: one for each thing a script does next. docs/CLI.md has the same table; a test compares them.

    0    done; for `verify`: no damage
    1    any other error
    2    wrong usage: an option, an argument, a name, a file of an unknown kind
    3    damage: `verify` found some, or what the command needed is damaged
    4    not found: the repository, a ref, a path, a file
    5    conflict: the name is taken, the branch was moved by somebody else, the file exists, another gc is at work
    6    not permitted: owner, permissions, a read-only mount
    7    no space left, or a limit on the size of files
    8    the repository needs a newer castore
    130  interrupted by Ctrl-C
    141  the reader of the output went away (`castore log | head`)

Errors that nobody foresaw are 1 too; CASTORE_TRACEBACK=1 shows where they came from.
"""

from __future__ import annotations

import errno
import json
from enum import IntEnum

from castore import errors


class Exit(IntEnum):
    """See the module docstring."""

    OK = 0
    ERROR = 1
    USAGE = 2
    DAMAGE = 3
    NOT_FOUND = 4
    CONFLICT = 5
    NOT_PERMITTED = 6
    NO_SPACE = 7
    NEWER_FORMAT = 8
    INTERRUPTED = 130
    PIPE_CLOSED = 141


_BY_TYPE: tuple[tuple[type[Exception] | tuple[type[Exception], ...], Exit], ...] = (
    (errors.MissingExtraError, Exit.ERROR),
    (errors.UsageError, Exit.USAGE),
    (errors.UnsupportedFormatError, Exit.NEWER_FORMAT),
    (errors.DamageError, Exit.DAMAGE),
    (
        (errors.ConflictError, errors.LeaseError, errors.RefExistsError, errors.RepositoryExistsError, FileExistsError),
        Exit.CONFLICT,
    ),
    (
        (
            errors.RepositoryNotFoundError,
            errors.RefError,
            errors.PathNotFoundError,
            errors.ThinnedError,
            FileNotFoundError,
        ),
        Exit.NOT_FOUND,
    ),
    ((errors.RepositoryAccessError, PermissionError), Exit.NOT_PERMITTED),
    (errors.NoSpaceError, Exit.NO_SPACE),
)

_BY_ERRNO = {
    errno.ENOSPC: Exit.NO_SPACE,
    errno.EDQUOT: Exit.NO_SPACE,
    errno.EFBIG: Exit.NO_SPACE,
    errno.EROFS: Exit.NOT_PERMITTED,
    errno.EACCES: Exit.NOT_PERMITTED,
    errno.EPERM: Exit.NOT_PERMITTED,
}


def exit_of(error: BaseException) -> Exit:
    """The exit code of an error."""
    if isinstance(error, KeyboardInterrupt):
        return Exit.INTERRUPTED
    for kinds, code in _BY_TYPE:
        if isinstance(error, kinds):
            return code
    if isinstance(error, OSError) and error.errno is not None:
        return _BY_ERRNO.get(error.errno, Exit.ERROR)
    return Exit.ERROR


def message_of(error: BaseException) -> str:
    """The text after "error: "."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, errors.CastoreError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"unexpected {type(error).__name__}: {error}; CASTORE_TRACEBACK=1 shows where"


def error_document(error: BaseException) -> str:
    """One JSON document for `--json`."""
    fields: dict[str, object] = {
        "type": type(error).__name__,
        "message": message_of(error),
        "exit_code": int(exit_of(error)),
    }
    if near := getattr(error, "near", None):
        fields["near"] = list(near)
    if isinstance(error, errors.ConflictError):
        fields |= {"snapshot": error.snapshot_id, "expected": error.expected_id, "found": error.found_id}
    if isinstance(error, errors.LostLeavesError):
        fields |= {"lost": list(error.lost), "left": list(error.left)}
    if isinstance(error, errors.ThinnedError):
        fields |= {"dropped": list(error.dropped), "left": list(error.left)}
    if isinstance(error, errors.NoValidSnapshotError):
        fields["skipped"] = dict(error.skipped)
    return json.dumps({"error": fields}, indent=2)
