"""Failures that pass are repeated for a bounded time; all others are raised at once."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch

from eagle3_client import (
    DeadlineExceeded,
    InvalidRequest,
    LimitExceeded,
    MalformedPayload,
    NotReady,
    ProtocolMismatch,
    QueueFull,
    RemoteEagle3Error,
    TargetFailed,
    TransportError,
    Unauthorized,
)
from eagle3_schemas.frame import decode, encode
from eagle3_schemas.protocol import SUPERVISION_PATH


def problem(code: str) -> dict[str, object]:
    return {"code": code, "detail": "the server's words", "request_id": "id-9", "status": 1}


def flip_last_byte(body: bytearray) -> None:
    body[-1] ^= 0x10


def flip_byte_of_header(body: bytearray) -> None:
    body[30] ^= 0x10


def cut(body: bytearray) -> None:
    del body[-40:]


def extend(body: bytearray) -> None:
    body.extend(b"more")


@pytest.mark.parametrize(
    "kind",
    [
        "refused",
        "timed-out",
        "truncated",
        "shortened",
        "too-long",
        "flipped-in-a-tensor",
        "flipped-in-the-header",
        "gateway",
        "not-ready",
        "deadline",
        "no-length",
    ],
)
def test_a_failure_that_passes_is_repeated_and_the_batch_is_right(
    kind: str, bridge: Any, flaky: Any, fail: Any, connect: Any, model: Any, inputs: Any,
    draft_ids: Any, expect: Any, matches: Any,
) -> None:  # fmt: skip
    failure = {
        "refused": fail.refused,
        "timed-out": fail.timed_out,
        "truncated": fail.changed(cut, keep_length=True),
        "shortened": fail.changed(cut),
        "too-long": fail.changed(extend, keep_length=True),
        "flipped-in-a-tensor": fail.changed(flip_last_byte),
        "flipped-in-the-header": fail.changed(flip_byte_of_header),
        "gateway": fail.status(502, b"<html>bad gateway</html>"),
        "not-ready": fail.status(503, problem("not_ready")),
        "deadline": fail.status(504, problem("deadline_exceeded")),
        "no-length": lambda *_: httpx.Response(200, stream=httpx.ByteStream(b"")),
    }[kind]
    transport = flaky(bridge, failure, failure)
    backend = connect(transport, draft_ids, exact=True)
    matches(backend.generate_batch(*inputs), expect(model, inputs, draft_ids))
    assert transport.attempts == 3


def test_the_answer_to_another_request_is_not_taken(
    bridge: Any, flaky: Any, streamed: Any, connect: Any, model: Any, inputs: Any, batch_of: Any,
    draft_ids: Any, expect: Any, matches: Any,
) -> None:  # fmt: skip
    """A proxy that mixes answers up: a valid frame of the right shapes, for somebody else."""
    recorded: list[bytes] = []

    def record(request: httpx.Request, inner: httpx.BaseTransport) -> httpx.Response:
        response = inner.handle_request(request)
        recorded.append(response.read())
        return streamed(recorded[0])

    def replay(_request: httpx.Request, _inner: httpx.BaseTransport) -> httpx.Response:
        return streamed(recorded[0])

    backend = connect(flaky(bridge, record, replay), draft_ids, exact=True)
    backend.generate_batch(*batch_of(131, seed=4))
    matches(backend.generate_batch(*inputs), expect(model, inputs, draft_ids))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"aux_hidden_states": torch.zeros(20, 144)},
            r"states \[21, 144\].*got \[20, 144\]",
        ),
        ({"aux_hidden_states": torch.zeros(21, 144).double()}, "got .*float64"),
        ({"position_mask": torch.zeros(5, dtype=torch.uint8)}, r"position_mask \[4\].*\[5\]"),
        ({"target_probs": torch.zeros(1000, 8)}, r"target_probs \[\d+, 8\].*\[1000, 8\]"),
        ({"target_probs": None}, "target_probs .*None"),
        ({"rows": "all"}, "rows all, not position_mask"),
    ],
    ids=["fewer-aux-rows", "aux-dtype", "longer-mask", "more-rows", "no-rows", "other-rows"],
)
def test_an_answer_of_the_wrong_form_is_not_asked_for_again(
    bridge: Any, flaky: Any, streamed: Any, connect: Any, inputs: Any, draft_ids: Any,
    change: dict[str, Any], words: str,
) -> None:  # fmt: skip
    """Its checksums are right, so a repeat would bring the same."""

    def wrong(request: httpx.Request, inner: httpx.BaseTransport) -> httpx.Response:
        frame = decode(bytearray(inner.handle_request(request).read()))
        fields = frame.fields | {k: v for k, v in change.items() if k in frame.fields}
        tensors = {name: change.get(name, tensor) for name, tensor in frame.tensors.items()}
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        return streamed(encode(fields, kept).to_bytes())

    transport = flaky(bridge, wrong, ...)
    backend = connect(transport, draft_ids, retry_for_s=5)
    with pytest.raises(ProtocolMismatch, match=f"not the one asked for: .*{words}") as caught:
        backend.generate_batch(*inputs)
    assert transport.attempts == caught.value.attempts == 1
    assert caught.value.url == "http://target"


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (400, "malformed_payload", MalformedPayload),
        (400, "protocol_mismatch", ProtocolMismatch),
        (401, "unauthorized", Unauthorized),
        (413, "limit_exceeded", LimitExceeded),
        (422, "invalid_request", InvalidRequest),
        (500, "target_failed", TargetFailed),
    ],
)
def test_what_no_repeat_mends_is_sent_once(
    bridge: Any, flaky: Any, fail: Any, connect: Any, inputs: Any, draft_ids: Any,
    status: int, code: str, error: type[RemoteEagle3Error],
) -> None:  # fmt: skip
    transport = flaky(bridge, fail.status(status, problem(code)))
    with pytest.raises(error) as caught:
        connect(transport, draft_ids).generate_batch(*inputs)
    assert type(caught.value) is error
    assert transport.attempts == 1
    for part in ("the server's words", "url=http://target", "attempts=1", "request_id=id-9"):
        assert part in str(caught.value)


@pytest.mark.parametrize("status", [400, 403, 404, 500])
def test_an_answer_that_is_not_ours_is_kept_in_words_and_not_repeated(
    bridge: Any, flaky: Any, fail: Any, connect: Any, inputs: Any, draft_ids: Any, status: int
) -> None:
    transport = flaky(bridge, fail.status(status, b"<h1>Forbidden by proxy</h1>"))
    with pytest.raises(ProtocolMismatch, match=f"HTTP {status}.*Forbidden by proxy"):
        connect(transport, draft_ids).generate_batch(*inputs)
    assert transport.attempts == 1


@pytest.mark.parametrize("max_retries", [0, 2])
def test_an_unknown_mapping_is_registered_again_on_every_attempt_and_is_bounded(
    bridge: Any, flaky: Any, fail: Any, connect: Any, inputs: Any, draft_ids: Any, max_retries: int
) -> None:
    """Others' draft vocabs may push it out again and again; a repeat is bounded like any other."""
    forgotten = fail.status(409, problem("vocab_mapping_missing"))
    transport = flaky(bridge, forgotten, ...)
    with pytest.raises(RemoteEagle3Error, match="the server's words"):
        connect(transport, draft_ids, max_retries=max_retries).generate_batch(*inputs)
    assert transport.attempts == 2 * (max_retries + 1)


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


