"""Repeats a call that failed for a passing reason, for a bounded time, and says so."""

from __future__ import annotations

import logging
import os
import queue
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from eagle3_schemas.errors import RemoteEagle3Error

Result = TypeVar("Result")

logger = logging.getLogger("eagle3_client")

_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 5.0
_FIRST_REPORT_S = 2.0  # what passes sooner is no news
_REPORT_EVERY_S = 15.0


class Cancellation:
    """Ends a call's repeats and the wait before the next. Thread-safe.

    `set` may run in a finalizer: a SimpleQueue, unlike an Event's lock, can be put to by a thread
    that the garbage collector interrupted inside the same queue.
    """

    def __init__(self) -> None:
        self.is_set = False
        self._signal: queue.SimpleQueue[None] = queue.SimpleQueue()

    def set(self) -> None:
        """End the wait under way, and all later ones."""
        self.is_set = True
        self._signal.put(None)

    def wait(self, timeout_s: float) -> None:
        """Wait for `set`, at most `timeout_s` seconds."""
        with suppress(queue.Empty):
            self._signal.get(timeout=timeout_s)


class Retrier:
    """Calls until success, an error that no repeat mends, or the end of patience. Thread-safe.

    Supervision is a pure function of the request, so a repeat is safe.

    Args:
        retry_for_s: seconds from the first failure after which the error is raised.
        max_retries: repeats after which it is raised even before that; None for no such limit.
    """

    def __init__(self, retry_for_s: float, max_retries: int | None = None) -> None:
        self._retry_for_s = retry_for_s
        self._max_retries = max_retries
        self._lock = threading.Lock()
        self._calls: set[Cancellation] = set()
        self._is_closed = False

    def close(self) -> None:
        """End every wait; the errors being retried are raised now."""
        with self._lock:
            self._is_closed = True
            for cancellation in self._calls:
                cancellation.set()

    def call(
        self,
        attempt: Callable[[], Result],
        what: str,
        cancellation: Cancellation | None = None,
    ) -> Result:
        """Run `attempt`, repeating it on retryable errors.

        Waits grow from 0.1 s to 5 s with jitter, or as the server's Retry-After says; a warning
        after 2 s and then every 15 s says what is being waited for, and one that it came.

        Args:
            attempt: runs at least once, and to its end even when cancelled meanwhile.
            what: name of the call in messages.
            cancellation: of this call alone; ends its repeats.

        Raises:
            RemoteEagle3Error: the last error, carrying the number of attempts.
        """
        cancellation = cancellation or Cancellation()
        with self._lock:
            self._calls.add(cancellation)
            if self._is_closed:
                cancellation.set()
        try:
            return self._call(attempt, what, cancellation)
        finally:
            with self._lock:
                self._calls.discard(cancellation)

    def _call(self, attempt: Callable[[], Result], what: str, cancellation: Cancellation) -> Result:
        attempts = 0
        first_failure: float | None = None
        next_report = _FIRST_REPORT_S
        while True:
            attempts += 1
            try:
                result = attempt()
                if first_failure is not None and next_report > _FIRST_REPORT_S:
                    waited = time.monotonic() - first_failure
                    logger.warning("%s: done after %.0f s, %d attempts", what, waited, attempts)
                return result
            except RemoteEagle3Error as error:
                now = time.monotonic()
                first_failure = now if first_failure is None else first_failure
                waited = now - first_failure
                error.attempts, error.rank = attempts, os.environ.get("RANK")
                error.waited_s = round(waited, 1) if attempts > 1 else None
                if (
                    not error.is_retryable
                    or (self._max_retries is not None and attempts > self._max_retries)
                    or cancellation.is_set
                ):
                    raise
                asked_s = 0.0
                if not error.may_go_elsewhere:
                    asked_s = min(error.retry_after_s or 0.0, _LONGEST_WAIT_S)
                if waited >= self._retry_for_s or waited + asked_s > self._retry_for_s:
                    raise
                pause = min(_FIRST_WAIT_S * 2 ** min(attempts - 1, 16), _LONGEST_WAIT_S)
                pause *= random.uniform(0.5, 1.0)  # ranks that failed together come back apart
                pause = max(pause, asked_s)
                if error.may_go_elsewhere:
                    pause = 0.0
                pause = min(pause, self._retry_for_s - waited)  # one more at the end
                if waited >= next_report:
                    logger.warning(
                        "%s: still retrying after %.0f s and %d attempts (giving up at %.0f s): %s",
                        what, waited, attempts, self._retry_for_s, error,
                    )  # fmt: skip
                    next_report = waited + _REPORT_EVERY_S
                elif attempts == 1:
                    logger.info("%s: retrying: %s", what, error)
            if pause:
                cancellation.wait(pause)
            if cancellation.is_set:
                reason = "the backend was closed" if self._is_closed else "cancelled"
                raise RemoteEagle3Error(f"{what}: {reason} while retrying")
