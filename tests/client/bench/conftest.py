"""A bench in simulated time, of a real server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.client.bench.simulation import PLAN, Clock, Planted, settings_of

from eagle3_client.bench import Bench
from eagle3_client.bench_plan import BenchPlan
from eagle3_client.bench_report import BenchReport


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
