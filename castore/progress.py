"""Progress of one operation, added up."""

from __future__ import annotations

from collections.abc import Callable


class Meter:
    """Tells how much of an operation is done. Belongs to one thread."""

    def __init__(
        self, progress: Callable[[int, int], None] | None, total: int, *, beat: Callable[[], None] | None = None
    ) -> None:
        """`progress` gets (done, in all) of whatever is counted; `beat` is called at each step: a sign of life for
        other hosts.
        """
        self._progress = progress
        self._total = total
        self._beat = beat
        self._done = 0

    def advance(self, count: int = 1) -> None:
        """So much more was dealt with; never more than there is in all."""
        if self._beat is not None:
            self._beat()
        self._done = min(self._total, self._done + count)
        if self._progress is not None:
            self._progress(self._done, self._total)

    def finish(self) -> None:
        """All of it was."""
        self.advance(self._total)
