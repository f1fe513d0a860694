"""Refs: git's rules for names, what people may write to mean a snapshot, and branches that move by compare-and-swap."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from castore.backend import MemoryBackend
from castore.backend.base import Backend
from castore.errors import (
    AmbiguousRefError,
    ChecksumError,
    DamageError,
    FormatError,
    InvalidNameError,
    RefExistsError,
    UnknownRefError,
)
from castore.format.layout import branch_name, check_ref_name, snapshot_name, tag_name
from castore.format.snapshot import SnapshotRecord
from castore.format.textfile import decode_text_file, encode_text_file
from castore.hashing import hasher_for
from castore.ids import SnapshotId, StateId
from castore.refs import (
    Ref,
    branch_of,
    check_free,
    check_tag_free,
    create_tag,
    damaged_refs,
    delete_ref_file,
    list_branches,
    list_tags,
    move_branch,
    read_branch,
    read_tag,
    resolve,
)
from castore.snapshots import write_record
from tests.suites.packs import flip, rewrite
from tests.suites.sealed import sealed_text

HASHER = hasher_for("xxh3-128")
NOW_NS = 1_700_000_000_000_000_000
A, B = SnapshotId("a" * 32), SnapshotId("b" * 32)
RECORD = SnapshotRecord(StateId("0" * 32), (), "main", None, NOW_NS, {}, {}, "", 0, 0, 0, 0, (), "castore", bytes(8))


def branch(backend: Backend, name: str, snapshot_id: SnapshotId) -> None:
    assert move_branch(backend, name, expected_id=None, new_id=snapshot_id, now_ns=NOW_NS)


def tag(backend: Backend, name: str, snapshot_id: SnapshotId) -> None:
    create_tag(backend, name, snapshot_id, now_ns=NOW_NS)


def save(backend: Backend, *parents: SnapshotId, step: int | None = None, nonce: int = 0) -> SnapshotId:
    record = replace(RECORD, parents=parents, step=step, nonce=nonce.to_bytes(8, "big"))
    return write_record(backend, record, HASHER)


@pytest.fixture
def backend() -> Backend:
    return MemoryBackend()


# ---- names -------------------------------------------------------------------------------------------------

GOOD = (
    *(
        "main",
        "a",
        "feature/lr-2e-5",
        "v1.0",
        "a.b.c",
        "x/y/z",
        "größe",
        "模型",
        "🙂",
        "UPPER",
        "a-",
        "a_b",
        "0",
        "12",
    ),
    *(
        "heads",
        "tags",
        "a/heads/b",
        "lock",
        "a.lockx",
        "x.loc",
        "abcd",
        "a%b",
        "a#b",
        "a&b",
        "a;b",
        "a'b",
        'a"b',
        "a|b",
        "a!b",
    ),
    *(
        "(a)",
        "{a}",
        "a=b",
        "a,b",
        "a+b",
        "a<b>",
        "$a",
        "`a`",
        "a./b",
        "a\u00a0b",
        "a\u200bb",
        "refs/heads/x",
        "main.x/-y",
    ),
)
BAD = (
    *("", "/", "/a", "a/", "a//b", ".", "..", ".a", "a/.b", "a..b", "a/..", "a.", "a/b.", "-", "-a", "--"),
    *(
        "a.lock",
        "a.lock/b",
        "a/b.lock",
        ".lock",
        "a b",
        " a",
        "a ",
        "a~b",
        "a~1",
        "a^",
        "a:b",
        "a?",
        "a*",
        "[a",
        "a\\b",
    ),
    *("a\tb", "a\nb", "a\x1fb", "a\x7fb", "\x01", "~", "^", ":", "?", "*", "["),
)
OURS = (*("@", "a@b", "main@12", "@{", "a@{b", "heads/x", "tags/x", "heads/x/y", "tags/v1.0"),)
"""Castore's own words: `@` stands before a step, `heads/` and `tags/` say which kind of ref is meant."""


def is_allowed(name: str) -> bool:
    try:
        check_ref_name(name)
    except InvalidNameError:
        return False
    return True


@pytest.mark.parametrize("name", GOOD)
def test_these_names_are_allowed(name: str) -> None:
    check_ref_name(name)


