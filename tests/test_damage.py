"""Damage of every byte class of every kind of file: a typed error or the right data, never anything else, and repair.

For each file of a small repository, and each stretch of it that means something of its own (a field of a header, a
payload, a gap, a digest), the stretch is flipped, zeroed, doubled, or the file is cut there; files are emptied, grown,
exchanged and copied under each other's names. After each:

1. every snapshot loads bit for bit, or with a CastoreError; what loads wrong without an error is the one thing that
   must never be. verify(data=True) raises nothing, and is not ok when anything failed to load. Parity gives back the
   pack as it was, or an error that its status tells too.
2. a dry run of repair changes no file (whoever reads may mark a damaged record). After repair the repository opens;
   what loaded before loads as before; verify is clean, and what is lost is marked; a snapshot with losses says what
   is left, and that loads bit for bit.
3. a second repair finds nothing to do, saving goes on, and what was forgotten comes back right or not at all.

CASTORE_TEST_PROFILE=thorough runs every case, and rounds of several damages at once; by default a sample of the cases
that always has each file kind and each way to damage. Memory is limited for the whole module.
"""

from __future__ import annotations

import itertools
import os
import random
import resource
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from castore.api import Repository
from castore.backend import MemoryBackend
from castore.damage_marks import leave_mark
from castore.errors import CastoreError, LostLeavesError, PolicyWarning, ThinnedError
from castore.format.layout import (
    CONFIG,
    POLICY,
    POLICY_APPLIED,
    forgotten_name,
    new_condemned_name,
    pack_name,
    parity_name,
    parse_pack_name,
    snapshot_name,
)
from castore.format.pack import RUN_MAGIC, TRAILER_BYTES, Row, record_header_bytes, row_bytes
from castore.format.parity import HEADER_BYTES as PARITY_HEADER_BYTES
from castore.format.parity import decode_parity_header
from castore.format.snapshot import SNAPSHOT_MAGIC
from castore.format.textfile import encode_text_file
from castore.ids import PackId, SnapshotId, new_pack_id
from castore.losses import make_loss, write_loss
from castore.maintenance.parity import parity_status
from castore.maintenance.report import VerifyReport
from castore.maintenance.restoring import restoring_handle
from castore.maintenance.retention import Keep
from castore.marks import forgotten_ids
from castore.options import GRID_BYTES, RUN_BYTES_MIN, RepositoryOptions
from tests.checkpoint.damage import rows_of
from tests.checkpoint.repositories import copied, create_on, files_of, open_on
from tests.checkpoint.states import State, assert_same

THOROUGH = os.environ.get("CASTORE_TEST_PROFILE") == "thorough"
SAMPLED = 250
"""Of the cases that touch one stretch, by default."""
MEMORY_BYTES = 1 << 30
"""Above what the process has when the module begins."""

ORPHAN_STEP, FORGOTTEN_STEP, THINNED_STEP = 99, 30, 31
"""Of the snapshot that no ref reaches, of the one that was forgotten, and of the one without its `THINNED` leaf."""
THINNED = "noise"

N = 16
Files = dict[str, bytes]
Stretch = tuple[str, int, int]
"""(what it is, start, stop)"""
Change = Callable[[bytes, int, int], bytes]


