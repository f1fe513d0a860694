"""Save behind the training step: stage in the caller's thread, write in one of our own.

    save_async:  stage (a memory copy) beside flatten ─▶ queue ─▶ returns
    the saver:                                           queue ─▶ hash, encode, write, commit ─▶ PendingSave is done

With a worker process (worker.py) the saver hands each save on and waits for it; all else is the same.

Invariants:

1. What is saved is the state at the call. Nothing of the live state is referred to after save_async returned.
2. Saves of one handle are committed in the order of the calls. One that fails leaves the branch where it was, and the
   next continues from there.
3. An error is raised exactly once: by `result()` if somebody asks there first, else by the next save or by `close`;
   when there are several by then, with the first. Where nobody can ask any more, the logger "castore" has it.
4. "Done" is said only of what is durable. The interpreter waits for it before it exits; SIGKILL loses what was queued.
5. Only so many saves and bytes wait at a time; over that, save_async waits, and says so once.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from castore.available_memory import available_bytes
from castore.checkpoint.request import SaveRequest
from castore.checkpoint.stage import StagedState
from castore.errors import SlowSaveWarning
from castore.options import ASYNC_IN_FLIGHT_MAX, ASYNC_NICENESS, STAGED_BUDGET_SHARE
from castore.snapshots import Snapshot

_log = logging.getLogger("castore")

Carry = Callable[[StagedState, SaveRequest, Callable[[int, int], None]], Snapshot]
"""Carries out one save of a staged state."""


@dataclass(frozen=True, slots=True)
class SaveProgress:
    """How far a pending save is."""

    done_bytes: int
    total_bytes: int
    """0 until it has begun."""


class PendingSave:
    """A save that goes on in the background. Get one from `Repository.save_async`."""

    def __init__(self, staged_bytes: int, step: int | None) -> None:
        self._finished = threading.Event()
        self._staged_bytes = staged_bytes
        self._step = step
        self._pid = os.getpid()
        self._snapshot: Snapshot | None = None
        self._error: BaseException | None = None
        self._raised = False
        self._progress = SaveProgress(0, 0)

    def __del__(self) -> None:
        if self._error is not None and not self._raised and self._pid == os.getpid():
            _report(self._error)

    def done(self) -> bool:
        """Whether it is over: durable, or failed."""
        return self._finished.is_set()

    def progress(self) -> SaveProgress:
        """How far it is."""
        return self._progress

    def result(self, timeout: float | None = None) -> Snapshot:
        """Wait until the snapshot is durable and return it; `timeout` in seconds.

        Raises TimeoutError, or what the save raised.
        """
        if not self._finished.wait(timeout):
            raise TimeoutError(f"the save is not durable after {timeout} s ({self._progress.done_bytes} bytes done)")
        if self._error is not None:
            self._raised = True
            raise self._error
        assert self._snapshot is not None
        return self._snapshot

    def __repr__(self) -> str:
        state = "running" if not self.done() else "failed" if self._error is not None else "durable"
        return f"<PendingSave step={self._step} {state}>"


class BackgroundSaver:
    """The queue and the thread of one handle. Thread-safe."""

    def __init__(self, carry: Carry) -> None:
        self._carry = carry
        self._in_flight_max = ASYNC_IN_FLIGHT_MAX
        self._staged_bytes_max: int | None = None
        self._changed = threading.Condition()
        self._queue: deque[tuple[PendingSave, StagedState, SaveRequest]] = deque()
        self._in_flight: list[PendingSave] = []
        self._reserved: set[PendingSave] = set()
        """Those in flight that are being staged."""
        self._failed: list[PendingSave] = []
        self._thread: threading.Thread | None = None
        self._warned = False
        self._pid = os.getpid()

    def reserve(self, needed_bytes: int, step: int | None) -> PendingSave:
        """Wait until one more save of that size may be staged, and count it. A save larger than the budget waits to be
        alone. `submit` or `cancel` it.
        """
        pending = PendingSave(needed_bytes, step)
        with self._changed:
            if self._is_full(needed_bytes) and not self._warned:
                self._warned = True
                warnings.warn(
                    f"save_async waits: {len(self._in_flight)} saves are still being written, at most "
                    f"{self._in_flight_max} may be; save less often, or see Repository.limit_async",
                    SlowSaveWarning,
                    stacklevel=3,  # the caller of Repository.save_async
                )
            while self._is_full(needed_bytes):
                self._changed.wait()
            self._in_flight.append(pending)
            self._reserved.add(pending)
        return pending

    def submit(self, pending: PendingSave, staged: StagedState, request: SaveRequest) -> None:
        """Queue a staged state, which counts as what it holds from now on. When no thread can be started, it is
        released and the error raised.
        """
        with self._changed:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="castore-save", daemon=True)
                try:
                    thread.start()  # it waits for the lock
                except BaseException:
                    staged.release()
                    raise
                self._thread = thread
            self._reserved.remove(pending)
            pending._staged_bytes = staged.held_bytes
            self._changed.notify_all()  # it may be less than was reserved
            self._queue.append((pending, staged, request))

    def cancel(self, pending: PendingSave) -> None:
        """Give up what was reserved, unless it has been submitted."""
        with self._changed:
            if pending in self._reserved:
                self._reserved.remove(pending)
                self._in_flight.remove(pending)
                self._changed.notify_all()

    def set_limits(self, *, in_flight_max: int, staged_bytes_max: int | None) -> None:
        """Change the limits from the next save on; None stands for a share of the available memory."""
        with self._changed:
            self._in_flight_max, self._staged_bytes_max = in_flight_max, staged_bytes_max
            self._changed.notify_all()

    @property
    def is_of_this_process(self) -> bool:
        """False in a forked child: its parent's thread is not there."""
        return self._pid == os.getpid()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being staged, queued or written."""
        with self._changed:
            return not self._in_flight

    def wait(self) -> None:
        """Until nothing is queued or being written. Returns at once in a forked child, which has no saver."""
        if not self.is_of_this_process:
            return
        with self._changed:
            while self._in_flight:
                self._changed.wait()

    def raise_failure(self) -> None:
        """Raise the first error that nobody has been told of; its notes tell of the others."""
        with self._changed:
            unheard = [pending for pending in self._failed if not pending._raised]
            self._failed.clear()
        if not unheard:
            return
        first, *others = unheard
        error = first._error
        assert error is not None
        error.add_note(f"this save_async of step {first._step} failed in the background")
        for pending in others:
            error.add_note(f"so did that of step {pending._step}: {pending._error!r}")
        for pending in unheard:
            pending._raised = True
        raise error

    def _is_full(self, needed_bytes: int) -> bool:
        if not self._in_flight:
            return False
        waiting_bytes = sum(pending._staged_bytes for pending in self._in_flight)
        budget_bytes = self._staged_bytes_max
        if budget_bytes is None:
            budget_bytes = int(STAGED_BUDGET_SHARE * (available_bytes() + waiting_bytes))
        return len(self._in_flight) >= self._in_flight_max or waiting_bytes + needed_bytes > budget_bytes

    def _run(self) -> None:
        _yield_to_training()
        while True:
            with self._changed:
                if not self._queue:
                    self._thread = None  # an idle handle keeps no thread; the next submit starts one
                    return
                pending, staged, request = self._queue.popleft()
            self._save(pending, staged, request)
            with self._changed:
                self._in_flight.remove(pending)
                if pending._error is not None:
                    self._failed.append(pending)
                pending._finished.set()
                self._changed.notify_all()

    def _save(self, pending: PendingSave, staged: StagedState, request: SaveRequest) -> None:
        def progress(done_bytes: int, total_bytes: int) -> None:
            pending._progress = SaveProgress(done_bytes, total_bytes)

        try:
            pending._snapshot = self._carry(staged, request, progress)
        except BaseException as error:  # noqa: BLE001  whatever it is, the caller must hear of it
            pending._error = error
        finally:
            staged.release()


def _yield_to_training() -> None:
    """Let this thread, and the encoding threads that it will start, have what the training leaves of the cores."""
    if sys.platform == "linux":  # where threads have priorities of their own, and pass them on to those they start
        with suppress(OSError):
            thread_id = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, thread_id, os.getpriority(os.PRIO_PROCESS, thread_id) + ASYNC_NICENESS)


def _report(error: BaseException) -> None:
    """Tell of an error where nobody is left to raise it to: on stderr, unless the program has other plans for logs."""
    with suppress(Exception):
        _log.error("a background save failed and nobody asked for its result:", exc_info=error)


def wait_at_exit(saver: BackgroundSaver) -> None:
    """Let the interpreter wait for durability before it shuts its thread pools down, and report what failed then."""
    alive = weakref.ref(saver)

    def finish() -> None:
        saver = alive()
        if saver is None or not saver.is_of_this_process:  # a child must not touch its parent's lock
            return
        saver.wait()
        try:
            saver.raise_failure()
        except BaseException as error:  # noqa: BLE001  an error here would end the waiting for other handles
            _report(error)

    # concurrent.futures stops its pools in the same way, and callbacks run last registered first: ours comes before.
    register = getattr(threading, "_register_atexit", None)
    if register is not None:
        register(finish)
