"""A prefetch in simulated time: a clock, and servers that run one request after another."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from eagle3_client import Prefetch, TargetFailed
from eagle3_client.pace import Depth

ONES = torch.ones(1, 2, dtype=torch.long)
BATCH = (ONES, ONES, ONES)


class Result:
    """Stands for an `Eagle3TargetBatch`."""


class Simulation:
    """A clock, and servers that run one request after another; transfers overlap everything.

    `service_s(n)` is the time of request n on a server, `transfer_s` that of its way.
    """

    def __init__(
        self, service_s: Callable[[int], float], transfer_s: float = 0.0, servers: int = 1
    ) -> None:
        self.now = 0.0
        self.service_s, self.transfer_s = service_s, transfer_s
        self.free_at = [0.0] * servers
        self.results: weakref.WeakSet[Result] = weakref.WeakSet()
        self.cancelled: list[int] = []
        self.failing: set[int] = set()
        self.submitted = self.outstanding = self.most_outstanding = 0

    def submit(self, *_arguments: object) -> Any:
        server = min(range(len(self.free_at)), key=self.free_at.__getitem__)
        done_at = max(self.now, self.free_at[server]) + self.service_s(self.submitted)
        self.free_at[server] = done_at
        arrival = Arrival(self, done_at + self.transfer_s)
        self.submitted += 1
        self.outstanding += 1
        self.most_outstanding = max(self.most_outstanding, self.outstanding)
        return arrival

    def depths(self, depth: Depth, train_s: Callable[[int], float], steps: int) -> list[int]:
        """Train; return the depth at every step."""
        prefetch = Prefetch(self.submit, [BATCH] * steps, depth, clock=lambda: self.now)
        depths = []
        for step, _ in enumerate(prefetch):
            depths.append(prefetch.stats.depth)
            self.now += train_s(step)
        return depths


class Arrival:
    """A handle whose batch is there at a certain time."""

    def __init__(self, simulation: Simulation, at: float) -> None:
        self.simulation, self.at = simulation, at
        self.number = simulation.submitted
        self.value = Result()
        simulation.results.add(self.value)

    def result(self, timeout: float | None = None) -> Any:
        self.simulation.now = max(self.simulation.now, self.at)
        self.simulation.outstanding -= 1
        if self.number in self.simulation.failing:
            raise TargetFailed("the forward failed")
        return self.value

    def cancel(self) -> bool:
        self.simulation.cancelled.append(self.number)
        return True


def changes(depths: list[int]) -> list[int]:
    return [b for a, b in zip([0, *depths], depths, strict=False) if a != b]
