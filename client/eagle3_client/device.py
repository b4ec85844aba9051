"""Where batches are rebuilt: on a GPU, a stream beside the trainer's; elsewhere, just here."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from eagle3_schemas import Eagle3TargetBatch
from eagle3_schemas.capture import Capture
from eagle3_schemas.host_buffers import HostBuffers

AnyBatch = TypeVar("AnyBatch", Eagle3TargetBatch, Capture)

_own = threading.local()


def receive_buffers(device: torch.device) -> HostBuffers:
    """Return a pool to receive supervision into: page-locked memory for a GPU's trainer.

    A CPU batch is a view of the body it came in, and keeps its buffer until the last view dies.
    """
    return HostBuffers(pinned=device.type == "cuda")


@contextmanager
def beside_the_trainer(device: torch.device) -> Iterator[None]:
    """Queue the block's GPU work on the calling thread's own stream, and wait for it at the end.

    The wait is what lets a pinned buffer go back to its pool afterwards; it holds up this thread
    alone. Whatever the block made must be given to the trainer through `hand_over`.
    """
    if device.type != "cuda":
        yield
        return
    stream = _stream(device)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        stream.synchronize()


def hand_over(batch: AnyBatch) -> AnyBatch:
    """Tell the allocator that the caller's stream uses a batch that another stream made.

    Otherwise a tensor the trainer has dropped, with kernels that read it still queued, would be
    written over by the next batch. Call it on the thread that trains.
    """
    tensors: Iterable[torch.Tensor | None]
    if isinstance(batch, Capture):
        tensors = batch.outputs.values()
    else:
        tensors = (batch.aux_hidden_states, batch.target_probs, batch.position_mask)
    for tensor in tensors:
        if tensor is not None and tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return batch


def _stream(device: torch.device) -> torch.cuda.Stream:
    streams: dict[torch.device, torch.cuda.Stream] = _own.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return streams[device]
