"""Health, readiness and the queue, while a loader or a forward is blocked by the test."""

from __future__ import annotations

import threading
from typing import Any

import httpx
import pytest
import torch

from eagle3_client import NotReady
from eagle3_schemas.protocol import PROBLEM_MEDIA_TYPE
from eagle3_server import TransformersTarget

DRAFT_IDS = torch.tensor([90, 5, 130, 0, 17])


def http(bridge: Any) -> httpx.Client:
    return httpx.Client(transport=bridge, base_url="http://target")


def test_health_and_readiness_answer_during_a_forward(
    build_model: Any, gated: Any, serve: Any, connect: Any, batch_of: Any
) -> None:
    target = gated(build_model("llama"))
    bridge = serve(target)
    handle = connect(bridge, DRAFT_IDS).generate_batch_async(*batch_of(131))
    target.wait_until_entered()
    assert http(bridge).get("/healthz").json() == {"status": "alive"}
    assert http(bridge).get("/readyz").json() == {"status": "ready"}
    assert http(bridge).get("/v1/model").status_code == 200
    with pytest.raises(TimeoutError):
        handle.result(0)  # it was blocked all the while
    target.gate.set()
    assert handle.result(60).position_mask is not None


def test_a_mapping_can_be_set_during_a_forward(
    build_model: Any, gated: Any, serve: Any, connect: Any, batch_of: Any
) -> None:
    target = gated(build_model("llama"))
    bridge = serve(target)
    connect(bridge, DRAFT_IDS).generate_batch_async(*batch_of(131))
    target.wait_until_entered()
    connect(bridge, torch.tensor([3, 1, 2]))  # returns


def test_a_server_is_alive_while_it_loads_and_ready_when_it_has(
    build_model: Any, serve: Any, connect: Any, batch_of: Any
) -> None:
    may_load = threading.Event()

    def load() -> TransformersTarget:
        assert may_load.wait(60)
        return TransformersTarget(build_model("llama"), model_id="tiny")

    bridge = serve(load)
    try:
        assert http(bridge).get("/healthz").status_code == 200
        for path in ("/readyz", "/v1/model", "/v1/input-embeddings"):
            answer = http(bridge).get(path)
            assert answer.status_code == 503
            assert answer.headers["content-type"] == PROBLEM_MEDIA_TYPE
            assert answer.headers["retry-after"] == "1"
            assert answer.json()["code"] == "not_ready"
            assert "loading" in answer.json()["detail"]
        with pytest.raises(NotReady, match=r"loading.*url=http://target"):
            connect(bridge).wait_until_ready(0)
    finally:
        may_load.set()
    backend = connect(bridge)
    backend.wait_until_ready(60)
    assert http(bridge).get("/readyz").status_code == 200
    connect(bridge, DRAFT_IDS).generate_batch(*batch_of(131))


def test_a_target_that_cannot_be_loaded_leaves_an_unready_server_that_says_so(serve: Any) -> None:
    failures: list[BaseException] = []

    def load() -> TransformersTarget:
        failures.append(OSError("no such model"))
        raise failures[0]

    bridge = serve(load)
    answer = http(bridge).get("/readyz")
    while "loading" in answer.json()["detail"]:  # until the loader's thread has failed
        answer = http(bridge).get("/readyz")
    assert answer.status_code == 503
    assert "failed to load" in answer.json()["detail"]
    assert http(bridge).get("/healthz").status_code == 200


def test_the_owner_of_the_app_is_told_why_loading_failed() -> None:
    from starlette.testclient import TestClient

    from eagle3_server import create_app

    told: list[BaseException] = []
    is_told = threading.Event()

    def load() -> TransformersTarget:
        raise OSError("no such model")

    def tell(error: BaseException) -> None:
        told.append(error)
        is_told.set()

    with TestClient(create_app(load, on_failure=tell)) as client:
        assert is_told.wait(60)
        assert "failed to load" in client.get("/readyz").json()["detail"]
    assert str(told[0]) == "no such model"


def test_a_full_queue_refuses_and_the_client_comes_back_when_it_drains(
    build_model: Any, gated: Any, serve: Any, connect: Any, batch_of: Any, expect: Any, matches: Any
) -> None:
    """One request computes, one waits, so of these three one is refused, until the gate opens."""
    model = build_model("llama")
    target, inputs = gated(model), batch_of(131)
    bridge = serve(target, max_queued_requests=1)
    expected = expect(model, inputs, DRAFT_IDS)
    refusals: list[httpx.Response] = []
    is_refused = threading.Event()

    def observe(request: httpx.Request) -> httpx.Response:
        response = bridge.handle_request(request)
        if response.status_code == 429:
            response.read()
            refusals.append(response)
            is_refused.set()
        return response

    backend = connect(httpx.MockTransport(observe), DRAFT_IDS, max_in_flight=3)
    first = backend.generate_batch_async(*inputs)
    target.wait_until_entered()
    others = [backend.generate_batch_async(*inputs) for _ in range(2)]
    assert is_refused.wait(60)
    target.gate.set()
    for handle in (first, *others):
        matches(handle.result(60), expected)
    problem = refusals[0].json()
    assert problem["code"] == "queue_full"
    assert "max_queued_requests" in problem["detail"]
    assert refusals[0].headers["retry-after"] == "1"
