"""`Dispatcher`: carries submissions to the fleet: repeats them, and runs them on worker threads."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Literal, Protocol, TypeVar

import httpx
import torch

from eagle3_client.config import ClientSettings
from eagle3_client.connection import Connection
from eagle3_client.daemons import close_at_exit
from eagle3_client.device import AnyBatch
from eagle3_client.disk_cache import FrameCache
from eagle3_client.exchanging import as_mismatch
from eagle3_client.fleet import Fleet
from eagle3_client.health import HealthWatch
from eagle3_client.pace import choose_depth
from eagle3_client.poison import Losses
from eagle3_client.prefetch import Answer, Handle, Prefetch
from eagle3_client.prefetch import Batch as Pulled
from eagle3_client.results import RemoteBatchHandle
from eagle3_client.retry import Cancellation, Retrier
from eagle3_client.workers import DaemonWorkers
from eagle3_schemas import DraftVocab, ModelInfo
from eagle3_schemas.errors import (
    InvalidRequest,
    MalformedPayload,
    NotReady,
    ProtocolMismatch,
    RemoteEagle3Error,
    TransportError,
)
from eagle3_schemas.frame import Frame
from eagle3_schemas.self_check import SelfCheck
from eagle3_schemas.target_head import unpack_target_head

Result = TypeVar("Result")
Received = TypeVar("Received")
Batch = TypeVar("Batch", covariant=True)

_MAX_MALFORMED = 4


class Sent(Protocol[Received, Batch]):
    """A request with a batch, bound to what it needs; `Submission` and `CaptureSubmission`."""

    @property
    def request_id(self) -> str:
        """Its id in both sides' logs."""

    def attempt(self, fleet: Fleet, connection: Connection, info: ModelInfo) -> Received:
        """Send it to a server, and rebuild what came."""

    def batch(self, received: Received, /) -> Batch:
        """Join that with the inputs."""


