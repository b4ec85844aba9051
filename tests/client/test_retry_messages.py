"""What a trainer's log says while a call is repeated: soon, not too often, and when it is over."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from eagle3_client import retry
from eagle3_client.retry import Cancellation, Retrier
from eagle3_schemas.errors import NotReady


class Clock(Cancellation):
    """Waiting moves the time on."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def wait(self, timeout_s: float) -> None:
        self.now += timeout_s


@pytest.mark.parametrize(
    ("downtime_s", "warnings"),
    [(0.0, 0), (1.0, 0), (9.0, 2), (40.0, 4)],
    ids=["not at all", "a moment", "once, and its end", "every 15 s, and its end"],
)
def test_a_downtime_is_told_and_its_end_too(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    downtime_s: float,
    warnings: int,
) -> None:
    clock = Clock()
    monkeypatch.setattr(retry, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(retry.random, "uniform", lambda low, high: high)

    def attempt() -> str:
        if clock.now < downtime_s:
            raise NotReady("the target is loading", url="http://host:1")
        return "answer"

    with caplog.at_level(logging.WARNING, "eagle3_client"):
        assert Retrier(900).call(attempt, "model info", clock) == "answer"
    assert len(caplog.records) == warnings
    if warnings:
        first, last = caplog.messages[0], caplog.messages[-1]
        assert "model info: still retrying after 3 s" in first
        assert "http://host:1" in first
        assert "model info: done after" in last
