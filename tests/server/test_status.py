"""`GET /v1/status`: what the page shows is what the server counted."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from eagle3_schemas import DraftVocab
from eagle3_schemas.status import ServerStatus
from eagle3_server import TransformersTarget, telemetry

DRAFT_IDS = torch.tensor([90, 5, 130, 0, 17])


def status_of(bridge: Any) -> dict[str, Any]:
    answer = bridge.app_client.get("/v1/status")
    assert ServerStatus.model_validate_json(answer.content)
    return dict(answer.json())


def samples(bridge: Any) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(bridge.app_client.get("/metrics").text)
        for sample in family.samples
    }


def test_it_counts_as_the_metrics_do(
    build_model: Any, serve: Any, connect: Any, batch_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "_LATENCIES", 2)
    bridge = serve(build_model("llama"), max_queued_requests=7, max_tokens_in_flight=900)
    first = status_of(bridge)
    assert set(first["tokens"].values()) == {0}
    assert first["stages"] == {}
    assert first["draft_vocabs"] == first["clients"] == []
    backend = connect(bridge, DRAFT_IDS)
    for seed in range(3):
        inputs = batch_of(131, seed=seed)
        backend.generate_batch(*inputs)
    bridge.wait_until_idle()
    status, metrics = status_of(bridge), samples(bridge)
    for kind in ("sent", "real", "supervised", "trained"):
        assert status["tokens"][kind] == metrics["eagle3_tokens_total", kind]
    assert status["tokens"]["sent"] == 3 * inputs.input_ids.numel()
    assert first["body_bytes"] == {"received": 0, "sent": 0}
    assert min(status["body_bytes"].values()) > 0
    # What the answers to `status` and `metrics` themselves took came on top.
    assert status["body_bytes"]["sent"] <= metrics["eagle3_body_bytes_total", "sent"]
    assert status["body_bytes"]["received"] == metrics["eagle3_body_bytes_total", "received"]
    assert list(status["stages"]) == ["queue", "compute", "head", "copy", "send"]
    for stage in status["stages"].values():
        assert stage["requests"] == 2  # the last ones
        assert 0 <= stage["median_s"] <= stage["p90_s"] <= stage["longest_s"]
    assert status["draft_vocabs"] == [
        {"digest": DraftVocab.from_ids(DRAFT_IDS).digest, "draft_vocab_size": 5}
    ]
    assert (status["model_id"], status["state"], status["phase"]) == ("tiny", "ready", "ready")
    assert (status["max_queued_requests"], status["max_tokens_in_flight"]) == (7, 900)
    assert status["max_bytes_in_flight"] == 8 << 30


def test_stage_latencies_are_order_statistics() -> None:
    counted = telemetry.Telemetry()
    counted._latest["compute"] = telemetry.deque(
        [0.5, 0.1, 0.3, 0.2, 0.4, 0.6, 1.1, 0.9, 0.8, 1, 2]
    )
    stage = counted.stages()["compute"]
    assert (stage.requests, stage.median_s, stage.p90_s, stage.longest_s) == (11, 0.6, 1.1, 2)


def test_the_draft_vocab_used_last_comes_first(
    build_model: Any, serve: Any, connect: Any, batch_of: Any
) -> None:
    bridge = serve(build_model("llama"))
    one, two = connect(bridge, DRAFT_IDS), connect(bridge, DRAFT_IDS[:3])
    one.generate_batch(*batch_of(131))
    two.generate_batch(*batch_of(131))
    one.generate_batch(*batch_of(131))
    assert [vocab["draft_vocab_size"] for vocab in status_of(bridge)["draft_vocabs"]] == [5, 3]


def test_the_phase_is_the_state_in_a_word(build_model: Any, serve: Any) -> None:
    may_load = threading.Event()

    def load() -> TransformersTarget:
        assert may_load.wait(60)
        return TransformersTarget(build_model("llama"), model_id="tiny")

    bridge = serve(load)
    status = status_of(bridge)
    assert (status["phase"], status["model_id"]) == ("loading", None)
    assert "is loading" in status["state"]
    may_load.set()
    while status_of(bridge)["phase"] == "loading":
        pass
    assert status_of(bridge)["phase"] == "ready"
    bridge.app_client.app.state.service.drain()
    status = status_of(bridge)
    assert (status["phase"], status["model_id"]) == ("stopping", "tiny")
    assert "stopping" in status["state"]


def test_a_target_that_cannot_be_loaded_is_broken(serve: Any) -> None:
    def load() -> TransformersTarget:
        raise OSError("no such model")

    bridge = serve(lambda: load())
    while (status := status_of(bridge))["phase"] == "loading":
        pass
    assert (status["phase"], status["model_id"]) == ("broken", None)
    assert "failed to load" in status["state"]


def test_strangers_write_nothing_into_the_recent_errors(
    build_model: Any, serve: Any, connect: Any
) -> None:
    """Nor does an uptime checker, which may send HEAD."""
    bridge = serve(build_model("llama"), token="secret")
    headers = {"x-eagle3-client": "CALL-0800-EVIL"}
    assert bridge.app_client.head("/").status_code == 200
    for method in ("POST", "PUT", "DELETE"):
        assert bridge.app_client.request(method, "/", headers=headers).status_code == 405
        assert bridge.app_client.request(method, "/x", headers=headers).status_code == 401
    known = {"authorization": "Bearer secret"}
    assert bridge.app_client.post("/v1/model", headers=known).status_code == 405
    errors = bridge.app_client.get("/v1/status", headers=known).json()["errors"]
    assert [(each["code"], each["client"]) for each in errors] == [
        ("protocol_mismatch", "testclient")
    ]
    assert "POST /v1/model is not a path of this server" in errors[0]["detail"]
