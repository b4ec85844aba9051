"""A transport that holds requests, and batches that are pulled one by one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import httpx

from eagle3_schemas.protocol import SUPERVISION_PATH

NAMES = ("input_ids", "attention_mask", "loss_mask")
PATIENCE_S = 60.0


class Gate(httpx.BaseTransport):
    """Holds supervision requests until the test lets them through, and counts them."""

    def __init__(self, inner: httpx.BaseTransport) -> None:
        self.inner = inner
        self.arrived, self.allowed = threading.Semaphore(0), threading.Semaphore(0)
        self.is_open = self.is_over = False
        self.lock = threading.Condition()
        self.count = self.in_flight = self.most_in_flight = 0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path != SUPERVISION_PATH:
            return self.inner.handle_request(request)
        with self.lock:
            self.count += 1
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        self.arrived.release()
        if not self.is_open:
            assert self.allowed.acquire(timeout=PATIENCE_S), "nobody let the request through"
        try:
            if self.is_over:
                raise httpx.ConnectError("the test is over", request=request)
            return self.inner.handle_request(request)
        finally:
            with self.lock:
                self.in_flight -= 1
                self.lock.notify_all()

    def wait_for(self, count: int) -> None:
        for _ in range(count):
            assert self.arrived.acquire(timeout=PATIENCE_S), "no request came"

    def open(self) -> None:
        self.is_open = True
        self.allowed.release(100)

    def end(self) -> None:
        """Fail what is held: an app that is left while a request is under way never ends."""
        self.is_over = True
        self.open()
        with self.lock:
            assert self.lock.wait_for(lambda: self.in_flight == 0, PATIENCE_S)


def as_dicts(batches: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    return [
        {**dict(zip(NAMES, batch, strict=True)), "name": f"batch {i}", "position_ids": None}
        for i, batch in enumerate(batches)
    ]


def pulled_from(source: Any, log: list[Any]) -> Iterator[Any]:
    for batch in source:
        log.append(batch)
        yield batch


def bad(batch: tuple[Any, ...]) -> tuple[Any, ...]:
    """A batch that the server refuses."""
    ids = batch[0].clone()
    ids[0, 0] = 131
    return (ids, *batch[1:])