@pytest.mark.parametrize("name", [*BAD, *OURS, "\ud800", "a\udfffb"])
def test_these_names_are_refused_with_a_reason(name: str) -> None:
    with pytest.raises(InvalidNameError, match=r"is not a valid branch or tag name: .+"):
        check_ref_name(name)


GIT_ONLY = "HEAD"
"""Git keeps this name for itself; castore has no such file, so it is a name like any other."""


def git_allows(name: str) -> bool:
    command = ["git", "check-ref-format", "--branch", name]
    return subprocess.run(command, capture_output=True, check=False, cwd="/").returncode == 0


needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed here")


@needs_git
def test_git_says_the_same() -> None:
    assert [name for name in GOOD if not git_allows(name)] == []
    assert [name for name in BAD if git_allows(name)] == []
    assert is_allowed(GIT_ONLY)
    assert not git_allows(GIT_ONLY)


@needs_git
@settings(max_examples=60)
@given(st.text(st.sampled_from("ab./-~^:?*[\\ lock\x7f\x1fé"), min_size=1, max_size=8))
def test_git_says_the_same_of_any_name(name: str) -> None:
    assert is_allowed(name) == git_allows(name)


# ---- files -------------------------------------------------------------------------------------------------


def test_a_ref_file_is_pinned(backend: Backend) -> None:
    branch(backend, "feature/x", A)
    data = backend.read("refs/branches/feature%2Fx", max_bytes=1000)
    expected = sealed_text(b'{"name":"feature/x","snapshot":"%s","time_ns":%d}' % (A.encode(), NOW_NS))
    assert data == expected, "the format changed: bump the version"


def test_branches_and_tags_are_listed_by_name(backend: Backend) -> None:
    for name in ("b", "Z", "a/b", "größe"):
        branch(backend, name, A)
        tag(backend, name + "-tag", B)
    assert list_branches(backend) == [Ref(name, A, NOW_NS) for name in ("Z", "a/b", "b", "größe")]
    assert [ref.name for ref in list_tags(backend)] == ["Z-tag", "a/b-tag", "b-tag", "größe-tag"]


def test_what_is_not_there_is_none(backend: Backend) -> None:
    assert read_branch(backend, "main") is None
    assert read_tag(backend, "main") is None
    assert list_branches(backend) == list_tags(backend) == []
    assert not delete_ref_file(backend, branch_name("main"))


# ---- moving ------------------------------------------------------------------------------------------------


def test_a_branch_moves_from_the_head_that_was_expected(backend: Backend) -> None:
    assert move_branch(backend, "main", expected_id=None, new_id=A, now_ns=1)
    assert read_branch(backend, "main") == A
    assert move_branch(backend, "main", expected_id=A, new_id=B, now_ns=2)
    assert list_branches(backend) == [Ref("main", B, 2)]
    assert move_branch(backend, "main", expected_id=B, new_id=None, now_ns=3)
    assert read_branch(backend, "main") is None


@pytest.mark.parametrize(("start", "expected"), [(None, A), (A, None), (A, B)])
def test_a_branch_elsewhere_does_not_move(
    backend: Backend, start: SnapshotId | None, expected: SnapshotId | None
) -> None:
    if start:
        branch(backend, "main", start)
    for new_id in (A, B, None):
        assert not move_branch(backend, "main", expected_id=expected, new_id=new_id, now_ns=NOW_NS)
    assert read_branch(backend, "main") == start


def test_of_two_moves_from_one_head_one_wins(backend: Backend) -> None:
    branch(backend, "main", A)
    start = threading.Barrier(8)

    def move(number: int) -> bool:
        start.wait()
        new_id = SnapshotId(f"{number:032x}")
        return move_branch(backend, "main", expected_id=A, new_id=new_id, now_ns=NOW_NS)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(move, range(8)))
    assert won.count(True) == 1
    assert read_branch(backend, "main") == f"{won.index(True):032x}"


def test_a_move_that_is_overtaken_between_look_and_swap_loses() -> None:
    class Overtaken(MemoryBackend):
        def compare_and_swap(self, name: str, *, expected: bytes | None, new: bytes | None) -> bool:
            if expected is not None:
                fields = decode_text_file(expected, name=name)
                assert super().compare_and_swap(name, expected=expected, new=encode_text_file({**fields, "time_ns": 5}))
            return super().compare_and_swap(name, expected=expected, new=new)

    backend = Overtaken()
    branch(backend, "main", A)
    assert not move_branch(backend, "main", expected_id=A, new_id=B, now_ns=NOW_NS)
    assert read_branch(backend, "main") == A


