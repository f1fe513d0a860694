"""The public repository object: each method is one operation, carried out by a function of checkpoint/ or maintenance/.

    repo = castore.open("runs/store", create=True)
    snap = repo.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, step=100)
    state = repo.load("main")

Thread-safe; a context manager; pickles as its path; may be open many times in one process and across fork.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from castore.errors import RepositoryExistsError, RepositoryNotFoundError, UsageError
from castore.ids import SnapshotId
from castore.options import Compression, HashName, RepositoryOptions
from castore.refs import Ref, branch_of, list_branches, list_tags, resolve
from castore.repository import Handle, create, open_repository
from castore.snapshots import Leaf, Snapshot, ancestry, leaf_table, list_snapshot_ids, make_snapshot, read_record

if TYPE_CHECKING:
    from castore.checkpoint.background import BackgroundSaver, PendingSave
    from castore.checkpoint.request import SaveRequest
    from castore.checkpoint.stage import StagedState

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""
PathLike = str | os.PathLike[str]


class Repository:
    """A repository on this machine. Get one from `castore.init` or `castore.open`."""

    def __init__(self, path: PathLike, handle: Handle) -> None:
        self._path = Path(path).absolute()
        self._handle = handle
        self._saver: BackgroundSaver | None = None
        self._saver_lock = threading.Lock()
        self._pid = os.getpid()

    # ---- the life of the object --------------------------------------------------------------------------------

    @property
    def path(self) -> Path:
        """The repository's directory."""
        return self._path

    @property
    def options(self) -> RepositoryOptions:
        """What was chosen when the repository was created."""
        return self._handle.config.options

    @property
    def handle(self) -> Handle:
        """The wired pieces, for tools that work below this API (`castore.maintenance`, the command line)."""
        return self._handle

    def close(self) -> None:
        """Wait for background saves, then close files and the index. Using the object again opens them again.

        Raises the first error of a background save that nobody has asked for, after everything is closed.
        """
        try:
            self._settle()
        finally:
            self._handle.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"castore.open({str(self._path)!r})"

    def __reduce__(self) -> tuple[object, ...]:
        return (_reopen, (str(self._path), self._handle.base_memory_bytes))

    # ---- save and load -------------------------------------------------------------------------------------------

    def save(
        self,
        state: Any,
        *,
        branch: str = "main",
        step: int | None = None,
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
        message: str = "",
        tags: Sequence[str] = (),
        parent: str | Snapshot | None = None,
        allow_pickle: bool = False,
        progress: Progress | None = None,
    ) -> Snapshot:
        """Save a training state as a new snapshot and move the branch to it.

        Args:
            state: any nesting of dict, list, tuple, namedtuple, dataclass and OrderedDict around tensors, arrays,
                numbers, text, bytes and None. It is read in place, not copied, and must not change until this returns.
            branch: made when it does not exist.
            metrics: numbers to choose snapshots by. metadata: any JSON. tags: names that must be free.
            parent: a ref to continue from, whatever the branch's head is now. By default the save continues the head
                that this object last saved, loaded or found, and raises ConflictError when somebody moved it since.
            allow_pickle: store values without a typed encoding as pickles; loading them needs allow_pickle too.

        Blocks until the snapshot is durable. Raises UnsupportedLeafError, UsageError, ConflictError (the snapshot is
        kept as an orphan), RefExistsError, NoSpaceError, StorageError; after any of them the branch is where it was,
        unless a note of the error says that it has moved. The next save continues from wherever it is.
        """
        from castore.checkpoint.request import SaveRequest
        from castore.checkpoint.save import save

        self._settle()
        request = SaveRequest(branch, step, metrics or {}, metadata or {}, message, tags, parent, allow_pickle)
        snapshot = save(self._handle, state, request, progress=progress)
        return self._bound(snapshot)

    def save_async(
        self,
        state: Any,
        *,
        branch: str = "main",
        step: int | None = None,
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
        message: str = "",
        tags: Sequence[str] = (),
        parent: str | Snapshot | None = None,
        allow_pickle: bool = False,
    ) -> PendingSave:
        """Save as `save` does, but return as soon as the state has been copied to host memory.

        What is saved is the state at the call: it may change as soon as this returns. The rest goes on in a thread;
        `result()` of what is returned waits for durability and gives the Snapshot. Saves are committed in the order of
        the calls, and the interpreter waits for them at its exit. Blocks beyond the copy only while too many saves are
        waiting (`limit_async`), with one SlowSaveWarning.

        An error of an earlier save that nobody has asked for is raised here, before anything is done; else as `save`.
        """
        from castore.checkpoint.request import SaveRequest, check_request
        from castore.checkpoint.stage import stage, staged_bytes
        from castore.tensors import flatten, pinned_slab

        request = check_request(
            SaveRequest(branch, step, metrics or {}, metadata or {}, message, tags, parent, allow_pickle)
        )
        saver = self._background()
        saver.raise_failure()
        flat = flatten(state, allow_pickle=allow_pickle)
        pending = saver.reserve(staged_bytes(flat), request.step)
        try:
            staged = stage(flat, self._handle.pool, self._handle.pinned_pool(pinned_slab))
            saver.submit(pending, staged, request)
        except BaseException:
            saver.cancel(pending)
            raise
        return pending

    def limit_async(self, *, in_flight: int = 2, staged_bytes: int | None = None) -> None:
        """How many saves may be waiting or being written at a time, and how many bytes of host memory their copies may
        take.

        `staged_bytes=None` stands for half of the available memory. A single save may exceed it, alone.
        """
        if in_flight < 1 or (staged_bytes is not None and staged_bytes < 0):
            raise UsageError(f"expected in_flight >= 1 and staged_bytes >= 0, found {in_flight} and {staged_bytes}")
        self._background().set_limits(in_flight_max=in_flight, staged_bytes_max=staged_bytes)

    def wait(self) -> None:
        """Wait until every `save_async` of this object is durable; raises the first error that nobody has asked for."""
        self._settle()

    def load(
        self,
        ref: str | Snapshot = "main",
        *,
        paths: Sequence[str] | None = None,
        into: Any = None,
        strict: bool = True,
        device: Any = None,
        verify: bool = True,
        allow_pickle: bool = False,
        classes: Mapping[str, type] | None = None,
        missing_classes: Literal["error", "dict"] = "error",
        progress: Progress | None = None,
    ) -> Any:
        """Load a state, bit for bit.

        Args:
            paths: globs of leaf paths (`model/encoder.*/**`); the rest is neither read nor returned, and a list, tuple,
                namedtuple or dataclass that lost an item comes back as a dict.
            into: a live state whose tensors and arrays are filled in place, after every path, shape and dtype was
                compared. Other values are replaced where their container is mutable. The returned state holds the live
                tensors.
            strict: with `into`, whether leaves that only one side has are an error; False loads what both have.
            device: where tensors go; by default to the CPU. `into` tensors stay where they are.
            verify: recompute every chunk id (default). False still compares the checksums of stored bytes.
            classes, missing_classes: namedtuples and dataclasses are never imported: they must be loaded already, or be
                given as {"module:Name": cls}, or are returned as dicts with missing_classes="dict".

        Raises UnknownRefError, PathNotFoundError, StateMismatchError (nothing touched), PickleRefusedError,
        UnknownClassError, DamageError, or with `into` PartialLoadError, which names the leaves already overwritten.
        """
        from castore.checkpoint.load import LoadRequest, load

        request = LoadRequest(
            paths,
            strict,
            device,
            verify,
            allow_pickle,
            classes,
            missing_classes,
        )
        snapshot_id = self._resolve(ref)
        return load(self._handle, snapshot_id, request, into=into, progress=progress)

    def read(
        self, ref: str, path: str, *, rows: slice | None = None, verify: bool = True, allow_pickle: bool = False
    ) -> Any:
        """One leaf of a snapshot, or a range of rows along its first axis; reads only the chunks that hold it.

        `path` is the leaf's path as `castore show` prints it. `rows` takes a slice with step 1 and works as in numpy.
        Raises UnknownRefError, PathNotFoundError (with near matches), UsageError, DamageError.
        """
        from castore.checkpoint.load import read_leaf

        return read_leaf(
            self._handle, resolve(self._handle.backend, ref), path, rows=rows, verify=verify, allow_pickle=allow_pickle
        )

    # ---- history -------------------------------------------------------------------------------------------------

    def snapshot(self, ref: str | Snapshot = "main") -> Snapshot:
        """The snapshot that a ref means. Raises UnknownRefError, AmbiguousRefError or DamageError."""
        return self._snapshot(resolve(self._handle.backend, ref))

    def log(self, ref: str | Snapshot = "main") -> Iterator[Snapshot]:
        """The snapshot and its first parents, newest first; ends where a parent is gone."""
        for snapshot_id, record in ancestry(self._handle.backend, resolve(self._handle.backend, ref)):
            yield make_snapshot(snapshot_id, record, self._read_leaves)

    def snapshots(self) -> Iterator[Snapshot]:
        """Every snapshot of the repository, orphans included, by id."""
        for snapshot_id in list_snapshot_ids(self._handle.backend):
            yield self._snapshot(snapshot_id)

    def orphans(self) -> list[Snapshot]:
        """Snapshots that no branch or tag reaches: losers of conflicts and saves that died before their commit."""
        from castore.checkpoint.history import orphan_ids

        return [self._snapshot(snapshot_id) for snapshot_id in orphan_ids(self._handle)]

    def diff(
        self,
        a: str | Snapshot,
        b: str | Snapshot,
        *,
        paths: Sequence[str] | None = None,
        values: bool = True,
        progress: Progress | None = None,
    ) -> Any:
        """What changed from `a` to `b`, leaf by leaf.

        `values=True` reads the changed leaves and compares them as numbers (largest absolute difference, relative L2,
        cosine); False compares ids only, which needs neither tensors nor torch. `paths` are globs.
        """
        from castore.checkpoint.diff import diff

        backend = self._handle.backend
        return diff(
            self._handle, resolve(backend, a), resolve(backend, b), paths=paths, values=values, progress=progress
        )

    # ---- refs ----------------------------------------------------------------------------------------------------

    def branch(self, name: str, *, at: str | Snapshot = "main", move: bool = False) -> Ref:
        """Make a branch at a ref; it costs no bytes. `move=True` moves an existing one, also a damaged one.

        Raises InvalidNameError, RefExistsError, UnknownRefError, ConflictError.
        """
        from castore.checkpoint.history import make_branch

        return make_branch(self._handle, name, at=at, move=move)

    def tag(self, name: str, *, at: str | Snapshot = "main") -> Ref:
        """Name a snapshot for good. Raises InvalidNameError, RefExistsError, UnknownRefError."""
        from castore.checkpoint.history import make_tag

        return make_tag(self._handle, name, at=at)

    def branches(self) -> list[Ref]:
        """All branches, by name."""
        return list_branches(self._handle.backend)

    def tags(self) -> list[Ref]:
        """All tags, by name."""
        return list_tags(self._handle.backend)

    def delete_branch(self, name: str) -> None:
        """Remove a branch; its snapshots stay as orphans for the grace period. Raises UnknownRefError."""
        from castore.checkpoint.history import remove_branch

        remove_branch(self._handle, name)

    def delete_tag(self, name: str) -> None:
        """Remove a tag. Raises UnknownRefError."""
        from castore.checkpoint.history import remove_tag

        remove_tag(self._handle, name)

    # ---- maintenance ---------------------------------------------------------------------------------------------

    def verify(self, *, data: bool = False, progress: Progress | None = None) -> Any:
        """Check that everything reachable is there and well-formed; with `data=True` read and hash every byte.

        Returns a VerifyReport with `.ok`; damage is reported, not raised.
        """
        from castore.maintenance.verify import verify

        return verify(self._handle, data=data, progress=progress)

    def usage(self, *, depth: int = 1, progress: Progress | None = None) -> Any:
        """Where the bytes are: by snapshot, by group of leaves (`depth` levels of their paths), by codec."""
        from castore.maintenance.usage import usage

        return usage(self._handle, depth=depth, progress=progress)

    def repack(
        self,
        refs: Sequence[str | Snapshot] | None = None,
        *,
        level: Literal["usual", "max"] = "usual",
        flatten: bool = False,
        dry_run: bool = False,
        progress: Progress | None = None,
    ) -> Any:
        """Write chunks of these snapshots (default: of all) again in another encoding; no manifest changes.

        `flatten` makes deltas and rounded copies stand by themselves, so that loads read no bases and nothing is kept
        for them. `level="max"` searches long for the shortest encoding: 1 to 4 % less, at 3 MB/s a core, decoded at 0.6
        to 1 times the usual speed. `dry_run` counts what would be looked at. Blocks until the new records are durable
        and preferred to the old ones, which the next `gc` frees. Returns a RepackReport.

        Raises UsageError when neither is asked for, UnknownRefError, NoSpaceError, or DamageError: nothing is written
        that was not verified.
        """
        from castore.maintenance.repack import repack

        snapshots = None if refs is None else [self._resolve(ref) for ref in refs]
        return repack(self._handle, snapshots, level=level, flatten=flatten, dry_run=dry_run, progress=progress)

    def reindex(self, *, progress: Progress | None = None) -> Any:
        """Build the index again from the packs."""
        from castore.maintenance.reindex import reindex

        return reindex(self._handle, progress=progress)

    # ---- private -------------------------------------------------------------------------------------------------

    def _background(self) -> BackgroundSaver:
        """The saver of this process: a forked child has its own."""
        from castore.checkpoint.background import BackgroundSaver, wait_at_exit
        from castore.checkpoint.save import save_flat

        def carry(staged: StagedState, request: SaveRequest, progress: Progress) -> Snapshot:
            return self._bound(save_flat(self._handle, staged.flat, request, progress=progress, staged=True))

        if self._pid != os.getpid():  # a thread of the parent may have held it
            self._saver_lock, self._pid = threading.Lock(), os.getpid()
        with self._saver_lock:
            if self._saver is None or not self._saver.is_of_this_process:
                self._saver = BackgroundSaver(carry)
                wait_at_exit(self._saver)
            return self._saver

    def _settle(self) -> None:
        """Let background saves end, so that what follows continues from them; raise what went wrong."""
        if self._saver is not None and self._saver.is_of_this_process:
            self._saver.wait()
            self._saver.raise_failure()

    def _bound(self, snapshot: Snapshot) -> Snapshot:
        return replace(snapshot, _read_leaves=self._read_leaves)

    def _resolve(self, ref: str | Snapshot) -> SnapshotId:
        """The snapshot of a ref; a branch that is loaded is from now on the head this object has seen."""
        backend = self._handle.backend
        branch = branch_of(backend, ref)
        if branch is None:
            return resolve(backend, ref)
        seen = self._handle.seen_head(branch)
        snapshot_id = resolve(backend, ref)
        self._handle.note_head(branch, snapshot_id, unless_noted_since=seen)
        return snapshot_id

    def _snapshot(self, snapshot_id: SnapshotId) -> Snapshot:
        return make_snapshot(snapshot_id, read_record(self._handle.backend, snapshot_id), self._read_leaves)

    def _read_leaves(self, snapshot_id: SnapshotId) -> tuple[Leaf, ...]:
        handle = self._handle
        return leaf_table(handle.manifests.entries(read_record(handle.backend, snapshot_id)), handle.hasher)


