"""`HostCopier`: the stage between computing and sending: results into pooled host buffers."""

from __future__ import annotations

import torch

from eagle3_schemas.host_buffers import HostBuffers
from eagle3_schemas.tensors import checksums, from_flat_bytes
from eagle3_server.engine import DeviceTensors, HostTensors

_ALIGNMENT = 64  # any dtype can be viewed there


class HostCopier:
    """Copies results off the device. Not thread-safe: one thread uses it.

    On a GPU the copies run on a stream of their own, from the moment the result is ready, while
    the next forward computes.

    Args:
        device: the target's device.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._buffers = HostBuffers(pinned=self._stream is not None)

    def to_host(self, result: DeviceTensors) -> HostTensors:
        """Copy a result into one pooled buffer, and wait until it is there.

        The checksums are those of the tensors on the device, so they cover the copy too. The buffer
        is used again when the last view of the copies has died. Constant tensors that lie in host
        memory already are passed on as they are.
        """
        tensors = result.tensors
        if self._stream is None:
            tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
            copies = tensors if result.is_constant else self._copied(tensors)
            sums = checksums(list(tensors.values()))
        else:
            with torch.cuda.stream(self._stream):
                if result.ready is not None:
                    self._stream.wait_event(result.ready)
                tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
                copies = self._copied(tensors)
                sums = checksums(list(tensors.values()))  # waits for the stream, copies included
        return HostTensors(copies, dict(zip(tensors, sums, strict=True)))

    def _copied(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        starts, end = {}, 0
        for name, tensor in tensors.items():
            starts[name] = end
            end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        buffer = self._buffers.take(end)
        copies = {}
        for name, tensor in tensors.items():
            segment = buffer[starts[name] : starts[name] + tensor.nbytes]
            copies[name] = from_flat_bytes(segment, tensor.dtype, tuple(tensor.shape))
            copies[name].copy_(tensor, non_blocking=True)
        return copies
