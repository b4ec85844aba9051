"""What the server tells of itself: metrics, status, the bound-by hint, one log line a request."""

from __future__ import annotations

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.seeded_target import SeededTarget, inputs_of
from tests.server.sharing.conftest import PATIENCE_S
from tests.server.sharing.test_isolation import Gate, gate, wait_for  # noqa: F401

from eagle3_server import telemetry
from eagle3_server.logs import set_up_logging
from eagle3_server.telemetry import BoundBy


def metrics_of(trainer: Any) -> dict[tuple[str, ...], float]:
    """Samples by name and label values, in the order of the labels' names."""
    text = trainer.http.get("/metrics").text
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_count_what_was_served(live_server: Any, trainer: Any, is_right: Any) -> None:
    one = trainer(live_server(SeededTarget()))
    answers = [one.ask(seed) for seed in (1, 2, 3)]
    assert one.http.post("/v1/supervision", content=b"x").status_code == 400
    metrics = metrics_of(one)
    path = "/v1/supervision"
    assert metrics["eagle3_requests_total", "ok", path] == 3
    assert metrics["eagle3_requests_total", "malformed_payload", path] == 1
    sent = sum(len(answer.content) for answer in answers)
    assert metrics["eagle3_body_bytes_total", "sent"] >= sent
    masks = [inputs_of(seed) for seed in (1, 2, 3)]
    supervised = sum(int(loss_mask[:, 1:].sum()) for _, _, loss_mask in masks)
    assert metrics["eagle3_tokens_total", "sent"] == sum(ids.numel() for ids, _, _ in masks)
    assert metrics["eagle3_tokens_total", "real"] == metrics["eagle3_tokens_total", "sent"]
    assert metrics["eagle3_tokens_total", "supervised"] == supervised
    assert metrics["eagle3_tokens_total", "trained"] == supervised
    assert metrics["eagle3_draft_vocab_coverage",] == 1
    assert metrics["eagle3_padding_share",] == 0
    for stage in ("queue", "compute", "head", "copy", "send"):
        assert metrics["eagle3_stage_seconds_count", stage] >= 3
    assert metrics["eagle3_ready",] == 1
    assert metrics["eagle3_queued_requests",] == 0
    assert metrics["eagle3_bytes_in_flight",] == 0
    assert metrics["process_resident_memory_bytes",] > 1 << 20


def test_refusals_are_counted_by_reason(live_server: Any, trainer: Any) -> None:
    one = trainer(live_server(SeededTarget(), max_body_bytes=7000))
    one.ask(1)
    metrics = metrics_of(one)
    assert metrics["eagle3_rejections_total", "limit_exceeded"] == 1
    assert metrics["eagle3_rejections_total", "queue_full"] == 0
    assert [error["code"] for error in one.status()["errors"]] == ["limit_exceeded"]


def test_paths_a_client_makes_up_are_not_collected(live_server: Any, trainer: Any) -> None:
    one = trainer(live_server(SeededTarget()))
    for number in range(20):
        assert one.http.get(f"/made-up/{number}").status_code == 404
    metrics = metrics_of(one)
    assert metrics["eagle3_requests_total", "protocol_mismatch", "unknown"] == 20
    assert not [name for name in metrics if "made-up" in str(name)]


def test_trainers_beyond_the_limit_are_forgotten(
    live_server: Any, trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "_CLIENTS", 3)
    url = live_server(SeededTarget())
    clients = [trainer(url, f"t{number}") for number in range(5)]
    for one in clients:
        one.ask(1)
    assert [client["client"] for client in clients[0].status()["clients"]] == ["t4", "t3", "t2"]


def test_the_hint_says_what_the_server_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten seconds without a request, ten that compute, ten in which an answer is sent."""
    now = 0.0
    monkeypatch.setattr(telemetry.time, "monotonic", lambda: now)
    bound = BoundBy()
    for event in (
        lambda: bound.open(1),
        lambda: bound.computing(True),
        lambda: bound.computing(False),
        lambda: bound.open(-1),
    ):
        now += 10
        event()
    shares = bound.shares()
    assert sum(shares.values()) == pytest.approx(1)
    # The latest counts most; the network had the second and the last ten seconds.
    assert shares["network"] > shares["model"] > shares["trainers"]
    now += 600
    assert bound.shares()["trainers"] > 0.99


def test_the_status_follows_a_request(
    live_server: Any,
    trainer: Any,
    gate: Gate,  # noqa: F811
) -> None:
    one = trainer(live_server(SeededTarget(gate)))
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(one.ask, 1)
        gate.wait_until_entered()
        status = one.status()
        assert status["tokens_in_flight"] == inputs_of(1)[0].numel()
        assert status["bytes_in_flight"] > 1 << 20
        gate.is_open.set()
        answer.result(PATIENCE_S)
    status = wait_for(one, bytes_in_flight=0)
    assert status["clients"][0]["client"] == "trainer"
    assert status["draft_vocab_coverage"] == 1


def test_one_line_a_request_with_its_id(
    live_server: Any, trainer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "eagle3_server")
    url = live_server(SeededTarget(), token="s3cret-token")
    one = trainer(url, authorization="Bearer s3cret-token")
    answer = one.ask(1, "my-request")
    assert answer.headers["x-request-id"] == "my-request"
    one.http.get("/v1/model", headers={"authorization": "Bearer wr0ng-token"})
    one.http.get("/healthz")
    wait_for(one, bytes_in_flight=0)
    lines = [r.fields for r in caplog.records if r.getMessage() == "request"]  # type: ignore[attr-defined]
    mine = [line for line in lines if line["request_id"] == "my-request"]
    assert len(mine) == 1
    assert mine[0]["status"] == 200
    assert mine[0]["client"] == "trainer"
    assert mine[0]["tokens_sent"] == inputs_of(1)[0].numel()
    assert mine[0]["bytes_sent"] == len(answer.content)
    assert {"queue_ms", "compute_ms", "head_ms", "copy_ms", "send_ms", "total_ms"} <= set(mine[0])
    assert [line["code"] for line in lines if line["status"] == 401] == ["unauthorized"]
    assert not [line for line in lines if line["path"] == "/healthz"]
    everything = " ".join(f"{r.getMessage()} {r.__dict__}" for r in caplog.records)
    assert "s3cret" not in everything
    assert "wr0ng" not in everything


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_lines_are_for_people_or_for_machines(
    log_format: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    set_up_logging(log_format)
    log = logging.getLogger("eagle3_server.test")
    log.info("request", extra={"fields": {"request_id": "a", "total_ms": 1.5}})
    try:
        raise KeyError("x\ny")
    except KeyError:
        log.exception("it failed")
    lines = capsys.readouterr().err.splitlines()
    if log_format == "console":
        assert lines[0].endswith("INFO request request_id=a total_ms=1.5")
        return
    first, second = map(json.loads, lines)
    assert first["message"] == "request"
    assert first["request_id"] == "a"
    assert first["total_ms"] == 1.5
    assert first["time"].endswith("Z")
    assert "KeyError" in second["traceback"]
