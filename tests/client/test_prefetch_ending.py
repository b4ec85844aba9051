"""A prefetch that ends early, its backend that closes, consumers side by side, forks."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from tests.client.gate import PATIENCE_S, Gate

from eagle3_client import (
    InvalidRequest,
    RemoteEagle3Error,
)
from eagle3_client.retry import Cancellation

# --- ending early ---


@pytest.mark.parametrize("end", ["close", "with", "drop"])
def test_ending_early_drops_what_has_not_started_and_leaves_the_backend_usable(
    end: str, gate: Gate, connect: Any, model: Any, batches: Any, draft_ids: Any, inputs: Any,
    expect: Any, matches: Any,
) -> None:  # fmt: skip
    backend = connect(gate, draft_ids, max_in_flight=1, exact=True)
    expected = expect(model, type(inputs)(*batches[4]), draft_ids)
    blockers = []

    def source() -> Iterator[Any]:
        yield batches[0]
        blockers.append(backend.generate_batch_async(*batches[1]))  # keeps the only worker
        yield batches[2]

    prefetch = backend.prefetch(source(), depth=1)
    gate.allowed.release()
    next(prefetch)
    gate.wait_for(2)
    if end == "close":
        prefetch.close()
    elif end == "with":
        with prefetch:
            pass
    else:
        del prefetch
    gate.open()
    blockers[0].result(PATIENCE_S)
    matches(backend.generate_batch_async(*batches[4]).result(PATIENCE_S), expected)
    assert gate.count == 3, "the request that had not started was sent"
    assert len(list(backend.prefetch(batches, depth=1))) == len(batches)


@pytest.mark.parametrize("end", ["close", "drop"])
def test_ending_early_ends_the_repeats_of_what_is_under_way(
    end: str, bridge: Any, flaky: Any, fail: Any, connect: Any, batches: Any, draft_ids: Any
) -> None:
    """Else the only worker would go on for 900 s, before anything else."""

    def passed(request: httpx.Request, inner: httpx.BaseTransport) -> httpx.Response:
        return inner.handle_request(request)

    def fails(request: httpx.Request, _inner: httpx.BaseTransport) -> httpx.Response:
        has_failed.set()
        return httpx.Response(503, headers={"retry-after": "5"})

    has_failed = threading.Event()
    transport = flaky(bridge, passed, fails)
    backend = connect(transport, draft_ids, max_in_flight=1)
    prefetch = backend.prefetch(batches, depth=1)
    next(prefetch)
    assert has_failed.wait(PATIENCE_S)
    if end == "close":
        prefetch.close()
    else:
        del prefetch
    backend.generate_batch_async(*batches[1]).result(PATIENCE_S)
    assert transport.attempts == 3, "it was repeated"


def test_cancelling_a_handle_ends_its_repeats(
    bridge: Any, flaky: Any, fail: Any, connect: Any, batches: Any, draft_ids: Any
) -> None:
    transport = flaky(bridge, fail.status(503, b"", retry_after="5"), ...)
    handle = connect(transport, draft_ids).generate_batch_async(*batches[0])
    assert transport.has_failed.wait(PATIENCE_S)
    assert not handle.cancel()
    with pytest.raises(RemoteEagle3Error):
        handle.result(PATIENCE_S)
    assert transport.attempts == 1


def test_a_cancellation_ends_a_wait_of_any_length() -> None:
    cancellation = Cancellation()
    waiting = threading.Thread(target=cancellation.wait, args=(3600.0,), daemon=True)
    waiting.start()
    cancellation.set()
    waiting.join(PATIENCE_S)
    assert not waiting.is_alive()


def test_closing_from_another_thread_wakes_a_consumer_whose_request_has_not_started(
    gate: Gate, connect: Any, batches: Any, draft_ids: Any
) -> None:
    backend = connect(gate, draft_ids, max_in_flight=2)
    blockers = [backend.generate_batch_async(*batches[0]) for _ in range(2)]
    gate.wait_for(2)
    is_submitted = threading.Event()

    def source() -> Iterator[Any]:
        yield batches[1]
        is_submitted.set()

    prefetch = backend.prefetch(source(), depth=2)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(list, prefetch)
        assert is_submitted.wait(PATIENCE_S)
        prefetch.close()
        assert waiting.result(PATIENCE_S) == []
        gate.open()
    for blocker in blockers:
        blocker.result(PATIENCE_S)
    backend.generate_batch(*batches[2])
    assert gate.count == 3


def test_closing_from_another_thread_ends_a_request_under_way_with_its_attempt(
    gate: Gate, connect: Any, batches: Any, draft_ids: Any
) -> None:
    prefetch = connect(gate, draft_ids).prefetch(batches, depth=2)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(list, prefetch)
        gate.wait_for(2)
        prefetch.close()
        gate.open()
        assert waiting.result(PATIENCE_S) == []
    assert gate.count == 2


def test_closing_the_backend_ends_a_prefetch_with_an_error(
    gate: Gate, connect: Any, batches: Any, draft_ids: Any
) -> None:
    backend = connect(gate, draft_ids)
    prefetch = backend.prefetch(batches, depth=2)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, prefetch)
        gate.wait_for(2)
        backend.close()
        with pytest.raises(RemoteEagle3Error, match="the backend was closed"):
            waiting.result(PATIENCE_S)
    assert list(prefetch) == []
    with pytest.raises(RemoteEagle3Error, match="closed"):
        backend.prefetch(batches)


def test_closing_the_backend_ends_a_prefetch_whose_request_has_not_started(
    gate: Gate, connect: Any, batches: Any, draft_ids: Any
) -> None:
    backend = connect(gate, draft_ids, max_in_flight=2)
    for _ in range(2):
        backend.generate_batch_async(*batches[0])
    gate.wait_for(2)
    is_submitted = threading.Event()

    def source() -> Iterator[Any]:
        yield batches[1]
        is_submitted.set()

    prefetch = backend.prefetch(source(), depth=2)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, prefetch)
        assert is_submitted.wait(PATIENCE_S)
        backend.close()
        with pytest.raises(RemoteEagle3Error, match="the backend was closed"):
            waiting.result(PATIENCE_S)


def test_a_closed_backend_takes_no_mapping(
    bridge: Any, connect: Any, draft_ids: Any, mapping: Any
) -> None:
    backend = connect(bridge, draft_ids)
    backend.close()
    with pytest.raises(RemoteEagle3Error, match="closed"):
        backend.set_vocab_mapping(*mapping(draft_ids, 131))


def test_a_second_consumer_is_refused_and_the_first_goes_on(
    gate: Gate, connect: Any, batches: Any, draft_ids: Any
) -> None:
    prefetch = connect(gate, draft_ids).prefetch(batches, depth=2)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, prefetch)
        gate.wait_for(2)
        with pytest.raises(InvalidRequest, match="one consumer at a time"):
            next(prefetch)
        gate.open()
        assert waiting.result(PATIENCE_S)[0] is batches[0]
    assert len(list(prefetch)) == len(batches) - 1


def test_several_consumers_of_one_backend_each_get_their_own(
    bridge: Any, connect: Any, model: Any, batches: Any, draft_ids: Any, inputs: Any, expect: Any,
    matches: Any,
) -> None:  # fmt: skip
    """Prefetches of several depths and handles on one worker thread: slow, never stuck."""
    backend = connect(bridge, draft_ids, exact=True, max_in_flight=1)

    def handles(own: Any) -> list[Any]:
        started = [backend.generate_batch_async(*batch) for batch in own]
        return [handle.result(PATIENCE_S) for handle in started]

    def prefetched(own: Any) -> list[Any]:
        return [target_batch for _, target_batch in backend.prefetch(own, depth=1)]

    orders = [batches, batches[::-1], batches[2:] + batches[:2]]
    with ThreadPoolExecutor(3) as pool:
        runs = [
            pool.submit(f, o)
            for f, o in zip((prefetched, prefetched, handles), orders, strict=True)
        ]
        results = [run.result(PATIENCE_S) for run in runs]
    for got, order in zip(results, orders, strict=True):
        for target_batch, plain in zip(got, order, strict=True):
            matches(target_batch, expect(model, type(inputs)(*plain), draft_ids))


def test_no_thread_outlives_its_backend(
    bridge: Any, connect: Any, batches: Any, draft_ids: Any
) -> None:
    before = set(threading.enumerate())
    backend = connect(bridge, draft_ids)
    list(backend.prefetch(batches, depth=5))
    backend.prefetch(batches, depth=7)
    own = [t for t in set(threading.enumerate()) - before if t.name == "eagle3-request"]
    assert len(own) == 5
    backend.close()
    for thread in own:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


# --- forks ---

FORKED = """
import os, sys
import httpx, torch
from eagle3_client import RemoteEagle3Backend, RemoteEagle3Error

