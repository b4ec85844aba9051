"""What networks and servers do: stall, reset, close, answer garbage; all of it ends, typed."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from eagle3_client import RemoteEagle3Error, TransportError
from eagle3_client.transport import HttpTransport
from eagle3_schemas.frame import encode

OK = b"HTTP/1.1 200 OK\r\n"
FRAME = encode({}, {}).to_bytes()


# --- silence and loss ---


def half_a_body(far_end: Any) -> None:
    far_end.read_request()
    far_end.send(OK, b"content-length: 200000\r\n\r\n", bytes(100_000))


def test_a_connection_reset_in_mid_body_is_a_read_error(peer: Any, link: str, kind: str) -> None:
    def script(far_end: Any) -> None:
        half_a_body(far_end)
        far_end.reset()

    with pytest.raises(TransportError, match=r"(ReadError|RemoteProtocolError).*url=http"):
        peer(link, script).connection(kind).input_embeddings()


def test_a_body_that_ends_early_is_a_protocol_error(peer: Any, link: str, kind: str) -> None:
    with pytest.raises(TransportError, match=r"RemoteProtocolError.*url=http"):
        peer(link, half_a_body).connection(kind).input_embeddings()


@pytest.mark.parametrize("when", ["before-the-head", "in-mid-head", "in-mid-body"])
def test_a_server_that_stalls_is_a_read_timeout(peer: Any, link: str, kind: str, when: str) -> None:
    def script(far_end: Any) -> None:
        if when == "in-mid-body":
            half_a_body(far_end)
        else:
            far_end.read_request()
            far_end.send(OK if when == "in-mid-head" else b"")
        far_end.wait_until_left()

    with pytest.raises(TransportError, match="ReadTimeout") as caught:
        peer(link, script).connection(kind, timeout_s=0.3).input_embeddings()
    assert caught.value.is_retryable


def test_a_server_that_takes_no_body_is_a_write_timeout(peer: Any, link: str, kind: str) -> None:
    is_over = threading.Event()
    server = peer(link, lambda _: is_over.wait(60))
    with server.client(kind, timeout_s=0.5) as client:
        with pytest.raises(httpx.WriteTimeout):
            client.post("/", content=bytes(64 << 20))
        is_over.set()


@pytest.mark.parametrize("what", ["read", "write"])
def test_each_timeout_is_its_own(peer: Any, link: str, kind: str, what: str) -> None:
    is_over = threading.Event()
    server = peer(link, lambda _: is_over.wait(60))
    timeout = httpx.Timeout(600, **{what: 0.3})
    with httpx.Client(
        transport=server.transport(kind), base_url=server.http_url, timeout=timeout
    ) as client:
        with pytest.raises(httpx.ReadTimeout if what == "read" else httpx.WriteTimeout):
            client.post("/", content=bytes(10 if what == "read" else 64 << 20))
        is_over.set()


def test_an_answer_that_refuses_a_body_unread_is_heard(peer: Any, link: str, kind: str) -> None:
    def script(far_end: Any) -> None:
        far_end.read_request()
        far_end.answer(b"too large", b"HTTP/1.1 413 Content Too Large\r\nconnection: close\r\n")
        if link == "unix":
            return far_end.sock.shutdown(socket.SHUT_RDWR)  # the client cannot send the rest
        # Reading on: the reset of a closed TCP socket would throw the answer away.
        far_end.wait_until_left()

    with peer(link, script).client(kind) as client:
        assert client.post("/", content=bytes(32 << 20)).status_code == 413


# --- kept connections ---


def test_a_kept_connection_that_dies_unanswered_is_replaced(peer: Any, link: str) -> None:
    """The server closes it while the request is on its way."""

    def script(far_end: Any) -> None:
        far_end.read_request()
        far_end.answer(FRAME)
        far_end.read_request()
        if far_end.number:
            far_end.answer(FRAME)

    server = peer(link, script)
    connection = server.connection()
    for _ in range(3):
        assert connection.input_embeddings().fields == {}
    connection.close()
    assert len(server.opened) == 2


def test_a_fresh_connection_that_dies_unanswered_is_not_replaced(peer: Any, link: str) -> None:
    requests: list[bytes] = []
    server = peer(link, lambda far_end: requests.append(far_end.sock.recv(65536)))
    with server.client() as client, pytest.raises(httpx.ReadError, match="without an answer"):
        client.get("/")
    assert sum(request.startswith(b"GET / ") for request in requests) == 1


def test_an_answer_that_began_is_not_asked_for_again(peer: Any, link: str) -> None:
    def script(far_end: Any) -> None:
        far_end.read_request()
        far_end.answer(b"first")
        far_end.read_request()
        far_end.send(b"H")

    server = peer(link, script)
    with server.client() as client:
        assert client.get("/").content == b"first"
        with pytest.raises(httpx.RemoteProtocolError, match="within a line: b'H'"):
            client.get("/")
    assert len(server.opened) == 1


def test_a_streamed_request_body_is_not_sent_twice(peer: Any) -> None:
    def script(far_end: Any) -> None:
        far_end.read_request()
        far_end.answer(b"first")
        far_end.read_request()

    server = peer("tcp", script)
    with server.client() as client:
        client.get("/")
        with pytest.raises(httpx.ReadError):
            client.post("/", content=iter([b"once"]))
    assert len(server.opened) == 1


@pytest.mark.parametrize("is_together", [True, False], ids=["with-the-body", "later"])
def test_bytes_behind_a_body_cost_the_connection(peer: Any, link: str, is_together: bool) -> None:
    """Or they would be read as the next answer."""
    stray = OK + b"content-length: 5\r\n\r\nstray"
    has_strayed, has_answer = threading.Event(), threading.Event()

    def script(far_end: Any) -> None:
        if not far_end.read_request():
            return
        if far_end.number:
            return far_end.answer(b"right")
        far_end.send(OK + b"content-length: 5\r\n\r\nfirst" + (stray if is_together else b""))
        if not is_together:
            assert has_answer.wait(60)
            far_end.send(stray)
        has_strayed.set()
        far_end.wait_until_left()

    server = peer(link, script)
    with server.client() as client:
        assert client.get("/").content == b"first"
        has_answer.set()
        assert has_strayed.wait(60)
        assert client.get("/").content == b"right"
    assert len(server.opened) == 2


# --- close() ---


@pytest.fixture
def full(listen: Any) -> Iterator[Callable[[], Any]]:
    """`full()`: a server whose queue of connections is full, so that a connect waits."""
    with ExitStack() as stack:

        def build() -> Any:
            _, server = listen("tcp", backlog=0)
            port = httpx.URL(server.url).port
            for _ in range(4):
                sock = stack.enter_context(socket.socket())
                sock.setblocking(False)
                sock.connect_ex(("127.0.0.1", port))
            return server

        yield build


def test_a_connect_that_waits_is_a_connect_timeout(full: Any, kind: str) -> None:
    with full().client(kind, timeout_s=0.3) as client, pytest.raises(httpx.ConnectTimeout):
        client.get("/")


def test_close_wakes_a_connect(full: Any) -> None:
    transport = HttpTransport()
    server = full()
    with ThreadPoolExecutor(1) as pool, httpx.Client(transport=transport, timeout=600) as client:
        waiting = pool.submit(client.get, server.url)
        while not transport._open:  # no event tells of a connect under way
            pass
        transport.close()
        with pytest.raises(httpx.ConnectError):
            waiting.result(60)


@pytest.mark.parametrize("when", ["before-the-head", "in-mid-body", "in-the-handshake"])
def test_close_wakes_a_call_that_waits_for_a_byte(
    peer: Any, link: str, connect: Any, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_waiting = threading.Event()

    def script(far_end: Any) -> None:
        half_a_body(far_end) if when == "in-mid-body" else far_end.read_request()
        is_waiting.set()
        far_end.wait_until_left()

    if when == "in-the-handshake":
        if link != "tls":
            return
        server = peer("tcp", lambda far_end: (is_waiting.set(), far_end.wait_until_left()))
        server.url = server.url.replace("http:", "https:")
    else:
        server = peer(link, script)
    if server.ca_file is not None:
        monkeypatch.setenv("SSL_CERT_FILE", server.ca_file)
    backend = connect(urls=server.url, timeout_s=600)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(backend.model_info)
        assert is_waiting.wait(60)
        backend.close()
        with pytest.raises(RemoteEagle3Error, match="the backend was closed"):
            waiting.result(60)
    with pytest.raises(RemoteEagle3Error, match="the backend was closed"):
        backend.model_info()


def test_close_wakes_a_call_that_sends(peer: Any, link: str) -> None:
    is_waiting, is_over = threading.Event(), threading.Event()

    def script(far_end: Any) -> None:
        far_end.read_request()
        is_waiting.set()
        is_over.wait(60)

    server = peer(link, script)
    transport = server.transport()
    client = httpx.Client(transport=transport, base_url=server.http_url, timeout=600)
    with ThreadPoolExecutor(1) as pool, client:
        waiting = pool.submit(client.post, "/", content=bytes(64 << 20))
        assert is_waiting.wait(60)
        transport.close()
        with pytest.raises(httpx.NetworkError):
            waiting.result(60)
        is_over.set()


def test_close_twice_and_a_request_afterwards(peer: Any, link: str) -> None:
    def script(far_end: Any) -> None:
        while far_end.read_request():
            far_end.answer(b"body")

    server = peer(link, script)
    transport = server.transport()
    client = httpx.Client(transport=transport, base_url=server.http_url)
    client.get("/")
    transport.close()
    server.wait_until_lost()
    transport.close()
    with pytest.raises(httpx.ConnectError, match="the transport was closed"):
        client.get("/")


def test_a_body_that_trickles_is_given_up_though_each_byte_comes_in_time(
    peer: Any, link: str, kind: str
) -> None:
    def script(far_end: Any) -> None:
        far_end.read_request()
        far_end.send(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
        while True:
            far_end.send(b"x")
            threading.Event().wait(0.02)

    server = peer(link, script)
    with pytest.raises(TransportError, match="slower than 256 KiB/s"):
        server.connection(kind, timeout_s=0.5).input_embeddings()