@pytest.fixture(scope="module", autouse=True)
def bounded_memory() -> Iterator[None]:
    """A length from disk that is believed ends in a MemoryError, which is no CastoreError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    used_kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (used_kib * 1024 + MEMORY_BYTES, hard))
    yield
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


# ---- the repository ------------------------------------------------------------------------------------------------


def make_state(step: int, compression: str) -> State:
    """Each save adds a leaf to the manifest, so that parts differ; weights drift, so that differences are stored."""
    rng = np.random.default_rng(step)
    drifting = np.random.default_rng(100).standard_normal(700, dtype=np.float32)
    return {
        "drifting": drifting * np.float32(1 + step / 1e5),
        "noise": rng.integers(0, 256, 1500, dtype=np.uint8),
        "frozen": np.arange(900, dtype=np.int32),
        "zeros": np.zeros(600),
        "step": step,
        "inline": {"lr": 0.1 / step, "name": "run"},
        "history": [index / 3 for index in range(step + 2)],
        **(large_leaves(compression) if step < 10 else {}),
    }


@cache
def large_leaves(compression: str) -> State:
    """With encodings a 16-bit copy that rests on two chunks of its master, without them an array that lies in a run."""
    rng = np.random.default_rng(101)
    if compression == "none":
        return {"run": rng.integers(0, 256, RUN_BYTES_MIN + 100, dtype=np.uint8)}
    master = np.tile(rng.standard_normal(64, dtype=np.float32), (GRID_BYTES + 4096) // 256)
    return {"master": master, "copy": master.astype(np.float16)}


@dataclass(frozen=True)
class Whole:
    """An undamaged repository: its files, and the state of each snapshot."""

    compression: str
    files: Files
    truth: Mapping[str, State]
    stretches: Mapping[str, tuple[Stretch, ...]]


def build(compression: str) -> Whole:
    """Several snapshots on main, a tag, a fork, an orphan, one that is forgotten, one that is thinned, two packs with
    parity, a policy; every kind of small file. Packs and snapshots are the same each time.
    """
    randomness = random.Random(compression)
    with (
        mock.patch("os.urandom", randomness.randbytes),
        mock.patch("castore.chunk_writer.new_pack_id", partial(new_pack_id, randomness.randbytes)),
    ):
        return _build(compression)


def _build(compression: str) -> Whole:
    backend = MemoryBackend()
    repo = create_on(backend, RepositoryOptions(compression=compression))  # type: ignore[arg-type]
    repo.handle.clock = itertools.count(10**18, 10**9).__next__
    truth: dict[str, State] = {}

    def save(step: int, branch: str = "main") -> str:
        state = make_state(step, compression)
        snapshot = repo.save(state, branch=branch, step=step)
        truth[snapshot.id] = state
        return snapshot.id

    first = save(1)
    repo.tag("v1", at=first)
    forgotten = save(FORGOTTEN_STEP)
    assert len(repo.add_parity().added) == 2
    save(2)
    repo.branch("side")
    thinned = save(THINNED_STEP)
    save(3)
    save(20, branch="side")
    save(ORPHAN_STEP, branch="lost")
    repo.delete_branch("lost")
    repo.forget(ids=[forgotten])
    repo.thin([THINNED], ids=[thinned])
    repo.set_policy(Keep(last=50), every_saves=1)
    backend.put_if_absent(new_condemned_name(), encode_text_file({"condemned_ns": 1, "packs": [], "snapshots": []}))
    leave_mark(backend, PackId("00" * 16), [64], why="a pack that has gone")
    write_loss(backend, make_loss(first, ["nothing of this is lost"], [], time_ns=1))
    backend.put_if_absent(f"leases/{'ab' * 16}.lease", encode_text_file({"boot": "", "host": "gone", "pid": 1}))
    repo.verify(data=True)
    files = files_of(backend)
    stretches: dict[str, tuple[Stretch, ...]] = {}
    rows: list[Row] = []
    for name, data in files.items():
        pack_id = parse_pack_name(name)
        if pack_id is not None:
            table = rows_of(repo, pack_id)
            rows += table
            stretches[name] = tuple(pack_stretches(table, data))
        elif name.startswith("snapshots/"):
            stretches[name] = tuple(snapshot_stretches(len(data)))
        elif name.startswith("parity/"):
            stretches[name] = tuple(parity_stretches(data))
        else:
            stretches[name] = tuple(text_stretches(data))
    repo.close()
    assert any(row.in_run for row in rows) == (compression == "none")
    assert any(len(row.base_ids) == 2 for row in rows) == (compression != "none")
    kinds = {name.split("/")[0] for name in files}
    assert kinds >= {"forgotten", "thin", "orphans", "parity", "policy", "policy-applied", "damaged", "lost", "gc"}
    return Whole(compression, files, truth, stretches)


def pack_stretches(rows: list[Row], data: bytes) -> Iterator[Stretch]:
    """As format/pack.py draws them."""
    yield from fields("header", 0, (8, 2, 1, 1, 4, 8, 16, 16, 8))
    for row in rows:
        kind = row.kind.name.lower()
        if not row.in_run:
            bases = max(1, len(row.base_ids))
            start = row.offset - record_header_bytes(N, base_count=bases)
            what = f"{kind} record" if bases == 1 else "record of two bases"
            yield from fields(what, start, (4, 1, 1, 2, 4, 4, 4, 8, N, *[N] * bases, 4))
        end = row.offset + row.stored_bytes
        yield f"{kind} payload" if not row.in_run else "run payload", row.offset, end
        yield "payload's last byte", end - 1, end
        if end % 8:
            yield "gap", end, end + 8 - end % 8
    runs = [row for row in rows if row.in_run]
    if runs:
        yield from fields("run", data.index(RUN_MAGIC), (4, 1, 1, 2, 4, 4, 8, 8, N, 8))
        yield "page padding", runs[0].offset - 40, runs[0].offset
    trailer = len(data) - TRAILER_BYTES
    second = sum(len(row.base_ids) == 2 for row in rows)
    table = trailer - len(rows) * row_bytes(N) - second * N
    yield from fields("table", table, (N, N, 8, 4, 4, 8, 4, 1, 1, 2))
    if second:
        yield "second base ids", trailer - second * N, trailer
    yield from fields("trailer", trailer, (8, 8, 8, 8, 16, 8, 8))


def parity_stretches(data: bytes) -> Iterator[Stretch]:
    """As format/parity.py draws it."""
    layout = decode_parity_header(data[:PARITY_HEADER_BYTES], where="parity").layout
    widths = (8, 2, 2, 2, 2, 4, 4, 8, 8, 16, 16, 8, 8, 8)
    end = len(data) - PARITY_HEADER_BYTES
    cells = PARITY_HEADER_BYTES + layout.table_bytes
    yield from fields("parity header", 0, widths)
    yield "parity table", PARITY_HEADER_BYTES, cells
    yield "parity cells", cells, end - layout.table_bytes
    yield "parity table once more", end - layout.table_bytes, end
    yield from fields("parity header once more", end, widths)


def snapshot_stretches(size: int) -> Iterator[Stretch]:
    """As format/snapshot.py draws it."""
    yield from fields("snapshot", 0, (8, 2, 1, 5, 8))
    third = (size - 24 - N) // 3
    yield from fields("snapshot body", 24, (1, third, third))
    yield "snapshot digest", size - N, size


def text_stretches(data: bytes) -> Iterator[Stretch]:
    """As format/textfile.py draws it."""
    line = data.index(b"\n")
    yield "brace", 0, 1
    yield "line", line // 3, 2 * line // 3
    yield "newline", line, line + 1
    yield "digest name", line + 1, line + 10
    yield "digest", line + 10, len(data) - 1
    yield "last newline", len(data) - 1, len(data)


def fields(what: str, start: int, widths: tuple[int, ...]) -> Iterator[Stretch]:
    for number, width in enumerate(widths):
        yield f"{what} field {number}", start, start + width
        start += width


# ---- ways to damage ------------------------------------------------------------------------------------------------


def flip(data: bytes, start: int, stop: int) -> bytes:
    at = (start + stop) // 2
    return data[:at] + bytes([data[at] ^ 0x04]) + data[at + 1 :]


def zero(data: bytes, start: int, stop: int) -> bytes:
    return data[:start] + bytes(stop - start) + data[stop:]


def fill(data: bytes, start: int, stop: int) -> bytes:
    return data[:start] + b"\xff" * (stop - start) + data[stop:]


def cut(data: bytes, start: int, stop: int) -> bytes:
    return data[: (start + stop) // 2]


def double(data: bytes, start: int, stop: int) -> bytes:
    return data[:stop] + data[start:stop] + data[stop:]


def leave_out(data: bytes, start: int, stop: int) -> bytes:
    return data[:start] + data[stop:]


CHANGES: tuple[Change, ...] = (flip, zero, fill, cut, double, leave_out)


@dataclass(frozen=True)
class Case:
    compression: str
    name: str
    what: str
    change: Change
    start: int
    stop: int

    def __str__(self) -> str:
        kind = self.name.split("/")[0]
        return f"{self.compression}-{kind}-{self.what}-{self.change.__name__}-{self.start}"

    def apply(self, files: Files) -> Files:
        return files | {self.name: self.change(files[self.name], self.start, self.stop)}


WHOLE = {compression: build(compression) for compression in ("auto", "none")}


def all_cases() -> list[Case]:
    return [
        Case(compression, name, what, change, start, stop)
        for compression, whole in WHOLE.items()
        for name, stretches in sorted(whole.stretches.items())
        for what, start, stop in stretches
        for change in CHANGES
    ]


def sampled_cases() -> list[Case]:
    """All of them, or of each file kind and way to damage at least one, and of packs, snapshots and parity one of each
    structure in them too: the small files are all made alike.
    """
    cases = all_cases()
    if THOROUGH:
        return cases
    rng = random.Random(0)
    groups: dict[tuple[str, str, str], list[Case]] = {}
    for case in cases:
        kind = case.name.split("/")[0]
        structure = case.what.split(" field")[0] if kind in ("packs", "snapshots", "parity") else ""
        groups.setdefault((kind, structure, case.change.__name__), []).append(case)
    chosen = {id(case): case for group in groups.values() for case in rng.sample(group, 1)}
    rest = [case for case in cases if id(case) not in chosen]
    return [*chosen.values(), *rng.sample(rest, max(0, SAMPLED - len(chosen)))]


# ---- what must hold ------------------------------------------------------------------------------------------------


def backend_of(files: Files) -> MemoryBackend:
    backend = MemoryBackend()
    for name, data in files.items():
        backend.put_if_absent(name, data)
    return backend


def loads_of(repo: Repository, truth: Mapping[str, State]) -> dict[str, CastoreError | None]:
    """Snapshot → why it does not load; None: it does, and is right. Of one that is thinned: what is left of it."""
    outcome: dict[str, CastoreError | None] = {}
    for snapshot_id, state in truth.items():
        try:
            try:
                found, wanted = repo.load(snapshot_id), state
            except ThinnedError:
                assert state["step"] == THINNED_STEP
                wanted = {key: value for key, value in state.items() if key != THINNED}
                found = repo.load(snapshot_id, paths=list(wanted))
        except CastoreError as error:
            assert len(str(error)) < 5000
            outcome[snapshot_id] = error
        else:
            assert_same(found, wanted)
            outcome[snapshot_id] = None
    return outcome


def _may_be_quiet(whole: Whole, files: Files, snapshot_id: str, report: VerifyReport) -> bool:
    """Whether verify may be ok although this snapshot does not load."""
    step = whole.truth[snapshot_id]["step"]
    if step == FORGOTTEN_STEP and forgotten_name(SnapshotId(snapshot_id)) in files:
        return True
    if snapshot_name(SnapshotId(snapshot_id)) in files:
        return False
    # The file is gone. Of an orphan nothing is left that could miss it; history may end at any parent.
    return step == ORPHAN_STEP or any(f"parent {snapshot_id} " in note for note in report.notes)


def check_damaged(files: Files, whole: Whole) -> None:
    """Everything that the head of this file says."""
    backend, truth = backend_of(files), whole.truth
    try:
        repo = open_on(backend)
    except CastoreError:
        assert files[CONFIG] != WHOLE["auto"].files[CONFIG]
        assert files[CONFIG] != WHOLE["none"].files[CONFIG]
        return
    before = loads_of(open_on(copied(backend)), truth)
    report = open_on(copied(backend)).verify(data=True)
    failed = {snapshot_id for snapshot_id, why in before.items() if why}
    if any(not _may_be_quiet(whole, files, snapshot_id, report) for snapshot_id in failed):
        assert not report.ok
    check_parity(files, whole)
    unchanged = files_without_marks(backend)
    dry = repo.repair(dry_run=True)
    assert files_without_marks(backend) == unchanged
    assert not dry.acted
    repo.repair(fix_refs=True)
    check_repaired(backend, whole, before)
    check_goes_on(backend, whole)


def check_parity(files: Files, whole: Whole) -> None:
    """What its status says can be restored reads bit for bit as it was; of anything else the status is not ok."""
    handle = open_on(backend_of(files)).handle
    status = parity_status(handle, data=True)
    through = restoring_handle(handle)
    for pack in status.packs:
        if pack.can_restore:
            reader = through.backend.open_reader(pack_name(pack.pack_id))
            assert reader.read(0, reader.size_bytes) == whole.files[pack_name(pack.pack_id)]
        elif parity_name(pack.pack_id) in files:
            assert not status.ok, status


def files_without_marks(backend: MemoryBackend) -> Files:
    """Whoever meets a damaged record marks it."""
    return {name: data for name, data in files_of(backend).items() if not name.startswith("damaged/")}


def check_repaired(backend: MemoryBackend, whole: Whole, before: Mapping[str, CastoreError | None]) -> None:
    repo = open_on(backend)
    verified = repo.verify(data=True)
    foreign = _of_another_version(backend)
    problems = [problem for problem in verified.problems if problem.kind != "ref" and problem.where not in foreign]
    assert not problems, problems
    there = set() if foreign else {snapshot.id for snapshot in repo.snapshots()}
    for snapshot_id, error in loads_of(repo, whole.truth).items():
        if error is None:
            continue
        assert before[snapshot_id] is not None, f"repair has lost {snapshot_id}: {error}"
        if snapshot_id in there:
            assert snapshot_id in verified.lost_snapshots
            assert isinstance(error, LostLeavesError), error
            check_left(repo, snapshot_id, whole.truth[snapshot_id], error)
    assert repo.repair(dry_run=True).plan.is_empty


def _of_another_version(backend: MemoryBackend) -> set[str]:
    """Snapshots that say so: a newer castore may have written them, which is no damage, so repair leaves them alone."""
    files = files_of(backend).items()
    return {name for name, data in files if data[:8] == SNAPSHOT_MAGIC and data[8:10] != b"\x01\0"}


def check_goes_on(backend: MemoryBackend, whole: Whole) -> None:
    """Saving works, and says when the policy cannot be applied; what was forgotten comes back right or not at all."""
    repo = open_on(backend)
    state = make_state(7, whole.compression)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PolicyWarning)
        saved = repo.save(state, branch="after")
    if caught:
        damaged = [name for name in (POLICY, POLICY_APPLIED) if files_of(backend).get(name) != whole.files[name]]
        assert damaged or _of_another_version(backend), [str(warning.message) for warning in caught]
    assert_same(open_on(backend).load(saved.id), state)
    for snapshot_id in forgotten_ids(backend):
        try:
            repo.undelete([snapshot_id])
        except CastoreError:
            continue
        error = loads_of(repo, {snapshot_id: whole.truth[snapshot_id]})[snapshot_id]
        assert error is None or isinstance(error, LostLeavesError), error


def check_left(repo: Repository, snapshot_id: str, state: State, error: LostLeavesError) -> None:
    """What the error says is left loads, bit for bit."""
    for path in error.left:
        found = repo.load(snapshot_id, paths=[path])
        wanted = state
        for key in path.split("/"):
            found = next(iter(found.values() if isinstance(found, dict) else found))
            wanted = wanted[int(key)] if isinstance(wanted, list) else wanted[key]
        assert_same(found, wanted)
    assert not set(error.left) & set(error.lost)


# ---- the tests -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", WHOLE)
def test_the_undamaged_repository_is_whole_and_needs_little(compression: str) -> None:
    whole = WHOLE[compression]
    backend = backend_of(whole.files)
    repo = open_on(backend)
    assert repo.verify(data=True).ok
    assert not any(loads_of(repo, whole.truth).values())
    assert [found.id for found in repo.forgotten()] == list(forgotten_ids(backend))
    with pytest.raises(ThinnedError):
        repo.load(f"main@{THINNED_STEP}")
    assert parity_status(repo.handle, data=True).ok
    plan = repo.repair(dry_run=True).plan
    assert not any((plan.salvages, plan.set_aside, plan.unmarked, plan.heals, plan.losses, plan.refs))
    assert len(plan.stale_marks) == len(plan.healed) == 1


def cases_by_kind() -> dict[str, list[Case]]:
    """Of one test each; the thorough form is split further."""
    groups: dict[str, list[Case]] = {}
    for case in sampled_cases():
        kind = case.name.split("/")[0]
        groups.setdefault(f"{kind}-{case.change.__name__}-{case.name[-8:]}" if THOROUGH else kind, []).append(case)
    return groups


@pytest.mark.parametrize("cases", [pytest.param(cases, id=kind) for kind, cases in cases_by_kind().items()])
def test_any_stretch_of_any_file(cases: list[Case]) -> None:
    for case in cases:
        whole = WHOLE[case.compression]
        try:
            check_damaged(case.apply(whole.files), whole)
        except BaseException as error:
            error.add_note(f"case {case}")
            raise


def whole_file_cases() -> Iterator[tuple[str, Files]]:
    whole = WHOLE["auto"]
    by_kind: dict[str, list[str]] = {}
    for name in sorted(whole.files):
        by_kind.setdefault(name.rpartition("/")[0].split("/")[0] or name, []).append(name)
    for names in by_kind.values():
        one = names[0]
        yield f"empty {one}", whole.files | {one: b""}
        yield f"noise {one}", whole.files | {one: random.Random(1).randbytes(len(whole.files[one]))}
        yield f"grown {one}", whole.files | {one: whole.files[one] + b"\0" * 4096}
        for gone in names:
            yield f"gone {gone}", {name: data for name, data in whole.files.items() if name != gone}
        for other in names[1:3]:
            swapped = {one: whole.files[other], other: whole.files[one]}
            yield f"exchanged {one} {other}", whole.files | swapped
            yield f"copied {one} over {other}", whole.files | {other: whole.files[one]}
    pack = by_kind["packs"][0]
    yield "a pack under a name of its own", whole.files | {pack_name(new_pack_id()): whole.files[pack]}
    yield "a pack within a pack", whole.files | {pack: whole.files[pack] + whole.files[pack]}
    for kind, names in by_kind.items():
        if kind != CONFIG:
            yield f"no {kind}", {name: data for name, data in whole.files.items() if name not in names}


@pytest.mark.parametrize(("what", "files"), [pytest.param(*case, id=case[0][:40]) for case in whole_file_cases()])
def test_files_that_are_emptied_grown_exchanged_or_gone(what: str, files: Files) -> None:
    if CONFIG not in files:
        return  # tests/test_golden.py: there is nothing to open
    check_damaged(files, WHOLE["auto"])


@pytest.mark.parametrize("seed", range(300 if THOROUGH else 12))
def test_several_damages_at_once(seed: int) -> None:
    rng = random.Random(seed)
    compression = rng.choice(list(WHOLE))
    whole = WHOLE[compression]
    files = dict(whole.files)
    cases = [case for case in all_cases() if case.compression == compression and case.name != CONFIG]
    for case in rng.sample(cases, rng.randint(2, 5)):
        if case.stop <= len(files[case.name]) and case.start < len(files[case.name]):
            files = case.apply(files)
    check_damaged(files, whole)
