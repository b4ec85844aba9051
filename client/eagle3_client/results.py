"""What a backend's calls return besides batches: a handle, and the target's embeddings."""

from __future__ import annotations

from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass

import torch

from eagle3_client.device import hand_over
from eagle3_client.retry import Cancellation
from eagle3_schemas import Eagle3TargetBatch


@dataclass(frozen=True)
class TargetEmbeddings:
    """The target's input embeddings on the trainer: all a draft needs to copy them."""

    weight: torch.Tensor
    """[V, H], model dtype, on the backend's device."""


class RemoteBatchHandle:
    """An `Eagle3TargetBatch` on its way; see `BatchHandle`."""

    def __init__(self, future: Future[Eagle3TargetBatch], cancellation: Cancellation) -> None:
        self._future = future
        self._cancellation = cancellation

    def result(self, timeout: float | None = None) -> Eagle3TargetBatch:
        """Wait up to `timeout` seconds for the batch, on the backend's device.

        On a GPU the caller's current stream may use it at once.

        Raises:
            TimeoutError: not there yet; the request goes on, call again.
            concurrent.futures.CancelledError: it was cancelled, or the backend closed.
            RemoteEagle3Error: the request failed for good.
        """
        try:
            return hand_over(self._future.result(timeout))
        except FutureTimeoutError as exc:  # before Python 3.11 this is not the built-in one
            raise TimeoutError(f"no batch after {timeout} s; the request goes on") from exc

    def cancel(self) -> bool:
        """Drop the request if it has not started; return whether it was dropped.

        One that has started ends with the attempt under way, which is not repeated if it fails.
        """
        self._cancellation.set()
        return self._future.cancel()
