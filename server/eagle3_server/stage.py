"""`StageThread`: one stage of the server's pipeline: a thread behind a bounded queue."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from eagle3_schemas.errors import NotReady, QueueFull, RemoteEagle3Error, TargetFailed

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


class StageThread:
    """Runs callables one after another, in the order they were submitted. Thread-safe.

    No caller can forget a lock, and the event loop stays free during a forward.

    Args:
        name: the thread's name.
        max_queued: callables that may wait; one more is refused with QueueFull.
    """

    def __init__(self, name: str, max_queued: int) -> None:
        self._name = name
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._max_queued = max_queued
        self._lock = threading.Lock()
        self._closed = False
        self._thread: threading.Thread | None = None

    def submit(self, work: Callable[[], Result], request_id: str = "-") -> Future[Result]:
        """Queue a callable; its future carries its result, or a RemoteEagle3Error.

        Any other exception is logged with its traceback under `request_id` and becomes a
        TargetFailed that tells the client where to look.

        Raises:
            QueueFull: `max_queued` callables wait already.
            NotReady: the thread was closed.
        """
        future: Future[Result] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except RemoteEagle3Error as exc:
                future.set_exception(exc)
            except BaseException as exc:  # whatever a model raises must not end the thread
                logger.exception("request %s failed in the target", request_id)
                failure = TargetFailed(
                    f"the target failed with {type(exc).__name__}; the server's log has the "
                    f"traceback under request id {request_id}"
                )
                failure.__cause__ = exc
                future.set_exception(failure)

        with self._lock:
            if self._closed:
                raise NotReady("the server is stopping")
            if self._queue.qsize() >= self._max_queued:
                raise QueueFull(
                    f"{self._max_queued} requests wait already (max_queued_requests); repeat "
                    "later, or raise the limit on the server",
                    retry_after_s=1.0,
                )
            if self._thread is None:
                # A daemon, so that a forward that hangs cannot keep a dying process alive.
                self._thread = threading.Thread(target=self._loop, name=self._name, daemon=True)
                self._thread.start()
            self._queue.put(run)
        return future

    def close(self, *, wait: bool = True) -> None:
        """Refuse new work and end the thread after what is queued. Safe to repeat.

        Args:
            wait: return only when the thread has ended.
        """
        with self._lock:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
            thread = self._thread
        if thread is not None and wait:
            thread.join()

    def _loop(self) -> None:
        while (run := self._queue.get()) is not None:
            run()
            del run  # an idle thread must not keep a result alive