def test_a_tag_never_moves(backend: Backend) -> None:
    tag(backend, "v1", A)
    for snapshot_id in (A, B):
        with pytest.raises(RefExistsError, match="tag 'v1' exists and names snapshot aaaaaaaaaaaa; tags never move"):
            tag(backend, "v1", snapshot_id)
    assert read_tag(backend, "v1") == A
    assert delete_ref_file(backend, tag_name("v1"))
    tag(backend, "v1", B)
    assert read_tag(backend, "v1") == B


def test_a_new_branch_shares_no_name_with_a_tag_nor_a_tag_with_a_branch(backend: Backend) -> None:
    branch(backend, "main", A)
    tag(backend, "v1", A)
    check_free(backend, "new", as_tag=False)
    check_free(backend, "new", as_tag=True)
    check_tag_free(backend, "new")
    with pytest.raises(RefExistsError, match="'v1' is already a tag"):
        check_free(backend, "v1", as_tag=False)
    with pytest.raises(RefExistsError, match="'main' is already a branch"):
        check_tag_free(backend, "main")
    with pytest.raises(RefExistsError, match="tag 'v1' exists"):
        check_tag_free(backend, "v1")
    for check in (lambda: check_free(backend, "a b", as_tag=False), lambda: check_tag_free(backend, "a b")):
        with pytest.raises(InvalidNameError):
            check()


# ---- damage ------------------------------------------------------------------------------------------------


def test_a_damaged_ref_is_an_error_and_never_absent(backend: Backend) -> None:
    branch(backend, "main", A)
    rewrite(backend, branch_name("main"), flip(20))
    for call in (
        lambda: read_branch(backend, "main"),
        lambda: list_branches(backend),
        lambda: resolve(backend, "main"),
        lambda: move_branch(backend, "main", expected_id=None, new_id=B, now_ns=1),
        lambda: move_branch(backend, "main", expected_id=A, new_id=B, now_ns=1),
        lambda: check_free(backend, "main", as_tag=True),
    ):
        with pytest.raises(ChecksumError, match="refs/branches/main"):
            call()


def test_swapped_ref_files_are_seen(backend: Backend) -> None:
    branch(backend, "a", A)
    backend.put_if_absent(branch_name("b"), backend.read(branch_name("a"), max_bytes=1000))
    with pytest.raises(FormatError, match="refs/branches/b: expected ref 'b', found 'a': the files were swapped"):
        read_branch(backend, "b")


@pytest.mark.parametrize(
    "line",
    [
        b"{}",
        b'{"name":"main","snapshot":"%s"}' % A.encode(),
        b'{"name":"main","snapshot":"../../etc","time_ns":1}',
        b'{"name":"main","snapshot":"","time_ns":1}',
        b'{"name":"main","snapshot":null,"time_ns":1}',
        b'{"name":5,"snapshot":"aa","time_ns":1}',
        b'{"name":"main","snapshot":"aa","time_ns":true}',
    ],
)
def test_a_ref_that_says_something_else_is_a_format_error(backend: Backend, line: bytes) -> None:
    backend.put_if_absent(branch_name("main"), sealed_text(line))
    with pytest.raises(FormatError, match="refs/branches/main"):
        resolve(backend, "main")


def test_damaged_refs_are_named_and_can_be_deleted(backend: Backend) -> None:
    branch(backend, "whole", A)
    branch(backend, "broken", A)
    tag(backend, "v1", A)
    rewrite(backend, branch_name("broken"), flip(3))
    rewrite(backend, tag_name("v1"), lambda data: data.clear())
    backend.put_if_absent("refs/tags/Stray", b"")
    found = damaged_refs(backend)
    assert sorted(found) == ["refs/branches/broken", "refs/tags/Stray", "refs/tags/v1"]
    assert all(isinstance(error, DamageError) for error in found.values())
    for name in found:
        assert delete_ref_file(backend, name)
    assert damaged_refs(backend) == {}
    assert resolve(backend, "whole") == A


