"""What the tests of the preflight share."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import pytest

from eagle3_client import PreflightReport
from eagle3_client.preflight_report import SERVER_CHECKS, Check

MEASURED = {"supervision", "bandwidth", "encoding", "throughput"}


class Vocab:
    """All a preflight needs of a tokenizer."""

    def __init__(self, size: int) -> None:
        self.size = size

    def get_vocab(self) -> dict[str, int]:
        return {f"token-{i}": i for i in range(self.size)}


def statuses(checks: dict[str, Check]) -> dict[str, set[str]]:
    """Status -> names of the checks that have it."""
    found: dict[str, set[str]] = {}
    for name, check in checks.items():
        found.setdefault(check.status, set()).add(name)
    return found


def only(report: PreflightReport) -> dict[str, Check]:
    (server,) = report.servers
    assert list(server.checks) == list(SERVER_CHECKS)
    return server.checks


def every_failure_has_a_remedy(report: PreflightReport) -> bool:
    return all(check.remedy and check.detail for check in report.failed)


@pytest.fixture
def tcp() -> Iterator[Callable[[Callable[[socket.socket], None]], str]]:
    """`tcp(answer)`: the URL of a server that gives each connection to `answer`."""
    with ExitStack() as stack:

        def start(answer: Callable[[socket.socket], None]) -> str:
            listener = stack.enter_context(closing(socket.create_server(("127.0.0.1", 0))))

            def serve() -> None:
                while True:
                    try:
                        sock, _ = listener.accept()
                    except OSError:
                        return
                    stack.callback(sock.close)
                    threading.Thread(target=answer, args=(sock,), daemon=True).start()

            thread = threading.Thread(target=serve, daemon=True)
            thread.start()
            stack.callback(thread.join, 10)
            stack.callback(listener.shutdown, socket.SHUT_RDWR)
            return f"http://127.0.0.1:{listener.getsockname()[1]}"

        yield start


@pytest.fixture
def nothing_listens() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"