def test_a_repeat_goes_to_the_other_server(
    model: Any, serve: Any, connect: Any, inputs: Any, draft_ids: Any, expect: Any, matches: Any
) -> None:
    bridges = {"a": serve(model), "b": serve(model)}
    is_down, sent = threading.Event(), []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(request.url.host)
        if request.url.host == "a" and is_down.is_set():
            raise httpx.ConnectError("refused")
        return bridges[request.url.host].handle_request(request)

    backend = connect(httpx.MockTransport(answer), draft_ids, urls="http://a,http://b")
    is_down.set()
    for _ in range(2):
        sent.clear()
        matches(backend.generate_batch(*inputs), expect(model, inputs, draft_ids))
        assert sent in (["a", "b"], ["b"])


def test_repeating_says_so_and_why(
    bridge: Any, flaky: Any, fail: Any, connect: Any, inputs: Any, draft_ids: Any, caplog: Any
) -> None:
    backend = connect(flaky(bridge, fail.refused), draft_ids)
    with caplog.at_level("INFO", logger="eagle3_client"):
        backend.generate_batch(*inputs)
    messages = [r.getMessage() for r in caplog.records if r.name == "eagle3_client"]
    assert len(messages) == 1
    assert "retrying" in messages[0]
    assert "connection refused" in messages[0]


def test_a_mapping_survives_a_server_that_is_down_for_a_moment(
    bridge: Any, connect: Any, mapping: Any, inputs: Any, draft_ids: torch.Tensor
) -> None:
    failures = [httpx.ConnectError("refused"), httpx.ConnectError("refused")]

    def answer(request: httpx.Request) -> httpx.Response:
        if failures and request.method in ("GET", "PUT"):
            raise failures.pop()
        return bridge.handle_request(request)

    backend = connect(httpx.MockTransport(answer), draft_ids)
    assert not failures
    backend.generate_batch(*inputs)


def test_a_vocab_pushed_out_between_registering_and_asking_is_a_passing_failure(
    bridge: Any, flaky: Any, fail: Any, connect: Any, inputs: Any, draft_ids: Any
) -> None:
    forgotten = fail.status(409, problem("vocab_mapping_missing"))
    transport = flaky(bridge, forgotten, forgotten, forgotten)
    connect(transport, draft_ids).generate_batch(*inputs)
