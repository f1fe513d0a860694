"""The product in one thread: what it hands to a pool is done at once, in the order in which it was handed over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Self
from unittest import mock


class InlineExecutor:
    """Stands in for ThreadPoolExecutor."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def submit(self, function: Callable[..., Any], *args: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args, **options))
        except Exception as error:  # noqa: BLE001  the future's to raise
            future.set_exception(error)
        return future

    def map(self, function: Callable[..., Any], *arguments: Any) -> Iterator[Any]:
        return map(function, *arguments)

    def shutdown(self, *_: object, **__: object) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@contextmanager
def one_thread() -> Iterator[None]:
    """No thread is started inside the block, but those of background saves."""
    with (
        mock.patch("castore.chunk_writer.ThreadPoolExecutor", InlineExecutor),
        mock.patch("castore.transfer.sender.ThreadPoolExecutor", InlineExecutor),
        mock.patch("castore.maintenance.record_check.ThreadPoolExecutor", InlineExecutor),
        mock.patch("castore.checkpoint.fetch.worker_count", return_value=1),
    ):
        yield
