"""A bench of a real server: what it counts, and what it names."""

from __future__ import annotations

import itertools
import struct
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.client.bench.simulation import PLAN, Clock, Planted, settings_of

from eagle3_client import InvalidRequest
from eagle3_client import submission as submission_module
from eagle3_client.bench import Bench
from eagle3_client.bench_plan import BenchPlan
from eagle3_server import TransformersTarget

HIDDEN, VOCAB = 48, 131


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
