"""`Prefetch`: an iterator over batches with their supervision, some requests ahead."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import replace
from typing import Any, Generic, Protocol, TypeVar

import torch

from eagle3_client.pace import Depth, PrefetchStats
from eagle3_schemas.errors import InvalidRequest, RemoteEagle3Error

Batch = TypeVar("Batch", bound="Mapping[str, Any] | Sequence[Any]")
Answer = TypeVar("Answer", covariant=True)

logger = logging.getLogger("eagle3_client")

_REQUIRED = ("input_ids", "attention_mask", "loss_mask")
_OPTIONAL = ("position_ids", "seq_lens", "doc_remaining")


class Handle(Protocol[Answer]):
    """An answer on its way; as `BatchHandle`."""

    def result(self, timeout: float | None = None) -> Answer:
        """Wait for it."""

    def cancel(self) -> bool:
        """Drop the request if it has not started."""


class Prefetch(Generic[Batch, Answer]):
    """Yields batches with their answers in order: `RemoteEagle3Backend.prefetch` makes one.

    The answer is an `Eagle3TargetBatch`, or from `prefetch_capture` a `Capture`.

    An iterator and a context manager. Nothing is pulled or sent before the first `next`. Whenever
    the consumer has a batch, `depth` requests for the next ones are in flight; at most `depth` + 1
    batches are held, and none that was delivered. Batches are pulled on the consumer's thread;
    requests, decoding and copies to the device run on the backend's.

    An error is raised when its batch's turn comes, after all batches before it: of the request, of
    the iterable, or of a batch that is no batch. Any error, `close`, leaving the `with` block, or
    dropping the iterator ends it: requests that have not started are dropped, those under way are
    not repeated, and the backend goes on. The iterable's iterator is dropped and never closed:
    dropped, a DataLoader's ends its workers, while a generator that the caller keeps can go on
    after the last batch pulled, which is up to `depth` further than the last one delivered.

    One consumer at a time; `close` and `stats` may be used from any thread.

    Args:
        submit: `generate_batch_async` of the backend, or one like it.
        batches: what `RemoteEagle3Backend.prefetch` documents.
        depth: how many requests are in flight.
        allow_in_flight: told the depth before that many requests are submitted.
        clock: seconds that only grow.

    Raises:
        InvalidRequest: `batches` is no iterable.
    """

    def __init__(
        self,
        submit: Callable[..., Handle[Answer]],
        batches: Iterable[Batch],
        depth: Depth,
        *,
        allow_in_flight: Callable[[int], None] = lambda _: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._submit = submit
        self._depth = depth
        self._allow_in_flight = allow_in_flight
        self._clock = clock
        self._pid = os.getpid()
        self._ahead: deque[tuple[Batch | None, Handle[Answer]]] = deque()
        self._source: Iterator[Batch] | None = None
        self._pulled = 0
        self._is_over = False
        self._turn = threading.Lock()
        self._delivered_at: float | None = None
        self._stats = PrefetchStats(depth=depth.current)
        try:
            self._source = iter(batches)
        except TypeError as exc:
            raise InvalidRequest(
                f"batches must be an iterable of dicts or tuples; got {type(batches).__name__}"
            ) from exc

    @property
    def stats(self) -> PrefetchStats:
        """What the consumer waited for so far, and the depth now; cheap."""
        return self._stats

    def __iter__(self) -> Prefetch[Batch, Answer]:
        """Return the prefetch itself."""
        return self

    def __enter__(self) -> Prefetch[Batch, Answer]:
        """Return the prefetch itself."""
        return self

    def __exit__(self, *_error: object) -> None:
        """Close the prefetch."""
        self.close()

    def __next__(self) -> tuple[Batch, Answer]:
        """Return the next batch as it was pulled, with its supervision on the backend's device.

        Raises:
            InvalidRequest: the batch is not one, with the key that is wrong.
            RemoteEagle3Error: as `generate_batch` raises, or the backend was closed.
        """
        if not self._turn.acquire(blocking=False):
            raise InvalidRequest(
                "a prefetch has one consumer at a time; got a second next() while one was under "
                "way. Give each thread its own prefetch"
            )
        try:
            return self._next()
        except BaseException:  # also an interrupt: going on would leave a batch out in silence
            self.close()
            raise
        finally:
            self._turn.release()

    def close(self) -> None:
        """End the prefetch as the class describes; safe to repeat, waits for nothing."""
        if not self._is_over:
            logger.info("prefetch ended: %s", self._stats)
        self._cancel()

    def __del__(self) -> None:
        # Runs inside the collector, maybe while this thread holds a lock of logging: no message.
        # And maybe in a DataLoader's forked worker, where the requests are not ours to cancel.
        if os.getpid() == self._pid:
            self._cancel()

    def _cancel(self) -> None:
        self._is_over = True
        self._source = None
        while self._ahead:
            try:
                _, handle = self._ahead.popleft()
            except IndexError:  # the consumer took the last one meanwhile
                break
            handle.cancel()

    def _next(self) -> tuple[Batch, Answer]:
        asked_at = self._clock()
        if self._delivered_at is None:
            self._fill()
        waiting_at = self._clock()
        try:
            batch, handle = self._ahead[0]
        except IndexError:  # delivered all, or closed by another thread
            raise StopIteration from None
        try:
            target_batch = handle.result()
        except Exception as exc:
            if self._is_over:  # closed by another thread
                raise StopIteration from None
            if isinstance(exc, CancelledError):
                raise RemoteEagle3Error("the backend was closed; build a new one") from exc
            raise
        finally:
            del handle  # else an error and its traceback would keep each other alive
        wait_s = self._clock() - waiting_at
        with suppress(IndexError):  # closed by another thread
            self._ahead.popleft()
        source_s = self._fill()
        if self._is_over:
            raise StopIteration
        self._note(asked_at, wait_s, source_s)
        assert batch is not None  # only an error has no batch, and it was raised
        return batch, target_batch

    def _fill(self) -> float:
        """Pull and submit up to the depth; return the seconds spent waiting for the iterable."""
        self._allow_in_flight(self._depth.current)
        source_s = 0.0
        while (source := self._source) is not None and len(self._ahead) < self._depth.current:
            batch: Batch | None = None
            started = self._clock()
            try:
                batch = next(source)
                source_s += self._clock() - started
                self._ahead.append((batch, self._submit(*_arguments(batch, self._pulled))))
                self._pulled += 1
            except StopIteration:
                self._source = None
            except Exception as error:  # raised at its turn; what comes after it never has one
                self._ahead.append((batch, _Failed(error)))
                self._source = None
        if self._is_over:  # closed by another thread, maybe before the last one was submitted
            self._cancel()
        return source_s

    def _note(self, asked_at: float, wait_s: float, source_s: float) -> None:
        """Account for a batch that is delivered now."""
        now = self._clock()
        before, self._delivered_at = self._delivered_at, now
        if before is None:
            self._stats = replace(self._stats, first_wait_s=now - asked_at)
            return
        stats, step_s = self._stats, now - before
        self._depth.note(wait_s, step_s)
        self._stats = replace(
            stats,
            steps=stats.steps + 1,
            step_s=stats.step_s + step_s,
            wait_s=stats.wait_s + wait_s,
            source_s=stats.source_s + source_s,
            last_wait_s=wait_s,
            depth=self._depth.current,
        )


class _Failed:
    """A batch that could not be pulled or submitted, in the place of its handle."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def result(self, timeout: float | None = None) -> Any:
        try:
            raise self._error
        finally:
            del self  # else the error and its traceback would keep each other alive

    def cancel(self) -> bool:
        return False


