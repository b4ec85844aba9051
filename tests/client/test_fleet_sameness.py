"""Servers that look alike but are not: never mixed."""

from __future__ import annotations

import os
import re
from typing import Any

import httpx
import pytest
import torch

from eagle3_client import FingerprintMismatch, InvalidRequest, RemoteEagle3Error
from eagle3_client.workers import DaemonWorkers
from eagle3_schemas.errors import NotReady
from eagle3_server.fingerprint import config_digest, weights_digest

DRAFT_IDS = torch.arange(5, 65).flip(0)


class TwoHosts(httpx.BaseTransport):
    """`http://a` and `http://b` behind one transport."""

    def __init__(self, a: httpx.BaseTransport, b: httpx.BaseTransport) -> None:
        self.hosts = {"a": a, "b": b}

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        return self.hosts[request.url.host].handle_request(request)


LAYERS_DIFFER = (
    r"servers' default aux layers differ: \[1, 2, 3\] at http://a, \[4, 5, 6\] at http://b; "
    "pass aux_layer_ids, or serve all with the same --aux-layer-ids"
)


@pytest.fixture
def other_defaults(build_model: Any, serve: Any) -> TwoHosts:
    """Two servers of one target, with other default layers."""
    a, b = (serve(build_model("llama"), aux_layer_ids=ids) for ids in ((1, 2, 3), (4, 5, 6)))
    return TwoHosts(a, b)


def test_replicas_with_other_default_layers_are_refused(
    other_defaults: TwoHosts, connect: Any
) -> None:
    """Another process, or a resumed run, would take the other's."""
    backend = connect(other_defaults, urls=["http://a", "http://b"])
    with pytest.raises(FingerprintMismatch, match=LAYERS_DIFFER):
        backend.model_info()


def test_a_server_that_comes_back_with_other_default_layers_stays_out(
    other_defaults: TwoHosts, connect: Any, caplog: pytest.LogCaptureFixture
) -> None:
    b = other_defaults.hosts["b"]
    other_defaults.hosts["b"] = other_defaults.hosts["a"]
    backend = connect(other_defaults, urls=["http://a", "http://b"])
    fleet = backend._dispatcher.fleet
    fleet.model_info()  # without the thread that watches them
    member = fleet.members.all[1]
    fleet.members.eject(member, NotReady("it restarts"))
    other_defaults.hosts["b"] = b
    for _ in range(3):
        fleet.check_health(member, 60)
    assert member.is_out
    assert re.search("http://b stays out: " + LAYERS_DIFFER, caplog.text)


def test_what_replicas_have_by_default_does_not_matter_to_who_names_layers(
    other_defaults: TwoHosts, connect: Any, batch_of: Any
) -> None:
    urls = ["http://a", "http://b"]
    backend = connect(other_defaults, DRAFT_IDS, urls=urls, aux_layer_ids=(0, 2, 4))
    first, *others = [backend.generate_batch(*batch_of(131)) for _ in range(4)]
    for other in others:
        assert torch.equal(first.aux_hidden_states, other.aux_hidden_states)


@pytest.mark.parametrize(("name", "value"), [("rms_norm_eps", 1e-3), ("rope_parameters", None)])
def test_equal_weights_under_another_config_are_another_target(
    build_model: Any, serve: Any, connect: Any, name: str, value: Any
) -> None:
    other = build_model("llama")
    rope = {"rope_type": "default", "rope_theta": 100.0}
    setattr(other.config, name, rope if value is None else value)
    assert config_digest(other) != config_digest(build_model("llama"))
    assert weights_digest(other) == weights_digest(build_model("llama"))
    bridges = serve(build_model("llama")), serve(other)
    with pytest.raises(FingerprintMismatch, match="config_digest is"):
        connect(TwoHosts(*bridges), urls=["http://a", "http://b"]).model_info()


def test_where_a_checkpoint_lay_does_not_change_its_fingerprint(build_model: Any) -> None:
    moved = build_model("llama")
    moved.config._name_or_path = "/elsewhere"
    moved.config.transformers_version = "5.0"
    assert config_digest(moved) == config_digest(build_model("llama"))


def test_a_backend_used_after_a_fork_says_so(
    serve: Any, connect: Any, batch_of: Any, build_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = connect(serve(build_model("llama")), DRAFT_IDS)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(RemoteEagle3Error, match="before a fork"):
        backend.generate_batch(*batch_of(131))


def test_a_handle_that_is_asked_after_a_fork_says_so(
    serve: Any, connect: Any, batch_of: Any, build_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = connect(serve(build_model("llama")), DRAFT_IDS).generate_batch_async(*batch_of(131))
    with monkeypatch.context() as forked:
        forked.setattr(os, "getpid", lambda: -1)
        with pytest.raises(RemoteEagle3Error, match="before a fork"):
            handle.result(60)
    handle.result(60)


def test_the_token_is_in_no_repr_and_no_error(connect: Any) -> None:
    def echo(request: httpx.Request) -> httpx.Response:
        return httpx.Response(500, text=str(request.headers.raw))

    backend = connect(httpx.MockTransport(echo), token="s3cret")
    assert "s3cret" not in repr(backend._settings)
    with pytest.raises(RemoteEagle3Error) as caught:
        backend.model_info()
    assert "Bearer" in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_workers_refuse_work_after_close() -> None:
    workers = DaemonWorkers(2, "test")
    workers.close()
    with pytest.raises(RemoteEagle3Error, match="closed"):
        workers.submit(lambda: 1)


def test_an_additive_mask_is_refused(
    serve: Any, connect: Any, batch_of: Any, build_model: Any
) -> None:
    """Read as non-zero is true it would mean the opposite."""
    inputs = batch_of(131)
    additive = torch.where(inputs.attention_mask.bool(), 0.0, -torch.inf)
    backend = connect(serve(build_model("llama")), DRAFT_IDS)
    for mask in (additive, additive.clamp(min=-1e9), torch.full_like(additive, torch.nan)):
        with pytest.raises(InvalidRequest, match="attention_mask must be non-zero where true"):
            backend.generate_batch(inputs.input_ids, mask, inputs.loss_mask)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"token": "abc\n"}, "token must be printable"),
        ({"timeout_s": float("inf")}, "timeout_s"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"output_dtype": "float32"}, "output_dtype"),
        ({"urls": "http://a:1/v1"}, "without /v1"),
        ({"device": "cuda:77"}, "cannot be used here"),
        ({"urls": None}, "urls must be a URL"),
        ({"urls": [None]}, "urls must be a URL"),
        ({"urls": ["http://a", "http://A:80"]}, "named once"),
        ({"urls": "http://bob:hunter2@a"}, "must not hold a user"),
        ({"timeout_s": "3"}, "timeout_s must be int or float; got str"),
        ({"token": 5}, "token must be str"),
        ({"expect_fingerprint": 123}, "expect_fingerprint must be str"),
        ({"max_in_flight": "2"}, "max_in_flight must be int"),
        ({"cache_dir": 5}, "cache_dir must be str"),
    ],
)
def test_slips_are_named_at_once(connect: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        connect(**arguments)
    assert "abc" not in str(caught.value)
    assert "hunter2" not in str(caught.value)
