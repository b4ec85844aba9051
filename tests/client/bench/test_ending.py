"""A bench that cannot do all it was asked for says so, and ends."""

from __future__ import annotations

import re
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.client.bench.simulation import PLAN, Clock, Planted, settings_of

from eagle3_client import TransportError
from eagle3_client import bench as bench_module
from eagle3_client.bench import Bench
from eagle3_client.bench_plan import BenchPlan


def test_an_encoding_that_is_not_offered_has_a_row_that_says_so(
    bridge: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eagle3_client.dispatch import Dispatcher

    info = Dispatcher.model_info
    monkeypatch.setattr(
        Dispatcher,
        "model_info",
        lambda self: info(self).model_copy(update={"encodings": ("probs", "logits")}),
    )
    plan = replace(PLAN, encodings=("probs", "hidden"), depths=(1, 2), steps=2)
    report = Bench(
        settings_of(), plan, Planted(bridge, clock, compute=0.1), clock=clock, sleep=clock.sleep
    ).run()
    assert [cell.encoding for cell, _ in report.measured] == ["probs", "probs"]
    assert report.has_passed
    (line,) = (line for line in report.to_text().splitlines() if "not offered" in line)
    assert line == "  -        hidden 1,2     not offered: this target has probs, logits"


def test_what_exact_forbids_is_said(clock: Clock, bridge: Any) -> None:
    settings = settings_of(exact=True, device=torch.device("meta"))  # no CPU, as a GPU
    plan = replace(PLAN, encodings=("hidden",))
    report = Bench(settings, plan, bridge, clock=clock, sleep=clock.sleep).run()
    (cell,) = report.cells
    assert cell.trouble is not None
    assert "exact=True forbids encoding 'hidden'" in cell.trouble.detail
    assert not report.has_passed  # nothing was measured


def test_a_refusal_fails_its_cells_in_the_servers_words(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another server of the fleet takes less than the first one said."""
    from eagle3_client.dispatch import Dispatcher

    info = Dispatcher.model_info

    def told(self: Dispatcher) -> Any:
        found = info(self)
        limits = found.limits.model_copy(update={"max_tokens_per_request": 10**6})
        return found.model_copy(update={"limits": limits})

    monkeypatch.setattr(Dispatcher, "model_info", told)
    report, _ = run(replace(PLAN, batch_size=4000))
    assert not report.has_passed
    assert {cell.trouble.status for cell in report.cells} == {"failed"}
    assert report.unanswered is None
    assert "max_tokens_per_request" in report.to_text()
    assert report.recommendation() == "nothing was measured"


def test_a_time_limit_leaves_cells_out_aloud(run: Any, clock: Clock) -> None:
    """A batch takes 10 s: warming up takes 60, two batches at depth 1 30, four at depth 4 110."""
    began = clock.now
    report, _ = run(replace(PLAN, depths=(1, 4), steps=30, time_limit_s=160.0), compute=10.0)
    assert clock.now - began <= 160
    assert [(c.encoding, c.prefetch, len(c.visits)) for c in report.cells if c.visits] == [
        ("probs", 1, 1),
        ("logits", 1, 1),
        ("hidden", 1, 1),
    ]
    left = [cell for cell in report.cells if cell.trouble is not None]
    assert [cell.prefetch for cell in left] == [4, 4, 4]
    text = " ".join(report.to_text().split())
    assert "hidden 4 left out, by --time-limit: it takes about 110 s" in text
    assert report.has_passed


@pytest.mark.parametrize(
    ("limit_s", "rounds", "counts"),
    [(1e4, 3, (4, 4)), (100.0, 3, (2, 2)), (60.0, 2, (2, 2)), (43.0, 1, (3, 4))],
)
def test_rounds_and_batches_follow_the_time_there_is(
    run: Any, limit_s: float, rounds: int, counts: tuple[int, int]
) -> None:
    """Of 0.95 of it 6 s warm up; a round takes 12 s, and 6 a batch (even ones at depth 2)."""
    plan = replace(PLAN, depths=(1, 2), encodings=("probs",), steps=12, time_limit_s=limit_s)
    report, _ = run(plan, compute=3.0)
    found = [(len(cell.visits), {len(v.delivered) for v in cell.visits}) for cell in report.cells]
    assert found == [(rounds, {count}) for count in counts]


@pytest.mark.parametrize("is_interrupt", [False, True])
@pytest.mark.parametrize(
    ("plan", "answered", "rounds"),
    [  # two of each encoding warm up; a visit has two at depth 1, and is one of three
        (replace(PLAN, steps=2), 6 + 1, set()),
        (replace(PLAN, encodings=("probs",), depths=(1,), steps=4), 2 + 2 + 1, {1}),
    ],
    ids=["in the first round", "in the second"],
)
def test_a_server_that_hangs_is_named_beside_what_was_measured(
    gate: Any, monkeypatch: pytest.MonkeyPatch, plan: BenchPlan, answered: int, rounds: set[int],
    is_interrupt: bool,
) -> None:  # fmt: skip
    """The limit, or an interrupt, comes while a request is held."""
    gate.is_open = False
    gate.allowed.release(answered)

    class Thread:
        """Ends its caller's wait when a request is held."""

        def __init__(self, target: Any) -> None:
            self.thread, self.is_held = threading.Thread(target=target, daemon=True), False
            self.thread.start()

        def join(self, timeout: float) -> None:
            if self.is_held:
                return self.thread.join(60)  # the limit closed the dispatcher
            gate.wait_for(answered + 1)
            self.is_held = True
            if is_interrupt:
                raise KeyboardInterrupt

    monkeypatch.setattr(bench_module, "start_daemon", lambda target, name: Thread(target))
    report = Bench(settings_of(), plan, gate).run()
    assert report.is_interrupted == is_interrupt
    assert {len(cell.visits) for cell, _ in report.measured} == rounds
    left = {cell.trouble.detail for cell in report.cells if cell.trouble is not None}
    words = "interrupted" if is_interrupt else "left out, by --time-limit: it was over"
    assert left == (set() if rounds else {words})
    waited = r"[\d.e+-]+ s without an answer from http://target"
    assert re.fullmatch(waited, report.to_dict()["unanswered"])
    last = " ".join(report.to_text().split("\n\n")[-1].split())
    assert re.search(rf"(in|interrupted after) [\d.]+ s, after {waited}$", last)


def test_no_server_is_told_in_the_words_of_a_failure() -> None:
    with pytest.raises(TransportError, match=r"127\.0\.0\.1:9"):
        Bench(settings_of(urls=("http://127.0.0.1:9",)), PLAN).run()
