"""What only real sockets show: uvicorn, TCP, kept-alive connections, clients side by side."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch

from eagle3_client import RemoteEagle3Error, TransportError
from eagle3_client.transport import HttpTransport
from eagle3_schemas.errors import DeadlineExceeded


@pytest.fixture
def family() -> str:
    return "llama"


@pytest.fixture
def draft_ids(model: Any, frequency_ordered: Any) -> torch.Tensor:
    return frequency_ordered(model.config.vocab_size, 53)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_batch_over_tcp_is_what_the_definition_says(
    model: Any, live_server: Any, connect: Any, batch_of: Any, draft_ids: Any, expect: Any,
    matches: Any, same: Any,
) -> None:  # fmt: skip
    inputs = batch_of(model.config.vocab_size)
    backend = connect(None, draft_ids, urls=live_server(model), exact=True)
    matches(backend.generate_batch(*inputs), expect(model, inputs, draft_ids))
    weight = backend.get_input_embeddings().weight
    same(weight, model.get_input_embeddings().weight.detach())


def test_a_response_of_several_messages_comes_whole(
    model: Any, live_server: Any, connect: Any, batch_of: Any, draft_ids: Any, expect: Any,
    matches: Any,
) -> None:  # fmt: skip
    """2 MiB of aux states: more than one message of the server, more than a socket's buffer."""
    inputs = batch_of(model.config.vocab_size, (700, 653, 648, 650, 649, 651), left=True)
    backend = connect(None, draft_ids, urls=live_server(model), exact=True)
    batch = backend.generate_batch(*inputs)
    assert backend.bytes_received > 2 << 20
    expected = expect(model, inputs, draft_ids)
    matches(batch, expected)


def test_two_clients_at_once_each_get_their_own(
    model: Any, live_server: Any, connect: Any, batch_of: Any, frequency_ordered: Any, expect: Any,
    matches: Any,
) -> None:  # fmt: skip
    url, vocab_size = live_server(model), model.config.vocab_size
    batches = [batch_of(vocab_size, seed=seed) for seed in range(5)]

    def train(seed: int) -> None:
        ids, layers = frequency_ordered(vocab_size, 20 + seed, seed), (seed, 5, 2)
        backend = connect(None, ids, urls=url, aux_layer_ids=layers, exact=True)
        handles = [backend.generate_batch_async(*inputs) for inputs in batches]
        for inputs, handle in zip(batches, handles, strict=True):
            got.append((handle.result(60), inputs, ids, layers))

    got: list[Any] = []
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(train, [3, 4]))
    assert len(got) == 10
    for batch, inputs, ids, layers in got:
        matches(batch, expect(model, inputs, ids, layers))


def test_many_requests_share_one_kept_alive_connection(
    model: Any, live_server: Any, connect: Any, batch_of: Any, draft_ids: Any, same: Any
) -> None:
    """An answer read to its end gives its connection back, an error's too."""
    url, inputs = live_server(model), batch_of(model.config.vocab_size)
    opened: list[str] = []

    class Counting(httpx.HTTPTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            def trace(event: str, _info: object) -> None:
                if event == "connection.connect_tcp.complete":
                    opened.append(event)

            request.extensions["trace"] = trace
            return super().handle_request(request)

    backend = connect(Counting(), draft_ids, urls=url)
    first = backend.generate_batch(*inputs)
    broken = inputs.input_ids.clone()
    broken[0, 0] = -5
    for _ in range(20):
        with pytest.raises(RemoteEagle3Error):
            backend.generate_batch(broken, inputs.attention_mask, inputs.loss_mask)
        same(backend.generate_batch(*inputs).aux_hidden_states, first.aux_hidden_states)
    assert len(opened) == 1


def test_nobody_at_the_port_is_a_transport_error_with_the_url(connect: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(TransportError, match=rf"ConnectError.*url={url}, attempts=2"):
        connect(urls=url, max_retries=1).model_info()


class PatientTransport(HttpTransport):
    """Waits for an answer, however long it takes."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        request.extensions["timeout"]["read"] = None
        return super().handle_request(request)


def test_a_server_slower_than_the_timeout_says_so_itself(
    model: Any, gated: Any, live_server: Any, connect: Any, batch_of: Any, draft_ids: Any
) -> None:
    """And the forward that nobody waits for any more does not harm the next request."""
    target, inputs = gated(model), batch_of(model.config.vocab_size)
    url = live_server(target)
    connect(None, draft_ids, urls=url)  # it listens, and knows the draft vocab
    # It is told 0.285 s; its words may take the 0.015 s that are left, and more.
    backend = connect(PatientTransport(), draft_ids, urls=url, timeout_s=0.3, max_retries=0)
    with pytest.raises(DeadlineExceeded, match="raise timeout_s"):
        backend.generate_batch(*inputs)
    target.gate.set()
    connect(None, draft_ids, urls=url).generate_batch(*inputs)


def test_close_affects_no_other_backend_on_the_server(
    model: Any, gated: Any, live_server: Any, connect: Any, batch_of: Any, draft_ids: Any,
    expect: Any, matches: Any,
) -> None:  # fmt: skip
    """Also when it is closed while its request is on the server, and the other's waits there."""
    target, inputs = gated(model), batch_of(model.config.vocab_size)
    url = live_server(target)
    leaving, staying = (connect(None, draft_ids, urls=url) for _ in range(2))
    abandoned = leaving.generate_batch_async(*inputs)
    target.wait_until_entered()
    kept = staying.generate_batch_async(*inputs)
    leaving.close()
    with pytest.raises(RemoteEagle3Error):
        abandoned.result(5)
    target.gate.set()
    matches(kept.result(60), expect(model, inputs, draft_ids))


def test_a_deep_prefetch_keeps_its_connections(
    model: Any, live_server: Any, connect: Any, batch_of: Any, draft_ids: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    opened: list[object] = []
    inner = HttpTransport._connect

    def counting(transport: HttpTransport, *arguments: Any) -> Any:
        opened.append(arguments)
        return inner(transport, *arguments)

    monkeypatch.setattr(HttpTransport, "_connect", counting)
    backend = connect(None, draft_ids, urls=live_server(model))
    batches = [tuple(batch_of(model.config.vocab_size, seed=seed)) for seed in range(60)]
    assert len(list(backend.prefetch(batches, 12))) == 60
    assert len(opened) <= 12