class Dispatcher:
    """The fleet of one backend, with its retries and its worker threads. Thread-safe.

    Args:
        settings: of the backend.
        transport: httpx transport to use instead of the network's.
    """

    def __init__(self, settings: ClientSettings, transport: httpx.BaseTransport | None) -> None:
        self.fleet = Fleet(settings, transport)
        self._settings = settings
        self._watch = HealthWatch(self.fleet)
        self._retrier = Retrier(settings.retry_for_s, settings.max_retries)
        self._workers = DaemonWorkers(
            settings.max_in_flight or 2 * len(settings.urls), "eagle3-request"
        )
        self._cache: FrameCache | None = None
        if settings.cache_dir is not None:
            # Who waits for another process is as patient as who downloads.
            wait_s = max(settings.retry_for_s, settings.timeout_s)
            self._cache = FrameCache(settings.cache_dir, wait_s)
        self.fleet.heads.cached = self._cached
        self._is_closed = False
        self._pid = os.getpid()
        close_at_exit(self)

    def check_usable(self) -> None:
        """Raise RemoteEagle3Error if the backend was closed, or built before a fork."""
        if self._is_closed:
            raise RemoteEagle3Error("the backend was closed; build a new one")
        self._check_process()

    def _check_process(self) -> None:
        # After a fork the threads are gone, locks may be held for ever, and sockets are shared.
        if os.getpid() != self._pid:
            raise RemoteEagle3Error("the backend was built before a fork; build one here")

    def call(self, attempt: Callable[[], Result], what: str) -> Result:
        """Run `attempt` here, repeating it on failures that pass."""
        self._check_process()
        return self._retrier.call(attempt, what)

    def model_info(self) -> ModelInfo:
        """Return what the servers serve; asked once, then kept."""
        info = self.call(self.fleet.model_info, "model info")
        if self.fleet.members.is_watched:
            self._watch.start()
            self._workers.grow(self.in_flight)  # a name may stand for more servers than one
        return info

    @property
    def in_flight(self) -> int:
        """Requests sent at once: as set, or two a server."""
        if self._settings.max_in_flight is not None:
            return self._settings.max_in_flight
        self.fleet.resolve()
        return 2 * len(self.fleet.members.all)

    def wait_until_ready(self, timeout_s: float) -> None:
        """Block until every server's target is loaded."""
        deadline = time.monotonic() + timeout_s
        self.fleet.resolve()
        for member in self.fleet.members.all:
            left_s = max(deadline - time.monotonic(), 0.1)
            check = partial(member.connection.check_ready, left_s)
            Retrier(left_s).call(check, f"waiting for {member.connection.url}")

    def self_check(self) -> tuple[SelfCheck, ...] | None:
        """Have a server check its target anew; None if it is too old for that."""

        def attempt() -> tuple[SelfCheck, ...] | None:
            with self.fleet.lend() as connection:
                answer = connection.self_check()
            if answer is None:
                return None
            self.fleet.check_fingerprint(answer.fingerprint, connection.url)
            return answer.checks

        return self.call(attempt, "self-check")

    def input_embeddings(self) -> torch.Tensor:
        """Return the target's input embeddings, [V, H] on the CPU, from the cache or a server.

        Raises:
            ProtocolMismatch: the answer holds no such matrix.
        """

        def download() -> Frame:
            with self.fleet.lend() as connection:
                frame = connection.input_embeddings()
            self.fleet.check_fingerprint(frame.fields.get("fingerprint"), connection.url)
            weight = frame.tensors.get("weight")
            if weight is None or weight.ndim != 2:
                raise ProtocolMismatch(
                    "expected input embeddings as a matrix `weight`; the answer holds "
                    f"{ ({name: list(t.shape) for name, t in frame.tensors.items()}) }. Check that "
                    "both sides have the same version",
                    url=connection.url,
                )
            return frame

        def attempt() -> torch.Tensor:
            return self._cached("input_embeddings", "", download).tensors["weight"]

        return self.call(attempt, "input embeddings")

    def target_head(self) -> Frame:
        """Return the frame of the target's head, from the cache or a server.

        Raises:
            ProtocolMismatch: the answer is none.
        """
        info = self.model_info()

        def download() -> Frame:
            with self.fleet.lend() as connection:
                frame = connection.target_head()
            self.fleet.check_fingerprint(frame.fields.get("fingerprint"), connection.url)
            with as_mismatch(connection, None):  # a wrong one must not stay on disk
                unpack_target_head(frame, info.vocab_size, info.hidden_size, torch.device("cpu"))
            return frame

        return self.call(lambda: self._cached("target_head", "", download), "target head")

    def _cached(self, kind: str, name: str, download: Callable[[], Frame]) -> Frame:
        """Keep what depends on the target and `name` alone on disk, if there is a `cache_dir`."""
        if self._cache is None:
            return download()
        return self._cache.get(kind, f"{self.fleet.model_info().fingerprint} {name}", download)

    def register(self, vocab: DraftVocab, mask_size: int) -> None:
        """Register a draft vocab on every server that is well; the others get it when they are.

        Raises:
            InvalidRequest: `mask_size`, the length of the caller's mask, is not the target's V.
        """
        vocab_size = self.model_info().vocab_size
        if mask_size != vocab_size:
            raise InvalidRequest(
                f"selected_token_mask must be [V] with the target's V = {vocab_size} (the width of "
                f"its logits); got [{mask_size}]"
            )

        def attempt() -> None:
            with self.fleet.lend() as connection:
                connection.ensure_registered(vocab, vocab_size)

        self.call(attempt, "draft vocab")  # at one of them, or it raises
        for connection in self.fleet.usable():
            with suppress(TransportError, NotReady):
                connection.ensure_registered(vocab, vocab_size)

    def deliver(
        self, submission: Sent[Received, AnyBatch], cancellation: Cancellation | None = None
    ) -> AnyBatch:
        """Get a submission's answer here, repeating it on failures that pass."""
        info = self.model_info()
        losses = Losses(submission.request_id)
        malformed = itertools.count(1)

        def attempt() -> Received:
            losses.check()
            try:
                with self.fleet.lend() as connection, losses.noted(connection):
                    return submission.attempt(self.fleet, connection, info)
            except MalformedPayload as exc:
                # What was sent is well-formed, so it changed on the way; if always, it did not.
                exc.is_retryable = next(malformed) < _MAX_MALFORMED
                raise

        what = f"request {submission.request_id}"
        return submission.batch(self._retrier.call(attempt, what, cancellation))

    def submit(self, submission: Sent[Received, AnyBatch]) -> RemoteBatchHandle[AnyBatch]:
        """Deliver a submission on a worker thread."""
        cancellation = Cancellation()
        future = self._workers.submit(lambda: self.deliver(submission, cancellation))
        return RemoteBatchHandle(future, cancellation)

    def allow_in_flight(self, count: int) -> None:
        """Send up to `count` requests at once from now on, if that is more than before."""
        self._workers.grow(count)

    def prefetch(
        self,
        submit: Callable[..., Handle[Answer]],
        batches: Iterable[Pulled],
        depth: int | Literal["auto"],
    ) -> Prefetch[Pulled, Answer]:
        """Return an iterator that submits batches ahead; see `RemoteEagle3Backend.prefetch`."""
        self.check_usable()
        chosen = choose_depth(depth, len(self.fleet.members.all), self._settings.max_in_flight)
        return Prefetch(submit, batches, chosen, allow_in_flight=self.allow_in_flight)

    def close(self) -> None:
        """End all requests and close the sockets; safe to repeat."""
        if os.getpid() != self._pid:
            return  # the threads and the TLS sessions are the parent's, and its locks may be held
        self._is_closed = True
        self._watch.stop()
        self._retrier.close()
        if self._cache is not None:
            self._cache.close()
        self._workers.close()
        self.fleet.close()
