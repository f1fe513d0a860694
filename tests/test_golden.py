"""Repositories that are broken on purpose (tools/make_golden.py): the right typed error, and damage that is named."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import castore
from castore.errors import CastoreError, UnsupportedFormatError
from tools import make_golden
from tools.golden_cases import CASES, Case


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("golden")
    for name in ("whole", "whole-runs"):
        make_golden.WHOLE[name](root / name)
    return {name: root / name for name in ("whole", "whole-runs")}


@pytest.fixture
def source(case: Case, whole: dict[str, Path]) -> Path:
    return whole[make_golden.source_of(case)]


def name_of(case: Case) -> str:
    return case.name


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_broken_repository_gives_its_typed_error(case: Case, source: Path, tmp_path: Path) -> None:
    make_golden.build_broken(case, source, tmp_path / "broken")
    if case.opens is not None:
        check_error(case.opens, lambda: castore.open(tmp_path / "broken"))
        return
    with castore.open(tmp_path / "broken") as repo:
        if case.loads is not None:
            check_error(case.loads, lambda: repo.load(case.ref))
        else:
            loaded = repo.load(case.ref)
            if case.ref == "main":
                check_equal(loaded, make_golden.make_state(3))
        if case.saves is not None:
            check_error(case.saves, lambda: repo.save({"a": 1}))


@pytest.mark.parametrize("case", [case for case in CASES if case.opens is None], ids=name_of)
def test_verify_names_what_is_lost(case: Case, source: Path, tmp_path: Path) -> None:
    steps = steps_by_id(source)
    make_golden.build_broken(case, source, tmp_path / "broken")
    with castore.open(tmp_path / "broken") as repo:
        for data, kinds in ((False, case.structure), (True, case.data)):
            report = repo.verify(data=data)
            assert {problem.kind for problem in report.problems} == kinds, report.problems
            assert report.ok is (not kinds)
            json.dumps(report.to_json())
    lost = {steps.get(snapshot_id, 666): leaves for snapshot_id, leaves in report.damaged_snapshots.items()}
    assert lost == case.lost
    assert all(len(problem.message) < 2000 for problem in report.problems)


@pytest.mark.parametrize("case", [case for case in CASES if case.ref == "main" and case.opens is None], ids=name_of)
def test_what_the_index_remembers_hides_no_damage(case: Case, source: Path, tmp_path: Path) -> None:
    make_golden.build_broken(case, source, tmp_path / "broken", keep_index=True)
    with castore.open(tmp_path / "broken") as repo:
        try:
            loaded = repo.load(case.ref)
        except CastoreError:
            assert case.loads is not None or case.misleads_index
        else:
            check_equal(loaded, make_golden.make_state(3))
        # A load that meets wrong rows of the index has mended them.
        assert repo.verify(data=True).ok is (not case.data - {"index"})


@pytest.mark.parametrize("case", [case for case in CASES if case.opens is None], ids=name_of)
def test_repair_loses_nothing_that_loads_and_leaves_nothing_to_do(case: Case, source: Path, tmp_path: Path) -> None:
    make_golden.build_broken(case, source, tmp_path / "broken")
    with castore.open(tmp_path / "broken") as repo:
        before = loadable(repo)
        try:
            repo.repair(fix_refs=True)
        except UnsupportedFormatError:
            assert "newer" in case.name or "unknown" in case.name
            return
        assert repo.repair(dry_run=True).plan.is_empty
    with castore.open(tmp_path / "broken") as repo:
        assert before <= loadable(repo)
        if case.ref == "main":  # a stranger's manifest may load and be no state all the same
            assert not repo.verify(data=True).damaged_snapshots.keys() & before


def loadable(repo: castore.Repository) -> set[str]:
    """The snapshots that load."""
    found = set()
    for path in (repo.path / "snapshots").iterdir():
        with suppress(CastoreError):
            repo.load(path.name)
            found.add(path.name)
    return found


def test_the_lying_index_is_mended_by_reindex(whole: dict[str, Path], tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "lying-index")
    make_golden.build_broken(case, whole["whole"], tmp_path / "broken")
    with castore.open(tmp_path / "broken") as repo:
        repo.reindex()
        assert repo.verify(data=True).ok
        check_equal(repo.load(), make_golden.make_state(3))


@pytest.mark.parametrize("name", make_golden.WHOLE)
def test_whole_repositories_are_whole(name: str, tmp_path: Path) -> None:
    make_golden.WHOLE[name](tmp_path / "whole")
    with castore.open(tmp_path / "whole") as repo:
        report = repo.verify(data=True)
        assert report.ok, report.problems
        assert (report.snapshot_count, len(report.orphans)) == (5, 1)
        assert report.checked_bytes > 0
        for snapshot in repo.snapshots():
            repo.load(snapshot.id)


def test_the_same_states_have_the_same_state_ids_each_time(tmp_path: Path) -> None:
    ids = []
    for name in ("one", "other"):
        make_golden.build_whole(tmp_path / name)
        with castore.open(tmp_path / name) as repo:
            ids.append([(snapshot.state_id, snapshot.created_at) for snapshot in repo.log()])
    assert ids[0] == ids[1]


def check_error(expected: type[CastoreError], action) -> None:
    with pytest.raises(CastoreError) as caught:
        action()
    assert type(caught.value) is expected, caught.value
    assert len(str(caught.value)) < 1000


def check_equal(found, expected) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype
        assert found.tobytes() == expected.tobytes()
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            check_equal(found[key], value)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            check_equal(one, other)
    else:
        assert found == expected


def steps_by_id(root: Path) -> dict[str, int | None]:
    with castore.open(root) as repo:
        return {snapshot.id: snapshot.step for snapshot in repo.snapshots()}
