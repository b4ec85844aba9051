"""Certificates that are not trusted, and URLs of the other protocol: refused at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from eagle3_client import TransportError
from eagle3_schemas.frame import encode

OK = b"HTTP/1.1 200 OK\r\n"
FRAME = encode({}, {}).to_bytes()


@pytest.fixture
def refused_at_once(connect: Any) -> Callable[..., str]:
    """`refused_at_once(url)`: the words of an error that is raised though a repeat was allowed."""

    def ask(url: str, transport: httpx.BaseTransport | None = None) -> str:
        with pytest.raises(TransportError) as caught:
            connect(transport, urls=url, retry_for_s=20).model_info()
        assert caught.value.attempts == 1
        assert not caught.value.is_retryable
        return str(caught.value)

    return ask


def wait_for_a_request(far_end: Any) -> None:
    far_end.sock.recv(65536)


@pytest.mark.parametrize("kind", ["ours", "stock"])
def test_a_certificate_of_an_unknown_authority_is_refused_at_once(
    peer: Any, refused_at_once: Any, kind: str
) -> None:
    url = peer("tls", wait_for_a_request).url
    words = refused_at_once(url, None if kind == "ours" else httpx.HTTPTransport())
    assert "ConnectError" in words
    assert "SSL_CERT_FILE" in words


def test_a_certificate_for_another_name_is_refused_at_once(
    peer: Any, refused_at_once: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = peer("tls", wait_for_a_request)
    monkeypatch.setenv("SSL_CERT_FILE", server.ca_file)
    assert "another name" in refused_at_once(server.url.replace("localhost", "127.0.0.1"))


@pytest.mark.parametrize("kind", ["ours", "stock"])
def test_https_to_a_server_of_http_is_refused_at_once(
    uvicorn_server: Any, refused_at_once: Any, kind: str
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        """Never called: TLS is no valid request."""

    url = uvicorn_server("tcp", app, lifespan="off").url.replace("http:", "https:")
    words = refused_at_once(url, None if kind == "ours" else httpx.HTTPTransport())
    assert "try http://" in words


def test_http_to_a_server_of_https_is_refused_at_once(
    uvicorn_server: Any, refused_at_once: Any
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        """Never called: no handshake."""

    url = uvicorn_server("tls", app, lifespan="off").url.replace("https:", "http:")
    assert "the server speaks TLS; write https://" in refused_at_once(url)


def test_a_tls_alert_in_answer_to_http_is_refused_at_once(peer: Any, refused_at_once: Any) -> None:
    def script(far_end: Any) -> None:
        far_end.read_request()
        far_end.send(b"\x15\x03\x01\x00\x02\x02\x46")

    assert "write https://" in refused_at_once(peer("tcp", script).url)


def test_a_server_of_http_that_died_unanswered_is_not_taken_for_one_of_https(
    peer: Any, connect: Any
) -> None:
    server = peer("tcp", wait_for_a_request)
    with pytest.raises(TransportError, match="check that the server runs") as caught:
        connect(urls=server.url, max_retries=2).model_info()
    assert caught.value.attempts == 3
