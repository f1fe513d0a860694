"""Sizes, times and tables for people."""

from __future__ import annotations

import io
from datetime import UTC, datetime

import pytest

from castore.cli import render
from castore.cli.command import App
from castore.cli.render import Table, age, clean, clean_lines, jsonable, number, plain_table, plural, share, size


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1024 * 1024 - 1, "1.0 MiB"),
        (12_900_000, "12.3 MiB"),
        (5 * 1024**4, "5.0 TiB"),
        (2**70, "1024.0 EiB"),
    ],
)
def test_sizes_are_in_plain_units_with_one_decimal(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(-5, "0 s"), (59, "59 s"), (61, "1 min"), (7200, "2 h"), (86400 * 400, "400 d")]
)
def test_an_age_is_in_the_largest_unit_that_fits(seconds: int, text: str) -> None:
    assert age(datetime.fromtimestamp(1_000_000, UTC), 1_000_000 + seconds) == text


def test_numbers_shares_and_plurals_are_short() -> None:
    assert (number(None), number(3), number(1 / 3), number(float("nan"))) == ("-", "3", "0.333333", "nan")
    assert (share(1, 3), share(1, 0)) == ("33.3 %", "-")
    assert (plural(1, "leaf", "leaves"), plural(2, "leaf", "leaves"), plural(0, "pack")) == (
        "1 leaf",
        "2 leaves",
        "0 packs",
    )


def test_text_of_strangers_cannot_steer_the_terminal() -> None:
    assert clean("a\x1b[2Jb\nc\u202egpj\u200b\x9b") == r"a\x1b[2Jb\nc\u202egpj\u200b\x9b"
    assert clean_lines("one\ntwo\x07") == "one\ntwo\\x07"
    table = Table(("A",))
    table.add("x\x1b]0;title\x07")
    assert plain_table(table) == "A\nx\\x1b]0;title\\x07\n"


def test_json_values_hold_no_nan_and_no_bytes() -> None:
    value = {"a": float("inf"), 1: (float("nan"), b"\x01"), "c": [True, None, 2**70, 1.5], "d": 1 + 2j}
    assert jsonable(value) == {"a": "inf", "1": ["nan", "01"], "c": [True, None, 2**70, 1.5], "d": "(1+2j)"}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_table_is_plain_columns_in_a_pipe_and_drawn_on_a_terminal() -> None:
    table = Table(("NAME", ">BYTES"))
    table.add("weight", "12 B")
    table.add("b", "1.0 KiB")
    pipe, terminal = io.StringIO(), Terminal()
    render.draw_table(table, pipe)
    render.draw_table(table, terminal)
    assert pipe.getvalue().splitlines() == ["NAME      BYTES", "weight     12 B", "b       1.0 KiB"]
    assert "weight" in terminal.getvalue()
    assert "─" in terminal.getvalue() or "━" in terminal.getvalue()


def test_markup_in_a_cell_is_text(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(("NAME",))
    table.add("[red]not markup[/red] [384, 2]")
    terminal = Terminal()
    render.draw_table(table, terminal)
    assert "[red]not markup[/red] [384, 2]" in terminal.getvalue()


def test_progress_draws_only_when_work_takes_long(capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter([0.0, 0.1, 1.0, 1.01, 1.2])
    patch = pytest.MonkeyPatch()
    patch.setattr(render.time, "monotonic", lambda: next(clock, 2.0))
    try:
        bar = render.ProgressBar("working")
        bar.update(1, 10)
        assert bar._bar is None
        bar.update(2, 10)
        assert bar._bar is not None
        bar.update(3, 10)
        bar.close()
    finally:
        patch.undo()
    assert capsys.readouterr().out == ""


def test_phases_have_a_bar_each_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[object, ...]] = []

    class Bar:
        def __init__(self, label: str) -> None:
            self._label = label

        def update(self, done: int, total: int) -> None:
            heard.append((self._label, done, total))

        def close(self) -> None:
            heard.append((self._label, "closed"))

    monkeypatch.setattr(render, "ProgressBar", Bar)
    with App(None, as_json=False).phases() as nobody_looks:
        assert nobody_looks is None
    monkeypatch.setattr("sys.stderr", Terminal())
    with App(None, as_json=False).phases() as show:
        assert show is not None
        for phase, done in (("mark", 1), ("mark", 2), ("sweep", 1)):
            show(phase, done, 2)
    assert heard == [("mark", 1, 2), ("mark", 2, 2), ("mark", "closed"), ("sweep", 1, 2), ("sweep", "closed")]
