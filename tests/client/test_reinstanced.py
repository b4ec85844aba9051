"""A server whose process another one has replaced, and nobody saw it go."""

from __future__ import annotations

import dataclasses
from typing import Any

import httpx
import pytest
import torch
from tests.client.conftest import out_of
from tests.servers import router

from eagle3_client import FingerprintMismatch
from eagle3_schemas.protocol import INSTANCE_HEADER
from eagle3_server import TransformersTarget


class Reinstanced(httpx.BaseTransport):
    """A server whose answers say that another process gives them, from when `count` changes."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.count = inner, 0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = self.inner.handle_request(request)
        response.headers[INSTANCE_HEADER] = f"life-{self.count}"
        return response


class Described:
    """A target that says something else of itself."""

    def __init__(self, model: Any, **changes: Any) -> None:
        self.inner = TransformersTarget(model, model_id="tiny")
        self.description = dataclasses.replace(self.inner.describe(), **changes)

    def describe(self) -> Any:
        return self.description

    def supervise(self, job: Any) -> Any:
        return self.inner.supervise(job)


def test_a_server_that_was_started_anew_otherwise_is_refused_though_nobody_saw_it_go(
    build_model: Any, serve: Any, connect: Any, draft_ids: torch.Tensor, inputs: Any
) -> None:
    """Attention decides about bits, and is no part of the fingerprint."""
    bridge = serve(build_model("llama"))
    server = Reinstanced(bridge)
    backend = connect(server, draft_ids, exact=True)
    backend.generate_batch(*inputs)
    server.count += 1
    backend.generate_batch(*inputs)  # the same again
    other = Described(build_model("llama"), attn_implementation="another")
    bridge.app_client = serve(other).app_client
    server.count += 1
    with pytest.raises(FingerprintMismatch, match=r"attn_implementation is .* and another"):
        backend.generate_batch(*inputs)


def test_each_answers_fingerprint_is_checked_whoever_says_that_it_gave_it(
    build_model: Any, serve: Any, connect: Any, draft_ids: torch.Tensor, inputs: Any
) -> None:
    bridge = serve(build_model("llama"))
    server = Reinstanced(bridge)  # that never changes its name
    backend = connect(server, draft_ids)
    backend.generate_batch(*inputs)
    other = serve(build_model("llama", seed=1))
    connect(other, draft_ids)  # registers the draft vocab, so that nothing else gives it away
    bridge.app_client = other.app_client
    with pytest.raises(FingerprintMismatch, match="the response is from"):
        backend.generate_batch(*inputs)


def test_one_of_a_fleet_that_computes_otherwise_since_is_found_by_its_numbers(
    build_model: Any, serve: Any, connect: Any, draft_ids: torch.Tensor, inputs: Any, same: Any
) -> None:
    bridge = serve(build_model("llama"))
    b = Reinstanced(bridge)
    backend = connect(
        router(a=serve(build_model("llama")), b=b), draft_ids, urls=["http://a", "http://b"]
    )
    first = backend.generate_batch(*inputs)
    changed = build_model("llama")
    digests = TransformersTarget(changed, model_id="tiny").describe()
    changed.model.layers[1].mlp.down_proj.weight.mul_(3.0)
    other = Described(
        changed, fingerprint=digests.fingerprint, weights_digest=digests.weights_digest
    )
    bridge.app_client = serve(other).app_client
    b.count += 1
    for _ in range(4):
        same(backend.generate_batch(*inputs).aux_hidden_states, first.aux_hidden_states)
    assert out_of(backend) == ["http://b"]
