"""How long a call is repeated, and what ends that."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from tests.client.problems import problem

from eagle3_client import (
    DeadlineExceeded,
    NotReady,
    ProtocolMismatch,
    QueueFull,
    RemoteEagle3Error,
    TransportError,
)
from eagle3_schemas.protocol import SUPERVISION_PATH


@pytest.mark.parametrize("max_retries", [0, 2])
def test_max_retries_bounds_the_repeats(
    bridge: Any, flaky: Any, fail: Any, connect: Any, inputs: Any, draft_ids: Any, max_retries: int
) -> None:
    transport = flaky(bridge, fail.refused, ...)
    with pytest.raises(TransportError, match="connection refused") as caught:
        connect(transport, draft_ids, max_retries=max_retries).generate_batch(*inputs)
    assert transport.attempts == max_retries + 1
    assert caught.value.attempts == max_retries + 1


@pytest.mark.parametrize(
    ("code", "status", "error"),
    [
        ("not_ready", 503, NotReady),
        ("queue_full", 429, QueueFull),
        ("deadline_exceeded", 504, DeadlineExceeded),
    ],
)
def test_the_end_of_patience_raises_the_last_reason_with_url_and_attempts(
    bridge: Any, flaky: Any, fail: Any, connect: Any, inputs: Any, draft_ids: Any,
    code: str, status: int, error: type[RemoteEagle3Error],
) -> None:  # fmt: skip
    transport = flaky(bridge, fail.status(status, problem(code)), ...)
    backend = connect(transport, draft_ids, retry_for_s=0.4)
    with pytest.raises(error) as caught:
        backend.generate_batch(*inputs)
    assert transport.attempts >= 2
    assert f"(url=http://target, attempts={transport.attempts}, " in str(caught.value)
    assert "the server's words" in str(caught.value)


def test_retry_after_is_waited_for(
    bridge: Any, flaky: Any, fail: Any, connect: Any, inputs: Any, draft_ids: Any
) -> None:
    transport = flaky(bridge, fail.status(503, problem("not_ready"), retry_after="1"))
    backend = connect(transport, draft_ids)
    started = time.monotonic()
    backend.generate_batch(*inputs)
    assert time.monotonic() - started >= 1.0
    assert transport.attempts == 2


def test_a_retry_after_beyond_the_patience_raises_at_once(
    bridge: Any, flaky: Any, fail: Any, connect: Any, inputs: Any, draft_ids: Any
) -> None:
    transport = flaky(bridge, fail.status(503, problem("not_ready"), retry_after="60"), ...)
    with pytest.raises(NotReady):
        connect(transport, draft_ids, retry_for_s=2).generate_batch(*inputs)
    assert transport.attempts == 1


def test_waiting_until_ready_gives_up_with_the_last_reason(connect: Any) -> None:
    def answer(_request: httpx.Request) -> httpx.Response:
        return httpx.Response(503, json=problem("not_ready"))

    backend = connect(httpx.MockTransport(answer))
    with pytest.raises(NotReady, match="the server's words"):
        backend.wait_until_ready(0.2)


def test_waiting_until_ready_ends_at_once_for_what_waiting_does_not_change(connect: Any) -> None:
    calls: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        calls.append(request.url.path)
        return httpx.Response(404, text="nothing here")

    with pytest.raises(ProtocolMismatch, match="nothing here"):
        connect(httpx.MockTransport(answer)).wait_until_ready(60)
    assert calls == ["/readyz"]


def test_close_ends_a_wait_between_repeats(
    bridge: Any, flaky: Any, fail: Any, connect: Any, inputs: Any, draft_ids: Any
) -> None:
    transport = flaky(bridge, fail.status(503, problem("not_ready"), retry_after="5"), ...)
    backend = connect(transport, draft_ids)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(backend.generate_batch, *inputs)
        assert transport.has_failed.wait(60)
        started = time.monotonic()
        backend.close()
        with pytest.raises(RemoteEagle3Error):
            waiting.result(60)
    assert time.monotonic() - started < 2.5  # half of the wait it was in
    assert transport.attempts == 1


FAILING_TRAINER = f"""
import sys, threading
import httpx, torch
from eagle3_client import RemoteEagle3Backend

info = sys.stdin.read()
is_waiting = threading.Event()

def answer(request):
    if request.url.path == "{SUPERVISION_PATH}":
        is_waiting.set()
        return httpx.Response(503, headers={{"retry-after": "5"}})
    body = info.encode() if request.url.path == "/v1/model" else b""
    headers = {{"content-length": str(len(body))}}
    return httpx.Response(200, headers=headers, stream=httpx.ByteStream(body))

backend = RemoteEagle3Backend("http://target", transport=httpx.MockTransport(answer))
backend.set_vocab_mapping(torch.tensor([0]), torch.arange(131) == 0)
ids = torch.ones(1, 3, dtype=torch.long)
handle = backend.generate_batch_async(ids, ids, ids)
assert is_waiting.wait(60)
print("raising", flush=True)
raise SystemExit(7)
"""


def test_a_process_that_raised_ends_while_a_request_is_repeated(bridge: Any, connect: Any) -> None:
    """A trainer that failed must not hang for the 900 s in which its request is repeated."""
    info = connect(bridge).model_info().model_dump_json()
    process = subprocess.Popen(
        [sys.executable, "-c", FAILING_TRAINER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(info)
        process.stdin.close()
        assert process.stdout.readline() == "raising\n"
        try:
            assert process.wait(20) == 7
        finally:
            process.kill()
