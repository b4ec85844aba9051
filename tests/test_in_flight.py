"""Many requests at once, through pooled buffers and real sockets: no byte of another's answer."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tests.seeded_target import SeededTarget, inputs_of, is_answer_of

from eagle3_client import RemoteEagle3Backend, TransportError
from eagle3_schemas.protocol import SUPERVISION_PATH
from eagle3_server.copying import HostCopier
from eagle3_server.engine import DeviceTensors, HostTensors

PATIENCE_S = 60.0
DRAFT_IDS = torch.arange(1400)


@pytest.fixture
def target() -> SeededTarget:
    return SeededTarget()


@pytest.fixture(params=["tcp", "unix"])
def url(request: Any, target: SeededTarget, live_server: Any, tmp_path: Path) -> str:
    started: str = live_server(
        target, unix=tmp_path / "eagle3.sock" if request.param == "unix" else None
    )
    return started


@pytest.fixture
def backend_at(connect: Any) -> Callable[..., RemoteEagle3Backend]:
    def build(url: str, transport: httpx.BaseTransport | None = None) -> RemoteEagle3Backend:
        backend: RemoteEagle3Backend = connect(
            transport, DRAFT_IDS, urls=url, encoding="probs", max_in_flight=8
        )
        return backend

    return build


def test_answers_are_right_with_all_of_them_held_to_the_end(
    url: str, target: SeededTarget, backend_at: Any
) -> None:
    """Buffers are used again while earlier answers are still held; 100 answers, 800 MiB."""

    def train(first: int) -> list[tuple[int, Any]]:
        backend = backend_at(url)
        seeds = range(first, first + 25)
        handles = [backend.generate_batch_async(*inputs_of(seed)) for seed in seeds]
        return [(seed, h.result(PATIENCE_S)) for seed, h in zip(seeds, handles, strict=True)]

    with ThreadPoolExecutor(4) as pool:
        held = [pair for part in pool.map(train, [0, 25, 50, 75]) for pair in part]
    assert len(held) == 100
    assert [seed for seed, batch in held if not is_answer_of(seed, batch)] == []
    assert len(target.supervised) == 100  # none was corrupted and asked for again


class SlowReader(httpx.BaseTransport):
    """Reads the beginning of a supervision answer, and the rest when told."""

    def __init__(self, url: str) -> None:
        is_unix = url.startswith("unix://")
        self.url = "http://localhost" if is_unix else url
        self.inner = httpx.HTTPTransport(
            uds=url.removeprefix("unix://") if is_unix else None,
            # The kernel must not take the whole answer off the server's hands.
            socket_options=[(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)],
        )
        self.is_waiting = threading.Event()
        self.may_go_on = threading.Event()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = self.inner.handle_request(request)
        if request.url.path != SUPERVISION_PATH:
            return response
        inner: Any = response.stream

        class Stream(httpx.SyncByteStream):
            def __iter__(stream) -> Iterator[bytes]:
                for chunk in inner:
                    yield chunk
                    self.is_waiting.set()
                    assert self.may_go_on.wait(PATIENCE_S)

            def close(stream) -> None:
                inner.close()

        return httpx.Response(200, headers=response.headers, stream=Stream())

    def close(self) -> None:
        self.inner.close()


def test_a_slow_readers_answer_is_right_though_buffers_were_used_again(
    url: str, target: SeededTarget, backend_at: Any
) -> None:
    """What the server's transport still holds of an answer must not be lent to the next ones."""
    readers = [SlowReader(url) for _ in range(3)]
    handles = [
        backend_at(reader.url, reader).generate_batch_async(*inputs_of(seed))
        for seed, reader in enumerate(readers, 200)
    ]
    for reader in readers:
        assert reader.is_waiting.wait(PATIENCE_S)
    fast = backend_at(url)
    held = [(seed, fast.generate_batch(*inputs_of(seed))) for seed in range(30)]
    assert not any(handle._future.done() for handle in handles)
    for reader in readers:
        reader.may_go_on.set()
    held += [(seed, handle.result(PATIENCE_S)) for seed, handle in enumerate(handles, 200)]
    assert [seed for seed, batch in held if not is_answer_of(seed, batch)] == []
    assert len(target.supervised) == 33  # none was corrupted and asked for again


