"""What one client does, or fails to do, costs itself alone."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import pytest
from tests.seeded_target import B, SeededTarget, T
from tests.server.sharing.conftest import PATIENCE_S, problem


class Gate:
    """Stands before every forward; `order` has the seeds that came."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.is_open = threading.Event()
        self.order: list[int] = []

    def __call__(self, job: Any) -> None:
        self.order.append(int(job.input_ids[0, 0]))
        self.entered.release()
        assert self.is_open.wait(PATIENCE_S), "nobody opened the gate"

    def wait_until_entered(self) -> None:
        assert self.entered.acquire(timeout=PATIENCE_S), "no forward began"


@pytest.fixture
def gate() -> Any:
    gate = Gate()
    yield gate
    gate.is_open.set()


@pytest.fixture
def pool() -> Any:
    pool = ThreadPoolExecutor(32)
    yield pool
    pool.shutdown(wait=False, cancel_futures=True)  # a test that failed may not have opened a gate


def wait_for(trainer: Any, **expected: Any) -> Any:
    """Until the server's status says so; returns it."""
    for _ in range(6000):
        status = trainer.status()
        if all(status[name] == value for name, value in expected.items()):
            return status
        threading.Event().wait(0.01)
    raise AssertionError(f"expected {expected}; the last status was {status}")


def test_a_deep_queue_does_not_starve_another_trainer(
    live_server: Any, trainer: Any, gate: Gate, pool: Any, is_right: Any
) -> None:
    url = live_server(SeededTarget(gate))
    deep, shallow = trainer(url, "deep"), trainer(url, "shallow")
    answers = {1: pool.submit(deep.ask, 1)}
    gate.wait_until_entered()
    for seed in range(2, 12):
        answers[seed] = pool.submit(deep.ask, seed)
    wait_for(deep, queued_requests=10)
    answers[100] = pool.submit(shallow.ask, 100)
    wait_for(deep, queued_requests=11)
    gate.is_open.set()
    assert all(is_right(seed, answer.result(PATIENCE_S)) for seed, answer in answers.items())
    assert gate.order.index(100) <= 2
    status = shallow.status()
    assert {(c["client"], c["requests"]) for c in status["clients"]} == {
        ("deep", 11),
        ("shallow", 1),
    }


def test_a_request_whose_client_has_gone_is_dropped_before_it_is_computed(
    live_server: Any, trainer: Any, gate: Gate, pool: Any, is_right: Any
) -> None:
    target = SeededTarget(gate)
    one = trainer(live_server(target))
    first = pool.submit(one.ask, 1)
    gate.wait_until_entered()
    leaving = [one.open(seed, f"leaving-{seed}") for seed in (2, 3)]
    wait_for(one, queued_requests=2)
    for sock in leaving:
        sock.close()
    wait_for(one, queued_requests=0)
    last = pool.submit(one.ask, 4)
    gate.is_open.set()
    assert is_right(1, first.result(PATIENCE_S))
    assert is_right(4, last.result(PATIENCE_S))
    assert target.supervised == [1, 4]
    status = wait_for(one, bytes_in_flight=0, tokens_in_flight=0)
    assert status["errors"] == []


def test_one_that_leaves_while_it_is_computed_leaves_nothing_behind(
    live_server: Any, trainer: Any, gate: Gate, pool: Any, is_right: Any
) -> None:
    one = trainer(live_server(SeededTarget(gate)))
    leaving = one.open(1, "leaving")
    gate.wait_until_entered()
    leaving.close()
    last = pool.submit(one.ask, 2)
    gate.is_open.set()
    assert is_right(2, last.result(PATIENCE_S))
    wait_for(one, bytes_in_flight=0, tokens_in_flight=0, queued_requests=0)


def test_a_deadline_ends_the_wait_and_the_work_is_not_done(
    live_server: Any, trainer: Any, gate: Gate, pool: Any, is_right: Any
) -> None:
    target = SeededTarget(gate)
    one = trainer(live_server(target))
    first = pool.submit(one.ask, 1)
    gate.wait_until_entered()
    late = one.ask(2, x_eagle3_deadline_ms="50")
    assert problem(late)[:2] == (504, "deadline_exceeded")
    assert "timeout_s" in problem(late)[2]
    assert one.status()["queued_requests"] == 0
    ample = pool.submit(one.ask, 3, x_eagle3_deadline_ms="60000")
    gate.is_open.set()
    assert is_right(1, first.result(PATIENCE_S))
    assert is_right(3, ample.result(PATIENCE_S))
    assert target.supervised == [1, 3]


def test_a_repeated_request_joins_the_one_under_way(
    live_server: Any, trainer: Any, gate: Gate, pool: Any, is_right: Any
) -> None:
    target = SeededTarget(gate)
    one = trainer(live_server(target))
    first = one.open(1, "same")
    gate.wait_until_entered()
    repeats = [pool.submit(one.ask, 1, "same") for _ in range(3)]
    other = pool.submit(one.ask, 2, "same")
    assert problem(other.result(PATIENCE_S))[:2] == (422, "invalid_request")
    wait_for(one, tokens_in_flight=4 * B * T)  # all have come
    first.close()
    wait_for(one, tokens_in_flight=3 * B * T)  # the others still wait for it
    gate.is_open.set()
    assert all(is_right(1, repeat.result(PATIENCE_S)) for repeat in repeats)
    assert target.supervised == [1]
    assert is_right(1, one.ask(1, "same"))
    assert target.supervised == [1, 1]  # a finished one is computed again
    assert is_right(2, one.ask(2, "same"))


