"""`HostBuffers`: host memory that is used again, but never while anybody can still read it."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections import deque
from typing import Final

import torch

from eagle3_schemas.host_zeros import host_zeros

MAX_IDLE_BUFFERS: Final = 8
"""Buffers kept for the next `take`; with more, the one unused for longest is freed."""

_SMALLEST: Final = 1 << 16


class HostBuffers:
    """Lends buffers of host memory. Thread-safe.

    A fresh large block costs a page fault every 4 KiB, and pinning one far more. A buffer comes
    back by itself when the last view of it dies: an `await send()` that returned, or a copy that
    was asked for, says nothing of who still reads it.

    Args:
        pinned: page-locked memory, which copies from and to a GPU need to run beside other work.
    """

    def __init__(self, *, pinned: bool = False) -> None:
        self._pinned = pinned
        self._lock = threading.Lock()
        self._idle: list[torch.Tensor] = []  # the one unused for longest comes first
        # Finalizers run inside the garbage collector, on any thread and with any lock held, so
        # they only append here.
        self._returned: deque[torch.Tensor] = deque()

    def take(self, nbytes: int) -> torch.Tensor:
        """Return a [nbytes] uint8 CPU tensor of undefined content.

        Every tensor or memoryview made from it without copying keeps the memory lent.
        """
        if nbytes == 0:  # torch cannot wrap an empty buffer
            return torch.empty(0, dtype=torch.uint8)
        storage = self._storage(_rounded(nbytes))
        # Tensors share a storage, which cannot be watched; the object that exports it can.
        exporter = (ctypes.c_char * nbytes).from_address(storage.data_ptr())
        weakref.finalize(exporter, self._returned.append, storage).atexit = False
        return torch.frombuffer(exporter, dtype=torch.uint8)

    def _storage(self, size: int) -> torch.Tensor:
        with self._lock:
            while self._returned:
                self._idle.append(self._returned.popleft())
            for index in reversed(range(len(self._idle))):
                if self._idle[index].numel() == size:
                    return self._idle.pop(index)
            del self._idle[: max(len(self._idle) - MAX_IDLE_BUFFERS, 0)]
        if self._pinned:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        return host_zeros((size,), torch.uint8)


def _rounded(nbytes: int) -> int:
    """Round up by at most an eighth, so that batches of about the same size share buffers."""
    step = max(1 << max(nbytes.bit_length() - 4, 0), _SMALLEST)
    return -(-nbytes // step) * step
