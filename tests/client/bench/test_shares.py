"""What bounds a run is named as it was planted, and its figures are those of their definitions."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
from tests.client.bench.simulation import pipeline

from eagle3_client.bench_shares import (
    Figures,
    Sample,
    Visit,
    bound_by,
    percentile,
    union,
)

SLOW = 0.2


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize(
    ("planted", "named"),
    [
        ({"compute": SLOW}, "target_compute"),
        ({"head": SLOW}, "target_head_copy"),
        ({"copy": SLOW}, "target_head_copy"),
        ({"queue": SLOW}, "server_queue"),
        ({"link": SLOW}, "link"),
        ({"host": SLOW}, "this_host"),
        ({"step": 2 * SLOW, "compute": SLOW / 2}, "trainer"),
    ],
)
def test_what_was_planted_is_named(depth: int, planted: dict[str, float], named: str) -> None:
    found = Figures.of([pipeline(depth, **planted)])  # type: ignore[arg-type]
    assert found.bounded_by == named, found
    assert found.bound_share is not None
    assert found.bound_share > (0.75 if depth == 1 else 0.85)


def test_a_target_a_little_slower_than_the_trainer_is_named_though_the_wait_is_short() -> None:
    """The trainer's short waits fall in the end of each request, which is not what bounds."""
    found = Figures.of([pipeline(2, step=0.1, compute=0.1, head=0.02, link=0.05, host=0.03)])
    assert 0.05 < found.wait_share < 0.25
    assert found.bounded_by == "target_compute"
    assert found.busy_shares["target"] > 0.99


def test_a_trainer_that_waits_a_twentieth_is_still_the_bound() -> None:
    shares = {"target": 1.0, "queue": 0.0, "link": 0.0, "host": 0.0}
    assert bound_by(0.05, shares, {"compute": 1.0}) == "trainer"
    assert bound_by(0.051, shares, {"compute": 1.0}) == "target_compute"


def test_waiting_behind_requests_of_our_own_is_no_queue() -> None:
    found = Figures.of([pipeline(4, compute=SLOW)])
    assert (found.stages_ms["queue"] or 0) > 1000 * SLOW  # each waits behind three of ours
    assert found.busy_shares["queue"] < 0.01


def test_each_server_has_a_queue_of_its_own() -> None:
    """One of ours is computed on the other server; ours here waits for others all the same."""
    here = Sample(1, 0.0, 0.0, "http://a", 1, 0.0, 10.0, 10.0, 10.0)
    here.stages = {"queue": 8.0, "compute": 2.0, "total": 10.0}
    there = Sample(1, 0.0, 0.0, "http://b", 1, 0.0, 10.0, 10.0, 10.0)
    there.stages = {"compute": 10.0, "total": 10.0}
    busy = Visit(0.0, 10.0, 10.0, [here, there]).busy_s()
    assert busy == pytest.approx({"queue": 8.0, "target": 10.0, "link": 0.0, "host": 0.0})
    there.url = here.url
    assert Visit(0.0, 10.0, 10.0, [here, there]).busy_s()["queue"] == pytest.approx(0.0)


def test_two_servers_carry_twice_as_much() -> None:
    one, two = (pipeline(4, compute=SLOW, servers=n).tokens_per_s for n in (1, 2))
    assert two == pytest.approx(2 * one, rel=0.05)


def test_shares_waits_and_speeds_are_what_was_simulated() -> None:
    """Depth 1: step and request pass side by side, and the request is the longer."""
    visit = pipeline(
        1, step=0.1, compute=0.1, head=0.05, copy=0.0, link=0.03, host=0.02, count=10, tokens=7
    )
    found = Figures.of([visit])
    assert visit.elapsed_s == pytest.approx(10 * 0.2)
    assert found.tokens_per_s == pytest.approx(7 / 0.2)
    assert found.wait_share == pytest.approx(0.5)
    expected = {"target": 0.75, "queue": 0.0, "link": 0.15, "host": 0.1}
    assert found.busy_shares == pytest.approx(expected)
    assert found.bound_share == pytest.approx(0.75)
    medians = {"queue": 0.0, "compute": 100, "head": 50, "copy": 0, "send": 30, "host": 20}
    assert found.stages_ms == pytest.approx(medians, abs=1e-6)
    assert found.latency_ms["p50"] == pytest.approx(200)
    assert (found.requests, found.rounds, found.repeats) == (10, 1, 0)


def test_speed_is_the_median_of_the_rounds_and_the_range_is_told() -> None:
    visits = [pipeline(1, compute=seconds) for seconds in (0.36, 0.06, 0.16)]
    found = Figures.of(visits)
    speeds = [found.tokens_per_s_lowest, found.tokens_per_s, found.tokens_per_s_highest]
    assert speeds == pytest.approx([10 / 0.4, 10 / 0.2, 10 / 0.1])


def latencies(values: list[float]) -> dict[str, float | None]:
    samples = []
    for value in values:
        samples.append(Sample(1, 0.0, 0.0, "http://a", 1, 0.0, value, value, value))
        samples[-1].stages = {"total": value}
    return Figures.of([Visit(0.0, 1.0, 0.5, samples)]).latency_ms


def test_percentiles_are_those_of_the_samples() -> None:
    values = [((i * 37) % 101) / 7 for i in range(101)]  # in no order
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    found = latencies(values)
    assert found == pytest.approx(
        {"p50": 1000 * cuts[49], "p90": 1000 * cuts[89], "p99": 1000 * cuts[98]}
        | {"max": 1000 * max(values)}
    )
    assert percentile(values, 90) == pytest.approx(sorted(values)[90])  # 101 values: no rounding
    assert found["p50"] == pytest.approx(1000 * statistics.median(values))


def test_of_fewer_than_100_requests_there_is_no_99th_percentile() -> None:
    assert latencies([1.0] * 99)["p99"] is None
    assert latencies([1.0] * 100)["p99"] == pytest.approx(1000)
    assert latencies([3.0]) == {"p50": 3000.0, "p90": 3000.0, "p99": None, "max": 3000.0}


def test_without_the_servers_times_only_the_trainer_can_be_told() -> None:
    for step, named in ((0.0, None), (1.0, "trainer")):
        visit = pipeline(1, step=step, compute=0.1)
        visit.delivered[3].stages = {}
        found = Figures.of([visit])
        assert (found.bounded_by, found.busy_shares) == (named, {})


def test_repeats_are_counted_and_their_bytes_too() -> None:
    visit: Any = pipeline(1, count=4, tokens=10)
    for sample in visit.delivered:
        sample.sent_bytes, sample.received_bytes = 40, 300
    visit.delivered[0].attempts, visit.delivered[0].sent_bytes = 3, 120
    found = Figures.of([visit])
    assert found.repeats == 2
    assert (found.sent_bytes_per_token, found.received_bytes_per_token) == (240 / 40, 30)


def test_spans_are_joined_in_any_order() -> None:
    assert union([(5, 6), (1, 2), (2, 3), (5.5, 7), (1, 1.5)]) == [(1, 3), (5, 7)]
    assert union([]) == []
