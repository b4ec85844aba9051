"""`StageThread`: one stage of the server's pipeline: a thread behind a bounded queue."""

from __future__ import annotations

import logging
import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from eagle3_schemas.errors import NotReady, QueueFull, RemoteEagle3Error, TargetFailed
from eagle3_server.fair_queue import FairQueue

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


class StageThread:
    """Runs callables one after another, clients taking turns. Thread-safe.

    No caller can forget a lock, and the event loop stays free during a forward.

    Args:
        name: the thread's name.
        max_queued: callables that may wait (`FairQueue`); one more is refused with QueueFull.
    """

    def __init__(self, name: str, max_queued: int) -> None:
        self._name = name
        self._queue: FairQueue[Callable[[], None]] = FairQueue(max_queued)
        self._max_queued = max_queued
        self._lock = threading.Lock()
        self._closed = False
        self._thread: threading.Thread | None = None

    def __len__(self) -> int:
        """Return how many callables wait."""
        return len(self._queue)

    def submit(
        self, work: Callable[[], Result], request_id: str = "-", client: str = ""
    ) -> Future[Result]:
        """Queue a callable; its future carries its result, or a RemoteEagle3Error.

        One whose future is cancelled while it waits never runs, and its place is free at once. Any
        other exception is logged with its traceback under `request_id` and becomes a
        TargetFailed that tells the client where to look.

        Raises:
            QueueFull: too many callables wait already, of this client or in all.
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
            try:
                self._queue.put(client, run)
            except queue.Full:
                raise QueueFull(
                    f"{len(self._queue)} requests wait already, and a client may not have more "
                    f"waiting than places are left of {self._max_queued} (max_queued_requests); "
                    "repeat later, or raise the limit on the server (EAGLE3_MAX_QUEUED_REQUESTS)",
                    retry_after_s=1.0,
                ) from None
            if self._thread is None:
                # A daemon, so that a forward that hangs cannot keep a dying process alive.
                self._thread = threading.Thread(target=self._loop, name=self._name, daemon=True)
                self._thread.start()
        # Weak: a future keeps its callbacks, and with them it would keep its result in a cycle.
        waiting = weakref.ref(run)

        def forget(done: Future[Result]) -> None:
            if done.cancelled() and (item := waiting()) is not None:
                self._queue.remove(client, item)

        future.add_done_callback(forget)
        return future

    def close(self, timeout_s: float | None = None) -> None:
        """Refuse new work and end the thread after what is queued. Safe to repeat.

        Args:
            timeout_s: wait so long for the thread to end; None waits until it has.
        """
        with self._lock:
            self._closed = True
            thread = self._thread
        self._queue.close()
        if thread is not None:
            thread.join(timeout_s)

    @property
    def is_alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def _loop(self) -> None:
        while (run := self._queue.get()) is not None:
            run()
            del run  # an idle thread must not keep a result alive