def test_the_same_id_of_another_token_is_another_request(
    live_server: Any, trainer: Any, gate: Gate, pool: Any, is_right: Any
) -> None:
    target = SeededTarget(gate)
    url = live_server(target, token="one,two")
    one = trainer(url, "one", authorization="Bearer one")
    two = trainer(url, "two", authorization="Bearer two")
    first = pool.submit(one.ask, 1, "same")
    gate.wait_until_entered()
    second = pool.submit(two.ask, 2, "same")
    wait_for(one, queued_requests=1)
    gate.is_open.set()
    assert is_right(1, first.result(PATIENCE_S))
    assert is_right(2, second.result(PATIENCE_S))


def test_a_reader_that_stalls_is_cut_and_its_memory_returns(
    live_server: Any, trainer: Any, is_right: Any
) -> None:
    one = trainer(live_server(SeededTarget(), stall_timeout_s=1))
    stalled = one.open(1, "stalled", receive_bytes=1 << 16)
    wait_for(one, queued_requests=0)
    assert is_right(2, one.ask(2))  # while it stalls
    wait_for(one, bytes_in_flight=0, tokens_in_flight=0)
    with suppress(ConnectionError):  # or the kernel hands out what it has, and then the end
        while stalled.recv(1 << 20):
            pass
    stalled.close()
    assert is_right(3, one.ask(3))


def test_a_slow_reader_that_keeps_reading_gets_it_all(
    live_server: Any, trainer: Any, is_right: Any
) -> None:
    """Slower than the stall limit in all, and never as slow as it forbids."""
    one = trainer(live_server(SeededTarget(), stall_timeout_s=1))
    slow = one.open(1, "slow", receive_bytes=1 << 16)
    received = bytearray()
    for _ in range(30):
        threading.Event().wait(0.1)
        received += slow.recv(1 << 16)
    head, _, body = bytes(received).partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split()[0])
    while len(body) < length:
        body += slow.recv(1 << 20)
    slow.close()
    assert is_right(1, httpx.Response(200, content=body))


@pytest.mark.parametrize("end", ["vanish", "half-close"])
def test_a_client_that_ends_in_the_middle_of_its_body_costs_nothing(
    live_server: Any, trainer: Any, is_right: Any, end: str
) -> None:
    one = trainer(live_server(SeededTarget(), stall_timeout_s=1))
    sock = one.connect()
    sock.sendall(
        b"POST /v1/supervision HTTP/1.1\r\nhost: x\r\ncontent-length: 4000000\r\n"
        b"content-type: application/vnd.eagle3-remote.frame\r\n\r\n" + bytes(100)
    )
    wait_for(one, bytes_in_flight=4000000)
    sock.close() if end == "vanish" else sock.shutdown(socket.SHUT_WR)
    wait_for(one, bytes_in_flight=0)
    sock.close()
    assert is_right(2, one.ask(2))


@pytest.mark.parametrize(
    ("sent", "name"),
    [
        (b"", "header_timeout_s"),
        (b"POST /v1/supervision HTTP/1.1\r\nhost: x\r\n", "header_timeout_s"),
        (b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\nGET /hea", "header_timeout_s"),
        (
            b"POST /v1/supervision HTTP/1.1\r\nhost: x\r\ncontent-length: 4000000\r\n"
            b"content-type: application/vnd.eagle3-remote.frame\r\n\r\nabc",
            "stall_timeout_s",
        ),
    ],
    ids=["silent", "half-a-head", "second-head", "half-a-body"],
)
def test_who_sends_too_slowly_is_cut(
    live_server: Any, trainer: Any, is_right: Any, sent: bytes, name: str
) -> None:
    one = trainer(live_server(SeededTarget(), **{name: 1}))
    sock = one.connect()
    sock.sendall(sent)
    try:
        while sock.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass
    sock.close()
    wait_for(one, bytes_in_flight=0)
    assert is_right(2, one.ask(2))


def is_cut(sock: socket.socket, first: bytes, again: bytes, pause_s: float) -> bool:
    """Whether the server ends a connection on which `again` is sent for ever."""
    with sock, suppress(ConnectionError):
        sock.sendall(first)
        for _ in range(10_000 if pause_s == 0 else 600):
            sock.sendall(again)
            threading.Event().wait(pause_s)
        return False
    return True


def test_one_byte_at_a_time_does_not_buy_more_time(live_server: Any, trainer: Any) -> None:
    one = trainer(live_server(SeededTarget(), header_timeout_s=1))
    sock = one.connect()
    assert is_cut(sock, b"", b"G", pause_s=0.1)


def test_a_head_of_any_length_is_not_collected(live_server: Any, trainer: Any) -> None:
    one = trainer(live_server(SeededTarget()))
    sock = one.connect()
    assert is_cut(sock, b"GET /healthz HTTP/1.1\r\n", b"x: " + b"y" * 1000 + b"\r\n", pause_s=0)
