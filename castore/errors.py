"""Every error that castore raises, grouped by what the caller will do about it.

CastoreError
├── UsageError                     fix the call (also a ValueError)
│   ├── UnsupportedLeafError       a value of the state has no typed encoding: convert it or allow pickle
│   ├── InvalidNameError           a branch or tag name breaks the naming rules
│   └── MissingExtraError          install the named extra (also an ImportError)
├── RepositoryError                the repository as a whole cannot be used
│   ├── RepositoryNotFoundError    create one, or correct the path
│   ├── RepositoryExistsError      open it instead
│   ├── UnsupportedFormatError     written by a newer castore, or with a feature that this one lacks
│   └── RepositoryAccessError      permission, read-only mount
├── RefError                       a ref cannot be used (also a LookupError)
│   ├── UnknownRefError            nothing has that name; near matches are listed
│   ├── AmbiguousRefError          several snapshots match
│   └── RefExistsError             the name is taken
├── ConflictError                  a branch was moved by somebody else: adopt or retry
│   └── DivergedError              the other repository's branch holds what this one lacks: pull, rename or force
├── PathNotFoundError              no leaf has that path (also a KeyError)
├── StateMismatchError             the live state and the snapshot do not fit together
├── UnknownClassError              a namedtuple or dataclass of the state is not importable here
├── PickleRefusedError             the leaf is a pickle and `allow_pickle=True` was not given
├── ThinnedError                   the leaf was dropped from a kept snapshot: load what is left with paths=
├── DamageError                    stored bytes are not what they were
│   ├── FormatError                a file or record cannot be parsed
│   ├── ChecksumError              the bytes changed after they were written
│   ├── CodecError                 an encoded payload does not decode
│   ├── NoValidSnapshotError       every snapshot that was tried is damaged
│   ├── ChunkMissingError          no pack holds the chunk
│   │   ├── SnapshotGoneError      the snapshot was collected while it was being read
│   │   └── LostLeavesError        a repair marked leaves of the snapshot as lost: load the others
│   └── ParityExceededError        more of a pack is lost than its parity restores
├── PartialLoadError               a load failed midway: names the live leaves already overwritten
├── LeaseError                     a lease was lost or cannot be taken
├── WorkerError                    the worker process of asynchronous saves ended or cannot run: save again
└── StorageError                   the file system refused (also an OSError)
    ├── NoSpaceError               the disk is full; nothing was committed
    └── NotFoundError              the named file is not there (also a FileNotFoundError)

CastoreWarning                     (a UserWarning)
├── LowSpaceWarning                the save may not fit the disk
├── SkippedSnapshotWarning         a snapshot could not be loaded, and an older one was
├── SlowSaveWarning                saves are asked for faster than they can be written
├── PolicyWarning                  the stored policy could not be applied after a save, which is safe itself
└── StaleSaveWarning               the step moved, but no tensor changed

A message says where, what was expected, what was found, and the next step. Errors pickle and carry their facts as
attributes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class CastoreError(Exception):
    """Base of everything that castore raises on purpose."""

    def __reduce__(self) -> tuple[object, ...]:
        attributes = self.__dict__
        if isinstance(self, OSError):  # its errno is no part of __dict__
            attributes = {**attributes, "errno": self.errno}
        return (_rebuild, (type(self), self.args, attributes))


def _rebuild(cls: type[CastoreError], args: tuple[object, ...], attributes: dict[str, object]) -> CastoreError:
    error = cls.__new__(cls, *args)
    Exception.__init__(error, *args)
    for name, value in attributes.items():
        setattr(error, name, value)
    return error


class UsageError(CastoreError, ValueError):
    """The call cannot be right as it stands; nothing was read or written."""


class UnsupportedLeafError(UsageError):
    """A value of the state has no typed encoding."""

    def __init__(self, path: str, type_name: str, hint: str = "") -> None:
        where = f"{path!r}" if path else "the root of the state"
        advice = hint or "convert it to a supported type, or give allow_pickle=True at save and at load"
        super().__init__(f"leaf {where}: type {type_name} has no typed encoding; {advice}")
        self.path = path
        self.type_name = type_name


class InvalidNameError(UsageError):
    """A branch or tag name breaks git's naming rules (`git check-ref-format`)."""


