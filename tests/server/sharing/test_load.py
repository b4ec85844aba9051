"""Eight trainers at once on a real model: every answer right, none starved, memory bounded."""

from __future__ import annotations

import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch

pytestmark = pytest.mark.slow

CLIENTS, BATCHES, DEPTH = 8, 30, 4


def test_eight_trainers_with_three_draft_vocabs(
    build_model: Any, live_server: Any, connect: Any, batch_of: Any, expect: Any, matches: Any,
    frequency_ordered: Any,
) -> None:  # fmt: skip
    ceiling = 64 << 20
    url = live_server(build_model("llama"), max_bytes_in_flight=ceiling)
    # The server's own model has its hooks, and belongs to its compute thread.
    model, one_at_a_time = build_model("llama"), threading.Lock()
    vocabs = [frequency_ordered(131, size, seed) for seed, size in enumerate((3, 53, 131))]
    most = 0

    def train(number: int) -> list[float]:
        nonlocal most
        draft_ids = vocabs[number % 3]
        backend = connect(None, draft_ids, urls=url, exact=True, max_in_flight=DEPTH)
        generator = torch.Generator().manual_seed(number)
        batches, waits = [], []
        for index in range(BATCHES):
            lengths = torch.randint(2, 40, (1 + index % 4,), generator=generator).tolist()
            batches.append(batch_of(131, tuple(lengths), seed=100 * number + index))
        with backend.prefetch(map(tuple, batches), depth=DEPTH) as prefetch:
            started = time.monotonic()
            for index, (_, batch) in enumerate(prefetch):
                waits.append(time.monotonic() - started)
                with one_at_a_time:
                    expected = expect(model, batches[index], draft_ids)
                matches(batch, expected)
                status = httpx.get(f"{url}/v1/status").json()
                most = max(most, status["bytes_in_flight"])
                started = time.monotonic()
        assert len(waits) == BATCHES
        return waits

    with ThreadPoolExecutor(CLIENTS) as pool:
        waits = [wait for part in pool.map(train, range(CLIENTS)) for wait in part]
    status = httpx.get(f"{url}/v1/status").json()
    assert status["bytes_in_flight"] == status["tokens_in_flight"] == status["queued_requests"] == 0
    assert 0 < most <= ceiling
    ratio = max(waits) / statistics.median(waits)
    print(f"{CLIENTS * BATCHES} right; most bytes in flight {most}; max/median wait {ratio:.1f}")
