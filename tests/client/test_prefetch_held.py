"""What a prefetch holds, and lets go of, in simulated time: no threads, no waiting."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from tests.client.prefetch_simulation import BATCH, ONES, Simulation

from eagle3_client import InvalidRequest, Prefetch, TargetFailed
from eagle3_client.pace import Depth


@pytest.mark.parametrize("depth", [1, 3])
def test_at_most_depth_and_the_delivered_batch_are_alive(depth: int) -> None:
    simulation = Simulation(lambda _: 1.0)
    prefetch = Prefetch(simulation.submit, [BATCH] * 10, Depth(depth, depth))
    for count in range(1, 11):
        delivered = next(prefetch)
        assert len(simulation.results) == 1 + min(depth, 10 - count)
        del delivered
        assert len(simulation.results) == min(depth, 10 - count), "it keeps what it delivered"


class Source:
    """An iterator that fails; a DataLoader's would keep its workers as long as it lives."""

    def __init__(self, good: int) -> None:
        self.good = good

    def __iter__(self) -> Source:
        return self

    def __next__(self) -> Any:
        self.good -= 1
        if self.good < 0:
            raise OSError("the disk is gone")
        return BATCH


@pytest.mark.parametrize("end", ["error", "close", "drop"])
def test_the_iterator_is_dropped_at_the_end_without_the_garbage_collector(end: str) -> None:
    source = Source(good=1 if end == "error" else 100)
    held = weakref.ref(source)
    gc.disable()
    try:
        prefetch = Prefetch(Simulation(lambda _: 1.0).submit, source, Depth(2, 2))
        del source
        next(prefetch)
        if end == "error":
            with suppress(OSError):  # pytest.raises would keep it
                next(prefetch)
        elif end == "close":
            prefetch.close()
        else:
            del prefetch
        assert held() is None
    finally:
        gc.enable()


def test_a_generator_that_the_caller_keeps_goes_on_after_the_last_batch_pulled() -> None:
    batches: Iterator[Any] = ({"n": n, **dict.fromkeys(NAMES, ONES)} for n in range(10))
    with Prefetch(Simulation(lambda _: 1.0).submit, batches, Depth(2, 2)) as prefetch:
        assert next(prefetch)[0]["n"] == 0
    assert next(batches)["n"] == 3


NAMES = ("input_ids", "attention_mask", "loss_mask")


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"input_ids": ONES, "loss_mask": ONES}, r"\['input_ids', 'loss_mask'\], without atten"),
        ({**dict.fromkeys(NAMES, ONES), "loss_mask": [1, 1]}, "loss_mask must be a .*got list"),
        ({**dict.fromkeys(NAMES, ONES), "seq_lens": 3}, "seq_lens must be a .*got int"),
        ((ONES, ONES), "input_ids, attention_mask, loss_mask.*got 2 values"),
        ((ONES,) * 7, "got 7 values"),
        ((ONES, ONES, None), "loss_mask must be a torch.Tensor; got NoneType"),
        (ONES, "a dict with input_ids, .* got Tensor"),
        ("text", "got str"),
    ],
)
def test_a_batch_that_is_none_is_refused_at_its_turn_and_named(batch: Any, words: str) -> None:
    simulation = Simulation(lambda _: 1.0)
    prefetch = Prefetch(simulation.submit, [BATCH, BATCH, batch, BATCH], Depth(4, 4))
    assert next(prefetch)[0] is BATCH
    next(prefetch)
    with pytest.raises(InvalidRequest, match=rf"batch 2 \(from 0\).*{words}"):
        next(prefetch)
    assert list(prefetch) == []
    assert simulation.submitted == 2


def test_what_is_in_flight_behind_a_failure_is_cancelled_once() -> None:
    simulation = Simulation(lambda _: 1.0)
    simulation.failing = {1}
    prefetch = Prefetch(simulation.submit, [BATCH] * 9, Depth(3, 3))
    next(prefetch)
    with pytest.raises(TargetFailed):
        next(prefetch)
    assert list(prefetch) == []
    prefetch.close()
    assert sorted(simulation.cancelled) == [1, 2, 3]


def test_batches_that_are_no_iterable_are_refused_at_once() -> None:
    with pytest.raises(InvalidRequest, match="iterable of dicts or tuples; got int"):
        Prefetch(Simulation(lambda _: 1.0).submit, 3, Depth(1, 1))  # type: ignore[arg-type]


def test_an_interrupt_while_pulling_ends_the_prefetch() -> None:
    """Going on after it would leave a batch out in silence."""

    def source() -> Iterator[Any]:
        yield BATCH
        raise KeyboardInterrupt

    prefetch = Prefetch(Simulation(lambda _: 1.0).submit, source(), Depth(1, 1))
    with pytest.raises(KeyboardInterrupt):
        next(prefetch)
    assert list(prefetch) == []
