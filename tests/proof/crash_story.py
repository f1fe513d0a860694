"""One life of a repository, told operation by operation, and what may be asked of whatever a crash left of it.

After each operation the story marks in the journal what was reported by then: every snapshot with its state, every
ref. Between two marks an operation was under way, so a ref may stand where it stood or where it went, and a snapshot is
owed if it was reported before and is not being forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import castore
from castore.api import Repository
from castore.index import MemoryIndex
from tests.checkpoint.crashes import refs_of
from tests.checkpoint.states import State, assert_same, training_state
from tests.proof.journal import IndexCommit, Mark, Operation, Recorder
from tests.proof.left_behind import LeftBackend, Tables, open_left

STORE = "store"
GRACE_S = 600.0
LATER_NS = 10**9 * 3600
"""How long after the crash somebody looks: orphans are past their grace by then, so only refs protect anything."""


@dataclass(frozen=True)
class Promise:
    """What was reported by some moment."""

    doing: str
    """The operation that came before."""
    refs: Mapping[str, str] = field(default_factory=dict)
    states: Mapping[str, State] = field(default_factory=dict)
    """Every snapshot that was reported durable and is not forgotten."""
    now_ns: int = 0


class Story:
    """Runs operations under a recorder and marks what they reported."""

    def __init__(self, base: Path, *, keeps_caches: bool = False) -> None:
        self.now_ns = 10**18
        self.recorder = Recorder(base, keeps_caches=keeps_caches)
        self.states: dict[str, State] = {}
        """Every state that was ever saved, by its snapshot."""
        self._owed: set[str] = set()
        self._path = base / STORE

    def clock(self) -> int:
        """A clock that nothing but the story moves on."""
        self.now_ns += 1000
        return self.now_ns

    def tell(self, chapters: Mapping[str, Callable[[Story, Repository], object]]) -> None:
        """Create a repository and carry out every chapter."""
        with self.recorder.installed():
            repo = castore.init(self._path, lease_s=1.0, orphan_grace_s=GRACE_S)
            repo.handle.clock = self.clock
            self._mark(repo, "init")
            for name, chapter in chapters.items():
                chapter(self, repo)
                self._mark(repo, name)
            repo.close()

    def saved(self, snapshot: castore.Snapshot, state: State) -> None:
        """A save that returned."""
        self.states[snapshot.id] = state
        self._owed.add(snapshot.id)

    def forgotten(self, *snapshot_ids: str) -> None:
        """Nobody may rely on these any more."""
        self._owed -= set(snapshot_ids)

    def later(self, seconds: float) -> None:
        """Time goes by."""
        self.now_ns += int(seconds * 1e9)

    def _mark(self, repo: Repository, doing: str) -> None:
        owed = {snapshot_id: self.states[snapshot_id] for snapshot_id in sorted(self._owed)}
        self.recorder.mark(Promise(doing, refs_of(repo.handle.backend), owed, self.now_ns))


# ---- the chapters ----------------------------------------------------------------------------------------------------


def _small(seed: int) -> State:
    return training_state(seed, frozen_bytes=4000, moving_bytes=2000)


def _save(seed: int, **options: object) -> Callable[[Story, Repository], None]:
    def chapter(story: Story, repo: Repository) -> None:
        story.saved(repo.save(_small(seed), step=seed, **options), _small(seed))  # type: ignore[arg-type]

    return chapter


def _save_async(story: Story, repo: Repository) -> None:
    pending = repo.save_async(_small(3), step=3)
    story.saved(pending.result(60), _small(3))


def _drop_fork(story: Story, repo: Repository) -> None:
    story.forgotten(repo.snapshot("fork").id)
    repo.delete_branch("fork")


CHAPTERS: Mapping[str, Callable[[Story, Repository], object]] = {
    "save": _save(1),
    "save of differences": _save(2, tags=("early",)),
    "save_async": _save_async,
    "save to a fork": _save(4, branch="fork", parent="main~1"),
    "branch": lambda story, repo: repo.branch("other", at="main~1"),
    "tag": lambda story, repo: repo.tag("kept", at="main~2"),
    "save of what is there": _save(2),
    "delete a branch": _drop_fork,
    "last save": _save(5),
}


# ---- what may be asked -----------------------------------------------------------------------------------------------


def moments(journal: list[Operation]) -> list[tuple[int, Promise, Promise]]:
    """The length of each prefix that ends after `init`, with what was reported and what comes next."""
    marks = [(number, found.value) for number, found in enumerate(journal) if isinstance(found, Mark)]
    found = []
    for (start, before), (end, after) in zip(marks, [*marks[1:], (len(journal), marks[-1][1])], strict=True):
        found += [(length, before, after) for length in range(start + 1, end + 1)]
    return found


def store_files(files: Mapping[str, bytes], repository: str = STORE) -> dict[str, bytes]:
    """The files of one repository."""
    prefix = f"{repository}/"
    return {name.removeprefix(prefix): data for name, data in files.items() if name.startswith(prefix)}


class Examiner:
    """Rebuilds repositories and asks what must hold of them."""

    def __init__(self, states: Mapping[str, State]) -> None:
        self._states = states
        self._tables = Tables()

    def examine(
        self, files: Mapping[str, bytes], index: IndexCommit | None, before: Promise, after: Promise, *, saves: bool
    ) -> None:
        """Opens without repair; what is owed loads; gc runs; verify is clean; what is owed still loads."""
        now_ns = after.now_ns + LATER_NS
        backend = LeftBackend(files, now_ns=lambda: after.now_ns)
        left = open_left(backend, self._index(backend, index), clock=lambda: now_ns)
        refs = refs_of(backend)
        for name in refs.keys() | before.refs.keys():
            expected = (before.refs.get(name), after.refs.get(name))
            assert refs.get(name) in expected, f"{name} is at {refs.get(name)}, expected one of {expected}"
        owed = (before.states.keys() & after.states.keys()) | set(refs.values())
        self._load(left, owed)
        collect(left)
        report = left.verify(data=True)
        assert report.ok, report.problems
        again = open_left(backend, self._tables.index_of(()), clock=lambda: now_ns)
        self._load(again, owed)
        if saves:
            snapshot = again.save(_small(9), branch="next", step=9)
            assert_same(left.load(snapshot.id), _small(9))

    def _load(self, repo: Repository, snapshot_ids: set[str]) -> None:
        for snapshot_id in sorted(snapshot_ids):
            assert_same(repo.load(snapshot_id), self._states[snapshot_id])

    def _index(self, backend: LeftBackend, commit: IndexCommit | None) -> MemoryIndex:
        if commit is None:
            return self._tables.index_of(())
        hasher = open_left(backend, self._tables.index_of(()), clock=lambda: 0).handle.hasher
        for pack_id in commit.packs:
            self._tables.learn(backend, pack_id, hasher)
        return self._tables.index_of(commit.packs)


def collect(repo: Repository) -> None:
    """Collect garbage."""
    if hasattr(repo, "gc"):
        repo.gc()