info = sys.stdin.read()
parent = os.getpid()

def answer(request):
    assert os.getpid() == parent, "a forked child used its parent's connection"
    body = info.encode() if request.url.path == "/v1/model" else b""
    headers = {"content-length": str(len(body))}
    return httpx.Response(200, headers=headers, stream=httpx.ByteStream(body))

backend = RemoteEagle3Backend("http://target", transport=httpx.MockTransport(answer), retry_for_s=1)
mapping = torch.tensor([0]), torch.arange(131) == 0
backend.set_vocab_mapping(*mapping)
ids = torch.ones(1, 3, dtype=torch.long)
prefetch = backend.prefetch([(ids, ids, ids)])
calls = {
    "generate_batch": lambda: backend.generate_batch(ids, ids, ids),
    "generate_batch_async": lambda: backend.generate_batch_async(ids, ids, ids),
    "prefetch": lambda: backend.prefetch([]),
    "next": lambda: next(prefetch),
    "get_input_embeddings": backend.get_input_embeddings,
    "set_vocab_mapping": lambda: backend.set_vocab_mapping(*mapping),
    "model_info": backend.model_info,
}
backend._lock.acquire()  # as a thread of the parent may hold it at the fork
if child := os.fork():
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
for name, call in calls.items():
    try:
        call()
    except RemoteEagle3Error as error:
        if "built before a fork" in str(error):
            continue
        print(name, error)
    os._exit(3)
backend.close()
del prefetch
os._exit(0)
"""


def test_a_forked_child_is_told_to_build_its_own_backend(bridge: Any, connect: Any) -> None:
    info = connect(bridge).model_info().model_dump_json()
    done = subprocess.run(
        [sys.executable, "-c", FORKED], input=info, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr
