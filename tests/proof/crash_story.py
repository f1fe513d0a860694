"""One life of a repository, told operation by operation, and what may be asked of whatever a crash left of it.

After each operation the story marks in the journal what was reported by then: every snapshot with its state, every
ref. Between two marks an operation was under way, so a ref may stand where it stood or where it went, and a snapshot is
owed if it was reported before and is not being forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import castore
from castore.api import Repository
from castore.format.layout import pack_name
from castore.ids import PackId
from castore.index import MemoryIndex
from castore.maintenance.parity import parity_status
from tests.checkpoint.crashes import refs_of
from tests.checkpoint.damage import places_of
from tests.checkpoint.states import State, assert_same, training_state
from tests.proof.journal import IndexCommit, Mark, Operation, Recorder
from tests.proof.left_behind import LeftBackend, Tables, open_left
from tests.proof.one_thread import one_thread
from tests.proof.operations import collect, forget, thin, undelete
from tests.proof.scheduler import Clock

STORE, OTHER = "store", "other"
GRACE_S = 600.0
LATER_NS = 10**9 * 3600
"""How long after the crash somebody looks: orphans are past their grace by then, so only refs protect anything."""
THINNED = "model/*"
"""What thinning drops; the rest must stay."""


@dataclass(frozen=True)
class Owed:
    """What one repository has reported."""

    refs: Mapping[str, str] = field(default_factory=dict)
    whole: frozenset[str] = frozenset()
    """Snapshots that were reported durable and not forgotten."""
    thinned: frozenset[str] = frozenset()
    """Those of which only the rest is owed."""
    rotten: frozenset[str] = frozenset()
    """Those that the disk has damaged, until they are repaired from a state that somebody still has."""

    protected: frozenset[PackId] = frozenset()
    """Packs whose parity was reported: as long as they stand, it can be used."""

    def key(self) -> object:
        """Two that are equal owe the same."""
        return frozenset(self.refs.items()), self.whole, self.thinned, self.rotten, self.protected


@dataclass(frozen=True)
class Promise:
    """What was reported by some moment."""

    doing: str
    """The operation that came before."""
    owed: Mapping[str, Owed] = field(default_factory=dict)
    """By repository."""
    now_ns: int = 0


class Story:
    """Runs operations under a recorder and marks what they reported."""

    def __init__(self, base: Path, *, keeps_caches: bool = False) -> None:
        self.now_ns = 10**18
        self.recorder = Recorder(base, keeps_caches=keeps_caches)
        self.states: dict[str, State] = {}
        """Every state that was ever saved, by its snapshot."""
        self.ids: dict[int, str] = {}
        """Snapshots by their step."""
        self.repos: dict[str, Repository] = {}
        self._whole: dict[str, set[str]] = {}
        self._thinned: dict[str, set[str]] = {}
        self.rotten: set[str] = set()
        self.protected: set[PackId] = set()

    def clock(self) -> int:
        """A clock that nothing but the story moves on."""
        self.now_ns += 1000
        return self.now_ns

    def tell(self, chapters: Mapping[str, Chapter]) -> None:
        """Create a repository and carry out every chapter."""
        with self.recorder.installed():
            self.create(STORE)
            self._mark("init")
            for name, chapter in chapters.items():
                chapter(self, self.repos[STORE])
                self._mark(name)
            for repo in self.repos.values():
                repo.close()

    def create(self, name: str) -> Repository:
        """One more repository on the same disk."""
        repo = self.repos[name] = castore.init(self.recorder.base / name, lease_s=1.0, orphan_grace_s=GRACE_S)
        repo.handle.clock = self.clock
        self._whole[name], self._thinned[name] = set(), set()
        return repo

    def saved(self, snapshot: castore.Snapshot, state: State) -> None:
        """A save that returned."""
        self.states[snapshot.id] = state
        assert snapshot.step is not None
        self.ids[snapshot.step] = snapshot.id
        self.owes(snapshot.id)

    def owes(self, *snapshot_ids: str, repository: str = STORE) -> None:
        """These were reported."""
        self._whole[repository] |= set(snapshot_ids)

    def forgotten(self, *snapshot_ids: str) -> None:
        """Nobody may rely on these any more."""
        self._whole[STORE] -= set(snapshot_ids)
        self._thinned[STORE] -= set(snapshot_ids)

    def thinned(self, *snapshot_ids: str) -> None:
        """Of these only the rest."""
        self.forgotten(*snapshot_ids)
        self._thinned[STORE] |= set(snapshot_ids)

    def later(self, seconds: float) -> None:
        """Time goes by."""
        self.now_ns += int(seconds * 1e9)

    def _mark(self, doing: str) -> None:
        owed = {
            name: Owed(
                refs_of(repo.handle.backend),
                frozenset(self._whole[name]),
                frozenset(self._thinned[name]),
                frozenset(self.rotten) if name == STORE else frozenset(),
                frozenset(self.protected) if name == STORE else frozenset(),
            )
            for name, repo in self.repos.items()
        }
        self.recorder.mark(Promise(doing, owed, self.now_ns))


Chapter = Callable[[Story, Repository], object]

# ---- the chapters ----------------------------------------------------------------------------------------------------


def _small(seed: int) -> State:
    """Differences of the wandering leaf are half as large as itself: such bases do not pay for themselves for long."""
    start = np.random.default_rng(0).standard_normal(1000)
    wandering = (start * (1 + 3e-3 * np.random.default_rng(seed).standard_normal(1000))).astype(np.float32)
    return training_state(seed, frozen_bytes=4000, moving_bytes=2000) | {"wandering": wandering}


def _save(step: int, *, like: int | None = None, **options: Any) -> Chapter:
    state = _small(step if like is None else like)

    def chapter(story: Story, repo: Repository) -> None:
        story.saved(repo.save(state, step=step, **options), state)

    return chapter


def _save_async(story: Story, repo: Repository) -> None:
    pending = repo.save_async(_small(3), step=3)
    story.saved(pending.result(60), _small(3))


def _drop_fork(story: Story, repo: Repository) -> None:
    story.forgotten(story.ids[4])
    repo.delete_branch("fork")


def _forget(*steps: int) -> Chapter:
    def chapter(story: Story, repo: Repository) -> None:
        ids = [story.ids[step] for step in steps]
        story.forgotten(*ids)
        forget(repo, ids)

    return chapter


def _forget_the_anchors(story: Story, repo: Repository) -> None:
    """What is left rests on chunks that nothing else needs: gc stores it anew."""
    for tag in repo.tags():
        repo.delete_tag(tag.name)
    for branch in ("other", "fork"):
        if any(ref.name == branch for ref in repo.branches()):
            repo.delete_branch(branch)
    ids = [snapshot.id for snapshot in repo.log("main")][2:]
    story.forgotten(*ids)
    forget(repo, ids)


def _undelete(step: int) -> Chapter:
    def chapter(story: Story, repo: Repository) -> None:
        undelete(repo, [story.ids[step]])
        story.owes(story.ids[step])

    return chapter


def _thin(step: int) -> Chapter:
    def chapter(story: Story, repo: Repository) -> None:
        story.thinned(story.ids[step])
        thin(repo, [THINNED], [story.ids[step]])

    return chapter


def _collect(*, deletes: bool = False, rewrites: bool = False, rebases: bool = False) -> Chapter:
    """A collection that does just that, so that no change of the story takes it away unseen."""

    def chapter(story: Story, repo: Repository) -> None:
        story.later(2 * GRACE_S)
        report = collect(repo)
        found = bool(report.packs_deleted), bool(report.packs_rewritten), report.rebased_bytes > 0
        assert found == (deletes, rewrites, rebases), report

    return chapter


def _repack(story: Story, repo: Repository) -> None:
    """Every difference is stored by itself; what it was before is garbage."""
    assert repo.repack(flatten=True).rewritten_count > 0


def _add_parity(story: Story, repo: Repository) -> None:
    report = repo.add_parity()
    assert report.added
    assert not report.refused
    story.protected |= set(report.added)


def _rot(step: int) -> Chapter:
    def chapter(story: Story, repo: Repository) -> None:
        """A bit of a chunk that this snapshot alone needs."""
        ((pack_id, row),) = places_of(repo, story.ids[step], "model/moving")
        path = repo.handle.backend.local_path(pack_name(pack_id))
        assert path is not None
        story.recorder.rot(path, row.offset + row.stored_bytes // 2)
        story.rotten = {story.ids[step]}

    return chapter


def _repair(story: Story, repo: Repository) -> None:
    repo.repair(sources=[story.states[snapshot_id] for snapshot_id in story.rotten])
    story.rotten = set()


def _push(story: Story, repo: Repository) -> None:
    repo.push(story.repos[OTHER], ["main", "kept"])
    story.owes(*(found.id for found in story.repos[OTHER].log("main")), repository=OTHER)


CHAPTERS: Mapping[str, Chapter] = {
    "save": _save(1),
    "save of differences": _save(2, tags=("early",)),
    "save_async": _save_async,
    "save to a fork": _save(4, branch="fork", parent="main~1"),
    "branch": lambda story, repo: repo.branch("other", at="main~1"),
    "tag": lambda story, repo: repo.tag("kept", at="main~2"),
    "save of what is there": _save(22, like=2),
    "delete a branch": _drop_fork,
    "one more save": _save(5),
    "second repository": lambda story, repo: story.create(OTHER),
    "push": _push,
    "forget": _forget(3, 22),
    "undelete": _undelete(3),
    "gc": _collect(deletes=True),
    "save after gc": _save(6),
    "thin": _thin(5),
    "last save": _save(7),
    "push of the rest": _push,
    "gc that repacks": _collect(rewrites=True),
    "gc without work": _collect(),
    "bit rot": _rot(6),
    "repair": _repair,
    "forget the anchors": _forget_the_anchors,
    "gc that rebases": _collect(deletes=True, rewrites=True, rebases=True),
    "repack": _repack,
    "add parity": _add_parity,
    "gc of what was repacked": _collect(rewrites=True),
}


# ---- what may be asked -----------------------------------------------------------------------------------------------


def moments(journal: Sequence[Operation]) -> list[tuple[int, Promise, Promise]]:
    """The length of each prefix that ends after `init`, with what was reported and what comes next."""
    marks = [(number, found.value) for number, found in enumerate(journal) if isinstance(found, Mark)]
    found = []
    for (start, before), (end, after) in zip(marks, [*marks[1:], (len(journal), marks[-1][1])], strict=True):
        found += [(length, before, after) for length in range(start + 1, end + 1)]
    return found


def files_of_repository(files: Mapping[str, bytes], repository: str) -> dict[str, bytes]:
    """The files of one repository."""
    prefix = f"{repository}/"
    return {name.removeprefix(prefix): data for name, data in files.items() if name.startswith(prefix)}


class Examiner:
    """Rebuilds repositories and asks what must hold of them."""

    def __init__(self, states: Mapping[str, State]) -> None:
        self._states = states
        self._tables = Tables()
        self._found_whole: set[object] = set()
        """Repositories that were examined: most calls change one of them and leave the other as it was."""

    def examine(
        self,
        files: Mapping[str, bytes],
        indexes: Mapping[str, IndexCommit | None],
        before: Promise,
        after: Promise,
        *,
        saves: bool,
    ) -> None:
        """Every repository opens without repair; what is owed loads; gc runs; verify is clean; what is owed loads;
        parity can be used, and none is left of packs that have gone.
        """
        for name in before.owed:
            left, index = files_of_repository(files, name), indexes.get(name)
            was, becomes = before.owed[name], after.owed[name]
            key = (name, hash(frozenset(left.items())), index.packs if index else None, was.key(), becomes.key())
            if key not in self._found_whole:
                with one_thread():
                    self._examine(left, index, was, becomes, after.now_ns, saves=saves)
                self._found_whole.add(key)

    def _examine(
        self,
        files: Mapping[str, bytes],
        index: IndexCommit | None,
        before: Owed,
        after: Owed,
        now_ns: int,
        *,
        saves: bool,
    ) -> None:
        backend = LeftBackend(files, now_ns=lambda: now_ns)
        left = open_left(backend, self._index(backend, index), clock=lambda: now_ns + LATER_NS)
        refs = refs_of(backend)
        for name in refs.keys() | before.refs.keys():
            expected = (before.refs.get(name), after.refs.get(name))
            assert refs.get(name) in expected, f"{name} is at {refs.get(name)}, expected one of {expected}"
        thinned = (before.thinned | after.thinned) & (before.whole | before.thinned) & (after.whole | after.thinned)
        whole = ((before.whole & after.whole) | set(refs.values())) - thinned
        rotten = before.rotten | after.rotten
        self._load(left, whole - rotten, thinned)
        if rotten:
            left.repair(sources=[self._states[snapshot_id] for snapshot_id in rotten])
        self._collect(left)
        report = left.verify(data=True)
        assert report.ok, report.problems
        again = open_left(backend, self._tables.index_of(()), clock=lambda: now_ns + LATER_NS)
        self._load(again, whole, thinned)
        parity = parity_status(again.handle, data=True)
        assert parity.ok, parity
        assert not parity.orphans, parity
        bare = {pack.pack_id for pack in parity.packs if not pack.parity_bytes}
        assert not bare & before.protected & after.protected, "parity that was reported is gone"
        if saves:
            snapshot = again.save(_small(9), branch="next", step=9)
            assert_same(left.load(snapshot.id), _small(9))

    def _collect(self, repo: Repository) -> None:
        """By a clock that only waiting moves: nobody is there to wait for."""
        clock = Clock()
        collect(repo, monotonic_s=clock.monotonic, sleep=clock.sleep)

    def _load(self, repo: Repository, whole: set[str] | frozenset[str], thinned: frozenset[str]) -> None:
        for snapshot_id in sorted(whole):
            assert_same(repo.load(snapshot_id), self._states[snapshot_id])
        for snapshot_id in sorted(thinned):
            found = repo.load(snapshot_id, paths=["optimizer/**"])
            assert_same(found, {"optimizer": self._states[snapshot_id]["optimizer"]})

    def _index(self, backend: LeftBackend, commit: IndexCommit | None) -> MemoryIndex:
        if commit is None:
            return self._tables.index_of(())
        hasher = open_left(backend, self._tables.index_of(()), clock=lambda: 0).handle.hasher
        for pack_id in commit.packs:
            self._tables.learn(backend, pack_id, hasher)
        return self._tables.index_of(commit.packs)
