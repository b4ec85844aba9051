"""What a prefetch measures and how deep it goes, in simulated time: no threads, no waiting."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tests.client.prefetch_simulation import BATCH, Simulation, changes

from eagle3_client import InvalidRequest, Prefetch, PrefetchStats
from eagle3_client.pace import Depth, choose_depth

# --- depth="auto" ---


def test_a_trainer_slower_than_the_target_stays_at_depth_1() -> None:
    simulation = Simulation(lambda _: 0.8, transfer_s=0.1)
    assert set(simulation.depths(Depth(1, 8), lambda _: 1.0, 400)) == {1}
    assert simulation.most_outstanding == 1


def test_depth_grows_until_the_trainer_no_longer_waits_and_not_further() -> None:
    """2.8 s for a batch and 1 s for a step: three in flight hide it, two do not."""
    simulation = Simulation(lambda _: 0.3, transfer_s=2.5)
    depths = simulation.depths(Depth(1, 8), lambda _: 1.0, 1000)
    assert changes(depths) == [1, 2, 3]
    assert depths[60:] == [3] * 940
    assert simulation.most_outstanding == 3


@pytest.mark.parametrize(
    ("servers", "transfer_s", "useful"), [(1, 0.0, 1), (1, 0.5, 2), (2, 0.0, 2), (4, 0.0, 4)]
)
def test_a_target_at_its_limit_ends_growth_at_the_depth_that_keeps_it_busy(
    servers: int, transfer_s: float, useful: int
) -> None:
    simulation = Simulation(lambda _: 2.0, transfer_s, servers)
    depths = simulation.depths(Depth(1, 8), lambda _: 0.2, 130)
    assert changes(depths) == [*range(1, useful + 2), useful]
    assert depths[-40:] == [useful] * 40
    assert max(depths) == useful + 1


def test_a_useless_growth_is_tried_again_ever_more_rarely() -> None:
    """A server that was slow for a passing reason must not decide over a run of days."""
    depths = Simulation(lambda _: 2.0).depths(Depth(1, 8), lambda _: 1.0, 800)
    tried = [i for i in range(1, 800) if depths[i] > depths[i - 1]]
    assert changes(depths)[:7] == [1, 2, 1, 2, 1, 2, 1]
    assert tried[1] - tried[0] > 100
    assert tried[2] - tried[1] > 200
    assert sum(depth == 2 for depth in depths) < 50


def test_a_target_that_was_slow_for_a_while_is_followed_later() -> None:
    """A server that is down while growth is on trial; after that a deeper prefetch would do."""
    simulation = Simulation(lambda n: 500.0 if 16 <= n < 26 else 0.3, transfer_s=2.5)
    assert simulation.depths(Depth(1, 8), lambda _: 1.0, 1000)[-1] == 3


def test_jitter_of_the_target_is_bridged_and_then_growth_ends() -> None:
    """Every fourth batch takes three steps, the others next to nothing: the mean is below one."""
    simulation = Simulation(lambda n: 3.0 if n % 4 == 3 else 0.1)
    depths = simulation.depths(Depth(1, 8), lambda _: 1.0, 400)
    assert changes(depths) == [1, 2, 3]


def test_jitter_of_the_trainer_alone_never_grows() -> None:
    simulation = Simulation(lambda _: 0.5)
    depths = simulation.depths(Depth(1, 8), lambda step: 0.6 + step % 5, 400)
    assert set(depths) == {1}


def test_the_first_steps_decide_nothing() -> None:
    """A target that warms up, a trainer that compiles."""
    simulation = Simulation(lambda n: 50.0 if n < 4 else 0.5)
    assert set(simulation.depths(Depth(1, 8), lambda _: 1.0, 200)) == {1}


def test_a_small_wait_is_no_reason_to_grow() -> None:
    simulation = Simulation(lambda _: 1.04)
    assert set(simulation.depths(Depth(1, 8), lambda _: 1.0, 200)) == {1}


def test_it_follows_a_target_that_becomes_slower() -> None:
    simulation = Simulation(lambda _: 0.3, transfer_s=0.2)
    depth = Depth(1, 8)
    assert simulation.depths(depth, lambda _: 1.0, 100)[-1] == 1
    simulation.transfer_s = 1.5
    assert simulation.depths(depth, lambda _: 1.0, 100)[-1] == 2


def test_the_backend_is_told_before_a_prefetch_goes_deeper() -> None:
    """Else its worker threads would not be enough, and no growth would bring anything."""
    simulation = Simulation(lambda _: 0.0, transfer_s=100.0)
    allowed: list[int] = []

    def submit(*arguments: object) -> Any:
        arrival = simulation.submit(*arguments)
        assert simulation.outstanding <= allowed[-1]
        return arrival

    given = [BATCH] * 200
    prefetch = Prefetch(
        submit, given, Depth(1, 4), allow_in_flight=allowed.append, clock=lambda: simulation.now
    )
    assert len(list(prefetch)) == 200
    assert (allowed[0], allowed[-1]) == (1, 4)


def test_auto_depth_is_bounded() -> None:
    simulation = Simulation(lambda _: 0.0, transfer_s=100.0)
    assert changes(simulation.depths(Depth(1, 4), lambda _: 0.1, 400)) == [1, 2, 3, 4]
    assert simulation.most_outstanding == 4


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_a_depth_that_was_given_is_kept(depth: int) -> None:
    simulation = Simulation(lambda _: 0.0, transfer_s=100.0)
    assert set(simulation.depths(choose_depth(depth, 1, None), lambda _: 0.1, 100)) == {depth}
    assert simulation.most_outstanding == depth


def test_auto_goes_to_max_in_flight_or_eight_a_server() -> None:
    def most(servers: int, max_in_flight: int | None) -> int:
        simulation = Simulation(lambda _: 0.0, transfer_s=1e6)
        depth = choose_depth("auto", servers, max_in_flight)
        return max(simulation.depths(depth, lambda _: 0.1, 1500))

    assert (most(1, None), most(2, None), most(2, 3), most(1, 1)) == (8, 16, 3, 1)


@pytest.mark.parametrize("depth", [0, -1, 1.0, True, "deep", None])
def test_a_depth_that_cannot_be_is_refused(depth: Any) -> None:
    with pytest.raises(InvalidRequest, match="int >= 1 or 'auto'"):
        choose_depth(depth, 1, None)


# --- stats ---


def test_stats_count_what_the_trainer_waited_for() -> None:
    """By hand: the first batch fills the pipeline; then wait, source and training make a step."""
    simulation = Simulation(lambda n: [7.0, 3.0, 1.0][n])

    def source() -> Iterator[Any]:
        for _ in range(3):
            simulation.now += 0.5
            yield BATCH

    prefetch = Prefetch(simulation.submit, source(), Depth(1, 1), clock=lambda: simulation.now)
    assert prefetch.stats == PrefetchStats(depth=1)
    next(prefetch)  # 0.5 to pull, 7 to wait, 0.5 to pull the next: delivered at 8
    assert prefetch.stats == PrefetchStats(first_wait_s=8.0, depth=1)
    simulation.now += 1.0  # trains until 9
    next(prefetch)  # asked for at 8, there at 11; 0.5 to pull: delivered at 11.5
    expected = PrefetchStats(1, 3.5, 2.0, 0.5, 2.0, 8.0, depth=1)
    assert prefetch.stats == expected
    simulation.now += 2.0
    next(prefetch)  # asked for at 11.5, there at 12.5; the trainer came at 13.5
    assert prefetch.stats == PrefetchStats(2, 5.5, 2.0, 0.5, 0.0, 8.0, depth=1)
    assert prefetch.stats.wait_share == pytest.approx(2.0 / 5.5)
    assert prefetch.stats.source_share == pytest.approx(0.5 / 5.5)
    with pytest.raises(StopIteration):
        next(prefetch)
    assert prefetch.stats.steps == 2


@pytest.mark.parametrize(
    ("wait_s", "source_s", "words"),
    [
        (4.0, 1.0, "the target is the bottleneck"),
        (1.0, 4.0, "the batches are the bottleneck"),
        (0.4, 0.4, "the trainer is the bottleneck"),
    ],
)
def test_stats_say_in_words_what_the_bottleneck_was(
    wait_s: float, source_s: float, words: str
) -> None:
    stats = PrefetchStats(4, 10.0, wait_s, source_s, 0.0, 1.5, 2)
    assert str(stats) == (
        f"{words}: of 4 steps' 10.00 s the trainer waited {wait_s:.2f} s ({wait_s / 10:.0%}) for "
        f"the target and {source_s:.2f} s ({source_s / 10:.0%}) for batches, at depth 2; first "
        "batch after 1.50 s"
    )


def test_stats_of_no_step_claim_no_bottleneck() -> None:
    assert str(PrefetchStats(first_wait_s=2.0)) == "no step yet; first batch after 2.00 s"


def test_the_end_is_logged_once(caplog: Any) -> None:
    simulation = Simulation(lambda _: 2.0)
    with caplog.at_level("INFO", logger="eagle3_client"):
        prefetch = Prefetch(
            simulation.submit, [BATCH] * 4, Depth(1, 1), clock=lambda: simulation.now
        )
        for _ in prefetch:
            pass
        prefetch.close()
    (record,) = caplog.records
    assert record.getMessage() == f"prefetch ended: {prefetch.stats}"
    assert "the target is the bottleneck: of 3 steps' 6.00 s" in record.getMessage()
