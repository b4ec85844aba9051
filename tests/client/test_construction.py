"""How a `RemoteEagle3Backend` is built, and what it says of a server it cannot use."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
import torch
from tests.servers import router

from eagle3_client import (
    InvalidRequest,
    ProtocolMismatch,
    RemoteEagle3Backend,
)
from eagle3_schemas import Eagle3TargetBackend


def test_it_is_a_target_backend_that_supports_async(connect: Any, bridge: Any) -> None:
    backend = connect(bridge)
    assert isinstance(backend, Eagle3TargetBackend)
    assert backend.supports_async


def test_nothing_is_sent_before_the_first_call(connect: Any) -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise AssertionError(f"sent {request.url}")

    connect(httpx.MockTransport(refuse))


@pytest.mark.parametrize(
    ("urls", "servers"),
    [
        ("http://a:1", 1),
        ("http://a:1/, http://b:2,", 2),
        (["http://a:1", "https://b:2", "http://c:3"], 3),
    ],
)
def test_num_remote_servers_is_two_requests_a_server(
    connect: Any, urls: str | list[str], servers: int
) -> None:
    assert connect(urls=urls).num_remote_servers == 2 * servers
    assert connect(urls=urls, max_in_flight=5).num_remote_servers == 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"urls": ""}, "at least one server"),
        ({"urls": []}, "at least one server"),
        ({"urls": "localhost:8001"}, "http://host:port.*'localhost:8001'"),
        ({"urls": "http://a,http://a/"}, "named once"),
        ({"encoding": "topk"}, "'auto' or one of"),
        ({"rows": "some"}, "'loss_mask'"),
        ({"output_dtype": torch.int64}, "float torch.dtype"),
        ({"timeout_s": -1}, "timeout_s"),
        ({"retry_for_s": float("nan")}, "retry_for_s"),
        ({"max_retries": -1}, "max_retries"),
        ({"max_in_flight": 0}, "max_in_flight"),
    ],
)
def test_arguments_that_cannot_work_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        RemoteEagle3Backend(**{"urls": "http://a:1", **arguments})


def test_from_urls_takes_the_names_of_nemos_client(
    bridge: Any, inputs: Any, mapping: Any, draft_ids: Any
) -> None:
    with RemoteEagle3Backend.from_urls(
        ["http://target"], device=torch.device("cpu"), timeout=5, max_retries=3, transport=bridge
    ) as backend:
        backend.set_vocab_mapping(*mapping(draft_ids, 131))
        assert backend.generate_batch(*inputs).aux_hidden_states.device.type == "cpu"


def test_from_env_reads_urls_and_token(
    model: Any, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport = router(a=serve(model, token="secret"), b=serve(model, token="secret"))
    monkeypatch.setenv("EAGLE3_URLS", "http://a,http://b")
    monkeypatch.setenv("EAGLE3_TOKEN", "secret")
    with RemoteEagle3Backend.from_env(transport=transport, max_in_flight=7) as backend:
        assert backend.model_info().model_id == "tiny"
        assert backend.num_remote_servers == 7


def test_from_env_without_urls_says_what_to_set() -> None:
    with pytest.raises(InvalidRequest, match="EAGLE3_URLS is not set"):
        RemoteEagle3Backend.from_env()


def test_model_info_describes_the_target(connect: Any, bridge: Any, model: Any) -> None:
    info = connect(bridge).model_info()
    config = model.config
    assert (info.hidden_size, info.num_hidden_layers) == (config.hidden_size, 7)
    assert (info.vocab_size, info.input_vocab_size) == (131, 131)
    assert (info.dtype, info.device) == ("float32", "cpu")
    assert info.aux_layer_ids == (1, 2, 3)
    assert info.aux_layer_convention == "layer_output"
    assert info.num_threads == torch.get_num_threads()
    assert info.limits.max_tokens_per_request == 16384


def test_the_servers_default_layers_can_be_set_there(
    model: Any, serve: Any, connect: Any, inputs: Any, draft_ids: Any, expect: Any, matches: Any
) -> None:
    backend = connect(serve(model, aux_layer_ids=(6, 0, 2)), draft_ids)
    assert backend.model_info().aux_layer_ids == (6, 0, 2)
    matches(backend.generate_batch(*inputs), expect(model, inputs, draft_ids, (6, 0, 2)))


def test_a_server_of_another_protocol_version_is_refused(
    connect: Any, bridge: Any, streamed: Any
) -> None:
    def newer(request: httpx.Request) -> httpx.Response:
        info = json.loads(bridge.handle_request(request).read())
        return streamed(json.dumps({**info, "protocol_version": 2}).encode())

    with pytest.raises(ProtocolMismatch, match="expected protocol version 1; the server speaks 2"):
        connect(httpx.MockTransport(newer)).model_info()


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}", b'{"protocol_version": 1}'])
def test_something_else_at_the_url_is_said_to_be_no_server(
    connect: Any, streamed: Any, body: bytes
) -> None:
    transport = httpx.MockTransport(lambda _: streamed(body))
    with pytest.raises(ProtocolMismatch, match="http://target"):
        connect(transport).model_info()
