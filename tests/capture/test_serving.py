"""What supervision has, captures have: retries, prefetch, fingerprints, limits, counts, tokens."""

from __future__ import annotations

from typing import Any

import pytest
from tests.servers import router

from eagle3_client import (
    FingerprintMismatch,
    RemoteEagle3Error,
)


def test_in_the_background_and_ahead(
    build_model: Any, serve: Any, connect: Any, batch_of: Any, same: Any
) -> None:
    backend = connect(serve(build_model("llama")))
    batches = [tuple(batch_of(131, seed=seed)) for seed in range(5)]
    alone = [backend.capture(*each, outputs=["last_hidden"]).last_hidden for each in batches]
    handle = backend.capture_async(*batches[2], outputs=["last_hidden"])
    same(handle.result(60).last_hidden, alone[2])
    with backend.prefetch_capture(batches, depth=3, outputs=["last_hidden"]) as prefetch:
        for (batch, captured), source, expected in zip(prefetch, batches, alone, strict=True):
            assert batch is source
            same(captured.last_hidden, expected)


def test_a_server_that_forgot_the_draft_vocab_is_told_again(
    build_model: Any, serve: Any, connect: Any, batch_of: Any, frequency_ordered: Any, same: Any
) -> None:
    bridge = serve(build_model("llama"))
    backend = connect(bridge, frequency_ordered(131, 53))
    first = backend.capture(*batch_of(131), outputs=["loss_mask_probs"])
    bridge.app_client = serve(build_model("llama")).app_client  # restarted, empty
    second = backend.capture(*batch_of(131), outputs=["loss_mask_probs"])
    same(second.loss_mask_probs, first.loss_mask_probs)


def test_a_closed_backend_captures_nothing(build_model: Any, serve: Any, connect: Any,
                                           batch_of: Any) -> None:  # fmt: skip
    backend = connect(serve(build_model("llama")))
    backend.close()
    for call in (lambda: backend.capture(*batch_of(131), outputs=["aux"]), backend.get_target_head):
        with pytest.raises(RemoteEagle3Error, match="was closed"):
            call()


def test_an_answer_of_another_target_is_refused(
    build_model: Any, serve: Any, connect: Any, batch_of: Any
) -> None:
    bridge = serve(build_model("llama"))
    backend = connect(bridge, retry_for_s=0.5)
    backend.capture(*batch_of(131), outputs=["argmax"])
    bridge.app_client = serve(build_model("llama", seed=1)).app_client
    with pytest.raises(FingerprintMismatch):
        backend.capture(*batch_of(131), outputs=["argmax"])


def test_a_target_of_another_vocab_in_its_place_is_told_as_that(
    build_model: Any, serve: Any, connect: Any, batch_of: Any, frequency_ordered: Any
) -> None:
    """At every call, also when the draft vocab does not even fit it."""
    bridge = serve(build_model("llama"))
    backend = connect(bridge, frequency_ordered(131, 53), retry_for_s=0.3)
    backend.capture(*batch_of(131), outputs=["position_mask"])
    bridge.app_client = serve(build_model("qwen3")).app_client
    for _ in range(3):
        with pytest.raises(FingerprintMismatch):
            backend.capture(*batch_of(131), outputs=["position_mask"])
        with pytest.raises(FingerprintMismatch):
            backend.generate_batch(*batch_of(131))


def test_two_servers_of_a_shallow_target_are_compared_on_layers_it_has(
    build_model: Any, serve: Any, connect: Any, batch_of: Any
) -> None:
    def shallow() -> Any:
        model = build_model("llama")
        model.model.layers = model.model.layers[:4]
        model.config.num_hidden_layers = 4
        return serve(model)

    backend = connect(router(a=shallow(), b=shallow()), urls="http://a,http://b")
    assert backend.capture(*batch_of(131), outputs=["last_hidden"]).last_hidden.any()


def test_the_server_counts_captures(
    build_model: Any, serve: Any, connect: Any, batch_of: Any, frequency_ordered: Any
) -> None:
    """As requests of their path; of the draft vocab's coverage only what they tell."""
    bridge, inputs = serve(build_model("llama")), batch_of(131)
    backend = connect(bridge, frequency_ordered(131, 53))
    backend.capture(*inputs, outputs=["argmax"])
    status = bridge.app_client.get("/v1/status").json()
    assert status["draft_vocab_coverage"] is None
    assert status["padding_share"] == pytest.approx(9 / 30)
    assert status["clients"][0]["requests"] == 1
    captured = backend.capture(*inputs, outputs=["position_mask"])
    status = bridge.app_client.get("/v1/status").json()
    share = int(captured.position_mask.sum()) / int(captured.loss_mask.sum())
    assert status["draft_vocab_coverage"] == pytest.approx(share)
    assert status["clients"][0]["draft_vocab_digest"]
    metrics = bridge.app_client.get("/metrics").text
    assert 'eagle3_requests_total{code="ok",path="/v1/capture"} 2.0' in metrics
    assert 'eagle3_stage_seconds_count{stage="compute"} 2.0' in metrics


def test_tokens_guard_captures_and_the_head(
    build_model: Any, serve: Any, connect: Any, batch_of: Any
) -> None:
    bridge = serve(build_model("llama"), token="right")
    for path, method in (("/v1/capture", "POST"), ("/v1/head", "GET")):
        assert bridge.app_client.request(method, path).status_code == 401
    backend = connect(bridge, token="right")
    backend.capture(*batch_of(131), outputs=["argmax"])
    backend.get_target_head()
