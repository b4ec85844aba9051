"""Servers of a fleet that are ill in ways that a health check does not see."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import torch
from tests.client.conftest import out_of
from tests.client.problems import problem
from tests.servers import router

from eagle3_client import FingerprintMismatch
from eagle3_client.health import HealthWatch
from eagle3_schemas.errors import DeadlineExceeded, TransportError
from eagle3_schemas.protocol import SUPERVISION_PATH

URLS = ["http://a", "http://b"]


class Ill(httpx.BaseTransport):
    """Hands requests on; supervision, when `is_ill`, to `answer`."""

    def __init__(self, inner: httpx.BaseTransport, answer: Callable[[], httpx.Response]) -> None:
        self.inner, self.answer = inner, answer
        self.is_ill = False
        self.asked = 0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if self.is_ill and request.url.path == SUPERVISION_PATH:
            self.asked += 1
            return self.answer()
        return self.inner.handle_request(request)


def refusing(status: int, code: str, **headers: str) -> Callable[[], httpx.Response]:
    return lambda: httpx.Response(
        status,
        json=problem(code),
        headers={"content-type": "application/problem+json"} | headers,
    )


@pytest.fixture
def pair(build_model: Any, serve: Any) -> Callable[..., tuple[Ill, httpx.BaseTransport]]:
    """`pair(answer)`: the server b, which may fall ill, and a transport to a and b."""

    def build(answer: Callable[[], httpx.Response]) -> tuple[Ill, httpx.BaseTransport]:
        b = Ill(serve(build_model("llama")), answer)
        return b, router(a=serve(build_model("llama")), b=b)

    return build


def test_a_server_that_computes_nothing_in_time_goes_out(
    pair: Any, connect: Any, draft_ids: torch.Tensor, inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its event loop lives, so its health checks are good."""
    monkeypatch.setattr(HealthWatch, "start", lambda _: None)  # it would ask it soon, to compare
    b, transport = pair(refusing(504, "deadline_exceeded"))
    backend = connect(transport, draft_ids, urls=URLS)
    b.is_ill = True
    for _ in range(8):
        backend.generate_batch(*inputs)
    assert out_of(backend) == ["http://b"]
    assert b.asked == 2


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("error", [TransportError, DeadlineExceeded])
def test_a_server_that_computes_nothing_at_the_start_goes_out(
    build_model: Any, serve: Any, connect: Any, draft_ids: torch.Tensor, inputs: Any,
    is_first: bool, error: type[Exception],
) -> None:  # fmt: skip
    def answer() -> httpx.Response:
        if error is TransportError:
            raise httpx.ReadTimeout("timed out")
        return refusing(504, "deadline_exceeded")()

    ill = Ill(serve(build_model("llama")), answer)
    ill.is_ill = True
    well = serve(build_model("llama"))
    transport = router(a=ill, b=well) if is_first else router(a=well, b=ill)
    backend = connect(transport, draft_ids, urls=URLS)
    assert out_of(backend) == [URLS[not is_first]]
    backend.generate_batch(*inputs)


def test_when_none_of_several_answers_at_the_start_each_is_named(connect: Any) -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError(f"no {request.url.host}", request=request)

    backend = connect(httpx.MockTransport(refuse), urls=URLS, retry_for_s=0)
    with pytest.raises(TransportError, match=r"none of 2.*http://a: .*no a.*http://b: .*no b"):
        backend.model_info()


def test_a_url_that_no_waiting_mends_is_no_server_that_is_away(
    build_model: Any, serve: Any, connect: Any
) -> None:
    def speaks_tls(request: httpx.Request) -> httpx.Response:
        raise httpx.UnsupportedProtocol("the server speaks TLS", request=request)

    transport = router(a=serve(build_model("llama")), b=httpx.MockTransport(speaks_tls))
    with pytest.raises(TransportError, match=r"write https://.*url=http://b"):
        connect(transport, urls=URLS).model_info()


@pytest.mark.parametrize("after", ["4", "86400", None])
def test_a_full_server_is_passed_over_and_its_pause_is_its_own(
    pair: Any, connect: Any, draft_ids: torch.Tensor, inputs: Any, after: str | None
) -> None:
    headers = {} if after is None else {"retry-after": after}
    b, transport = pair(refusing(503, "queue_full", **headers))
    backend = connect(transport, draft_ids, urls=URLS, retry_for_s=0.9)  # less than it asks for
    b.is_ill = True
    backend.generate_batch(*inputs)
    for _ in range(3):
        backend.generate_batch(*inputs)
    assert b.asked == 1 or after is None
    assert out_of(backend) == []  # it is well


