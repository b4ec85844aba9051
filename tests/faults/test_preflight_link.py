"""What a preflight says of a link, against what the link is known to carry."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from tests.faults.proxy import FaultProxy, Faults

# It measures, so nothing else should run; the proxy leaves its streams to the garbage collector.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def throttled() -> Iterator[Callable[[int, float], FaultProxy]]:
    """`throttled(port, bytes_per_s)`: a proxy to a port of this host."""
    with ExitStack() as stack:

        def start(port: int, bytes_per_s: float) -> FaultProxy:
            faults = Faults(bytes_per_s=bytes_per_s)
            proxy = FaultProxy(("127.0.0.1", port), lambda _: faults)
            stack.callback(proxy.close)
            return proxy

        yield start


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


def plain_bytes_per_s(
    throttled: Callable[[int, float], FaultProxy], bytes_per_s: float, nbytes: int
) -> float:
    """What a plain socket gets through such a proxy, which sleeps for longer than it is told."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def send() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(1)
                sock.sendall(bytes(nbytes))
                sock.recv(1)

        thread = threading.Thread(target=send)
        thread.start()
        proxy = throttled(listener.getsockname()[1], bytes_per_s)
        with socket.create_connection(("127.0.0.1", port_of(proxy.url))) as sock:
            started, received = time.perf_counter(), 0
            sock.sendall(b"x")
            while received < nbytes:
                received += len(sock.recv(1 << 20))
            seconds = time.perf_counter() - started
            sock.sendall(b"x")
        thread.join()
    return nbytes / seconds


@pytest.mark.parametrize("bytes_per_s", [1e6, 8e6, 32e6])
def test_a_throttled_link_is_measured_within_half_of_it(
    build_model: Any, live_server: Any, connect: Any, throttled: Any, bytes_per_s: float
) -> None:
    proxy = throttled(port_of(live_server(build_model("llama"))), bytes_per_s)
    report = connect(urls=proxy.url).preflight()
    plain = plain_bytes_per_s(throttled, bytes_per_s, int(bytes_per_s / 4))
    measured = report.servers[0].checks["bandwidth"].values["bytes_per_s"]
    print(f"set {bytes_per_s:.3g}, plain {plain:.3g}, measured {measured:.3g} bytes/s")
    assert plain / 1.5 < measured < plain * 1.5