# ---- what people write -------------------------------------------------------------------------------------


@pytest.fixture
def history(backend: Backend) -> list[SnapshotId]:
    """Four snapshots on main, oldest first, at steps 100, 200, none, 200."""
    ids: list[SnapshotId] = []
    for number, step in enumerate((100, 200, None, 200)):
        ids.append(save(backend, *ids[-1:], step=step, nonce=number))
    branch(backend, "main", ids[-1])
    return ids


def test_every_syntax_finds_its_snapshot(backend: Backend, history: list[SnapshotId]) -> None:
    tag(backend, "v1.0", history[0])
    for text, index in {
        "main": 3,
        "heads/main": 3,
        "v1.0": 0,
        "tags/v1.0": 0,
        "main~0": 3,
        "main~": 2,
        "main~1": 2,
        "main~3": 0,
        "main~1~1": 1,
        "main~~": 1,
        "heads/main~2": 1,
        "main@200": 3,
        "main~1@200": 1,
        "main@100": 0,
        "main@200~1": 2,
        "main@200~3": 0,
        "v1.0@100": 0,
        "v1.0~0": 0,
    }.items():
        assert resolve(backend, text) == history[index], text
    for snapshot_id in history:
        for text in (snapshot_id, snapshot_id[:12], snapshot_id.upper(), snapshot_id + "~0"):
            assert resolve(backend, text) == snapshot_id
    assert resolve(backend, history[2][:10] + "~2") == history[0]
    assert resolve(backend, history[2][:10] + "@100") == history[0]


def test_negative_steps_are_steps(backend: Backend) -> None:
    snapshot_id = save(backend, step=-5)
    branch(backend, "main", snapshot_id)
    assert resolve(backend, "main@-5") == snapshot_id


def test_history_follows_first_parents(backend: Backend) -> None:
    first, other = save(backend, nonce=1), save(backend, nonce=2)
    merged = save(backend, first, other, nonce=3)
    branch(backend, "main", merged)
    assert resolve(backend, "main~1") == first


def test_going_back_too_far_says_how_far_there_is(backend: Backend, history: list[SnapshotId]) -> None:
    with pytest.raises(UnknownRefError, match=f"'main~9': expected 9 snapshots before {history[3][:12]}, found 3"):
        resolve(backend, "main~9")


def test_history_ends_where_a_parent_is_gone(backend: Backend, history: list[SnapshotId]) -> None:
    backend.delete(snapshot_name(history[1]))
    assert resolve(backend, "main~1") == history[2]
    with pytest.raises(UnknownRefError, match=r"expected 2 snapshots before .*, found 1"):
        resolve(backend, "main~2")


def test_a_step_that_is_not_there_lists_the_nearest(backend: Backend, history: list[SnapshotId]) -> None:
    with pytest.raises(UnknownRefError, match="'main@190': no snapshot of step 190; nearest steps: 200, 100") as caught:
        resolve(backend, "main@190")
    assert caught.value.near == ("200", "100")
    branch(backend, "stepless", save(backend, nonce=9))
    with pytest.raises(UnknownRefError, match="nearest steps: none"):
        resolve(backend, "stepless@1")


def test_near_matches_are_listed(backend: Backend, history: list[SnapshotId]) -> None:
    tag(backend, "best-loss", history[0])
    with pytest.raises(UnknownRefError, match="nothing is called 'mian'; did you mean main") as caught:
        resolve(backend, "mian")
    assert caught.value.near[0] == "main"
    with pytest.raises(UnknownRefError, match="did you mean best-loss"):
        resolve(backend, "best-los~2")
    with pytest.raises(UnknownRefError, match="nothing is called 'zzzz'; there are: main, best-loss"):
        resolve(backend, "zzzz")


def test_an_empty_repository_says_so() -> None:
    with pytest.raises(UnknownRefError, match="here has no branch yet: save something first"):
        resolve(MemoryBackend("here"), "main")


@pytest.mark.parametrize(
    "text", ["", "~", "~3", "@", "@5", "main^", "main@", "main@x", "main~x", "heads/", "tags/main", "a b"]
)
def test_what_means_nothing_is_unknown(backend: Backend, history: list[SnapshotId], text: str) -> None:
    with pytest.raises(UnknownRefError):
        resolve(backend, text)


