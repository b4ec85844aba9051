"""Every limit refuses before anything is allocated, names itself, and lets the next one in."""

from __future__ import annotations

import http.client
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from tests.seeded_target import B, SeededTarget, T
from tests.server.sharing.conftest import PATIENCE_S, problem
from tests.server.sharing.test_isolation import Gate, gate, wait_for  # noqa: F401

from eagle3_schemas.errors import LimitExceeded, QueueFull
from eagle3_server.budget import Budget


def test_a_budget_is_held_and_given_back_whatever_happens() -> None:
    budget = Budget(10, "tokens", "max_tokens_in_flight")
    with budget.reserve("a", 4):
        assert budget.in_flight == 4
        with pytest.raises(KeyError), budget.reserve("b", 6):
            raise KeyError
        assert budget.in_flight == 4
    assert budget.in_flight == 0


def test_a_client_leaves_room_for_another() -> None:
    budget = Budget(10, "tokens", "max_tokens_in_flight")
    with budget.reserve("a", 3):
        with pytest.raises(QueueFull, match=r"3 of 10 tokens are in flight \(max_tokens_in_fl"):
            budget.reserve("a", 5).__enter__()
        with budget.reserve("a", 2), budget.reserve("b", 5):
            with pytest.raises(QueueFull):
                budget.reserve("c", 1).__enter__()
            assert budget.in_flight == 10
    with budget.reserve("a", 10):  # alone and at once, it may have all
        pass


def test_what_can_never_fit_is_refused_for_good() -> None:
    with pytest.raises(LimitExceeded, match=r"max_tokens_in_flight.*takes 11.*raise the limit"):
        Budget(10, "tokens", "max_tokens_in_flight").reserve("a", 11).__enter__()


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("max_body_bytes", 7000, (413, "limit_exceeded")),
        ("max_tokens_per_request", B * T - 1, (413, "limit_exceeded")),
        ("max_tokens_in_flight", B * T - 1, (413, "limit_exceeded")),
        ("max_bytes_in_flight", 1 << 20, (413, "limit_exceeded")),
    ],
)
def test_a_request_over_a_limit_is_refused_by_its_name(
    live_server: Any, trainer: Any, setting: str, value: int, expected: Any
) -> None:
    target = SeededTarget()
    one = trainer(live_server(target, **{setting: value}))
    status, code, detail = problem(one.ask(1))
    assert (status, code) == expected
    assert setting in detail
    assert "raise the limit" in detail
    assert target.supervised == []
    wait_for(one, bytes_in_flight=0, tokens_in_flight=0)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("max_tokens_in_flight", 3 * B * T - 1), ("max_bytes_in_flight", 30 << 20)],
)
def test_too_much_in_flight_is_refused_for_now(
    live_server: Any,
    trainer: Any,
    gate: Gate,  # noqa: F811
    is_right: Any,
    setting: str,
    value: int,
) -> None:
    one = trainer(live_server(SeededTarget(gate), **{setting: value}))
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(one.ask, 1)
        gate.wait_until_entered()
        others = [pool.submit(one.ask, seed) for seed in range(2, 6)]
        refused = next(
            answer
            for _ in range(6000)
            for answer in others
            if answer.done() or threading.Event().wait(0.005)
        )
        refusal = refused.result()
        assert problem(refusal)[:2] == (429, "queue_full")
        assert refusal.headers["retry-after"] == "1"
        assert setting in problem(refusal)[2]
        gate.is_open.set()
        assert is_right(1, first.result(PATIENCE_S))
    wait_for(one, bytes_in_flight=0, tokens_in_flight=0)
    assert is_right(9, one.ask(9))


def answer_on(sock: Any) -> bytes:
    """All that comes until the other end closes."""
    answer = b""
    while more := sock.recv(1 << 16):
        answer += more
    return answer


def test_connections_over_the_limit_are_refused_and_come_back(
    live_server: Any,
    trainer: Any,
    gate: Gate,  # noqa: F811
    is_right: Any,
) -> None:
    """Over a limit of connections that all have a request under way."""
    one = trainer(live_server(SeededTarget(gate), max_connections=3))
    busy = [one.open(seed, f"busy-{seed}") for seed in (1, 2, 3)]
    gate.wait_until_entered()
    refused = next(answer for _ in range(200) if (answer := one_more(one)) is not None)
    assert refused.startswith(b"HTTP/1.1 503")
    assert b"retry-after: 1" in refused
    assert b"EAGLE3_MAX_CONNECTIONS" in refused
    gate.is_open.set()
    for sock in busy:
        assert sock.recv(100).startswith(b"HTTP/1.1 200")
        sock.close()
    # Until the server has seen that they are closed it refuses, for now.
    answers = (one.ask(9) for _ in range(2000))
    assert is_right(9, next(answer for answer in answers if answer.status_code != 503))
    metrics = one.http.get("/metrics").text
    assert 'eagle3_rejections_total{reason="max_connections"} 0.0' not in metrics


def one_more(one: Any) -> bytes | None:
    """A connection's refusal, or None if it took the place of an idle one."""
    with one.connect() as sock:
        sock.settimeout(0.2)
        try:
            return answer_on(sock) or None
        except (TimeoutError, ConnectionError):
            return None


def test_an_idle_connection_makes_room_for_a_new_one(live_server: Any, trainer: Any) -> None:
    """So that strangers who hold the places keep nobody out; trainers' own connect again."""
    one = trainer(live_server(SeededTarget(), max_connections=3, token="secret"),
                  authorization="Bearer secret")  # fmt: skip
    strangers = [one.connect() for _ in range(6)]
    for sock in strangers[:3]:  # closed for the other three, as that of `one` is then
        with suppress(ConnectionError):
            assert answer_on(sock) == b""
    for sock in strangers[3:]:  # with their answers read they are idle, and not new any more
        sock.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        response = http.client.HTTPResponse(sock)
        response.begin()
        assert (response.status, len(response.read())) == (
            200,
            int(response.headers["content-length"]),
        )
    for _ in range(3):
        assert one.status()["state"] == "ready"
    for sock in strangers:
        sock.close()
