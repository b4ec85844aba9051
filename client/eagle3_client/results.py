"""What a backend's calls return besides batches: a handle, and the target's embeddings."""

from __future__ import annotations

import os
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Generic

import torch

from eagle3_client.device import AnyBatch, hand_over
from eagle3_client.retry import Cancellation
from eagle3_schemas.errors import InvalidRequest, RemoteEagle3Error


@dataclass(frozen=True)
class TargetEmbeddings:
    """The target's input embeddings on the trainer: all a draft needs to copy them."""

    weight: torch.Tensor
    """[V, H], model dtype, on the backend's device."""

    def as_module(self, padding_idx: int | None = None, freeze: bool = True) -> torch.nn.Embedding:
        """Return a `torch.nn.Embedding` of these weights, in their dtype and on their device.

        A frozen one shares this memory, a gigabyte for a large target, so do not write to it; one
        that trains has a copy of its own, and what it learns is nowhere else.

        Args:
            padding_idx: id in [0, V) that gets no gradient; its row keeps the target's values.
            freeze: whether the weights stay as they are, as EAGLE-3 trains.

        Raises:
            InvalidRequest: `padding_idx` is out of range.
        """
        rows = self.weight.shape[0]
        if padding_idx is not None and not 0 <= padding_idx < rows:
            raise InvalidRequest(
                f"padding_idx must be in [0, {rows}), the rows of the target's embeddings, or "
                f"None; got {padding_idx}"
            )
        weight = self.weight if freeze else self.weight.clone()
        module: torch.nn.Embedding = torch.nn.Embedding.from_pretrained(  # type: ignore[no-untyped-call]
            weight, freeze=freeze, padding_idx=padding_idx
        )
        return module


class RemoteBatchHandle(Generic[AnyBatch]):
    """An `Eagle3TargetBatch`, or a `Capture`, on its way; see `BatchHandle`. For any thread."""

    def __init__(self, future: Future[AnyBatch], cancellation: Cancellation) -> None:
        self._future: Future[AnyBatch] = future
        self._cancellation = cancellation
        self._pid = os.getpid()

    def result(self, timeout: float | None = None) -> AnyBatch:
        """Wait up to `timeout` seconds for the batch, on the backend's device.

        On a GPU the caller's current stream may use it at once.

        Raises:
            TimeoutError: not there yet; the request goes on, call again.
            concurrent.futures.CancelledError: it was cancelled, or the backend closed.
            RemoteEagle3Error: the request failed for good, or the process was forked since.
        """
        if os.getpid() != self._pid:
            raise RemoteEagle3Error("the request was sent before a fork; its answer is there only")
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
