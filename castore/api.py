"""The public repository object: each method is one operation, carried out by a function of checkpoint/ or maintenance/.

    repo = castore.open("runs/store", create=True)
    snap = repo.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, step=100)
    state = repo.load("main")

Thread-safe; a context manager; pickles as its path; may be open many times in one process and across fork.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, overload

from castore.backend.local import LocalBackend
from castore.errors import (
    CastoreError,
    DamageError,
    PolicyWarning,
    RepositoryExistsError,
    RepositoryNotFoundError,
    UsageError,
    note_moved,
)
from castore.format.layout import POLICY
from castore.ids import SnapshotId
from castore.manifests import leaf_table
from castore.marks import forgotten_ids, read_thinning, thinned_ids
from castore.options import REPACK_BELOW, REPACK_BYTES_MAX, Compression, HashName, RepositoryOptions
from castore.refs import Ref, branch_of, list_branches, list_tags, resolve
from castore.repository import Handle, create, open_repository
from castore.snapshots import Leaf, Snapshot, ancestry, list_snapshot_ids, make_snapshot, read_record

if TYPE_CHECKING:
    from castore.checkpoint.background import BackgroundSaver, PendingSave
    from castore.checkpoint.diff import Diff
    from castore.checkpoint.request import SaveRequest
    from castore.checkpoint.stage import StagedState
    from castore.checkpoint.undelete import ForgottenSnapshot, UndeleteReport
    from castore.checkpoint.valid import ValidState
    from castore.checkpoint.worker import SaveWorker
    from castore.maintenance.forget import ForgetReport
    from castore.maintenance.gc.report import GcReport
    from castore.maintenance.parity import ParityReport
    from castore.maintenance.policy import Policy, PolicyCounter, PolicyReport
    from castore.maintenance.reindex import ReindexReport
    from castore.maintenance.repack import RepackReport
    from castore.maintenance.repair.execute import RepairReport
    from castore.maintenance.repair.sources import ChunkSource
    from castore.maintenance.report import VerifyReport
    from castore.maintenance.retention import Duration, Keep
    from castore.maintenance.thin import ThinReport
    from castore.maintenance.usage import Usage
    from castore.transfer.execute import TransferReport

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""
PathLike = str | os.PathLike[str]


class Repository:
    """A repository on this machine. Get one from `castore.init` or `castore.open`."""

    def __init__(self, path: PathLike, handle: Handle, *, worker_process: bool = False) -> None:
        if worker_process:
            _check_worker(handle)
        self._path = Path(path).absolute()
        self._handle = handle
        self._worker_process = worker_process
        self._worker: SaveWorker | None = None
        self._saver: BackgroundSaver | None = None
        self._saver_lock = threading.Lock()
        self._policy_counter: PolicyCounter | None = None
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

        Raises the first error of a background save that nobody has asked for, after everything is closed. When Ctrl-C
        strikes while it waits, saves go on, as they do without `close`: the interpreter waits for them.
        """
        try:
            self._settle()
        finally:
            if self._saver is None or not self._saver.is_of_this_process:
                self._handle.close()
            elif self._saver.is_idle:
                if self._worker is not None:
                    self._worker.close()
                self._handle.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"castore.open({str(self._path)!r})"

    def __reduce__(self) -> tuple[object, ...]:
        return (_reopen, (str(self._path), self._handle.base_memory_bytes, self._worker_process))

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
                numbers, text, bytes and None. It is read in place and must not change until this returns.
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
        self._apply_policy_when_due(snapshot)
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

        What is saved is the state at the call: it may change as soon as this returns. The rest goes on in a thread, or
        in a process of its own where the repository was opened with `worker_process=True`; `result()` of what is
        returned waits for durability and gives the Snapshot. Saves are committed in the order of the calls, and the
        interpreter waits for them at its exit. Blocks beyond the copy only while too many saves are waiting
        (`limit_async`), with one SlowSaveWarning.

        An error of an earlier save that nobody has asked for is raised here, before anything is done; else as `save`,
        a state that cannot be saved being refused when there is room for it.
        `result()` raises what the save raised, or WorkerError when the worker process was killed: that save is lost,
        unless a note says that the branch has moved, and the next one starts another worker.
        """
        from castore.checkpoint.request import SaveRequest, check_request
        from castore.checkpoint.stage import stage, staged_bytes
        from castore.tensors import flatten, glance, pinned_slab

        request = check_request(
            SaveRequest(branch, step, metrics or {}, metadata or {}, message, tags, parent, allow_pickle)
        )
        saver = self._background()
        saver.raise_failure()
        seen = glance(state)
        take_apart = partial(flatten, state, allow_pickle=allow_pickle, known=seen.arrays)
        pending = saver.reserve(staged_bytes(seen), request.step)
        try:
            if self._worker is not None:
                staged = self._worker.stage(seen, take_apart)
            else:
                staged = stage(seen, take_apart, self._handle.pool, self._handle.pinned_pool(pinned_slab))
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
        mmap: bool = False,
        verify: bool | None = None,
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
            mmap: map leaves instead of reading them, where a leaf lies raw and in one piece in a pack, as all do in a
                repository with `compression="none"`; the rest is copied. A mapped tensor or array is read from the disk
                at the first touch; it may be written to, and what is written stays in this process. It stays as it is
                when the repository is closed, when gc removes the pack, and in forked children. As with every mapped
                file, the process ends by SIGBUS if the disk fails under it, or if somebody cuts the pack short later.
            verify: by default every chunk that is copied is hashed and compared with its id; mapped leaves, which are
                not read here, are not: of them the pack's table and length are checked. True reads and hashes mapped
                leaves too (as `verify(data=True)` does for the repository). False still compares the checksums of
                stored bytes.
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
            mmap,
        )
        snapshot_id = self._resolve(ref)
        return load(self._handle, snapshot_id, request, into=into, progress=progress)

    def load_latest_valid(
        self,
        ref: str | Snapshot = "main",
        *,
        paths: Sequence[str] | None = None,
        into: Any = None,
        strict: bool = True,
        device: Any = None,
        allow_pickle: bool = False,
        classes: Mapping[str, type] | None = None,
        missing_classes: Literal["error", "dict"] = "error",
        progress: Progress | None = None,
    ) -> ValidState:
        """Load the newest snapshot of a ref's history that is whole, every byte verified: what a run resumes from.

            found = repo.load_latest_valid("main")
            model.load_state_dict(found.state["model"])
            repo.save(state, step=step, parent=found.snapshot)      # history goes on from what was loaded

        Goes back from the ref along first parents; where history breaks off, on to the other snapshots that were saved
        to the branch, the newest first. Each that is passed over is told by a SkippedSnapshotWarning, a record of the
        logger "castore", and in the result: `.state`, `.snapshot`, `.skipped` with the reasons. Thinned snapshots are
        passed over when what was dropped is asked for.

        Arguments as in `load`. With `into` a snapshot is read twice: live memory is touched only by what has proved to
        be whole. Raises NoValidSnapshotError (nothing was touched) when there is none; UnknownRefError; and what is
        wrong with the call rather than with the stored bytes, as `load` does.
        """
        from castore.checkpoint.load import LoadRequest
        from castore.checkpoint.valid import ValidState, load_valid

        request = LoadRequest(
            paths, strict, device, allow_pickle=allow_pickle, classes=classes, missing_classes=missing_classes
        )
        with suppress(DamageError):  # of the ref file
            self._resolve(ref)
        state, snapshot_id, skipped = load_valid(self._handle, ref, request, into=into, progress=progress)
        return ValidState(state, self._snapshot(snapshot_id), skipped)

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
        """The snapshot and its first parents, newest first, across forgotten ones; ends where a parent is gone."""
        backend = self._handle.backend
        thinned = thinned_ids(backend)
        for snapshot_id, record in ancestry(backend, resolve(backend, ref)):
            overlay = read_thinning(backend, snapshot_id) if snapshot_id in thinned else None
            yield make_snapshot(snapshot_id, record, self._read_leaves, overlay)

    def snapshots(self) -> Iterator[Snapshot]:
        """Every snapshot of the repository, by id: orphans are among them, forgotten ones are not."""
        forgotten = forgotten_ids(self._handle.backend)
        for snapshot_id in list_snapshot_ids(self._handle.backend):
            if snapshot_id not in forgotten:
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
    ) -> Diff:
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

    # ---- retention -----------------------------------------------------------------------------------------------

    def forget(
        self,
        keep: Keep | None = None,
        *,
        ids: Sequence[str | Snapshot] | None = None,
        dry_run: bool = False,
        progress: Progress | None = None,
    ) -> ForgetReport:
        """Forget the snapshots that no rule of `keep` keeps, or those that `ids` name; frees nothing until gc runs.

            repo.forget(castore.Keep(last=3, every=1000, within="7d", best=("val_loss", "min", 2)))
            repo.forget(ids=["3f2a81c0", "main@1200"])

        A branch's head and every tagged snapshot stay. History goes on behind what was forgotten: `log`, `main~3` and
        `main@1200` pass over it. `ids` takes any ref, also of a snapshot that cannot be read; its parents are then
        inferred, so that its ancestors are not lost with it. A crash leaves some of them forgotten. `undelete` brings
        them back while gc has not freed them. Blocks for about one sync to disk for each dropped snapshot.

        Raises UsageError (neither or both; a head or a tagged snapshot among `ids`), UnknownRefError, DamageError.
        """
        from castore.maintenance.forget import forget_by_policy, forget_named

        if (keep is None) == (ids is None):
            raise UsageError("forget: give either what to keep, as castore.Keep(last=3), or ids")
        if keep is not None:
            return forget_by_policy(self._handle, keep, dry_run=dry_run, progress=progress)
        assert ids is not None
        return forget_named(self._handle, ids, dry_run=dry_run)

    def thin(
        self,
        globs: Sequence[str],
        *,
        older_than: int | str | timedelta | None = None,
        ids: Sequence[str | Snapshot] | None = None,
        dry_run: bool = False,
        progress: Progress | None = None,
    ) -> ThinReport:
        """Keep snapshots but drop the leaves that match: full state for the newest few, weights for the rest.

            repo.thin(["optimizer/**"], older_than=20)

        `older_than` counts snapshots along each branch, forgotten ones left out: with 20 the newest 20 stay whole. Or
        it is a duration before the newest of the branch: "7d", a timedelta. Heads and tagged snapshots stay whole
        unless `ids` names them. The snapshot, its id, its state id and its refs stay;
        loading a dropped leaf raises ThinnedError, `load(paths=…)` of the rest works. Frees nothing until gc runs;
        until then `undelete` makes a snapshot whole again.

        Raises UsageError, PathNotFoundError (the globs match nothing in any of the snapshots), DamageError.
        """
        from castore.maintenance.thin import thin_named, thin_old

        if (older_than is None) == (ids is None):
            raise UsageError("thin: give either older_than, such as 20 (snapshots) or '7d', or ids")
        if older_than is not None:
            return thin_old(self._handle, globs, older_than=older_than, dry_run=dry_run, progress=progress)
        assert ids is not None
        return thin_named(self._handle, globs, ids, dry_run=dry_run)

    def forgotten(self) -> list[ForgottenSnapshot]:
        """What was forgotten, the last first: what `undelete` may bring back, and tombstones of what gc has freed."""
        from castore.checkpoint.undelete import list_forgotten

        return list_forgotten(self._handle)

    def undelete(self, ids: Sequence[str | Snapshot] | None = None) -> UndeleteReport:
        """Bring forgotten snapshots back, or make thinned ones whole; None: every forgotten one that is still there.

        Each goes one step back: a snapshot that is forgotten and thinned is remembered first, as thin as it is. One
        that no branch or tag reaches is an orphan again, whose grace period starts now.

        Raises SnapshotGoneError when gc has freed what a named one needs, UnknownRefError, UsageError (it is neither).
        """
        from castore.checkpoint.undelete import undelete

        return undelete(self._handle, ids)

    def policy(self) -> Policy | None:
        """The policy stored in the repository, None when there is none. Raises DamageError."""
        from castore.maintenance.policy import read_policy

        return read_policy(self._handle.backend)

    def set_policy(
        self,
        keep: Keep | None = None,
        *,
        thin: Sequence[str] = (),
        older_than: int | str | timedelta | None = None,
        every_saves: int | None = None,
    ) -> Policy:
        """Store what `forget` and `thin` shall do by themselves: `castore gc --auto` applies it, and with
        `every_saves=n` so does every n-th save, whoever makes it.

        After a save it is applied once the save is durable; should that fail, a PolicyWarning says so. Frees nothing:
        gc does. Raises UsageError for a policy that does nothing.
        """
        from castore.maintenance.policy import make_policy, write_policy

        policy = make_policy(keep, thin=thin, older_than=older_than, every_saves=every_saves)
        write_policy(self._handle, policy)
        return policy

    def clear_policy(self) -> bool:
        """Remove the stored policy, also a damaged one; False when there was none."""
        from castore.maintenance.policy import clear_policy

        return clear_policy(self._handle)

    def apply_policy(self, *, dry_run: bool = False, progress: Progress | None = None) -> PolicyReport | None:
        """Forget and thin by the stored policy now; None when there is none."""
        from castore.maintenance.policy import apply_policy

        return apply_policy(self._handle, dry_run=dry_run, progress=progress)

    # ---- maintenance ---------------------------------------------------------------------------------------------

    def verify(
        self,
        *,
        data: bool = False,
        max_duration: Duration | None = None,
        max_age: Duration | None = None,
        progress: Progress | None = None,
    ) -> VerifyReport:
        """Check that everything reachable is there and well-formed; with `data=True` read and hash every byte.

        `max_duration` and `max_age` ("10m", "30d", seconds, a timedelta) spread the reading over many runs: packs are
        read for so long, those first that were not read for longest, and those left out that were found whole within
        that age. What was read when is remembered in the cache of the repository.

        Returns a VerifyReport with `.ok`; damage is reported, not raised.
        """
        from castore.maintenance.retention import duration_ns
        from castore.maintenance.verify import verify

        max_duration_s, max_age_s = (
            None if given is None else duration_ns(given) / 1e9 for given in (max_duration, max_age)
        )

        return verify(self._handle, data=data, max_duration_s=max_duration_s, max_age_s=max_age_s, progress=progress)

    def repair(
        self,
        *,
        sources: Sequence[Any] = (),
        dry_run: bool = False,
        fix_refs: bool = False,
        progress: Progress | None = None,
    ) -> RepairReport:
        """Bring a damaged repository to a state that can be worked with, and lose nothing that can still be read.

        Records that read right are copied out of damaged packs into new ones; what is damaged then moves to the folder
        `quarantine/`, nothing is deleted. Chunks that are lost are written again where another source holds the same
        content. Of snapshots that lost leaves all the same it is marked which: `load` names them (LostLeavesError), the
        other leaves load with `paths=`, and gc goes on.

        Args:
            sources: where lost content may be found: paths of other repositories, or states (what a checkpoint file
                held), of which every chunk is tried.
            dry_run: only plan.
            fix_refs: move branches that name nothing readable to the newest whole snapshot that was saved to them.

        Returns a RepairReport. Reads every byte, as `verify(data=True)` does. Raises LeaseError while a collector is at
        work, NoSpaceError before anything is written, StorageError.
        """
        from castore.maintenance.repair.execute import repair

        self._settle()
        with ExitStack() as opened:
            chosen = [self._chunk_source(source, opened) for source in sources]
            return repair(self._handle, chosen, dry_run=dry_run, fix_refs=fix_refs, progress=progress)

    def usage(self, *, depth: int = 1, progress: Progress | None = None) -> Usage:
        """Where the bytes are: by snapshot, by group of leaves (`depth` levels of their paths), by codec."""
        from castore.maintenance.usage import usage

        return usage(self._handle, depth=depth, progress=progress)

    @overload
    def gc(
        self,
        dry_run: bool = False,  # noqa: FBT001, FBT002
        *,
        auto: Literal[False] = False,
        repack_below: float = REPACK_BELOW,
        repack_bytes_max: int = REPACK_BYTES_MAX,
        target_bytes: int | None = None,
        wait_s: float | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> GcReport: ...

    @overload
    def gc(
        self,
        dry_run: bool = False,  # noqa: FBT001, FBT002
        *,
        auto: bool,
        repack_below: float = REPACK_BELOW,
        repack_bytes_max: int = REPACK_BYTES_MAX,
        target_bytes: int | None = None,
        wait_s: float | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> GcReport | None: ...

    def gc(
        self,
        dry_run: bool = False,  # noqa: FBT001, FBT002  repo.gc(True) reads as what it is
        *,
        auto: bool = False,
        repack_below: float = REPACK_BELOW,
        repack_bytes_max: int = REPACK_BYTES_MAX,
        target_bytes: int | None = None,
        wait_s: float | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> GcReport | None:
        """Free what no branch, tag or orphan within its grace needs. Saves and loads go on meanwhile.

        Args:
            dry_run: say what would be freed, and change nothing.
            auto: apply the stored policy first, then collect only when listings say that there is something to free,
                and once a day; else return None. Cheap enough for every minute. With `dry_run` the policy is left alone
                (`apply_policy` has a dry run of its own).
            repack_below: packs of which a smaller share is live are rewritten; 0 only deletes packs in which nothing is
                live. repack_bytes_max: what one collection copies at most.
            target_bytes: until the packs take no more than that, forget snapshots which the stored policy does not
                keep, the oldest first; what is impossible is pending in the report.
            wait_s: how long to wait for saves that began before; what they hold up is left to the next collection. By
                default the lease length of the repository.
            progress: called with (what is being done, done, in all).

        Returns a GcReport: what was freed, what is pending and why, what differences pin, what is wasted inside packs.
        Interrupted at any point, it is simply run again. Raises LeaseError when another collector is at work, and
        DamageError, having freed nothing, when a ref, snapshot or manifest cannot be read.
        """
        from castore.maintenance.gc.collect import GcRequest, collect
        from castore.maintenance.gc.target import collect_to_target
        from castore.maintenance.policy import apply_policy, collection_is_due, note_collected

        # Here too: a policy is applied, or snapshots are forgotten, before anything is collected.
        self._handle.config.check_features("write", "gc", where=self._handle.backend.location)
        self._settle()
        request = GcRequest(dry_run, repack_below, repack_bytes_max, wait_s, target_bytes)
        if auto and not dry_run:
            apply_policy(self._handle)
        if auto and not collection_is_due(self._handle, target_bytes=target_bytes):
            return None
        run = collect if target_bytes is None else collect_to_target
        report = run(self._handle, request, progress=progress or (lambda *_: None))
        if auto and not dry_run and not report.is_cut_short:
            note_collected(self._handle)
        return report

    def repack(
        self,
        refs: Sequence[str | Snapshot] | None = None,
        *,
        level: Literal["usual", "max"] = "usual",
        flatten: bool = False,
        dry_run: bool = False,
        progress: Progress | None = None,
    ) -> RepackReport:
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

    def reindex(self, *, progress: Progress | None = None) -> ReindexReport:
        """Build the index again from the packs."""
        from castore.maintenance.reindex import reindex

        return reindex(self._handle, progress=progress)

    def add_parity(
        self, *, overhead_percent: int = 10, data: bool = False, progress: Progress | None = None
    ) -> ParityReport:
        """Protect every pack that is not yet: parity from which lost or rotten stretches of it can be restored.

        `overhead_percent` of a pack's bytes restore as large a part of it, in one piece or scattered. Packs of later
        saves need another call. Parity that cannot be used any more is made anew; with `data` it is all read, and what
        has rotten stretches too. Needs `castore[parity]`. Returns a ParityReport; damaged packs are refused and listed.
        """
        from castore.maintenance.parity import add_parity

        return add_parity(self._handle, overhead_percent=overhead_percent, data=data, progress=progress)

    # ---- other repositories --------------------------------------------------------------------------------------

    def push(
        self,
        other: Repository | PathLike,
        refs: Sequence[str] | None = None,
        *,
        depth: int | None = None,
        force: bool = False,
        check: bool = False,
        reencode: bool = False,
        dry_run: bool = False,
        progress: Progress | None = None,
    ) -> TransferReport:
        """Copy snapshots with their history into another repository, sending only chunks that it lacks.

        Args:
            refs: branches and tags of this repository; None: all. `main:backup/main` gives another name there, and
                names what has none here: `main@1200:best`, `3f2a81c0:tags/best`.
            depth: at most so many snapshots of each ref, counted from its head; earlier parents are shown as gone.
            force: move a branch that holds there what this repository lacks. Tags never move.
            check: read what the other has already, and send again what is rotten there.
            reencode: encode every chunk by the other's options instead of copying stored bytes and differences.

        Every chunk is verified on the way. With one hash, snapshots keep their ids. With another hash, chunks and
        snapshots get new ids, states the same meaning; a second push finds the same new ids again (`report.sent`).
        Interrupted, it is simply run again: what arrived is not sent twice. Blocks until all of it is durable.

        Raises DivergedError, RefExistsError (a tag that names something else), RefError, UsageError before anything is
        sent; DamageError naming what is damaged here, NoSpaceError, StorageError, ConflictError (the branch moved
        meanwhile; the snapshots are there).
        """
        from castore.transfer.execute import transfer
        from castore.transfer.request import TransferRequest

        self._settle()
        request = TransferRequest(refs, depth, force, check, reencode)
        with _as_repository(other) as target:
            return transfer(self._handle, target.handle, request, purpose="push", dry_run=dry_run, progress=progress)

    def pull(
        self,
        other: Repository | PathLike,
        refs: Sequence[str] | None = None,
        *,
        depth: int | None = None,
        force: bool = False,
        check: bool = False,
        reencode: bool = False,
        dry_run: bool = False,
        progress: Progress | None = None,
    ) -> TransferReport:
        """Copy snapshots from another repository into this one: `push`, the other way round.

        Needs no right to write to the other. The branches that moved are from now on where this object has seen them.
        """
        from castore.transfer.execute import transfer
        from castore.transfer.request import TransferRequest

        self._settle()
        request = TransferRequest(refs, depth, force, check, reencode)
        with _as_repository(other) as source:
            return transfer(source.handle, self._handle, request, purpose="pull", dry_run=dry_run, progress=progress)

    # ---- private -------------------------------------------------------------------------------------------------

    def _background(self) -> BackgroundSaver:
        """The saver of this process: a forked child has its own."""
        from castore.checkpoint.background import BackgroundSaver, wait_at_exit
        from castore.checkpoint.save import save_flat

        def carry(staged: StagedState, request: SaveRequest, progress: Progress) -> Snapshot:
            if self._worker is not None:
                snapshot = self._worker.save(staged, request, progress)
            else:
                snapshot = save_flat(self._handle, staged.flatten(), request, progress=progress)
            self._apply_policy_when_due(snapshot)
            return self._bound(snapshot)

        if self._pid != os.getpid():  # a thread of the parent may have held it
            self._saver_lock, self._pid = threading.Lock(), os.getpid()
        with self._saver_lock:
            if self._saver is None or not self._saver.is_of_this_process:
                if self._worker_process:
                    from castore.checkpoint.worker import SaveWorker

                    self._worker = SaveWorker(self._handle)
                self._saver = BackgroundSaver(carry)
                wait_at_exit(self._saver)
            return self._saver

    def _apply_policy_when_due(self, snapshot: Snapshot) -> None:
        """After a save, which is durable by now: nothing that goes wrong here may look like its failure."""
        try:
            if self._handle.backend.stat(POLICY) is None:
                return
            from castore.maintenance.policy import PolicyCounter, apply_policy

            if self._policy_counter is None:
                self._policy_counter = PolicyCounter()
            if self._policy_counter.is_due(self._handle.backend):
                apply_policy(self._handle)
        except CastoreError as error:
            warnings.warn(
                f"the save is durable, but the stored policy could not be applied: {error}", PolicyWarning, stacklevel=3
            )
        except BaseException as error:
            note_moved(error, snapshot.branch, snapshot.id)
            raise

    def _settle(self) -> None:
        """Let background saves end, so that what follows continues from them; raise what went wrong."""
        if self._saver is not None and self._saver.is_of_this_process:
            self._saver.wait()
            self._saver.raise_failure()

    def _chunk_source(self, source: Any, opened: ExitStack) -> ChunkSource:
        """A source for `repair`: a repository, which `opened` closes when it was given by its path, or a state that is
        hashed as a save would.
        """
        from castore.maintenance.repair.sources import MappedSource, RepositorySource

        hasher = self._handle.hasher
        if isinstance(source, str | os.PathLike | Repository):
            return RepositorySource(opened.enter_context(_as_repository(source)).handle, hasher)
        from castore.checkpoint.plan import hash_state, plan_manifest
        from castore.tensors import flatten

        hashed = hash_state(flatten(source, allow_pickle=False), hasher, progress=lambda _: None)
        found = dict(plan_manifest(hashed.entries, hasher).sources)
        for leaf in hashed.leaves:
            found.update(zip(leaf.ids, leaf.sources, strict=True))
        return MappedSource("a state", {chunk_id: chunk.read for chunk_id, chunk in found.items()})

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
        backend = self._handle.backend
        record = read_record(backend, snapshot_id)
        return make_snapshot(snapshot_id, record, self._read_leaves, read_thinning(backend, snapshot_id))

    def _read_leaves(self, snapshot_id: SnapshotId) -> tuple[Leaf, ...]:
        handle = self._handle
        entries = handle.manifests.entries(read_record(handle.backend, snapshot_id))
        return leaf_table(entries, handle.hasher, read_thinning(handle.backend, snapshot_id))


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


def open_(
    path: PathLike, *, create: bool = False, base_memory_bytes: int | None = None, worker_process: bool = False
) -> Repository:
    """Open a repository; with `create=True` make one with default options when there is none.

    `base_memory_bytes` bounds the host memory in which saves keep the chunks that the next ones take differences from;
    what is not there is read from the repository, which costs a save about a third as much processor time again. By
    default all repositories of the process have a quarter of the available memory together, or of this rank's share of
    it (LOCAL_WORLD_SIZE); with 0 a save takes no memory worth speaking of. The bound is for each process: with a worker
    process, both it and a `save` of this one keep as much.

    `worker_process=True` has `save_async` write in a process of its own, at the lowest priority, in place of a thread:
    for a training that keeps every core busy, whose steps threads would slow down while they encode. Everything else is
    the same, but that a warning which is made an error (LowSpaceWarning) is raised when the save is over. The process
    starts with the first `save_async`, takes about 50 MB of memory beside the copies (which lie in memory that both
    share) and the bases, and ends with `close`, with the interpreter, or when the training is killed. A save takes
    longer to be durable, the longer the less the training leaves of the cores.

    Raises RepositoryNotFoundError, RepositoryAccessError, UnsupportedFormatError or DamageError; UsageError where no
    memory can be shared with another process, or where a frozen program has no interpreter to start.
    """
    if worker_process:
        from castore.checkpoint.shared_region import check_sharing

        check_sharing()  # before a repository is made
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
    return Repository(path, repository.handle, worker_process=worker_process) if worker_process else repository


def _check_worker(handle: Handle) -> None:
    """Raise UsageError when no other process can open what this handle has opened, or none can share memory."""
    from castore.checkpoint.shared_region import check_sharing

    check_sharing()
    if type(handle.backend) is not LocalBackend:  # one that adds something would be passed over
        raise UsageError(
            f"worker_process: {handle.backend.location} lies in a {type(handle.backend).__name__}, which another "
            "process cannot open; open without it: a thread saves"
        )


@contextmanager
def _as_repository(other: Repository | PathLike) -> Iterator[Repository]:
    """A repository as it is, or one opened for the block."""
    if isinstance(other, Repository):
        other._settle()
        yield other
        return
    with open_(other) as opened:
        yield opened


def _reopen(path: str, base_memory_bytes: int | None, worker_process: bool) -> Repository:  # noqa: FBT001  from a pickle
    return open_(path, base_memory_bytes=base_memory_bytes, worker_process=worker_process)


def save(state: Any, path: PathLike, **options: Any) -> Snapshot:
    """Save a state into the repository at `path`, which is made when it is absent. Options as in `Repository.save`."""
    with open_(path, create=True) as repository:
        return repository.save(state, **options)


def load(path: PathLike, ref: str | Snapshot = "main", **options: Any) -> Any:
    """Load a state from the repository at `path`. Options as in `Repository.load`."""
    with open_(path) as repository:
        return repository.load(ref, **options)
