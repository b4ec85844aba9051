"""What a preflight makes of the times it took."""

from __future__ import annotations

import pytest

from eagle3_client.preflight_measure import Exchange, parse_timing
from eagle3_client.preflight_report import Check, PreflightReport, ServerReport


def exchange(elapsed_s: float, **stages: float) -> Exchange:
    return Exchange(2, 50, elapsed_s, 1_000_000, 400, stages)


@pytest.mark.parametrize(
    ("header", "stages"),
    [
        ("queue;dur=0.200, compute;dur=81, total;dur=94.1", (0.0002, 0.081, 0.0941)),
        ("", ()),
        ("cache;desc=hit, queue;dur=1.5", (0.0015,)),
        ("queue;dur=-1, compute;dur=1e99, head;dur=nan", ()),
        ("queue;dur=" + "9" * 5000, ()),
    ],
)
def test_the_header_is_read_and_what_is_odd_left_out(header: str, stages: object) -> None:
    assert tuple(parse_timing(header).values()) == pytest.approx(stages)


def test_server_time_and_round_trip_are_no_part_of_the_transfer() -> None:
    assert exchange(1.0, total=0.7).transfer_s(0.1) == pytest.approx(0.2)
    assert exchange(1.0, total=0.5, compute=0.4).transfer_s(0.1) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("elapsed_s", "stages", "round_trip_s"),
    [
        (1.0, {"compute": 0.4}, 0.1),  # the server does not say
        (1.0, {"total": 0.9995}, 0.0001),  # half a millisecond
        (1.0, {"total": 0.86}, 0.1),  # less than the round trip may vary by
        (1.0, {"total": 2.0}, 0.1),
    ],
)
def test_what_is_lost_in_noise_is_not_measured(
    elapsed_s: float, stages: dict[str, float], round_trip_s: float
) -> None:
    assert exchange(elapsed_s, **stages).transfer_s(round_trip_s) is None


def test_compute_is_forward_and_head_without_the_queue() -> None:
    busy = exchange(9.0, queue=5.0, compute=2.0, head=1.0, copy=0.5, total=8.6)
    assert busy.compute_s == 3.0
    assert exchange(9.0, total=8.0).compute_s is None


def test_words_of_a_server_cannot_steer_the_terminal() -> None:
    words = "red \x1b[31m and\nlines and a-word-of-" + 90 * "x"
    report = PreflightReport(
        (ServerReport("http://a", {"ready": Check("failed", words)}),), {}, {}, 1
    )
    text = report.to_text(60)
    assert "\x1b" not in text
    assert all(len(line) <= 60 for line in text.splitlines() if "xxx" not in line)
    assert not report.has_passed
