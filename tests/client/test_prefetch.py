"""`RemoteEagle3Backend.prefetch`: order, depth, failures, against a real target."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tests.client.gate import NAMES, PATIENCE_S, Gate, as_dicts, bad, pulled_from
from torch.utils.data import DataLoader, TensorDataset

from eagle3_client import (
    InvalidRequest,
    VocabMappingMissing,
)

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
            InvalidRequest,
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
