"""Real saving processes, forked from this one, which is warm: everything they need is imported already.

A child reports each durable snapshot as a line in a pipe, and is killed with SIGKILL at a random moment.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

Report = Callable[[str], None]
"""Given to the child: one line to its parent."""


@dataclass
class Child:
    """A forked process and what it has reported so far."""

    pid: int
    _fd: int
    _rest: bytes = b""
    lines: list[str] = field(default_factory=list)

    def kill(self) -> list[str]:
        """SIGKILL, and everything that it had reported."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        return self.wait(status_expected=-signal.SIGKILL)

    def wait(self, *, status_expected: int = 0) -> list[str]:
        """Everything that it reports until it ends."""
        while block := os.read(self._fd, 1 << 16):
            self._take(block)
        os.close(self._fd)
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        assert status == status_expected, f"the child ended with {status}; its traceback is above"
        return self.lines

    def next_line(self) -> str:
        """The next line that it reports; blocks."""
        seen = len(self.lines)
        while len(self.lines) == seen:
            block = os.read(self._fd, 1 << 16)
            assert block, "the child ended; its traceback is above"
            self._take(block)
        return self.lines[seen]

    def _take(self, block: bytes) -> None:
        *whole, self._rest = (self._rest + block).split(b"\n")
        self.lines += [line.decode() for line in whole]


def fork(work: Callable[[Report], object]) -> Child:
    """Run `work` in a child, which never returns."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return Child(pid, reading)
    status = 1
    try:
        os.close(reading)
        # One write of a short line: it is in the pipe or it is not.
        work(lambda line: os.write(writing, line.encode() + b"\n"))
        status = 0
    except BaseException:  # noqa: BLE001  nothing of the parent's may run in the child
        traceback.print_exc(file=sys.__stderr__)
    finally:
        os._exit(status)


@contextmanager
def forked(work: Callable[[Report], object]) -> Iterator[Child]:
    """A child that ends with the block at the latest."""
    child = fork(work)
    try:
        yield child
    finally:
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(child.pid, signal.SIGKILL)
            os.waitpid(child.pid, 0)


def until(condition: Callable[[], bool], *, timeout_s: float = 30.0) -> None:
    """Wait for something that another process does."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.005)
