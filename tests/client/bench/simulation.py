"""A bench in simulated time: a clock, planted delays, and pipelines whose truth is known."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import httpx
import torch

from eagle3_client.bench_plan import BenchPlan
from eagle3_client.bench_shares import Sample, Visit
from eagle3_client.config import ClientSettings
from eagle3_schemas.protocol import SERVER_TIMING_HEADER, SUPERVISION_PATH


class Clock:
    """Seconds that pass only where a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._lock = threading.Lock()

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self.now += seconds


class _Slow(httpx.SyncByteStream):
    def __init__(self, body: bytes, clock: Clock, seconds: float) -> None:
        self._body, self._clock, self._seconds = body, clock, seconds

    def __iter__(self) -> Iterator[bytes]:
        self._clock.sleep(self._seconds)
        yield self._body


class Planted(httpx.BaseTransport):
    """Hands requests on; supervision takes what was planted, in seconds of the clock.

    It keeps the bodies of every supervision request and of its answer.
    """

    def __init__(
        self,
        inner: httpx.BaseTransport,
        clock: Clock,
        *,
        up: float = 0.0,
        down: float = 0.0,
        has_timing: bool = True,
        **stages: float,
    ) -> None:
        self.inner, self.clock, self.up, self.down = inner, clock, up, down
        self.stages, self.has_timing = stages, has_timing
        self.sent: list[bytes] = []
        self.received: list[bytes] = []
        self.changed = threading.Condition()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = self.inner.handle_request(request)
        if request.url.path != SUPERVISION_PATH or response.status_code != 200:
            return response
        body = response.read()
        headers = {key: value for key, value in response.headers.items()}
        total = sum(self.stages.values())
        self.clock.sleep(self.up + total)
        stages = {**self.stages, "total": total}
        words = [f"{name};dur={1000 * seconds:.3f}" for name, seconds in stages.items()]
        headers[SERVER_TIMING_HEADER] = ", ".join(words)
        if not self.has_timing:
            del headers[SERVER_TIMING_HEADER]
        with self.changed:
            self.sent.append(request.read())
            self.received.append(body)
            self.changed.notify_all()
        return httpx.Response(200, headers=headers, stream=_Slow(body, self.clock, self.down))


def pipeline(
    depth: int,
    *,
    step: float = 0.0,
    queue: float = 0.0,
    compute: float = 0.01,
    head: float = 0.01,
    copy: float = 0.01,
    link: float = 0.01,
    host: float = 0.01,
    servers: int = 1,
    count: int = 40,
    tokens: int = 10,
) -> Visit:
    """Simulate a trainer whose batches pass one server after another, the link and this host.

    Each of these serves one request at a time. `queue` is what other clients take of a server
    before each request of ours, once it is our turn.
    """
    free: dict[Any, float] = {}
    samples: list[Sample] = []
    now = 0.0

    def take(place: Any, since: float, seconds: float) -> float:
        free[place] = max(since, free.get(place, 0.0)) + seconds
        return free[place]

    def submit() -> None:
        number = len(samples)
        server = number % servers
        asked = now
        turn = max(asked, free.get(server, 0.0)) + queue
        worked = take(server, turn, compute + head)
        heard = take((server, "copy"), worked, copy)
        received = take("link", heard, link)
        done = take("host", received, host)
        stages = {
            "queue": heard - copy - compute - head - asked,
            "compute": compute,
            "head": head,
            "copy": copy,
            "total": heard - asked,
        }
        samples.append(
            Sample(tokens, asked, asked, f"http://{server}", 1, asked, heard, received, done)
        )
        samples[-1].stages = stages

    for _ in range(depth):
        submit()
    started = waited = 0.0
    for number in range(count + depth):
        if number >= depth:
            now += step
        asked_at = now
        now = max(now, samples[number].done_at)
        if number >= depth:
            waited += now - asked_at
        if number == depth - 1:
            started = now
        submit()
    return Visit(
        started, now, waited, samples[depth : depth + count],
        samples[:depth] + samples[depth + count :],
    )  # fmt: skip


PLAN = BenchPlan(depths=(1,), batch_size=2, sequence_length=9, steps=3, draft_vocab_size=50)


def settings_of(**changes: Any) -> ClientSettings:
    named: dict[str, Any] = {"urls": ("http://target",), "device": torch.device("cpu")}
    return ClientSettings(**(named | {"rows": "loss_mask", "retry_for_s": 0.0} | changes))
