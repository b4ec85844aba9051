"""`RemoteEagle3Backend` as an object: handles, closing, fleets."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError
from dataclasses import replace
from typing import Any

import httpx
import pytest
import torch
from tests.servers import router
from torch import nn

from eagle3_client import (
    FingerprintMismatch,
    InvalidRequest,
    RemoteEagle3Backend,
    RemoteEagle3Error,
)
from eagle3_server import HFEagle3TargetModel

# --- handles ---


def test_a_handle_that_is_asked_too_soon_says_so_and_gives_the_batch_later(
    model: Any, gated: Any, serve: Any, connect: Any, inputs: Any, draft_ids: Any, expect: Any,
    matches: Any,
) -> None:  # fmt: skip
    target = gated(model)
    handle = connect(serve(target), draft_ids).generate_batch_async(*inputs)
    target.wait_until_entered()
    for timeout in (0, 0.05):
        with pytest.raises(TimeoutError):
            handle.result(timeout)
    target.gate.set()
    matches(handle.result(60), expect(model, inputs, draft_ids))
    assert handle.result(0) is handle.result()


def test_a_handle_that_has_not_started_can_be_cancelled(
    model: Any, gated: Any, serve: Any, connect: Any, inputs: Any, draft_ids: Any
) -> None:
    target = gated(model)
    backend = connect(serve(target), draft_ids, max_in_flight=1)
    started, waiting, last = (backend.generate_batch_async(*inputs) for _ in range(3))
    target.wait_until_entered()
    assert not started.cancel()
    assert waiting.cancel()
    target.gate.set()
    with pytest.raises(CancelledError):
        waiting.result(60)
    assert started.result(60).position_mask is not None
    assert last.result(60).position_mask is not None
    assert target.entered.acquire(timeout=60)
    assert not target.entered.acquire(blocking=False), "the cancelled request was sent"


def test_no_more_requests_are_in_flight_than_promised(
    model: Any, gated: Any, serve: Any, connect: Any, inputs: Any, draft_ids: Any
) -> None:
    """Handles are submitted without blocking, however many; two a server are sent."""
    target = gated(model)
    bridge = serve(target)
    in_flight, most, lock, both = 0, 0, threading.Lock(), threading.Barrier(2)

    def count(request: httpx.Request) -> httpx.Response:
        nonlocal in_flight, most
        if request.method != "POST":
            return bridge.handle_request(request)
        with lock:
            in_flight += 1
            most = max(most, in_flight)
        both.wait(60)
        try:
            return bridge.handle_request(request)
        finally:
            with lock:
                in_flight -= 1

    target.gate.set()
    backend = connect(httpx.MockTransport(count), draft_ids)
    assert backend.num_remote_servers == 2
    for handle in [backend.generate_batch_async(*inputs) for _ in range(6)]:
        handle.result(60)
    assert most == 2


@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "loss_mask"])
@pytest.mark.parametrize("mask_dtype", [torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("lengths", [(10, 7, 4), (1, 1)], ids=["long", "one-token"])
def test_a_caller_may_overwrite_its_tensors_while_the_request_is_under_way(
    model: Any, gated: Any, serve: Any, connect: Any, batch_of: Any, draft_ids: Any, expect: Any,
    matches: Any, same: Any, name: str, mask_dtype: torch.dtype, lengths: tuple[int, ...],
) -> None:  # fmt: skip
    """Both the request that is sent already and one that still waits on the client."""
    target, plain = gated(model), batch_of(131, lengths)
    inputs = replace(
        plain,
        attention_mask=plain.attention_mask.to(mask_dtype),
        loss_mask=plain.loss_mask.to(mask_dtype),
    )
    kept = replace(inputs, **{name: getattr(inputs, name).clone()})
    # While no forward runs: the target hooks the model it owns.
    expected = expect(model, kept, draft_ids)
    backend = connect(serve(target), draft_ids, max_in_flight=1)
    handles = [backend.generate_batch_async(*inputs) for _ in range(2)]
    target.wait_until_entered()
    getattr(inputs, name).fill_(1)
    getattr(inputs, name)[:, ::2] = 0
    target.gate.set()
    for handle in handles:
        batch = handle.result(60)
        matches(batch, expected)
        same(batch.attention_mask, kept.attention_mask)
        same(batch.input_ids[:, :-1], kept.input_ids[:, 1:])
        same(batch.loss_mask[:, :-1], kept.loss_mask[:, 1:])


def test_an_error_of_the_server_is_raised_by_the_handle(
    bridge: Any, connect: Any, inputs: Any, draft_ids: Any
) -> None:
    inputs.input_ids[0, 0] = 131
    handle = connect(bridge, draft_ids).generate_batch_async(*inputs)
    for _ in range(2):
        with pytest.raises(InvalidRequest, match="131"):
            handle.result(60)


# --- closing ---


def test_close_is_idempotent_and_affects_no_other_backend(
    bridge: Any, connect: Any, inputs: Any, draft_ids: Any, expect: Any, matches: Any, model: Any
) -> None:
    closed, other = (connect(bridge, draft_ids) for _ in range(2))
    closed.generate_batch(*inputs)
    for _ in range(3):
        closed.close()
    matches(other.generate_batch(*inputs), expect(model, inputs, draft_ids))


def test_a_closed_backend_refuses_batches(
    bridge: Any, connect: Any, inputs: Any, draft_ids: Any
) -> None:
    backend = connect(bridge, draft_ids)
    backend.close()
    for call in (backend.generate_batch, backend.generate_batch_async):
        with pytest.raises(RemoteEagle3Error, match="closed"):
            call(*inputs)


def test_close_cancels_what_has_not_started(
    model: Any, gated: Any, serve: Any, connect: Any, inputs: Any, draft_ids: Any
) -> None:
    target = gated(model)
    backend = connect(serve(target), draft_ids, max_in_flight=1)
    backend.generate_batch_async(*inputs)
    target.wait_until_entered()
    waiting = backend.generate_batch_async(*inputs)
    backend.close()
    with pytest.raises(CancelledError):
        waiting.result(60)


def test_leaving_the_context_closes_the_backend(bridge: Any, inputs: Any) -> None:
    with RemoteEagle3Backend("http://target", transport=bridge) as backend:
        backend.model_info()
    with pytest.raises(RemoteEagle3Error, match="closed"):
        backend.generate_batch(*inputs)


# --- fleets ---


def test_two_servers_share_the_load(
    model: Any, build_model: Any, gated: Any, serve: Any, connect: Any, inputs: Any,
    draft_ids: Any, expect: Any, matches: Any,
) -> None:  # fmt: skip
    """While one forward runs on each, two requests are on their way."""
    targets = [gated(build_model("llama")), gated(build_model("llama"))]  # one model a process
    transport = router(a=serve(targets[0]), b=serve(targets[1]))
    backend = connect(transport, draft_ids, urls=["http://a", "http://b"])
    handles = [backend.generate_batch_async(*inputs) for _ in range(4)]
    for target in targets:
        target.wait_until_entered()
    for target in targets:
        target.gate.set()
    for handle in handles:
        matches(handle.result(60), expect(model, inputs, draft_ids))
    for target in targets:
        target.wait_until_entered()  # two each


def test_a_busy_server_is_passed_over(
    model: Any, gated: Any, serve: Any, connect: Any, inputs: Any, draft_ids: Any
) -> None:
    """Taking turns alone would queue every second batch behind a forward that takes long."""
    targets = {"a": gated(model), "b": gated(model)}
    targets["b"].entered = targets["a"].entered
    bridges = {host: serve(target) for host, target in targets.items()}
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            asked.append(request.url.host)
        return bridges[request.url.host].handle_request(request)

    backend = connect(httpx.MockTransport(answer), draft_ids, urls="http://a,http://b")
    asked.clear()
    handle = backend.generate_batch_async(*inputs)
    targets["a"].wait_until_entered()
    busy, free = asked[0], {"a": "b", "b": "a"}[asked[0]]
    targets[free].gate.set()
    for _ in range(3):
        backend.generate_batch(*inputs)
    assert asked == [busy, free, free, free]
    targets[busy].gate.set()
    handle.result(60)


def test_two_servers_of_different_targets_are_refused_and_named(
    model: Any, build_model: Any, serve: Any, connect: Any, mapping: Any, draft_ids: Any
) -> None:
    transport = router(a=serve(model), b=serve(build_model("llama", seed=1)))
    backend = connect(transport, urls="http://a,http://b")
    for call in (backend.model_info, lambda: backend.set_vocab_mapping(*mapping(draft_ids, 131))):
        with pytest.raises(FingerprintMismatch, match=r"weights_digest.*http://a.*http://b"):
            call()


def test_the_same_weights_in_another_dtype_are_another_target(
    model: Any, build_model: Any, serve: Any, connect: Any
) -> None:
    transport = router(a=serve(model), b=serve(build_model("llama", torch.bfloat16)))
    with pytest.raises(FingerprintMismatch, match=r"http://a.*http://b"):
        connect(transport, urls="http://a,http://b").model_info()


def test_equal_weights_have_equal_fingerprints_and_one_changed_weight_another(
    build_model: Any, serve: Any, connect: Any
) -> None:
    def fingerprint(model: nn.Module) -> str:
        return str(connect(serve(model)).model_info().fingerprint)

    changed = build_model("llama")
    with torch.no_grad():
        changed.model.layers[4].mlp.down_proj.weight[3, 5] += 1
    assert fingerprint(build_model("llama")) == fingerprint(build_model("llama"))
    assert fingerprint(changed) != fingerprint(build_model("llama"))


def test_bytes_received_counts_what_came(
    bridge: Any, connect: Any, inputs: Any, draft_ids: Any
) -> None:
    """Padding and unsupervised rows do not travel."""
    backend = connect(bridge, draft_ids)
    before = backend.bytes_received
    batch = backend.generate_batch(*inputs)
    attended, trained = int(inputs.attention_mask.sum()), int(batch.position_mask.sum())
    payload = 4 * (attended * 3 * 48 + trained * len(draft_ids))
    assert payload <= backend.bytes_received - before <= payload + 1024


def test_to_trainer_inputs_of_remote_and_co_located_differ_in_supervision_alone(
    bridge: Any, connect: Any, inputs: Any, draft_ids: Any, model: Any
) -> None:
    remote = connect(bridge, draft_ids).generate_batch(*inputs).to_trainer_inputs()
    local = HFEagle3TargetModel(model).generate_batch(*inputs).to_trainer_inputs()
    assert set(remote) - set(local) == {"target_probs", "position_mask"}
    assert set(local) - set(remote) == {"target_logits"}
