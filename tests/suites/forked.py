"""Run something in a forked child: its result, or an assertion that says how the child died."""

from __future__ import annotations

import os
import pickle
import select
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def in_child(body: Callable[[], Any], *, timeout_s: float = 60.0) -> Any:
    """What `body` returns, run in a forked child that must end by itself and without a signal."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _run(body, writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        data = b""
        deadline = time.monotonic() + timeout_s
        while True:
            ready, _, _ = select.select([file], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise AssertionError(f"the child hung for {timeout_s} s")
            part = os.read(file.fileno(), 1 << 16)
            if not part:
                break
            data += part
    _, status = os.waitpid(pid, 0)
    assert not os.WIFSIGNALED(status), f"the child was killed by {signal.Signals(os.WTERMSIG(status)).name}"
    passed, result = pickle.loads(data)
    assert passed, f"in the child:\n{result}"
    return result


@contextmanager
def running_child(body: Callable[[Callable[[bytes], None]], object]) -> Iterator[tuple[int, int]]:
    """(pid, descriptor) of a child that runs `body(say)`; what it says is read from the descriptor.

    The child is killed at the end; killing or stopping it before is the caller's.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        try:
            body(lambda data: os.write(writer, data) and None)
        except BaseException:  # noqa: BLE001  nothing of the parent may run in the child
            traceback.print_exc()
        os._exit(0)
    os.close(writer)
    try:
        yield pid, reader
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reader)


def _run(body: Callable[[], Any], writer: int) -> None:
    try:
        answer = pickle.dumps((True, body()))
    except BaseException:  # noqa: BLE001  nothing of the parent may run in the child
        answer = pickle.dumps((False, traceback.format_exc()))
    try:
        while answer:
            answer = answer[os.write(writer, answer) :]
    finally:
        os._exit(0)
