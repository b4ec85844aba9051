"""Ports for servers that are told theirs, and that begin to listen some time later."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack, suppress

_BETWEEN = range(20_000, 32_000)
"""Below those that Linux gives to whoever connects (from 32768), so that nothing takes one between
its choice here and its use; above those of Ray's workers (10002 to 19999)."""


def free_port(in_a_row: int = 1) -> int:
    """A port at which nothing listens, on 127.0.0.1, or the first of several in a row."""
    chooser = random.Random()  # of its own: tests run side by side, and seed the shared one alike
    while True:
        port = chooser.choice(_BETWEEN)
        with ExitStack() as stack, suppress(OSError):
            for each in range(port, port + in_a_row):
                stack.enter_context(socket.create_server(("127.0.0.1", each)))
            return port
