"""A self-check among other clients' requests: its turn, its place, and what it leaves untouched."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.server.self_check.conftest import by_status
from tests.servers import PATIENCE_S, GatedTarget

from eagle3_client import RemoteEagle3Backend
from eagle3_schemas.self_check import SELF_CHECKS, SelfCheckResponse
from eagle3_server import TransformersTarget

V = 131
PATH = "/v1/self-check"


class Watched(GatedTarget):
    """Notes what is computed; its first check waits for `gate`, its requests do not."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.computed: list[str] = []

    def self_check(self, name: str) -> Any:
        if not self.computed:
            self.entered.release()
            assert self.gate.wait(PATIENCE_S), "nobody opened the gate"
        self.computed.append(name)
        return self.inner.self_check(name)

    @contextmanager
    def opened_at_the_end(self) -> Iterator[None]:
        """So that a test that fails ends, too."""
        try:
            yield
        finally:
            self.gate.set()

    def supervise(self, job: Any) -> Any:
        self.computed.append("supervise")
        return self.inner.supervise(job)


@pytest.fixture
def watched(target: TransformersTarget) -> Watched:
    return Watched(target)


@pytest.fixture
def trainer(mapping: Any, batch_of: Any, watched: Watched) -> Any:
    """`trainer(bridge)`: a backend, and what it got before anything else happened."""

    def build(bridge: Any) -> tuple[RemoteEagle3Backend, Any, Any]:
        backend = RemoteEagle3Backend("http://target", transport=bridge)
        backend.set_vocab_mapping(*mapping(torch.arange(0, V, 2), V))
        batch = batch_of(V)
        before = backend.generate_batch(*batch)
        watched.computed.clear()
        return backend, batch, before

    return build


def test_others_take_their_turn_between_its_checks(
    serve: Any, watched: Watched, trainer: Any
) -> None:
    bridge = serve(watched)

    def status() -> Any:
        return bridge.app_client.get("/v1/status").json()

    backend, batch, before = trainer(bridge)
    counted = status()
    with backend, ThreadPoolExecutor(1) as pool, watched.opened_at_the_end():
        asked = pool.submit(bridge.app_client.post, PATH)
        watched.wait_until_entered()
        assert bridge.app_client.get("/healthz").json() == {"status": "alive"}
        assert bridge.app_client.get("/readyz").json() == {"status": "ready"}
        assert status()["tokens_in_flight"] == 66
        pending = backend.generate_batch_async(*batch)
        while status()["queued_requests"] == 0:
            assert not asked.done()
        watched.gate.set()
        during = pending.result(PATIENCE_S)
        answer = asked.result(PATIENCE_S)
        after = backend.generate_batch(*batch)
    first, *rest = SELF_CHECKS
    assert watched.computed == [first, "supervise", *rest, "supervise"]
    assert {each["status"] for each in answer.json()["checks"]} == {"passed"}
    for got in (during, after):
        for name in ("aux_hidden_states", "target_probs", "position_mask"):
            assert torch.equal(getattr(got, name), getattr(before, name))
    bridge.wait_until_idle()
    then = status()
    assert then["tokens_in_flight"] == then["bytes_in_flight"] == 0
    assert [each["requests"] for each in counted["clients"]] == [1]
    assert [each["requests"] for each in then["clients"]] == [3]  # the trainer's alone
    assert then["tokens"]["real"] == 3 * counted["tokens"]["real"] > 0


def test_it_counts_for_no_trainer(serve: Any, target: TransformersTarget) -> None:
    bridge = serve(target)
    before = bridge.app_client.get("/v1/status").json()
    answer = bridge.app_client.post(PATH, headers={"x-request-id": "mine", "x-eagle3-client": "a"})
    assert answer.headers["x-request-id"] == answer.json()["request_id"] == "mine"
    assert answer.json()["fingerprint"] == target.describe().fingerprint
    assert "server-timing" not in answer.headers
    SelfCheckResponse.model_validate_json(answer.content)
    after = bridge.app_client.get("/v1/status").json()
    for name in ("tokens", "padding_share", "draft_vocab_coverage", "stages", "clients"):
        assert after[name] == before[name]


