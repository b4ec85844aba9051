"""A bench of a real server: what it counts, what it names, and how it ends."""

from __future__ import annotations

import itertools
import struct
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.client.bench.simulation import Clock, Planted

from eagle3_client import InvalidRequest, TransportError
from eagle3_client import bench as bench_module
from eagle3_client import submission as submission_module
from eagle3_client.bench import Bench
from eagle3_client.bench_plan import BenchPlan
from eagle3_client.bench_report import BenchReport
from eagle3_client.config import ClientSettings
from eagle3_server import TransformersTarget

HIDDEN, VOCAB = 48, 131
PLAN = BenchPlan(depths=(1,), batch_size=2, sequence_length=9, steps=3, draft_vocab_size=50)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def run(bridge: Any, clock: Clock) -> Callable[..., tuple[BenchReport, Planted]]:
    """`run(plan, **planted)`: a bench in simulated time, and what its transport saw."""

    def build(
        plan: BenchPlan = PLAN, settings: dict[str, Any] | None = None, **planted: Any
    ) -> tuple[BenchReport, Planted]:
        transport = Planted(bridge, clock, **planted)
        chosen = settings_of(**(settings or {}))
        return Bench(chosen, plan, transport, clock=clock, sleep=clock.sleep).run(), transport

    return build


def settings_of(**changes: Any) -> ClientSettings:
    named: dict[str, Any] = {"urls": ("http://target",), "device": torch.device("cpu")}
    return ClientSettings(**(named | {"rows": "loss_mask", "retry_for_s": 0.0} | changes))


def test_every_encoding_at_every_depth_is_measured(run: Any) -> None:
    report, transport = run(replace(PLAN, depths=(1, 2), steps=4), compute=0.5)
    cells = [(cell.encoding, cell.prefetch, len(cell.visits)) for cell in report.cells]
    encodings = ("probs", "logits", "hidden")
    assert cells == [(each, depth, 3) for depth in (1, 2) for each in encodings]
    assert report.has_passed
    # Two of each encoding to warm up; then a visit measures one, or two where they come in twos,
    # after as many as its depth, and has the depth in flight to the end.
    assert [len(cell.visits[0].delivered) for cell in report.cells] == [1, 1, 1, 2, 2, 2]
    assert len(transport.sent) == 3 * 2 + 3 * 3 * ((1 + 1) + (2 + 2 + 1))


@pytest.mark.parametrize(
    ("planted", "named", "share"),
    [
        ({"compute": 0.6, "head": 0.2, "copy": 0.1, "down": 0.1}, "target_compute", 0.9),
        ({"compute": 0.2, "head": 0.3, "down": 0.5}, "target_head_copy", 0.5),
        ({"compute": 0.2, "down": 0.8}, "link", 0.8),
        ({"compute": 0.2, "up": 0.8}, "link", 0.8),
        ({"queue": 0.8, "compute": 0.2}, "server_queue", 0.8),
    ],
)
def test_what_was_planted_is_named(run: Any, planted: Any, named: str, share: float) -> None:
    report, _ = run(replace(PLAN, encodings=("hidden",)), **planted)
    assert len(report.measured) == 1
    for _, found in report.measured:
        assert found.bounded_by == named
        assert found.bound_share == pytest.approx(share)
        assert found.wait_share == pytest.approx(1)
        assert found.tokens_per_s == pytest.approx(2 * 9)  # a batch takes a second
        assert found.latency_ms["p50"] == pytest.approx(1000)
        assert found.stages_ms["compute"] == pytest.approx(1000 * planted["compute"])
        assert found.stages_ms["send"] == pytest.approx(1000 * planted.get("down", 0.0))


