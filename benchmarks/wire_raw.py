"""The reference of all transport: a plain socket, read into a buffer."""

from __future__ import annotations

import socket
from pathlib import Path

import torch
from common import MIB
from wire_servers import SIZE

from eagle3_schemas.tensors import byte_view


class RawClient:
    """Asks the `raw` server for bodies; a context manager.

    Args:
        address: a loopback port, or the path of a Unix socket.
        largest_mib: size of the buffer that `receive` uses again and again.
    """

    def __init__(self, address: int | Path, largest_mib: int) -> None:
        if isinstance(address, int):
            self._socket = socket.create_connection(("127.0.0.1", address))
        else:
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.connect(str(address))
        self._buffer = torch.zeros(largest_mib * MIB, dtype=torch.uint8)

    def __enter__(self) -> RawClient:
        """Return the client itself."""
        return self

    def __exit__(self, *_error: object) -> None:
        """Close the socket."""
        self.close()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def receive(self, mib: int) -> torch.Tensor:
        """Receive a body into the one buffer."""
        return self._into(self._buffer[: mib * MIB], mib)

    def receive_into_fresh(self, mib: int) -> torch.Tensor:
        """Receive a body into memory that was never touched."""
        return self._into(torch.empty(mib * MIB, dtype=torch.uint8), mib)

    def _into(self, buffer: torch.Tensor, mib: int) -> torch.Tensor:
        view = byte_view(buffer)
        self._socket.sendall(SIZE.pack(mib))
        received = 0
        while received < view.nbytes:
            count = self._socket.recv_into(view[received:])
            if not count:
                raise ConnectionError(f"the raw server closed after {received} bytes")
            received += count
        return buffer
