"""The host memory that docs/operations.md promises, whatever the number of clients."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.seeded_target import B, D, H, T
from tests.server.sharing.conftest import PATIENCE_S, Trainer, problem

pytestmark = pytest.mark.slow

MIB = 1 << 20
BUDGET = 64 * MIB
LARGEST = B * T * 3 * H * 2 + B * (T // 2 + 11 * 39) * D * 4  # an answer's bytes
CEILING = BUDGET + 3 * LARGEST + 8 * LARGEST
ANSWERS = 60


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("clients", [4, 60])
def test_resident_memory_stays_under_the_ceiling_with_readers_that_stall(
    started: Any, trainer: Any, is_right: Any, clients: int
) -> None:
    """As many clients again ask and never read; what they could hold is over the ceiling."""
    server = started(EAGLE3_MAX_BYTES_IN_FLIGHT=str(BUDGET), EAGLE3_STALL_TIMEOUT_S="8")
    pid = server.process.pid
    drain = threading.Thread(target=lambda: list(server.process.stdout))
    drain.start()
    one: Trainer = trainer(server.url)
    assert is_right(39, one.ask(39))
    before = peak = resident(pid)
    is_over = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not is_over.wait(0.002):
            peak = max(peak, resident(pid))

    def train(number: int) -> int:
        mine, refused = trainer(server.url, f"trainer-{number}"), 0
        for count in range(ANSWERS // clients + 1):
            seed = 20 + (number + count) % 20
            while (answer := mine.ask(seed, f"{number}-{count}-{refused}")).status_code == 429:
                assert problem(answer)[1] == "queue_full"
                refused += 1
                is_over.wait(0.05)
            assert is_right(seed, answer)
        return refused

    watcher = threading.Thread(target=watch)
    watcher.start()
    stalled = [one.open(20 + n % 20, f"stalled-{n}", receive_bytes=4096) for n in range(clients)]
    with ThreadPoolExecutor(clients) as pool:
        refused = sum(pool.map(train, range(clients), timeout=PATIENCE_S))
    is_over.set()
    watcher.join()
    for sock in stalled:
        sock.close()
    for _ in range(6000):
        if one.status()["bytes_in_flight"] == 0:
            break
        threading.Event().wait(0.01)
    assert one.status()["bytes_in_flight"] == 0
    assert is_right(39, one.ask(39))
    server.process.terminate()
    assert server.ended() == 0
    drain.join(PATIENCE_S)
    grown, most = (peak - before) / MIB, 2 * clients * LARGEST / MIB
    print(
        f"{clients} trainers, {clients} stalled readers: grew by {grown:.0f} MiB; ceiling "
        f"{CEILING / MIB:.0f}; all their answers {most:.0f}; {refused} refusals"
    )
    assert peak - before <= CEILING
