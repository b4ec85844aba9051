"""A transport that fails as told, and the ways in which networks and servers fail."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import torch
from tests.client.gate import Gate

from eagle3_schemas.protocol import SUPERVISION_PATH

Failure = Callable[[httpx.Request, httpx.BaseTransport], httpx.Response]


class Flaky(httpx.BaseTransport):
    """Hands requests on; supervision requests fail first, one after another, as told.

    `failures` may end with `...`: then the last one repeats for ever.
    """

    def __init__(self, inner: httpx.BaseTransport, failures: list[Any]) -> None:
        self.inner, self.failures = inner, failures
        self.attempts = 0
        self.has_failed = threading.Event()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path != SUPERVISION_PATH:
            return self.inner.handle_request(request)
        self.attempts += 1
        if not self.failures:
            return self.inner.handle_request(request)
        self.has_failed.set()
        is_last = self.failures[1:] == [...]
        failure: Failure = self.failures[0] if is_last else self.failures.pop(0)
        return failure(request, self.inner)


class Failures:
    """What can happen to a request."""

    @staticmethod
    def refused(request: httpx.Request, _inner: httpx.BaseTransport) -> httpx.Response:
        raise httpx.ConnectError("connection refused", request=request)

    @staticmethod
    def timed_out(request: httpx.Request, _inner: httpx.BaseTransport) -> httpx.Response:
        raise httpx.ReadTimeout("no byte for a while", request=request)

    @staticmethod
    def changed(change: Callable[[bytearray], object], keep_length: bool = False) -> Failure:
        """The body comes changed; with the length announced before, if `keep_length`."""

        def answer(request: httpx.Request, inner: httpx.BaseTransport) -> httpx.Response:
            response = inner.handle_request(request)
            body = bytearray(response.read())
            headers = dict(response.headers)
            change(body)
            if not keep_length:
                headers["content-length"] = str(len(body))
            return httpx.Response(200, headers=headers, stream=httpx.ByteStream(bytes(body)))

        return answer

    @staticmethod
    def status(status: int, body: Any = None, **headers: str) -> Failure:
        def answer(_request: httpx.Request, _inner: httpx.BaseTransport) -> httpx.Response:
            names = {name.replace("_", "-"): value for name, value in headers.items()}
            content = {"json": body} if isinstance(body, dict) else {"content": body}
            return httpx.Response(status, headers=names, **content)

        return answer


@pytest.fixture
def streamed() -> Callable[[bytes], httpx.Response]:
    """`streamed(body)`: a 200 answer as it comes from a network, not yet read."""

    def build(body: bytes) -> httpx.Response:
        headers = {"content-length": str(len(body))}
        return httpx.Response(200, headers=headers, stream=httpx.ByteStream(body))

    return build


@pytest.fixture
def fail() -> type[Failures]:
    return Failures


@pytest.fixture
def flaky() -> Callable[..., Flaky]:
    """`flaky(inner, failure, …)`: `inner`, failing so the first times; `...` for ever."""
    return lambda inner, *failures: Flaky(inner, list(failures))


@pytest.fixture
def model(build_model: Any) -> Any:
    return build_model("llama")


@pytest.fixture
def bridge(model: Any, serve: Any) -> Any:
    return serve(model)


@pytest.fixture
def draft_ids() -> torch.Tensor:
    return torch.tensor([90, 5, 130, 0, 17, 64, 33, 2])


@pytest.fixture
def inputs(batch_of: Any) -> Any:
    return batch_of(131)


@pytest.fixture
def gate(bridge: Any) -> Iterator[Gate]:
    gate = Gate(bridge)
    yield gate
    gate.end()


@pytest.fixture
def batches(batch_of: Any) -> list[tuple[Any, ...]]:
    """Batches whose shapes all differ."""
    lengths = [(10, 7, 4), (3,), (1, 1), (12, 2), (5, 5, 5, 1), (8,), (9, 3)]
    return [tuple(batch_of(131, shape, seed=i)) for i, shape in enumerate(lengths)]


def out_of(backend: Any) -> list[str]:
    members = backend._dispatcher.fleet.members
    return [member.connection.url for member in members.all if member.is_out]