def test_an_answer_of_another_target_is_asked_of_the_others(
    build_model: Any, serve: Any, connect: Any, draft_ids: torch.Tensor, inputs: Any, same: Any
) -> None:
    a, b = serve(build_model("llama")), serve(build_model("llama"))
    backend = connect(router(a=a, b=b), draft_ids, urls=URLS)
    first = backend.generate_batch(*inputs)
    b.app_client = serve(build_model("llama", seed=1)).app_client
    for _ in range(4):
        same(backend.generate_batch(*inputs).aux_hidden_states, first.aux_hidden_states)
    assert out_of(backend) == ["http://b"]


def test_when_every_server_answers_for_another_target_the_run_ends_with_that(
    build_model: Any, serve: Any, connect: Any, draft_ids: torch.Tensor, inputs: Any
) -> None:
    bridges = {name: serve(build_model("llama")) for name in "ab"}
    backend = connect(router(**bridges), draft_ids, urls=URLS, retry_for_s=60)
    for bridge in bridges.values():
        bridge.app_client = serve(build_model("llama", seed=1)).app_client
    started = time.monotonic()
    with pytest.raises(FingerprintMismatch):
        backend.generate_batch(*inputs)
    assert time.monotonic() - started < 30


def test_another_target_is_waited_out_while_the_right_one_may_come_back(
    build_model: Any, serve: Any, connect: Any, draft_ids: torch.Tensor, inputs: Any, same: Any
) -> None:
    a, b = serve(build_model("llama")), serve(build_model("llama"))
    backend = connect(router(a=a, b=b), draft_ids, urls=URLS, retry_for_s=60)
    first = backend.generate_batch(*inputs)
    fleet = backend._dispatcher.fleet
    fleet.members.eject(fleet.members.all[0], TransportError("lost"))  # comes back soon
    b.app_client = serve(build_model("llama", seed=1)).app_client
    same(backend.generate_batch(*inputs).aux_hidden_states, first.aux_hidden_states)


def test_a_comparison_that_hangs_holds_no_other_up(
    build_model: Any, serve: Any, connect: Any, draft_ids: torch.Tensor
) -> None:
    may_go_on, hangs = threading.Event(), threading.Event()

    def hang() -> httpx.Response:
        hangs.set()
        may_go_on.wait(60)
        raise httpx.ReadTimeout("timed out")

    ill = Ill(serve(build_model("llama")), hang)
    bridges = {"a": serve(build_model("llama")), "b": ill, "c": serve(build_model("llama"))}
    backend = connect(router(**bridges), draft_ids, urls=[*URLS, "http://c"])
    fleet = backend._dispatcher.fleet
    _, b, c = fleet.members.all
    for member in (b, c):
        fleet.members.eject(member, TransportError("lost"))
    ill.is_ill = True
    checks = [
        threading.Thread(target=lambda m=member: [fleet.check_health(m, 5) for _ in range(2)])
        for member in (b, c)
    ]
    checks[0].start()
    assert hangs.wait(60)
    checks[1].start()
    checks[1].join(60)
    assert not c.is_out
    assert b.is_out
    may_go_on.set()
    checks[0].join(60)


# --- requests that change on the way ---


@pytest.mark.parametrize("place", [6, 30, -1])
def test_a_bit_that_changes_in_a_request_costs_a_repeat(
    bridge: Any, connect: Any, draft_ids: torch.Tensor, inputs: Any, same: Any, place: int
) -> None:
    first = connect(bridge, draft_ids).generate_batch(*inputs)
    requests = itertools.count()

    def flip(request: httpx.Request) -> httpx.Response:
        if request.url.path == SUPERVISION_PATH and next(requests) == 0:
            body = bytearray(request.read())
            body[place] ^= 1
            request = httpx.Request(
                request.method, request.url, headers=request.headers, content=bytes(body)
            )
        return bridge.handle_request(request)

    backend = connect(httpx.MockTransport(flip), draft_ids)
    same(backend.generate_batch(*inputs).aux_hidden_states, first.aux_hidden_states)
    assert next(requests) == 2


def test_the_last_attempt_comes_at_the_end_of_the_patience(
    bridge: Any, connect: Any, draft_ids: torch.Tensor, inputs: Any
) -> None:
    transport = Ill(bridge, lambda: (_ for _ in ()).throw(httpx.ReadError("lost")))
    backend = connect(transport, draft_ids, retry_for_s=1.0)
    transport.is_ill = True
    started = time.monotonic()
    with pytest.raises(TransportError, match=r"waited_s=1\.") as caught:
        backend.generate_batch(*inputs)
    assert time.monotonic() - started >= 1.0
    assert caught.value.waited_s >= 1.0
