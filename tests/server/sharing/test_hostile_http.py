"""HTTP that nobody's trainer speaks: it costs its own connection, and gets in nowhere."""

from __future__ import annotations

import logging
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tests.seeded_target import SeededTarget
from tests.server.sharing.conftest import PATIENCE_S, Trainer, body_of
from tests.server.sharing.test_isolation import Gate, gate, wait_for  # noqa: F401

from eagle3_schemas.protocol import FRAME_MEDIA_TYPE

GET = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"
CHUNKED = b"POST /v1/supervision HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"


def all_of(sock: socket.socket) -> bytes:
    answer = b""
    with suppress(ConnectionError):
        while more := sock.recv(1 << 16):
            answer += more
    return answer


def send_for_ever(sock: socket.socket, data: bytes) -> int:
    """Send until the other end closes; returns how many bytes."""
    count = 0
    with suppress(OSError):
        while count < 1 << 30:
            sock.sendall(data)
            count += len(data)
    return count


@pytest.mark.parametrize("rest", [b"0\r\n\r\n", b"5\r\nhello\r\n0\r\n\r\n", b""])
def test_a_chunked_body_is_refused(live_server: Any, trainer: Any, rest: bytes) -> None:
    one: Trainer = trainer(live_server(SeededTarget()))
    with one.connect() as sock:
        sock.sendall(CHUNKED + rest)
        answer = all_of(sock)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"content-length" in answer
    assert one.status()["state"] == "ready"


@pytest.mark.parametrize("piece", [b"a: b\r\n" * 1000, b"a" * 6000], ids=["many", "one"])
def test_trailers_without_end_cost_nothing(live_server: Any, trainer: Any, piece: bytes) -> None:
    one: Trainer = trainer(live_server(SeededTarget()))
    before = resident()
    with one.connect() as sock:
        sent = 0
        with suppress(ConnectionError):
            sock.sendall(CHUNKED + b"0\r\n")
            sent = send_for_ever(sock, piece)
    assert sent < 32 << 20  # what the sockets' buffers took
    assert resident() - before < 32 << 20
    assert one.http.get("/healthz").status_code == 200


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_a_trailer_is_no_header(live_server: Any, trainer: Any) -> None:
    one: Trainer = trainer(live_server(SeededTarget(), token="secret"),
                           authorization="Bearer secret")  # fmt: skip
    with one.connect() as sock:
        sock.sendall(
            b"GET /v1/model HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
            b"0\r\nauthorization: Bearer secret\r\n\r\n"
        )
        assert b" 200 " not in all_of(sock)


@pytest.mark.parametrize("size", [33_000, 60_000, 180_000])
def test_a_head_that_is_too_long_is_cut_also_in_one_piece(
    live_server: Any, trainer: Any, size: int
) -> None:
    one: Trainer = trainer(live_server(SeededTarget()))
    with one.connect() as sock:
        with suppress(ConnectionError):
            sock.sendall(GET[:-2] + b"x: " + b"y" * size + b"\r\n\r\n")
        assert all_of(sock) == b""
    with one.connect() as sock:  # and one that is not, is served
        sock.sendall(GET[:-2] + b"x: " + b"y" * 31_000 + b"\r\n\r\n")
        assert sock.recv(1 << 16).startswith(b"HTTP/1.1 200")


def test_requests_sent_ahead_end_the_connection(live_server: Any, trainer: Any) -> None:
    one: Trainer = trainer(live_server(SeededTarget()))
    before = resident()
    with one.connect() as sock:
        reader = threading.Thread(target=all_of, args=(sock,))
        reader.start()
        sent = send_for_ever(sock, GET * 1000)
        reader.join(PATIENCE_S)
    assert sent < 32 << 20
    assert resident() - before < 32 << 20
    assert one.status()["state"] == "ready"


def test_a_request_behind_another_is_served_after_it(live_server: Any, trainer: Any) -> None:
    """A client that read a whole answer may ask before the server knows that it was whole."""
    one: Trainer = trainer(live_server(SeededTarget()))
    with one.connect() as sock:
        sock.sendall(GET + GET)
        answer = b""
        while answer.count(b'{"status":"alive"}') < 2:
            more = sock.recv(1 << 16)
            assert more
            answer += more


