"""What networks and servers do: stall, reset, close, answer garbage; all of it ends, typed."""

from __future__ import annotations

import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from eagle3_client import ProtocolMismatch, RemoteEagle3Error, TransportError
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


# --- certificates, and the other protocol ---


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


# --- hostile answers ---


def endless(piece: bytes) -> Callable[[Any], None]:
    def send(far_end: Any) -> None:
        while True:
            far_end.send(piece)

    return send


HOSTILE: dict[str, bytes | Callable[[Any], None]] = {
    "another-protocol": b"SSH-2.0-OpenSSH_9.6\r\n",
    "random": os.urandom(5000).replace(b"\n", b""),
    "no-version": b"200 OK\r\n\r\n",
    "http-2": b"HTTP/2 200\r\n\r\n",
    "status-is-no-number": b"HTTP/1.1 abc OK\r\n\r\n",
    "status-line-only": OK,
    "cut-in-the-status-line": OK[:10],
    "cut-in-a-header": OK + b"content-length: 1",
    "line-without-end": endless(b"x" * 4096),
    "headers-without-end": endless(OK + b"x: y\r\n" * 100),
    "too-many-headers": OK + b"x: y\r\n" * 120 + b"\r\n",
    "header-too-long": OK + b"x: " + b"y" * 70_000 + b"\r\n\r\n",
    "interim-without-end": endless(b"HTTP/1.1 100 Continue\r\n\r\n"),
    "hints-without-end": endless(b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n"),
    "length-negative": OK + b"content-length: -5\r\n\r\nbody",
    "length-signed": OK + b"content-length: +4\r\n\r\nbody",
    "length-huge": OK + b"content-length: 999999999999999\r\n\r\nbody",
    "length-of-5000-digits": OK + b"content-length: " + b"9" * 5000 + b"\r\n\r\nbody",
    "two-lengths": OK + b"content-length: 4\r\ncontent-length: 5\r\n\r\nbody!",
    "no-length": OK + b"\r\nbody",
    "chunked": OK + b"transfer-encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n",
    "chunked-and-a-length": OK + b"transfer-encoding: chunked\r\ncontent-length: 900\r\n\r\n"
    b"4\r\nbody\r\n0\r\n\r\n",
    "gzip-and-chunked": OK + b"transfer-encoding: gzip, chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n",
    "body-too-short": OK + b"content-length: 400\r\n\r\nbody",
}  # fmt: skip


@pytest.mark.parametrize("answer", HOSTILE)
def test_a_hostile_answer_is_a_transport_error_and_little_is_read(
    peer: Any, kind: str, answer: str
) -> None:
    what = HOSTILE[answer]

    def script(far_end: Any) -> None:
        far_end.read_request()
        far_end.send(what) if isinstance(what, bytes) else what(far_end)

    server = peer("tcp", script)
    if kind == "stock" and answer in ("interim-without-end", "hints-without-end"):
        return  # h11 reads interim answers for as long as they come
    connection = server.connection(kind)
    with pytest.raises(TransportError, match="url=http"):
        connection.input_embeddings()
    connection.close()
    server.wait_until_lost()
    assert server.opened[0].sent < 16 << 20  # what sockets buffer, not what was on offer


@pytest.mark.parametrize(
    "answer", ["length-negative", "length-signed", "length-of-5000-digits", "two-lengths"]
)
def test_a_length_that_is_none_is_refused_by_the_transport_itself(peer: Any, answer: str) -> None:
    def script(far_end: Any) -> None:
        far_end.read_request()
        far_end.send(HOSTILE[answer])

    words = "expected one content-length"
    with (
        peer("tcp", script).client() as client,
        pytest.raises(httpx.RemoteProtocolError, match=words),
    ):
        client.get("/")


@pytest.mark.parametrize(
    ("framing", "body"),
    [
        (b"", None),
        (b"transfer-encoding: chunked\r\n", b"1000\r\n" + b"x" * 4096 + b"\r\n"),
        (b"content-length: 99999999999\r\n", None),
    ],
    ids=["until-close", "chunked", "length"],
)
def test_an_error_page_without_end_is_cut(
    peer: Any, kind: str, framing: bytes, body: bytes | None
) -> None:
    def script(far_end: Any) -> None:
        far_end.read_request()
        far_end.send(b"HTTP/1.1 500 No\r\n", framing, b"\r\n")
        endless(body or b"x" * 4096)(far_end)

    server = peer("tcp", script)
    with pytest.raises(ProtocolMismatch, match=r"HTTP 500.*xxx"):
        server.connection(kind).input_embeddings()
    server.wait_until_lost()
    assert server.opened[0].sent < 16 << 20


@pytest.mark.parametrize(
    "chunks",
    [b"-1\r\nbody", b"-4\r\nbody\r\n0\r\n\r\n", b"zz\r\nbody", b"4\r\nbo", b"ffffffff\r\nbody",
     b"4" * 70_000, b"0\r\n" + b"x: y\r\n" * 100_000],
    ids=["minus-1", "negative", "no-number", "cut", "lies", "endless-size", "endless-trailer"],
)  # fmt: skip
def test_an_error_page_in_broken_chunks_is_an_error_all_the_same(peer: Any, chunks: bytes) -> None:
    def script(far_end: Any) -> None:
        far_end.read_request()
        far_end.send(b"HTTP/1.1 404 No\r\ntransfer-encoding: chunked\r\n\r\n", chunks)

    with pytest.raises((ProtocolMismatch, TransportError), match="url=http"):
        peer("tcp", script).connection(timeout_s=5).input_embeddings()


def test_an_error_page_in_chunks_is_kept_in_words(peer: Any, kind: str) -> None:
    def script(far_end: Any) -> None:
        far_end.read_request()
        far_end.send(b"HTTP/1.1 404 No\r\ntransfer-encoding: chunked\r\n\r\n")
        far_end.send(b"5\r\nno su\r\n", b"7;x=y\r\nch page\r\n", b"0\r\nt: r\r\n\r\n")

    with pytest.raises(ProtocolMismatch, match=r"HTTP 404.*no such page"):
        peer("tcp", script).connection(kind).input_embeddings()


@pytest.mark.parametrize("status", [b"100 Continue", b"102 Processing", b"103 Early Hints"])
def test_interim_answers_are_passed_over(peer: Any, kind: str, status: bytes) -> None:
    def script(far_end: Any) -> None:
        while far_end.read_request():
            for _ in range(3):
                far_end.send(b"HTTP/1.1 %s\r\nx: y\r\n\r\n" % status)
            far_end.answer(FRAME)

    server = peer("tcp", script)
    connection = server.connection(kind)
    for _ in range(2):
        assert connection.input_embeddings().fields == {}
    connection.close()
    assert len(server.opened) == 1


def test_a_switch_of_protocols_is_not_followed(peer: Any) -> None:
    def script(far_end: Any) -> None:
        far_end.read_request()
        far_end.send(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n")
        far_end.wait_until_left()

    server = peer("tcp", script)
    with pytest.raises(ProtocolMismatch, match="HTTP 101"):
        server.connection().input_embeddings()
    server.wait_until_lost()


def test_a_body_longer_than_announced_is_cut_and_costs_the_connection(peer: Any, kind: str) -> None:
    def script(far_end: Any) -> None:
        if far_end.read_request():
            far_end.answer(FRAME)
            far_end.send(bytes(100_000))
            far_end.wait_until_left()

    server = peer("tcp", script)
    connection = server.connection(kind)
    for _ in range(2):
        assert connection.input_embeddings().fields == {}
    connection.close()
    assert len(server.opened) == 2


def test_a_header_with_a_line_break_is_not_sent(peer: Any, kind: str) -> None:
    server = peer("tcp", wait_for_a_request)
    with server.client(kind) as client, pytest.raises(httpx.LocalProtocolError):
        client.get("/", headers={"x": "a\r\nb: c"})


def test_http_10_closes_after_its_body(peer: Any, link: str, kind: str) -> None:
    def script(far_end: Any) -> None:
        far_end.read_request()
        far_end.answer(FRAME, b"HTTP/1.0 200 OK\r\n")

    server = peer(link, script)
    connection = server.connection(kind)
    for _ in range(2):
        assert connection.input_embeddings().fields == {}
    assert len(server.opened) == 2


def test_a_default_context_is_made_only_for_https() -> None:
    transport = HttpTransport()
    assert "_ssl_context" not in vars(transport)
    assert isinstance(transport._ssl_context, ssl.SSLContext)
