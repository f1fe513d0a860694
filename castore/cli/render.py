"""Sizes, times, numbers and tables for people. `--json` prints the raw values instead.

Everything that comes from a repository passes `clean`: a message or a leaf path written by a stranger must
not move the cursor, change the window title or hide text.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from castore.snapshots import Snapshot

ID_DIGITS = 10
"""Of the ids that people are shown: unique in any repository whose log a person reads."""

_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")
"""Control characters, and those that turn the direction of text or are not seen."""
_BAR_DELAY_S = 0.4
"""Work that is over sooner needs no bar, and rich costs 80 ms to load."""
_BAR_INTERVAL_S = 0.1


def clean(text: str) -> str:
    """The text on one line, with control characters and the like shown as escapes."""
    return _UNSEEN.sub(lambda match: match.group().encode("unicode_escape").decode(), text)


def clean_lines(text: str) -> str:
    """The same, line breaks kept."""
    return "\n".join(clean(line) for line in text.splitlines())


def size(count: float) -> str:
    """Bytes in plain units: "912 B", "1.5 KiB", "12.3 MiB"."""
    if abs(count) < 1024:
        return f"{count:.0f} B"
    for unit in _UNITS:
        count /= 1024
        # 1023.95 would round to 1024.0
        if abs(count) < 1023.95 or unit == _UNITS[-1]:
            break
    return f"{count:.1f} {unit}"


def share(part: float, whole: float) -> str:
    """A percentage, "-" of nothing."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def number(value: float | None) -> str:
    """At most 6 significant digits; "-" for None."""
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def plural(count: int, noun: str, many: str = "") -> str:
    """As in "1 leaf", "2 leaves"."""
    return f"{count} {noun if count == 1 else many or noun + 's'}"


def local_time(moment: datetime) -> str:
    """ISO 8601 in the local time zone, to the second."""
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def age(moment: datetime, now_s: float) -> str:
    """How long ago, in the largest unit that fits: "40 s", "3 min", "2 h", "5 d"."""
    seconds = max(0.0, now_s - moment.timestamp())
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return f"{int(seconds)} s"


def shape_text(shape: Sequence[int]) -> str:
    """As in "[384, 1536]"."""
    return f"[{', '.join(map(str, shape))}]"


def metrics_text(metrics: Mapping[str, float]) -> str:
    """As in "loss=1.2 accuracy=0.9"."""
    return " ".join(f"{clean(key)}={number(value)}" for key, value in metrics.items())


def cost_text(snapshot: Snapshot) -> str:
    """The bytes of a snapshot and what its save added."""
    raw, new, stored = size(snapshot.raw_bytes), size(snapshot.new_bytes), size(snapshot.stored_bytes)
    return f"raw {raw}, new {new}, stored {stored}"


def jsonable(value: Any) -> Any:
    """The value with what JSON lacks written as text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [jsonable(item) for item in value]
    if isinstance(value, bytes | bytearray):
        return value.hex()
    if value is None or isinstance(value, str | int):
        return value
    return str(value)


# ---- tables ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under column names."""

    columns: tuple[str, ...]
    """A name that begins with ">" is of a column aligned to the right."""
    rows: list[tuple[str, ...]] = field(default_factory=list)
    title: str = ""

    def add(self, *cells: str) -> None:
        """Append a row."""
        assert len(cells) == len(self.columns)
        self.rows.append(tuple(clean(cell) for cell in cells))


def draw_table(table: Table, stream: TextIO) -> None:
    """By rich on a terminal; else in plain columns, two spaces apart, never cut."""
    if stream.isatty():
        _draw_rich(table, stream)
    else:
        stream.write(plain_table(table))


def plain_table(table: Table) -> str:
    """The lines of a table."""
    header = tuple(name.lstrip(">") for name in table.columns)
    everything = [header, *table.rows]
    widths = [max(len(row[index]) for row in everything) for index in range(len(header))]
    lines = [table.title] if table.title else []
    for row in everything:
        cells = (
            cell.rjust(width) if name.startswith(">") else cell.ljust(width)
            for cell, width, name in zip(row, widths, table.columns, strict=True)
        )
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines) + "\n"


def _draw_rich(table: Table, stream: TextIO) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, title=table.title or None, title_justify="left")
    for name in table.columns:
        numeric = name.startswith(">")
        drawn.add_column(
            Text(name.lstrip(">")), justify="right" if numeric else "left", no_wrap=numeric, overflow="fold"
        )
    for row in table.rows:
        drawn.add_row(*(Text(cell) for cell in row))
    Console(file=stream).print(drawn)


class ProgressBar:
    """A bar on stderr that appears when the work is not over at once. Any thread may call `update`."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._start = self._drawn = time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def update(self, done: int, total: int) -> None:
        """Show how far the work is."""
        now = time.monotonic()
        if now - self._start < _BAR_DELAY_S or (now - self._drawn < _BAR_INTERVAL_S and done < total):
            return
        self._drawn = now
        if self._bar is None:
            self._open()
        assert self._bar is not None
        assert self._task is not None
        self._bar.update(self._task, completed=done, total=total)

    def _open(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._bar.start()
        self._task = self._bar.add_task(self._label, total=None)

    def close(self) -> None:
        """Wipe the bar."""
        if self._bar is not None:
            self._bar.stop()
