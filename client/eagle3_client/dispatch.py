"""`Dispatcher`: carries submissions to the fleet: repeats them, and runs them on worker threads."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import httpx
import torch

from eagle3_client.config import ClientSettings
from eagle3_client.fleet import Fleet
from eagle3_client.results import RemoteBatchHandle
from eagle3_client.retry import Cancellation, Retrier
from eagle3_client.submission import Submission
from eagle3_client.workers import DaemonWorkers
from eagle3_schemas import DraftVocab, Eagle3TargetBatch, ModelInfo
from eagle3_schemas.errors import InvalidRequest, RemoteEagle3Error

Result = TypeVar("Result")


class Dispatcher:
    """The fleet of one backend, with its retries and its worker threads. Thread-safe.

    Args:
        settings: of the backend.
        transport: httpx transport to use instead of the network's.
    """

    def __init__(self, settings: ClientSettings, transport: httpx.BaseTransport | None) -> None:
        self.fleet = Fleet(settings, transport)
        self._retrier = Retrier(settings.retry_for_s, settings.max_retries)
        self._workers = DaemonWorkers(settings.in_flight, "eagle3-request")
        self._is_closed = False
        self._pid = os.getpid()

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
        return self.call(self.fleet.model_info, "model info")

    def wait_until_ready(self, timeout_s: float) -> None:
        """Block until every server's target is loaded."""
        deadline = time.monotonic() + timeout_s
        for connection in self.fleet.connections:
            left_s = max(deadline - time.monotonic(), 0.1)
            check = partial(connection.check_ready, left_s)
            Retrier(left_s).call(check, f"waiting for {connection.url}")

    def input_embeddings(self) -> torch.Tensor:
        """Download the target's input embeddings, [V, H] on the CPU."""
        connection = self.fleet.connections[0]
        frame = self.call(connection.input_embeddings, "input embeddings")
        self.fleet.check_fingerprint(frame.fields.get("fingerprint"), connection.url)
        return frame.tensors["weight"]

    def register(self, vocab: DraftVocab, mask_size: int) -> None:
        """Register a draft vocab on every server that is not known to have it.

        Raises:
            InvalidRequest: `mask_size`, the length of the caller's mask, is not the target's V.
        """
        vocab_size = self.model_info().vocab_size
        if mask_size != vocab_size:
            raise InvalidRequest(
                f"selected_token_mask must be [V] with the target's V = {vocab_size} (the width of "
                f"its logits); got [{mask_size}]"
            )
        for connection in self.fleet.connections:
            self.call(partial(connection.ensure_registered, vocab, vocab_size), "draft vocab")

    def deliver(
        self, submission: Submission, cancellation: Cancellation | None = None
    ) -> Eagle3TargetBatch:
        """Get a submission's supervision here, repeating it on failures that pass."""
        info = self.model_info()
        supervision = self._retrier.call(
            lambda: submission.attempt(self.fleet, info),
            f"request {submission.request_id}",
            cancellation,
        )
        return submission.batch(supervision)

    def submit(self, submission: Submission) -> RemoteBatchHandle:
        """Deliver a submission on a worker thread."""
        cancellation = Cancellation()
        future = self._workers.submit(lambda: self.deliver(submission, cancellation))
        return RemoteBatchHandle(future, cancellation)

    def allow_in_flight(self, count: int) -> None:
        """Send up to `count` requests at once from now on, if that is more than before."""
        self._workers.grow(count)

    def close(self) -> None:
        """End all requests and close the sockets; safe to repeat."""
        if os.getpid() != self._pid:
            return  # the threads and the TLS sessions are the parent's, and its locks may be held
        self._is_closed = True
        self._retrier.close()
        self._workers.close()
        self.fleet.close()
