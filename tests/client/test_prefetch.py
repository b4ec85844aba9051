"""`RemoteEagle3Backend.prefetch`: order, depth, failures, ending early, against a real target."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from eagle3_client import (
    InvalidRequest,
    PackingUnsupported,
    RemoteEagle3Error,
    VocabMappingMissing,
)
from eagle3_client.retry import Cancellation
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


# --- order and equality ---


@pytest.mark.parametrize("depth", [1, 2, 5, 20, "auto"])
@pytest.mark.parametrize("form", ["tuples", "lists", "dicts"])
def test_batches_come_in_order_with_the_supervision_the_definition_says(
    depth: Any, form: str, bridge: Any, connect: Any, model: Any, batches: Any, draft_ids: Any,
    inputs: Any, expect: Any, matches: Any, same: Any,
) -> None:  # fmt: skip
    given = {
        "tuples": batches,
        "lists": [list(batch) for batch in batches],
        "dicts": as_dicts(batches),
    }[form]
    with connect(bridge, draft_ids, exact=True).prefetch(given, depth) as prefetch:
        got = list(prefetch)
    assert [batch for batch, _ in got] == given
    for (batch, target_batch), own, plain in zip(got, given, batches, strict=True):
        assert batch is own
        matches(target_batch, expect(model, type(inputs)(*plain), draft_ids))
        same(target_batch.input_ids[:, :-1], plain[0][:, 1:])


@pytest.mark.parametrize(
    ("context", "form"),
    [
        (None, "tuples"),
        ("fork", "tuples"),
        ("fork", "dicts"),
        pytest.param("spawn", "dicts", marks=pytest.mark.slow),
    ],
)
def test_a_data_loader_is_prefetched_and_its_workers_end(
    context: str | None, form: str, bridge: Any, connect: Any, model: Any, batch_of: Any,
    draft_ids: Any, inputs: Any, expect: Any, matches: Any,
) -> None:  # fmt: skip
    rows = batch_of(131, (10, 7, 4, 9, 1, 6))
    dataset: Any = TensorDataset(*rows)
    if form == "dicts":
        dataset = [{**dict(zip(NAMES, row, strict=True)), "n": n} for n, row in enumerate(dataset)]
    workers: dict[str, Any] = {"num_workers": 2, "multiprocessing_context": context}
    loader = DataLoader(dataset, batch_size=2, **(workers if context else {}))
    backend = connect(bridge, draft_ids, exact=True)
    backend.generate_batch(*rows)  # threads and locks are there before the fork
    with backend.prefetch(loader, depth=3) as prefetch:
        got = list(prefetch)
    assert len(got) == 3
    for n, (batch, target_batch) in enumerate(got):
        plain = type(inputs)(*(tensor[2 * n : 2 * n + 2] for tensor in rows))
        matches(target_batch, expect(model, plain, draft_ids))
        if form == "dicts":
            assert batch["n"].tolist() == [2 * n, 2 * n + 1]
    with backend.prefetch(loader, depth=1) as prefetch:
        next(prefetch)  # and left
    assert multiprocessing.active_children() == []


def test_a_batch_is_bound_to_the_draft_vocab_of_its_submission(
    bridge: Any, connect: Any, model: Any, batches: Any, draft_ids: Any, inputs: Any,
    mapping: Any, expect: Any, matches: Any,
) -> None:  # fmt: skip
    """With two in flight, the mapping set after batch 0 reaches batch 3 first."""
    other = torch.tensor([7, 3, 99])
    backend = connect(bridge, draft_ids, exact=True)
    prefetch = backend.prefetch(batches, depth=2)
    got = [next(prefetch)[1]]
    backend.set_vocab_mapping(*mapping(other, 131))
    got += [target_batch for _, target_batch in prefetch]
    for n, (target_batch, plain) in enumerate(zip(got, batches, strict=True)):
        ids = draft_ids if n < 3 else other
        matches(target_batch, expect(model, type(inputs)(*plain), ids))


# --- depth ---


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_exactly_depth_requests_are_in_flight_while_the_trainer_trains(
    depth: int, gate: Gate, connect: Any, batches: Any, draft_ids: Any
) -> None:
    """Also more than the two a server that are sent by default."""
    log: list[Any] = []
    backend = connect(gate, draft_ids)
    assert backend.num_remote_servers == 2
    prefetch = backend.prefetch(pulled_from(batches, log), depth)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(next, prefetch)
        gate.wait_for(depth)
        gate.allowed.release(depth)  # whichever thread comes first: all of the first
        first.result(PATIENCE_S)
    for delivered in range(1, len(batches) - depth + 1):
        gate.wait_for(1)  # the next came, while the consumer holds its batch
        assert len(log) == gate.count == delivered + depth
        gate.allowed.release()
        next(prefetch)
    assert gate.most_in_flight <= depth
    gate.open()
    assert len(list(prefetch)) == depth - 1
    assert gate.most_in_flight <= depth
    assert gate.count == len(batches)


def test_depth_requests_really_are_in_flight_at_once(
    gate: Gate, connect: Any, batches: Any, draft_ids: Any
) -> None:
    prefetch = connect(gate, draft_ids).prefetch(batches, depth=6)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(next, prefetch)
        gate.wait_for(6)
        assert gate.in_flight == 6
        gate.open()
        first.result(PATIENCE_S)
    prefetch.close()


def test_a_depth_above_max_in_flight_is_refused(connect: Any, bridge: Any) -> None:
    backend = connect(bridge, max_in_flight=3)
    with pytest.raises(InvalidRequest, match="at most the backend's max_in_flight, 3; got 4"):
        backend.prefetch([], depth=4)
    backend.prefetch([], depth=3)


def test_max_in_flight_bounds_several_prefetches_together(
    gate: Gate, connect: Any, batches: Any, draft_ids: Any
) -> None:
    backend = connect(gate, draft_ids, max_in_flight=2)
    gate.open()
    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(list, backend.prefetch(batches, depth=2)) for _ in range(3)]
        assert all(len(run.result(PATIENCE_S)) == len(batches) for run in runs)
    assert gate.most_in_flight == 2


# --- failures ---


def test_a_failed_request_raises_at_its_turn_and_ends_the_prefetch(
    bridge: Any, connect: Any, model: Any, batches: Any, draft_ids: Any, inputs: Any, expect: Any,
    matches: Any,
) -> None:  # fmt: skip
    backend = connect(bridge, draft_ids, exact=True)
    # While no forward runs: the target hooks the model it owns.
    expected = [expect(model, type(inputs)(*plain), draft_ids) for plain in batches[:3]]
    given = [*batches[:3], bad(batches[3]), *batches[4:]]
    prefetch = backend.prefetch(given, depth=3)
    for supervision in expected:
        matches(next(prefetch)[1], supervision)
    with pytest.raises(InvalidRequest, match="131"):
        next(prefetch)
    assert list(prefetch) == []
    assert len(list(backend.prefetch(batches))) == len(batches)


def test_a_failure_of_the_source_is_raised_after_the_batches_before_it(
    bridge: Any, connect: Any, batches: Any, draft_ids: Any
) -> None:
    error = OSError("the disk is gone")

    def source() -> Iterator[Any]:
        yield from batches[:2]
        raise error

    backend = connect(bridge, draft_ids)
    prefetch = backend.prefetch(source(), depth=5)
    assert next(prefetch)[0] is batches[0]
    assert next(prefetch)[0] is batches[1]
    with pytest.raises(OSError, match="the disk is gone") as caught:
        next(prefetch)
    assert caught.value is error
    assert list(prefetch) == []
    backend.generate_batch(*batches[0])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda batch: batch.pop("loss_mask"), InvalidRequest, "batch 1 .*without loss_mask"),
        (lambda batch: batch.update(loss_mask=[1]), InvalidRequest, "loss_mask must be"),
        (
            lambda batch: batch.update(loss_mask=torch.ones(1, 1)),
            InvalidRequest,
            "loss_mask must have the shape",
        ),
        (
            lambda batch: batch.update(position_ids=batch["input_ids"]),
            PackingUnsupported,
            "position_ids",
        ),
    ],
    ids=["missing", "no-tensor", "shape", "packed"],
)
def test_a_malformed_batch_raises_at_its_turn(
    change: Any, error: type[Exception], words: str, bridge: Any, connect: Any, batches: Any,
    draft_ids: Any,
) -> None:  # fmt: skip
    backend, given = connect(bridge, draft_ids), as_dicts(batches)
    change(given[1])
    prefetch = backend.prefetch(given, depth=4)
    assert next(prefetch)[0] is given[0]
    with pytest.raises(error, match=words):
        next(prefetch)
    assert list(prefetch) == []
    backend.generate_batch(*batches[0])


def test_without_a_draft_vocab_the_first_batch_says_so(
    bridge: Any, connect: Any, batches: Any
) -> None:
    with pytest.raises(VocabMappingMissing, match="call set_vocab_mapping first"):
        next(connect(bridge).prefetch(batches))


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