def test_this_host_is_named(run: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    unpack = submission_module.unpack_response

    def slow(*args: Any, **kwargs: Any) -> Any:
        clock.sleep(0.7)
        return unpack(*args, **kwargs)

    monkeypatch.setattr(submission_module, "unpack_response", slow)
    report, _ = run(replace(PLAN, encodings=("probs", "hidden")), compute=0.3)
    assert len(report.measured) == 2
    for _, found in report.measured:
        assert (found.bounded_by, found.stages_ms["host"]) == ("this_host", pytest.approx(700))


def test_the_trainers_step_is_named(bridge: Any, clock: Clock) -> None:
    """Its sleep ends when the target has long answered: a trainer that never waits."""
    transport = Planted(bridge, clock, compute=0.1)
    wanted = itertools.count(4, 2)  # two that warm up, then in each visit one, and one a step

    def sleep(seconds: float) -> None:
        count = next(wanted)
        with transport.changed:
            assert transport.changed.wait_for(lambda: len(transport.sent) >= count, 60)
        clock.sleep(seconds)

    plan = replace(PLAN, encodings=("probs",), step_s=0.9)
    report = Bench(settings_of(), plan, transport, clock=clock, sleep=sleep).run()
    ((_, found),) = report.measured
    assert found.bounded_by == "trainer"
    assert found.wait_share == pytest.approx(0)
    assert "a faster one gains nothing" in report.to_text()


def test_a_forward_that_is_slow_on_a_real_socket_is_named(
    build_model: Any, live_server: Any
) -> None:
    class Slow(TransformersTarget):
        def supervise(self, job: Any) -> Any:
            threading.Event().wait(0.05)  # ten times all else
            return super().supervise(job)

    url = live_server(Slow(build_model("llama"), model_id="tiny"))
    plan = replace(PLAN, depths=(1, 2), encodings=("probs", "hidden"))
    report = Bench(settings_of(urls=(url,)), plan).run()
    assert [found.bounded_by for _, found in report.measured] == ["target_compute"] * 4
    assert report.answered == {url: 18}


def aligned(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


@pytest.mark.parametrize(
    ("encoding", "row_bytes"), [("probs", 50 * 4), ("logits", 50 * 4), ("hidden", HIDDEN * 4)]
)
@pytest.mark.parametrize("aux_dtype", ["model", "float8_e4m3"])
def test_bytes_are_those_of_the_frames(
    run: Any, encoding: str, row_bytes: int, aux_dtype: str
) -> None:
    """By hand, from docs/protocol.md: 3H aux values a token, one row a supervised token, bits."""
    plan = replace(PLAN, encodings=(encoding,), supervised_share=0.5)
    report, transport = run(plan, settings={"aux_dtype": aux_dtype}, compute=0.1)
    attended, supervised = 2 * 9, 2 * 4  # floor(0.5 * 9) a row, none of them in its first column
    assert report.setup["tokens_per_batch"] == attended
    assert report.setup["supervised_per_batch"] == supervised
    aux = [attended * 3 * HIDDEN * 4]
    if aux_dtype != "model":  # a byte each, and a float32 scale for 64 of them
        aux = [attended * 3 * HIDDEN, attended * -(-3 * HIDDEN // 64) * 4]
    segments = [*aux, supervised * row_bytes, -(-attended // 8)]
    for body in transport.received:
        (header,) = struct.unpack_from("<I", body, 8)
        overhead = aligned(24 + header)
        assert len(body) - overhead in {
            sum(map(aligned, order[:-1])) + order[-1] for order in itertools.permutations(segments)
        }
    ((_, found),) = report.measured
    (received,), (sent,) = set(map(len, transport.received)), set(map(len, transport.sent))
    assert found.received_bytes_per_token == received / attended
    assert found.sent_bytes_per_token == sent / attended


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


def test_a_server_that_hangs_ends_with_what_was_measured(
    gate: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit, and an interrupt, come while a request is held."""
    for is_interrupt in (False, True):
        gate.is_open = False
        gate.allowed.release(6 + 1)  # those that warm up, and some more
        held = threading.Event()

        class Thread:
            """Ends its caller's wait when a request is held."""

            def __init__(self, target: Any, is_interrupt: bool, held: Any) -> None:
                self.thread = threading.Thread(target=target, daemon=True)
                self.thread.start()
                self.is_interrupt, self.held = is_interrupt, held

            def join(self, timeout: float) -> None:
                if self.held.is_set():
                    return self.thread.join(60)  # the limit closed the dispatcher
                gate.wait_for(8)
                self.held.set()
                if self.is_interrupt:
                    raise KeyboardInterrupt

        monkeypatch.setattr(
            bench_module,
            "start_daemon",
            lambda target, name, i=is_interrupt, h=held: Thread(target, i, h),
        )
        report = Bench(settings_of(), replace(PLAN, steps=2), gate).run()
        assert report.is_interrupted == is_interrupt
        assert not report.measured
        words = "interrupted" if is_interrupt else "left out, by --time-limit: it was over"
        assert {cell.trouble and cell.trouble.detail for cell in report.cells} == {words}
        gate.allowed.release()


def test_no_server_is_told_in_the_words_of_a_failure() -> None:
    with pytest.raises(TransportError, match=r"127\.0\.0\.1:9"):
        Bench(settings_of(urls=("http://127.0.0.1:9",)), PLAN).run()


def test_ids_are_distinct_in_no_order_and_a_text_is_repeated(bridge: Any, connect: Any) -> None:
    info = connect(bridge).model_info()
    ids = PLAN.draft_vocab(info).selected_token_ids.tolist()
    assert len(set(ids)) == 50
    assert ids != sorted(ids)
    assert len(BenchPlan().draft_vocab(info).selected_token_ids) == VOCAB
    text = replace(PLAN, token_ids=torch.arange(5)).batches(info)
    assert torch.stack([each for each, _, _ in text]).flatten().tolist()[:12] == [
        *range(5), *range(5), 0, 1
    ]  # fmt: skip
    random = [each for each, _, _ in BenchPlan().batches(info)]
    assert len({tuple(each.flatten().tolist()) for each in random}) == 4
    assert random[0].shape == (1, 512)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"draft_vocab_size": 500}, "name at most 131"),
        ({"batch_size": 10**12}, "1000000000000 x 9 tokens is more than the server takes; name at"),
        ({"token_ids": torch.tensor([131])}, "ids up to 131 of the text"),
    ],
)
def test_what_does_not_fit_the_target_is_refused(run: Any, changes: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        run(replace(PLAN, **changes))