def init(
    path: PathLike,
    *,
    hash: HashName = "xxh3-128",
    compression: Compression = "auto",
    lease_s: float = 60.0,
    orphan_grace_s: float = 14 * 24 * 3600.0,
) -> Repository:
    """Create a repository in a directory that is absent or empty.

    The options are stored in it: `hash` ("xxh3-128", or "blake3" where weights of strangers are stored), `compression`
    ("auto", "lz4", "none"), `lease_s` and `orphan_grace_s` in seconds. Raises RepositoryExistsError, UsageError,
    MissingExtraError (blake3) or RepositoryAccessError.
    """
    options = RepositoryOptions(hash, compression, float(lease_s), float(orphan_grace_s))
    return Repository(path, create(Path(path), options))


def open_(path: PathLike, *, create: bool = False, base_memory_bytes: int | None = None) -> Repository:
    """Open a repository; with `create=True` make one with default options when there is none.

    `base_memory_bytes` bounds the host memory in which saves keep the chunks that the next ones take differences from;
    what is not there is read from the repository, which costs a save about half as much processor time again. By
    default `save` keeps none, so that a save takes no memory worth speaking of, and `save_async`, which copies the
    state anyway, up to a quarter of the available memory.

    Raises RepositoryNotFoundError, RepositoryAccessError, UnsupportedFormatError or DamageError.
    """
    try:
        repository = Repository(path, open_repository(Path(path)))
    except RepositoryNotFoundError:
        if not create:
            raise
        try:
            repository = init(path)
        except RepositoryExistsError:  # another rank or thread was faster
            repository = Repository(path, open_repository(Path(path)))
    repository.handle.base_memory_bytes = base_memory_bytes
    return repository


def _reopen(path: str, base_memory_bytes: int | None) -> Repository:
    return open_(path, base_memory_bytes=base_memory_bytes)


def save(state: Any, path: PathLike, **options: Any) -> Snapshot:
    """Save a state into the repository at `path`, which is made when it is absent. Options as in `Repository.save`."""
    with open_(path, create=True) as repository:
        return repository.save(state, **options)


def load(path: PathLike, ref: str | Snapshot = "main", **options: Any) -> Any:
    """Load a state from the repository at `path`. Options as in `Repository.load`."""
    with open_(path) as repository:
        return repository.load(ref, **options)
