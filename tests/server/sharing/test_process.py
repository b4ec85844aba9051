"""What `serve` itself sets up, seen from outside of its process."""

from __future__ import annotations

import resource
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tests.server.sharing.conftest import Trainer

from eagle3_server.config import nearest_variable
from eagle3_server.listening import allow_open_files


def test_a_proxys_word_is_not_believed_and_connections_are_counted(
    started: Any, trainer: Any
) -> None:
    server = started()
    one: Trainer = trainer(server.url)
    forged = {"x-forwarded-for": "1.2.3.4 EVIL", "x-eagle3-client": ""}
    assert one.http.get("/v1/model", headers=forged).status_code == 200
    metrics = one.http.get("/metrics").text
    assert "eagle3_connections 1.0" in metrics
    assert 'eagle3_rejections_total{reason="max_connections"} 0.0' in metrics
    server.process.terminate()
    assert server.ended() == 0
    assert "client=127.0.0.1" in server.said
    assert "EVIL" not in server.said


@pytest.mark.skipif(not socket.has_ipv6, reason="this Python was built without IPv6")
def test_the_url_of_an_ipv6_address_can_be_used_as_printed(started: Any, trainer: Any) -> None:
    server = started(EAGLE3_HOST="::1")
    assert server.url.startswith("http://[::1]:")
    assert trainer(server.url).status()["state"] == "ready"


@pytest.mark.slow
def test_a_tls_handshake_that_never_comes_is_given_up(
    started: Any, certificate: tuple[Path, Path]
) -> None:
    """After 10 s; the event loop's own limit is 60."""
    cert, key = certificate
    server = started(EAGLE3_TLS_CERTIFICATE=str(cert), EAGLE3_TLS_KEY=str(key))
    port = int(server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as silent:
        silent.settimeout(30)
        with suppress(ConnectionError):
            assert silent.recv(1) == b""


def test_few_open_files_are_raised_or_told(caplog: pytest.LogCaptureFixture) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(300, before[1]), before[1]))
        allow_open_files(400)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 464
        assert caplog.text == ""
        allow_open_files(before[1])  # more than it may have
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == before[1]
        assert "LimitNOFILE" in caplog.text
        assert "EAGLE3_MAX_CONNECTIONS" in caplog.text
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("EAGLE3_DRAIN_DELAY", "EAGLE3_DRAIN_DELAY_S"),
        ("EAGLE3_MAX_CONNECTION", "EAGLE3_MAX_CONNECTIONS"),
    ],
)
def test_a_misspelt_variable_is_told_the_nearest(name: str, nearest: str) -> None:
    assert nearest_variable(name) == nearest
