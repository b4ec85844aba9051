"""A relay that lets bytes from servers to clients through at a link's rate, and no faster.

A process of its own; it ends with its stdin. All connections share the link, as they would a
network card. There is no delay beside the queue's: it is a link's rate that is shown, not its
distance.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import threading
import time

CHUNK = 256 * 1024
BURST_S = 0.005


class Link:
    """A token bucket. Thread-safe.

    Args:
        gigabits: rate in Gb/s; 0 lets everything through.
    """

    def __init__(self, gigabits: float) -> None:
        self._seconds_per_byte = 8 / (gigabits * 1e9) if gigabits else 0.0
        self._lock = threading.Lock()
        self._free_at = 0.0

    def wait(self, nbytes: int) -> None:
        """Block until the link has carried these bytes, after all before them.

        A sleep that lasts too long is made good, up to `BURST_S`.
        """
        with self._lock:
            now = time.perf_counter()
            self._free_at = max(self._free_at, now - BURST_S) + nbytes * self._seconds_per_byte
            left = self._free_at - now
        if left > 0:
            time.sleep(left)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabits", type=float, required=True)
    parser.add_argument("--ports", type=int, nargs="+", required=True, help="servers' ports")
    arguments = parser.parse_args()
    link = Link(arguments.gigabits)
    listeners = {port: socket.create_server(("127.0.0.1", 0)) for port in arguments.ports}
    for port, listener in listeners.items():
        threading.Thread(target=accept, args=(listener, port, link), daemon=True).start()
    ports = {port: listener.getsockname()[1] for port, listener in listeners.items()}
    print(json.dumps({"ports": ports}), flush=True)
    sys.stdin.read()
    os._exit(0)


def accept(listener: socket.socket, port: int, link: Link) -> None:
    while True:
        client, _ = listener.accept()
        server = socket.create_connection(("127.0.0.1", port))
        for source, sink, paced in ((client, server, None), (server, client, link)):
            threading.Thread(target=pump, args=(source, sink, paced), daemon=True).start()


def pump(source: socket.socket, sink: socket.socket, link: Link | None) -> None:
    source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    view = memoryview(bytearray(CHUNK))
    try:
        while count := source.recv_into(view):
            if link is not None:
                link.wait(count)
            sink.sendall(view[:count])
        sink.shutdown(socket.SHUT_WR)
    except OSError:  # either end went away: the other learns it from its socket
        source.close()
        sink.close()


if __name__ == "__main__":
    main()