@pytest.mark.parametrize(
    "text", ["main~" + "9" * 5000, "main@" + "9" * 5000, "9" * 5000, "main~" * 500, "\ud800", "a\0b"]
)
def test_monstrous_refs_are_unknown(backend: Backend, history: list[SnapshotId], text: str) -> None:
    with pytest.raises(UnknownRefError):
        resolve(backend, text)


@given(st.text(st.sampled_from("main~@0123/headstgz.-^ \0"), max_size=12))
def test_any_text_is_a_snapshot_or_unknown(text: str) -> None:
    backend = MemoryBackend()
    branch(backend, "main", save(backend, step=0))
    with contextlib.suppress(UnknownRefError):
        assert resolve(backend, text) == read_branch(backend, "main")


# ---- prefixes and ambiguity --------------------------------------------------------------------------------


def put_snapshot(backend: Backend, snapshot_id: str) -> SnapshotId:
    backend.put_if_absent(snapshot_name(SnapshotId(snapshot_id)), b"only its name matters here")
    return SnapshotId(snapshot_id)


def test_a_unique_prefix_of_four_digits_is_enough(backend: Backend) -> None:
    ids = [put_snapshot(backend, prefix.ljust(32, "0")) for prefix in ("abcd1", "abcd2", "abce")]
    assert resolve(backend, "abce") == ids[2]
    assert resolve(backend, "abcd1") == ids[0]
    assert resolve(backend, "ABCD2") == ids[1]


def test_a_prefix_of_several_lists_them(backend: Backend) -> None:
    for prefix in ("abcd1", "abcd2"):
        put_snapshot(backend, prefix.ljust(32, "0"))
    with pytest.raises(AmbiguousRefError, match="'abcd' is the beginning of 2 snapshot ids: abcd1000") as caught:
        resolve(backend, "abcd")
    assert caught.value.near == ("abcd10000000", "abcd20000000")


def test_a_prefix_that_is_too_short_says_so(backend: Backend) -> None:
    put_snapshot(backend, "abc".ljust(32, "0"))
    branch(backend, "main", A)
    with pytest.raises(UnknownRefError, match="an id prefix needs at least 4 digits"):
        resolve(backend, "abc")


def test_strange_files_among_the_snapshots_are_passed_over(backend: Backend) -> None:
    backend.put_if_absent("snapshots/abcd-notes", b"")
    snapshot_id = put_snapshot(backend, "abcd".ljust(32, "0"))
    assert resolve(backend, "abcd") == snapshot_id


def test_a_name_wins_over_a_prefix(backend: Backend) -> None:
    put_snapshot(backend, "abcd".ljust(32, "0"))
    branch(backend, "abcd", A)
    assert resolve(backend, "abcd") == A


def test_a_name_of_a_branch_and_a_tag_must_say_which(backend: Backend) -> None:
    branch(backend, "x", A)
    tag(backend, "x", B)
    with pytest.raises(AmbiguousRefError, match="'x' is a branch and a tag: write heads/x or tags/x") as caught:
        resolve(backend, "x")
    assert caught.value.near == ("heads/x", "tags/x")
    assert resolve(backend, "heads/x") == A
    assert resolve(backend, "tags/x") == B


def test_a_branch_and_a_tag_at_one_snapshot_are_not_ambiguous(backend: Backend) -> None:
    branch(backend, "x", A)
    tag(backend, "x", A)
    assert resolve(backend, "x") == A


def test_branches_called_heads_and_tags_are_found(backend: Backend) -> None:
    branch(backend, "heads", A)
    tag(backend, "tags", B)
    assert [resolve(backend, text) for text in ("heads", "tags", "heads/heads", "tags/tags")] == [A, B, A, B]


def test_only_a_branch_itself_is_followed(backend: Backend, history: list[SnapshotId]) -> None:
    tag(backend, "v1", history[0])
    assert branch_of(backend, "main") == "main"
    assert branch_of(backend, "heads/main") == "main"
    for text in ("main~1", "main@200", "v1", history[0], "nothing", "", "a b", "\ud800"):
        assert branch_of(backend, text) is None, text
