"""The image's health check, run as the image runs it, against servers that are well and not."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tests.containers.reading import DOCKER


@contextmanager
def answering(status: int, tls: tuple[Path, Path] | None = None) -> Iterator[str]:
    """Answer /healthz with a status, all else with 404; yields the port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/healthz" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if tls is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*tls)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield str(server.server_address[1])
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def check(**variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(DOCKER / "healthcheck.py")],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("host", ["", "0.0.0.0", "127.0.0.1"])
def test_a_server_that_answers_is_well_whatever_its_port(host: str) -> None:
    with answering(200) as port:
        assert check(EAGLE3_PORT=port, EAGLE3_HOST=host).returncode == 0


def test_another_answer_is_not_well() -> None:
    with answering(503) as port:
        done = check(EAGLE3_PORT=port)
    assert (done.returncode, done.stderr) == (1, "/healthz answered 503\n")


def test_no_answer_is_not_well() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = str(unused.getsockname()[1])
    done = check(EAGLE3_PORT=port)
    assert done.returncode == 1
    assert f"no answer from 127.0.0.1 port {port}: " in done.stderr


def test_a_server_with_tls_is_asked_by_tls(certificate: tuple[Path, Path]) -> None:
    with answering(200, certificate) as port:
        assert check(EAGLE3_PORT=port, EAGLE3_TLS_CERTIFICATE="/cert.pem").returncode == 0
        assert check(EAGLE3_PORT=port).returncode == 1
