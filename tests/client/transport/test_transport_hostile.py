"""Answers that are no HTTP, lie, or never end: typed errors, and little is read."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from eagle3_client import ProtocolMismatch, TransportError
from eagle3_client.transport import HttpTransport
from eagle3_schemas.frame import encode

OK = b"HTTP/1.1 200 OK\r\n"
FRAME = encode({}, {}).to_bytes()


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
            # At once: what comes after the client has asked again is no part of this answer.
            head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(FRAME)
            far_end.send(head + FRAME + bytes(100_000))
            far_end.wait_until_left()

    server = peer("tcp", script)
    connection = server.connection(kind)
    for _ in range(2):
        assert connection.input_embeddings().fields == {}
    connection.close()
    assert len(server.opened) == 2


def test_a_header_with_a_line_break_is_not_sent(peer: Any, kind: str) -> None:
    server = peer("tcp", lambda far_end: far_end.sock.recv(65536))
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