def test_a_buffer_is_back_when_its_answer_was_sent(
    live_server: Any, backend_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that answers one request after another takes no new memory for the next."""
    taken: list[int] = []
    inner = HostCopier.to_host

    def to_host(copier: HostCopier, result: DeviceTensors) -> HostTensors:
        copied = inner(copier, result)
        taken.append(copied.tensors["aux_hidden_states"].data_ptr())
        return copied

    monkeypatch.setattr(HostCopier, "to_host", to_host)
    backend = backend_at(live_server(SeededTarget()))
    for _ in range(20):
        assert is_answer_of(7, backend.generate_batch(*inputs_of(7)))
    assert len(taken) == 20
    # Two, as the client may have the last byte before the server has let go of the view.
    assert len(set(taken)) <= 2


# --- corruption: planted where bytes lie or move, found by the checksum, repeated ---


class Planted:
    """Changes one byte of the first answer's copy, once it was made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tensor_name: str, byte: int) -> None:
        self.done = 0
        inner = HostCopier.to_host

        def to_host(copier: HostCopier, result: DeviceTensors) -> HostTensors:
            copied = inner(copier, result)
            if not self.done:
                self.done += 1
                copied.tensors[tensor_name].view(-1).view(torch.uint8)[byte] ^= 0x40
            return copied

        monkeypatch.setattr(HostCopier, "to_host", to_host)


@pytest.mark.parametrize("tensor_name", ["aux_hidden_states", "position_mask", "target_probs"])
@pytest.mark.parametrize("byte", [0, 100, -1])
def test_a_byte_changed_between_copy_and_send_is_found_and_the_request_repeated(
    live_server: Any, backend_at: Any, monkeypatch: pytest.MonkeyPatch, tensor_name: str, byte: int
) -> None:
    target = SeededTarget()
    backend = backend_at(live_server(target))
    planted = Planted(monkeypatch, tensor_name, byte)
    assert is_answer_of(5, backend.generate_batch(*inputs_of(5)))
    assert planted.done == 1
    assert target.supervised == [5, 5]


def test_without_a_repeat_a_changed_byte_is_an_error_that_names_the_tensor(
    live_server: Any, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = connect(
        None, DRAFT_IDS, urls=live_server(SeededTarget()), encoding="probs", max_retries=0
    )
    Planted(monkeypatch, "target_probs", 12345)
    with pytest.raises(TransportError, match="'target_probs': checksum mismatch"):
        backend.generate_batch(*inputs_of(5))


def test_a_buffer_lent_again_too_early_is_found(
    live_server: Any, backend_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault the pool exists to prevent: the next answer is written over one being sent."""
    inner_copy, previous = HostCopier.to_host, []

    def to_host(copier: HostCopier, result: DeviceTensors) -> HostTensors:
        copied = inner_copy(copier, result)
        rows = copied.tensors["target_probs"]
        if len(previous) == 1:  # the first answer's memory, of which a reader has read a part
            previous[0].copy_(rows[: len(previous[0])])
        previous.append(rows)
        return copied

    url = live_server(SeededTarget())
    reader = SlowReader(url)
    slow, fast = backend_at(reader.url, reader), backend_at(url)
    monkeypatch.setattr(HostCopier, "to_host", to_host)
    handle = slow.generate_batch_async(*inputs_of(1))
    assert reader.is_waiting.wait(PATIENCE_S)
    assert is_answer_of(2, fast.generate_batch(*inputs_of(2)))
    assert len(previous) == 2
    reader.may_go_on.set()
    assert is_answer_of(1, handle.result(PATIENCE_S))
    assert len(previous) == 3  # asked for again


class FlippingProxy(httpx.BaseTransport):
    """A network that changes one bit of the first supervision answer."""

    def __init__(self, position: float) -> None:
        self.inner, self.position, self.answers = httpx.HTTPTransport(), position, 0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = self.inner.handle_request(request)
        if request.url.path != SUPERVISION_PATH:
            return response
        body = bytearray(response.read())
        self.answers += 1
        if self.answers == 1:
            body[int(self.position * (len(body) - 1))] ^= 1
        return httpx.Response(200, headers=response.headers, stream=httpx.ByteStream(bytes(body)))

    def close(self) -> None:
        self.inner.close()


@pytest.mark.parametrize("position", [0.0, 0.00001, 0.1, 0.39, 0.5, 0.9, 1.0])
def test_a_bit_changed_on_the_wire_is_found_and_the_request_repeated(
    live_server: Any, backend_at: Any, position: float
) -> None:
    proxy = FlippingProxy(position)
    backend = backend_at(live_server(SeededTarget()), proxy)
    assert is_answer_of(9, backend.generate_batch(*inputs_of(9)))
    assert proxy.answers == 2


def test_a_connection_outlives_the_servers_patience_with_idle_ones(
    live_server: Any, backend_at: Any
) -> None:
    """uvicorn closes idle connections; the next request opens another without an error."""
    target = SeededTarget()
    backend = backend_at(live_server(target, keep_alive_s=1))
    assert is_answer_of(1, backend.generate_batch(*inputs_of(1)))
    threading.Event().wait(2.5)  # what is tested is time: longer than the server's keep-alive
    assert is_answer_of(2, backend.generate_batch(*inputs_of(2)))
    assert target.supervised == [1, 2]