def test_a_client_that_left_is_not_computed_whatever_it_sent_behind(
    live_server: Any,
    trainer: Any,
    gate: Gate,  # noqa: F811
    is_right: Any,
) -> None:
    target = SeededTarget(gate)
    one: Trainer = trainer(live_server(target))
    busy = one.open(1, "busy")
    gate.wait_until_entered()
    left = [one.open(seed, f"left-{seed}") for seed in range(2, 6)]
    wait_for(one, queued_requests=4)
    for sock in left:
        sock.sendall(GET)
    for sock in left:
        sock.close()
    wait_for(one, queued_requests=0)
    gate.is_open.set()
    assert is_right(9, one.ask(9))
    busy.close()
    assert target.supervised == [1, 9]
    wait_for(one, bytes_in_flight=0, tokens_in_flight=0)


def test_bytes_that_begin_no_request_are_not_waited_for_long(
    live_server: Any, trainer: Any
) -> None:
    """A line break behind an answer used to end every timer of the connection."""
    one: Trainer = trainer(live_server(SeededTarget(), header_timeout_s=1))
    with one.connect() as sock:
        sock.sendall(GET)
        assert sock.recv(1 << 16).startswith(b"HTTP/1.1 200")
        sock.sendall(b"\r\n")
        assert all_of(sock) == b""


def test_a_proxys_word_is_not_taken_for_who_asks(
    live_server: Any, trainer: Any, caplog: Any
) -> None:
    one: Trainer = trainer(live_server(SeededTarget()))
    forged = "1.2.3.4 status=200 code=ok EVIL"
    with caplog.at_level(logging.INFO):
        one.http.get("/v1/model", headers={"x-forwarded-for": forged, "x-eagle3-client": ""})
        for _ in range(1000):
            if any("fields" in vars(record) for record in caplog.records):
                break
            time.sleep(0.01)
    assert "EVIL" not in str([vars(record) for record in caplog.records])


@pytest.mark.parametrize("deadline", ["0", "00000000000"])
def test_a_deadline_that_has_passed_is_not_computed_on_an_idle_server(
    live_server: Any, trainer: Any, deadline: str
) -> None:
    target = SeededTarget()
    one: Trainer = trainer(live_server(target))
    for seed in range(10):
        assert one.ask(seed, x_eagle3_deadline_ms=deadline).status_code == 504
    assert target.supervised == []


def test_a_request_that_can_never_fit_with_its_own_body_is_refused_for_good(
    live_server: Any, trainer: Any
) -> None:
    """Not as if it had to wait for itself."""
    one: Trainer = trainer(live_server(SeededTarget(), max_bytes_in_flight=1 << 20))
    needed = int(one.ask(1).json()["detail"].split("alone takes ")[1].split(".")[0])
    body = len(body_of(1, "trainer-1"))
    for spare in (-body, -body + 1, -1):
        short: Trainer = trainer(live_server(SeededTarget(), max_bytes_in_flight=needed + spare))
        assert short.ask(1).status_code == 413, spare
    enough: Trainer = trainer(live_server(SeededTarget(), max_bytes_in_flight=needed))
    assert enough.ask(1).status_code == 200


def test_a_download_that_is_cut_off_is_not_counted_as_served(
    live_server: Any, trainer: Any, is_right: Any
) -> None:
    one: Trainer = trainer(live_server(SeededTarget()))
    cut = one.open(1, "cut", receive_bytes=4096)
    assert cut.recv(100).startswith(b"HTTP/1.1 200")
    cut.close()
    wait_for(one, bytes_in_flight=0)
    assert is_right(2, one.ask(2))
    wait_for(one, bytes_in_flight=0)
    metrics = one.http.get("/metrics").text
    line = 'eagle3_requests_total{code="%s",path="/v1/supervision"} 1.0'
    assert line % "client_gone" in metrics
    assert line % "ok" in metrics


def test_a_draft_vocab_of_more_ids_than_there_are_is_refused_unread(
    live_server: Any, trainer: Any
) -> None:
    import torch

    from eagle3_schemas.frame import encode

    one: Trainer = trainer(live_server(SeededTarget()))
    ids = torch.zeros(20_000_000, dtype=torch.uint8)
    content = encode(
        {}, {"selected_token_ids": ids, "selected_token_mask": torch.zeros(256, dtype=torch.uint8)}
    ).to_bytes()
    answer = one.http.put(
        f"/v1/draft-vocabs/{'0' * 64}", content=content, headers={"content-type": FRAME_MEDIA_TYPE}
    )
    assert answer.status_code == 422
    assert "at most the target's 2048 ids; got 20000000" in answer.json()["detail"]