def _arguments(batch: object, index: int) -> list[torch.Tensor | None]:
    """Return a batch as the positional arguments of `generate_batch`."""
    names = _REQUIRED + _OPTIONAL
    if isinstance(batch, Mapping):
        if missing := [name for name in _REQUIRED if name not in batch]:
            raise InvalidRequest(
                f"batch {index} (from 0) must have the keys {', '.join(_REQUIRED)}; got "
                f"{sorted(map(str, batch))}, without {', '.join(missing)}"
            )
        arguments = [batch.get(name) for name in names]
    elif isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)):
        if not len(_REQUIRED) <= len(batch) <= len(names):
            raise InvalidRequest(
                f"batch {index} (from 0) must be {', '.join(_REQUIRED)}[, {', '.join(_OPTIONAL)}]; "
                f"got {len(batch)} values"
            )
        arguments = list(batch)
    else:
        raise InvalidRequest(
            f"batch {index} (from 0) must be a dict with {', '.join(_REQUIRED)}, or a tuple of "
            f"them in this order; got {type(batch).__name__}"
        )
    for name, value in zip(names, arguments, strict=False):
        if not isinstance(value, torch.Tensor) and (name in _REQUIRED or value is not None):
            raise InvalidRequest(
                f"batch {index} (from 0): {name} must be a torch.Tensor; got {type(value).__name__}"
            )
    return arguments