class MissingExtraError(UsageError, ImportError):
    """A feature needs a package that the core install does not bring."""


class RepositoryError(CastoreError):
    """The repository as a whole cannot be used."""


class RepositoryNotFoundError(RepositoryError):
    """No repository at that path."""


class RepositoryExistsError(RepositoryError):
    """A repository is already there."""


class UnsupportedFormatError(RepositoryError):
    """The repository needs a newer castore, or a feature that this one lacks."""


class RepositoryAccessError(RepositoryError):
    """The operating system does not permit it: ownership, permission or a read-only mount."""


class RefError(CastoreError, LookupError):
    """A ref cannot be used."""


class UnknownRefError(RefError):
    """Nothing has that name."""

    def __init__(self, message: str, near: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.near = tuple(near)


class AmbiguousRefError(RefError):
    """Several snapshots match the name."""

    def __init__(self, message: str, near: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.near = tuple(near)


class RefExistsError(RefError):
    """The name is taken."""


class ConflictError(CastoreError):
    """The branch was moved by another writer between our look and our commit.

    Nothing is lost: `snapshot_id` is durable as an orphan, `expected_id` is the head that this handle
    had last seen (None: no branch), `found_id` the head that is there now.
    """

    def __init__(self, branch: str, *, snapshot_id: str, expected_id: str | None, found_id: str | None) -> None:
        expected, found = (expected_id or "no branch")[:12], (found_id or "no branch")[:12]
        super().__init__(
            f"branch {branch!r}: expected head {expected}, found {found}; this save is kept as snapshot "
            f"{snapshot_id[:12]}: adopt it with repo.branch(NAME, at=…) or `castore branch NAME {snapshot_id[:12]}`, "
            "or save again "
            f"with parent={branch!r}"
        )
        self.branch = branch
        self.snapshot_id = snapshot_id
        self.expected_id = expected_id
        self.found_id = found_id


class DivergedError(ConflictError):
    """A branch cannot be moved forward by push or pull: its head is no ancestor of the snapshot sent.

    `snapshot_id` is what was to be its head (of the source), `found_id` its head at the target. Nothing was sent.
    """

    def __init__(self, branch: str, *, snapshot_id: str, found_id: str, where: str) -> None:
        CastoreError.__init__(
            self,
            f"branch {branch!r} of {where} is at {found_id[:12]}, which is no ancestor of {snapshot_id[:12]}: moving "
            f"it would leave its snapshots without a name; send under another name ({branch}:OTHER), or force it "
            "(`--force`, force=True)",
        )
        self.branch = branch
        self.snapshot_id = snapshot_id
        self.expected_id = None
        self.found_id = found_id
        self.where = where


class PathNotFoundError(CastoreError, KeyError):
    """No leaf of the snapshot has that path, or no leaf matches the pattern."""

    def __init__(self, message: str, near: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.near = tuple(near)

    def __str__(self) -> str:
        return str(self.args[0])


class StateMismatchError(CastoreError):
    """The live state and the snapshot do not fit together; nothing was touched."""

    def __init__(
        self, message: str, *, missing: Sequence[str], unexpected: Sequence[str], mismatched: Sequence[str]
    ) -> None:
        super().__init__(message)
        self.missing = tuple(missing)
        """Paths that the live state has and the snapshot lacks."""
        self.unexpected = tuple(unexpected)
        """Paths that the snapshot has and the live state lacks."""
        self.mismatched = tuple(mismatched)
        """Paths that both have with another kind, shape or dtype, each with what was expected and found."""


class UnknownClassError(CastoreError):
    """A namedtuple or dataclass of the state is not loaded in this process, and a manifest never imports code."""


class PickleRefusedError(CastoreError):
    """The leaf is a pickle, which can run code, and `allow_pickle=True` was not given."""


class ThinnedError(CastoreError):
    """Leaves that were asked for have been dropped from the snapshot by thinning; the others can be loaded."""

    def __init__(self, message: str, *, dropped: Sequence[str], left: Sequence[str]) -> None:
        super().__init__(message)
        self.dropped = tuple(dropped)
        """Paths of the leaves that were asked for and are dropped."""
        self.left = tuple(left)
        """What is whole, as the shortest paths that say so: give them to `load(paths=…)`."""


class DamageError(CastoreError):
    """Stored bytes are not what they were, or cannot be read as what they claim to be."""


class FormatError(DamageError):
    """A file or record cannot be parsed."""


class ChecksumError(DamageError):
    """Bytes changed after they were written."""


class CodecError(DamageError):
    """An encoded payload does not decode to what its record declares."""


class NoValidSnapshotError(DamageError):
    """Every snapshot that was tried is damaged."""

    def __init__(self, message: str, *, skipped: Sequence[tuple[str, str]]) -> None:
        super().__init__(message)
        self.skipped = tuple(skipped)
        """(snapshot id, why it cannot be loaded), newest first."""


class ChunkMissingError(DamageError):
    """No pack holds the chunk."""


class SnapshotGoneError(ChunkMissingError):
    """The snapshot was collected while it was being read."""


class LostLeavesError(ChunkMissingError):
    """Leaves of the snapshot are lost for good, as a repair has found; the others can be loaded."""

    def __init__(self, message: str, *, lost: Sequence[str], left: Sequence[str]) -> None:
        super().__init__(message)
        self.lost = tuple(lost)
        """Paths of the lost leaves, where they are known."""
        self.left = tuple(left)
        """Paths of the leaves that can be loaded: give them, or some of them, as paths=."""


class ParityExceededError(DamageError):
    """More stretches of a pack and of its parity are lost than the parity restores."""


class PartialLoadError(CastoreError):
    """A load into live tensors failed midway."""

    def __init__(self, message: str, *, overwritten: Sequence[str]) -> None:
        super().__init__(message)
        self.overwritten = tuple(overwritten)
        """Paths of the live leaves that already hold bytes of the snapshot."""


class LeaseError(CastoreError):
    """A lease was lost or cannot be taken."""


class WorkerError(CastoreError):
    """The process that writes asynchronous saves was ended from outside, cannot be started or cannot share memory, or
    raised what only it knows.

    A save that it was writing is lost, unless a note says that the branch has moved. `exit_status` is that of the
    process: negative for a signal, None when it has not ended.
    """

    def __init__(self, message: str, *, exit_status: int | None = None) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class StorageError(CastoreError, OSError):
    """The file system or object store refused; the message names the file."""


class NoSpaceError(StorageError):
    """The disk or the quota is full; what was not committed before is not committed now."""


class NotFoundError(StorageError, FileNotFoundError):
    """The backend holds nothing of that name."""


class CastoreWarning(UserWarning):
    """Base of everything that castore warns of."""


class LowSpaceWarning(CastoreWarning):
    """What a save is about to write may not fit the free space."""


class SkippedSnapshotWarning(CastoreWarning):
    """A snapshot was asked for that cannot be loaded whole, and an older one was loaded in its place."""


class StaleSaveWarning(CastoreWarning):
    """The step moved on, but every tensor is bit for bit what the parent snapshot holds: training may not be
    running.
    """


class SlowSaveWarning(CastoreWarning):
    """Saves are asked for faster than they can be written, so the training step waits."""


class PolicyWarning(CastoreWarning):
    """The stored policy could not be applied after a save; the save itself is durable."""


def note_moved(error: BaseException, branch: str, snapshot_id: str) -> None:
    """Say in a note of an error that the save which raised it is committed all the same."""
    error.add_note(f"branch {branch!r} has moved to the new snapshot {snapshot_id[:12]}")


def some(items: Iterable[object], *, count: int = 3) -> str:
    """The first few of many, for a message."""
    shown = [str(item) for item in items]
    more = f" and {len(shown) - count} more" if len(shown) > count else ""
    return ", ".join(shown[:count]) + more
