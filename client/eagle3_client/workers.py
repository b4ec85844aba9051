"""`DaemonWorkers`: a few threads that carry requests, and never keep a dying process alive."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any, TypeVar

from eagle3_client.daemons import start_daemon
from eagle3_schemas.errors import RemoteEagle3Error

Result = TypeVar("Result")


class DaemonWorkers:
    """Runs callables on up to `count` daemon threads, in order of submission. Thread-safe.

    Not a ThreadPoolExecutor, whose threads are joined at interpreter exit: a trainer that raised
    would then hang for as long as a request is retried.
    """

    def __init__(self, count: int, name: str) -> None:
        self._count = count
        self._name = name
        self._queue: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = (
            queue.SimpleQueue()
        )
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._running: set[Future[Any]] = set()
        self._is_closed = False

    def submit(self, work: Callable[[], Result]) -> Future[Result]:
        """Queue a callable; a future that is cancelled before it starts is skipped."""
        future: Future[Result] = Future()
        with self._lock:
            if self._is_closed:
                raise RemoteEagle3Error("the backend was closed; build a new one")
            self._queue.put((future, work))
            if len(self._threads) < self._count:
                self._threads.append(start_daemon(self._loop, name=self._name))
        return future

    def grow(self, count: int) -> None:
        """Allow up to `count` threads from now on, if that is more; they start as work comes."""
        with self._lock:
            self._count = max(self._count, count)

    def close(self) -> None:
        """Cancel what has not started, fail what is running, end idle threads; waits for nothing.

        Whoever waits for a thread is woken even where that cannot be: a transport of the caller's
        may wait for a byte from the network.
        """
        with self._lock:
            self._is_closed = True
            threads = len(self._threads)
        try:
            while (item := self._queue.get_nowait()) is not None:
                item[0].cancel()
        except queue.Empty:
            pass
        for _ in range(threads):
            self._queue.put(None)
        with self._lock:
            for future in self._running:
                _settle(future.set_exception, RemoteEagle3Error("the backend was closed"))
            self._running.clear()

    def _loop(self) -> None:
        while (item := self._queue.get()) is not None:
            future, work = item
            if not future.set_running_or_notify_cancel():
                continue
            with self._lock:
                self._running.add(future)
            try:
                _settle(future.set_result, work())
            except BaseException as exc:  # it belongs to whoever waits for the future
                _settle(future.set_exception, exc)
            with self._lock:
                self._running.discard(future)
            del item, future, work  # an idle thread must not keep a batch alive


def _settle(settle: Callable[[Any], None], value: object) -> None:
    """Give a future its result or error, unless `close` gave it one before."""
    with suppress(InvalidStateError):
        settle(value)
