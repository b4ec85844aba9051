"""Failures that pass are repeated for a bounded time; all others are raised at once."""

from __future__ import annotations

import threading
from typing import Any

import httpx
import pytest
import torch
from tests.client.problems import problem

from eagle3_client import (
    InvalidRequest,
    LimitExceeded,
    ProtocolMismatch,
    RemoteEagle3Error,
    TargetFailed,
    Unauthorized,
)
from eagle3_schemas.frame import decode, encode


def flip_last_byte(body: bytearray) -> None:
    body[-1] ^= 0x10


def flip_byte_of_header(body: bytearray) -> None:
    body[30] ^= 0x10


def flip_byte_of_version(body: bytearray) -> None:
    body[5] ^= 0xFE


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
        "flipped-in-the-version",
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
        "flipped-in-the-version": fail.changed(flip_byte_of_version),
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