def test_one_at_a_time_is_made_and_a_repeat_shares_it(serve: Any, watched: Watched) -> None:
    bridge = serve(watched)
    post = bridge.app_client.post
    with ThreadPoolExecutor(3) as pool, watched.opened_at_the_end():
        first = pool.submit(post, PATH, headers={"x-request-id": "one"})
        watched.wait_until_entered()
        asked = pool.submit(post, PATH, headers={"x-request-id": "two"})
        while not asked.done():
            assert bridge.app_client.get("/v1/status").json()["queued_requests"] == 0
        second = asked.result()
        assert (second.status_code, second.json()["code"]) == (429, "queue_full")
        assert "makes one at a time; repeat later" in second.json()["detail"]
        assert second.headers["retry-after"] == "1"
        again = pool.submit(post, PATH, headers={"x-request-id": "one"})
        while bridge.app_client.get("/v1/status").json()["tokens_in_flight"] < 2 * 66:
            assert not again.done()
        watched.gate.set()
        assert first.result(PATIENCE_S).json() == again.result(PATIENCE_S).json()
    assert watched.computed == list(SELF_CHECKS)
    assert post(PATH).status_code == 200


def test_past_its_deadline_the_rest_is_not_made(serve: Any, watched: Watched) -> None:
    bridge = serve(watched)
    with ThreadPoolExecutor(1) as pool, watched.opened_at_the_end():
        asked = pool.submit(bridge.app_client.post, PATH, headers={"x-eagle3-deadline-ms": "1500"})
        watched.wait_until_entered()
        answer = asked.result(PATIENCE_S)
        assert (answer.status_code, answer.json()["code"]) == (504, "deadline_exceeded")
    watched.gate.set()
    assert bridge.app_client.post(PATH).status_code == 200
    assert watched.computed == [SELF_CHECKS[0], *SELF_CHECKS]


def test_a_server_that_drains_refuses_and_ends_what_it_began(serve: Any, watched: Watched) -> None:
    bridge = serve(watched)
    with ThreadPoolExecutor(1) as pool, watched.opened_at_the_end():
        begun = pool.submit(bridge.app_client.post, PATH)
        watched.wait_until_entered()
        bridge.app_client.app.state.service.drain()
        answer = bridge.app_client.post(PATH)
        assert (answer.status_code, answer.json()["code"]) == (503, "not_ready")
        watched.gate.set()
        assert len(begun.result(PATIENCE_S).json()["checks"]) == len(SELF_CHECKS)


def test_a_target_that_loads_is_not_checked(serve: Any, target: TransformersTarget) -> None:
    may_load = threading.Event()

    def load() -> Any:
        assert may_load.wait(PATIENCE_S)
        return target

    bridge = serve(load)
    answer = bridge.app_client.post(PATH)
    assert (answer.status_code, answer.json()["code"]) == (503, "not_ready")
    may_load.set()


def test_small_limits_are_no_hindrance(check: Any, target: TransformersTarget) -> None:
    found = check(target, max_tokens_per_request=4, max_tokens_in_flight=4)
    assert by_status(found, "passed") == set(SELF_CHECKS)


def test_a_full_queue_is_an_answer(serve: Any, watched: Watched) -> None:
    """As of any request: its checks have no place of their own."""
    bridge = serve(watched, max_tokens_in_flight=66)
    with ThreadPoolExecutor(1) as pool, watched.opened_at_the_end():
        begun = pool.submit(bridge.app_client.post, PATH)
        watched.wait_until_entered()
        answer = bridge.app_client.post(PATH, headers={"x-request-id": "other"})
        assert (answer.status_code, answer.json()["code"]) == (429, "queue_full")
        assert "66 of 66 tokens are in flight" in answer.json()["detail"]
        watched.gate.set()
        assert begun.result(PATIENCE_S).status_code == 200


@pytest.mark.parametrize("token", [None, "wrong"])
def test_it_asks_for_the_token(serve: Any, watched: Watched, token: str | None) -> None:
    bridge = serve(watched, token="right")
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    answer = bridge.app_client.post(PATH, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
    assert watched.computed == []
